"""Top sentences against a naive loop over sentences with a dense SAE: every row of the three tables, ties included.

The SAE and the activations are built so that all arithmetic is exact (see `exact_sae`): the comparison is ==, whatever
the chunk size, the shard size and the number of processes, and many values tie.

    .venv/bin/python -m pytest tests/test_top_sentences.py
"""

import json
import random
import shutil
import threading
import time
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.pipeline_runs import SITE, call, refusal, some_texts, torchrun, write_activations, write_sentences

import capture_activations as capture
import capture_top_activating_sentences as top
from llama_3 import load_model, load_tokenizer
from pipeline.files import write_json
from sae import Gate, Kind, SparseAutoencoder, save_sae

D_MODEL, N_LATENTS, K = 10, 24, 5
N_SENTENCES, TOP, MIN_TOKENS = 50, 7, 3
SAMPLES = {"examples_per_tenth": 2, "silent_examples": 3, "cofiring_tokens": 150, "cofiring_latents": 4, "seed": 5}
TEXTS = [f"sentence {i}" for i in range(N_SENTENCES)]
SCALE = 2.0**40


def exact_sae(gate: Gate = "topk") -> SparseAutoencoder:
    """eps is so large that the standard deviation does not matter: z = (x - mean) / 2^40, exactly. Activations are
    integers of mean 0 and the encoder holds integers x 2^40, so that sums are exact in any order; the biases l / 64
    keep the latents of a token distinct. Latent 3 never fires. Thresholds differ from every pre-activation."""
    sae = SparseAutoencoder(D_MODEL, N_LATENTS, K, normalize_eps=SCALE, kind=Kind(gate))
    generator = torch.Generator().manual_seed(0)
    sae.initialize(torch.zeros(D_MODEL), generator)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.randint(-2, 3, (N_LATENTS, D_MODEL), generator=generator) * SCALE)
        sae.encoder.bias.copy_(torch.arange(N_LATENTS) / 64 - 4)
        sae.encoder.bias[3] = -1000.0
        if sae.threshold is not None:
            sae.threshold.copy_(torch.arange(N_LATENTS) % 5 + 1 / 128)
    return sae


@pytest.fixture(scope="module")
def data():
    """{sentence_idx: acts}, {sentence_idx: token_ids}: lengths 1 to 9, some without tokens, some equal to others."""
    rng = random.Random(1)
    acts: dict[int, torch.Tensor] = {}
    for i in range(N_SENTENCES):
        if i % 11 == 5:
            continue
        if i % 4 == 2 and i - 2 in acts:
            acts[i] = acts[i - 2]
            continue
        rows = [[rng.randint(-3, 3) for _ in range(D_MODEL - 1)] for _ in range(rng.randint(1, 9))]
        acts[i] = torch.tensor([[*row, -sum(row)] for row in rows], dtype=torch.float32)
    return acts, {i: [rng.randrange(500) for _ in x] for i, x in acts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """sentences, and the same activations in shards of 4, 15 and 1,000 sentences; sae.pth of them."""
    folder = tmp_path_factory.mktemp("top")
    sentences_dir = write_sentences(folder / "sentences", TEXTS)
    for size in (4, 15, 1000):
        write_activations(folder / f"shards-of-{size}", sentences_dir, N_SENTENCES, *data, size)
    save_sae(exact_sae(), folder / "sae.pth", {"site": SITE, "begin_of_text": False})
    return folder


def options(folder, size=15, **more):
    paths = {"data_dir": folder / f"shards-of-{size}", "model_path": folder / "sae.pth"}
    return paths | {"top_sentences": TOP, "min_tokens": MIN_TOKENS} | SAMPLES | more


def splitmix(a: int, b: int, seed: int) -> int:
    """The upper half of SplitMix64's output for the state 2^32 a + b + (seed + 1) gamma."""
    z = (2**32 * a + b + (seed + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) >> 32


def naive(
    sae, acts, token_ids, texts, n_top, min_tokens, examples_per_tenth, silent_examples, cofiring_tokens,
    cofiring_latents, seed
):  # fmt: skip
    """(rows of top.parquet, rows of latents.parquet, rows of examples.parquet)"""
    latents = {}  # sentence_idx -> (n_tokens, n_latents), zeros where not kept
    for i, x in acts.items():
        x = x.double()
        std = (x.std(1, keepdim=True) + sae.normalize_eps).float().double()  # as float32 rounds it
        z = (x - x.mean(1, keepdim=True)) / std
        pre_acts = (z - sae.b_pre.double()) @ sae.encoder.weight.double().t() + sae.encoder.bias.double()
        kept = torch.zeros_like(pre_acts)
        for token, row in enumerate(pre_acts.tolist()):
            passes = lambda j, row=row: row[j] > (0 if sae.threshold is None else sae.threshold[j])
            highest = sorted(range(len(row)), key=lambda j: -row[j])[: sae.k]
            for latent in highest if sae.kind.gate == "topk" else filter(passes, range(len(row))):
                kept[token, latent] = max(row[latent], 0.0)
        latents[i] = kept.detach()
    top_rows, latent_rows, example_rows = [], [], []
    n_tokens = sum(len(x) for x in acts.values())
    counted = {
        (i, position): {latent for latent, value in enumerate(row) if value > 0}
        for i, x in latents.items()
        for position, row in enumerate(x.tolist())
        if splitmix(i, position, seed + 2) < cofiring_tokens / n_tokens * 2**32
    }
    by_hash = lambda latent: lambda i: (np.float32(splitmix(latent, i, seed)), i)
    captured = sorted(acts)
    for latent in range(sae.n_latents):
        by_sentence = {i: x[:, latent].tolist() for i, x in latents.items()}
        row_of = lambda i, by=by_sentence: {
            "sentence_idx": i,
            "text": texts[i],
            "token_ids": token_ids[i],
            "token_activations": [float(np.float16(v)) for v in by[i]],
        }
        for aggregation in ("mean", "max", "last"):
            scored = []
            for i, values in by_sentence.items():
                score = {"mean": sum(values) / len(values), "max": max(values), "last": values[-1]}[aggregation]
                if score > 0 and len(values) >= min_tokens:
                    scored.append((-score, i))
            for rank, (score, i) in enumerate(sorted(scored)[:n_top]):
                about = {"latent": latent, "aggregation": aggregation, "rank": rank}
                top_rows.append(about | {"activation": float(np.float32(-score))} | row_of(i))
        fired = [v for values in by_sentence.values() for v in values if v > 0]
        highest = max(fired, default=0.0)
        tenths: list[list[int]] = [[] for _ in range(10)]
        for i, values in by_sentence.items():
            if max(values) > 0 and len(values) >= min_tokens:
                fraction = np.float32(np.float16(max(values))) / np.float32(highest)
                tenths[min(9, int(fraction * np.float32(10)))].append(i)
        tried = {captured[splitmix(latent, j, seed + 1) * len(captured) >> 32] for j in range(8 * silent_examples)}
        silent = [i for i in tried if fired and max(by_sentence[i]) == 0 and len(by_sentence[i]) >= min_tokens]
        for tenth, some in [(-1, silent), *enumerate(tenths)]:
            n = silent_examples if tenth == -1 else examples_per_tenth
            chosen = sorted(some, key=by_hash(latent))[:n]
            example_rows += [{"latent": latent, "tenth": tenth} | row_of(i) for i in chosen]
        on = lambda j: {token for token, who in counted.items() if j in who}
        jaccard = [(len(on(latent) & on(j)) / max(1, len(on(latent) | on(j))), -j) for j in range(sae.n_latents)]
        together = [pair for pair in sorted(jaccard, reverse=True) if pair[0] > 0 and pair[1] != -latent]
        together = together[:cofiring_latents]
        latent_rows.append(
            {
                "latent": latent,
                "frequency": float(np.float32(len(fired)) / np.float32(n_tokens)),
                "mean": float(np.float32(sum(fired) / max(len(fired), 1))),
                "max": float(np.float32(highest)),
                "sentences": sum(map(len, tenths)),
                "sentences_by_tenth": [len(some) for some in tenths],
                "cofiring_latents": [-j for _, j in together],
                "cofiring_jaccard": [float(np.float32(share)) for share, _ in together],
            }
        )
    return top_rows, latent_rows, example_rows


@pytest.fixture(scope="module")
def expected(data):
    return naive(exact_sae(), *data, TEXTS, TOP, MIN_TOKENS, **SAMPLES)


def read(folder):
    return tuple(pq.read_table(folder / f"sae.{name}.parquet").to_pylist() for name in ("top", "latents", "examples"))


# ---- against the naive loop


@pytest.mark.parametrize(("size", "encode_tokens"), [(15, 4096), (15, 7), (4, 4096), (4, 7), (1000, 1)])
def test_tables_equal_the_naive_loop(folder, expected, tmp_path, size, encode_tokens):
    call(top, **options(folder, size, encode_tokens=encode_tokens, captured_data_output_dir=tmp_path))
    assert read(tmp_path) == expected
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("gate", ["jumprelu", "relu"])
def test_tables_of_an_sae_that_keeps_any_number(folder, data, tmp_path, gate):
    sae = exact_sae(gate)
    save_sae(sae, tmp_path / "sae.pth", {"site": SITE, "begin_of_text": False})
    call(top, **options(folder) | {"model_path": tmp_path / "sae.pth"})
    assert read(tmp_path) == naive(sae, *data, TEXTS, TOP, MIN_TOKENS, **SAMPLES)


def test_the_data_has_what_this_is_about(data, expected):
    rows, latents, examples = expected
    assert sum(r["frequency"] == 0 for r in latents) >= 1 and sum(r["frequency"] > 0 for r in latents) > 10
    ties = 0
    for row, after in zip(rows, rows[1:], strict=False):
        same = all(row[name] == after[name] for name in ("latent", "aggregation", "activation"))
        assert not same or row["sentence_idx"] < after["sentence_idx"]
        ties += same
    assert ties > 50
    full = [r for r in rows if r["rank"] == TOP - 1]
    assert full and len(full) < 3 * N_LATENTS  # some latents have all their sentences, some have fewer
    lengths = {len(x) for x in data[0].values()}
    assert min(lengths) < MIN_TOKENS  # min_tokens leaves some out
    tenths = [tenth for row in latents for tenth in row["sentences_by_tenth"]]
    assert tenths.count(0) > 10 and sum(tenth > SAMPLES["examples_per_tenth"] for tenth in tenths) > 10
    silent = [sum(r["latent"] == latent and r["tenth"] == -1 for r in examples) for latent in range(N_LATENTS)]
    assert {0, SAMPLES["silent_examples"]} <= set(silent)
    assert {0, SAMPLES["cofiring_latents"]} <= {len(row["cofiring_latents"]) for row in latents}


@pytest.mark.slow
def test_two_processes_write_the_same_tables(folder, expected, tmp_path):
    script = "capture_top_activating_sentences.py"
    done = torchrun(2, script, **options(folder, 15, captured_data_output_dir=tmp_path))
    assert done.returncode == 0, done.stderr
    assert read(tmp_path) == expected
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("min_tokens", [1, 6])
def test_min_tokens(folder, data, tmp_path, min_tokens):
    call(top, **options(folder, captured_data_output_dir=tmp_path) | {"min_tokens": min_tokens})
    rows, latents, examples = read(tmp_path)
    assert (rows, latents, examples) == naive(exact_sae(), *data, TEXTS, TOP, min_tokens, **SAMPLES)
    assert min(len(r["token_ids"]) for r in [*rows, *examples]) >= min_tokens


def test_tables_lie_beside_the_sae_by_default(folder, expected, tmp_path):
    for suffix in ("pth", "json"):
        (tmp_path / f"sae.{suffix}").write_bytes((folder / f"sae.{suffix}").read_bytes())
    call(top, **options(folder) | {"model_path": tmp_path / "sae.pth"})
    assert read(tmp_path) == expected


def test_columns(folder, tmp_path):
    call(top, **options(folder, captured_data_output_dir=tmp_path))

    def types(name):
        schema = pq.read_schema(tmp_path / f"sae.{name}.parquet")
        return {field.name: str(field.type).replace("element", "item") for field in schema}

    sentence = {
        "sentence_idx": "int64",
        "text": "large_string",
        "token_ids": "large_list<item: int32>",
        "token_activations": "large_list<item: halffloat>",
    }
    aggregation = "dictionary<values=string, indices=int32, ordered=0>"
    assert types("top") == {
        "latent": "int32", "aggregation": aggregation, "rank": "int32", "activation": "float"
    } | sentence  # fmt: skip
    assert types("examples") == {"latent": "int32", "tenth": "int8"} | sentence
    assert types("latents") == {
        "latent": "int32",
        "frequency": "float",
        "mean": "float",
        "max": "float",
        "sentences": "int64",
        "sentences_by_tenth": "fixed_size_list<item: int64>[10]",
        "cofiring_latents": "large_list<item: int32>",
        "cofiring_jaccard": "large_list<item: float>",
    }


@pytest.mark.slow
def test_real_activations(tiny_model_dir, tmp_path):
    """After capture_activations.py itself, with random weights: values to float tolerance, texts and tokens exactly."""
    texts = some_texts(60)
    sentences_dir = write_sentences(tmp_path / "sentences", texts)
    out = tmp_path / "activations"
    call(
        capture,
        model_dir=tiny_model_dir,
        sentences_dir=sentences_dir,
        output_dir=out,
        sites=[SITE],
        dtype="float32",
        window_sentences=25,
        max_tokens=40,
    )
    sae = SparseAutoencoder(d_model=36, n_latents=50, k=6)
    sae.initialize(torch.zeros(36), torch.Generator().manual_seed(3))
    save_sae(sae, tmp_path / "sae.pth", {"site": SITE, "begin_of_text": False})
    call(top, data_dir=out / SITE, model_path=tmp_path / "sae.pth", top_sentences=9)

    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    ids = {i: tokenizer.encode(text)[:40] for i, text in enumerate(texts) if text}
    acts = {i: model.activations(torch.tensor([x]), SITE)[0].to(torch.bfloat16).float() for i, x in ids.items()}
    rows, latents, _ = read(tmp_path)
    expected_rows, expected_latents, _ = naive(sae, acts, ids, texts, 9, 3, **SAMPLES)
    assert len(rows) == len(expected_rows) > 500
    tolerance = {"rtol": 0.02, "atol": 0.01}  # a stored bfloat16 may be one ulp from the one computed here
    for name in ("activation", "latent", "rank"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in expected_rows], **tolerance)
    for name in ("frequency", "mean", "max"):
        np.testing.assert_allclose([r[name] for r in latents], [r[name] for r in expected_latents], **tolerance)
    same = sum(a["sentence_idx"] == b["sentence_idx"] for a, b in zip(rows, expected_rows, strict=True))
    assert same > 0.95 * len(rows)
    for row in rows:
        assert row["text"] == texts[row["sentence_idx"]] and row["token_ids"] == ids[row["sentence_idx"]]
        values = row["token_activations"]
        score = {"mean": np.mean(values), "max": np.max(values), "last": values[-1]}[row["aggregation"]]
        assert score == pytest.approx(row["activation"], rel=2e-3)


# ---- the table


@given(
    st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 30)), st.integers(1, 5), max_size=60),
    st.integers(1, 6),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_top_table_equals_sorted(values, n_top, batch, rng):
    """values: (latent, sentence) -> value, added in any order and in parts."""
    entries = [(latent, float(value), sentence) for (latent, sentence), value in values.items()]
    rng.shuffle(entries)
    table = top.TopTable(4, n_top)
    for start in range(0, len(entries) + 1, batch):
        latents, scores, sentences = zip(*some, strict=True) if (some := entries[start : start + batch]) else ((),) * 3
        table.add(
            torch.tensor(latents, dtype=torch.int64),
            torch.tensor(scores, dtype=torch.float32),
            torch.tensor(sentences, dtype=torch.int64),
        )
    for latent in range(4):
        best = sorted((-score, sentence) for of, score, sentence in entries if of == latent)[:n_top]
        n = len(best)
        assert table.sentences[latent].tolist() == [sentence for _, sentence in best] + [-1] * (n_top - n)
        assert table.values[latent].tolist() == [-score for score, _ in best] + [-torch.inf] * (n_top - n)


@given(
    st.lists(st.sets(st.integers(0, 7), max_size=4), min_size=1, max_size=30),
    st.integers(1, 9),
    st.sampled_from([1, 20, 2**20]),
)
def test_cofiring_equals_counting_pairs(fired, n_kept, counted_at_once):
    """With 8 latents many indices tie; blocks of latents and all at once give the same."""
    tokens = torch.tensor([[*some, *[-1] * (4 - len(some))] for some in fired], dtype=torch.int32)
    with mock.patch("latents.coactivation._COUNTED_AT_ONCE", counted_at_once):
        companions, index = top.cofiring(tokens, 8, n_kept)
    for latent in range(8):
        expected = []
        for other in set(range(8)) - {latent}:
            both = sum({latent, other} <= some for some in fired)
            either = sum(bool({latent, other} & some) for some in fired)
            expected.append((-both / max(either, 1), other))
        expected = sorted(expected)[:n_kept]
        assert index[latent].tolist() == [-share for share, _ in expected]
        assert companions[latent][index[latent] > 0].tolist() == [other for share, other in expected if share]


def test_hash_is_splitmix64():
    """The first outputs of SplitMix64 seeded with 0, as its reference implementation prints them."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(top.hash32(zero, zero, seed)) for seed in range(3)] == [output >> 32 for output in first]


def test_the_next_shard_is_read_while_one_is_encoded(folder, expected, tmp_path, monkeypatch):
    real_verify, real_encode = top.ActivationStore.verify, top.encode_entries
    chosen = options(folder, 4, captured_data_output_dir=tmp_path)
    last = len(json.loads((folder / "shards-of-4" / "manifest.json").read_text())["shards"]) - 1
    has_been_read = [threading.Event() for _ in range(last + 1)]
    encoded = []

    def verify(store, i):
        real_verify(store, i)
        has_been_read[i].set()

    def encode(*args):
        assert has_been_read[min(len(encoded) + 1, last)].wait(20)
        encoded.append(args)
        return real_encode(*args)

    monkeypatch.setattr(top.ActivationStore, "verify", verify)
    monkeypatch.setattr(top, "encode_entries", encode)
    call(top, **chosen)
    assert len(encoded) == last + 1 and read(tmp_path) == expected


# ---- interruptions and refusals


@pytest.mark.parametrize("killed_in", ["aggregate", "collect_pairs"])
def test_killed_run_continues(folder, expected, tmp_path, monkeypatch, killed_in):
    """Progress is saved every minute; here the clock advances two minutes per reading. Killed in the sixth shard of the
    first pass, or in the last pass."""
    clock = iter(range(0, 10**9, 120))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + next(clock))
    real_encode, encoded = top.encode_entries, []

    def encode(*args):
        encoded.append(args)
        return real_encode(*args)

    def kill(*args):
        if killed_in == "collect_pairs" or len(encoded) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(top, "encode_entries", encode)
    chosen = options(folder, 4, captured_data_output_dir=tmp_path)
    real = getattr(top, killed_in)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(top, killed_in, kill)
        call(top, **chosen)
    assert list(tmp_path.glob("*partial*")) and not list(tmp_path.glob("*.parquet"))
    call(top, **chosen)
    n_shards = len(json.loads((folder / "shards-of-4" / "manifest.json").read_text())["shards"])
    assert len(encoded) == n_shards + (killed_in == "aggregate")  # none twice except the one that was interrupted
    assert read(tmp_path) == expected
    assert not list(tmp_path.glob("*partial*"))


def test_progress_of_other_options_is_not_used(folder, data, tmp_path, monkeypatch):
    clock = iter(range(0, 10**9, 120))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + next(clock))
    chosen = options(folder, 4, captured_data_output_dir=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(top, "collect_pairs", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        call(top, **chosen)
    assert list(tmp_path.glob("*partial*"))
    call(top, **chosen | {"min_tokens": 1})
    assert read(tmp_path) == naive(exact_sae(), *data, TEXTS, TOP, 1, **SAMPLES)


def test_refuses_an_sae_of_another_site(folder, tmp_path, capsys):
    save_sae(exact_sae(), tmp_path / "sae.pth", {"site": "layers.0.resid_pre", "begin_of_text": False})
    said = refusal(capsys, top, **options(folder) | {"model_path": tmp_path / "sae.pth"})
    assert "layers.0.resid_pre" in said and SITE in said
    assert not list(tmp_path.glob("*.parquet"))


def test_refuses_an_sae_of_another_begin_of_text(folder, tmp_path, capsys):
    save_sae(exact_sae(), tmp_path / "sae.pth", {"site": SITE, "begin_of_text": True})
    assert "begin_of_text" in refusal(capsys, top, **options(folder) | {"model_path": tmp_path / "sae.pth"})


def test_refuses_an_sae_of_another_width(folder, tmp_path, capsys):
    sae = SparseAutoencoder(d_model=12, n_latents=24, k=5)
    sae.initialize(torch.zeros(12))
    save_sae(sae, tmp_path / "sae.pth", {"site": SITE, "begin_of_text": False})
    said = refusal(capsys, top, **options(folder) | {"model_path": tmp_path / "sae.pth"})
    assert "d_model 12" in said and str(D_MODEL) in said
    assert not list(tmp_path.glob("*.parquet"))


def moved(folder, tmp_path, **manifest) -> dict:
    """The folder elsewhere, sentences_dir relative to the manifest; options for it."""
    shutil.copytree(folder, tmp_path / "moved")
    path = tmp_path / "moved" / "shards-of-15" / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"sentences_dir": "../sentences"} | manifest)
    return options(tmp_path / "moved")


def test_moved_data_and_another_working_directory(folder, expected, tmp_path, monkeypatch):
    chosen = moved(folder, tmp_path)
    monkeypatch.chdir(tmp_path / "moved")
    relative = {"data_dir": "shards-of-15", "model_path": "sae.pth", "captured_data_output_dir": "."}
    call(top, **chosen | relative)
    assert read(tmp_path / "moved") == expected


MODEL = {"name": "a", "params_sha256": "1", "weights_bytes": 2, "weights_sha256": "3"}


def test_refuses_an_sae_of_another_model_of_the_same_shape(folder, tmp_path, capsys):
    chosen = moved(folder, tmp_path, model=MODEL)
    info = {"site": SITE, "begin_of_text": False}
    save_sae(exact_sae(), tmp_path / "moved" / "sae.pth", info | {"model": MODEL | {"weights_sha256": "4"}})
    said = refusal(capsys, top, **chosen)
    assert "another model" in said and "weights_sha256 is 4" in said
    assert not list((tmp_path / "moved").glob("*.parquet"))


def test_notes_activations_of_another_run(folder, expected, tmp_path, capsys):
    chosen = moved(folder, tmp_path, model=MODEL, activations="one")
    info = {"site": SITE, "begin_of_text": False, "model": MODEL | {"name": "renamed"}}
    for run, n_notes in (("one", 0), ("another", 1)):
        save_sae(exact_sae(), tmp_path / "moved" / "sae.pth", info | {"activations": run})
        call(top, **chosen)
        assert capsys.readouterr().out.count("Note: ") == n_notes
    assert read(tmp_path / "moved") == expected


def test_refuses_what_never_fires(folder, tmp_path, capsys):
    sae = exact_sae()
    with torch.no_grad():
        sae.encoder.bias.fill_(-1000.0)
    save_sae(sae, tmp_path / "sae.pth", {"site": SITE, "begin_of_text": False})
    assert "No latent" in refusal(capsys, top, **options(folder) | {"model_path": tmp_path / "sae.pth"})
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("missing", ["data_dir", "model_path", "sentences_dir"])
def test_refuses_missing_input(folder, tmp_path, capsys, missing):
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refusal(capsys, top, **options(folder) | {missing: nowhere})


def test_refuses_other_sentences(folder, tmp_path, capsys):
    other = write_sentences(tmp_path / "other", TEXTS[:-1])
    said = refusal(capsys, top, **options(folder, sentences_dir=other, captured_data_output_dir=tmp_path / "out"))
    assert str(other) in said and "49" in said and "50" in said


def test_refuses_a_truncated_shard(folder, tmp_path, capsys, data):
    captured = write_activations(tmp_path / "captured", folder / "sentences", N_SENTENCES, *data, 15)
    shard = captured / "acts-00001-00.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    chosen = options(folder, captured_data_output_dir=tmp_path / "out") | {"data_dir": captured}
    assert str(shard) in refusal(capsys, top, **chosen)

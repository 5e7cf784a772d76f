"""Captured activations against `model.activations` of each sentence alone, and the stage's other guarantees.

Float32 rounds differently in batches of other shapes, so a stored bfloat16 may be off by one ulp. Shards of a run that
was killed and continued must be byte-identical, since the batches are the same. So must those of two processes: see
test_faults.py.

    .venv/bin/python -m pytest tests/test_capture.py
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT_DIR, TINY_PARAMS, write_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from support.pipeline_runs import SITE, as_flags, call, refusal, some_texts, the_sentence, torchrun, without_ranks
from support.pipeline_runs import write_sentences as write_sentences_to

import capture_activations as capture
import openwebtext_sentences_dataset
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import checkpoint_identity
from llama_3.model import Transformer
from llama_3.padding import make_batches
from pipeline.activation_store import ActivationStore, run_checksum
from pipeline.errors import InputError
from pipeline.files import sha256, write_json
from pipeline.manifests import MANIFEST, write_manifest
from pipeline.source import Source

SITES = ("layers.2.mlp_out", "layers.0.resid_pre", SITE)
MAX_TOKENS = 30
TEXTS = some_texts(45)
SHARD_TOKENS = 100
OPTIONS = {
    "dtype": "float32",
    "max_tokens": MAX_TOKENS,
    "batch_tokens": 200,
    "window_sentences": 16,  # three windows
    "shard_gb": SHARD_TOKENS * 2 * TINY_PARAMS["dim"] / 1e9,
}


@pytest.fixture(scope="module")
def sentences_dir(tmp_path_factory):
    return write_sentences_to(tmp_path_factory.mktemp("capture") / "sentences", TEXTS)


@pytest.fixture(scope="module")
def options(tiny_model_dir, sentences_dir):
    return {"model_dir": tiny_model_dir, "sentences_dir": sentences_dir, **OPTIONS}


@pytest.fixture(scope="module")
def captured(options, tmp_path_factory):
    """An output folder with three sites."""
    folder = tmp_path_factory.mktemp("captured") / "activations"
    call(capture, **options, sites=SITES, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def token_ids(tiny_model_dir):
    return [load_tokenizer(tiny_model_dir).encode(text)[:MAX_TOKENS] for text in TEXTS]


def assert_within_an_ulp(stored, expected):
    """stored: bfloat16; expected: float32. At most one ulp from the rounded value, and almost always equal to it."""
    rounded = expected.to(torch.bfloat16)
    _, exponent = torch.frexp(rounded.float())
    ulp = 2.0 ** (exponent - 8)  # frexp's mantissa is in [0.5, 1), bfloat16 has 8 bits of it
    assert stored.dtype == torch.bfloat16 and stored.shape == expected.shape
    # Values near 0 are differences of larger ones: float32 noise there is more than an ulp.
    assert ((stored.float() - rounded.float()).abs() <= ulp + 1e-6).all()
    assert (stored == rounded).float().mean() > 0.97


# ---- what is stored


@pytest.mark.parametrize("site", SITES)
def test_every_sentence_has_the_activations_it_has_alone(captured, tiny_model_dir, token_ids, site):
    model = load_model(tiny_model_dir)
    store = ActivationStore(captured / site)
    assert store.manifest["site"] == site and store.d_model == TINY_PARAMS["dim"]
    for i, ids in enumerate(token_ids):
        found = store.sentence(i)
        if not ids:
            assert found is None
            continue
        assert found[1].tolist() == ids
        assert_within_an_ulp(found[0], model.activations(torch.tensor([ids]), site)[0])
    assert store.sentence(len(TEXTS)) is None


def test_shards_hold_every_sentence_once_in_order(captured, token_ids):
    store = ActivationStore(captured / SITE)
    sentence_idx = [i for shard in store.shards() for i in shard.sentence_idx.tolist()]
    ids = [t for shard in store.shards() for t in shard.token_ids.tolist()]
    assert sentence_idx == [i for i, ids in enumerate(token_ids) if ids]
    assert ids == [t for ids in token_ids for t in ids]
    assert sum(len(shard.acts) for shard in store.shards()) == store.n_tokens == len(ids)
    for shard in store.shards():
        assert shard.offsets.diff().tolist() == [len(token_ids[i]) for i in shard.sentence_idx.tolist()]


def test_counts(captured, tiny_model_dir, token_ids):
    lengths = [len(load_tokenizer(tiny_model_dir).encode(text)) for text in TEXTS]
    assert json.loads((captured / SITE / MANIFEST).read_text())["counts"] == {
        "sentences": sum(n > 0 for n in lengths),
        "tokens": sum(map(len, token_ids)),
        "empty_sentences": lengths.count(0),
        "cut_sentences": sum(n > MAX_TOKENS for n in lengths),
    }
    assert lengths.count(0) > 0 and max(lengths) > MAX_TOKENS  # the data covers this case


def test_the_manifest_states_where_the_activations_come_from(options, captured, tiny_model_dir, tmp_path, monkeypatch):
    """It reads the same from another working directory; a repeated run counts as the same, a different one does not."""
    stores = {site: ActivationStore(captured / site) for site in SITES}
    monkeypatch.chdir(tmp_path)
    for site, store in stores.items():
        source = Source.read(json.loads((captured / site / MANIFEST).read_text()), captured / site / MANIFEST)
        assert (source.site, source.layer, source.d_model) == (site, int(site.split(".")[1]), TINY_PARAMS["dim"])
        assert (source.begin_of_text, source.max_tokens) == (False, MAX_TOKENS)
        assert source.bos_id == load_tokenizer(tiny_model_dir).bos_id
        assert source.model == checkpoint_identity(str(tiny_model_dir))
        assert source.documents is None  # the published dataset does not state them
        assert Path(source.model_dir()).samefile(tiny_model_dir)
        assert list(source.sentences()) == TEXTS
        assert source.activations == store.source.activations == run_checksum(store.records)
        assert store.source.folder("activations_dir", None, "--data_dir") == str(captured / site)
    assert len({store.source.activations for store in stores.values()}) == len(SITES)
    call(capture, **options, sites=[SITE], output_dir=tmp_path / "again")
    assert ActivationStore(tmp_path / "again" / SITE).source.activations == stores[SITE].source.activations


def test_the_manifest_states_the_documents(tiny_model_dir, tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"text": "One is here. The other is there."}\n' * 9)
    flags = {"input_path": tmp_path / "documents.jsonl", "output_dir": tmp_path / "sentences"}
    call(openwebtext_sentences_dataset, **flags, punkt="corpus", num_processes=1)
    options = {**OPTIONS, "model_dir": tiny_model_dir, "sentences_dir": tmp_path / "sentences", "sites": [SITE]}
    call(capture, **options, output_dir=tmp_path / "out")
    source = ActivationStore(tmp_path / "out" / SITE).source
    manifest = json.loads((tmp_path / "sentences" / MANIFEST).read_text())
    assert source.documents == manifest["decides"]["documents"]
    assert source.need("dataset")["shards"] == [shard["sha256"] for shard in manifest["shards"]]


def test_folder_holds_what_the_manifest_names_and_no_more(captured):
    assert sorted(p.name for p in captured.iterdir() if not p.name.startswith(".")) == sorted(SITES)
    for site in SITES:
        records = ActivationStore(captured / site).records
        names = sorted(p.name for p in (captured / site).iterdir())
        assert names == sorted([MANIFEST, *(r["file"] for r in records)])
        assert all(sha256(captured / site / r["file"]) == r["sha256"] for r in records)


def test_shards_respect_shard_gb(captured):
    store = ActivationStore(captured / SITE)
    by_window: dict[str, list] = {}
    for record, shard in zip(store.records, store.shards(), strict=True):
        assert record["n_tokens"] <= SHARD_TOKENS or record["n_sentences"] == 1
        by_window.setdefault(record["file"].split("-")[1], []).append(shard)
    assert max(map(len, by_window.values())) > 2
    for shards in by_window.values():
        for shard, after in zip(shards, shards[1:], strict=False):
            assert len(shard.acts) + int(after.offsets[1]) > SHARD_TOKENS  # full: the next sentence did not fit


def test_a_sentence_larger_than_a_shard_has_its_own(options, tmp_path):
    call(capture, **options | {"shard_gb": 1e-9}, sites=[SITE], output_dir=tmp_path / "out")
    assert {r["n_sentences"] for r in ActivationStore(tmp_path / "out" / SITE).records} == {1}


def test_begin_of_text_is_seen_and_not_stored(options, tmp_path, tiny_model_dir, token_ids):
    call(capture, **options, sites=[SITE], begin_of_text="true", output_dir=tmp_path / "out")
    model, bos_id = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir).bos_id
    store = ActivationStore(tmp_path / "out" / SITE)
    assert store.manifest["begin_of_text"] is True and store.manifest["bos_id"] == bos_id
    assert store.n_tokens == sum(map(len, token_ids))
    for i, ids in enumerate(token_ids):
        if ids:
            acts, stored_ids = store.sentence(i)
            assert stored_ids.tolist() == ids
            assert_within_an_ulp(acts, model.activations(torch.tensor([[bos_id, *ids]]), SITE)[0, 1:])


def test_begin_of_text_that_the_tokenizer_does_not_have_is_refused(options, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer(options["model_dir"])
    tokenizer.bos_id = None
    monkeypatch.setattr(capture, "load_tokenizer", lambda model_dir: tokenizer)
    said = refusal(capsys, capture, **options, sites=[SITE], begin_of_text="true", output_dir=tmp_path / "out")
    assert said.endswith("has no begin-of-text; write --begin_of_text no.") and not (tmp_path / "out").exists()


def test_num_samples_takes_the_first(options, captured, tmp_path):
    call(capture, **options, sites=[SITE], num_samples=10, output_dir=tmp_path / "out")
    few, all_ = ActivationStore(tmp_path / "out" / SITE), ActivationStore(captured / SITE)
    assert few.manifest["counts"]["sentences"] + few.manifest["counts"]["empty_sentences"] == 10
    assert few.sentence(10) is None
    assert few.sentence(9)[1].equal(all_.sentence(9)[1])


def test_says_that_fewer_sentences_exist_than_asked_for(options, tmp_path, capsys):
    call(capture, **options, sites=[SITE], num_samples=46, output_dir=tmp_path / "a")
    said = capsys.readouterr().out
    assert "asks for 46 sentences" in said and f"{options['sentences_dir']} has 45" in said
    call(capture, **options, sites=[SITE], num_samples=45, output_dir=tmp_path / "b")
    assert "asks for" not in capsys.readouterr().out


@pytest.mark.parametrize("texts", [[""], ["", "a"], ["a", ""], ["a"] + [""] * 40])
def test_empty_sentences_at_the_edges(tiny_model_dir, tmp_path, texts):
    sentences_dir = write_sentences_to(tmp_path / "sentences", texts)
    options = {**OPTIONS, "model_dir": tiny_model_dir, "sentences_dir": sentences_dir, "sites": [SITE]}
    call(capture, **options, output_dir=tmp_path / "out")
    store = ActivationStore(tmp_path / "out" / SITE)
    assert [store.sentence(i) is None for i in range(len(texts))] == [not text for text in texts]
    assert store.manifest["counts"]["empty_sentences"] == texts.count("")


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 200))
def test_batches_hold_every_index_once_within_the_budget(lengths, batch_tokens):
    batches = make_batches(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    for batch, after in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * lengths[batch[0]] > batch_tokens and after  # no batch had room for one more


# ---- processes and interruptions


@pytest.mark.parametrize("n_sentences", [1, 255, 512, 2048, 2049, 32_001, 25_000_000])
def test_eight_processes_have_windows_where_there_are_sentences_enough(n_sentences):
    size = capture.window_size(n_sentences, 16_384)
    n_windows = -(-n_sentences // size)
    assert size <= 16_384 and n_windows >= min(8, n_sentences // 256)
    assert n_windows == 1 or size >= 256
    assert capture.window_size(n_sentences, 100) == 100


def test_smaller_windows_hold_the_same_activations(options, captured, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "_SMALL_WINDOW", 4)
    call(capture, **options, sites=[SITE], output_dir=tmp_path)
    found, expected = ActivationStore(tmp_path / SITE), ActivationStore(captured / SITE)
    assert found.manifest["decides"]["window_sentences"] == 6  # of 45
    assert len({shard["file"].split(".")[0][:10] for shard in found.manifest["shards"]}) == 8
    for i in range(len(TEXTS)):
        if (one := expected.sentence(i)) is not None:
            assert_within_an_ulp(found.sentence(i)[0], one[0].float())


def records_of(folder, site=SITE):
    return ActivationStore(folder / site).records  # with sha256


def test_interrupted_run_continues(options, captured, tmp_path, monkeypatch):
    calls = []
    window = capture.Capturer.window

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:  # two to measure the rate, then two windows
            raise KeyboardInterrupt
        return window(*args)

    monkeypatch.setattr(capture.Capturer, "window", interrupted)
    with pytest.raises(SystemExit) as exit_:
        call(capture, **options, sites=SITES, output_dir=tmp_path / "out")
    assert exit_.value.code == 130
    with pytest.raises(InputError, match="not complete"):
        ActivationStore(tmp_path / "out" / SITE)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / SITE).glob("acts-00000-*")}
    assert first

    monkeypatch.setattr(capture.Capturer, "window", lambda *args: calls.append(args) or window(*args))
    calls.clear()
    call(capture, **options, sites=SITES, output_dir=tmp_path / "out")
    assert len(calls) == 3  # two to measure the rate, then the last window
    assert all(p.stat().st_mtime_ns == t for p, t in first.items())
    for site in SITES:
        assert records_of(tmp_path / "out", site) == records_of(captured, site)

    calls.clear()
    call(capture, **options, sites=SITES, output_dir=tmp_path / "out")
    assert not calls  # complete


def test_a_lost_window_is_captured_again(options, captured, tmp_path):
    """The state after a kill: no complete manifest, notes of finished windows only, half of a window's shards."""
    out = tmp_path / "out"
    call(capture, **options, sites=[SITE], output_dir=out)
    manifest = json.loads((out / SITE / MANIFEST).read_text())
    records = manifest["shards"]
    for number in (0, 2):
        of_window = [r for r in records if r["file"].startswith(f"acts-{number:05d}")]
        n = sum(r["n_sentences"] for r in of_window)
        start, end = number * 16, min(number * 16 + 16, len(TEXTS))
        note = {"shards": of_window, "n_empty": end - start - n, "n_cut": 0}
        write_json(capture.window_note(out / SITE, number), note)
    (out / SITE / "acts-00001-00.safetensors").unlink()
    write_manifest(out / SITE, "capture_activations.py", complete=False, decides=manifest["decides"])
    call(capture, **options, sites=[SITE], output_dir=out)
    assert records_of(out) == records_of(captured)


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_noted_window_whose_shard_is_lost_is_captured_again(options, captured, tmp_path, monkeypatch, damage):
    """What a careless `rm` or a machine crash leaves of an unfinished run."""
    out = tmp_path / "out"

    def interrupted(folder, name, complete, **fields):
        if complete:
            raise KeyboardInterrupt
        return write_manifest(folder, name, complete, **fields)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(capture, "write_manifest", interrupted)
        call(capture, **options, sites=[SITE], output_dir=out)
    shard = out / SITE / "acts-00001-01.safetensors"
    shard.unlink() if damage == "gone" else shard.write_bytes(shard.read_bytes()[:-1])
    call(capture, **options, sites=[SITE], output_dir=out)
    assert records_of(out) == records_of(captured)
    assert all(sha256(out / SITE / r["file"]) == r["sha256"] for r in records_of(out))


def test_killed_between_the_manifest_and_the_tidying_up(options, captured, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(capture, "remove_notes", lambda folder: None)  # killed right before
        call(capture, **options, sites=[SITE], output_dir=out)
    assert list((out / SITE).glob("window-*"))
    call(capture, **options, sites=[SITE], output_dir=out)
    assert not list((out / SITE).glob("window-*")) and records_of(out) == records_of(captured)


# ---- memory of a GPU


def small_memory(monkeypatch, n_tokens):
    """A device with memory for batches of n_tokens; returns the sizes of the batches that were tried."""
    tried = []
    activations = Transformer.activations

    def limited(model, tokens, sites):
        tried.append(tokens.numel())
        if tokens.numel() > n_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return activations(model, tokens, sites)

    monkeypatch.setattr(Transformer, "activations", limited)
    return tried


def test_a_batch_that_does_not_fit_the_gpu_is_halved(options, tiny_model_dir, token_ids, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        tried = small_memory(patch, 60)
        call(capture, **options, sites=SITES, output_dir=tmp_path / "out")
    assert max(tried) > 120 and sum(n > 60 for n in tried) <= 3  # later batches are halved without another try
    assert "A batch did not fit the GPU's memory" in capsys.readouterr().out
    model = load_model(tiny_model_dir)
    for site in SITES:
        store = ActivationStore(tmp_path / "out" / site)
        for i, ids in enumerate(token_ids):
            if ids:
                assert_within_an_ulp(store.sentence(i)[0], model.activations(torch.tensor([ids]), site)[0])


def test_a_sentence_that_does_not_fit_the_gpu_is_an_error(options, tmp_path, monkeypatch, capsys):
    small_memory(monkeypatch, MAX_TOKENS - 1)
    said = refusal(capsys, capture, **options, sites=[SITE], output_dir=tmp_path / "out")
    assert f"{MAX_TOKENS} tokens does not fit" in said and "--max_tokens" in said


@pytest.mark.slow
def test_killed_while_writing_a_shard(options, captured, tmp_path):
    source = """
        import os, signal
        import capture_activations
        from pipeline import activation_store
        from pipeline.run import run

        save_file = activation_store.save_file
        def killed(tensors, path):
            save_file(tensors, path)
            if "acts-00001-01" in str(path):
                os.truncate(path, 1000)
                os.kill(os.getpid(), signal.SIGKILL)
        activation_store.save_file = killed
        run(capture_activations.main)
    """
    flags = as_flags({**options, "sites": [SITE], "output_dir": tmp_path / "out"})
    command = [sys.executable, "-c", "if True:" + source, *flags]
    dead = subprocess.run(command, cwd=PROJECT_DIR, env=without_ranks(), capture_output=True, timeout=60)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    names = [p.name for p in (tmp_path / "out" / SITE).iterdir()]
    assert "acts-00001-00.safetensors" in names and "acts-00001-01.safetensors" not in names

    call(capture, **options, sites=[SITE], output_dir=tmp_path / "out")
    assert records_of(tmp_path / "out") == records_of(captured)


@pytest.mark.parametrize("name", [".acts-00001-01.safetensors.12345.tmp", ".tmpxQNfXG"])  # ours, safetensors' own
def test_half_files_of_a_killed_run_go(options, tmp_path, name):
    half = tmp_path / "out" / SITE / name
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    call(capture, **options, sites=[SITE], output_dir=tmp_path / "out")
    assert not half.exists()


def test_another_site_later_in_the_same_folder(options, captured, tmp_path):
    call(capture, **options, sites=[SITE], output_dir=tmp_path / "out")
    call(capture, **options, sites=SITES, output_dir=tmp_path / "out")
    for site in SITES:
        assert records_of(tmp_path / "out", site) == records_of(captured, site)


def test_killed_between_the_manifests_of_two_sites(options, captured, tmp_path, monkeypatch):
    """By then every window is written, so continuing must compute nothing."""

    def interrupted(folder, name, complete, **fields):
        if complete and folder.name == SITES[1]:
            raise KeyboardInterrupt
        return write_manifest(folder, name, complete, **fields)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(capture, "write_manifest", interrupted)
        call(capture, **options, sites=SITES, output_dir=tmp_path / "out")
    ActivationStore(tmp_path / "out" / SITES[0])  # whole

    calls = []
    window = capture.Capturer.window
    monkeypatch.setattr(capture.Capturer, "window", lambda *args: calls.append(args) or window(*args))
    call(capture, **options, sites=SITES, output_dir=tmp_path / "out")
    for site in SITES:
        assert records_of(tmp_path / "out", site) == records_of(captured, site)
    assert len(calls) <= 2  # to measure the rate


# ---- refusals


def no_output(folder):
    assert not list(folder.rglob("*.safetensors")) and not list(folder.rglob("*.json"))


def test_refuses_a_missing_sentences_folder(options, tmp_path, capsys):
    missing = tmp_path / "nowhere"
    said = refusal(capsys, capture, **options | {"sentences_dir": missing}, sites=[SITE], output_dir=tmp_path / "out")
    assert str(missing) in said
    no_output(tmp_path)


def test_refuses_a_folder_without_sentences(options, tmp_path, capsys):
    folder = write_sentences_to(tmp_path / "empty", [])
    said = refusal(capsys, capture, **options | {"sentences_dir": folder}, sites=[SITE], output_dir=tmp_path / "out")
    assert said == f"There are no sentences in {folder}; give another folder."
    assert not (tmp_path / "out").exists()


def test_refuses_a_folder_without_a_model(options, tmp_path, capsys):
    said = refusal(capsys, capture, **options | {"model_dir": tmp_path}, sites=[SITE], output_dir=tmp_path / "out")
    assert str(tmp_path) in said and "params.json" in said
    no_output(tmp_path)


@pytest.mark.parametrize("site", ["layers.3.attention_norm", "layers.1.nowhere", "attention_norm"])
def test_refuses_an_unknown_site(options, tmp_path, capsys, site):
    said = refusal(capsys, capture, **options, sites=[SITE, site], output_dir=tmp_path / "out")
    assert repr(site) in said
    no_output(tmp_path)


@pytest.mark.parametrize("file", ["consolidated.00.pth", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_refuses_a_damaged_model(options, tiny_model_dir, tmp_path, capsys, file, damage):
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    if damage == "missing":
        (model_dir / file).unlink()
    else:
        whole = (model_dir / file).read_bytes()
        (model_dir / file).write_bytes(whole[: len(whole) // 2])
    said = refusal(capsys, capture, **options | {"model_dir": model_dir}, sites=[SITE], output_dir=tmp_path / "out")
    assert file in said and str(model_dir) in said
    no_output(tmp_path / "out")


def test_refuses_a_tokenizer_larger_than_the_vocabulary(options, tmp_path, capsys):
    model_dir = write_tiny_model(tmp_path / "model", vocab_size=300)
    said = refusal(capsys, capture, **options | {"model_dir": model_dir}, sites=[SITE], output_dir=tmp_path / "out")
    assert str(model_dir) in said and "300" in said and str(TINY_PARAMS["vocab_size"]) in said
    no_output(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 29), ("dtype", "bfloat16"), ("begin_of_text", "true"), ("window_sentences", 8), ("num_samples", 7)],
)
def test_refuses_a_folder_begun_with_another_constant(options, captured, tmp_path, capsys, name, value):
    before = {p: p.stat().st_mtime_ns for p in captured.rglob("*.*")}
    said = refusal(capsys, capture, **options | {name: value}, sites=[SITE], output_dir=captured)
    assert str(captured / SITE) in said and {"num_samples": "dataset"}.get(name, name) in said
    assert before == {p: p.stat().st_mtime_ns for p in captured.rglob("*.*")}


def test_refuses_other_published_sentences_in_the_same_folder(options, tmp_path, capsys):
    """They have no checksums, so size and modification time must do."""
    published = tmp_path / "published"
    published.mkdir()
    write = lambda text: pq.write_table(pa.table({"text": [text] * 9}), published / "train.parquet")
    write("the one")
    chosen = options | {"sentences_dir": published, "sites": [SITE], "output_dir": tmp_path / "out", "num_samples": 0}
    call(capture, **chosen)
    call(capture, **chosen)
    write("the two")
    assert "was begun with sentence_files" in refusal(capsys, capture, **chosen)


def test_sentences_of_a_single_file(options, tmp_path):
    """Other files beside it are ignored, here and by whoever reads the activations."""
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": [f"{name} {i}" for i in range(5)]}), tmp_path / f"{name}.parquet")
    chosen = options | {"sentences_dir": tmp_path / "b.parquet", "num_samples": 0}
    call(capture, **chosen, sites=[SITE], output_dir=tmp_path / "out")
    found = ActivationStore(tmp_path / "out" / SITE).source.sentences()
    assert sorted(found) == [f"b {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", 0, "is too small"),
        ("window_sentences", 0, "is too small"),
        ("num_samples", -1, "is too small"),
        ("seed", -1, "is too small"),
        ("max_tokens", 10**6, "exceeds the context"),
    ],
)
def test_refuses_numbers_out_of_range(options, tmp_path, capsys, name, value, said):
    chosen = options | {"output_dir": tmp_path / "out", name: value}
    assert f"--{name} {value} {said}" in refusal(capsys, capture, **chosen)
    no_output(tmp_path / "out")


def test_too_small_a_disk_leaves_nothing(options, tmp_path, capsys, monkeypatch):
    """Not even a manifest, which would later refuse other options."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    chosen = options | {"sites": [SITE], "output_dir": tmp_path / "out"}
    assert "free some or write elsewhere" in refusal(capsys, capture, **chosen)
    no_output(tmp_path / "out")


def test_refuses_another_model_in_the_same_folder(options, captured, tmp_path, capsys):
    model_dir = write_tiny_model(tmp_path / "other", rope_theta=10_000.0)
    said = refusal(capsys, capture, **options | {"model_dir": model_dir}, sites=[SITE], output_dir=captured)
    assert "with model" in said


def with_nan_for(character: str, tiny_model_dir, folder):
    shutil.copytree(tiny_model_dir, folder)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    state["tok_embeddings.weight"][ord(character)] = torch.nan
    torch.save(state, folder / "consolidated.00.pth")
    return folder


@pytest.mark.parametrize(("where", "n"), [(7, 45), (70, 90)])  # among those that measure the rate, and not
def test_nan_names_the_sentence(options, tiny_model_dir, tmp_path, capsys, where, n):
    model_dir = with_nan_for("#", tiny_model_dir, tmp_path / "model")
    texts = [f"aaaa {i}" for i in range(n)]
    texts[where] = "the #"
    sentences_dir = write_sentences_to(tmp_path / "sentences", texts)
    site = "layers.0.attention_norm"  # before any attention: 0 x NaN is NaN, so attention spreads it to earlier tokens
    changed = {"model_dir": model_dir, "sentences_dir": sentences_dir, "sites": [site]}
    said = refusal(capsys, capture, **options | changed, output_dir=tmp_path / "out")
    token = len(load_tokenizer(model_dir).encode("the #")) - 1
    assert f"sentence {where}, token {token}" in said and site in said
    assert ("of a sample" if where < 64 else "of acts-00004") in said
    with pytest.raises(InputError):
        ActivationStore(tmp_path / "out" / site)


def test_nan_names_the_sentence_of_a_large_set(options, tiny_model_dir, tmp_path, capsys):
    """From 2,000 sentences on, at most every second one is used to measure the rate."""
    model_dir = with_nan_for("#", tiny_model_dir, tmp_path / "model")
    sentences_dir = write_sentences_to(tmp_path / "sentences", ["the #" if i == 10 else "aaaa" for i in range(2000)])
    changed = {"model_dir": model_dir, "sentences_dir": sentences_dir, "sites": [SITE]}
    said = refusal(capsys, capture, **options | changed, output_dir=tmp_path / "out")
    assert "sentence 10," in said


@pytest.mark.parametrize(("where", "n"), [(7, 45), (70, 90)])  # among those that measure the rate, and not
def test_a_site_with_nan_does_not_stop_the_others(options, tiny_model_dir, tmp_path, capsys, monkeypatch, where, n):
    """And once the model gives numbers there, the same command captures what is missing."""
    texts = [f"aaaa {i}" for i in range(n)]
    texts[where] = "the #"
    folders = {"sentences_dir": write_sentences_to(tmp_path / "sentences", texts)}
    call(capture, **options | folders, sites=SITES, output_dir=tmp_path / "whole")
    activations = Transformer.activations

    def with_nan(model: Transformer, tokens: torch.Tensor, sites: list[str]) -> dict[str, torch.Tensor]:
        acts = activations(model, tokens, sites)
        if SITE in acts and (tokens == ord("#")).any():
            acts[SITE][tokens == ord("#")] = torch.nan
        return acts

    folders["output_dir"] = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "activations", with_nan)
        said = refusal(capsys, capture, **options | folders, sites=SITES)
        assert f"NaN or infinity at {SITE} for sentence {where}," in said
        assert said.endswith(f"Not captured: {SITE}. All other sites are.")
    for site in SITES:
        if site == SITE:
            with pytest.raises(InputError):
                ActivationStore(tmp_path / "out" / site)
        else:
            assert records_of(tmp_path / "out", site) == records_of(tmp_path / "whole", site)
    call(capture, **options | folders, sites=SITES)
    assert records_of(tmp_path / "out") == records_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_agree_on_the_sites_with_nan(options, tiny_model_dir, tmp_path):
    model_dir = with_nan_for("#", tiny_model_dir, tmp_path / "model")
    state = torch.load(model_dir / "consolidated.00.pth", weights_only=True)
    state["tok_embeddings.weight"].nan_to_num_()
    state["layers.1.ffn_norm.weight"][0] = torch.nan
    torch.save(state, model_dir / "consolidated.00.pth")
    sites = ("layers.1.ffn_norm", "layers.1.resid_mid", "layers.2.resid_pre")
    done = torchrun(2, "capture_activations.py", **options | {"model_dir": model_dir}, sites=sites, output_dir=tmp_path)
    assert done.returncode != 0
    assert the_sentence(done.stderr).endswith(f"Not captured: {sites[0]}, {sites[2]}. All other sites are.")
    assert ActivationStore(tmp_path / sites[1]).n_tokens > 0
    for site in sites[::2]:
        with pytest.raises(InputError):
            ActivationStore(tmp_path / site)


@pytest.mark.slow
def test_torchrun_says_what_is_missing_once(options, tmp_path):
    options = options | {"sentences_dir": tmp_path / "nowhere"}
    done = torchrun(2, "capture_activations.py", **options, sites=[SITE], output_dir=tmp_path / "out")
    assert done.returncode != 0
    assert str(tmp_path / "nowhere") in the_sentence(done.stderr)
    no_output(tmp_path)

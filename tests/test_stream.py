"""Training on a stream: which activations each step uses, against loops that state the plan; whole runs of the script.

.venv/bin/python -m pytest tests/test_stream.py
"""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_PARAMS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.pipeline_runs import some_texts, write_sentences
from support.sae_runs import TRAINING, assert_same_run, assert_similar_run, metrics_of, places, refusal, run_script
from support.training_with_mishaps import in_processes

import sae_training
from autoencoder.inputs import KindOptions, Place, StreamOptions, open_stream, start_stream
from autoencoder.step import Step, StepOptions
from llama_3 import load_model, load_tokenizer
from pipeline.activation_stream import LANES, StreamedRows, deal, plan_fillings
from pipeline.distributed import ALONE, Grid, make_grid
from pipeline.packing import pack
from pipeline.statistics import normalize
from sae import SparseAutoencoder, load_sae_model
from sae_training import learning_rate

D = TINY_PARAMS["dim"]
SITE, READ, WRITE = "layers.1.resid_post", "layers.1.ffn_norm", "layers.1.mlp_out"
N, N_TRAIN = 130, 104  # sentences
BATCH, BUFFER, MAX_TOKENS = 64, 800, 30
OPTIONS = TRAINING | {
    "batch_size": BATCH,
    "num_epochs": 2,
    "buffer_size": BUFFER,
    "validation_fraction": 0.2,
    "max_tokens": MAX_TOKENS,
    "batch_tokens": 200,
    "dtype": "float32",
}


# ---- the plan


@given(st.lists(st.integers(0, 20), max_size=200), st.integers(1, 900), st.integers(1, 4))
@settings(max_examples=30)
def test_every_sentence_is_in_one_lane_of_one_filling(lengths, buffer_size, rows_per_lane):
    lengths = np.array(lengths, dtype=np.int32)
    longest = max([0, *lengths.tolist()])
    fillings = plan_fillings(lengths, buffer_size, rows_per_lane)
    dealt = [i for filling in fillings for lane in filling.lanes for i in lane.tolist()]
    assert sorted(dealt) == np.flatnonzero(lengths).tolist()
    last = -1
    batch_size = LANES * rows_per_lane
    for filling in fillings:
        assert len(filling.lanes) == LANES and all((np.diff(lane) > 0).all() for lane in filling.lanes)
        sums = [int(lengths[lane].sum()) for lane in filling.lanes]
        at_most = max(buffer_size, batch_size) + (2 * batch_size if filling is fillings[-1] else 4 * LANES + longest)
        assert sum(sums) <= at_most and max(sums) - min(sums) <= longest
        assert filling.n_rows % rows_per_lane == 0 and filling.n_rows <= min(sums) < filling.n_rows + rows_per_lane
        members = sorted(i for lane in filling.lanes for i in lane.tolist())
        assert not members or members[0] > last  # fillings are consecutive
        last = members[-1] if members else last


def test_lanes_are_alike_and_little_is_dropped():
    lengths = np.random.default_rng(0).integers(1, 100, 3200)
    lanes = deal(np.arange(3200), lengths)
    sums = [int(lengths[lane].sum()) for lane in lanes]
    assert max(sums) - min(sums) <= 2 and all(180 < len(lane) < 220 for lane in lanes)
    assert max(abs(lengths[lane].std() - lengths.std()) for lane in lanes) < 3
    for buffer_size, rows_per_lane in ((20_000, 16), (20_000, 64), (50_000, 64), (10**6, 100)):
        fillings = plan_fillings(lengths, buffer_size, rows_per_lane)
        n_dropped = int(lengths.sum()) - LANES * sum(filling.n_rows for filling in fillings)
        assert 0 <= n_dropped <= 2 * LANES * rows_per_lane + len(fillings) * 150


# ---- which rows a step uses, with a stand-in for the model


class Numbered:
    """A model whose activation is (sentence / 100, sentence % 100, position, 127): packed and unpacked, it is exact."""

    sites = ("layers.0.resid_pre",)
    model = SimpleNamespace(args=SimpleNamespace(dim=4))

    def window(self, window, on_batch):
        rows = [
            [i // 100, i % 100, position, 127]
            for i, ids in zip(window.sentence_idx, window.token_ids, strict=True)
            for position in range(len(ids))
        ]
        return {self.sites[0]: pack(torch.tensor(rows).reshape(-1, 4).bfloat16())}


class Letters:
    """Sentence i has lengths[i] letters, each a token."""

    folder = Path("sentences")

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return "a" * int(self.lengths[i])


def stream_of(lengths, first_held_out, buffer_size, batch_size, seed, rank=0, size=1) -> StreamedRows:
    """As process `rank` of `size` has it; what others would say is left out."""
    w = SimpleNamespace(
        rank=rank, size=size, device=torch.device("cpu"), is_main=rank == 0, gather=lambda value: [value]
    )
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
    sizes = first_held_out, buffer_size, batch_size, seed
    return StreamedRows(Letters(lengths), tokenizer, 120, Numbered(), lengths, *sizes, Grid(w, w, ALONE))


def rows_of(stream: StreamedRows, steps: range) -> list[list[tuple[int, int]]]:
    """(sentence, position) of every row of each step."""
    found = []
    with stream.reading(steps, lambda: False) as following:
        for _ in steps:
            (rows,) = following().values()
            found.append([(round(a) * 100 + round(b), round(c)) for a, b, c, _ in rows.tolist()])
    return found


def naive(lengths, n_train, buffer_size, batch_size, seed, n_epochs) -> list[list[tuple[int, int]]]:
    """The same, from the fillings, in loops."""
    fillings = plan_fillings(lengths[:n_train], buffer_size, batch_size // LANES)
    steps = []
    for epoch in range(n_epochs):
        for number in np.random.default_rng((seed, epoch)).permutation(len(fillings)).tolist():
            lanes = []
            for i, lane in enumerate(fillings[number].lanes):
                rows = [(s, p) for s in lane.tolist() for p in range(lengths[s])]
                lanes.append([rows[j] for j in np.random.default_rng((seed, epoch, number, i)).permutation(len(rows))])
            take = batch_size // LANES
            n_steps = min(map(len, lanes)) // take
            steps += [[row for lane in lanes for row in lane[i * take : (i + 1) * take]] for i in range(n_steps)]
    return steps


@given(st.integers(0, 10**6), st.integers(700, 2500), st.integers(1, 3), st.integers(90, 160))
@settings(max_examples=6)
def test_the_steps_of_a_stream_against_loops(seed, buffer_size, take, n):
    lengths = np.random.default_rng(seed).integers(0, 30, n)
    lengths[::7] = 25
    n_train, batch_size = n - 5, take * LANES
    expected = naive(lengths, n_train, buffer_size, batch_size, seed, 2)
    stream = stream_of(lengths, n_train, buffer_size, batch_size, seed)
    assert stream.steps_per_epoch * 2 == len(expected)
    found = rows_of(stream, range(len(expected)))
    assert found == expected
    for half in (found[: stream.steps_per_epoch], found[stream.steps_per_epoch :]):
        rows = [row for step in half for row in step]
        assert len(rows) == len(set(rows)) == stream.n_train  # each once in a pass
        assert all(s < n_train and p < lengths[s] for s, p in rows)


LENGTHS = np.random.default_rng(5).integers(0, 40, 400)


def test_the_seed_alone_decides_and_passes_differ():
    one, again, other = (rows_of(stream_of(LENGTHS, 350, 2000, 32, seed), range(400)) for seed in (1, 1, 2))
    assert one == again != other
    per_epoch = stream_of(LENGTHS, 350, 2000, 32, 1).steps_per_epoch
    assert per_epoch < 400 and one[:50] != one[per_epoch : per_epoch + 50]


def test_a_stream_begun_in_the_middle_goes_on_as_if_it_had_not_stopped():
    whole = rows_of(stream_of(LENGTHS, 350, 2000, 32, 1), range(420))
    for first in (1, 100, stream_of(LENGTHS, 350, 2000, 32, 1).steps_per_epoch, 400):
        assert rows_of(stream_of(LENGTHS, 350, 2000, 32, 1), range(first, 420)) == whole[first:]


@pytest.mark.parametrize("size", [2, 4, 16])
def test_the_processes_shares_put_together_are_the_step_of_one(size):
    whole = rows_of(stream_of(LENGTHS, 350, 2000, 32, 1), range(100))
    shares = [rows_of(stream_of(LENGTHS, 350, 2000, 32, 1, rank, size), range(100)) for rank in range(size)]
    assert [[row for share in step for row in share] for step in zip(*shares, strict=True)] == whole


def test_held_out_sentences_are_others_and_each_row_comes_once():
    stream = stream_of(LENGTHS, 350, 300, 32, 1)
    rows = [tuple(row) for found in stream.held_out(7) for row in found["layers.0.resid_pre"].tolist()]
    sentences = [round(a) * 100 + round(b) for a, b, *_ in rows]
    assert len(set(rows)) == len(rows) == stream.n_held_out and set(sentences) <= set(range(350, 400))
    assert Counter(sentences) == {i: n for i, n in enumerate(LENGTHS.tolist()) if i >= 350 and n}


def test_stopped_while_the_buffer_fills():
    stream = stream_of(LENGTHS, 350, 2000, 32, 1)
    with stream.reading(range(3), lambda: True) as following:
        assert following() is None and stream.held is None
    with stream.reading(range(3), lambda: False) as following:
        assert following() is not None


# ---- whole runs


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("stream") / "sentences", some_texts(N))


def options_of(model: Path, sentences: Path, folder: Path, *sites: str, **changed) -> dict:
    everything = {"stream": model, "sentences_dir": sentences, "sites": sites or (SITE,), **places(folder), **OPTIONS}
    return everything | changed


def stream(model: Path, sentences: Path, folder: Path, *sites: str, **changed) -> Path:
    """Train in this process; returns the path of the SAE, or of the first of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_training.Training, "draw", lambda *args: None)
        run_script(sae_training, **options_of(model, sentences, folder, *sites, **changed))
    return folder / "sae.pth" if len(sites) < 2 else folder / Place.read(sites[0]).folder / "sae.pth"


@pytest.fixture(scope="module")
def three(tiny_model_dir, sentences, tmp_path_factory) -> Path:
    """The folder of an unbroken run of three: an SAE, a transcoder of an MLP, one between layers."""
    folder = tmp_path_factory.mktemp("three")
    stream(tiny_model_dir, sentences, folder, SITE, f"{READ}:{WRITE}", f"layers.0.resid_pre:{SITE}")
    return folder


@pytest.fixture(scope="module")
def alone(tiny_model_dir, sentences, tmp_path_factory) -> Path:
    """The SAE of an unbroken run of one."""
    return stream(tiny_model_dir, sentences, tmp_path_factory.mktemp("alone"))


def test_several_from_one_pass_are_each_what_it_is_alone(tiny_model_dir, sentences, three, alone, tmp_path):
    assert_same_run(three / SITE / "sae.pth", alone)
    transcoder = stream(tiny_model_dir, sentences, tmp_path, f"{READ}:{WRITE}")
    assert_same_run(three / "layers.1.transcoder" / "sae.pth", transcoder)
    kind = load_sae_model(transcoder).kind
    assert (kind.target_site, kind.centred) == (WRITE, False) and kind.target_scale != 1
    assert (three / f"layers.0.resid_pre-to-{SITE}" / "sae.json").exists()
    lines = metrics_of(transcoder)
    assert lines[-1]["val_fvu"] < lines[0]["train_fvu"]


def test_what_the_json_states(tiny_model_dir, sentences, alone):
    info = json.loads(alone.with_suffix(".json").read_text())
    assert (info["site"], info["layer"], info["d_model"], info["begin_of_text"]) == (SITE, 1, D, False)
    assert info["first_validation_sentence"] == N_TRAIN and info["dataset"]["sentences"] == N
    assert "activations_dir" not in info and "activations" not in info
    assert (alone.parent / info["sentences_dir"]).resolve() == sentences.resolve()
    names = sorted(path.name for path in (alone.parent / "checkpoints").iterdir() if path.suffix == ".safetensors")
    assert names == ["sentence_lengths.safetensors", f"statistics-{SITE}.safetensors"]  # and no activations
    lengths = load_file(alone.parent / "checkpoints" / names[0])["lengths"].tolist()
    tokenizer = load_tokenizer(tiny_model_dir)
    assert lengths == [min(len(tokenizer.encode(text)), MAX_TOKENS) for text in some_texts(N)]


def all_rows(model_dir: Path, site: str, which: range) -> np.ndarray:
    """Activations of sentences, each alone, in float64."""
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    texts = some_texts(N)
    ids = [tokenizer.encode(texts[i])[:MAX_TOKENS] for i in which]
    with torch.inference_mode():
        return torch.cat([model.activations(torch.tensor([i]), site)[0] for i in ids if i]).double().numpy()


def test_quality_is_that_of_the_held_out_sentences(tiny_model_dir, alone):
    """Which training reads at 8 bits."""
    x = all_rows(tiny_model_dir, SITE, range(N_TRAIN, N))
    sae = load_sae_model(alone)
    z = normalize(x, 1e-5)
    z_hat = sae.decode(*sae.encode(torch.from_numpy(x).float())).double().numpy()
    fvu = ((z - z_hat) ** 2).sum() / ((z - z.mean(0)) ** 2).sum()
    assert metrics_of(alone)[-1]["val_fvu"] == pytest.approx(fvu, rel=0.01)


def started(model: Path, sentences: Path, folder: Path) -> tuple[StreamedRows, list, StepOptions, Grid]:
    names = {name: OPTIONS[name] for name in StreamOptions._fields if name in OPTIONS}
    rest = {"num_samples": 0, "begin_of_text": False, "rope_scaling_factor": None}
    options = StreamOptions(stream=str(model), sites=(SITE,), sentences_dir=str(sentences), **names, **rest)
    step_options = StepOptions(**{name: value for name, value in OPTIONS.items() if name in StepOptions._fields})
    grid = make_grid(ALONE, 1)
    folder.mkdir(exist_ok=True)
    found = start_stream(open_stream(options, False), KindOptions(), BATCH, OPTIONS["seed"], folder, grid)
    return *found, step_options, grid


def test_the_run_is_its_steps_on_the_streams_rows(tiny_model_dir, sentences, alone, tmp_path):
    """To the last bit; and the rows are the activations of each sentence alone, at 8 bits."""
    rows, (data,), step_options, grid = started(tiny_model_dir, sentences, tmp_path / "folder")
    sae = SparseAutoencoder(D, OPTIONS["n_latents"], OPTIONS["k"])
    sae.initialize(data.b_pre, torch.Generator().manual_seed(OPTIONS["seed"]))
    step, n_steps = Step(sae, step_options, grid), 2 * rows.steps_per_epoch
    seen = []
    with rows.reading(range(n_steps), lambda: False) as following:
        for n_before in range(n_steps):
            x = following()[SITE]
            seen.append(x)
            pending = step.gradients(x)
            step.apply(pending, step.agree(pending), learning_rate(n_before, n_steps, 8e-3, 1 / 5, 5), n_before)
    expected = torch.load(alone, weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in step.sae.state_dict().items())

    every = torch.from_numpy(all_rows(tiny_model_dir, SITE, range(N_TRAIN))).float()
    used = torch.cat(seen[: rows.steps_per_epoch]).float()
    distances = torch.cdist(used, every)
    steps = every.abs().amax(1) / 127
    nearest = distances.argmin(1)
    assert (distances.amin(1) <= 0.6 * steps[nearest] * D**0.5 + 0.01 * every[nearest].norm(dim=1)).all()
    n_different = len(used.unique(dim=0))  # the first tokens of many sentences are the same
    assert n_different > 0.5 * len(used) and len(set(nearest.tolist())) > 0.98 * n_different


def test_statistics_are_those_of_the_first_filling(tiny_model_dir, sentences, tmp_path):
    rows, (data,), *_ = started(tiny_model_dir, sentences, tmp_path / "folder")
    first = rows.place(0)[1]
    n_steps = rows.fillings[first].n_rows // rows.rows_per_lane
    x = torch.cat([rows.rows(step)[SITE] for step in range(n_steps)]).double().numpy()
    z = normalize(x, 1e-5)
    found = load_file(tmp_path / "folder" / f"statistics-{SITE}.safetensors")
    expected = {"mean_raw": x.mean(0), "var_raw": x.var(0), "mean_normalized": z.mean(0), "var_normalized": z.var(0)}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(data.b_pre.numpy(), z.mean(0), rtol=1e-5, atol=1e-6)
    assert data.variance == pytest.approx(z.var(0).mean()) and int(found["count"]) == len(x)


def test_batch_topk_and_a_constant_scale(tiny_model_dir, sentences, tmp_path):
    path = stream(tiny_model_dir, sentences, tmp_path, gate="batch_topk", normalization="scale", num_epochs=1)
    sae = load_sae_model(path)
    assert sae.kind.gate == "jumprelu" and float(sae.threshold[0]) > 0 and sae.kind.scale != 1
    assert metrics_of(path)[-1]["val_l0"] == pytest.approx(OPTIONS["k"], rel=0.5)


# ---- interruptions and processes


@pytest.mark.slow
def test_stopped_and_run_again_ends_like_an_unbroken_run(tiny_model_dir, sentences, three, tmp_path, capsys):
    """SIGTERM in a step of the second pass: three SAEs continue from the step before."""
    sites = (SITE, f"{READ}:{WRITE}", f"layers.0.resid_pre:{SITE}")
    applied = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        real = Step.gradients

        def interrupted(self, *args):
            applied.append(1)
            if len(applied) == 25 * len(sites):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, *args)

        patch.setattr(Step, "gradients", interrupted)
        stream(tiny_model_dir, sentences, tmp_path, *sites)
    assert exit_.value.code == 128 + signal.SIGTERM and "after step 24, which is saved" in capsys.readouterr().err
    stream(tiny_model_dir, sentences, tmp_path, *sites)
    assert capsys.readouterr().out.count("Continuing from step 24 ") == 3
    for folder in (SITE, "layers.1.transcoder", f"layers.0.resid_pre-to-{SITE}"):
        assert_same_run(tmp_path / folder / "sae.pth", three / folder / "sae.pth")


@pytest.mark.slow
def test_killed_between_the_checkpoints_of_two_saes(tiny_model_dir, sentences, three, tmp_path, capsys):
    """The first has one more: both continue from the last that both have."""
    sites, saved = (SITE, f"{READ}:{WRITE}", f"layers.0.resid_pre:{SITE}"), []
    options = {"checkpoint_minutes": 1e-9, "keep_checkpoints": 1}  # neither shows in the result
    real = sae_training.Training.save

    def interrupted(self, *args):
        saved.append(self.progress.step)
        if len(saved) == 11:
            raise KeyboardInterrupt
        real(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sae_training.Training, "save", interrupted)
        stream(tiny_model_dir, sentences, tmp_path, *sites, **options)
    assert saved[-1] == 4 and len(list((tmp_path / "checkpoints" / SITE).glob("step-000000004*"))) == 1
    stream(tiny_model_dir, sentences, tmp_path, *sites)
    assert capsys.readouterr().out.count("Continuing from step 3 ") == 3
    for folder in (SITE, "layers.1.transcoder", f"layers.0.resid_pre-to-{SITE}"):
        assert_same_run(tmp_path / folder / "sae.pth", three / folder / "sae.pth")


def test_a_complete_stream_is_left_alone(tiny_model_dir, sentences, three, capsys):
    stream(tiny_model_dir, sentences, three, SITE, f"{READ}:{WRITE}", f"layers.0.resid_pre:{SITE}")
    assert "is already complete" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_like_one(tiny_model_dir, sentences, three, tmp_path):
    """Data parallel and latent parallel."""
    sites = (SITE, f"{READ}:{WRITE}", f"layers.0.resid_pre:{SITE}")
    runs = []
    for name, changed in (("2x1", {}), ("1x2", {"latent_parallel": 2})):
        options = options_of(tiny_model_dir, sentences, tmp_path / name, *sites, **changed)
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
        runs.append({"options": plain})
    assert in_processes(2, *runs) == [0, 0]
    for run in ("2x1", "1x2"):
        for folder in (SITE, "layers.1.transcoder", f"layers.0.resid_pre-to-{SITE}"):
            assert_similar_run(tmp_path / run / folder / "sae.pth", three / folder / "sae.pth")


# ---- refusals


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data_dir": "data/batches"}, "--data_dir and --stream contradict each other; leave one of them out."),
        ({"model_load_path": "sae.pth"}, "--model_load_path and --stream contradict each other"),
        ({"stream": "/nowhere"}, "/nowhere"),
        ({"sentences_dir": "/nowhere"}, "There is nothing at /nowhere"),
        ({"sites": ("layers.7.resid_post",)}, "--sites: 'layers.7.resid_post' is beyond the model's 3 layers"),
        ({"sites": (f"{SITE}:{SITE}",)}, "reads and writes the same site; write layers.1.resid_post for an SAE"),
        ({"sites": (f"{SITE}:",)}, "--sites layers.1.resid_post: names no site to write"),
        ({"skip": "true"}, "--skip is for transcoders; write each of --sites as READ:WRITE."),
        ({"batch_size": 72}, "--batch_size 72 must be a multiple of 16"),
        ({"buffer_size": 0}, "--buffer_size 0 is too small"),
        ({"k": 97}, "k = 97 must lie between 1 and n_latents = 96"),
        ({"max_tokens": 10**6}, "exceeds the context"),
        ({"validation_fraction": 0.0, "early_stop_epochs": 1}, "no held-out sentences for --early_stop_epochs"),
    ],
)
def test_bad_options(tiny_model_dir, sentences, tmp_path, capsys, changed, words):
    said = refusal(sae_training, capsys, **options_of(tiny_model_dir, sentences, tmp_path, **changed))
    assert words in said
    assert not (tmp_path / "sae.pth").exists() and not (tmp_path / "checkpoints" / "manifest.json").exists()


def test_too_few_sentences_for_a_step(tiny_model_dir, sentences, tmp_path, capsys):
    said = refusal(sae_training, capsys, **options_of(tiny_model_dir, sentences, tmp_path, num_samples=20))
    assert "too few in fillings of 800 for steps of 64; give more, raise --buffer_size or lower --batch" in said


def test_options_of_a_stream_without_one(tmp_path, capsys):
    said = refusal(sae_training, capsys, **places(tmp_path), buffer_size=100)
    assert said == "error: --buffer_size is for a stream; name its model with --stream, or leave --buffer_size out."


def test_another_buffer_is_another_run(tiny_model_dir, sentences, three, capsys):
    sites = (SITE, f"{READ}:{WRITE}", f"layers.0.resid_pre:{SITE}")
    options = options_of(tiny_model_dir, sentences, three, *sites, buffer_size=999)
    assert "was begun with buffer_size = 800, but now it is 999" in refusal(sae_training, capsys, **options)

"""A suite of SAEs on the tiny Llama: every stage of sae_suite.py in this process; latent_flow.py on its SAEs.

The processes themselves (their share of the cores, what is said of a failure, how they end) are tested with small
programs in place of the stages.

    .venv/bin/python -m pytest tests/test_suite.py
"""

import importlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_tiny_model
from support.pipeline_runs import call, refusal, some_texts, write_sentences

import latent_flow
import sae_suite
from latents import suites
from latents.coactivation import FLOW
from latents.meanings import best_meanings
from llama_3.model import Transformer
from pipeline.activation_store import ActivationStore
from pipeline.errors import InputError, Stop
from pipeline.files import read_json, write_json
from sae import load_sae_model
from sae_suite import Crew, Stage

NAMES = ["layers.0.transcoder", "layers.1.transcoder", "layers.2.resid_post"]
SITES = ["layers.[01].transcoder", "layers.2.resid_*t"]
SIZES = {"n_latents": 48, "k": 4, "k_aux": 8, "num_epochs": 2, "batch_size": 128, "num_samples": 200}
OTHERS = {"num_evaluated": 20, "report_latents": 5, "side_by_side": 2}  # so that each stage has one core
pytestmark = pytest.mark.slow  # some thirty stages run
STAGES = [
    "sae_evaluation",
    "capture_top_activating_sentences",
    "interpret_top_sentences_distinctive_words",
    "score_interpretations",
    "promoted_tokens",
    "sae_report",
]

# ---- stages in this process


class AtOnce:
    """In place of ThreadPoolExecutor: a job runs when it is submitted, in this thread."""

    def __init__(self, n: int):
        self.ended = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def submit(self, function: Callable, *arguments) -> Future:
        job: Future = Future()
        if self.ended:
            return job  # never done
        try:
            job.set_result(function(*arguments))
        except BaseException as error:
            self.ended = isinstance(error, KeyboardInterrupt)
            job.set_exception(error)
        return job

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self.ended = True


def in_process(words: list[str]) -> str:
    """Run a stage's command line here; returns the script's name. Raises Stop as the script does."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = importlib.import_module(words[at].removesuffix(".py"))
    with mock.patch.object(sys, "argv", words[at:]):
        script.main()
    return script.__name__


def stages_here(patch: pytest.MonkeyPatch) -> list[str]:
    """Stages run in this process, and their figures, which take most of their time, are left empty. What was run is
    listed: "capture_activations", "layers.0.transcoder sae_training"."""
    done: list[str] = []

    def run(crew: Crew, stage: Stage, log: Path, slot: dict[str, str]) -> None:
        done.append(f"{log.parent.name} {in_process(stage.words)}")

    patch.setattr(sae_suite, "ThreadPoolExecutor", AtOnce)
    patch.setattr(sae_suite, "run_command", lambda words: done.append(in_process(words)))
    patch.setattr(Crew, "run", run)
    patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).write_bytes(b"\x89PNG"))
    return done


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    return stages_here(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A suite of two transcoders and an SAE, and what was run to make it."""
    folder = tmp_path_factory.mktemp("suite")
    write_tiny_model(folder / "model")
    write_sentences(folder / "sentences", some_texts(200))
    with pytest.MonkeyPatch.context() as patch:
        done = stages_here(patch)
        call(sae_suite, **inputs(folder), suite_dir=folder / "suite")
    return SimpleNamespace(folder=folder, dir=folder / "suite", ran=done)


def inputs(folder: Path, **options: object) -> dict[str, object]:
    places = {"model_dir": folder / "model", "sentences_dir": folder / "sentences"}
    return {"sites": SITES, **places, **SIZES, **OTHERS, **options}


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy of the suite to change."""
    return Path(shutil.copytree(made.dir, tmp_path / "suite", copy_function=shutil.copy2))


# ---- the whole suite


def test_every_stage_runs_once_for_each(made):
    training = {"layers.2.resid_post": ["sae_preprocessing", "sae_training"]}
    transcoder = ["sae_preprocessing", "sae_preprocessing", "sae_training"]
    expected = ["capture_activations"]
    for name in NAMES:
        expected += [f"{name} {stage}" for stage in [*training.get(name, transcoder), *STAGES]]
    assert made.ran == expected
    assert not any((made.dir / "batches").iterdir()) and not list(made.dir.glob("*/checkpoints"))
    sites = {path.name for path in (made.dir / "activations").glob("layers.*")}
    assert sites == {f"layers.{n}.{site}" for n in (0, 1) for site in ("ffn_norm", "mlp_out")} | {NAMES[2]}


def test_the_table_holds_what_the_files_beside_the_saes_say(made):
    rows = read_json(made.dir / "suite.json", "")["saes"]
    assert [row["name"] for row in rows] == NAMES
    text = (made.dir / "suite.md").read_text(encoding="utf-8")
    for row in rows:
        sae = made.dir / row["name"] / "sae.pth"
        quality, info = (read_json(sae.with_suffix(ending), "") for ending in (".evaluation.json", ".json"))
        assert info["n_latents"] == row["n_latents"] == 48 and info["k"] == row["k"] == 4
        for name in ("fvu", "loss_recovered", "kl_spliced", "l0", "dead_frac"):
            assert row[name] == quality[name], name
        meanings = best_meanings(sae, 48)
        scores = [meaning.score for meaning in meanings.values() if meaning.score is not None]
        assert row["names"] == len(meanings) and row["score"] == pytest.approx(np.mean(scores))
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {row['name']} |"))
        assert f"| {quality['fvu']:.4f} |" in line and f"| {row['score']:.3f} |" in line
    info = read_json(made.dir / NAMES[0] / "sae.json", "")
    assert (info["site"], info["target_site"]) == ("layers.0.ffn_norm", "layers.0.mlp_out") and info["skip"]


def test_the_picture_over_depth(made, tmp_path):
    rows = read_json(made.dir / "suite.json", "")["saes"]
    sae_suite.draw(tmp_path / "suite.png", [*rows, {"kind": "resid_pre", "layer": 0, "n_latents": 48}])
    assert (tmp_path / "suite.png").read_bytes().startswith(b"\x89PNG")


def test_the_index_leads_to_every_report(made):
    page = (made.dir / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'<a href="([^"]+)"', page)
    assert links == [f"{name}/sae.report.html" for name in NAMES]
    assert all((made.dir / link).is_file() for link in links)
    assert "http" not in page.replace("http://www.w3.org", "")


def test_run_again_nothing_is_made_again(made, copy, ran):
    call(sae_suite, **inputs(made.folder), suite_dir=copy)
    assert ran == []


def test_without_sites_what_is_missing_is_made(made, copy, ran):
    (copy / NAMES[1] / "sae.evaluation.json").unlink()
    (copy / NAMES[2] / "sae.top.parquet").unlink()
    call(sae_suite, suite_dir=copy, **OTHERS)
    again = [f"{NAMES[1]} sae_evaluation", f"{NAMES[1]} sae_report", *(f"{NAMES[2]} {stage}" for stage in STAGES[1:])]
    assert ran == again
    same = read_json(made.dir / "suite.json", "")
    assert read_json(copy / "suite.json", "") == same


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same(made, tmp_path, monkeypatch, ran):
    run, options = Crew.run, {**inputs(made.folder, sites=NAMES[2:]), "suite_dir": tmp_path / "suite"}

    def stopped(crew, stage, log, slot):
        if "sae_training.py" in stage.words and log.parent.name == NAMES[2]:
            raise KeyboardInterrupt
        run(crew, stage, log, slot)

    monkeypatch.setattr(Crew, "run", stopped)
    with pytest.raises(SystemExit) as exit_:
        call(sae_suite, **options)
    assert exit_.value.code == 130
    n_before = len(ran)
    monkeypatch.setattr(Crew, "run", run)
    call(sae_suite, **options)
    repeated = ["capture_activations", f"{NAMES[2]} sae_preprocessing"]  # which say that they are complete
    assert ran[n_before:] == [*repeated, *made.ran[made.ran.index(f"{NAMES[2]} sae_training") :]]
    found, expected = (read_json(folder / "suite.json", "")["saes"] for folder in (tmp_path / "suite", made.dir))
    assert found == expected[2:]


def test_a_broken_site_does_not_stop_the_others(made, copy, ran, capsys):
    shutil.rmtree(copy / NAMES[0])
    shutil.rmtree(copy / NAMES[2])
    shard = next((copy / "activations" / "layers.0.mlp_out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    said = refusal(capsys, sae_suite, **inputs(made.folder), suite_dir=copy)
    assert said.startswith("1 of 3 SAEs failed")
    assert ran[-len(STAGES) - 2 :] == [
        f"{NAMES[2]} {stage}" for stage in ("sae_preprocessing", "sae_training", *STAGES)
    ]
    assert [row["name"] for row in read_json(copy / "suite.json", "")["saes"]] == NAMES[1:]
    assert (copy / "batches" / "layers.0.ffn_norm" / "manifest.json").exists()  # kept for the next try


def test_a_site_where_the_model_gives_nan_does_not_stop_the_others(made, ran, monkeypatch, tmp_path, capsys):
    activations = Transformer.activations

    def with_nan(model: Transformer, tokens: torch.Tensor, sites: str | list[str], *more):
        acts = activations(model, tokens, sites, *more)
        bad = "layers.1.mlp_out"
        return acts | {bad: acts[bad] * torch.nan} if isinstance(acts, dict) and bad in acts else acts

    monkeypatch.setattr(Transformer, "activations", with_nan)
    said = refusal(capsys, sae_suite, **inputs(made.folder, sites=NAMES[:2]), suite_dir=tmp_path / "suite")
    assert said.startswith("1 of 2 SAEs failed")
    assert [row["name"] for row in read_json(tmp_path / "suite" / "suite.json", "")["saes"]] == NAMES[:1]
    assert not any(NAMES[1] in line for line in ran)


def test_the_broken_site_is_named_with_its_error(made, copy, ran, capsys):
    shutil.rmtree(copy / NAMES[0])
    shutil.rmtree(copy / "activations" / "layers.0.ffn_norm")
    with pytest.raises(SystemExit):
        call(sae_suite, suite_dir=copy, **OTHERS)  # two complete ones are left: nothing fails without sites
        call(sae_suite, **inputs(made.folder, k=5), suite_dir=copy)
    said = capsys.readouterr()
    assert "was trained with k = 4, but now it is 5" in said.err and ran == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sites": ["layers.*.no_site"]}, "--sites layers.*.no_site names nothing"),
        ({"sites": ["layers.0.transcoder", "layers.9.*"]}, "--sites layers.9.* names nothing: write layers.N.S with N"),
        ({"n_latents": 64}, "was trained with n_latents = 48, but now it is 64"),
        ({"num_samples": 150}, "was trained with sentences = 200, but now it is 150"),
        ({"begin_of_text": False}, "was trained with begin_of_text = True, but now it is False"),
        ({"k": 49}, "--k 49 exceeds --n_latents 48"),
        (
            {"sites": ["layers.1.resid_mid"], "num_samples": 150},
            "is of 200 sentences with begin_of_text",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(made, ran, capsys, changes, words):
    before = sorted(made.dir.rglob("*"))
    assert words in refusal(capsys, sae_suite, **inputs(made.folder, **changes), suite_dir=made.dir)
    assert ran == [] and sorted(made.dir.rglob("*")) == before


def test_a_suite_is_of_one_model(made, ran, tmp_path, capsys):
    changes = {"sites": ["layers.1.resid_mid"], "model_dir": write_tiny_model(tmp_path / "other", rope_theta=10_000.0)}
    said = refusal(capsys, sae_suite, **inputs(made.folder, **changes), suite_dir=made.dir)
    assert "is not the model" in said and ran == []


def test_activations_of_complete_saes_may_be_removed(made, copy, ran):
    shutil.rmtree(copy / "activations" / NAMES[2])
    (copy / NAMES[0] / "sae.evaluation.json").unlink()
    call(sae_suite, **inputs(made.folder), suite_dir=copy)
    assert "capture_activations" in ran and not (copy / "activations" / NAMES[2]).exists()


def test_few_saes_share_all_cores(made, copy, ran, monkeypatch):
    crews: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(sae_suite, "summarise", lambda *_: None)
    before = Crew.__init__
    monkeypatch.setattr(Crew, "__init__", lambda self, n, n_gpus: (crews.append(n), before(self, n, n_gpus))[1])
    call(sae_suite, suite_dir=copy)
    assert crews == [3]


def test_an_sae_of_another_site_in_a_members_folder_is_refused(made, copy, ran, capsys):
    path = copy / NAMES[2] / "sae.json"
    write_json(path, read_json(path, "") | {"site": "layers.1.resid_post"})
    said = refusal(capsys, sae_suite, **inputs(made.folder), suite_dir=copy)
    assert "was trained with site = 'layers.1.resid_post', but now it is 'layers.2.resid_post'" in said
    said = refusal(capsys, sae_suite, **inputs(made.folder, sentences_dir=copy / "none"), suite_dir=copy / "none")
    assert "There is nothing at" in said


def test_a_folder_without_a_suite_is_refused(tmp_path, capsys):
    said = refusal(capsys, sae_suite, suite_dir=tmp_path)
    assert "holds no layers.N.KIND/sae.pth" in said and list(tmp_path.iterdir()) == []
    assert "holds no layers.N.KIND/sae.pth" in refusal(capsys, latent_flow, suite_dir=tmp_path)


def test_it_says_what_it_will_take(made, tmp_path, monkeypatch, ran, capsys):
    monkeypatch.setattr(sae_suite, "capture", mock.Mock(side_effect=Stop("enough")))
    said = refusal_and_output(capsys, **inputs(made.folder), suite_dir=tmp_path / "suite")
    n_tokens = json.loads((made.dir / "activations" / NAMES[2] / "manifest.json").read_text())["counts"]["tokens"]
    (about,) = re.findall(r"about ([\d,]+) tokens", said)
    assert int(about.replace(",", "")) == pytest.approx(n_tokens, rel=0.02)
    (disk,) = re.findall(r"Disk: ([\d.]+) MB of activations", said)
    assert float(disk) * 1e6 == pytest.approx(5 * 2 * 36 * n_tokens, rel=0.03)
    assert re.search(r"Memory: .* of the capture", said) and re.search(r"in all about (\d+ h )?(\d+ min )?\d+ s", said)


def refusal_and_output(capsys, **options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call(sae_suite, **options)
    return capsys.readouterr().out


# ---- which members


def test_patterns_name_members_each_once_by_layer(tmp_path):
    name = lambda globs: [member.name for member in suites.chosen(tmp_path, globs, 3)]
    assert name(["layers.*.transcoder", "layers.1.*r"]) == [f"layers.{i}.transcoder" for i in range(3)]
    assert name(["layers.2.resid_post", "layers.0.mlp_out", "layers.2.*_post"]) == ["layers.0.mlp_out", NAMES[2]]
    assert len(name(["*"])) == 3 * len(suites.KINDS)
    (member,) = suites.chosen(tmp_path, ["layers.1.transcoder"], 3)
    assert member.sites == ["layers.1.ffn_norm", "layers.1.mlp_out"] and member.activations.name == "layers.1.ffn_norm"


@pytest.mark.parametrize("glob", ["", "layers.3.transcoder", "layers.*.transcoders", "transcoder"])
def test_a_pattern_that_names_nothing(tmp_path, glob):
    with pytest.raises(InputError, match="names nothing"):
        suites.chosen(tmp_path, ["layers.0.*", glob], 3)


def test_a_stage_is_done_when_its_file_is_not_older_than_what_it_is_made_from(tmp_path):
    made, read = tmp_path / "made", tmp_path / "read"
    stage = Stage("a stage", [], made, (read, tmp_path / "missing"))
    assert not stage.is_done
    made.touch()
    assert stage.is_done
    read.touch()
    os.utime(made, (1, 1))
    assert not stage.is_done
    os.utime(read, (1, 1))
    assert stage.is_done


# ---- processes


def program(code: str) -> Stage:
    return Stage("a stage", [sys.executable, "-S", "-c", code], Path("none"), ())


def test_a_process_gets_its_slot_and_writes_to_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    crew = Crew(3, n_gpus=2)
    slots = [crew.slots.get() for _ in range(3)]
    assert crew.slots.empty()
    assert [(slot["OMP_NUM_THREADS"], slot["CUDA_VISIBLE_DEVICES"]) for slot in slots] == [
        ("2", "4"),
        ("2", "7"),
        ("2", "4"),
    ]
    log = tmp_path / "folder" / "suite.log"
    for number in slots[:2]:
        crew.run(program("import os; print('seen', os.environ['CUDA_VISIBLE_DEVICES'])"), log, number)
    assert (
        re.findall(r"^seen (.)$", log.read_text(), re.M) == ["4", "7"] and log.read_text().count("$ python -S -c") == 2
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('error: No acts; do this.'); print('note'); raise SystemExit(2)", "a stage: No acts; do this."),
        ("print('not an error: x'); print('last words'); raise SystemExit(3)", "a stage: last words"),
        ("raise SystemExit(3)", "a stage: exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "a stage: exit code -9"),
    ],
)
def test_what_is_said_of_a_process_that_fails(tmp_path, code, words):
    log = tmp_path / "suite.log"
    log.write_text("error: of an earlier run\n")
    with pytest.raises(Stop, match=f"^{re.escape(words)}$"):
        Crew(1, 0).run(program(code), log, {})


def test_processes_end_with_the_suite(tmp_path):
    members = [suites.Member(tmp_path, layer, "resid_post") for layer in range(4)]
    config = SimpleNamespace(sites=None, keep=False)
    crew = Crew(2, 0)
    work = sae_suite.Work(members, config, crew)
    started = time.monotonic()

    def one(member):  # two of four wait; the main thread is told to stop once both do
        slot = crew.slots.get()
        try:
            work.run(program(f"open({str(tmp_path / member.name)!r}, 'w'); import time; time.sleep(60)"), member, slot)
        finally:
            crew.slots.put(slot)

    def interrupt(jobs):
        while len(list(tmp_path.glob("layers.?.resid_post/suite.log"))) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    patched = mock.patch.object(work, "one", one), mock.patch.object(sae_suite, "as_completed", interrupt)
    with patched[0], patched[1], pytest.raises(KeyboardInterrupt):
        work.all()
    assert time.monotonic() - started < 30 and not crew.running
    assert not (tmp_path / NAMES[2].replace("2", "3")).exists()


# ---- from layer to layer


@pytest.fixture(scope="module")
def flow(made) -> SimpleNamespace:
    options = {"tokens": 1500, "least_firings": 5, "kept": 3, "least_phi": 0.2}
    call(latent_flow, suite_dir=made.dir, **options)
    rows = pq.read_table(made.dir / NAMES[0] / f"sae.{FLOW.suffix}").to_pylist()
    return SimpleNamespace(rows=rows, **options)


def fired(folder: Path, name: str, n_tokens: int) -> np.ndarray:
    """(n_tokens, n_latents) bool: what fires, by the SAE's own `encode`, made dense."""
    sae = load_sae_model(folder / name / "sae.pth")
    store = ActivationStore(folder / "activations" / sae.info["site"])
    acts = torch.cat([shard.acts for shard in store.shards()])[:n_tokens]
    values, latents = sae.encode(acts)
    return (torch.zeros(len(acts), sae.n_latents).scatter_(1, latents, values) > 0).numpy()


def test_flow_equals_naive_dense_counting(made, flow):
    before, after = (fired(made.dir, name, flow.tokens) for name in NAMES[:2])
    assert len(before) == flow.tokens
    n_before, n_after, both = before.sum(0), after.sum(0), before.T.astype(int) @ after.astype(int)
    phi = np.zeros(both.shape)
    for a, b in np.argwhere(both):
        if n_before[a] >= 5 and n_after[b] >= 5 and n_before[a] < flow.tokens > n_after[b]:
            phi[a, b] = max(0, np.corrcoef(before[:, a], after[:, b])[0, 1])
    saes = [load_sae_model(made.dir / name / "sae.pth") for name in NAMES[:2]]
    unit = lambda directions: directions / np.linalg.norm(directions, axis=0)
    cosine = unit(saes[0].decoder.weight.numpy()).T @ unit(saes[1].decoder.weight.numpy())
    read = unit(saes[0].encoder.weight.numpy().T).T @ unit(saes[1].encoder.weight.numpy().T)
    expected = []
    for a in range(48):
        order = sorted((b for b in range(48) if phi[a, b] > 0), key=lambda b: (-round(phi[a, b], 9), b))
        expected += [(a, rank, b) for rank, b in enumerate(order[:3])]
    assert [(row["latent"], row["rank"], row["next_latent"]) for row in flow.rows] == expected
    for row in flow.rows:
        a, b = row["latent"], row["next_latent"]
        assert (row["firings"], row["next_firings"], row["both"]) == (n_before[a], n_after[b], both[a, b])
        assert row["probability"] == pytest.approx(both[a, b] / n_before[a])
        assert row["phi"] == pytest.approx(phi[a, b], abs=1e-6)
        assert row["cosine"] == pytest.approx(cosine[a, b], abs=1e-5)
        assert row["read_cosine"] == pytest.approx(read[a, b], abs=1e-5)
        assert row["mutual"] == (row["rank"] == 0 and phi[:, b].argmax() == a)
        assert row["next_sae"] == NAMES[1]
    assert any(row["mutual"] for row in flow.rows)


def test_flow_is_shown(made, flow):
    text = (made.dir / "flow.transcoder.md").read_text(encoding="utf-8")
    assert "| 0 → 1 |" in text and "Counted on 1,500 tokens" in text
    assert (made.dir / "flow.transcoder.png").read_bytes().startswith(b"\x89PNG")
    assert not (made.dir / "flow.resid_post.md").exists()  # there is only one


def test_saes_of_other_tokens_are_refused(made, copy, capsys):
    manifest = copy / "activations" / "layers.1.ffn_norm" / "manifest.json"
    write_json(manifest, read_json(manifest, "") | {"max_tokens": 7})
    assert "do not hold the same tokens in the same order" in refusal(capsys, latent_flow, suite_dir=copy)


def test_one_sae_has_no_next(copy, capsys):
    shutil.rmtree(copy / NAMES[0])
    assert "has no two SAEs of one kind" in refusal(capsys, latent_flow, suite_dir=copy)


def test_chains_are_partners_after_partners():
    partners = [{1: 5, 2: 6}, {5: 0, 3: 3}, {0: 9, 3: 1}]
    found = [(chain.first, chain.latents) for chain in latent_flow.chains_of(partners)]
    assert found == [(0, [1, 5, 0, 9]), (1, [3, 3, 1]), (0, [2, 6])]
    assert latent_flow.chains_of([]) == []

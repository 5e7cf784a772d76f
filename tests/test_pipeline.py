"""All stages through their real command lines, on a random Llama even smaller than the embedded one.

Each stage reads what the one before wrote, up to a steered completion. Then the demo's own steps on the results.

    python -m pytest tests/test_pipeline.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import PROJECT_DIR, write_tiny_model
from support.pipeline_runs import call

import demo
from embedded import recipe
from latents.index import LatentIndex
from pipeline.errors import Stop
from pipeline.manifests import read_manifest
from serving.own_words import count_hits

pytestmark = pytest.mark.slow  # every stage runs, two of them under torchrun

SITE = "layers.1.attention_norm"
TEXTS = [
    f"The {noun} of the {place} is {size}. Every {noun} needs a name! Does the {place} know, or not? It was {size}."
    for noun in ("file", "table", "index", "buffer", "module")
    for place in ("folder", "server", "window", "matrix")
    for size in ("small", "large", "empty", "closed", "broken")
]


def script(name: str, processes: int = 1, **options: object) -> str:
    """Run a stage's command line from the project folder and return what it printed."""
    words = recipe.command(name, processes, **options)
    done = subprocess.run(words, cwd=PROJECT_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder in which every stage has run."""
    run = tmp_path_factory.mktemp("run")
    model = write_tiny_model(run / "model")
    documents, sentences, batches = run / "documents", run / "sentences", run / "batches"
    activations, sae = run / "activations" / SITE, run / "sae" / "sae.pth"
    documents.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), documents / "documents.parquet")
    script(
        "openwebtext_sentences_dataset.py",
        input_path=documents,
        output_dir=sentences,
        punkt="corpus",
        num_processes=1,
    )
    script(
        "capture_activations.py",
        processes=2,
        model_dir=model,
        sentences_dir=sentences,
        output_dir=run / "activations",
        sites=SITE,
        dtype="float32",
        window_sentences=100,
    )
    script("sae_preprocessing.py", input_dir=activations, output_dir=batches, batch_size=64, num_processes=1)
    script(
        "sae_training.py",
        data_dir=batches,
        model_save_path=sae,
        checkpoint_dir=run / "checkpoints",
        n_latents=96,
        k=6,
        k_aux=8,
        num_epochs=4,
        batch_size=256,
        learning_rate=3e-3,
        wandb="off",
    )
    script("sae_evaluation.py", sae_model_path=sae)
    script("capture_top_activating_sentences.py", data_dir=activations, model_path=sae, top_sentences=10)
    script("interpret_top_sentences_distinctive_words.py", model_path=sae)
    return run


def test_manifests_carry_what_was_decided_to_the_sae(run):
    capture = read_manifest(run / "activations" / SITE, "capture_activations.py")
    batches = read_manifest(run / "batches", "sae_preprocessing.py")
    info = json.loads((run / "sae" / "sae.json").read_text())
    assert capture["site"] == batches["site"] == info["site"] == SITE
    assert info["model"] == capture["model"] and info["begin_of_text"] is False
    assert info["k"] == 6 and info["n_latents"] == 96 and info["d_model"] == capture["d_model"]
    counts = batches["counts"]
    assert counts["train"] + counts["validation"] + counts["dropped"] == capture["counts"]["tokens"]
    assert info["tokens_trained"] == 4 * (counts["train"] // 256) * 256
    for folder in ("sentences", f"activations/{SITE}", "batches", "checkpoints"):
        manifest = json.loads((run / folder / "manifest.json").read_text())
        assert manifest["complete"] and manifest["config"] and "git_commit" in manifest


def test_training_left_curves_metrics_and_quality(run):
    assert (run / "sae" / "sae.curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "sae" / "sae.metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_main"] < lines[0]["train_main"]
    quality = json.loads((run / "sae" / "sae.evaluation.json").read_text())
    # Training measured the bfloat16 file, the evaluation recomputes on the same held-out sentences.
    assert quality["fvu"] == pytest.approx(lines[-1]["val_fvu"], rel=0.02)
    assert quality["loss_clean"] > 0 and quality["l0"] <= 6


def test_top_sentences_and_names_belong_to_the_sae(run):
    table = pq.read_table(run / "sae" / "sae.top.parquet").to_pylist()
    sentences = set(pq.read_table(run / "sentences" / "sentences-00000.parquet")["text"].to_pylist())
    assert {row["aggregation"] for row in table} == {"mean", "max", "last"}
    for row in table[:200]:
        assert row["text"] in sentences
        assert len(row["token_ids"]) == len(row["token_activations"])
        if row["aggregation"] == "max":
            assert float(max(row["token_activations"])) == pytest.approx(row["activation"], rel=2e-3)
    meanings = yaml.safe_load((run / "sae" / "sae.meaning_distinctive-words_max.yaml").read_text())
    assert meanings and all(set(entry) == {"certainty", "common_semantic"} for entry in meanings.values())


def test_every_stage_says_complete_when_run_again(run):
    out = script(
        "sae_preprocessing.py", input_dir=run / "activations" / SITE, output_dir=run / "batches", batch_size=64
    )
    assert "already complete" in out


def test_completion_with_a_steered_latent(run):
    latents = pq.read_table(run / "sae" / "sae.latents.parquet").to_pydict()
    latent = max(range(96), key=lambda i: latents["max"][i])
    named = {"llama_model_dir": run / "model", "sae_model_path": run / "sae" / "sae.pth"}
    options = named | {"prompts": "The file", "latents": latent, "max_new_tokens": 6}
    same = script("llama_3_inference.py", **options, strengths=0).splitlines()
    clean, steered = (next(line.split(kind)[1] for line in same if kind in line) for kind in ("clean  ", "steered"))
    assert clean.strip() == steered.strip()
    changed = script("llama_3_inference.py", **options, strengths=40).splitlines()
    steered = next(line.split("steered")[1] for line in changed if "steered" in line)
    assert clean.strip() != steered.strip()


def test_the_demo_marks_the_strongest_token(run):
    index = LatentIndex(run / "sae" / "sae.pth")
    assert [line for line in index.missing if "score" not in line and "promoted" not in line] == []
    living = index.search(limit=20)
    assert living
    for row in living:
        for sentence in index.card(row["latent"], 3).sentences:
            shown = demo.marked(sentence)
            assert shown.count("«") == shown.count("»") == 1
            token = shown.partition("«")[2].partition("»")[0]
            assert token == " ".join(sentence.tokens[sentence.activations.index(max(sentence.activations))].split())
            assert shown.replace("«", "").replace("»", "").split() == "".join(sentence.tokens).split()


def test_the_report_of_what_the_stages_left(run):
    said = script("sae_report.py", sae_model_path=run / "sae" / "sae.pth", latents=12)
    page = (run / "sae" / "sae.report.html").read_text(encoding="utf-8")
    assert "sae.report.html" in said and page.count('<article class="latent-card"') == 12
    quality = json.loads((run / "sae" / "sae.evaluation.json").read_text())
    assert f"{quality['fvu']:.4f}" in page and "score_interpretations.py" in page and SITE in page


def test_count_hits_counts_texts_with_a_whole_word():
    texts = ["The File is here.", "profiles", "a file, a file", "nothing"]
    assert count_hits(texts, ["file"]) == 2


@pytest.mark.parametrize(
    "command",
    [words for r in recipe.RECIPES.values() for _, words in recipe.stages(r, Path("run"))],
    ids=lambda w: w[-1],
)
def test_the_demo_passes_only_options_that_exist(command):
    script = next(part for part in command[1:] if part.endswith(".py") or part.startswith("embedded."))
    name = script if script.endswith(".py") else script.replace(".", "/") + ".py"
    source = (PROJECT_DIR / name).read_text()
    for flag in (part[2:] for part in command[command.index(script) :] if part.startswith("--")):
        assert f"\n{flag.upper()} = " in source or f"\n{flag.upper()}: " in source, f"{name} has no {flag.upper()}"


@pytest.mark.parametrize(("n_gpus", "n_processes"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_starts_no_more_processes_than_there_are_gpus(tmp_path, monkeypatch, n_gpus, n_processes):
    ran = []
    monkeypatch.setattr(demo.torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(demo, "run_stages", lambda stages: ran.extend(words for _, words in stages) or [])
    monkeypatch.setattr(demo, "LatentIndex", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        call(demo, model="tiny_llama", run_dir=tmp_path)
    under_torchrun = [words for words in ran if "torch.distributed.run" in words]
    assert len(ran) > 5 and len(under_torchrun) == (0 if n_processes == 1 else 2)
    assert all(f"--nproc_per_node={n_processes}" in words for words in under_torchrun)


def test_commands():
    words = recipe.command("capture_activations.py", processes=2, sites=["a", "b"], num_samples=3)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"] and "--nproc_per_node=2" in words
    assert words[words.index("capture_activations.py") :][1:] == ["--sites", "a", "b", "--num_samples", "3"]
    assert recipe.command("embedded/corpus.py")[1:] == ["-m", "embedded.corpus"]


def test_a_failed_command_stops_with_a_sentence(capfd):
    with pytest.raises(Stop, match=r"failed with exit code 2 \(its message is above\): sae_report\.py --latents none"):
        recipe.run_command(recipe.command("sae_report.py", latents="none"), quiet=True)
    assert "error: argument --latents" in capfd.readouterr().err

"""The demo's recipe: every stage on the embedded tiny Llama, with suitable sizes. Needs no torch.

demo.py, the reference SAE, benchmarks and tests take their commands from here; the README trains with the same options.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import Stop
from pipeline.files import PROJECT_DIR

MODEL_DIR = "llama_3/tiny_llama"
SITE = "layers.6.attention_norm"  # of 8 layers: about 5/6 of the depth
MEANING = "sae.meaning_distinctive-words_max"  # names by the highest token
NUM_SAMPLES = 32_000  # sentences to capture
NUM_EPOCHS = 2  # of SAE training
TOP_SENTENCES = 20  # kept for each latent


# ---- commands


def command(script: str, processes: int = 1, **options: object) -> list[str]:
    """The command line of a script, `embedded/corpus.py` as a module; under torchrun for several processes.

    Run it in the project's folder, as `run_command` does.
    """
    program = [script]
    if "/" in script:  # a module of a room
        program = ["-m", script.removesuffix(".py").replace("/", ".")]
    elif processes > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]
    return [sys.executable, *program, *flags(options)]


def flags(options: Mapping[str, object]) -> list[str]:
    """--name value for each option; a list or tuple gives several values."""
    found: list[str] = []
    for name, value in options.items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return found


def run_command(words: Sequence[str], quiet: bool = False) -> None:
    """Run a command in the project's folder; quiet: hide what it prints. Raises Stop if it fails.

    Under torchrun the processes share the cores.
    """
    environment = dict(os.environ)
    if "torch.distributed.run" in words:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // 2))
    stdout = subprocess.DEVNULL if quiet else None
    code = subprocess.run(words, cwd=PROJECT_DIR, env=environment, stdout=stdout).returncode
    if code:
        raise Stop(f"This command failed with exit code {code} (its message is above): {' '.join(words[1:])}")


# ---- stages that others begin with


def documents(run: Path) -> list[str]:
    return command("embedded/corpus.py", output_dir=run / "documents", max_mb=6)


def sentences(run: Path) -> list[str]:
    return command(
        "openwebtext_sentences_dataset.py",
        input_path=run / "documents",
        output_dir=run / "sentences",
        punkt="corpus",
        punkt_train_mb=1,
        shard_mb=2,
    )


def capture(run: Path, sites: Sequence[str] = (SITE,), num_samples: int = NUM_SAMPLES, processes: int = 1) -> list[str]:
    return command(
        "capture_activations.py",
        processes=processes,
        model_dir=MODEL_DIR,
        sentences_dir=run / "sentences",
        output_dir=run / "activations",
        num_samples=num_samples,
        sites=list(sites),
        dtype="float32",
        batch_tokens=1024,
        window_sentences=4000,
    )


def preprocessing(run: Path, site: str, output_dir: Path) -> list[str]:
    return command("sae_preprocessing.py", input_dir=run / "activations" / site, output_dir=output_dir, shard_gb=0.1)


def scores(sae: Path, meanings: Path) -> list[str]:
    return command(
        "score_interpretations.py",
        model_path=sae,
        meaning_filepath=meanings,
        scorer="words",
        shown_sentences=TOP_SENTENCES,
    )


# ---- the whole demo


def stages(run: Path, num_samples: int = NUM_SAMPLES, num_epochs: int = NUM_EPOCHS) -> list[tuple[str, list[str]]]:
    """(title, command) of every stage of the demo, files in the folder `run`."""
    sae = run / "sae" / "sae.pth"
    activations = run / "activations" / SITE
    return [
        ("Documents: the documentation on this machine", documents(run)),
        ("Sentences", sentences(run)),
        ("Activations of the tiny Llama, two processes", capture(run, num_samples=num_samples, processes=2)),
        ("Shuffled batches", preprocessing(run, SITE, run / "batches")),
        (
            "Sparse autoencoder, two processes",
            command(
                "sae_training.py",
                processes=2,
                data_dir=run / "batches",
                model_save_path=sae,
                checkpoint_dir=run / "checkpoints",
                n_latents=4096,
                k=32,
                k_aux=128,
                num_epochs=num_epochs,
                batch_size=1024,
                learning_rate=4e-3,
                learning_rate_min_ratio=0.05,
                warmup_steps=20,
                dead_after_tokens=300_000,
                wandb="off",
            ),
        ),
        (
            "What the SAE keeps of the model",
            command("sae_evaluation.py", sae_model_path=sae, num_sentences=1000, batch_tokens=1024),
        ),
        (
            "Top sentences of every latent",
            command(
                "capture_top_activating_sentences.py", data_dir=activations, model_path=sae, top_sentences=TOP_SENTENCES
            ),
        ),
        (
            "Names of the latents",
            command("interpret_top_sentences_distinctive_words.py", model_path=sae, top_sentences=TOP_SENTENCES),
        ),
        ("How well the names tell where a latent fires", scores(sae, run / "sae" / f"{MEANING}.yaml")),
        ("Tokens that the latents promote", command("promoted_tokens.py", model_path=sae)),
        ("How strongly to steer, and which latents steer well", command("sae_steering.py", model_path=sae)),
    ]

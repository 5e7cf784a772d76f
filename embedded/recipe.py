"""The demo's recipes: every stage on SmolLM2, or on the embedded tiny Llama, with sizes that suit it. Needs no torch.

demo.py, the reference SAEs and tests take their commands from here; the README trains with the same options.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import Stop
from pipeline.files import PROJECT_DIR


class Recipe(NamedTuple):
    """A model for the demo, and the sizes that suit it."""

    model: str  # its name, for people
    model_dir: str
    fetched_as: str | None  # its name for fetch_model.py; None: it comes with the project
    site: str
    documents: str | None  # the text that comes with the project; None: the documentation on this machine
    dtype: str  # of the capture; bfloat16 is faster only on CPUs that know it
    num_samples: int  # sentences to capture; 0 for all
    n_latents: int
    num_epochs: int  # of SAE training
    training: Mapping[str, object]  # other options of sae_training.py
    prompts: Sequence[str]  # that completions continue


SMOLLM2_DIR = "llama_3/smollm2"  # what comes with the project for it: its own words, its reference SAE
SMOLLM2 = Recipe(
    model="SmolLM2-135M-Instruct",
    model_dir="models/smollm2-135M-Instruct-Q4_1",
    fetched_as="smollm2-135M-Instruct-Q4_1",
    site="layers.15.resid_post",  # half of the depth
    documents=f"{SMOLLM2_DIR}/dialogues.parquet",
    dtype="float32",
    num_samples=8_000,
    n_latents=4096,
    num_epochs=6,
    training={"k_aux": 256, "learning_rate": 2e-3},
    prompts=(
        "My favourite place in the world is",
        "The most important thing in life is",
        "Yesterday I went to",
        "I have always wanted to",
        "Let me tell you about",
        "When I was young,",
        "People often ask me about",
        "The best day of my life was",
    ),
)
TINY_LLAMA = Recipe(
    model="the tiny Llama",
    model_dir="llama_3/tiny_llama",
    fetched_as=None,
    site="layers.6.attention_norm",  # of 8 layers: about 5/6 of the depth
    documents=None,
    dtype="float32",
    num_samples=32_000,
    n_latents=4096,
    num_epochs=2,
    training={"k_aux": 128, "learning_rate": 4e-3},
    prompts=("This is", "The", "It can be", "Note that", "When the", "A", "In this case", "The second"),
)
RECIPES = {"smollm2": SMOLLM2, "tiny_llama": TINY_LLAMA}

MEANING = "sae.meaning_distinctive-words_max"  # names by the highest token
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


# ---- the stages


def scores(sae: Path, meanings: Path) -> list[str]:
    return command(
        "score_interpretations.py",
        model_path=sae,
        meaning_filepath=meanings,
        scorer="words",
        shown_sentences=TOP_SENTENCES,
    )


def processes_for(n_gpus: int) -> int:
    """How many processes share a stage: two, which a CPU's cores share, but no more than one for each GPU."""
    return 1 if n_gpus == 1 else 2


def training_stages(recipe: Recipe, run: Path, processes: int = 2) -> list[tuple[str, list[str]]]:
    """(title, command) of every stage up to an evaluated SAE of a recipe's model, files in the folder `run`.

    processes: one or two, see `processes_for`.
    """
    shared = "two processes" if processes == 2 else "one process"
    documents = recipe.documents or run / "documents"
    sae = run / "sae" / "sae.pth"
    corpus = command("embedded/corpus.py", output_dir=documents, max_mb=6)
    return [
        *([] if recipe.documents else [("Documents: the documentation on this machine", corpus)]),
        (
            "Sentences",
            command(
                "openwebtext_sentences_dataset.py",
                input_path=documents,
                output_dir=run / "sentences",
                punkt="corpus",
                punkt_train_mb=1,
                shard_mb=2,
            ),
        ),
        (
            f"Activations of {recipe.model}, {shared}",
            command(
                "capture_activations.py",
                processes=processes,
                model_dir=recipe.model_dir,
                sentences_dir=run / "sentences",
                output_dir=run / "activations",
                num_samples=recipe.num_samples,
                sites=recipe.site,
                dtype=recipe.dtype,
                batch_tokens=1024,
                window_sentences=4000,
            ),
        ),
        (
            "Shuffled batches",
            command(
                "sae_preprocessing.py",
                input_dir=run / "activations" / recipe.site,
                output_dir=run / "batches",
                shard_gb=0.1,
            ),
        ),
        (
            f"Sparse autoencoder, {shared}",
            command(
                "sae_training.py",
                processes=processes,
                data_dir=run / "batches",
                model_save_path=sae,
                checkpoint_dir=run / "checkpoints",
                n_latents=recipe.n_latents,
                k=32,
                num_epochs=recipe.num_epochs,
                batch_size=1024,
                learning_rate_min_ratio=0.05,
                warmup_steps=20,
                dead_after_tokens=300_000,
                wandb="off",
                **recipe.training,
            ),
        ),
        ("What the SAE keeps of the model", evaluation(sae)),
    ]


def evaluation(sae: Path) -> list[str]:
    return command("sae_evaluation.py", sae_model_path=sae, num_sentences=1000, batch_tokens=1024)


def naming_stages(sae: Path, activations: Path) -> list[tuple[str, list[str]]]:
    """(title, command) of every stage that says what the latents of an SAE mean, by their sentences in `activations`;
    files beside the SAE."""
    return [
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
        ("How well the names tell where a latent fires", scores(sae, sae.with_name(f"{MEANING}.yaml"))),
        ("Tokens that the latents promote", command("promoted_tokens.py", model_path=sae)),
        (
            "How strongly to steer, and which latents steer well",
            command("sae_steering.py", model_path=sae, n_concepts=8),
        ),
    ]


def stages(recipe: Recipe, run: Path, processes: int = 2) -> list[tuple[str, list[str]]]:
    """(title, command) of every stage on a recipe's model, files in the folder `run`; processes: one or two."""
    return [
        *training_stages(recipe, run, processes),
        *naming_stages(run / "sae" / "sae.pth", run / "activations" / recipe.site),
    ]

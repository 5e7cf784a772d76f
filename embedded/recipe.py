"""The demo's recipe: every stage on the embedded tiny Llama, with the sizes that suit it. Needs no torch.

demo.py, the reference SAE, benchmarks and tests take their commands from here; the README shows the same ones.
"""

import sys
from pathlib import Path

MODEL_DIR = "llama_3/tiny_llama"
SITE = "layers.6.attention_norm"  # of 8 layers: about 5/6 of the depth
MEANING = "sae.meaning_distinctive-words_max"  # names by the highest token
NUM_SAMPLES = 32_000  # sentences to capture
NUM_EPOCHS = 2  # of SAE training


def command(script: str, processes: int = 1, **options: object) -> list[str]:
    """The command line of a script, `embedded/corpus.py` as a module; under torchrun for several processes.

    To be run in the project's folder.
    """
    program = [script]
    if "/" in script:  # a module of a room
        program = ["-m", script.removesuffix(".py").replace("/", ".")]
    elif processes > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]
    return [sys.executable, *program, *flags(options)]


def flags(options: dict[str, object]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def stages(run: Path, num_samples: int = NUM_SAMPLES, num_epochs: int = NUM_EPOCHS) -> list[tuple[str, list[str]]]:
    """(title, command) of every stage of the demo, files in the folder `run`."""
    sae = run / "sae" / "sae.pth"
    activations = run / "activations" / SITE
    return [
        (
            "Documents: the documentation on this machine",
            command("embedded/corpus.py", output_dir=run / "documents", max_mb=6),
        ),
        (
            "Sentences",
            command(
                "openwebtext_sentences_dataset.py",
                input_path=run / "documents",
                output_dir=run / "sentences",
                punkt="corpus",
                punkt_train_mb=1,
                shard_mb=2,
            ),
        ),
        (
            "Activations of the tiny Llama, two processes",
            command(
                "capture_activations.py",
                processes=2,
                model_dir=MODEL_DIR,
                sentences_dir=run / "sentences",
                output_dir=run / "activations",
                num_samples=num_samples,
                sites=SITE,
                dtype="float32",
                batch_tokens=1024,
                window_sentences=4000,
            ),
        ),
        (
            "Shuffled batches",
            command("sae_preprocessing.py", input_dir=activations, output_dir=run / "batches", shard_gb=0.1),
        ),
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
            command("capture_top_activating_sentences.py", data_dir=activations, model_path=sae, top_sentences=20),
        ),
        (
            "Names of the latents",
            command("interpret_top_sentences_distinctive_words.py", model_path=sae, top_sentences=20),
        ),
        (
            "How well the names tell where a latent fires",
            command(
                "score_interpretations.py",
                model_path=sae,
                meaning_filepath=run / "sae" / f"{MEANING}.yaml",
                scorer="words",
                shown_sentences=20,
            ),
        ),
        ("Tokens that the latents promote", command("promoted_tokens.py", model_path=sae)),
    ]

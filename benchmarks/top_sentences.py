"""Top sentences: sentences/s of capture_top_activating_sentences.py against the original's way, in one run.

Reads   the embedded tiny Llama, its reference SAE, and the documentation on this machine (made into activations once)
Writes  DATA_DIR; prints a row of a markdown table
Method  the original's way is a Python loop over sentences: run the SAE on one, average (and take the last token)
        over its tokens, and record the sentence for the one latent that is highest by each. Written here from its
        description, with this project's SAE; both read the same memory-mapped shards (the original read a file per
        sentence) and run the same number of threads. Ours is the whole script's work: three aggregations, every
        latent's own sentences, samples, co-firing and the tables on disk. Encoding alone, in batches, bounds any
        way. One of each in turn, REPEATS times; medians. Run it alone on the machine
Cost    6 minutes on two cores, and 2 more the first time

    python benchmarks/top_sentences.py
"""

from common import machine, median_rates, run_script, timed

from pipeline.files import PROJECT_DIR
from pipeline.options import Count, parse_constants
from pipeline.run import run

DATA_DIR = "data/benchmark_top_sentences"  # folder for documents, sentences and activations
NUM_SAMPLES: Count = 32_000  # sentences
ORIGINAL_SENTENCES: Count = 4_000  # of these for the original's way, which takes the same time for each
REPEATS: Count = 5  # runs of each way

_MODEL_DIR = PROJECT_DIR / "llama_3" / "tiny_llama"
_SITE = "layers.6.attention_norm"
_TOP = 100  # sentences kept per latent

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

from pathlib import Path

import torch

from pipeline.activation_store import ActivationStore
from pipeline.progress import progress_bar
from pipeline.sentences import SentenceDataset
from sae import SparseAutoencoder, load_sae_model


def make_activations(folder: Path, num_samples: int) -> Path:
    """Make the demo's activations of the tiny Llama with the scripts themselves, unless they are there."""
    run_script("embedded/corpus.py", output_dir=folder / "documents", max_mb=6)
    run_script(
        "openwebtext_sentences_dataset.py",
        input_path=folder / "documents",
        output_dir=folder / "sentences",
        punkt="corpus",
        punkt_train_mb=1,
        shard_mb=2,
    )
    run_script(
        "capture_activations.py",
        model_dir=_MODEL_DIR,
        sentences_dir=folder / "sentences",
        output_dir=folder / "activations",
        num_samples=num_samples,
        sites=_SITE,
        dtype="float32",
        batch_tokens=2048,
        window_sentences=4000,
    )
    return folder / "activations" / _SITE


def one_by_one(
    store: ActivationStore, sae: SparseAutoencoder, texts: SentenceDataset, n: int
) -> dict[int, list[tuple[float, int, str]]]:
    """The original's way, for n sentences: latent -> [(activation, sentence, text)], each for its highest latent."""
    found: dict[int, list[tuple[float, int, str]]] = {}
    for shard in store.shards():
        offsets = shard.offsets.tolist()
        sentences = shard.sentence_idx[:n].tolist()
        for row, sentence in enumerate(sentences):
            acts = shard.acts[offsets[row] : offsets[row + 1]].to(sae.b_pre.device)
            values, indices = sae.encode(acts)
            latents = values.new_zeros(len(acts), sae.n_latents).scatter_(1, indices, values)
            latents @ sae.decoder.weight.T  # its class returns latents only from a whole forward pass
            for aggregated in (latents.mean(0), latents[-1]):
                activation, latent = aggregated.max(0)
                found.setdefault(int(latent), []).append((float(activation), sentence, texts[sentence]))
        n -= len(sentences)
        if n <= 0:
            break
    return {latent: sorted(entries, reverse=True)[:_TOP] for latent, entries in found.items()}


def encode_alone(store: ActivationStore, sae: SparseAutoencoder) -> None:
    for shard in store.shards():
        for acts in shard.acts.split(4096):
            sae.encode(acts.to(sae.b_pre.device))
    if sae.b_pre.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    config = parse_constants(globals())
    folder = Path(config.data_dir)
    activations = make_activations(folder, config.num_samples)
    sae_path = _MODEL_DIR / "sae.pth"
    device = "cuda" if torch.cuda.is_available() else "cpu"  # all ways on the same
    store, sae = ActivationStore(activations), load_sae_model(sae_path, device)
    n_sentences = store.manifest["counts"]["sentences"]
    n_original = min(n_sentences, config.original_sentences)
    texts = SentenceDataset(folder / "sentences", config.num_samples)
    options = {"data_dir": activations, "model_path": sae_path, "captured_data_output_dir": folder / "sae"}
    ours = lambda: run_script("capture_top_activating_sentences.py", **options)
    seconds: dict[str, list[float]] = {"original": [], "ours": [], "encoding": []}
    with torch.inference_mode():
        for _ in progress_bar(range(config.repeats), unit="round", desc="benchmark"):
            seconds["original"].append(timed(one_by_one, store, sae, texts, n_original)[0])
            seconds["ours"].append(timed(ours)[0])
            seconds["encoding"].append(timed(encode_alone, store, sae)[0])
    rate = median_rates(n_sentences, seconds)
    rate["original"] *= n_original / n_sentences
    print("| sentences/s | original's way | ours, everything | ratio | encoding alone | machine |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {n_sentences:,} sentences, {store.n_tokens:,} tokens, {sae.n_latents:,} latents | {rate['original']:,.0f} "
        f"| {rate['ours']:,.0f} | {rate['ours'] / rate['original']:.1f} | {rate['encoding']:,.0f} "
        f"| {machine()}, {torch.get_num_threads()} threads"
        f"{f', {torch.cuda.get_device_name()}' if device == 'cuda' else ''} |"
    )


if __name__ == "__main__":
    run(main)

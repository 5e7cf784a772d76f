"""Capture Llama 3's activations for every token of every sentence.

Reads   MODEL_DIR (a Llama checkpoint folder), SENTENCES_DIR (openwebtext_sentences_dataset.py, or the published one) or
        DIALOGUES (sample_dialogues.py, or others in parquet or jsonl)
Writes  OUTPUT_DIR/<site>/acts-*.safetensors, manifest.json: one folder per site (pipeline/activation_store.py).
        Of dialogues also their tokens and spans, in OUTPUT_DIR/dialogues (pipeline/dialogues.py)
Method  each sentence alone, without begin-of-text; the model stops at the deepest site: no cache, no output layer;
        sentences of similar length share a batch, to keep padding low; a sentence's batch does not depend on the
        number of processes. Each dialogue whole, in the model's own chat format, as Li et al. 2025 (arXiv:2506.07691)
        do for instruct models; of the assistant's tokens, or of all, the activations are stored, cut into spans that
        take the place of sentences
Cost    disk: 2 bytes x d_model per token and site; 1.03 with --store_dtype int8 (pipeline/packing.py). Memory per
        process besides the model: the activations of two windows, 2.8 GB per window and site for the 3B. Rates in
        docs/benchmarks.md

    python capture_activations.py --model_dir llama_3.2-3B --output_dir data/activations
    torchrun --standalone --nproc_per_node=4 capture_activations.py --model_dir llama_3.2-3B
    python capture_activations.py --model_dir models/smollm2-135M-Instruct-Q4_1 \\
        --dialogues data/dialogues/dialogues.parquet --sites layers.15.resid_post
"""

from typing import Literal, NamedTuple

from pipeline.options import Count, CountOrZero, Positive, Seed, Size, parse_constants
from pipeline.run import run

MODEL_DIR: str  # Llama folder, in Meta's or Hugging Face's format
SENTENCES_DIR = "data/sentences"  # folder of sentences
DIALOGUES: str | None = None  # capture these instead of sentences: a file or folder with `messages`
DIALOGUE_TOKENS: Literal["assistant", "all"] = "assistant"  # whose tokens of a dialogue to store
MAX_DIALOGUE_TOKENS: Count = 2048  # longer dialogues are cut to this length, or to the model's context
OUTPUT_DIR = "data/activations"  # output folder, with a folder per site
NUM_SAMPLES: CountOrZero = 25_000_000  # sentences, or dialogues, from the start of the seeded order; 0 for all
SITES: tuple[str, ...] = ("layers.22.attention_norm",)  # where to capture; several share one pass
MAX_TOKENS: Count = 192  # longer sentences are cut to this length, longer spans of dialogues into several
BEGIN_OF_TEXT = False  # put begin-of-text before each sentence (its own activation is never stored)
DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # for the computation
STORE_DTYPE: Literal["bfloat16", "int8"] = "bfloat16"  # of the stored activations; int8 halves the disk
BATCH_TOKENS: Count = 4096  # tokens per forward pass, including about 2 % padding; a CPU is fastest at 1024
WINDOW_SENTENCES: Count = 16_384  # sentences, or spans, worked on together, at most; more: less padding, more memory
SHARD_GB: Size = 1.0  # size of a shard
ROPE_SCALING_FACTOR: Positive | None = None  # overrides the checkpoint's; 8 reproduces the published activations
SEED: Seed = 42  # of the sentence order; 42 is the published one

_DECIDING = ("max_tokens", "begin_of_text", "dtype", "batch_tokens", "window_sentences", "shard_gb")  # the result
_FEWEST_WINDOWS = 8  # where there are sentences enough, so that as many processes have work
_SMALL_WINDOW = 256  # sentences; windows are not made smaller than this for more of them
_READERS = 4  # threads that tokenise a window each, ahead of the model

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import dataclasses
import time
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama_3 import load_model, load_tokenizer
from llama_3.chat import Message, check_chat, usual_date
from llama_3.checkpoint import checkpoint_identity
from llama_3.loading import read_params
from llama_3.model import ModelArgs
from llama_3.tokenizer import Tokenizer
from pipeline.activation_store import CAPTURE_STAGE, run_checksum, write_activations
from pipeline.capturing import (
    Capturer,
    Window,
    bos_id_before,
    check_model,
    describe_source,
    open_sentences,
    read_window,
)
from pipeline.dialogues import Cutter, DialogueSpans, read_dialogues, write_spans
from pipeline.distributed import World, world
from pipeline.documents import document_files, local_identity
from pipeline.errors import InputError, Stop
from pipeline.files import locked, read_json, remove_leftovers, require_disk, write_json
from pipeline.manifests import MANIFEST, complete_already, write_manifest
from pipeline.packing import row_bytes
from pipeline.progress import duration, gb, progress_bar
from pipeline.sentences import SentenceDataset
from pipeline.source import Source
from pipeline.workers import ahead

# ---- reading sentences


def window_size(n_sentences: int, at_most: int) -> int:
    """Sentences per window. The number of processes has no say in it, or it would change the batches."""
    return min(at_most, max(_SMALL_WINDOW, -(-n_sentences // _FEWEST_WINDOWS)))


class Windows(NamedTuple):
    """All sentences to capture, in windows of window_sentences."""

    sentences: SentenceDataset
    tokenizer: Tokenizer
    window_sentences: int
    max_tokens: int
    unit: str = "sentences"  # what is stored
    item: str = "sentence"  # what the model reads at once

    @property
    def n_windows(self) -> int:
        return -(-len(self.sentences) // self.window_sentences)

    def indices(self, number: int) -> range:
        start = number * self.window_sentences
        return range(start, min(start + self.window_sentences, len(self.sentences)))

    def n_sentences(self, numbers: Iterable[int]) -> int:
        return sum(len(self.indices(number)) for number in numbers)

    def read(self, number: int) -> Window:
        return read_window(self.sentences, self.tokenizer, number, self.indices(number), self.max_tokens)

    def sample(self) -> tuple[Window, int, int]:
        """About a thousand evenly spaced sentences, and estimates of the tokens to read and to store."""
        step = max(1, len(self.sentences) // 1000)
        indices = range(0, len(self.sentences), step)
        sample = read_window(self.sentences, self.tokenizer, -1, indices, self.max_tokens)
        return sample, sample.n_tokens * step, sample.n_tokens * step

    def counts(self, notes: list[dict[str, Any]]) -> dict[str, int]:
        """Of the manifest, from the notes of all windows."""
        return {
            "empty_sentences": sum(note["n_empty"] for note in notes),
            "cut_sentences": sum(note["n_cut"] for note in notes),
        }


class DialogueWindows(NamedTuple):
    """All dialogues to capture, each in the window that its first span is in."""

    sentences: DialogueSpans
    tokenizer: Tokenizer
    window_sentences: int
    max_tokens: int
    unit: str = "spans of dialogues"
    item: str = "dialogue"

    @property
    def n_windows(self) -> int:
        return -(-len(self.sentences) // self.window_sentences)

    def indices(self, number: int) -> range:
        first_spans = self.sentences.first_span[:-1]
        edges = np.array([number, number + 1]) * self.window_sentences
        return range(*np.searchsorted(first_spans, edges).tolist())

    def n_sentences(self, numbers: Iterable[int]) -> int:
        return sum(len(self.indices(number)) for number in numbers)

    def read(self, number: int) -> Window:
        return self.window(number, self.indices(number))

    def window(self, number: int, indices: range) -> Window:
        contexts = [self.sentences.context(i) for i in indices]
        spans, row = {}, 0
        for i, context in zip(indices, contexts, strict=True):
            for j, span in enumerate(context.spans, int(self.sentences.first_span[i])):
                spans[j] = range(row + span.start, row + span.stop)
            row += len(context.token_ids)
        return Window(number, list(indices), [context.token_ids for context in contexts], 0, 0, spans)

    def sample(self) -> tuple[Window, int, int]:
        n = self.sentences.n_contexts
        counts = self.sentences.manifest["counts"]
        return self.window(-1, range(0, n, max(1, n // 1000))), counts["tokens_read"], counts["tokens"]

    def counts(self, notes: list[dict[str, Any]]) -> dict[str, int]:
        of_all = self.sentences.manifest["counts"]
        return {name: of_all[name] for name in ("dialogues", "empty_dialogues", "cut_dialogues")}


def measure_rate(capturer: Capturer, sample: Window) -> float:
    """Tokens per second of this process."""
    few = sample.first(64 if capturer.model.device.type == "cpu" else 512)
    started = 0.0
    for _ in range(2):  # the first warms up
        started = time.time()
        capturer.window(few)
    return max(1.0, few.n_tokens / (time.time() - started))


# ---- windows on disk


def write_window(folder: Path, window: Window, acts: Tensor, shard_bytes: int) -> int:
    """Write one site's shards of a window, then the note that marks the window as done. Returns the shards' bytes."""
    records = write_activations(folder, window.name, *window.stored(acts), shard_bytes)
    note = {"shards": records, "n_empty": window.n_empty, "n_cut": window.n_cut}
    write_json(window_note(folder, window.number), note)
    return sum(record["bytes"] for record in records)


def window_note(folder: Path, number: int) -> Path:
    return folder / f"window-{number:05d}.json"


def remove_notes(folder: Path) -> None:
    for note in folder.glob("window-*.json"):
        note.unlink()


def window_is_written(folder: Path, number: int) -> bool:
    note = window_note(folder, number)
    if not note.exists():
        return False
    shards = read_json(note, "delete it and run this stage again.")["shards"]
    sizes = [(folder / s["file"]).stat().st_size if (folder / s["file"]).exists() else -1 for s in shards]
    return sizes == [s["bytes"] for s in shards]


def capture_windows(
    capturer: Capturer, windows: Iterable[Window], output_dir: Path, shard_bytes: int, bar: tqdm
) -> None:
    """Capture windows and write them. One window's shards are written in a thread while the next one is computed."""
    writing: list[Future[int]] = []
    started, n_tokens, n_written = time.time(), 0, 0

    def on_batch(n_sentences: int, n_new: int) -> None:
        nonlocal n_tokens
        n_tokens += n_new
        bar.update(n_sentences)
        bar.set_postfix_str(
            f"{n_tokens / (time.time() - started):,.0f} tokens/s, {gb(n_written)} written", refresh=False
        )

    with ThreadPoolExecutor(1) as writer:
        for window in windows:
            acts = capturer.window(window, on_batch)
            bar.update(window.n_empty)
            n_written += sum(job.result() for job in writing)  # at most two windows are in memory
            writing = [
                writer.submit(write_window, output_dir / site, window, acts[site], shard_bytes)
                for site in capturer.sites
            ]
        for job in writing:
            job.result()


# ---- the stage


def open_dialogues(
    config: Namespace, args: ModelArgs, tokenizer: Tokenizer, dialogues: list[list[Message]], w: World
) -> DialogueWindows:
    """The dialogues to capture; the first process encodes them, unless that is done. Raises InputError."""
    folder = Path(config.output_dir) / "dialogues"
    if w.is_main:
        order = np.random.default_rng(config.seed).permutation(len(dialogues))[: config.num_samples or None]
        deciding = ("dialogue_tokens", "max_dialogue_tokens", "max_tokens", "seed")
        decides = {name: getattr(config, name) for name in deciding} | {
            "model": checkpoint_identity(config.model_dir),
            "documents": local_identity(config.dialogues, document_files(config.dialogues)),
            "dialogues": len(order),
            "date": usual_date(args.rope_scaling_factor),
        }
        longest = min(config.max_dialogue_tokens, args.max_seq_len)
        all_tokens = config.dialogue_tokens == "all"
        cutter = Cutter(tokenizer, decides["date"], all_tokens, config.max_tokens, longest)
        write_spans(folder, dialogues, order.tolist(), cutter, decides)
    w.barrier()
    spans = DialogueSpans(folder)
    return DialogueWindows(spans, tokenizer, window_size(len(spans), config.window_sentences), config.max_tokens)


def begin_sites(output_dir: Path, sites: Iterable[str], decides: dict[str, Any], bytes_per_site: float) -> list[str]:
    """Begin or continue each site's folder; returns the sites that are not complete. Raises InputError."""
    folders = {site: output_dir / site for site in sites}
    if not any((folder / MANIFEST).exists() for folder in folders.values()):
        require_disk(output_dir, bytes_per_site * len(folders))
    open_sites = []
    for site, folder in folders.items():
        if complete_already(folder, CAPTURE_STAGE, {**decides, "site": site}):
            remove_notes(folder)
        else:
            open_sites.append(site)
        remove_leftovers(folder)
    present = sum(f.stat().st_size for site in open_sites for f in folders[site].glob("*.safetensors"))
    require_disk(output_dir, bytes_per_site * len(open_sites) - present)
    return open_sites


def capture_share(
    capturer: Capturer, windows: Windows | DialogueWindows, output_dir: Path, shard_bytes: int, w: World
) -> None:
    """Capture this process's windows, except those already written."""
    share = range(w.rank, windows.n_windows, w.size)
    todo = [i for i in share if not all(window_is_written(output_dir / site, i) for site in capturer.sites)]
    total = windows.n_sentences(share)
    label = "capture" if w.size == 1 else f"capture, process 1 of {w.size}"
    with progress_bar(
        total=total, initial=total - windows.n_sentences(todo), unit=windows.item, desc=label, disable=not w.is_main
    ) as bar:
        capture_windows(capturer, ahead(windows.read, todo, _READERS), output_dir, shard_bytes, bar)


def finish_site(
    folder: Path,
    source: Source,
    windows: Windows | DialogueWindows,
    decides: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Write the manifest in place of the windows' notes."""
    notes = [read_json(window_note(folder, i), "run this stage again.") for i in range(windows.n_windows)]
    shards = [record for note in notes for record in note["shards"]]
    counts = {
        "sentences": sum(s["n_sentences"] for s in shards),
        "tokens": sum(s["n_tokens"] for s in shards),
        **windows.counts(notes),
    }
    source = dataclasses.replace(source, activations=run_checksum(shards))
    write_manifest(
        folder,
        CAPTURE_STAGE,
        complete=True,
        decides={**decides, "site": source.site},
        config=options,
        **source.as_json(folder / MANIFEST),
        dtype=options["store_dtype"],
        counts=counts,
        shards=shards,
    )
    remove_notes(folder)
    print(f"{counts['tokens']:,} activations of {counts['sentences']:,} {windows.unit}: {folder}")


def main() -> None:
    config = parse_constants(globals())
    args = read_params(config.model_dir, config.rope_scaling_factor)
    layers = check_model(args, config.model_dir, config.sites, config.max_tokens)
    tokenizer = load_tokenizer(config.model_dir)
    if config.begin_of_text and config.dialogues:
        raise InputError("A dialogue begins as the model's chat format says; leave out --begin_of_text.")
    bos_id = bos_id_before(tokenizer, config.model_dir, config.begin_of_text)
    windows, dialogues = None, []
    if config.dialogues:
        check_chat(tokenizer)
        dialogues = read_dialogues(config.dialogues)
    else:
        sentences = open_sentences(config.sentences_dir, config.num_samples, config.seed)
        window_sentences = window_size(len(sentences), config.window_sentences)
        windows = Windows(sentences, tokenizer, window_sentences, config.max_tokens)
    packed = not torch.cuda.is_available()  # packed weights are for CPUs
    model = load_model(config.model_dir, "cpu", getattr(torch, config.dtype), config.rope_scaling_factor, packed)
    output_dir = Path(config.output_dir)

    with world() as w, locked(output_dir, w.rank, w.barrier), torch.inference_mode():
        windows = windows or open_dialogues(config, args, tokenizer, dialogues, w)
        read = windows.sentences, config.seed, config.max_tokens, tokenizer.bos_id, config.begin_of_text
        source = describe_source(config.model_dir, args, *read)
        decides = {name: getattr(config, name) for name in _DECIDING}
        decides |= {"store_dtype": config.store_dtype} if config.store_dtype != "bfloat16" else {}
        decides["window_sentences"] = windows.window_sentences
        decides |= {name: getattr(source, name) for name in ("model", "dataset", "rope_scaling_factor")}
        if not windows.sentences.manifest:  # published sentences, without checksums
            decides["sentence_files"] = windows.sentences.files_sha256
        sample, n_read, n_stored = windows.sample()
        bytes_per_site = row_bytes(args.dim, config.store_dtype) * n_stored
        sites = w.gather(begin_sites(output_dir, layers, decides, bytes_per_site) if w.is_main else [])[0]
        if not sites:
            return
        failed: dict[str, str] = {}
        capturer = Capturer(model.to(w.device), sites, config.batch_tokens, bos_id, config.store_dtype, failed)
        rate = w.size * measure_rate(capturer, sample)
        w.print(
            f"Reading {len(windows.sentences):,} {windows.unit}, about {n_read:,} tokens, from "
            f"{config.dialogues or config.sentences_dir}; writing about {gb(bytes_per_site * len(sites))} to "
            f"{output_dir}; about {duration(n_read / rate)} on {w.size} x {w.device.type}."
        )
        capture_share(capturer, windows, output_dir, int(config.shard_gb * 1e9), w)
        failed = {site: found for of_process in w.gather(failed) for site, found in of_process.items()}
        if w.is_main:
            for site in (each for each in sites if each not in failed):
                of_site = dataclasses.replace(source, site=site, layer=layers[site])
                finish_site(output_dir / site, of_site, windows, decides, vars(config))
        if failed:
            raise Stop(f"{next(iter(failed.values()))} Not captured: {', '.join(failed)}. All other sites are.")


if __name__ == "__main__":
    run(main)

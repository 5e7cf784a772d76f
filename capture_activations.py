"""Capture Llama 3 activations of every token of every sentence.

Reads   MODEL_DIR (a Llama checkpoint folder), SENTENCES_DIR (openwebtext_sentences_dataset.py, or the published one)
Writes  OUTPUT_DIR/<site>/acts-*.safetensors, manifest.json: one folder per site, format in activation_store.py
Method  each sentence alone, without begin-of-text; the model stops at the deepest site: no cache, no output layer;
        sentences of similar length share a batch, so that little is padding; a sentence's batch does not depend on
        the number of processes
Cost    disk: 2 bytes x d_model a token and site. Memory of a process beside the model: two windows' activations, for
        the 3B 2.8 GB each and site. Rates in the README's table

    python capture_activations.py --model_dir llama_3.2-3B --output_dir data/activations
    torchrun --standalone --nproc_per_node=4 capture_activations.py --model_dir llama_3.2-3B
"""

from typing import Any, Literal, NamedTuple

from pipeline.options import Count, CountOrZero, Positive, Seed, parse_constants
from pipeline.run import run

MODEL_DIR: str  # Llama folder, in Meta's or Hugging Face's format
SENTENCES_DIR = "data/sentences"  # folder of sentences
OUTPUT_DIR = "data/activations"  # folder for one folder per site
NUM_SAMPLES: CountOrZero = 25_000_000  # sentences to capture, from the first of the seeded order; 0 for all
SITES: tuple[str, ...] = ("layers.22.attention_norm",)  # where to capture; several share one pass
MAX_TOKENS: Count = 192  # longer sentences are cut here
BEGIN_OF_TEXT = False  # put begin-of-text before each sentence (its own activation is never stored)
DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation; bfloat16 is stored
BATCH_TOKENS: Count = 4096  # tokens a forward pass, padding included: about 2 % of them; a CPU is fastest at 1024
WINDOW_SENTENCES: Count = 16_384  # sentences sorted by length together: more means less padding, and more memory
SHARD_GB: Positive = 1.0  # size of a shard
ROPE_SCALING_FACTOR: Positive | None = None  # overrides the checkpoint's; 8 repeats the published activations
SEED: Seed = 42  # of the sentence order; 42 is the published one

_STAGE = "capture_activations.py"
_READERS = 4  # threads that tokenise, each a window, ahead of the model

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import checkpoint_identity
from llama_3.loading import read_params
from llama_3.model import check_site
from llama_3.padding import make_batches
from pipeline.activation_store import write_shard
from pipeline.distributed import world
from pipeline.errors import InputError
from pipeline.files import locked, read_json, remove_leftovers, require_disk, sha256, write_json
from pipeline.manifests import MANIFEST, begin_or_continue, check_complete, write_manifest
from pipeline.progress import duration, gb, progress_bar
from pipeline.sentences import SentenceDataset
from pipeline.workers import ahead


class Window(NamedTuple):
    """A run of consecutive sentences, tokenised: the unit of work and of continuing."""

    number: int  # -1: a sample from everywhere
    sentence_idx: list[int]  # of the sentences that have tokens
    token_ids: list[list[int]]  # without begin-of-text
    n_empty: int
    n_cut: int

    @property
    def name(self) -> str:
        return f"acts-{self.number:05d}" if self.number >= 0 else "a sample"


def read_window(sentences, tokenizer, number: int, indices: Sequence[int], max_tokens: int) -> Window:
    sentence_idx, token_ids, n_empty, n_cut = [], [], 0, 0
    for i in indices:
        ids = tokenizer.encode(sentences[i])
        if not ids:
            n_empty += 1
            continue
        n_cut += len(ids) > max_tokens
        sentence_idx.append(i)
        token_ids.append(ids[:max_tokens])
    return Window(number, sentence_idx, token_ids, n_empty, n_cut)


class Batch(NamedTuple):
    """Sentences on their way through the model."""

    members: list[int]  # positions in the window
    rows: Any  # of the window's activations that it fills, (n_tokens,) int64
    acts: dict[str, Any]  # site -> (n_tokens, d_model) bfloat16, on the CPU
    finite: dict[str, Any]  # site -> (n_tokens,) bool
    arrived: Any  # a CUDA event: the copies are there; None on a CPU


class Capturer:
    """Runs a model over windows, on a GPU one batch ahead of what is copied back.

    A batch that does not fit the GPU's memory is halved, and so are the batches after it.
    """

    def __init__(self, model, sites: list[str], batch_tokens: int, bos_id: int | None):
        self.model, self.sites, self.batch_tokens, self.bos_id = model, sites, batch_tokens, bos_id
        self.skip = 0 if bos_id is None else 1  # positions before a sentence

    def window(self, window: Window, on_batch: Callable[[int, int], None] = lambda n_sentences, n_tokens: None):
        """{site: (n_tokens, d_model) bfloat16}, sentences in the window's order. Raises InputError for NaN."""

        lengths = [len(ids) + self.skip for ids in window.token_ids]
        offsets = torch.tensor([0, *map(len, window.token_ids)]).cumsum(0)
        acts = {site: torch.empty(int(offsets[-1]), self.model.args.dim, dtype=torch.bfloat16) for site in self.sites}
        left = make_batches(lengths, self.batch_tokens)
        running = None
        while left or running:
            launched = self.launch(window, left[0], offsets) if left else None
            if left and launched is None:
                self.shrink(len(left[0]), lengths[left[0][0]])
                remaining = [i for batch in left for i in batch]
                again = make_batches([lengths[i] for i in remaining], self.batch_tokens)
                left = [[remaining[j] for j in batch] for batch in again]
                continue
            left = left[1:]
            if running:
                if running.arrived:
                    running.arrived.synchronize()
                for site in self.sites:
                    if not running.finite[site].all():
                        bad = int(running.rows[(~running.finite[site]).nonzero()[0, 0]])
                        i = int(torch.searchsorted(offsets, bad, right=True)) - 1
                        raise InputError(
                            f"The model gives NaN or infinity at {site} for sentence {window.sentence_idx[i]}, token "
                            f"{bad - int(offsets[i])} (of {window.name}); check the checkpoint, or use --dtype "
                            "float32."
                        )
                    acts[site][running.rows] = running.acts[site]
                on_batch(len(running.members), len(running.rows))
            running = launched
        return acts

    def launch(self, window: Window, members: list[int], offsets) -> Batch | None:
        """Start a batch; None when it does not fit the GPU's memory."""

        device = self.model.device
        longest = len(window.token_ids[members[0]]) + self.skip
        tokens = torch.zeros(len(members), longest, dtype=torch.long)
        for row, i in enumerate(members):
            ids = window.token_ids[i]
            tokens[row, self.skip : self.skip + len(ids)] = torch.tensor(ids)
        if self.skip:
            tokens[:, 0] = self.bos_id
        spans = [(int(offsets[i]), int(offsets[i + 1])) for i in members]
        rows = torch.cat([torch.arange(start, end) for start, end in spans])
        real = torch.cat(
            [torch.arange(end - start) + row * longest + self.skip for row, (start, end) in enumerate(spans)]
        )
        try:
            real = real.to(device)
            acts, finite = {}, {}
            for site, x in self.model.activations(tokens.to(device), self.sites).items():
                x = x.flatten(0, 1)[real].to(torch.bfloat16)
                # From a GPU: into pinned memory, while this thread goes on.
                finite[site] = torch.isfinite(x).all(1).to("cpu", non_blocking=True)
                acts[site] = x.to("cpu", non_blocking=True)
            arrived = None
            if device.type == "cuda":
                arrived = torch.cuda.Event()
                arrived.record()
            return Batch(members, rows, acts, finite, arrived)
        except torch.OutOfMemoryError:
            return None

    def shrink(self, n_sentences: int, longest: int) -> None:

        if n_sentences == 1:
            raise InputError(
                f"A sentence of {longest} tokens does not fit the memory of {self.model.device}; lower --max_tokens "
                "or use a GPU with more."
            )
        self.batch_tokens = n_sentences * longest // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"A batch did not fit the GPU's memory: at most {self.batch_tokens} tokens from here on.", flush=True)


def write_window(folder: Path, window: Window, acts, shard_bytes: int) -> int:
    """Write one site's shards of a window, then a note of them, which makes the window count as done. Returns bytes."""

    row_bytes = acts.shape[1] * 2
    records: list[dict] = []
    first = 0
    while first < len(window.sentence_idx):
        last, n_tokens = first, 0  # as many whole sentences as fit, at least one
        while last < len(window.sentence_idx) and (
            last == first or (n_tokens + len(window.token_ids[last])) * row_bytes <= shard_bytes
        ):
            n_tokens += len(window.token_ids[last])
            last += 1
        ids = window.token_ids[first:last]
        path = folder / f"{window.name}-{len(records):02d}.safetensors"
        rows = sum(record["n_tokens"] for record in records)
        write_shard(
            path,
            {
                "acts": acts[rows : rows + n_tokens].contiguous(),
                "token_ids": torch.tensor([t for sentence in ids for t in sentence], dtype=torch.int32),
                "sentence_idx": torch.tensor(window.sentence_idx[first:last]),
                "offsets": torch.tensor([0, *map(len, ids)]).cumsum(0),
            },
        )
        records.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "first_sentence_idx": window.sentence_idx[first],
                "n_sentences": last - first,
                "n_tokens": n_tokens,
            }
        )
        first = last
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


def capture_windows(capturer: Capturer, windows: Iterable[Window], output_dir: Path, shard_bytes: int, bar) -> None:
    """Capture windows and write them. One window's shards are written in a thread while the next one is computed."""
    writing: list = []
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


def main() -> None:
    config = parse_constants(globals())

    args = read_params(config.model_dir, config.rope_scaling_factor)
    if config.max_tokens > args.max_seq_len:
        raise InputError(
            f"--max_tokens {config.max_tokens} is beyond the context of {config.model_dir}, {args.max_seq_len}; lower "
            "it."
        )
    sites = list(dict.fromkeys(config.sites))
    try:
        layers = {site: check_site(site, args.n_layers) for site in sites}
    except ValueError as error:
        raise InputError(f"--sites: {error}") from None
    tokenizer = load_tokenizer(config.model_dir)
    sentences = SentenceDataset(config.sentences_dir, config.num_samples, config.seed)
    n_windows = -(-len(sentences) // config.window_sentences)
    output_dir = Path(config.output_dir)

    n_sentences = len(sentences.order)
    if config.num_samples > n_sentences and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"--num_samples asks for {config.num_samples:,} sentences, {config.sentences_dir} has {n_sentences:,}: "
            "capturing all of them."
        )

    # Packed weights are a CPU's.
    packed = not torch.cuda.is_available()
    model = load_model(config.model_dir, "cpu", getattr(torch, config.dtype), config.rope_scaling_factor, packed)

    with world() as w, locked(output_dir, w.rank, w.barrier), torch.inference_mode():
        model.to(w.device)
        about_dataset = {
            "sentences": len(sentences),
            "sentences_in_all": n_sentences,
            "seed": config.seed,
            "shards": [s["sha256"] for s in sentences.manifest.get("shards", [])],
        }
        decides = {
            name: getattr(config, name)
            for name in ("max_tokens", "begin_of_text", "dtype", "batch_tokens", "window_sentences", "shard_gb")
        }
        decides |= {"model": checkpoint_identity(config.model_dir), "dataset": about_dataset}
        decides["rope_scaling_factor"] = args.rope_scaling_factor
        if not about_dataset["shards"]:  # published sentences, without checksums
            decides["sentence_files"] = sentences.files_sha256
        # A sample tells how much there is to do.
        step = max(1, len(sentences) // 1000)
        sample = read_window(sentences, tokenizer, -1, range(0, len(sentences), step), config.max_tokens)
        n_tokens_about = sum(map(len, sample.token_ids)) * step
        open_sites: list[str] = []
        if w.is_main:
            if not any((output_dir / site / MANIFEST).exists() for site in sites):
                require_disk(output_dir, n_tokens_about * 2 * args.dim * len(sites))
            for site in sites:
                if begin_or_continue(output_dir / site, _STAGE, {**decides, "site": site}):
                    check_complete(output_dir / site, _STAGE)
                    remove_notes(output_dir / site)
                else:
                    open_sites.append(site)
                remove_leftovers(output_dir / site)
        sites = w.gather(open_sites)[0]
        if not sites:
            w.print(f"{output_dir} is complete already.")
            return

        n_bytes = n_tokens_about * 2 * args.dim * len(sites)
        mine = range(w.rank, n_windows, w.size)
        todo = [i for i in mine if not all(window_is_written(output_dir / site, i) for site in sites)]
        if w.is_main:
            there = sum(f.stat().st_size for site in sites for f in (output_dir / site).glob("*.safetensors"))
            require_disk(output_dir, n_bytes - there)
        bos_id = tokenizer.bos_id if config.begin_of_text else None
        capturer = Capturer(model, sites, config.batch_tokens, bos_id)
        n_few = 64 if w.device.type == "cpu" else 512
        few = sample._replace(sentence_idx=sample.sentence_idx[:n_few], token_ids=sample.token_ids[:n_few])
        for _ in range(2):  # the first warms up
            started = time.time()
            capturer.window(few)
        rate = sum(map(len, few.token_ids)) / (time.time() - started) * w.size
        w.print(
            f"Reading {len(sentences):,} sentences, about {n_tokens_about:,} tokens, from {config.sentences_dir}; "
            f"writing about {gb(n_bytes)} to {output_dir}; about "
            f"{duration(n_tokens_about / max(rate, 1))} on {w.size} x {w.device.type}."
        )

        of_window = lambda i: range(i * config.window_sentences, min((i + 1) * config.window_sentences, len(sentences)))
        n_mine, n_todo = (sum(len(of_window(i)) for i in some) for some in (mine, todo))
        read = lambda i: read_window(sentences, tokenizer, i, of_window(i), config.max_tokens)
        label = "capture" if w.size == 1 else f"capture, process 1 of {w.size}"
        with progress_bar(
            total=n_mine, initial=n_mine - n_todo, unit="sentence", desc=label, disable=not w.is_main
        ) as bar:
            capture_windows(capturer, ahead(read, todo, _READERS), output_dir, int(config.shard_gb * 1e9), bar)

        w.barrier()
        if w.is_main:
            for site in sites:
                folder = output_dir / site
                notes = [read_json(window_note(folder, i), "run this stage again.") for i in range(n_windows)]
                shards = [record for note in notes for record in note["shards"]]
                counts = {
                    "sentences": sum(s["n_sentences"] for s in shards),
                    "tokens": sum(s["n_tokens"] for s in shards),
                    "empty_sentences": sum(note["n_empty"] for note in notes),
                    "cut_sentences": sum(note["n_cut"] for note in notes),
                }
                write_manifest(
                    folder,
                    _STAGE,
                    complete=True,
                    decides={**decides, "site": site},
                    config=vars(config),
                    model=decides["model"],
                    model_dir=str(config.model_dir),
                    sentences_dir=str(config.sentences_dir),
                    site=site,
                    layer=layers[site],
                    d_model=args.dim,
                    dtype="bfloat16",
                    begin_of_text=config.begin_of_text,
                    bos_id=tokenizer.bos_id,
                    max_tokens=config.max_tokens,
                    rope_scaling_factor=args.rope_scaling_factor,
                    dataset=about_dataset,
                    counts=counts,
                    shards=shards,
                )
                remove_notes(folder)
                print(f"{counts['tokens']:,} activations of {counts['sentences']:,} sentences: {folder}")


if __name__ == "__main__":
    run(main)

"""Sentences through the model: what capture_activations.py stores, and sae_training.py --stream trains on.

Each sentence alone; the model stops at the deepest site: no cache, no output layer; sentences of similar length share a
batch, so that little of it is padding.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_3.checkpoint import checkpoint_identity
from llama_3.model import ModelArgs, Transformer, check_site
from llama_3.padding import make_batches
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError, Stop
from pipeline.packing import StoreDtype, empty_rows, pack
from pipeline.sentences import SentenceDataset
from pipeline.source import Source

# ---- inputs


def check_model(args: ModelArgs, model_dir: str, sites: Sequence[str], max_tokens: int) -> dict[str, int]:
    """{site: layer}, in order, without duplicates. Raises InputError for what the model does not support."""
    if max_tokens > args.max_seq_len:
        raise InputError(
            f"--max_tokens {max_tokens} exceeds the context of {model_dir}, {args.max_seq_len} tokens; lower it."
        )
    try:
        return {site: check_site(site, args.n_layers) for site in sites}
    except ValueError as error:
        raise InputError(f"--sites: {error}") from None


def open_sentences(folder: str, num_samples: int, seed: int) -> SentenceDataset:
    """The sentences to capture; prints a note if there are fewer than asked for."""
    sentences = SentenceDataset(folder, num_samples, seed)
    n_in_all = len(sentences.order)
    if not n_in_all:
        raise InputError(f"There are no sentences in {folder}; give another folder.")
    if num_samples > n_in_all and int(os.environ.get("RANK", 0)) == 0:
        print(f"--num_samples asks for {num_samples:,} sentences; {folder} has {n_in_all:,}: capturing all of them.")
    return sentences


def bos_id_before(tokenizer: Tokenizer, model_dir: str, begin_of_text: bool) -> int | None:
    """The token that each sentence comes after, if any. Raises InputError if the model has none."""
    if begin_of_text and tokenizer.bos_id is None:
        raise InputError(f"The tokenizer of {model_dir} has no begin-of-text; write --begin_of_text no.")
    return tokenizer.bos_id if begin_of_text else None


def describe_source(
    model_dir: str,
    args: ModelArgs,
    sentences: SentenceDataset,
    seed: int,
    max_tokens: int,
    bos_id: int | None,
    begin_of_text: bool,
) -> Source:
    """Where the activations of every site come from. bos_id: the tokenizer's, used or not; seed: of the sentences."""
    source = Source(
        file=model_dir,
        model=checkpoint_identity(model_dir),
        documents=sentences.documents(),
        dataset={
            "sentences": len(sentences),
            "sentences_in_all": len(sentences.order),
            "seed": seed,
            "shards": sentences.shard_checksums(),
        },
        d_model=args.dim,
        begin_of_text=begin_of_text,
        bos_id=bos_id,
        max_tokens=max_tokens,
        rope_scaling_factor=args.rope_scaling_factor,
    )
    return source.with_folder("model_dir", model_dir).with_folder("sentences_dir", sentences.path)


# ---- sentences


class Window(NamedTuple):
    """A run of consecutive sentences, tokenised: the unit of work and of resuming."""

    number: int  # -1: a sample of all sentences; -2: a lane of a stream's buffer
    sentence_idx: list[int]  # of the sentences that have tokens, or of the contexts of dialogues
    token_ids: list[list[int]]  # without begin-of-text
    n_empty: int
    n_cut: int
    spans: Mapping[int, range] | None = None  # of dialogues: index of a span -> the rows to store; None: every row

    @property
    def name(self) -> str:
        return {-1: "a sample", -2: "the stream"}.get(self.number, f"acts-{self.number:05d}")

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    def offsets(self) -> Tensor:
        """(n_sentences + 1,): the tokens of sentence i are offsets[i] to offsets[i + 1]."""
        return torch.tensor([0, *map(len, self.token_ids)]).cumsum(0)

    def first(self, n: int) -> "Window":
        return self._replace(sentence_idx=self.sentence_idx[:n], token_ids=self.token_ids[:n])

    def stored(self, acts: Tensor) -> tuple[Tensor, list[int], list[list[int]]]:
        """(activations, sentence_idx, token_ids) of what is stored. acts: (n_tokens, d_model), of all tokens."""
        if self.spans is None:
            return acts, self.sentence_idx, self.token_ids
        token_ids = [token for ids in self.token_ids for token in ids]
        rows = torch.tensor([row for span in self.spans.values() for row in span], dtype=torch.int64)
        return acts[rows], list(self.spans), [token_ids[span.start : span.stop] for span in self.spans.values()]


def read_window(
    sentences: SentenceDataset,
    tokenizer: Tokenizer,
    number: int,
    indices: Iterable[int],
    max_tokens: int,
) -> Window:
    """The sentences of these indices that have tokens, cut to max_tokens."""
    window = Window(number, [], [], 0, 0)
    n_empty = n_cut = 0
    for i in indices:
        ids = tokenizer.encode(sentences[i])
        if not ids:
            n_empty += 1
            continue
        n_cut += len(ids) > max_tokens
        window.sentence_idx.append(i)
        window.token_ids.append(ids[:max_tokens])
    return window._replace(n_empty=n_empty, n_cut=n_cut)


# ---- the model


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; a GPU copies it from pinned memory while this thread goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Batch(NamedTuple):
    """Sentences on their way through the model."""

    n_sentences: int
    rows: Tensor  # (n_tokens,) int64, the rows of the window's activations that it fills
    acts: dict[str, Tensor]  # site -> (n_tokens, ...) bfloat16 or packed, on the CPU
    finite: dict[str, Tensor]  # site -> (n_tokens,) bool
    arrived: torch.cuda.Event | None  # fires when the copies have arrived; None on a CPU


class Capturer:
    """Runs a model over windows; a GPU computes one batch ahead of the one being copied back.

    A batch that does not fit the GPU's memory is halved, and so are the batches after it. A site where the model gives
    NaN is taken out of `sites` and put into `failed`, with what was found; without `failed`, or at the last of the
    sites, Stop is raised.
    """

    def __init__(
        self,
        model: Transformer,
        sites: list[str],
        batch_tokens: int,
        bos_id: int | None,
        store_dtype: StoreDtype = "bfloat16",
        failed: dict[str, str] | None = None,
    ):
        self.model, self.sites, self.batch_tokens, self.bos_id = model, sites, batch_tokens, bos_id
        self.store_dtype: StoreDtype = store_dtype
        self.failed = failed
        self.skip = 0 if bos_id is None else 1  # positions before a sentence

    def window(
        self, window: Window, on_batch: Callable[[int, int], None] = lambda n_sentences, n_tokens: None
    ) -> dict[str, Tensor]:
        """{site: (n_tokens, d_model) bfloat16, or packed rows}, sentences in the window's order."""
        acts = {site: empty_rows(window.n_tokens, self.model.args.dim, self.store_dtype) for site in self.sites}
        running = None
        for started in self.batches(window):
            if running:
                self.collect(running, window, acts)
                on_batch(running.n_sentences, len(running.rows))
            running = started
        if running:
            self.collect(running, window, acts)
            on_batch(running.n_sentences, len(running.rows))
        return {site: acts[site] for site in self.sites}

    def batches(self, window: Window) -> Iterator[Batch]:
        """Start the window's batches, one at a time, on demand."""
        lengths, offsets = [len(ids) + self.skip for ids in window.token_ids], window.offsets()
        ids = torch.from_numpy(np.fromiter(itertools.chain.from_iterable(window.token_ids), np.int64))
        left = make_batches(lengths, self.batch_tokens)
        while left:
            started = None
            with contextlib.suppress(torch.OutOfMemoryError):
                started = self.start(left[0], ids, offsets)
            if started:  # outside the block: the exception keeps the failed batch in memory
                yield started
                left = left[1:]
            else:
                self.shrink(len(left[0]), lengths[left[0][0]])
                remaining = [i for batch in left for i in batch]
                again = make_batches([lengths[i] for i in remaining], self.batch_tokens)
                left = [[remaining[j] for j in batch] for batch in again]

    def start(self, members: list[int], ids: Tensor, offsets: Tensor) -> Batch:
        """Start a batch of the window's sentences `members`, longest first. Raises torch.OutOfMemoryError.

        ids: (n_tokens,) the window's tokens; offsets: those of `Window.offsets`.
        """
        device = self.model.device
        numbers = torch.tensor(members)
        first, lengths = offsets[numbers], offsets.diff()[numbers]
        place = torch.arange(-self.skip, int(lengths[0]))  # in the sentence; -1 is begin-of-text
        real = (place >= 0) & (place < lengths[:, None])  # (n_sentences, seq)
        rows = (first[:, None] + place)[real]
        tokens = torch.zeros(real.shape, dtype=torch.long)
        tokens[real] = ids[rows]
        if self.bos_id is not None:
            tokens[:, 0] = self.bos_id
        not_padding = on_device(real.flatten().nonzero().squeeze(1), device)
        acts, finite = {}, {}
        for site, x in self.model.activations(on_device(tokens, device), self.sites).items():
            x = x.flatten(0, 1)[not_padding].to(torch.bfloat16)
            # On a GPU this copies into pinned memory while this thread goes on.
            finite[site] = torch.isfinite(x).all(1).to("cpu", non_blocking=True)
            acts[site] = (x if self.store_dtype == "bfloat16" else pack(x)).to("cpu", non_blocking=True)
        arrived = None
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return Batch(len(members), rows, acts, finite, arrived)

    def collect(self, batch: Batch, window: Window, acts: dict[str, Tensor]) -> None:
        """Wait for a batch and copy it into the window's activations."""
        if batch.arrived:
            batch.arrived.synchronize()
        if bad := [site for site in self.sites if not batch.finite[site].all()]:
            self.give_up(bad, batch, window)
        for site in self.sites:
            # numpy copies each row in one piece, torch number by number.
            acts[site].view(torch.uint8).numpy()[batch.rows.numpy()] = batch.acts[site].view(torch.uint8).numpy()

    def give_up(self, sites: list[str], batch: Batch, window: Window) -> None:
        """Go on without sites that have NaN in a batch. Raises Stop if none would be left, or if that is not wanted."""
        row = int(batch.rows[(~batch.finite[sites[0]]).nonzero()[0, 0]])
        offsets = window.offsets()
        i = int(torch.searchsorted(offsets, row, right=True)) - 1
        read = "sentence" if window.spans is None else "dialogue"
        found = (
            f"The model gives NaN or infinity at {sites[0]} for {read} {window.sentence_idx[i]}, token "
            f"{row - int(offsets[i])} (of {window.name}); check the checkpoint, or use --dtype float32."
        )
        if self.failed is None or len(sites) == len(self.sites):
            raise Stop(found)
        self.failed |= dict.fromkeys(sites, found)
        self.sites = [site for site in self.sites if site not in sites]

    def shrink(self, n_sentences: int, longest: int) -> None:
        """Halve the batches after one of n_sentences did not fit. Raises Stop if it was a single sentence."""
        if n_sentences == 1:
            raise Stop(
                f"A sentence of {longest} tokens does not fit the memory of {self.model.device}; lower --max_tokens, "
                "or of dialogues --max_dialogue_tokens, or use a GPU with more memory."
            )
        self.batch_tokens = n_sentences * longest // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"A batch did not fit the GPU's memory; batches now have at most {self.batch_tokens} tokens.", flush=True)

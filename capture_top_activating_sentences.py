"""For every latent, find the sentences that activate it most, by mean, max and last token, and a sample of the others.

Reads   DATA_DIR: one site's folder of capture_activations.py; MODEL_PATH: an SAE trained on it
Writes  NAME.top.parquet      latent, aggregation, rank, activation, sentence_idx, text, token_ids, token_activations
        NAME.examples.parquet latent, tenth, sentence_idx, text, token_ids, token_activations: sentences whose highest
                              activation lies in each tenth of the latent's range (0: the weakest), and, as tenth -1,
                              sentences in which it is silent
        NAME.latents.parquet  latent, frequency (share of tokens it fires on), mean and max of its activation there,
                              sentences it fires in, the same by tenth, and the latents that fire on the same tokens
        beside the SAE NAME.pth, or in CAPTURED_DATA_OUTPUT_DIR
Method  every latent keeps its own TOP_SENTENCES; ties go to the lower sentence index. Examples are those with the
        lowest hash of (latent, sentence), so the result does not depend on batch size or number of processes.
        Co-firing is the Jaccard index (tokens with both / tokens with either) on COFIRING_TOKENS tokens drawn by hash.
        Activations are in normalised space
Cost    reads and encodes the activations once; the firing latents are kept on disk until the end, 6 bytes x k per
        token. Memory per process: 36 bytes x n_latents x TOP_SENTENCES, 4 bytes x k x COFIRING_TOKENS, and for the
        tables 4 bytes per captured token and 2 bytes x the tokens of all rows

    torchrun --standalone --nproc_per_node=4 capture_top_activating_sentences.py \\
        --data_dir data/activations/layers.22.attention_norm --model_path data/sae.pth
"""

from pipeline.options import Count, CountOrZero, Seed, parse_constants
from pipeline.run import run

DATA_DIR: str  # one site's captured activations
MODEL_PATH = "data/sae.pth"  # the SAE
CAPTURED_DATA_OUTPUT_DIR: str | None = None  # folder for the tables; beside the SAE when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one that was captured when not given
TOP_SENTENCES: Count = 100  # sentences kept per latent and aggregation
EXAMPLES_PER_TENTH: CountOrZero = 5  # sentences sampled from each tenth of a latent's range
SILENT_EXAMPLES: CountOrZero = 30  # sentences sampled in which the latent does not fire, if there are enough
COFIRING_TOKENS: CountOrZero = 2**18  # tokens sampled to count which latents fire together
COFIRING_LATENTS: CountOrZero = 10  # co-firing latents kept per latent
MIN_TOKENS: Count = 3  # shorter sentences are left out, except from frequency, mean and max
ENCODE_TOKENS: Count = 4096  # activations encoded at once, each taking 4 bytes x n_latents of memory
ALLOW_TF32 = True  # GPUs: TF32 for the product that chooses latents
SEED: Seed = 0  # seed of the samples

_SILENT_TRIES = 8  # sentences tried per silent one wanted
_MEASURED_TOKENS = 1024  # that say how many latents fire on one
_SAVE_S = 60  # seconds between saves of the progress

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latents.coactivation import firings, pair_counts, stacked
from latents.tables import (
    AGGREGATIONS,
    EXAMPLES,
    LATENTS,
    SILENT,
    TENTHS,
    TOP,
    Aggregation,
    SentenceColumns,
    lists,
    write_examples,
    write_top,
)
from llama_3.checkpoint import differing_field
from pipeline.activation_store import ActivationStore, Shard, open_shard, write_shard
from pipeline.distributed import World, world
from pipeline.errors import InputError
from pipeline.files import atomic_path, locked, require_disk, sha256
from pipeline.manifests import MANIFEST
from pipeline.packing import unpack
from pipeline.progress import gb, progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.sentences import SentenceDataset
from pipeline.source import Source
from pipeline.workers import ahead
from sae import SparseAutoencoder, load_sae_model

# ---- firing latents


class Entries(NamedTuple):
    """Firing latents: an entry per (token, latent) or (sentence, latent) pair, in tensors of equal length."""

    row: Tensor  # token or sentence
    latent: Tensor
    value: Tensor


def encode_entries(sae: SparseAutoencoder, acts: Tensor, chunk: int) -> Entries:
    """Encode the rows of a shard. Entries per token, only values above zero, on the SAE's device."""
    rows, latents, values = [], [], []
    for start in range(0, len(acts), chunk):
        kept, indices = sae.encode(unpack(acts[start : start + chunk].to(sae.b_pre.device), sae.d_model))
        token, slot = (kept > 0).nonzero(as_tuple=True)
        rows.append(token + start)
        latents.append(indices[token, slot])
        values.append(kept[token, slot])
    return Entries(torch.cat(rows), torch.cat(latents), torch.cat(values))


def write_entries(path: Path, entries: Entries, n_tokens: int) -> None:
    counts = entries.row.bincount(minlength=n_tokens)
    tensors = {"counts": counts.int(), "latent": entries.latent.int(), "value": entries.value.half()}
    write_shard(path, {name: tensor.cpu() for name, tensor in tensors.items()})


def read_entries(path: Path, device: torch.device | str = "cpu") -> Entries:
    """Read what `write_entries` wrote; the values are rounded to float16."""
    file = open_shard(path, Path(__file__).name)
    counts, latent, value = (file.get_tensor(name).to(device) for name in ("counts", "latent", "value"))
    rows = torch.arange(len(counts), device=device).repeat_interleave(counts)
    return Entries(rows, latent.long(), value.float())


def aggregate(entries: Entries, offsets: Tensor, n_latents: int) -> dict[Aggregation, Entries]:
    """Entries per sentence, for each aggregation. The mean is over all its tokens; those without a value count as 0."""
    offsets = offsets.to(entries.row.device)
    sentence = sentence_of_token(offsets)[entries.row]
    keys, inverse = (sentence * n_latents + entries.latent).unique(return_inverse=True)
    rows, latents = keys // n_latents, keys % n_latents
    # In float64 the sum barely depends on the order.
    total = torch.zeros_like(keys, dtype=torch.float64).index_add_(0, inverse, entries.value.double())
    highest = torch.zeros_like(keys, dtype=torch.float32).scatter_reduce_(0, inverse, entries.value, "amax")
    is_last = entries.row == offsets[1:][sentence] - 1
    return {
        "mean": Entries(rows, latents, (total / offsets.diff()[rows]).float()),
        "max": Entries(rows, latents, highest),
        "last": Entries(sentence[is_last], entries.latent[is_last], entries.value[is_last]),
    }


class TopTable:
    """The highest values of each row (a latent, or a tenth of one) with their sentences; -1 marks an empty place."""

    def __init__(self, n_rows: int, n_top: int, device: torch.device | str = "cpu"):
        self.values = torch.full((n_rows, n_top), -torch.inf, device=device)
        self.sentences = torch.full((n_rows, n_top), -1, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, values: Tensor, sentences: Tensor) -> None:
        """Merge candidates, in any order; equal values go to the lower sentence index."""
        n_top = self.values.shape[1]
        if n_top == 0:
            return
        good = values >= self.values[rows, -1]
        rows, values, sentences = rows[good], values[good], sentences[good]
        touched = rows.unique()  # after the first shards few rows still change
        filled = self.sentences[touched] >= 0
        rows = torch.cat([touched[:, None].expand_as(filled)[filled], rows])
        values = torch.cat([self.values[touched][filled], values])
        sentences = torch.cat([self.sentences[touched][filled], sentences])
        order = sentences.argsort()  # least significant key first; each later sort is stable
        order = order[values[order].argsort(stable=True, descending=True)]
        order = order[rows[order].argsort(stable=True)]
        rows, values, sentences = rows[order], values[order], sentences[order]
        counts = rows.bincount(minlength=len(self.values))
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        top = rank < n_top
        self.values[rows[top], rank[top]] = values[top]
        self.sentences[rows[top], rank[top]] = sentences[top]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, values, sentences) of the filled places, by row, best first; on the CPU."""
        row, rank = (self.sentences >= 0).nonzero(as_tuple=True)
        return row.cpu(), self.values[row, rank].cpu(), self.sentences[row, rank].cpu()


# ---- pass 1: top sentences


class Job(NamedTuple):
    """This process's part of the work."""

    world: World
    store: ActivationStore
    sae: SparseAutoencoder
    shards: list[int]  # their numbers in the store
    out: SaeFiles  # the tables are written beside out.path

    def partial(self, name: str | int) -> Path:
        """Path of a temporary file: `state`, or the entries of a shard, by its number."""
        return self.out.beside(f"top-partial-{name}-{self.world.rank}-of-{self.world.size}")

    def verified_shard(self, i: int) -> Shard:
        """Read shard i and compare its checksum, which leaves its bytes in memory. Raises InputError."""
        self.store.verify(i)
        return self.store.shard(i)

    def progress(self, about: str) -> Any:
        """This process's shards, with a progress bar."""
        return progress_bar(self.shards, unit="shard", desc=about, disable=not self.world.is_main)


class Found(NamedTuple):
    """Top sentences and statistics: of a process's first n_shards, on its device, or of all processes, on the CPU."""

    n_shards: int
    tables: dict[Aggregation, TopTable]
    fired: Tensor  # (n_latents,) tokens on which each latent fired
    total: Tensor  # (n_latents,) float64 sum of its activations
    highest: Tensor  # (n_latents,)


def find_top(job: Job, n_top: int, min_tokens: int, encode_tokens: int, identity: dict[str, Any]) -> Found:
    """Encode this process's shards and write their entries to disk. Continues a killed run of the same `identity`."""
    records = job.store.records
    found = load_found(job, n_top, identity)
    bar = progress_bar(
        total=sum(records[i]["n_tokens"] for i in job.shards),
        initial=sum(records[i]["n_tokens"] for i in job.shards[: found.n_shards]),
        desc="top sentences",
        unit="act",
        unit_scale=True,
        disable=not job.world.is_main,
    )
    saved = time.time()
    todo = job.shards[found.n_shards :]
    with bar:
        for i, shard in zip(todo, ahead(job.verified_shard, todo, 1), strict=True):
            found = add_shard(found, job, i, shard, min_tokens, encode_tokens)
            bar.update(records[i]["n_tokens"])
            if time.time() - saved > _SAVE_S or found.n_shards == len(job.shards):
                save_found(found, job, identity)
                saved = time.time()
    return found


def add_shard(found: Found, job: Job, shard_number: int, shard: Shard, min_tokens: int, encode_tokens: int) -> Found:
    """Add a shard, in place except for n_shards."""
    n_latents, device = len(found.fired), found.fired.device
    sentence_idx, is_long = (t.to(device) for t in (shard.sentence_idx, shard.offsets.diff() >= min_tokens))
    entries = encode_entries(job.sae, shard.acts, encode_tokens)
    write_entries(job.partial(shard_number), entries, len(shard.acts))
    found.fired.add_(entries.latent.bincount(minlength=n_latents))
    found.total.index_add_(0, entries.latent, entries.value.double())
    found.highest.scatter_reduce_(0, entries.latent, entries.value, "amax")
    for aggregation, by_sentence in aggregate(entries, shard.offsets, n_latents).items():
        counts = is_long[by_sentence.row]
        row, latent, value = (part[counts] for part in by_sentence)
        found.tables[aggregation].add(latent, value, sentence_idx[row])
    return found._replace(n_shards=found.n_shards + 1)


def load_found(job: Job, n_top: int, identity: dict[str, Any]) -> Found:
    """What a killed run had found; empty for a new run."""
    n_latents, device = job.sae.n_latents, job.sae.b_pre.device
    tables: dict[Aggregation, TopTable] = {name: TopTable(n_latents, n_top, device) for name in AGGREGATIONS}
    state_path = job.partial("state")
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        done = job.shards[: state["n_shards"]]
        if state["identity"] == identity and all(job.partial(i).exists() for i in done):
            for aggregation, table in tables.items():
                table.values, table.sentences = state["tables"][aggregation]
            return Found(len(done), tables, *state["statistics"])
        state_path.unlink()  # the entries it refers to are about to be overwritten
    fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
    total = torch.zeros(n_latents, dtype=torch.float64, device=device)
    return Found(0, tables, fired, total, torch.zeros(n_latents, device=device))


def save_found(found: Found, job: Job, identity: dict[str, Any]) -> None:
    state = {
        "identity": identity,
        "n_shards": found.n_shards,
        "tables": {aggregation: (table.values, table.sentences) for aggregation, table in found.tables.items()},
        "statistics": (found.fired, found.total, found.highest),
    }
    with atomic_path(job.partial("state")) as temporary:
        torch.save(state, temporary)


def gather_found(w: World, found: Found) -> Found:
    """Merge what all processes found; each gets it, on its CPU."""
    n_top = found.tables["max"].values.shape[1]
    tables: dict[Aggregation, TopTable] = {name: TopTable(len(found.fired), n_top) for name in AGGREGATIONS}
    for entries_by in w.gather({aggregation: table.entries() for aggregation, table in found.tables.items()}):
        for aggregation, entries in entries_by.items():
            tables[aggregation].add(*entries)
    fired, total, highest = zip(*w.gather((found.fired.cpu(), found.total.cpu(), found.highest.cpu())), strict=True)
    return Found(found.n_shards, tables, sum_of(fired), sum_of(total), torch.stack(highest).amax(0))


def sum_of(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(tensors).sum(0)


def sentence_of_token(offsets: Tensor) -> Tensor:
    """(n_tokens,) the position in the shard of each token's sentence."""
    lengths = offsets.diff()
    return torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths)


# ---- pass 2: samples


def hash32(a: Tensor, b: Tensor, seed: int) -> Tensor:
    """Hash each pair of a and b, int64 below 2^32, to 32 bits in an int64: the finaliser of SplitMix64 (Steele, Lea and
    Flood 2014, doi:10.1145/2660193.2660195)."""
    signed = lambda constant: (constant + 2**63) % 2**64 - 2**63
    shifted = lambda x, n: (x >> n) & (2 ** (64 - n) - 1)  # a logical shift of 64 bits
    x = (a << 32) + b + signed((seed + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)  # wraps around
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return shifted(x ^ shifted(x, 31), 32)


class SampleSizes(NamedTuple):
    """How much is sampled, and how; see the constants."""

    examples_per_tenth: int
    silent_examples: int
    cofiring_tokens: int
    min_tokens: int
    seed: int


class Samples:
    """Sentences from each tenth of each latent's range, silent ones, and tokens on which to count co-firing.

    highest: (n_latents,) highest activations, on the device to work on; captured: (n_sentences,) sentence indices.
    """

    def __init__(self, highest: Tensor, captured: Tensor, n_tokens: int, sizes: SampleSizes):
        n, device = len(highest), highest.device
        self.highest, self.min_tokens, self.seed = highest, sizes.min_tokens, sizes.seed
        self.tenths = TopTable(n * TENTHS, sizes.examples_per_tenth, device)
        self.silent = TopTable(n, sizes.silent_examples, device)
        self.by_tenth = torch.zeros(n * TENTHS, dtype=torch.int64, device=device)  # sentences in each tenth
        self.token_share = sizes.cofiring_tokens / n_tokens
        self.tokens = torch.empty(0, 1, dtype=torch.int32)  # latents of the sampled tokens, -1 where fewer fired; CPU
        # Silent sentences are sought among (sentence, latent) pairs drawn by hash; there are too many to try all.
        alive = highest.nonzero().flatten()
        tries = torch.arange(sizes.silent_examples * _SILENT_TRIES, device=device)
        latents = alive.repeat_interleave(len(tries))
        draws = hash32(latents, tries.repeat(len(alive)), sizes.seed + 1)
        self.tried = (captured.to(device)[draws * len(captured) // 2**32] * n + latents).unique()

    def add(self, shard: Shard, entries: Entries) -> None:
        device = self.highest.device
        offsets, sentence_idx = shard.offsets.to(device), shard.sentence_idx.to(device)
        self._add_sentences(shard, entries, offsets, sentence_idx)
        self._add_tokens(entries, offsets, sentence_idx)

    def _add_sentences(self, shard: Shard, entries: Entries, offsets: Tensor, sentence_idx: Tensor) -> None:
        n = len(self.highest)
        is_long = offsets.diff() >= self.min_tokens
        highest = aggregate(entries, offsets, n)["max"]
        row, latent, value = (part[is_long[highest.row]] for part in highest)
        sentence = sentence_idx[row]
        tenth = (value / self.highest[latent] * TENTHS).long().clamp(max=TENTHS - 1)
        self.by_tenth += (latent * TENTHS + tenth).bincount(minlength=len(self.by_tenth))
        self.tenths.add(latent * TENTHS + tenth, -hash32(latent, sentence, self.seed).float(), sentence)

        tried = of_shard(self.tried, shard, n)
        tried = tried[~is_in(tried, sentence * n + latent) & is_in(tried // n, sentence_idx[is_long])]
        sentence, latent = tried // n, tried % n
        self.silent.add(latent, -hash32(latent, sentence, self.seed).float(), sentence)

    def _add_tokens(self, entries: Entries, offsets: Tensor, sentence_idx: Tensor) -> None:
        of_token = sentence_of_token(offsets)
        position = torch.arange(len(of_token), device=offsets.device) - offsets[of_token]
        chosen = hash32(sentence_idx[of_token], position, self.seed + 2) < self.token_share * 2**32
        fired = entries.row.bincount(minlength=len(of_token))
        slot = torch.arange(len(entries.row), device=offsets.device) - (fired.cumsum(0) - fired)[entries.row]
        width = int(fired[chosen].max()) if chosen.any() else 0
        tokens = torch.full((len(of_token), width), -1, dtype=torch.int32, device=offsets.device)
        sampled = chosen[entries.row]
        tokens[entries.row[sampled], slot[sampled]] = entries.latent[sampled].int()
        self.tokens = stacked([self.tokens, tokens[chosen].cpu()])


class Drawn(NamedTuple):
    """The samples of all processes, on the CPU."""

    tenths: TopTable  # row latent * TENTHS + tenth
    silent: TopTable  # row latent
    by_tenth: Tensor  # (n_latents, TENTHS) sentences
    tokens: Tensor  # see Samples


def draw_samples(job: Job, highest: Tensor, sizes: SampleSizes) -> Drawn:
    captured = torch.cat([shard.sentence_idx for shard in job.store.shards()])
    device = job.world.device
    samples = Samples(highest.to(device), captured, job.store.n_tokens, sizes)
    for i in job.progress("samples"):
        samples.add(job.store.shard(i), read_entries(job.partial(i), device))
    n = len(highest)
    tenths, silent = TopTable(n * TENTHS, sizes.examples_per_tenth), TopTable(n, sizes.silent_examples)
    own = samples.tenths.entries(), samples.silent.entries(), samples.by_tenth.cpu(), samples.tokens
    all_tenths, all_silent, by_tenth, tokens = zip(*job.world.gather(own), strict=True)
    for table, all_entries in ((tenths, all_tenths), (silent, all_silent)):
        for entries in all_entries:
            table.add(*entries)
    return Drawn(tenths, silent, sum_of(by_tenth).view(n, TENTHS), stacked(tokens))


def of_shard(keys: Tensor, shard: Shard, n_latents: int) -> Tensor:
    """Those of the ascending keys, sentence_idx * n_latents + latent, whose sentences are in a shard's range."""
    bounds = torch.stack([shard.sentence_idx[0], shard.sentence_idx[-1] + 1]) * n_latents
    first, last = torch.searchsorted(keys, bounds.to(keys.device)).tolist()
    return keys[first:last]


def is_in(values: Tensor, ascending: Tensor) -> Tensor:
    """Which values occur in an ascending tensor."""
    if len(ascending) == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, values).clamp(max=len(ascending) - 1)] == values


def cofiring(tokens: Tensor, n_latents: int, n_kept: int) -> tuple[Tensor, Tensor]:
    """Each latent's n_kept closest companions and their Jaccard index, two (n_latents, n_kept) tensors, best first.

    tokens: (n_tokens, k) latents of each token, -1 where fewer fired. An index of 0 means no companion; ties go to the
    lower latent. Pairs are counted for a block of latents at a time, which bounds memory.
    """
    fired = firings(tokens, n_latents)
    n_kept = min(n_kept, n_latents - 1)
    companions = torch.zeros(n_latents, n_kept, dtype=torch.int64)
    index = torch.zeros(n_latents, n_kept, dtype=torch.float64)
    for first, both in pair_counts(tokens, tokens, n_latents, n_latents):
        last = first + len(both)
        both[torch.arange(last - first), torch.arange(first, last)] = 0
        jaccard = both / (fired[first:last, None] + fired - both).clamp(min=1).double()
        # Integers that sort by index, then by latent: topk does not define the order of ties.
        ranked = (jaccard * 2**40).long() * n_latents + torch.arange(n_latents - 1, -1, -1)
        companions[first:last] = n_latents - 1 - ranked.topk(n_kept).values % n_latents
        index[first:last] = jaccard.gather(1, companions[first:last])
    return companions, index


# ---- pass 3: activations per token


class Pairs(NamedTuple):
    """Per-token activations of (sentence, latent) pairs of one shard (numpy)."""

    keys: np.ndarray  # sentence_idx * n_latents + latent, ascending
    lengths: np.ndarray  # tokens of each pair's sentence
    activations: np.ndarray  # float16, concatenated


def collect_pairs(shard: Shard, entries: Entries, keys: Tensor, n_latents: int) -> Pairs:
    """The per-token activations of a shard's pairs. keys: of all pairs, ascending, on the entries' device."""
    keys = of_shard(keys, shard, n_latents)
    offsets, sentence_idx = (t.to(keys.device) for t in (shard.offsets, shard.sentence_idx))
    row = torch.searchsorted(sentence_idx, keys // n_latents)
    lengths = offsets.diff()[row]
    starts = lengths.cumsum(0) - lengths
    of_token = sentence_of_token(offsets)
    entry_keys = sentence_idx[of_token[entries.row]] * n_latents + entries.latent
    hit = is_in(entry_keys, keys)
    pair, token = torch.searchsorted(keys, entry_keys[hit]), entries.row[hit]
    activations = torch.zeros(int(lengths.sum()), dtype=torch.float16, device=keys.device)
    activations[starts[pair] + token - offsets[row[pair]]] = entries.value[hit].half()
    return Pairs(*(part.cpu().numpy() for part in (keys, lengths, activations)))


def collect_activations(job: Job, found: Found, drawn: Drawn) -> list[Pairs]:
    """The per-token activations of every (sentence, latent) pair that the tables show, from all processes."""
    n = len(found.fired)
    row, _, sentence = drawn.tenths.entries()
    keys = [sentence * n + row // TENTHS]
    for table in (*found.tables.values(), drawn.silent):
        latent, _, sentence = table.entries()
        keys.append(sentence * n + latent)
    device = job.world.device
    all_keys = torch.cat(keys).unique().to(device)
    own = [
        collect_pairs(job.store.shard(i), read_entries(job.partial(i), device), all_keys, n)
        for i in job.progress("activations")
    ]
    return [pairs for part in job.world.gather(own) for pairs in part]


# ---- tables


def sentence_columns(
    store: ActivationStore, dataset: SentenceDataset, pairs: list[Pairs], n_latents: int
) -> SentenceColumns:
    shards = list(store.shards())
    keys = np.concatenate([p.keys for p in pairs])
    places = keys.argsort()
    return SentenceColumns(
        n_latents,
        dataset,
        captured=np.concatenate([s.sentence_idx.numpy() for s in shards]),
        token_ids=lists([s.offsets.diff().numpy() for s in shards], [s.token_ids.numpy() for s in shards]),
        pair_keys=keys[places],
        pair_places=places,
        activations=lists([p.lengths for p in pairs], [p.activations for p in pairs]),
    )


def write_top_table(path: Path, sentences: SentenceColumns, tables: Mapping[Aggregation, TopTable]) -> None:
    parts = []
    for aggregation, table in tables.items():
        latent, value, sentence = table.entries()
        number = torch.full_like(latent, AGGREGATIONS.index(aggregation))
        rank = torch.arange(table.values.shape[1]).expand_as(table.values)[table.sentences >= 0]
        parts.append((latent, number, rank, value, sentence))
    write_top(path, sentences, *(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def write_example_table(path: Path, sentences: SentenceColumns, drawn: Drawn) -> None:
    """A latent's silent sentences come first, then the tenths, each in sampling order."""
    row, _, sentence = drawn.tenths.entries()
    silent_latent, _, silent_sentence = drawn.silent.entries()
    latent = torch.cat([silent_latent, row // TENTHS])
    tenth = torch.cat([torch.full_like(silent_latent, SILENT), row % TENTHS])
    write_examples(path, sentences, *(c.numpy() for c in (latent, tenth, torch.cat([silent_sentence, sentence]))))


def write_latent_table(path: Path, found: Found, drawn: Drawn, n_tokens: int, n_companions: int) -> None:
    n_latents = len(found.fired)
    companions, jaccard = cofiring(drawn.tokens, n_latents, n_companions)
    n_together = (jaccard > 0).sum(1).numpy()
    columns = {
        "latent": np.arange(n_latents),
        "frequency": (found.fired / n_tokens).numpy(),
        "mean": (found.total / found.fired.clamp(min=1)).float().numpy(),
        "max": found.highest.numpy(),
        "sentences": drawn.by_tenth.sum(1).numpy(),
        "sentences_by_tenth": list(drawn.by_tenth.numpy()),
        "cofiring_latents": lists([n_together], [companions[jaccard > 0].int().numpy()]),
        "cofiring_jaccard": lists([n_together], [jaccard[jaccard > 0].float().numpy()]),
    }
    LATENTS.write(path, columns)


# ---- main


def open_inputs(
    data_dir: str, model_path: str, sentences_dir: str | None
) -> tuple[ActivationStore, SparseAutoencoder, SentenceDataset, str | None]:
    """The activations, the SAE, the sentences, and a note if the SAE was trained on activations of another run.

    Raises InputError unless they belong together.
    """
    store, sae = ActivationStore(data_dir), load_sae_model(model_path)
    captured = Source.read(store.manifest, store.folder / MANIFEST)
    trained = Source.read(sae.info, SaeFiles(model_path).json)
    for name in ("site", "begin_of_text"):
        of_sae, of_data = getattr(trained, name), getattr(captured, name)
        if of_sae not in (None, of_data):
            raise InputError(
                f"{model_path} was trained with {name} = {of_sae}, but {data_dir} has {of_data}; use activations like "
                "those it was trained on."
            )
    if sae.d_model != store.d_model:
        raise InputError(
            f"{model_path} has d_model {sae.d_model}, but the activations in {data_dir} have {store.d_model}; use "
            "activations like those it was trained on."
        )
    of_sae, of_data = trained.model or {}, captured.model or {}
    if name := differing_field(of_sae, of_data):
        raise InputError(
            f"{model_path} was trained on another model than {data_dir} was captured from ({name} is {of_sae[name]} "
            f"instead of {of_data[name]}); use activations of the SAE's model."
        )
    note = None
    if trained.activations and captured.activations and trained.activations != captured.activations:
        note = f"Note: {model_path} was trained on activations of another run, of the same model and site."
    return store, sae, captured.sentences(sentences_dir), note


def identity_of(model_path: str, store: ActivationStore, n_top: int, min_tokens: int) -> dict[str, Any]:
    """Everything the first pass's result depends on."""
    return {
        "sae": sha256(model_path) if Path(model_path).is_file() else model_path,
        "activations": [record["sha256"] for record in store.records],
        "top_sentences": n_top,
        "min_tokens": min_tokens,
    }


def latents_per_token(job: Job) -> float:
    """About how many latents fire on a token: at most k with gate topk, else the mean over the first tokens."""
    if job.sae.kind.gate == "topk" and job.sae.k is not None:
        return job.sae.k
    acts = job.store.shard(0).acts[:_MEASURED_TOKENS]
    return len(encode_entries(job.sae, acts, _MEASURED_TOKENS).row) / len(acts)


def announce(job: Job, data_dir: str, n_top: int) -> None:
    """Print what will be read and written. Raises InputError if the disk is too small."""
    needed_bytes = int(6 * latents_per_token(job) * job.store.n_tokens)
    job.world.print(
        f"Reading {job.store.n_tokens:,} activations from {data_dir}; writing the top {n_top} sentences of "
        f"{job.sae.n_latents:,} latents to {job.out.beside(TOP.suffix)}, with about {gb(needed_bytes)} of temporary "
        "files beside it."
    )
    require_disk(job.out.beside(TOP.suffix).parent, needed_bytes)


def summary(found: Found, drawn: Drawn) -> str:
    n_top = found.tables["max"].values.shape[1]
    enough = drawn.by_tenth.sum(1) >= n_top
    full = {
        aggregation: (table.sentences[enough] >= 0).all(1).sum() / enough.sum().clamp(min=1)
        for aggregation, table in found.tables.items()
    }
    return (
        f"{int((found.fired > 0).sum()):,} of {len(found.fired):,} latents fire, {int(enough.sum()):,} in {n_top} "
        f"sentences or more; share of these with all {n_top} found: "
        + ", ".join(f"{share:.1%} by {aggregation}" for aggregation, share in full.items())
        + " (only sentences whose last token fires)"
    )


def main() -> None:
    config = parse_constants(globals())
    n_top, min_tokens = config.top_sentences, config.min_tokens
    sizes = SampleSizes(
        config.examples_per_tenth, config.silent_examples, config.cofiring_tokens, min_tokens, config.seed
    )
    store, sae, dataset, note = open_inputs(config.data_dir, config.model_path, config.sentences_dir)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    folder = Path(config.captured_data_output_dir or Path(config.model_path).parent)
    out = SaeFiles(folder / Path(config.model_path).name)

    with world() as w, locked(folder, w.rank, w.barrier), torch.inference_mode():
        if note:
            w.print(note)
        job = Job(w, store, sae.to(w.device), list(range(w.rank, len(store.records), w.size)), out)
        announce(job, config.data_dir, n_top)
        identity = identity_of(config.model_path, store, n_top, min_tokens)
        found = gather_found(w, find_top(job, n_top, min_tokens, config.encode_tokens, identity))
        if not (found.tables["max"].sentences >= 0).any():
            raise InputError(f"No latent of {config.model_path} fires on {config.data_dir}; train it longer.")
        drawn = draw_samples(job, found.highest, sizes)
        pairs = collect_activations(job, found, drawn)
        if w.is_main:
            sentences = sentence_columns(store, dataset, pairs, sae.n_latents)
            write_top_table(out.beside(TOP.suffix), sentences, found.tables)
            write_example_table(out.beside(EXAMPLES.suffix), sentences, drawn)
            write_latent_table(
                out.beside(LATENTS.suffix), found, drawn, store.n_tokens, n_companions=config.cofiring_latents
            )
            print(f"{summary(found, drawn)}: {out.beside(TOP.suffix)}")
        w.barrier()
        if w.is_main:
            for path in folder.glob(out.beside("top-partial-*").name):
                path.unlink()


if __name__ == "__main__":
    run(main)

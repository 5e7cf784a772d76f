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
        lowest hash of (latent, sentence). So the result does not depend on batch size or process count. Co-firing is
        the Jaccard index, tokens with both / tokens with either, on COFIRING_TOKENS tokens drawn by hash. Activations
        are in normalised space
Cost    reads and encodes the activations once; what fired waits on disk, 6 bytes x k a token, and is deleted at the
        end. Memory of a process: 36 bytes x n_latents x TOP_SENTENCES, 4 bytes x k x COFIRING_TOKENS, and for the
        tables 4 bytes a captured token and 2 bytes x the tokens of all rows

    torchrun --standalone --nproc_per_node=4 capture_top_activating_sentences.py \\
        --data_dir data/activations/layers.22.attention_norm --model_path data/sae.pth
"""

from typing import Any, NamedTuple

from pipeline.options import Count, CountOrZero, Seed, parse_constants
from pipeline.run import run

DATA_DIR: str  # one site's captured activations
MODEL_PATH = "data/sae.pth"  # the SAE
CAPTURED_DATA_OUTPUT_DIR: str | None = None  # folder for the tables; beside the SAE when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one that was captured when not given
TOP_SENTENCES: Count = 100  # sentences kept per latent and aggregation
EXAMPLES_PER_TENTH: CountOrZero = 5  # sentences sampled from each tenth of a latent's range
SILENT_EXAMPLES: CountOrZero = 30  # sentences sampled in which the latent does not fire, where there are enough
COFIRING_TOKENS: CountOrZero = 2**18  # tokens on which latents that fire together are counted
COFIRING_LATENTS: CountOrZero = 10  # of them kept per latent
MIN_TOKENS: Count = 3  # shorter sentences do not count, but in frequency, mean and max
ENCODE_TOKENS: Count = 4096  # activations encoded at once: bounds memory at 4 bytes x n_latents each
SEED: Seed = 0  # of the samples

_AGGREGATIONS = ("mean", "max", "last")
_TENTHS = 10
_SILENT_TRIES = 8  # sentences looked at for each silent one wanted
_COUNTED_AT_ONCE = 2**21  # pairs of latents: this fits a cache
_ROW_GROUP = 2**16  # rows of a table written at once

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.activation_store import ActivationStore, open_shard, write_shard
from pipeline.distributed import world
from pipeline.errors import InputError
from pipeline.files import atomic_path, locked, require_disk, sha256
from pipeline.progress import gb, progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.sentences import SentenceDataset
from sae import load_sae_model


class Entries(NamedTuple):
    """Latents that fired: one entry a (token, latent) or (sentence, latent) pair, tensors of one length."""

    row: Any  # token or sentence
    latent: Any
    value: Any


def encode_entries(sae, acts, chunk: int) -> Entries:
    """Encode raw activations (n_tokens, d_model); entries by token, values above zero only, on the SAE's device."""

    rows, latents, values = [], [], []
    for start in range(0, len(acts), chunk):
        v, i = sae.encode(acts[start : start + chunk].to(sae.b_pre.device))
        token, slot = (v > 0).nonzero(as_tuple=True)
        rows.append(token + start)
        latents.append(i[token, slot])
        values.append(v[token, slot])
    return Entries(torch.cat(rows), torch.cat(latents), torch.cat(values))


def write_entries(path: Path, entries: Entries, n_tokens: int) -> None:

    counts = entries.row.bincount(minlength=n_tokens)
    tensors = {"counts": counts.int(), "latent": entries.latent.int(), "value": entries.value.half()}
    write_shard(path, {name: tensor.cpu() for name, tensor in tensors.items()})


def read_entries(path: Path, device="cpu") -> Entries:
    """What `write_entries` wrote: values in float16 steps."""

    file = open_shard(path, Path(__file__).name)
    counts, latent, value = (file.get_tensor(name).to(device) for name in ("counts", "latent", "value"))
    rows = torch.arange(len(counts), device=device).repeat_interleave(counts)
    return Entries(rows, latent.long(), value.float())


def aggregate(entries: Entries, offsets, n_latents: int) -> dict[str, Entries]:
    """Entries by sentence for each aggregation. The mean counts every token of the sentence, silent ones as 0."""

    offsets = offsets.to(entries.row.device)
    sentence = sentence_of_token(offsets)[entries.row]
    keys, inverse = (sentence * n_latents + entries.latent).unique(return_inverse=True)
    rows, latents = keys // n_latents, keys % n_latents
    # In float64 the sum hardly depends on its order.
    total = torch.zeros_like(keys, dtype=torch.float64).index_add_(0, inverse, entries.value.double())
    highest = torch.zeros_like(keys, dtype=torch.float32).scatter_reduce_(0, inverse, entries.value, "amax")
    is_last = entries.row == offsets[1:][sentence] - 1
    return {
        "mean": Entries(rows, latents, (total / offsets.diff()[rows]).float()),
        "max": Entries(rows, latents, highest),
        "last": Entries(sentence[is_last], entries.latent[is_last], entries.value[is_last]),
    }


class TopTable:
    """The highest values of each row (a latent, or a tenth of one) with their sentences; -1 where there is none yet."""

    def __init__(self, n_rows: int, n_top: int, device="cpu"):

        self.values = torch.full((n_rows, n_top), -torch.inf, device=device)
        self.sentences = torch.full((n_rows, n_top), -1, dtype=torch.int64, device=device)

    def add(self, rows, values, sentences) -> None:
        """Merge candidates, in any order; equal values go to the lower sentence index."""

        n_top = self.values.shape[1]
        if n_top == 0:
            return
        good = values >= self.values[rows, -1]
        rows, values, sentences = rows[good], values[good], sentences[good]
        touched = rows.unique()  # soon few rows get something new
        filled = self.sentences[touched] >= 0
        rows = torch.cat([touched[:, None].expand_as(filled)[filled], rows])
        values = torch.cat([self.values[touched][filled], values])
        sentences = torch.cat([self.sentences[touched][filled], sentences])
        order = sentences.argsort()  # sorted by the least significant first, each later sort stable
        order = order[values[order].argsort(stable=True, descending=True)]
        order = order[rows[order].argsort(stable=True)]
        rows, values, sentences = rows[order], values[order], sentences[order]
        counts = rows.bincount(minlength=len(self.values))
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        top = rank < n_top
        self.values[rows[top], rank[top]] = values[top]
        self.sentences[rows[top], rank[top]] = sentences[top]

    def entries(self) -> tuple[Any, Any, Any]:
        """(rows, values, sentences) of what is filled, by row, best first; on the CPU."""
        where = (self.sentences >= 0).nonzero(as_tuple=True)
        return where[0].cpu(), self.values[where].cpu(), self.sentences[where].cpu()


class Progress(NamedTuple):
    """What one process has found so far, on its device; saved, so that a killed run continues."""

    n_shards: int  # of this process's shards, done
    tables: dict[str, TopTable]
    fired: Any  # (n_latents,) tokens on which each latent fired
    total: Any  # (n_latents,) float64 sum of its activations
    highest: Any  # (n_latents,)


def find_top(store, sae, mine: list[int], config, partial: Callable[[Any], Path], identity: dict, bar) -> Progress:
    """Pass 1, over this process's shards: the top tables and firing statistics. What fired goes to partial(shard)."""

    n, device = sae.n_latents, sae.b_pre.device
    found = Progress(
        0,
        {name: TopTable(n, config.top_sentences, device) for name in _AGGREGATIONS},
        torch.zeros(n, dtype=torch.int64, device=device),
        torch.zeros(n, dtype=torch.float64, device=device),
        torch.zeros(n, device=device),
    )
    state_path = partial("state")
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if state["identity"] == identity and all(partial(i).exists() for i in mine[: state["n_shards"]]):
            for name, table in found.tables.items():
                table.values, table.sentences = state["tables"][name]
            found = Progress(state["n_shards"], found.tables, *state["statistics"])
            bar.update(sum(store.records[i]["n_tokens"] for i in mine[: found.n_shards]))
        else:
            state_path.unlink()  # it must not outlive what is overwritten now
    saved = time.time()
    for position, i in enumerate(mine):
        if position < found.n_shards:
            continue
        store.verify(i)
        shard = store.shard(i)
        sentence_idx, long = (t.to(device) for t in (shard.sentence_idx, shard.offsets.diff() >= config.min_tokens))
        entries = encode_entries(sae, shard.acts, config.encode_tokens)
        write_entries(partial(i), entries, len(shard.acts))
        found.fired.add_(entries.latent.bincount(minlength=n))
        found.total.index_add_(0, entries.latent, entries.value.double())
        found.highest.scatter_reduce_(0, entries.latent, entries.value, "amax")
        for name, e in aggregate(entries, shard.offsets, n).items():
            counts = long[e.row]
            found.tables[name].add(e.latent[counts], e.value[counts], sentence_idx[e.row[counts]])
        found = found._replace(n_shards=position + 1)
        bar.update(len(shard.acts))
        if time.time() - saved > 60 or position == len(mine) - 1:
            state = {
                "identity": identity,
                "n_shards": found.n_shards,
                "tables": {name: (t.values, t.sentences) for name, t in found.tables.items()},
                "statistics": (found.fired, found.total, found.highest),
            }
            with atomic_path(state_path) as temporary:
                torch.save(state, temporary)
            saved = time.time()
    return found


def sentence_of_token(offsets):
    """(n_tokens,) each token's row among the sentences of a shard."""

    lengths = offsets.diff()
    return torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths)


# ---- samples


def hash32(a, b, seed: int):
    """32 bits, as int64, of each pair of int64 tensors a and b below 2^32: the finaliser of SplitMix64 (Steele, Lea and
    Flood 2014, doi:10.1145/2660193.2660195)."""
    signed = lambda constant: (constant + 2**63) % 2**64 - 2**63
    shifted = lambda x, n: (x >> n) & (2 ** (64 - n) - 1)  # of 64 bits without a sign
    x = (a << 32) + b + signed((seed + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)  # wraps around
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return shifted(x ^ shifted(x, 31), 32)


class Samples:
    """Pass 2: sentences from each tenth of each latent's range, silent ones, and tokens to count co-firing on.

    highest: (n_latents,) activation, on the device that is to do the work; sentences: (n_sentences,) indices of all
    that were captured.
    """

    def __init__(self, highest, sentences, n_tokens: int, k: int, config):

        n, device = len(highest), highest.device
        self.highest, self.k, self.config = highest, k, config
        self.tenths = TopTable(n * _TENTHS, config.examples_per_tenth, device)
        self.silent = TopTable(n, config.silent_examples, device)
        self.by_tenth = torch.zeros(n * _TENTHS, dtype=torch.int64, device=device)  # sentences in each tenth
        self.token_share = config.cofiring_tokens / n_tokens
        self.tokens = torch.empty(0, k, dtype=torch.int32)  # latents of the sampled tokens, -1 where fewer fired; CPU
        # Silent sentences are sought among some (sentence, latent) pairs drawn by hash: all pairs would be too many.
        living = highest.nonzero().flatten()
        tries = torch.arange(config.silent_examples * _SILENT_TRIES, device=device)
        latents = living.repeat_interleave(len(tries))
        draws = hash32(latents, tries.repeat(len(living)), config.seed + 1)
        self.tried = (sentences.to(device)[draws * len(sentences) // 2**32] * n + latents).unique()

    def add(self, shard, entries: Entries) -> None:

        n, seed, device = len(self.highest), self.config.seed, self.highest.device
        offsets, sentence_idx = shard.offsets.to(device), shard.sentence_idx.to(device)
        of_token = sentence_of_token(offsets)
        long = offsets.diff() >= self.config.min_tokens
        best = aggregate(entries, offsets, n)["max"]
        row, latent, value = (part[long[best.row]] for part in best)
        sentence = sentence_idx[row]
        tenth = (value / self.highest[latent] * _TENTHS).long().clamp(max=_TENTHS - 1)
        self.by_tenth += (latent * _TENTHS + tenth).bincount(minlength=len(self.by_tenth))
        self.tenths.add(latent * _TENTHS + tenth, -hash32(latent, sentence, seed).float(), sentence)

        tried = of_shard(self.tried, shard, n)
        tried = tried[~is_in(tried, sentence * n + latent) & is_in(tried // n, sentence_idx[long])]
        sentence, latent = tried // n, tried % n
        self.silent.add(latent, -hash32(latent, sentence, seed).float(), sentence)

        position = torch.arange(len(of_token), device=device) - offsets[of_token]
        chosen = hash32(sentence_idx[of_token], position, seed + 2) < self.token_share * 2**32
        fired = entries.row.bincount(minlength=len(of_token))
        slot = torch.arange(len(entries.row), device=device) - (fired.cumsum(0) - fired)[entries.row]
        tokens = torch.full((len(of_token), self.k), -1, dtype=torch.int32, device=device)
        tokens[entries.row, slot] = entries.latent.int()
        self.tokens = torch.cat([self.tokens, tokens[chosen].cpu()])


def of_shard(keys, shard, n_latents: int):
    """The part of ascending keys, sentence_idx * n_latents + latent, that lies between a shard's sentences."""

    bounds = torch.stack([shard.sentence_idx[0], shard.sentence_idx[-1] + 1]) * n_latents
    first, last = torch.searchsorted(keys, bounds.to(keys.device)).tolist()
    return keys[first:last]


def is_in(values, ascending):
    """Which values stand in an ascending tensor."""

    if len(ascending) == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, values).clamp(max=len(ascending) - 1)] == values


def cofiring(tokens, n_latents: int, n_kept: int):
    """Each latent's n_kept strongest companions and their Jaccard index, two (n_latents, n_kept) tensors, best first.

    tokens: (n_tokens, k) latents of each token, -1 where fewer fired. Where the index is 0 there is no companion; ties
    go to the lower latent. All pairs are counted for some latents at a time, which bounds memory.
    """

    token, slot = (tokens >= 0).nonzero(as_tuple=True)
    latent = tokens[token, slot].long()
    order = latent.argsort(stable=True)
    fired = latent.bincount(minlength=n_latents)
    ends = fired.cumsum(0)
    n_kept = min(n_kept, n_latents - 1)
    companions = torch.zeros(n_latents, n_kept, dtype=torch.int64)
    index = torch.zeros(n_latents, n_kept, dtype=torch.float64)
    height = max(1, _COUNTED_AT_ONCE // (n_latents + 1))
    for first in range(0, n_latents, height):
        last = min(first + height, n_latents)
        both = torch.zeros((last - first) * (n_latents + 1), dtype=torch.int64)
        mine = order[ends[first] - fired[first] : ends[last - 1]]
        for part in mine.split(max(1, _COUNTED_AT_ONCE // tokens.shape[1])):
            # Column 0 takes the -1 of tokens on which fewer fired.
            pairs = (latent[part] - first)[:, None] * (n_latents + 1) + tokens[token[part]] + 1
            both += pairs.flatten().bincount(minlength=len(both))
        both = both.view(last - first, n_latents + 1)[:, 1:]
        both[torch.arange(last - first), torch.arange(first, last)] = 0
        jaccard = both / (fired[first:last, None] + fired - both).clamp(min=1).double()
        # An integer that orders by index, then by latent: topk leaves the order of ties open.
        ranked = (jaccard * 2**40).long() * n_latents + torch.arange(n_latents - 1, -1, -1)
        companions[first:last] = n_latents - 1 - ranked.topk(n_kept).values % n_latents
        index[first:last] = jaccard.gather(1, companions[first:last])
    return companions, index


# ---- tables


class Pairs(NamedTuple):
    """Per-token activations of (sentence, latent) pairs of one shard (numpy)."""

    keys: Any  # sentence_idx * n_latents + latent, ascending
    lengths: Any  # tokens of each pair's sentence
    activations: Any  # float16, one after another


def collect_pairs(shard, entries: Entries, keys, n_latents: int) -> Pairs:
    """Pass 3: the per-token activations of the kept pairs that lie in a shard. keys: ascending, see Pairs."""

    keys = of_shard(keys, shard, n_latents)
    row = torch.searchsorted(shard.sentence_idx, keys // n_latents)
    lengths = shard.offsets.diff()[row]
    starts = lengths.cumsum(0) - lengths
    of_token = sentence_of_token(shard.offsets)
    entry_keys = shard.sentence_idx[of_token[entries.row]] * n_latents + entries.latent
    hit = is_in(entry_keys, keys)
    pair, token = torch.searchsorted(keys, entry_keys[hit]), entries.row[hit]
    activations = torch.zeros(int(lengths.sum()), dtype=torch.float16)
    activations[starts[pair] + token - shard.offsets[row[pair]]] = entries.value[hit].half()
    return Pairs(keys.numpy(), lengths.numpy(), activations.numpy())


class Rows:
    """Writes tables of (latent, sentence) rows, with the sentence's text, token ids and per-token activations."""

    def __init__(self, store, sentences, pairs: list[Pairs], n_latents: int):

        self.sentences, self.n_latents = sentences, n_latents
        self.keys = np.concatenate([p.keys for p in pairs])
        self.key_order = self.keys.argsort()
        self.activations = lists([p.lengths for p in pairs], [p.activations for p in pairs])
        shards = list(store.shards())
        self.sentence_idx = np.concatenate([s.sentence_idx for s in shards])
        self.token_ids = lists([s.offsets.diff().numpy() for s in shards], [s.token_ids.numpy() for s in shards])

    def write(self, path: Path, columns: dict[str, Any], sentence_idx, latent) -> None:
        """columns: pyarrow arrays that come before the sentence; the rest is looked up a part at a time."""

        table = pa.table({**columns, "sentence_idx": pa.array(sentence_idx, pa.int64())})
        keys = sentence_idx * self.n_latents + latent
        writer = None
        with atomic_path(path) as temporary:
            for start in range(0, max(1, len(keys)), _ROW_GROUP):  # an empty table too has its columns
                some = slice(start, start + _ROW_GROUP)
                pair = self.key_order[np.searchsorted(self.keys, keys[some], sorter=self.key_order)]
                sentence = np.searchsorted(self.sentence_idx, sentence_idx[some])
                part = table.slice(start, _ROW_GROUP)
                part = part.append_column(
                    "text", self.sentences.texts.take(pa.array(self.sentences.order[sentence_idx[some]]))
                )
                part = part.append_column("token_ids", self.token_ids.take(pa.array(sentence)))
                part = part.append_column("token_activations", self.activations.take(pa.array(pair)))
                writer = writer or pq.ParquetWriter(temporary, part.schema, compression="zstd")
                writer.write_table(part, row_group_size=_ROW_GROUP)
            writer.close()


def lists(lengths: list, values: list):
    """A column of lists from parts of their lengths and of their values, one after another (numpy)."""

    offsets = np.concatenate([[0], *(part for part in lengths)]).cumsum()
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(values)))


def write_top(rows: Rows, path: Path, tables: dict[str, TopTable]) -> None:
    """NAME.top.parquet, by latent, aggregation and rank."""

    parts = []
    for number, table in enumerate(tables.values()):
        latent, value, sentence = table.entries()
        rank = torch.arange(table.values.shape[1]).expand_as(table.values)[table.sentences >= 0]
        parts.append((latent, torch.full_like(latent, number), rank, value, sentence))
    latent, aggregation, rank, value, sentence = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    order = np.lexsort((rank, aggregation, latent))
    columns = {
        "latent": pa.array(latent[order], pa.int32()),
        "aggregation": pa.DictionaryArray.from_arrays(aggregation[order].astype(np.int32), list(tables)),
        "rank": pa.array(rank[order], pa.int32()),
        "activation": pa.array(value[order], pa.float32()),
    }
    rows.write(path, columns, sentence[order], latent[order])


def write_examples(rows: Rows, path: Path, tenths: TopTable, silent: TopTable) -> None:
    """NAME.examples.parquet, by latent and tenth, in the order of the sample; the silent ones first, as tenth -1."""

    row, _, sentence = tenths.entries()
    silent_latent, _, silent_sentence = silent.entries()
    latent = torch.cat([silent_latent, row // _TENTHS])
    tenth = torch.cat([torch.full_like(silent_latent, -1), row % _TENTHS])
    sentence = torch.cat([silent_sentence, sentence])
    order = latent.argsort(stable=True)
    columns = {
        "latent": pa.array(latent[order].numpy(), pa.int32()),
        "tenth": pa.array(tenth[order].numpy(), pa.int8()),
    }
    rows.write(path, columns, sentence[order].numpy(), latent[order].numpy())


def write_latents(path: Path, fired, total, highest, n_tokens: int, by_tenth, companions, index) -> None:
    """NAME.latents.parquet: one row a latent."""

    by_tenth, together = by_tenth.view(-1, _TENTHS), (index > 0).sum(1).numpy()
    columns = {
        "latent": pa.array(np.arange(len(fired)), pa.int32()),
        "frequency": pa.array((fired / n_tokens).numpy(), pa.float32()),
        "mean": pa.array((total / fired.clamp(min=1)).numpy(), pa.float32()),
        "max": pa.array(highest.numpy(), pa.float32()),
        "sentences": pa.array(by_tenth.sum(1).numpy()),
        "sentences_by_tenth": pa.FixedSizeListArray.from_arrays(pa.array(by_tenth.flatten().numpy()), _TENTHS),
        "cofiring_latents": lists([together], [companions[index > 0].int().numpy()]),
        "cofiring_jaccard": lists([together], [index[index > 0].float().numpy()]),
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


# ---- main


def open_inputs(config) -> tuple[Any, Any, Any]:
    """The activations, the SAE and the sentences. Raises InputError unless they belong together."""

    store = ActivationStore(config.data_dir)
    sae = load_sae_model(config.model_path)
    for name in ("site", "begin_of_text"):
        if sae.info.get(name, store.manifest[name]) != store.manifest[name]:
            raise InputError(
                f"{config.model_path} was trained with {name} = {sae.info[name]}, {config.data_dir} has "
                f"{store.manifest[name]}; name the activations it was trained on."
            )
    if sae.d_model != store.d_model:
        raise InputError(
            f"{config.model_path} has d_model {sae.d_model}, the activations in {config.data_dir} {store.d_model}; "
            "name the activations it was trained on."
        )
    dataset = store.manifest["dataset"]
    sentences = SentenceDataset(
        config.sentences_dir or store.manifest["sentences_dir"], dataset["sentences"], dataset["seed"]
    )
    if len(sentences.order) != dataset["sentences_in_all"]:
        raise InputError(
            f"{sentences.folder} has {len(sentences.order)} sentences, {config.data_dir} was captured from "
            f"{dataset['sentences_in_all']}; name those with --sentences_dir."
        )
    return store, sae, sentences


def main() -> None:
    config = parse_constants(globals())

    store, sae, sentences = open_inputs(config)
    out_dir = Path(config.captured_data_output_dir or Path(config.model_path).parent)
    named = lambda suffix: out_dir / SaeFiles(config.model_path).beside(suffix).name

    with world() as w, locked(out_dir, w.rank, w.barrier), torch.inference_mode():
        sae.to(w.device)
        n = sae.n_latents
        identity = {
            "sae": sha256(config.model_path) if Path(config.model_path).is_file() else str(config.model_path),
            "activations": [r["sha256"] for r in store.records],
            "top_sentences": config.top_sentences,
            "min_tokens": config.min_tokens,
        }
        disk = 6 * sae.k * store.n_tokens
        w.print(
            f"Reading {store.n_tokens:,} activations from {config.data_dir}; writing the top {config.top_sentences} "
            f"sentences of {n:,} latents to {named('top.parquet')}, and until then about {gb(disk)} beside it."
        )
        require_disk(out_dir, disk)
        mine = list(range(w.rank, len(store.records), w.size))
        partial = lambda part: named(f"top-partial-{part}-{w.rank}-of-{w.size}")
        n_mine = sum(store.records[i]["n_tokens"] for i in mine)
        shown = {"unit": "act", "unit_scale": True, "disable": not w.is_main}
        with progress_bar(total=n_mine, desc="top sentences", **shown) as bar:
            found = find_top(store, sae, mine, config, partial, identity, bar)
        tables = {name: TopTable(n, config.top_sentences) for name in _AGGREGATIONS}
        for other in w.gather({name: table.entries() for name, table in found.tables.items()}):
            for name, entries in other.items():
                tables[name].add(*entries)
        statistics = w.gather((found.fired.cpu(), found.total.cpu(), found.highest.cpu()))
        fired = sum(s[0] for s in statistics)
        total = sum(s[1] for s in statistics)
        highest = torch.stack([s[2] for s in statistics]).amax(0)
        if not (tables["max"].sentences >= 0).any():
            raise InputError(f"No latent of {config.model_path} fires on {config.data_dir}; train it longer.")

        captured = torch.cat([shard.sentence_idx for shard in store.shards()])
        samples = Samples(highest.to(w.device), captured, store.n_tokens, sae.k, config)
        for i in progress_bar(mine, unit="shard", desc="samples", disable=not w.is_main):
            samples.add(store.shard(i), read_entries(partial(i), w.device))
        tenths, silent = TopTable(n * _TENTHS, config.examples_per_tenth), TopTable(n, config.silent_examples)
        gathered = w.gather(
            (samples.tenths.entries(), samples.silent.entries(), samples.by_tenth.cpu(), samples.tokens)
        )
        for other_tenths, other_silent, _, _ in gathered:
            tenths.add(*other_tenths)
            silent.add(*other_silent)

        row, _, sentence = tenths.entries()
        keys = [sentence * n + row // _TENTHS]
        for table in (*tables.values(), silent):
            latent, _, sentence = table.entries()
            keys.append(sentence * n + latent)
        keys = torch.cat(keys).unique()
        pairs = []
        for i in progress_bar(mine, unit="shard", desc="activations", disable=not w.is_main):
            pairs.append(collect_pairs(store.shard(i), read_entries(partial(i)), keys, n))
        pairs = [p for part in w.gather(pairs) for p in part]

        if w.is_main:
            rows = Rows(store, sentences, pairs, n)
            write_top(rows, named("top.parquet"), tables)
            write_examples(rows, named("examples.parquet"), tenths, silent)
            by_tenth = sum(g[2] for g in gathered)
            companions, index = cofiring(torch.cat([g[3] for g in gathered]), n, config.cofiring_latents)
            write_latents(named("latents.parquet"), fired, total, highest, store.n_tokens, by_tenth, companions, index)
            enough = by_tenth.view(n, _TENTHS).sum(1) >= config.top_sentences
            full = [(t.sentences[enough] >= 0).all(1).sum() / enough.sum().clamp(min=1) for t in tables.values()]
            print(
                f"{int((fired > 0).sum()):,} of {n:,} latents fire, {int(enough.sum()):,} in {config.top_sentences} "
                f"sentences or more; of these have their {config.top_sentences}: "
                + ", ".join(f"{share:.1%} by {name}" for name, share in zip(tables, full, strict=True))
                + f" (only sentences whose last token fires count there): {named('top.parquet')}"
            )
        w.barrier()
        if w.is_main:
            for path in out_dir.glob(named("top-partial-*").name):
                path.unlink()


if __name__ == "__main__":
    run(main)

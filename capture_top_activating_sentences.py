"""For every latent, find the sentences that activate it most, by mean, max and last token.

Reads   DATA_DIR: one site's folder of capture_activations.py; MODEL_PATH: an SAE trained on it
Writes  NAME.top.parquet    latent, aggregation, rank, activation, sentence_idx, text, token_ids, token_activations
        NAME.latents.parquet latent, frequency (share of tokens it fires on), mean and max of its activation there
        beside the SAE NAME.pth, or in CAPTURED_DATA_OUTPUT_DIR
Method  every latent keeps its own TOP_SENTENCES; ties go to the lower sentence index, so that the result does not
        depend on batch size or process count. Activations are in normalised space
Cost    reads the activations twice; memory 36 bytes x n_latents x TOP_SENTENCES; rates in the README's table

    torchrun --standalone --nproc_per_node=4 capture_top_activating_sentences.py \\
        --data_dir data/activations/layers.22.attention_norm --model_path data/sae.pth
"""

from pathlib import Path
from typing import Any, NamedTuple

import stage

DATA_DIR: str  # one site's captured activations
MODEL_PATH = "data/sae.pth"  # the SAE
CAPTURED_DATA_OUTPUT_DIR: str | None = None  # folder for the tables; beside the SAE when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one that was captured when not given
TOP_SENTENCES = 100  # sentences kept per latent and aggregation
MIN_TOKENS = 3  # shorter sentences do not count
ENCODE_TOKENS = 4096  # activations encoded at once: bounds memory at 4 bytes x n_latents each

_AGGREGATIONS = ("mean", "max", "last")


class Entries(NamedTuple):
    """Latents that fired: one entry a (token, latent) or (sentence, latent) pair, tensors of one length."""

    row: Any  # token or sentence
    latent: Any
    value: Any


def encode_entries(sae, acts, chunk: int) -> Entries:
    """Encode raw activations (n_tokens, d_model); entries by token, values above zero only, on the CPU."""
    import torch

    rows, latents, values = [], [], []
    for start in range(0, len(acts), chunk):
        v, i = sae.encode(acts[start : start + chunk].to(sae.b_pre.device))
        token, slot = (v > 0).nonzero(as_tuple=True)
        rows.append((token + start).cpu())
        latents.append(i[token, slot].cpu())
        values.append(v[token, slot].cpu())
    return Entries(torch.cat(rows), torch.cat(latents), torch.cat(values))


def aggregate(entries: Entries, sentence_of_token, offsets, n_latents: int) -> dict[str, Entries]:
    """Entries by sentence for each aggregation. The mean counts every token of the sentence, silent ones as 0."""
    import torch

    sentence = sentence_of_token[entries.row]
    keys, inverse = (sentence * n_latents + entries.latent).unique(return_inverse=True)
    rows, latents = keys // n_latents, keys % n_latents
    # In float64 the sum hardly depends on its order.
    total = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, entries.value.double())
    highest = torch.zeros(len(keys)).scatter_reduce_(0, inverse, entries.value, "amax")
    lengths = offsets[1:] - offsets[:-1]
    is_last = entries.row == offsets[1:][sentence] - 1
    return {
        "mean": Entries(rows, latents, (total / lengths[rows]).float()),
        "max": Entries(rows, latents, highest),
        "last": Entries(sentence[is_last], entries.latent[is_last], entries.value[is_last]),
    }


class TopTable:
    """The highest values of each latent with their sentences; -1 where there is none yet."""

    def __init__(self, n_latents: int, n_top: int):
        import torch

        self.values = torch.full((n_latents, n_top), -torch.inf)
        self.sentences = torch.full((n_latents, n_top), -1, dtype=torch.int64)

    def add(self, latents, values, sentences) -> None:
        """Merge candidates, in any order; equal values go to the lower sentence index."""
        import torch

        n_top = self.values.shape[1]
        good = values >= self.values[latents, -1]
        has = (self.sentences >= 0).nonzero(as_tuple=True)
        latents = torch.cat([has[0], latents[good]])
        sentences = torch.cat([self.sentences[has], sentences[good]])
        values = torch.cat([self.values[has], values[good]])
        order = sentences.argsort()  # sorted by the least significant first, each later sort stable
        order = order[values[order].argsort(stable=True, descending=True)]
        order = order[latents[order].argsort(stable=True)]
        latents, values, sentences = latents[order], values[order], sentences[order]
        counts = latents.bincount(minlength=len(self.values))
        rank = torch.arange(len(latents)) - (counts.cumsum(0) - counts)[latents]
        top = rank < n_top
        self.values[latents[top], rank[top]] = values[top]
        self.sentences[latents[top], rank[top]] = sentences[top]


class Progress(NamedTuple):
    """What one process has found so far; saved, so that a killed run continues."""

    n_shards: int  # of this process's shards, done
    tables: dict[str, TopTable]
    fired: Any  # (n_latents,) tokens on which each latent fired
    total: Any  # (n_latents,) float64 sum of its activations
    highest: Any  # (n_latents,)


def find_top(store, sae, mine: list[int], config, partial_path: Path, identity: dict, bar) -> Progress:
    """Pass 1: the top tables and firing statistics over this process's shards."""
    import time

    import torch

    n = sae.n_latents
    found = Progress(
        0,
        {name: TopTable(n, config.top_sentences) for name in _AGGREGATIONS},
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(n, dtype=torch.float64),
        torch.zeros(n),
    )
    if partial_path.exists():
        state = torch.load(partial_path, weights_only=True)
        if state["identity"] == identity:
            for name, table in found.tables.items():
                table.values, table.sentences = state["tables"][name]
            found = Progress(state["n_shards"], found.tables, *state["statistics"])
            bar.update(sum(store.records[i]["n_tokens"] for i in mine[: found.n_shards]))
    saved = time.time()
    for position, i in enumerate(mine):
        if position < found.n_shards:
            continue
        shard = store.shard(i)
        lengths = shard.offsets.diff()
        sentence_of_token = torch.arange(len(lengths)).repeat_interleave(lengths)
        entries = encode_entries(sae, shard.acts, config.encode_tokens)
        found.fired.add_(entries.latent.bincount(minlength=n))
        found.total.index_add_(0, entries.latent, entries.value.double())
        found.highest.scatter_reduce_(0, entries.latent, entries.value, "amax")
        for name, e in aggregate(entries, sentence_of_token, shard.offsets, n).items():
            long = lengths[e.row] >= config.min_tokens
            found.tables[name].add(e.latent[long], e.value[long], shard.sentence_idx[e.row[long]])
        found = found._replace(n_shards=position + 1)
        bar.update(len(shard.acts))
        if time.time() - saved > 60:
            state = {
                "identity": identity,
                "n_shards": found.n_shards,
                "tables": {name: (t.values, t.sentences) for name, t in found.tables.items()},
                "statistics": (found.fired, found.total, found.highest),
            }
            with stage.atomic_path(partial_path) as temporary:
                torch.save(state, temporary)
            saved = time.time()
    return found


class Examples(NamedTuple):
    """Per-token activations of the kept (sentence, latent) pairs of one shard, and its sentences' tokens (numpy)."""

    keys: Any  # sentence_idx * n_latents + latent, ascending
    lengths: Any  # tokens of each pair's sentence
    activations: Any  # float16, one after another
    sentences: Any  # sentence_idx, ascending
    sentence_lengths: Any
    token_ids: Any


def collect_examples(shard, sae, keys, chunk: int) -> Examples | None:
    """Pass 2: the per-token activations of the kept pairs that lie in a shard. keys: sorted, see Examples."""
    import torch

    n = sae.n_latents
    wanted = torch.from_numpy(keys)
    first, last = int(shard.sentence_idx[0]), int(shard.sentence_idx[-1])
    wanted = wanted[(wanted >= first * n) & (wanted < (last + 1) * n)]
    if len(wanted) == 0:
        return None
    sentences = (wanted // n).unique()
    where = torch.searchsorted(shard.sentence_idx, sentences)  # rows of the wanted sentences in the shard
    lengths = shard.offsets.diff()[where]
    starts = lengths.cumsum(0) - lengths
    local = torch.arange(len(where)).repeat_interleave(lengths)  # wanted sentence of each gathered token
    position = torch.arange(int(lengths.sum())) - starts[local]
    rows = shard.offsets[where][local] + position
    entries = encode_entries(sae, shard.acts[rows], chunk)
    entry_keys = sentences[local[entries.row]] * n + entries.latent
    pair = torch.searchsorted(wanted, entry_keys).clamp(max=len(wanted) - 1)
    hit = wanted[pair] == entry_keys
    pair_lengths = lengths[torch.searchsorted(sentences, wanted // n)]
    pair_starts = pair_lengths.cumsum(0) - pair_lengths
    activations = torch.zeros(int(pair_lengths.sum()), dtype=torch.float16)
    activations[pair_starts[pair[hit]] + position[entries.row[hit]]] = entries.value[hit].half()
    parts = (wanted, pair_lengths, activations, sentences, lengths, shard.token_ids[rows])
    return Examples(*(part.numpy() for part in parts))


def top_table(tables: dict[str, TopTable], examples: list[Examples], texts: dict[int, str], n_latents: int):
    """The rows of NAME.top.parquet, sorted by latent, aggregation and rank."""
    import numpy as np
    import pyarrow as pa

    def lists(lengths: list, values: list, of: str):
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        flat = np.concatenate(values)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, of))

    keys = np.concatenate([e.keys for e in examples])
    sentences = np.concatenate([e.sentences for e in examples])
    activations = lists([e.lengths for e in examples], [e.activations for e in examples], pa.float16())
    token_ids = lists([e.sentence_lengths for e in examples], [e.token_ids for e in examples], pa.int32())
    key_order, sentence_order = keys.argsort(), sentences.argsort()

    columns: dict[str, list] = {name: [] for name in ("latent", "aggregation", "rank", "activation", "sentence_idx")}
    for number, name in enumerate(_AGGREGATIONS):
        latent, rank = (tables[name].sentences >= 0).nonzero(as_tuple=True)
        columns["latent"].append(latent.numpy())
        columns["aggregation"].append(np.full(len(latent), number, dtype=np.int32))
        columns["rank"].append(rank.numpy())
        columns["activation"].append(tables[name].values[latent, rank].numpy())
        columns["sentence_idx"].append(tables[name].sentences[latent, rank].numpy())
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.lexsort((flat["rank"], flat["aggregation"], flat["latent"]))
    flat = {name: column[order] for name, column in flat.items()}
    row_keys = flat["sentence_idx"] * n_latents + flat["latent"]
    pair = key_order[np.searchsorted(keys, row_keys, sorter=key_order)]
    sentence = sentence_order[np.searchsorted(sentences, flat["sentence_idx"], sorter=sentence_order)]
    return pa.table(
        {
            "latent": pa.array(flat["latent"], pa.int32()),
            "aggregation": pa.DictionaryArray.from_arrays(flat["aggregation"], list(_AGGREGATIONS)),
            "rank": pa.array(flat["rank"], pa.int32()),
            "activation": pa.array(flat["activation"], pa.float32()),
            "sentence_idx": pa.array(flat["sentence_idx"], pa.int64()),
            "text": pa.array([texts[int(s)] for s in sentences], pa.large_string()).take(pa.array(sentence)),
            "token_ids": token_ids.take(pa.array(sentence)),
            "token_activations": activations.take(pa.array(pair)),
        }
    )


def main() -> None:
    config = stage.parse_constants(globals())
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from activation_store import ActivationStore
    from distributed import world
    from openwebtext_sentences_dataset import SentenceDataset
    from sae import beside, load_sae_model

    store = ActivationStore(config.data_dir)
    sae = load_sae_model(config.model_path)
    for name in ("site", "begin_of_text"):
        if sae.info.get(name, store.manifest[name]) != store.manifest[name]:
            raise stage.InputError(
                f"{config.model_path} was trained with {name} = {sae.info[name]}, {config.data_dir} has "
                f"{store.manifest[name]}; name the activations it was trained on."
            )
    if sae.d_model != store.d_model:
        raise stage.InputError(
            f"{config.model_path} has d_model {sae.d_model}, the activations in {config.data_dir} {store.d_model}; "
            "name the activations it was trained on."
        )
    dataset = store.manifest["dataset"]
    sentences = SentenceDataset(
        config.sentences_dir or store.manifest["sentences_dir"], dataset["sentences"], dataset["seed"]
    )
    if len(sentences.order) != dataset["sentences_in_all"]:
        raise stage.InputError(
            f"{sentences.folder} has {len(sentences.order)} sentences, {config.data_dir} was captured from "
            f"{dataset['sentences_in_all']}; name those with --sentences_dir."
        )
    out_dir = Path(config.captured_data_output_dir or Path(config.model_path).parent)
    named = lambda suffix: out_dir / beside(config.model_path, suffix).name

    with world() as w, stage.locked(out_dir, w.rank, w.barrier), torch.inference_mode():
        sae.to(w.device)
        identity = {
            "sae": stage.sha256(config.model_path) if Path(config.model_path).is_file() else str(config.model_path),
            "activations": [r["sha256"] for r in store.records],
            "top_sentences": config.top_sentences,
            "min_tokens": config.min_tokens,
        }
        w.print(
            f"Reading {store.n_tokens:,} activations from {config.data_dir} twice; writing the top "
            f"{config.top_sentences} sentences of {sae.n_latents:,} latents to {named('top.parquet')}."
        )
        mine = list(range(w.rank, len(store.records), w.size))
        partial_path = named(f"top-partial-{w.rank}-of-{w.size}.pt")
        n_mine = sum(store.records[i]["n_tokens"] for i in mine)
        with stage.progress(
            total=2 * n_mine, unit="act", unit_scale=True, desc="top sentences", disable=not w.is_main
        ) as bar:
            found = find_top(store, sae, mine, config, partial_path, identity, bar)
            tables = {name: TopTable(sae.n_latents, config.top_sentences) for name in _AGGREGATIONS}
            for other in w.gather({n: (t.values, t.sentences) for n, t in found.tables.items()}):
                for name, (values, kept) in other.items():
                    latent, rank = (kept >= 0).nonzero(as_tuple=True)
                    tables[name].add(latent, values[latent, rank], kept[latent, rank])
            statistics = w.gather((found.fired, found.total, found.highest))
            fired = sum(s[0] for s in statistics)
            total = sum(s[1] for s in statistics)
            highest = torch.stack([s[2] for s in statistics]).amax(0)

            pairs = []
            for table in tables.values():
                latent, rank = (table.sentences >= 0).nonzero(as_tuple=True)
                pairs.append(table.sentences[latent, rank] * sae.n_latents + latent)
            keys = torch.cat(pairs).unique().numpy()
            examples = []
            for i in mine:
                examples.append(collect_examples(store.shard(i), sae, keys, config.encode_tokens))
                bar.update(store.records[i]["n_tokens"])
            examples = [e for part in w.gather(examples) for e in part if e is not None]

        if w.is_main:
            if not examples:
                raise stage.InputError(f"No latent of {config.model_path} fires on {config.data_dir}; train it longer.")
            texts = {int(s): sentences[int(s)] for e in examples for s in e.sentences}
            with stage.atomic_path(named("top.parquet")) as temporary:
                table = top_table(tables, examples, texts, sae.n_latents)
                pq.write_table(table, temporary, compression="zstd", row_group_size=2**16)
            latents = {
                "latent": pa.array(np.arange(sae.n_latents), pa.int32()),
                "frequency": pa.array((fired / store.n_tokens).numpy(), pa.float32()),
                "mean": pa.array((total / fired.clamp(min=1)).numpy(), pa.float32()),
                "max": pa.array(highest.numpy(), pa.float32()),
            }
            with stage.atomic_path(named("latents.parquet")) as temporary:
                pq.write_table(pa.table(latents), temporary, compression="zstd")
            living = fired > 0
            full = {name: (t.sentences >= 0).all(1)[living].float().mean() for name, t in tables.items()}
            print(
                f"{int(living.sum()):,} of {sae.n_latents:,} latents fire; with all {config.top_sentences} sentences: "
                + ", ".join(f"{share:.0%} by {name}" for name, share in full.items())
                + f": {named('top.parquet')}"
            )
        w.barrier()
        if w.is_main:
            for path in out_dir.glob(named("top-partial-*").name):
                path.unlink()


if __name__ == "__main__":
    stage.run(main)

"""Capture Llama 3 activations of every token of every sentence.

Reads   MODEL_DIR (a Llama checkpoint folder), SENTENCES_DIR (openwebtext_sentences_dataset.py, or the published one)
Writes  OUTPUT_DIR/<site>/acts-*.safetensors, manifest.json: one folder per site, format in activation_store.py
Method  each sentence alone, without begin-of-text; the model stops at the deepest site: no cache, no output layer;
        sentences of similar length share a batch, so that little is padding
Cost    2 bytes x d_model a token and site on disk; rates in the README's table

    python capture_activations.py --model_dir llama_3.2-3B --output_dir data/activations
    torchrun --standalone --nproc_per_node=4 capture_activations.py --model_dir llama_3.2-3B
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import stage

MODEL_DIR: str  # Llama folder, in Meta's or Hugging Face's format
SENTENCES_DIR = "data/sentences"  # folder of sentences
OUTPUT_DIR = "data/activations"  # folder for one folder per site
NUM_SAMPLES = 25_000_000  # sentences to capture, from the first of the seeded order; 0 for all
SITES = ("layers.22.attention_norm",)  # where to capture; several share one pass
MAX_TOKENS = 192  # longer sentences are cut here
BEGIN_OF_TEXT = False  # put begin-of-text before each sentence (its own activation is never stored)
DTYPE = "bfloat16"  # of the computation: bfloat16 or float32; what is stored is bfloat16
BATCH_TOKENS = 16_384  # tokens a forward pass, padding included
WINDOW_SENTENCES = 16_384  # sentences sorted by length together: more means less padding, and more memory
SHARD_GB = 1.0  # size of a shard
ROPE_SCALING_FACTOR: float | None = None  # overrides the checkpoint's; 8 repeats the published activations
SEED = 42  # of the sentence order; 42 is the published one

_STAGE = "capture_activations.py"


class Window(NamedTuple):
    """A run of consecutive sentences, tokenised: the unit of work and of continuing."""

    sentence_idx: list[int]  # of the sentences that have tokens
    token_ids: list[list[int]]  # without begin-of-text
    n_empty: int
    n_cut: int


def read_window(sentences, tokenizer, start: int, end: int, max_tokens: int) -> Window:
    sentence_idx, token_ids, n_empty, n_cut = [], [], 0, 0
    for i in range(start, end):
        ids = tokenizer.encode(sentences[i])
        if not ids:
            n_empty += 1
            continue
        n_cut += len(ids) > max_tokens
        sentence_idx.append(i)
        token_ids.append(ids[:max_tokens])
    return Window(sentence_idx, token_ids, n_empty, n_cut)


def make_batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that each batch, padded to its longest, has at most `batch_tokens`; longest first."""
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def capture_window(model, window: Window, sites: list[str], batch_tokens: int, bos_id: int | None):
    """{site: (n_tokens, d_model) bfloat16}, sentences in the window's order. Raises InputError for NaN or infinity."""
    import torch

    skip = 0 if bos_id is None else 1
    lengths = [len(ids) for ids in window.token_ids]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    acts = {site: torch.empty(int(offsets[-1]), model.args.dim, dtype=torch.bfloat16) for site in sites}
    for batch in make_batches([n + skip for n in lengths], batch_tokens):
        longest = lengths[batch[0]] + skip
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            tokens[row, skip : skip + lengths[i]] = torch.tensor(window.token_ids[i])
            if skip:
                tokens[row, 0] = bos_id
        real = torch.arange(longest)[None] < torch.tensor([lengths[i] + skip for i in batch])[:, None]
        real[:, :skip] = False
        rows = torch.cat([torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in batch])
        for site, x in model.activations(tokens.to(model.device), sites).items():
            x = x.to(torch.bfloat16).cpu()[real]  # (n_tokens of the batch, d_model), row by row
            if not torch.isfinite(x).all():
                bad = int(rows[(~torch.isfinite(x)).any(1).nonzero()[0, 0]])
                i = int(torch.searchsorted(offsets, bad, right=True)) - 1
                raise stage.InputError(
                    f"The model gives NaN or infinity at {site} for sentence {window.sentence_idx[i]}, token "
                    f"{bad - int(offsets[i])}; check the checkpoint, or use --dtype float32."
                )
            acts[site][rows] = x
    return acts


def write_window(folder: Path, number: int, window: Window, acts, shard_bytes: int) -> None:
    """Write one site's shards of a window, then a note of them; the note makes the window count as done."""
    import torch

    from activation_store import write_shard

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
        path = folder / f"acts-{number:05d}-{len(records):02d}.safetensors"
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
                "sha256": stage.sha256(path),
                "first_sentence_idx": window.sentence_idx[first],
                "n_sentences": last - first,
                "n_tokens": n_tokens,
            }
        )
        first = last
    note = {"shards": records, "n_empty": window.n_empty, "n_cut": window.n_cut}
    stage.write_json(window_note(folder, number), note)


def window_note(folder: Path, number: int) -> Path:
    return folder / f"window-{number:05d}.json"


def main() -> None:
    config = stage.parse_constants(globals())
    if config.dtype not in ("bfloat16", "float32"):
        raise stage.InputError(f"--dtype {config.dtype} is unknown; write bfloat16 or float32.")
    import torch

    from distributed import world
    from llama_3 import load_model, load_tokenizer
    from llama_3.loading import checkpoint_identity, read_params
    from llama_3.model import check_site
    from openwebtext_sentences_dataset import SentenceDataset

    args = read_params(config.model_dir, config.rope_scaling_factor)
    sites = list(dict.fromkeys(config.sites))
    try:
        layers = {site: check_site(site, args.n_layers) for site in sites}
    except ValueError as error:
        raise stage.InputError(f"--sites: {error}") from None
    tokenizer = load_tokenizer(config.model_dir)
    sentences = SentenceDataset(config.sentences_dir, config.num_samples, config.seed)
    n_windows = -(-len(sentences) // config.window_sentences)
    output_dir = Path(config.output_dir)

    model = load_model(config.model_dir, "cpu", getattr(torch, config.dtype), config.rope_scaling_factor)

    with world() as w, stage.locked(output_dir, w.rank, w.barrier), torch.inference_mode():
        model.to(w.device)
        about_dataset = {
            "sentences": len(sentences),
            "sentences_in_all": len(sentences.order),
            "seed": config.seed,
            "shards": [s["sha256"] for s in sentences.manifest.get("shards", [])],
        }
        decides = {
            name: getattr(config, name)
            for name in ("max_tokens", "begin_of_text", "dtype", "batch_tokens", "window_sentences", "shard_gb")
        }
        decides |= {"model": checkpoint_identity(config.model_dir), "dataset": about_dataset}
        decides["rope_scaling_factor"] = args.rope_scaling_factor
        open_sites: list[str] = []
        if w.is_main:
            for site in sites:
                if not stage.begin_or_continue(output_dir / site, _STAGE, {**decides, "site": site}):
                    open_sites.append(site)
                stage.remove_leftovers(output_dir / site)
        sites = w.gather(open_sites)[0]
        if not sites:
            w.print(f"{output_dir} is complete already.")
            return

        # A sample tells how much there is to do.
        step = max(1, len(sentences) // 1000)
        sample = read_window(
            [sentences[i] for i in range(0, len(sentences), step)],
            tokenizer,
            0,
            len(range(0, len(sentences), step)),
            config.max_tokens,
        )
        sample = sample._replace(sentence_idx=[i * step for i in sample.sentence_idx])
        n_tokens_about = sum(map(len, sample.token_ids)) * step
        n_bytes = n_tokens_about * 2 * args.dim * len(sites)
        if w.is_main:
            stage.require_disk(output_dir, n_bytes)
        bos_id = tokenizer.bos_id if config.begin_of_text else None
        few = Window(sample.sentence_idx[:64], sample.token_ids[:64], 0, 0)
        for _ in range(2):  # the first warms up
            started = time.time()
            capture_window(model, few, sites, config.batch_tokens, bos_id)
        rate = sum(map(len, few.token_ids)) / (time.time() - started) * w.size
        w.print(
            f"Reading {len(sentences):,} sentences, about {n_tokens_about:,} tokens, from {config.sentences_dir}; "
            f"writing about {stage.gb(n_bytes)} to {output_dir}; about "
            f"{stage.duration(n_tokens_about / max(rate, 1))} on {w.size} x {w.device.type}."
        )

        mine = range(w.rank, n_windows, w.size)
        bounds = lambda i: (i * config.window_sentences, min((i + 1) * config.window_sentences, len(sentences)))
        todo = [i for i in mine if not all(window_note(output_dir / s, i).exists() for s in sites)]
        n_mine = sum(bounds(i)[1] - bounds(i)[0] for i in mine)
        n_done = n_mine - sum(bounds(i)[1] - bounds(i)[0] for i in todo)
        read = lambda i: read_window(sentences, tokenizer, *bounds(i), config.max_tokens)
        started, n_tokens, n_written = time.time(), 0, 0
        label = "capture" if w.size == 1 else f"capture, process 1 of {w.size}"
        with (
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as writer,
            stage.progress(total=n_mine, initial=n_done, unit="sentence", desc=label, disable=not w.is_main) as bar,
        ):
            ahead = reader.submit(read, todo[0]) if todo else None
            writing: list = []
            for position, i in enumerate(todo):
                window = ahead.result()
                if position + 1 < len(todo):
                    ahead = reader.submit(read, todo[position + 1])
                acts = capture_window(model, window, sites, config.batch_tokens, bos_id)
                for job in writing:  # at most one window waits to be written while the next is computed
                    job.result()
                writing = [
                    writer.submit(write_window, output_dir / s, i, window, acts[s], int(config.shard_gb * 1e9))
                    for s in sites
                ]
                n_tokens += sum(map(len, window.token_ids))
                n_written = n_tokens * 2 * args.dim * len(sites)
                bar.update(bounds(i)[1] - bounds(i)[0])
                bar.set_postfix_str(
                    f"{n_tokens / (time.time() - started):,.0f} tokens/s, {stage.gb(n_written)}", refresh=False
                )
            for job in writing:
                job.result()

        w.barrier()
        if w.is_main:
            for site in sites:
                folder = output_dir / site
                notes = [stage.read_json(window_note(folder, i), "run this stage again.") for i in range(n_windows)]
                shards = [record for note in notes for record in note["shards"]]
                counts = {
                    "sentences": sum(s["n_sentences"] for s in shards),
                    "tokens": sum(s["n_tokens"] for s in shards),
                    "empty_sentences": sum(note["n_empty"] for note in notes),
                    "cut_sentences": sum(note["n_cut"] for note in notes),
                }
                stage.write_manifest(
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
                for i in range(n_windows):
                    window_note(folder, i).unlink()
                print(f"{counts['tokens']:,} activations of {counts['sentences']:,} sentences: {folder}")


if __name__ == "__main__":
    stage.run(main)

"""Capture: tokens/s, bytes and files of capture_activations.py against two other ways, in one run.

Reads   the embedded tiny Llama, and the documentation on this machine (made into sentences once), or INPUT_PATH
Writes  DATA_DIR; prints two rows of a markdown table per model
Method  three ways over the same sentences and weights, to the same site:
        ours: what the script does with a window: tokenise in threads, batches of similar length, stop at the site,
        write shards with checksums, synced to the disk;
        the original's way, from its description, with this project's Llama: random batches of 32 padded to the
        longest, the whole forward with key/value cache and output layer, one file per sentence, not synced;
        transformers: LlamaForCausalLM hooked at the same place, the same random batches, no cache, nothing written.
        All include tokenising. One of each in turn, REPEATS times; medians. The second model has random weights of
        Llama 3.2's SHAPE with every width divided by SHRINK, or is a real one, MODEL_DIR, captured at half of its
        depth. Run it alone on the machine
Cost    8 minutes on two cores, and half a minute more the first time

    python benchmarks/capture.py
    python benchmarks/capture.py --model_dir models/smollm2-135M-Instruct-Q4_1
    python benchmarks/capture.py --input_path real_text.parquet
    python benchmarks/capture.py --shape 3B --shrink 1 --dtypes bfloat16 --num_samples_larger 20000   # on a GPU
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from common import machine, median_rates, run_script, spread, timed

from pipeline.options import Count, CountOrZero, parse_constants
from pipeline.run import run

DATA_DIR = "data/benchmark_capture"  # folder for documents, sentences, models and activations
INPUT_PATH: str | None = None  # documents to use instead, as openwebtext_sentences_dataset.py reads them
MODEL_DIR: str | None = None  # a real model in place of the larger one with random weights
NUM_SAMPLES: Count = 1000  # sentences for the tiny Llama
NUM_SAMPLES_LARGER: Count = 200  # sentences for the larger model
SHAPE: Literal["1B", "3B"] = "1B"  # of the larger model: Llama 3.2 1B's or 3B's
SHRINK: Count = 4  # what its widths are divided by; 1 is the real shape, for a GPU
BATCH_TOKENS: CountOrZero = 0  # tokens per batch of ours; 0: 1024 on a CPU, the script's default on a GPU
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")  # of the computation
REPEATS: Count = 5  # runs of each way

_ORIGINAL_BATCH = 32  # sentences
_MAX_TOKENS = 192
# Llama 3.2's shapes (https://github.com/meta-llama/llama-models) and a site at the published share of the depth. The
# vocabulary is the embedded tokenizer's: the output layer's share of the work is smaller than in the real model, which
# favours the other ways.
_COMMON = {"multiple_of": 64, "norm_eps": 1e-5, "rope_theta": 500000.0}
_SHAPES = {
    "1B": ({"dim": 2048, "n_heads": 32, "n_kv_heads": 8}, {"n_layers": 16, "ffn_dim_multiplier": 1.5}, 12),
    "3B": ({"dim": 3072, "n_heads": 24, "n_kv_heads": 8}, {"n_layers": 28, "ffn_dim_multiplier": 1.0}, 22),
}

_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # dense, from NVIDIA's data sheets

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import numpy as np
import torch
from torch import Tensor

from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.loading import HF_NAMES, read_params
from llama_3.model import ModelArgs, Transformer
from llama_3.padding import make_batches
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.files import atomic_path, write_json
from pipeline.progress import gb, progress_bar
from pipeline.sentences import SentenceDataset
from pipeline.workers import ahead

_TINY_DIR = Path(TINY_LLAMA_DIR)

# ---- what is captured


def make_sentences(folder: Path, input_path: str | None) -> Path:
    """Make documents and sentences with the scripts themselves, unless they are there."""
    name = Path(input_path).stem if input_path else "documentation"
    documents = Path(input_path).resolve() if input_path else folder / "documents"
    if not input_path:
        run_script("embedded/corpus.py", output_dir=documents, max_mb=6)
    punkt = {"punkt": "corpus", "punkt_train_mb": 1}
    run_script("openwebtext_sentences_dataset.py", input_path=documents, output_dir=folder / name, **punkt)
    return folder / name


def make_larger_model(folder: Path, shape: str, shrink: int) -> Path:
    """Write a checkpoint in Meta's format with random weights and the embedded tokenizer, unless it is there."""
    if (folder / "consolidated.00.pth").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = json.loads((_TINY_DIR / "params.json").read_text(encoding="utf-8"))["vocab_size"]
    widths, depth, _ = _SHAPES[shape]
    params = _COMMON | depth | {name: width // shrink for name, width in widths.items()} | {"vocab_size": vocab_size}
    write_json(folder / "params.json", params)
    shutil.copy(_TINY_DIR / "tokenizer.model", folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(read_params(str(folder))).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, size in shapes.items():
        weight = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) / size[-1] ** 0.5
        state[name] = weight.to(torch.bfloat16)
    with atomic_path(folder / "consolidated.00.pth") as temporary:
        torch.save(state, temporary)
    return folder


def as_transformers(model_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The same weights in transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = load_model(str(model_dir), "cpu", dtype)
    args = model.args
    config = LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=False,
    )
    state, ours = {}, model.state_dict()
    peer = LlamaForCausalLM(config).to(dtype)
    for name in peer.state_dict():
        short = name.removeprefix("model.").removesuffix(".weight")
        if short.startswith("layers."):
            _, layer, rest = short.split(".", 2)
            tensor = ours[f"layers.{layer}.{HF_NAMES[rest]}.weight"]
        else:
            tensor = ours[f"{HF_NAMES[short]}.weight"]
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # Meta rotates neighbours, Hugging Face halves
            tensor = tensor.unflatten(0, (-1, args.head_dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)
        state[name] = tensor
    peer.load_state_dict(state, strict=True)
    return peer.requires_grad_(False).eval().to(device)


# ---- the three ways


def padded(token_ids: list[list[int]], device: torch.device) -> Tensor:
    tokens = torch.zeros(len(token_ids), max(map(len, token_ids)), dtype=torch.long)
    for row, ids in enumerate(token_ids):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens.to(device)


def random_batches(sentences: SentenceDataset, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """The sentences' tokens, 32 at a time, in the seeded (random) order."""
    for start in range(0, len(sentences), _ORIGINAL_BATCH):
        texts = [sentences[i] for i in range(start, min(start + _ORIGINAL_BATCH, len(sentences)))]
        yield [ids for ids in (tokenizer.encode(text)[:_MAX_TOKENS] for text in texts) if ids]


def original(model: Transformer, tokenizer: Tokenizer, sentences: SentenceDataset, site: str, folder: Path) -> None:
    captured: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        captured.append(x)
        return x

    n = 0
    for batch in random_batches(sentences, tokenizer):
        captured.clear()
        tokens = padded(batch, model.device)
        with model.intervene(site, record):
            model(tokens, cache=model.new_cache(*tokens.shape))
        x = captured[0].to(torch.bfloat16).cpu()
        for row, ids in enumerate(batch):
            torch.save(x[row, : len(ids)].clone(), folder / f"{n:06d}.pt")
            n += 1


def hooked_transformers(peer: Any, tokenizer: Tokenizer, sentences: SentenceDataset, layer: int) -> int:
    """Returns the number of activations."""
    captured: list[Tensor] = []
    hook = peer.model.layers[layer].input_layernorm.register_forward_hook(lambda m, args, out: captured.append(out))
    n = 0
    for batch in random_batches(sentences, tokenizer):
        captured.clear()
        tokens = padded(batch, peer.device)
        mask = torch.arange(tokens.shape[1])[None] < torch.tensor([len(ids) for ids in batch])[:, None]
        peer(tokens, attention_mask=mask.to(tokens.device), use_cache=False)
        x = captured[0].to(torch.bfloat16).cpu()
        n += sum(len(x[row, : len(ids)]) for row, ids in enumerate(batch))
    hook.remove()
    return n


def ours(
    batch_tokens: int, site: str, sentences: SentenceDataset, tokenizer: Tokenizer
) -> Callable[[Transformer, Path], None]:
    """capture_activations.py's own loop, with its own sizes. batch_tokens: 0 for the script's default."""
    # A script's function is imported because that loop is what is timed; otherwise this would time a copy.
    import capture_activations as stage

    size = stage.window_size(len(sentences), stage.WINDOW_SENTENCES)
    windows = stage.Windows(sentences, tokenizer, size, _MAX_TOKENS)
    shard_bytes = int(stage.SHARD_GB * 1e9)

    def capture(model: Transformer, folder: Path) -> None:
        capturer = stage.Capturer(model, [site], batch_tokens or stage.BATCH_TOKENS, None)
        read = ahead(windows.read, range(windows.n_windows), stage._READERS)
        with progress_bar(total=len(sentences), disable=True) as bar:
            stage.capture_windows(capturer, read, folder, shard_bytes, bar)

    return capture


def check_same(model: Transformer, peer: Any, tokenizer: Tokenizer, sentences: SentenceDataset, layer: int) -> None:
    """Check that both models compute the same; otherwise the comparison is worthless."""
    captured: list[Tensor] = []
    hook = peer.model.layers[layer].input_layernorm.register_forward_hook(lambda m, args, out: captured.append(out))
    tokens = torch.tensor([next(ids for ids in map(tokenizer.encode, sentences) if len(ids) > 8)], device=model.device)
    peer(tokens)
    hook.remove()
    ours = model.activations(tokens, f"layers.{layer}.attention_norm")
    error = (ours - captured[0]).float().norm() / ours.float().norm()
    if not error < (1e-4 if model.dtype == torch.float32 else 0.05):
        raise InputError(f"transformers' activations differ by {error:.2g} of their norm; fix the benchmark.")


# ---- measures


class StandIn(NamedTuple):
    """In a model's place, to time the CPU's own work around a GPU: its activations are there at once."""

    acts: Tensor  # (n_tokens, d_model)

    @property
    def args(self) -> Any:
        return SimpleNamespace(dim=self.acts.shape[1])

    @property
    def device(self) -> torch.device:
        return self.acts.device

    def activations(self, tokens: Tensor, sites: list[str]) -> dict[str, Tensor]:
        return {site: self.acts[: tokens.numel()].view(*tokens.shape, -1) for site in sites}


def host_work(sentences: SentenceDataset, tokenizer: Tokenizer) -> tuple[float, float]:
    """ms a batch in which a GPU would wait for the CPU, at the script's own sizes: to build it, and to copy its rows
    of Llama 3.2 3B's width to the window's activations."""
    import capture_activations as stage

    window = stage.Windows(sentences, tokenizer, stage.WINDOW_SENTENCES, _MAX_TOKENS).read(0)

    def capturer(d_model: int) -> Any:
        acts = torch.zeros(stage.BATCH_TOKENS, d_model, dtype=torch.bfloat16)
        return stage.Capturer(StandIn(acts), ["site"], stage.BATCH_TOKENS, None)

    building, _ = timed(lambda: sum(1 for _ in capturer(1).batches(window)))  # width 1: a GPU picks rows itself
    d_model = _SHAPES["3B"][0]["dim"]
    copying, n_batches = 0.0, 0
    filled = {"site": torch.zeros(window.n_tokens, d_model, dtype=torch.bfloat16)}
    as_wide = capturer(d_model)
    for batch in as_wide.batches(window):
        copying += timed(as_wide.collect, batch, window, filled)[0]
        n_batches += 1
    return 1e3 * building / n_batches, 1e3 * copying / n_batches


def disk_of(folder: Path) -> tuple[int, int]:
    """Bytes and files. Ours include a note per window, which a real run moves into the manifest."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files), len(files)


def padding(
    sentences: SentenceDataset, tokenizer: Tokenizer, n_sentences: int, batch_tokens: int
) -> tuple[float, float]:
    """Padding over real tokens: of ours in one window, and of random batches of 32."""
    texts = (sentences[i] for i in range(min(n_sentences, len(sentences))))
    lengths = [len(ids) for ids in (tokenizer.encode(text)[:_MAX_TOKENS] for text in texts) if ids]
    share = lambda batches: sum(len(b) * max(lengths[i] for i in b) for b in batches) / sum(lengths) - 1
    in_order = list(range(len(lengths)))
    random = [in_order[i : i + _ORIGINAL_BATCH] for i in range(0, len(lengths), _ORIGINAL_BATCH)]
    return share(make_batches(lengths, batch_tokens)), share(random)


def flops_per_token(args: ModelArgs, layer: int) -> float:
    """For the weight products up to attention_norm of `layer`; attention itself adds under 1 % at 27 tokens."""
    attention = args.dim * args.head_dim * (2 * args.n_heads + 2 * args.n_kv_heads)
    return 2.0 * layer * (attention + 3 * args.dim * args.hidden_dim)


def share_of_peak(args: ModelArgs, layer: int, tokens_per_s: float) -> str:
    """What share of a known GPU's FLOPs that is; empty for an unknown GPU."""
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)
    return f", {flops_per_token(args, layer) * tokens_per_s / peak:.0%} of {name}'s FLOPs" if peak else ""


class Case(NamedTuple):
    """A model whose activations are captured."""

    title: str
    model_dir: Path
    layer: int
    num_samples: int


def compare(
    case: Case, sentences: SentenceDataset, dtype_name: str, batch_tokens: int, repeats: int, folder: Path
) -> str:
    """A row of the table."""
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), getattr(torch, dtype_name)
    model_dir, site = str(case.model_dir), f"layers.{case.layer}.attention_norm"
    tokenizer = load_tokenizer(model_dir)
    plain = load_model(model_dir, "cpu", dtype).to(device)
    packed = load_model(model_dir, "cpu", dtype, packed=not on_gpu).to(device)
    peer = as_transformers(case.model_dir, dtype, device)
    check_same(packed, peer, tokenizer, sentences, case.layer)
    capture = ours(batch_tokens or (0 if on_gpu else 1024), site, sentences, tokenizer)
    ways: dict[str, Callable[[Path], Any]] = {
        "ours": lambda out: capture(packed, out),
        "original": lambda out: original(plain, tokenizer, sentences, site, out / site),
        "transformers": lambda out: hooked_transformers(peer, tokenizer, sentences, case.layer),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    n_tokens = 0
    for number in progress_bar(range(-1, repeats), unit="round", desc=f"{case.title}, {dtype_name}"):
        for way, run_way in ways.items():
            out = folder / way
            shutil.rmtree(out, ignore_errors=True)
            (out / site).mkdir(parents=True)
            took, found = timed(run_way, out)
            n_tokens = found or n_tokens  # transformers' way counts them
            if number >= 0:  # the first round warms up
                seconds[way].append(took)
    rates = median_rates(n_tokens, seconds)
    disk = {way: [x / n_tokens * 1e6 for x in disk_of(folder / way)] for way in ("ours", "original")}
    flops = share_of_peak(plain.args, case.layer, rates["ours"]) if on_gpu and dtype_name == "bfloat16" else ""
    return (
        f"| {case.title}, {site}, {dtype_name} "
        f"| {rates['ours']:,.0f} | {rates['original']:,.0f} | {rates['transformers']:,.0f} "
        f"| {rates['ours'] / rates['original']:.1f} x, {rates['ours'] / rates['transformers']:.1f} x "
        f"| {gb(disk['ours'][0])} in {disk['ours'][1]:,.0f} | {gb(disk['original'][0])} in "
        f"{disk['original'][1]:,.0f} | {len(sentences):,} sentences, {n_tokens:,} tokens, slowest / fastest run "
        f"{spread(seconds):.2f}{flops} |"
    )


def main() -> None:
    config = parse_constants(globals())
    folder = Path(config.data_dir).resolve()
    sentences_dir = make_sentences(folder, config.input_path)
    if config.model_dir:
        larger = Path(config.model_dir)
        title, layer = larger.name, read_params(str(larger)).n_layers // 2
    else:
        larger = folder / f"llama_3.2-{config.shape}_widths_over_{config.shrink}"
        make_larger_model(larger, config.shape, config.shrink)
        title, layer = f"Llama 3.2 {config.shape}'s shape, widths / {config.shrink}, random", _SHAPES[config.shape][2]
    cases = [
        Case("tiny Llama", _TINY_DIR, 6, config.num_samples),
        Case(title, larger, layer, config.num_samples_larger),
    ]
    print(f"{machine()}, {torch.get_num_threads()} threads", flush=True)
    print(
        "| model, site, dtype | ours, tokens/s | original's way | transformers | ours / original, / transformers "
        "| ours: bytes in files per million tokens | original | |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for case in cases:
            sentences = SentenceDataset(sentences_dir, case.num_samples)
            for dtype in config.dtypes:
                row = compare(case, sentences, dtype, config.batch_tokens, config.repeats, folder)
                print(row, flush=True)
    tokenizer, sentences = load_tokenizer(str(_TINY_DIR)), SentenceDataset(sentences_dir)
    for batch_tokens in (1024, 4096, 16384):
        by_length, random = padding(sentences, tokenizer, 16_384, batch_tokens)
        print(
            f"Padding over real tokens in a window of 16,384 sentences, batches of {batch_tokens}: {by_length:.1%}; in "
            f"random batches of {_ORIGINAL_BATCH}: {random:.0%}."
        )
    building, copying = np.median([host_work(sentences, tokenizer) for _ in range(config.repeats)], axis=0)
    print(
        f"The CPU's own work for a batch of the 3B's width, beside a GPU: {building:.1f} ms to build it, "
        f"{copying:.1f} ms to copy its rows."
    )


if __name__ == "__main__":
    run(main)

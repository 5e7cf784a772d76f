"""Attribution graphs against circuit-tracer: the same edges and influences, and the time and memory of both.

Reads   MODEL_DIR; the transcoders of SUITE_DIR, or without it random ones
Writes  two markdown tables to the terminal
Method  both build the whole graph of the likeliest next token from the same weights in float32: circuit-tracer's
        TransformerLensReplacementModel has our weights, and its TranscoderSet our transcoders. Each graph is built
        ROUNDS times, every time in a process of its own, the two programs taking turns; memory is the peak beyond what
        model and transcoders take. CPU seconds are of all threads: with other work on the machine, only they mean
        something. Edges are compared into the latents from which the answer can be reached: we leave out the others,
        circuit-tracer does not. Influence is that of Ameisen et al. 2025, by each program's own function
Cost    a minute for the tiny Llama; needs the environment of benchmarks/requirements-circuit-tracer.txt

    data/circuit-tracer/bin/python benchmarks/circuits.py
    data/circuit-tracer/bin/python benchmarks/circuits.py --model_dir models/smollm2-135M-Instruct-Q4_1 \
        --suite_dir data/suite --prompt "The capital of France is"
"""

from common import (
    load_into_transformer_lens,
    machine,
    resident,
    timed,
    transformer_lens_config,
    transformer_lens_state,
)

from pipeline.options import Count, Positive, Seed, parse_constants
from pipeline.run import run

MODEL_DIR = "llama_3/tiny_llama"  # the model
SUITE_DIR: str | None = None  # folder with a folder per transcoder, of every MLP; random ones when not given
PROMPT = "The function returns a list of the names of"  # the prompt
ROUNDS: Count = 3  # graphs that each program builds; medians are printed
N_LATENTS: Count = 1024  # of each random transcoder
K: Count = 16  # of them fire on a token
SEED: Seed = 0  # of random transcoders
LEAST_CORRELATION: Positive = 0.95  # rank correlation of edges and of influence: less fails

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import contextlib
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.graph import Answer, Graph
from circuits.pruning import influences
from circuits.replacement import attribute
from circuits.suite import find_suite
from llama_3 import load_model, load_tokenizer
from llama_3.model import Transformer
from microscope.prompts import Prompt
from pipeline.errors import Stop
from pipeline.files import PROJECT_DIR
from sae import Kind, SparseAutoencoder, load_sae_model

_FIRST = 1  # the first position with latents and errors: after begin-of-text, as circuit-tracer always has it
Key = tuple[str, int, int, int]  # kind, layer, position, latent or token


class Built(NamedTuple):
    """A graph in one order of nodes, and what it took."""

    keys: list[Key]
    edges: Tensor  # (n, n) from columns into rows
    known: Tensor  # (n,) bool: rows that were computed
    influence: Tensor  # (n,)
    activations: Tensor  # (n,) of latents
    seconds: float
    cpu_seconds: float  # of all its threads
    memory: int  # bytes


# ---- what both are given


def random_transcoders(model: Transformer, n_latents: int, k: int, seed: int) -> list[SparseAutoencoder]:
    """One for each MLP, with directions as long as the mean output is over sqrt(k) latents."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(model.args.n_layers):
        kind = Kind(normalization="none", centred=False, target_site=f"layers.{layer}.mlp_out")
        sae = SparseAutoencoder(model.args.dim, n_latents, k, kind=kind).requires_grad_(False)
        sae.initialize(torch.zeros(model.args.dim), generator)
        sae.encoder.weight.copy_(F.normalize(torch.randn(sae.encoder.weight.shape, generator=generator), dim=1))
        sae.encoder.bias.copy_(0.1 * torch.randn(n_latents, generator=generator))
        sae.b_pre.copy_(0.1 * torch.randn(model.args.dim, generator=generator))
        found.append(sae)
    return found


def suite_transcoders(model: Transformer, folder: str) -> list[SparseAutoencoder]:
    paths = find_suite(folder).transcoders
    if missing := set(range(model.args.n_layers)) - paths.keys():
        raise Stop(
            f"circuit-tracer needs a transcoder of every MLP, and {folder} has none of layers {sorted(missing)}."
        )
    return [load_sae_model(path) for path in paths.values()]


def ours(model: Transformer, prompt: Prompt, saes: list[SparseAutoencoder]) -> Callable[[], Any]:
    """Builds the graph when called."""
    with torch.inference_mode():
        answer = Answer(int(model(prompt.batch(model))[0, -1].argmax()), None)
    return lambda: attribute(model, prompt, answer, enumerate(saes), _FIRST)


def ours_in_one_order(graph: Graph) -> Built:
    names = [(node.kind, node.layer, node.position, max(0, node.index)) for node in graph.nodes]
    n = len(names)
    edges = torch.zeros(n, n)
    edges[graph.targets] = graph.edges
    known = torch.zeros(n, dtype=torch.bool)
    known[graph.targets] = True
    activations = torch.tensor([node.activation for node in graph.nodes])
    return Built(names, edges, known, influences(graph.edges, graph.targets), activations, 0.0, 0.0, 0)


# ---- circuit-tracer


def transcoder_set(saes: list[SparseAutoencoder]) -> Any:
    """Ours in its classes. A bias subtracted before the encoder and constant scales are folded into its weights."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    class OfNormalised(SingleLayerTranscoder):
        """Reads activations normalised one by one, as circuit-tracer's own classes cannot; the std is held."""

        def encode_sparse(self, input_acts: Tensor, zero_positions: slice = slice(0, 1)) -> tuple[Tensor, Tensor]:
            z, _, std = saes[self.layer_idx].normalize(input_acts)
            sparse, encoders = super().encode_sparse(z, zero_positions)
            divisor = std + saes[self.layer_idx].normalize_eps
            return sparse, (encoders - encoders.mean(1, keepdim=True)) / divisor[sparse.indices()[0]]

    def gate(sae: SparseAutoencoder) -> torch.nn.Module:
        if sae.threshold is not None:
            return JumpReLU(sae.threshold.clone())
        return torch.nn.Sequential(TopK(sae.k), torch.nn.ReLU()) if sae.kind.gate == "topk" else torch.nn.ReLU()

    found = {}
    for layer, sae in enumerate(saes):
        kind = sae.kind
        if kind.skip and kind.normalization == "layer_norm":
            raise Stop("A skip transcoder of normalised activations cannot be put into circuit-tracer's classes.")
        cls = OfNormalised if kind.normalization == "layer_norm" else SingleLayerTranscoder
        theirs = cls(sae.d_model, sae.n_latents, gate(sae), layer, kind.skip, dtype=torch.float32)
        encoder = sae.encoder.weight
        state = {
            "W_enc": kind.scale * encoder,
            "b_enc": sae.encoder.bias - (encoder @ sae.b_pre if kind.centred else 0),
            "W_dec": sae.decoder.weight.T / kind.target_scale,
            "b_dec": sae.b_pre / kind.target_scale,
        }
        if sae.skip is not None:
            state["W_skip"] = kind.scale / kind.target_scale * sae.skip
        theirs.load_state_dict(state, strict=False)
        found[layer] = theirs
    return TranscoderSet(found, "mlp.hook_in", "mlp.hook_out")


def theirs(model: Transformer, prompt: Prompt, saes: list[SparseAutoencoder]) -> Callable[[], Any]:
    """Builds the graph when called."""
    from circuit_tracer import attribute
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel

    replacement = TransformerLensReplacementModel.from_config(transformer_lens_config(model), transcoder_set(saes))
    renamed = {".mlp.": ".mlp.old_mlp.", "unembed.": "unembed.old_unembed."}
    state = {}
    for name, tensor in transformer_lens_state(model).items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = tensor
    load_into_transformer_lens(replacement, state)
    replacement.eval().requires_grad_(False)
    # All that is asked of a tokenizer. Without a special token at the beginning it would put one there.
    replacement.tokenizer = SimpleNamespace(
        all_special_ids=prompt.ids[:1], padding_side="right", decode=str, vocab_size=model.args.vocab_size
    )
    with torch.inference_mode():
        likeliest = model(prompt.batch(model))[0, -1].argmax()[None]
    tokens = torch.tensor(prompt.ids)
    return lambda: attribute(tokens, replacement, attribution_targets=likeliest)


def theirs_in_one_order(graph: Any) -> Built:
    from circuit_tracer.graph import compute_node_influence

    n_layers, n_tokens = graph.cfg.n_layers, graph.n_pos
    keys: list[Key] = [("latent", *map(int, each)) for each in graph.active_features[graph.selected_features]]
    keys += [("error", layer, position, 0) for layer in range(n_layers) for position in range(n_tokens)]
    keys += [("embedding", -1, position, int(token)) for position, token in enumerate(graph.input_tokens)]
    keys += [("logit", n_layers, n_tokens - 1, target.vocab_idx) for target in graph.logit_targets]
    weights = torch.zeros(len(keys))
    weights[-len(graph.logit_targets) :] = 1.0
    influence = compute_node_influence(graph.adjacency_matrix, weights)
    activations = torch.zeros(len(keys))
    activations[: len(graph.selected_features)] = graph.activation_values[graph.selected_features]
    # Its errors on the first token are nodes without edges.
    kept = [i for i, (kind, _, position, _) in enumerate(keys) if kind != "error" or position >= _FIRST]
    keys, edges = [keys[i] for i in kept], graph.adjacency_matrix[kept][:, kept]
    return Built(keys, edges, edges.any(1), influence[kept], activations[kept], 0.0, 0.0, 0)


# ---- both compared

_WAYS = {"ours": (ours, ours_in_one_order), "circuit-tracer": (theirs, theirs_in_one_order)}


def build(way: str, path: str, config: Any) -> None:
    """In a process of its own: a graph, time and memory into the file `path`."""
    prepare, arrange = _WAYS[way]
    model, tokenizer = load_model(config.model_dir), load_tokenizer(config.model_dir)
    if tokenizer.bos_id is None:
        raise Stop(f"{config.model_dir} has no begin-of-text token, which circuit-tracer needs; name another model.")
    ids = tokenizer.encode(config.prompt, bos=True)
    prompt = Prompt(ids, [tokenizer.decode([each]) for each in ids])
    if config.suite_dir is None:
        saes = random_transcoders(model, config.n_latents, config.k, config.seed)
    else:
        saes = suite_transcoders(model, config.suite_dir)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make = prepare(model, prompt, saes)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before, cpu = resident("VmRSS"), time.process_time()
        seconds, graph = timed(make)
        took = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "memory": resident("VmHWM") - before}
    torch.save(arrange(graph)._replace(**took)._asdict(), path)


def measured(way: str, config: Any) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/graph.pt"
        process = multiprocessing.get_context("spawn").Process(target=build, args=(way, path, config))
        process.start()
        process.join()
        if process.exitcode:
            raise Stop(f"{way} ended with exit code {process.exitcode}; what it printed is above.")
        return Built(**torch.load(path))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, (n,) each."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def compare(us: Built, them: Built) -> dict[str, float]:
    """Prints a table; returns the rank correlations."""
    place = {key: i for i, key in enumerate(them.keys)}
    if place.keys() != set(us.keys):
        only = [len(set(a.keys) - set(b.keys)) for a, b in ((us, them), (them, us))]
        raise Stop(f"{only[0]} nodes are ours alone and {only[1]} circuit-tracer's: the latents that fire differ.")
    order = torch.tensor([place[key] for key in us.keys])
    their_edges = them.edges[order][:, order]
    some = ((us.edges != 0) | (their_edges != 0)) & us.known[:, None]
    rows = {
        "activations of latents": (us.activations, them.activations[order]),
        "edges": (us.edges[some], their_edges[some]),
        "influence": (us.influence, them.influence[order]),
    }
    print("\n| | values | largest | largest difference | rank correlation | of the 50 strongest |")
    print("|---|---|---|---|---|---|")
    found = {}
    for name, (a, b) in rows.items():
        either = (a != 0) | (b != 0)
        a, b = a[either].abs(), b[either].abs()
        found[name] = rank_correlation(a, b)
        shared = len(set(a.topk(min(50, len(a))).indices.tolist()) & set(b.topk(min(50, len(b))).indices.tolist()))
        sizes = f"{len(a):,} | {b.max():.3g} | {(a - b).abs().max():.1e}"
        print(f"| {name} | {sizes} | {found[name]:.6f} | {shared} |", flush=True)
    return found


def main() -> None:
    config = parse_constants(globals())
    for name in ("model_dir", "suite_dir"):
        if (path := getattr(config, name)) is not None:
            setattr(config, name, str(PROJECT_DIR / path))
    found: dict[str, list[Built]] = {way: [] for way in _WAYS}
    for _ in range(config.rounds):
        for way, graphs in found.items():
            graphs.append(measured(way, config))
    us, them = (graphs[0] for graphs in found.values())
    correlations = compare(us, them)
    n_latents = sum(kind == "latent" for kind, *_ in us.keys)
    print(f"\n| {len(us.keys):,} nodes, {n_latents:,} of them latents; {machine()} | s | CPU s | MB |")
    print("|---|---|---|---|")
    for way, graphs in found.items():
        took, cpu, memory = (median(getattr(g, name) for g in graphs) for name in ("seconds", "cpu_seconds", "memory"))
        print(f"| {way} | {took:.2f} | {cpu:.2f} | {memory / 1e6:.0f} |")
    if not min(correlations.values()) >= config.least_correlation:
        raise Stop(
            f"The lowest rank correlation is {min(correlations.values()):.3f}, below {config.least_correlation}."
        )


if __name__ == "__main__":
    run(main)

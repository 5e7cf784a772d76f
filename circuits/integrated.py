"""The graph of the latents of residual SAEs at a few depths, by integrated gradients.

Marks et al. 2024, "Sparse Feature Circuits", arXiv:2403.19647, section 3. At an SAE's site the activation x is the sum
of its latents' vectors, its offset and its error. With m the logit asked about, x' a baseline and v_s what a node adds
to x less what it adds to x',

    E[s] = v_s . mean over steps k of grad m(x' + (k + 1/2) / n_steps (x - x'))    equation 3; the midpoint rule
    A[t, s] = v_s . grad of t's pre-activation, on the prompt itself, s at one SAE's site and t at the next one's

The baseline is zero latents and zero error, with the prompt's own mean and std, or another prompt of as many tokens.
Everything is live: attention, norms, MLPs. Positions that the SAEs were not trained on stay as they are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.graph import Answer, Graph, Node, Sources, batches, check_edges
from llama_3.model import Transformer
from microscope.prompts import Prompt
from pipeline.progress import progress_bar
from sae import SparseAutoencoder

_TOKENS = 1024  # of the copies of the prompt in a batch
_EMBEDDING = "layers.0.resid_pre"


class _Depth(NamedTuple):
    """An SAE on the prompt."""

    sae: SparseAutoencoder
    sources: Sources  # their vectors: v
    directions: Tensor  # (n_nodes, d_model) what a latent adds to x per activation; 0 of errors
    clean: Tensor  # (seq, d_model) x
    baseline: Tensor  # (seq, d_model) x'

    @property
    def site(self) -> str:
        return self.sae.site


def _parts(sae: SparseAutoencoder, x: Tensor, first: int) -> tuple[dict[tuple[int, int], tuple[float, Tensor]], Tensor]:
    """(position, latent) -> activation and vector (d_model,) of those that fire; and the errors, (seq, d_model)."""
    z, mean, std = sae.normalize(x)
    values, indices = sae.encode_normalized(z)
    errors = x - sae.restore(sae.decode(values, indices), mean, std)
    latents: dict[tuple[int, int], tuple[float, Tensor]] = {}
    for position in range(first, len(x)):
        for value, index in zip(values[position].tolist(), indices[position].tolist(), strict=True):
            if value > 0:
                direction = sae.decoder.weight[:, index].float() * (std[position] + sae.normalize_eps)
                latents[position, index] = value, value * direction
    return latents, errors


def _depth(sae: SparseAutoencoder, x: Tensor, other: Tensor | None, first: int) -> _Depth:
    """x, other: (seq, d_model) at its site, of the prompt and of the baseline's prompt."""
    latents, errors = _parts(sae, x, first)
    if other is None:
        _, mean, std = sae.normalize(x)
        baseline = sae.restore(sae.b_pre.float().expand_as(x), mean, std)
        others: dict[tuple[int, int], tuple[float, Tensor]] = {}
    else:
        baseline = other.clone()
        others, other_errors = _parts(sae, other, first)
        errors = errors - other_errors
    baseline[:first] = x[:first]
    layer, site = int(sae.site.split(".")[1]), sae.site
    nothing = 0.0, x.new_zeros(x.shape[1])
    nodes, vectors, directions = [], [], []
    keys = sorted(latents.keys() | others.keys())
    for position in range(first, len(x)):
        for key in (key for key in keys if key[0] == position):
            activation, vector = latents.get(key, nothing)
            nodes.append(Node("latent", layer, position, key[1], activation, site))
            vectors.append(vector - others.get(key, nothing)[1])
            directions.append(vector / activation if activation else vector)
        nodes.append(Node("error", layer, position, -1, 0.0, site))
        vectors.append(errors[position])
        directions.append(nothing[1])
    return _Depth(sae, Sources(nodes, torch.stack(vectors)), torch.stack(directions), x, baseline)


def _leaf(x: Tensor, kept: dict[str, Tensor], site: str) -> Tensor:
    kept[site] = x.detach().requires_grad_()
    return kept[site]


def _integrated_gradient(model: Transformer, prompt: Prompt, answer: Answer, depth: _Depth, n_steps: int) -> Tensor:
    """(seq, d_model) mean gradient of the logit at the SAE's site, on the way from the baseline to the prompt."""
    total = torch.zeros_like(depth.clean)
    for steps in batches(range(n_steps), max(1, _TOKENS // len(prompt.ids))):
        alphas = (torch.tensor(steps, device=model.device) + 0.5)[:, None, None] / n_steps
        between = depth.baseline + alphas * (depth.clean - depth.baseline)
        kept: dict[str, Tensor] = {}
        with model.intervene(depth.site, lambda x, at=between, kept=kept: _leaf(at.type_as(x), kept, depth.site)):
            logits = model(prompt.batch(model, len(steps)), last_only=True)[:, -1]
        (gradient,) = torch.autograd.grad(answer.logit(logits).sum(), [kept[depth.site]])
        total += gradient.float().sum(0)
    return total / n_steps


def _edges_between(
    model: Transformer, prompt: Prompt, site: str, sources: Sources, depth: _Depth, n_rows: int
) -> Callable[[Sequence[int]], Tensor]:
    """A function: nodes of `depth`, at most n_rows -> (n, n_nodes) edges from sources at `site` into each."""
    kept: dict[str, Tensor] = {}
    with model.intervene(site, lambda x: _leaf(x, kept, site)):
        x = model.activations(prompt.batch(model, n_rows), depth.site)
    encoder = depth.sae.encoder.weight
    z = depth.sae.normalize(x)[0]  # (n_rows, seq, d_model)

    def edges(targets: Sequence[int]) -> Tensor:
        nodes = [depth.sources.nodes[i] for i in targets]
        rows = z[torch.arange(len(nodes)), [node.position for node in nodes]]
        pre_acts = (rows * encoder[[node.index for node in nodes]].float()).sum()
        (gradient,) = torch.autograd.grad(pre_acts, [kept[site]], retain_graph=True)
        return sources.products({site: gradient[: len(nodes)].float()})

    return edges


def attribute(
    model: Transformer,
    prompt: Prompt,
    answer: Answer,
    saes: Sequence[SparseAutoencoder],
    first: int = 0,
    baseline: Prompt | None = None,
    n_steps: int = 10,
    max_latents: int | None = None,
) -> Graph:
    """The graph of the latents of `saes`, of the residual stream, the earliest first.

    first: the first position that they were trained on. baseline: another prompt of as many tokens. max_latents: inputs
    are computed for so many latents, those with the highest effects; the others stay as nodes without inputs.
    The effect of an embedding is that of its edges into latents, each times the latent's effect per activation.
    """
    with torch.no_grad():
        wanted = [_EMBEDDING, *(sae.site for sae in saes if sae.site != _EMBEDDING)]
        acts, other = (
            {site: x[0].float() for site, x in model.activations(each.batch(model), wanted).items()} if each else None
            for each in (prompt, baseline)
        )
        assert acts is not None
        depths = [_depth(sae, acts[sae.site], None if other is None else other[sae.site], first) for sae in saes]
    embeddings = [Node("embedding", -1, p, token, 0.0, _EMBEDDING) for p, token in enumerate(prompt.ids)]
    changes = acts[_EMBEDDING] if other is None else acts[_EMBEDDING] - other[_EMBEDDING]
    groups = [Sources(embeddings, changes), *(depth.sources for depth in depths)]
    starts = torch.tensor([0, *(len(group.nodes) for group in groups)]).cumsum(0).tolist()
    nodes = [node for group in groups for node in group.nodes]
    nodes.append(Node("logit", model.args.n_layers, len(prompt.ids) - 1, answer.token, 0.0, ""))
    effects, per_activation = torch.zeros(len(nodes)), torch.zeros(len(nodes))
    for depth, start in zip(depths, starts[1:], strict=False):
        gradient = _integrated_gradient(model, prompt, answer, depth, n_steps)
        own = depth.sources.products({depth.site: gradient[None]})[0]
        effects[start : start + len(own)] = own.cpu()
        at = [node.position for node in depth.sources.nodes]
        per_activation[start : start + len(own)] = (depth.directions * gradient[at]).sum(1).cpu()

    chosen = [i for i in effects.abs().argsort(descending=True).tolist() if nodes[i].activation > 0][:max_latents]
    into = {i: row for row, i in enumerate([len(nodes) - 1, *sorted(chosen)])}
    check_edges(len(into), len(nodes))
    edges = torch.zeros(len(into), len(nodes))
    edges[0, starts[-2] : starts[-1]] = effects[starts[-2] : starts[-1]]
    n_rows = max(1, _TOKENS // len(prompt.ids))
    with progress_bar(total=len(chosen), desc="Edges", unit="latent") as bar:
        for number, depth in enumerate(depths):
            begin, end = starts[number + 1], starts[number + 2]
            targets = [i for i in into if begin <= i < end]
            site = _EMBEDDING if number == 0 else depths[number - 1].site
            if site == depth.site or not targets:
                continue
            compute = _edges_between(model, prompt, site, groups[number], depth, min(n_rows, len(targets)))
            for batch in batches(targets, n_rows):
                rows = [into[i] for i in batch]
                edges[rows, starts[number] : begin] = compute([i - begin for i in batch]).cpu()
                bar.update(len(batch))
    targets = torch.tensor(list(into))
    effects[: starts[1]] = (per_activation[targets[1:]] @ edges[1:])[: starts[1]]
    vectors = F.pad(torch.cat([group.vectors for group in groups]).cpu(), (0, 0, 0, 1))
    return Graph(nodes, vectors, targets, edges, torch.zeros(len(into)), effects)

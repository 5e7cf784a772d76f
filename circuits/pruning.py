"""Which nodes and edges of a graph matter, and how much of it is explained rather than error.

Influence (Ameisen et al. 2025, "Circuit Tracing", appendix "Graph Pruning"): with the absolute values of the edges into
each node divided by their sum, N, the influence of a node is the sum over all its paths to the logit,
(N + N^2 + N^3 + ...)[logit]. Kept are the fewest nodes that hold a share of all influence, then the fewest edges among
them, an edge's score being its share of its target's inputs times the target's influence.

Scores (section "Attribution Graph Evaluation" there), of the whole graph:

    replacement   influence of embeddings / (that of embeddings and errors): how much of what reaches the logit from
                  where paths begin passes through latents all the way
    completeness  share of inputs that is not error, of the logit and each latent, weighted by its influence

Latents whose inputs were not computed count as errors in both: nothing is known of where they come from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.graph import Graph, sum_over_paths


class Scores(NamedTuple):
    replacement: float
    completeness: float


class Kept(NamedTuple):
    """What is left of a graph."""

    influence: Tensor  # (n_nodes,) of every node, also those not kept
    cumulative: Tensor  # (n_nodes,) share of all influence that a node and all stronger ones hold
    nodes: Tensor  # (n_nodes,) bool
    edges: Tensor  # (n_targets, n_nodes) bool
    node_share: float  # of all influence, that of the nodes kept
    edge_share: float  # of the scores of edges among them, that of the edges kept


def shares(edges: Tensor) -> Tensor:
    """N: absolute values of each row, divided by their sum; a row of zeros stays one."""
    absolute = edges.abs()
    return absolute / absolute.sum(1, keepdim=True).clamp(min=torch.finfo(edges.dtype).tiny)


def influences(edges: Tensor, targets: Tensor) -> Tensor:
    """(n_nodes,) influence on the logit, the first target; its own is 0."""
    parts = shares(edges)
    return sum_over_paths(parts[0], parts[1:], targets[1:])


def scores(graph: Graph) -> Scores:
    influence = influences(graph.edges, graph.targets)
    begins = graph.which("error", "latent")
    begins[graph.targets] = False  # errors, and latents whose inputs are not known
    unexplained = float(influence[begins].sum())
    embeddings = float(influence[graph.which("embedding")].sum())
    weights = influence[graph.targets]
    weights[0] = 1.0  # the logit
    explained = shares(graph.edges)[:, ~begins].sum(1)
    replacement = embeddings / (embeddings + unexplained) if embeddings + unexplained > 0 else 0.0
    return Scores(replacement, float((weights * explained).sum() / weights.sum()))


def prune(graph: Graph, node_share: float, edge_share: float) -> Kept:
    """Embeddings and the logit are always kept; of the others, those on a kept way from a beginning to the logit."""
    influence = influences(graph.edges, graph.targets)
    always = graph.which("embedding", "logit")
    nodes = _fewest(influence, node_share) | always
    edges = graph.edges * nodes * nodes[graph.targets, None]
    parts = shares(edges)
    weights = sum_over_paths(parts[0], parts[1:], graph.targets[1:])[graph.targets]
    weights[0] = 1.0
    edge_scores = parts * weights[:, None]
    kept = _fewest(edge_scores.flatten(), edge_share).view_as(edge_scores) & (edges != 0)
    inner = torch.zeros_like(nodes)
    inner[graph.targets[1:]] = True  # latents: they need an input; a latent without known inputs is a beginning
    row_of = torch.full_like(influence, -1, dtype=torch.long)
    row_of[graph.targets] = torch.arange(len(graph.targets))
    while True:
        has_output = kept.any(0) | always
        has_input = ~inner
        has_input[inner] = kept[row_of[inner]].any(1)
        connected = nodes & has_output & has_input
        if torch.equal(connected, nodes):
            break
        nodes = connected
        kept = kept & nodes & nodes[graph.targets, None]
    order = influence.argsort(descending=True)
    cumulative = torch.empty_like(influence)
    cumulative[order] = influence[order].cumsum(0) / influence.sum()
    node_part = float(influence[nodes].sum() / influence.sum())
    return Kept(influence, cumulative, nodes, kept, node_part, float(edge_scores[kept].sum() / edge_scores.sum()))


def _fewest(values: Tensor, share: float) -> Tensor:
    """(n,) bool: the fewest largest of values (n,) >= 0 whose sum is at least `share` of the whole."""
    ordered = values.sort(descending=True).values
    enough = ordered.double().cumsum(0) >= share * ordered.double().sum()
    n = int(enough.float().argmax()) if enough.any() else len(values) - 1
    return values >= ordered[n].clamp(min=torch.finfo(values.dtype).tiny)

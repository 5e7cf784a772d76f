"""An attribution graph: what of a prompt's activations adds how much to which others, up to the answer.

Nodes are token embeddings, latents that fire, errors (what the dictionaries miss) and the logit asked about. With a_s
a source's activation, d_s its direction where it is written, and g_t the gradient there of target t's pre-activation,

    A[t, s] = a_s d_s . g_t          the edge: what s adds to the pre-activation of t
    E[s]    = A[logit, s] + sum_t A[t, s] / a_t E[t]      the effect: what s adds to the logit on all paths

so that taking s away is predicted to change the logit by -E[s]. Notation of Ameisen et al. 2025, "Circuit Tracing",
transformer-circuits.pub/2025/attribution-graphs/methods.html, section "Constructing an Attribution Graph for a Prompt".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llama_3.model import Transformer
from pipeline.errors import InputError

_MOST_BYTES = 2**32  # of a graph's edges

Kind = Literal["embedding", "latent", "error", "logit"]


class Node(NamedTuple):
    kind: Kind
    layer: int  # whose latents or error; -1 of an embedding, the number of layers of the logit
    position: int  # of the token
    index: int  # the latent; the token's id of an embedding or logit; -1 of an error
    activation: float  # of a latent, else 0
    site: str  # where its vector is added; empty for the logit


class Answer(NamedTuple):
    """The token asked about, and another to compare with; None: the mean of the vocabulary."""

    token: int
    other: int | None

    def logit(self, logits: Tensor) -> Tensor:
        """The answer's logit minus the other's, (...): what graphs explain. logits: (..., vocab_size)."""
        return logits[..., self.token] - (logits.mean(-1) if self.other is None else logits[..., self.other])

    def direction(self, model: Transformer) -> Tensor:
        """(d_model,) whose product with the last norm's output is that logit."""
        rows = model.output.weight.float()
        return rows[self.token] - (rows.mean(0) if self.other is None else rows[self.other])


class Sources:
    """Nodes that add vectors to activations, in the order in which the model computes them, by position within a site.

    vectors: (n_nodes, d_model) float32, what each adds at its site and position.
    """

    def __init__(self, nodes: Sequence[Node], vectors: Tensor):
        self.nodes, self.vectors = list(nodes), vectors
        places = [(node.site, node.position) for node in nodes]
        starts = [i for i in range(len(places)) if i == 0 or places[i] != places[i - 1]]
        self._spans = list(zip(starts, [*starts[1:], len(places)], strict=True))

    def products(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """What each node adds to each of n targets, (n, n_nodes); 0 at sites without a gradient.

        gradients: site -> (n, seq, d_model) of the targets.
        """
        n_rows = len(next(iter(gradients.values())))
        found = self.vectors.new_zeros(n_rows, len(self.nodes))
        for start, end in self._spans:
            node = self.nodes[start]
            if node.site in gradients:
                found[:, start:end] = gradients[node.site][:, node.position] @ self.vectors[start:end].T
        return found


class Graph(NamedTuple):
    """Rows of `edges` belong to `targets`: first the logit, then the latents whose inputs are known."""

    nodes: list[Node]  # in the order in which the model computes them; the logit is last
    vectors: Tensor  # (n_nodes, d_model) what each adds at its site; 0 of the logit
    targets: Tensor  # (n_targets,) int64, numbers of nodes
    edges: Tensor  # (n_targets, n_nodes) A
    constants: Tensor  # (n_targets,) what biases add, so that edges.sum(1) + constants are the pre-activations
    effects: Tensor  # (n_nodes,) E

    def which(self, *kinds: Kind) -> Tensor:
        """(n_nodes,) bool: nodes of these kinds."""
        return torch.tensor([node.kind in kinds for node in self.nodes])

    def strongest(self, influence: Tensor, n: int, *kinds: Kind) -> list[int]:
        """The n nodes of these kinds with the highest influence, (n_nodes,), strongest first, without those of none."""
        of_kind = influence.masked_fill(~self.which(*kinds), 0)
        return [i for i in of_kind.argsort(descending=True)[:n].tolist() if of_kind[i] > 0]


def sum_over_paths(first: Tensor, edges: Tensor, targets: Tensor) -> Tensor:
    """(n_nodes,) sum over all paths from each node to the end, of the products of their edges.

    first: (n_nodes,) edges into the end; edges: (n_targets, n_nodes) into `targets`, each in a later layer.
    """
    total, step = first, first
    while step.any():
        step = step[targets] @ edges
        total = total + step
    return total


def total_effects(nodes: Sequence[Node], targets: Tensor, edges: Tensor) -> Tensor:
    """(n_nodes,) E, from A; 1 of the logit is left out, so that its own is 0."""
    activations = torch.tensor([nodes[i].activation for i in targets[1:].tolist()]).to(edges)
    return sum_over_paths(edges[0], edges[1:] / activations[:, None], targets[1:])


def check_edges(n_targets: int, n_nodes: int) -> None:
    """Raise InputError if so many edges do not fit the memory set aside for them."""
    if (needed := 4 * n_targets * n_nodes) > _MOST_BYTES:
        raise InputError(
            f"The edges from {n_nodes:,} nodes into {n_targets:,} would take {needed / 1e9:.1f} GB, above the limit of "
            f"{_MOST_BYTES / 1e9:.1f} GB; shorten the prompt or lower --max_latents."
        )


def batches(targets: Sequence[int], n_rows: int) -> Iterator[Sequence[int]]:
    """Parts of at most n_rows."""
    for start in range(0, len(targets), n_rows):
        yield targets[start : start + n_rows]

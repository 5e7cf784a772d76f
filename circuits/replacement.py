"""The graph of transcoder latents: every MLP is its transcoder plus what that misses, and all else is linear.

The local replacement model of a prompt (Ameisen et al. 2025, "Circuit Tracing", section "The Local Replacement Model";
with transcoders of single layers, Dunefsky et al. 2024, arXiv:2406.11944, section 3). In layer l at position p

    mlp_out = sum_i a_i d_i + W_skip z + b + e         a_i = gate(pre-activation_i), d_i: decoder rows, e: the error
    pre-activation_i = w_i . (z - c b_pre) + b_enc_i   z: ffn_norm's output, normalised as the transcoder does

Attention patterns, the denominators of norms, the std by which a transcoder divides, and which latents fire are those
of the prompt. The mean that it takes off stays live: it is linear, like the skip. So pre-activations and logits are
linear in embeddings, activations and errors: one backward pass from a target gives the edges into it. Those of many
targets go through the same forward pass together.

Layers without a transcoder are error alone. Begin-of-text, on which transcoders are not trained, sees only itself: what
MLPs write there is the same for every prompt, so it counts as a constant, like biases, and not as error.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.graph import Answer, Graph, Node, Sources, batches, check_edges, total_effects
from circuits.pruning import influences
from llama_3.model import RMSNorm, Transformer, TransformerBlock
from microscope.prompts import Prompt
from pipeline.progress import progress_bar
from sae import SparseAutoencoder

_TOKENS = 1024  # targets of a batch times tokens of the prompt
_ROUND = 8  # batches between two looks at which latents matter most


class Replaced(NamedTuple):
    """A layer's MLP as its transcoder computes it: n latents fire on the prompt, in order of position."""

    positions: Tensor  # (n,)
    latents: Tensor  # (n,)
    activations: Tensor  # (n,)
    reads: Tensor  # (n, d_model): pre-activation = read . ffn_norm's output + constant
    constants: Tensor  # (n,)
    writes: Tensor  # (n, d_model): activation times direction, as added to mlp_out
    bias: Tensor  # (seq, d_model) b, also added there; 0 at positions before the first
    skip: Callable[[Tensor], Tensor] | None  # ffn_norm's output (..., seq, d_model) -> what the skip adds to mlp_out


def _divided(sae: SparseAutoencoder, x: Tensor, divisor: Tensor) -> Tensor:
    """What normalisation makes of x (..., d_model) when the std it divides by is given. Linear, and its own adjoint."""
    return (x - x.mean(-1, keepdim=True) if sae.kind.normalization == "layer_norm" else x) / divisor


def replaced(sae: SparseAutoencoder, x: Tensor, first: int) -> Replaced:
    """x: (seq, d_model) ffn_norm's output; first: the first position that the transcoder was trained on."""
    z, _, std = sae.normalize(x)
    divisor = std + sae.normalize_eps  # (seq, 1)
    values, indices = sae.encode_normalized(z)
    fires = values > 0
    fires[:first] = False
    positions, places = fires.nonzero(as_tuple=True)
    latents, activations = indices[positions, places], values[positions, places]
    encoder = sae.encoder.weight[latents].float()
    constants = sae.encoder.bias[latents].float()
    if sae.kind.centred:
        constants = constants - encoder @ sae.b_pre.float()
    trained = torch.arange(len(x), device=x.device)[:, None] >= first
    skip = None
    if (matrix := sae.skip) is not None:
        skip = lambda x: F.linear(_divided(sae, x, divisor), matrix.float()) * trained / sae.kind.target_scale
    return Replaced(
        positions,
        latents,
        activations,
        reads=_divided(sae, encoder, divisor[positions]),
        constants=constants,
        writes=sae.decoder.weight.t()[latents].float() * activations[:, None] / sae.kind.target_scale,
        bias=sae.b_pre.float() * trained / sae.kind.target_scale,
        skip=skip,
    )


class _FrozenRun:
    """The model's forward pass on a prompt, with gradients through what is linear in the replacement model.

    reads: layer -> ffn_norm's output, (1, seq, d_model), and the number of layers -> the last norm's;
    writes: site -> what sources there add to, same shape.
    """

    def __init__(self, model: Transformer, prompt: Prompt, layers: dict[int, Replaced]):
        self.reads: dict[int, Tensor] = {}
        self.writes: dict[str, Tensor] = {}
        self._stream = torch.empty(0)  # what the next norm reads
        n_layers = model.args.n_layers
        with contextlib.ExitStack() as stack:
            for i in range(n_layers):
                block = cast(TransformerBlock, model.layers[i])
                functions = {
                    "resid_pre": self._keep if i else self._embedding,
                    "attention_norm": lambda _, norm=block.attention_norm: self._norm(norm),
                    "attention_pattern": Tensor.detach,
                    "resid_mid": self._keep,
                    "ffn_norm": lambda _, i=i, norm=block.ffn_norm: self._read(i, norm),
                    "mlp_out": lambda x, i=i: self._write(x, i, layers.get(i)),
                }
                for kind, function in functions.items():
                    stack.enter_context(model.intervene(f"layers.{i}.{kind}", function))
            end = f"layers.{n_layers - 1}.resid_post"
            self._stream = model.activations(prompt.batch(model), end)
        self._read(n_layers, model.norm)

    def _keep(self, x: Tensor) -> Tensor:
        self._stream = x
        return x

    def _embedding(self, x: Tensor) -> Tensor:
        self.writes["layers.0.resid_pre"] = x.requires_grad_()
        return self._keep(x)

    def _norm(self, norm: RMSNorm) -> Tensor:
        """What a norm gives, with its denominator frozen."""
        x = self._stream.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps).detach()
        return (x * scale).type_as(self._stream) * norm.weight

    def _read(self, layer: int, norm: RMSNorm) -> Tensor:
        self.reads[layer] = self._norm(norm)
        return self.reads[layer]

    def _write(self, x: Tensor, layer: int, replaced: Replaced | None) -> Tensor:
        """The MLP's own output, of which the skip alone still depends on what the MLP reads."""
        if replaced is None or replaced.skip is None:
            x = x.detach().requires_grad_()
        else:
            skip = replaced.skip(self.reads[layer].float()).type_as(x)
            x = x.detach() - skip.detach() + skip
        self.writes[f"layers.{layer}.mlp_out"] = x
        return x

    def gradients(self, targets: Sequence[tuple[int, int]], reads: Tensor) -> dict[str, Tensor]:
        """site -> (n, seq, d_model), the gradients of n targets.

        targets: layer and position of each; reads: (n, d_model). Target = read . what the norm there gives.
        """
        layers = sorted({layer for layer, _ in targets})
        outputs = [self.reads[layer] for layer in layers]
        weights = {layer: x.new_zeros(len(targets), *x.shape) for layer, x in zip(layers, outputs, strict=True)}
        for row, (layer, position) in enumerate(targets):
            weights[layer][row, 0, position] = reads[row]
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
        found = torch.autograd.grad(outputs, list(self.writes.values()), list(weights.values()), **options)
        return {site: g[:, 0].float() for site, g in zip(self.writes, found, strict=True) if g is not None}


def attribute(
    model: Transformer,
    prompt: Prompt,
    answer: Answer,
    transcoders: Iterable[tuple[int, SparseAutoencoder]],
    first: int = 0,
    max_latents: int | None = None,
) -> Graph:
    """The graph of the transcoder latents that fire on a prompt.

    transcoders: layer and transcoder from its ffn_norm to its mlp_out; one at a time is kept. first: the first position
    that they were trained on. max_latents: inputs are computed for so many latents, those with the highest influence;
    the others stay as nodes without inputs.
    """
    n_layers, seq = model.args.n_layers, len(prompt.ids)
    with torch.no_grad():
        tokens = prompt.batch(model)
        wanted = [f"layers.{i}.{kind}" for i in range(n_layers) for kind in ("ffn_norm", "mlp_out")]
        acts = {site: x[0].float() for site, x in model.activations(tokens, ["layers.0.resid_pre", *wanted]).items()}
        layers = {layer: replaced(sae, acts[f"layers.{layer}.ffn_norm"], first) for layer, sae in transcoders}
        biases = _biases(acts, layers, n_layers, first)
        sources, reads, constants = _sources(prompt, acts, layers, biases, first)
    run = _FrozenRun(model, prompt, layers)

    def row(targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Edges (n, n_nodes) and constants (n,) of targets, numbers of nodes."""
        places = [(nodes[i].layer, nodes[i].position) for i in targets]
        gradients = run.gradients(places, torch.stack([reads[i] for i in targets]))
        edges = F.pad(sources.products(gradients), (0, 1))
        added = torch.stack([constants[i] for i in targets])
        for site in biases.keys() & gradients.keys():
            added = added + torch.einsum("nsd,sd->n", gradients[site], biases[site])
        return edges.cpu(), added.cpu()

    logit = len(sources.nodes)
    nodes = [*sources.nodes, Node("logit", n_layers, seq - 1, answer.token, 0.0, "")]
    reads[logit], constants[logit] = answer.direction(model), sources.vectors.new_zeros(())
    n_rows, left = max(1, _TOKENS // seq), min(len(reads) - 1, max_latents or len(reads))
    check_edges(left + 1, len(nodes))
    targets, rows = [logit], [row([logit])]
    is_latent = torch.tensor([node.kind == "latent" for node in nodes])
    with progress_bar(total=left, desc="Edges", unit="latent") as bar:
        while left:
            edges = torch.cat([each for each, _ in rows])
            influence = influences(edges, torch.tensor(targets))
            influence[~is_latent] = 0
            influence[targets] = 0
            chosen = influence.argsort(descending=True)[: min(left, _ROUND * n_rows)]
            chosen = sorted(chosen[influence[chosen] > 0].tolist(), reverse=True)  # a batch is then of few layers
            if not chosen:
                break
            for batch in batches(chosen, n_rows):
                rows.append(row(batch))
                targets.extend(batch)
                bar.update(len(batch))
            left -= len(chosen)
        bar.total = bar.n
        bar.refresh()
    edges, added = (torch.cat(each) for each in zip(*rows, strict=True))
    numbers = torch.tensor(targets)
    vectors = F.pad(sources.vectors.cpu(), (0, 0, 0, 1))
    return Graph(nodes, vectors, numbers, edges, added, total_effects(nodes, numbers, edges))


def _biases(acts: dict[str, Tensor], layers: dict[int, Replaced], n_layers: int, first: int) -> dict[str, Tensor]:
    """Site -> (seq, d_model), what is added to mlp_out whatever the prompt: b, and everything before `first`."""
    found = {}
    for layer in range(n_layers):
        own = acts[f"layers.{layer}.mlp_out"]
        bias = layers[layer].bias.clone() if layer in layers else torch.zeros_like(own)
        bias[:first] = own[:first]
        found[f"layers.{layer}.mlp_out"] = bias
    return found


def _sources(
    prompt: Prompt, acts: dict[str, Tensor], layers: dict[int, Replaced], biases: dict[str, Tensor], first: int
) -> tuple[Sources, dict[int, Tensor], dict[int, Tensor]]:
    """The nodes; of each latent, by its number, the read (d_model,) and the constant of its pre-activation."""
    site = "layers.0.resid_pre"
    nodes = [Node("embedding", -1, p, token, 0.0, site) for p, token in enumerate(prompt.ids)]
    vectors = list(acts[site])
    reads: dict[int, Tensor] = {}
    constants: dict[int, Tensor] = {}
    for layer, (site, bias) in enumerate(biases.items()):
        own = layers.get(layer)
        errors = acts[site] - bias
        if own is not None:
            errors = errors.index_add(0, own.positions, -own.writes)
            if own.skip is not None:
                errors = errors - own.skip(acts[f"layers.{layer}.ffn_norm"])
        fires = [] if own is None else zip(*(each.tolist() for each in own[:3]), strict=True)
        latents = [Node("latent", layer, position, latent, a, site) for position, latent, a in fires]
        for position in range(first, len(errors)):
            for i, node in enumerate(latents):
                if own is not None and node.position == position:
                    reads[len(nodes)], constants[len(nodes)] = own.reads[i], own.constants[i]
                    nodes.append(node)
                    vectors.append(own.writes[i])
            nodes.append(Node("error", layer, position, -1, 0.0, site))
            vectors.append(errors[position])
    return Sources(nodes, torch.stack(vectors)), reads, constants

"""Attribution graphs against a frozen forward pass written out in float64, and pruning against dense matrices.

The replacement model is linear: what an edge says is what changes in a target when the source is left out, and what a
latent's effect says is what changes in the logit when its targets follow. Integrated gradients against a loop over
steps and targets. Changes in the model against interventions one by one. Then the command, its files and its refusals.

    .venv/bin/python -m pytest tests/test_circuits.py
"""

import contextlib
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import PROJECT_DIR
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sae_runs import random_sae

import latent_circuits as script
from circuits import integrated
from circuits.files import graph_json, node_id
from circuits.graph import Answer, Graph, Node, total_effects
from circuits.pruning import influences, prune, scores
from circuits.replacement import attribute
from circuits.suite import find_suite
from circuits.validation import Agreement, validate, verdict
from llama_3 import load_model
from microscope.prompts import Prompt
from pipeline.errors import InputError
from pipeline.files import write_json
from sae import Kind, SparseAutoencoder, save_sae

IDS = [276, 5, 17, 60, 33, 71]
PROMPT = Prompt(IDS, [str(i) for i in IDS])
ANSWERS = [Answer(12, 34), Answer(40, None)]
N_LATENTS, K = 40, 4


def transcoder_kind(layer: int, **fields) -> Kind:
    return Kind(target_site=f"layers.{layer}.mlp_out", **fields)


# What each layer has; between them every gate, normalisation, with and without skip and centring; and layers without.
SUITES = {
    "topk": [{"centred": False}, {}, {"centred": False, "target_scale": 3.0}],
    "jumprelu, relu, skip": [
        {"gate": "jumprelu", "normalization": "scale", "scale": 0.5, "skip": True},
        {"gate": "relu", "normalization": "none", "centred": False, "skip": True, "target_scale": 0.3},
        {"gate": "topk", "skip": True},
    ],
    "a layer without": [{"gate": "relu", "normalization": "scale", "scale": 2.0}, None, {"normalization": "none"}],
}


def transcoders(name: str, d_model: int) -> dict[int, SparseAutoencoder]:
    found = {}
    for layer, fields in enumerate(SUITES[name]):
        if fields is not None:
            sae = random_sae(d_model, N_LATENTS, K, seed=layer, kind=transcoder_kind(layer, **fields))
            with torch.no_grad():
                sae.encoder.bias.sub_(1.5 if sae.kind.gate != "topk" else 0.0)  # else half of the latents fire
                if sae.skip is not None:
                    sae.skip.mul_(0.1)
            found[layer] = sae.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir))


class FrozenModel:
    """The replacement model of PROMPT in float64, one layer after another.

    `run` gives all latents' pre-activations, layer -> (seq, n_latents), and the logit asked about. Patterns, norm
    denominators and the std of activations are those of a first run; which latents fire and errors too.
    """

    def __init__(self, model, saes: dict[int, SparseAutoencoder], first: int):
        self.model, self.saes, self.first = model, saes, first
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        n = model.args.n_layers
        sites = [f"layers.{i}.{kind}" for i in range(n) for kind in ("attention_pattern", "mlp_out")]
        self.acts = {s: x[0].double() for s, x in model.activations(torch.tensor([IDS]), sites).items()}
        self.scales: dict[str, torch.Tensor] = {}
        self.stds: dict[int, torch.Tensor] = {}
        self.firing: dict[int, torch.Tensor] = {}  # layer -> (seq, n_latents) activations
        self.errors: dict[int, torch.Tensor] = {}
        self.run(None)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.scales:
            self.scales[name] = (x.square().mean(-1, keepdim=True) + self.model.args.norm_eps).rsqrt()
        return x * self.scales[name] * self.w[f"{name}.weight"]

    def z(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        kind = self.saes[layer].kind
        if kind.normalization != "layer_norm":
            return x * kind.scale
        if layer not in self.stds:
            self.stds[layer] = x.std(-1, keepdim=True) + self.saes[layer].normalize_eps
        return (x - x.mean(-1, keepdim=True)) / self.stds[layer]

    def gate(self, sae: SparseAutoencoder, pre_acts: torch.Tensor) -> torch.Tensor:
        if sae.kind.gate == "topk":
            least = pre_acts.topk(K, dim=-1).values[:, -1:]
            return torch.where(pre_acts >= least, pre_acts, 0).clamp(min=0)
        least = sae.threshold.double() if sae.kind.gate == "jumprelu" else torch.zeros(1).double()
        return torch.where((pre_acts > least) & (pre_acts > 0), pre_acts, 0)

    def run(self, without: Node | None, follow: bool = False) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """without: a node that is left out. follow: other latents follow what they read, which of them fire stays."""
        args, found = self.model.args, {}

        def left_out(kind: str, layer: int, x: torch.Tensor) -> torch.Tensor:
            if without is None or (without.kind, without.layer) != (kind, layer):
                return x
            x = x.clone()
            x[(without.position, without.index) if kind == "latent" else without.position] = 0
            return x

        x = left_out("embedding", -1, self.w["tok_embeddings.weight"][IDS])
        for i in range(args.n_layers):
            w = lambda name, i=i: self.w[f"layers.{i}.{name}.weight"]
            v = (self.norm(f"layers.{i}.attention_norm", x) @ w("attention.wv").T).unflatten(-1, (-1, args.head_dim))
            v = v.transpose(0, 1).repeat_interleave(args.n_heads // args.n_kv_heads, dim=0)  # (heads, seq, head_dim)
            x = x + (self.acts[f"layers.{i}.attention_pattern"] @ v).transpose(0, 1).flatten(1) @ w("attention.wo").T
            read, wrote = self.norm(f"layers.{i}.ffn_norm", x), torch.zeros_like(x)
            if i in self.saes:
                sae, state = self.saes[i], {n: t.double() for n, t in self.saes[i].state_dict().items()}
                z = self.z(i, read)
                centred = z - state["b_pre"] if sae.kind.centred else z
                found[i] = pre_acts = centred @ state["encoder.weight"].T + state["encoder.bias"]
                if i not in self.firing:
                    self.firing[i] = self.gate(sae, pre_acts)
                    self.firing[i][: self.first] = 0
                fires = torch.where(self.firing[i] > 0, pre_acts, 0) if follow else self.firing[i]
                wrote = left_out("latent", i, fires) @ state["decoder.weight"].T + state["b_pre"]
                wrote = wrote + (z @ state["skip"].T if sae.kind.skip else 0)
                wrote = wrote / sae.kind.target_scale
                wrote[: self.first] = 0
            if i not in self.errors:
                self.errors[i] = self.acts[f"layers.{i}.mlp_out"] - wrote
            x = x + wrote + left_out("error", i, self.errors[i])
        return found, self.norm("norm", x)[-1] @ self.w["output.weight"].T


def targets_of(graph: Graph, answer: Answer, run: tuple[dict, torch.Tensor]) -> torch.Tensor:
    """(n_targets,) what an oracle's run says of the graph's targets."""
    pre_acts, logits = run
    nodes = [graph.nodes[i] for i in graph.targets.tolist()]
    return torch.stack(
        [answer.logit(logits) if n.kind == "logit" else pre_acts[n.layer][n.position, n.index] for n in nodes]
    )


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of the largest."""
    found, expected = found.double(), expected.double()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("answer", ANSWERS, ids=["difference", "token"])
@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("first", [0, 1])
def test_edges_are_what_a_target_loses_without_the_source(model, name, answer, first, monkeypatch):
    monkeypatch.setattr("circuits.replacement._TOKENS", 7 * len(IDS))  # seven targets at a time
    saes = transcoders(name, model.args.dim)
    graph, frozen = attribute(model, PROMPT, answer, saes.items(), first), FrozenModel(model, saes, first)
    whole = targets_of(graph, answer, frozen.run(None))
    fires = {(n.layer, n.position, n.index) for n in graph.nodes if n.kind == "latent"}
    assert fires == {(i, *place) for i, a in frozen.firing.items() for place in a.nonzero().tolist()}
    assert len(graph.nodes) == len(IDS) + (len(IDS) - first) * 3 + len(fires) + 1 and len(graph.targets) > 20
    close(graph.edges.double().sum(1) + graph.constants, whole)  # edges and biases are all there is
    activations = torch.tensor([graph.nodes[i].activation for i in graph.targets.tolist()[1:]])
    close(activations, whole[1:])
    assert float(answer.logit(model(torch.tensor([IDS]))[0, -1])) == pytest.approx(float(whole[0]), rel=1e-4)
    for i, node in enumerate(graph.nodes[:-1]):
        loses = whole - targets_of(graph, answer, frozen.run(node))
        close(torch.cat([graph.edges[:, i], whole]), torch.cat([loses, whole]), 2e-5)  # as a part of what is whole
        if node.kind != "latent" or i in graph.targets:
            loses = whole[0] - answer.logit(frozen.run(node, follow=True)[1])
            assert float(graph.effects[i]) == pytest.approx(float(loses), abs=2e-4 * float(whole.abs().max()))


def test_the_latents_that_matter_most_are_followed_first(model):
    saes = transcoders("topk", model.args.dim)
    whole, part = (attribute(model, PROMPT, ANSWERS[0], saes.items(), 0, n) for n in (None, 9))
    assert len(part.targets) == 10 and part.nodes == whole.nodes
    rows = {int(i): row for i, row in zip(whole.targets, whole.edges, strict=True)}
    close(part.edges, torch.stack([rows[int(i)] for i in part.targets]))
    found = scores(part), scores(whole)
    assert found[0].replacement < found[1].replacement  # what is not followed counts as error


# ---- pruning


@st.composite
def graphs(draw) -> Graph:
    """Random ones, of a few layers."""
    n_layers, n_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    nodes = [Node("embedding", -1, p, 7, 0.0, "layers.0.resid_pre") for p in range(n_tokens)]
    for layer in range(n_layers):
        for p in range(n_tokens):
            latents = range(draw(st.integers(0, 3)))
            nodes += [Node("latent", layer, p, i, 1.0 + i, f"layers.{layer}.mlp_out") for i in latents]
            nodes.append(Node("error", layer, p, -1, 0.0, f"layers.{layer}.mlp_out"))
    nodes.append(Node("logit", n_layers, n_tokens - 1, 3, 0.0, ""))
    latents = [i for i, node in enumerate(nodes) if node.kind == "latent"]
    followed = [i for i in latents if draw(st.booleans()) or draw(st.booleans())]
    targets = torch.tensor([len(nodes) - 1, *followed])
    edges = torch.randn(len(targets), len(nodes), generator=generator, dtype=torch.float64)
    edges *= torch.rand(edges.shape, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
    for row, target in enumerate(targets.tolist()):
        for source, node in enumerate(nodes):
            if node.layer >= nodes[target].layer or node.position > nodes[target].position:
                edges[row, source] = 0
    effects = total_effects(nodes, targets, edges)
    return Graph(nodes, torch.zeros(len(nodes), 2), targets, edges, torch.zeros(len(targets)), effects)


def square(graph: Graph, rows: torch.Tensor) -> torch.Tensor:
    """(n_nodes, n_nodes), zero where inputs are not known."""
    dense = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=rows.dtype)
    dense[graph.targets] = rows
    return dense


@given(graphs(), st.sampled_from([0.3, 0.8, 1.0]), st.sampled_from([0.5, 0.98, 1.0]))
@settings(max_examples=25)
def test_influence_pruning_and_scores_against_dense_matrices(graph, node_share, edge_share):
    dense = square(graph, graph.edges)
    n = dense.abs() / dense.abs().sum(1, keepdim=True).clamp(min=1e-300)
    eye = torch.eye(len(dense), dtype=torch.float64)
    influence = (torch.linalg.inv(eye - n) - eye)[-1]
    torch.testing.assert_close(influences(graph.edges, graph.targets), influence, rtol=1e-9, atol=1e-12)
    if influence.sum() == 0:
        return
    kept, found = prune(graph, node_share, edge_share), scores(graph)
    begins = torch.tensor([each.kind != "embedding" for each in graph.nodes])
    begins[graph.targets] = False
    tokens = torch.tensor([each.kind == "embedding" for each in graph.nodes])
    expected = (influence[tokens].sum() / influence[tokens | begins].sum()).nan_to_num(0.0)  # where no way begins: 0
    assert found.replacement == pytest.approx(float(expected), abs=1e-9)
    weight = influence + eye[-1]
    known = torch.zeros(len(dense), dtype=torch.bool)
    known[graph.targets] = True
    explained = n[:, ~begins].sum(1)
    expected = (weight * explained)[known].sum() / weight[known].sum()
    assert found.completeness == pytest.approx(float(expected), abs=1e-9)

    ordered = influence.sort(descending=True).values
    n_enough = int((ordered.cumsum(0) >= node_share * ordered.sum() - 1e-12).float().argmax()) + 1
    always = torch.tensor([each.kind in ("embedding", "logit") for each in graph.nodes])
    least = ordered[n_enough - 1]
    assert (influence[kept.nodes & ~always] >= least * (1 - 1e-9)).all() and kept.nodes[always].all()
    mask = square(graph, kept.edges.double()).bool()
    assert not (mask & (dense == 0)).any()
    assert not mask[~kept.nodes].any() and not mask[:, ~kept.nodes].any()
    inner = kept.nodes & ~always
    assert mask[:, inner].any(0).all()  # each leads somewhere
    assert mask[inner & known].any(1).all()  # and comes from somewhere, if that is known
    if node_share == edge_share == 1.0 and graph.edges.any(1).all():
        reached = (influence > 1e-12 * influence.sum()) & ~always
        assert kept.nodes[reached].all() and kept.node_share == pytest.approx(1) and kept.edge_share == pytest.approx(1)


# ---- validation


@pytest.mark.parametrize("hold", [False, True])
def test_measured_changes_are_those_of_single_interventions(model, hold):
    saes = transcoders("a layer without", model.args.dim)
    answer = ANSWERS[0]
    graph = attribute(model, PROMPT, answer, saes.items(), 1)
    chosen = graph.strongest(12, "latent", "error")
    found = {each.name: each for each in validate(model, PROMPT, answer, graph, chosen)}
    tokens = torch.tensor([IDS])
    sites = [f"layers.{i}.attention_pattern" for i in range(model.args.n_layers)]
    patterns = model.activations(tokens, sites)
    before = answer.logit(model(tokens)[0, -1])
    for n, i in enumerate(chosen):
        node, vector = graph.nodes[i], graph.vectors[i]
        for name, factor in (("taken away, attention held", -1),) if hold else (("taken away", -1), ("doubled", 1)):
            with contextlib.ExitStack() as stack:
                change = lambda x, f=factor, v=vector: x + f * v
                stack.enter_context(model.intervene(node.site, change, positions=[node.position]))
                for site in sites if hold else ():
                    stack.enter_context(model.intervene(site, lambda _, site=site: patterns[site].clone()))
                after = answer.logit(model(tokens)[0, -1])
            assert float(found[name].measured[n]) == pytest.approx(float(after - before), abs=1e-4)
            assert float(found[name].predicted[n]) == pytest.approx(factor * float(graph.effects[i]))


def test_agreement_in_numbers_and_words():
    predicted = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    good = Agreement("taken away", predicted, 0.8 * predicted + torch.tensor([0.1, -0.1, 0.0, 0.1]))
    assert good.pearson == pytest.approx(0.999, abs=2e-3) and good.spearman == pytest.approx(1)
    assert good.slope == pytest.approx(0.8, abs=0.03) and verdict([good]).startswith("The graph predicts")
    bad = good._replace(measured=torch.tensor([1.0, -2.0, 0.1, -1.0]))
    assert not bad.predicts and "does not predict" in verdict([bad]) and f"{bad.pearson:.2f}" in verdict([bad])
    assert not good._replace(measured=5 * predicted).predicts  # of the right shape, but far too small
    assert good._replace(measured=torch.zeros(4)).pearson == 0


# ---- SAEs


def residual_saes(model, *sites: str) -> list[SparseAutoencoder]:
    kinds = [Kind(), Kind("relu", "scale", 0.5)]
    saes = []
    for i, site in enumerate(sites):
        sae = random_sae(model.args.dim, N_LATENTS, K, seed=10 + i, kind=kinds[i % 2]).requires_grad_(False)
        sae.encoder.bias.sub_(1.5 if sae.kind.gate == "relu" else 0.0)
        sae.info["site"] = site
        saes.append(sae)
    return saes


@pytest.mark.parametrize("baseline", [None, Prompt([276, 5, 44, 60, 33, 8], [])])
def test_integrated_gradients_against_a_loop(model, baseline):
    answer, first, n_steps = ANSWERS[0], 1, 4
    saes = residual_saes(model, "layers.0.resid_post", "layers.1.resid_post")
    graph = integrated.attribute(model, PROMPT, answer, saes, first, baseline, n_steps)
    tokens, gradients = torch.tensor([IDS]), []
    for sae in saes:
        x = model.activations(tokens, sae.site)[0]
        _, mean, std = sae.normalize(x)
        start = sae.b_pre * (std + sae.normalize_eps) + mean
        if baseline:
            start = model.activations(torch.tensor([baseline.ids]), sae.site)[0]
        start = torch.cat([x[:first], start[first:]])
        own = [i for i, node in enumerate(graph.nodes) if node.site == sae.site]
        if baseline is None:  # the vectors are all that tells the prompt from the baseline
            added = torch.zeros_like(x).index_add(
                0, torch.tensor([graph.nodes[i].position for i in own]), graph.vectors[own]
            )
            close(added, x - start)
        gradient = torch.zeros_like(x)
        for step in range(n_steps):
            at = (start + (step + 0.5) / n_steps * (x - start)).requires_grad_()
            with model.intervene(sae.site, lambda _, at=at: at[None]):
                logit = answer.logit(model(tokens)[0, -1])
            gradient += torch.autograd.grad(logit, at)[0] / n_steps
        expected = torch.stack([graph.vectors[i] @ gradient[graph.nodes[i].position] for i in own])
        close(graph.effects[own], expected)
        gradients.append(gradient)
    # Edges into the second SAE's latents: their pre-activations' gradient at the first's site, one by one.
    rows = {int(i): row for i, row in zip(graph.targets, graph.edges, strict=True)}
    seconds = [i for i in rows if graph.nodes[i].site == saes[1].site]
    sources = [i for i, node in enumerate(graph.nodes) if node.site == saes[0].site]
    assert len(seconds) > 5
    for i in seconds:
        node, leaf = graph.nodes[i], model.activations(tokens, saes[0].site).clone().requires_grad_()
        with model.intervene(saes[0].site, lambda _, leaf=leaf: leaf):
            z = saes[1].normalize(model.activations(tokens, saes[1].site)[0, node.position])[0]
        (gradient,) = torch.autograd.grad(saes[1].encoder.weight[node.index] @ z, leaf)
        expected = torch.stack([graph.vectors[j] @ gradient[0, graph.nodes[j].position] for j in sources])
        close(rows[i][sources], expected)
        assert rows[i].count_nonzero() <= len(sources)
    # What an embedding adds: its edges into the first SAE's latents, times what one activation of each adds.
    _, mean, std = saes[0].normalize(model.activations(tokens, saes[0].site)[0])
    expected = torch.zeros(len(IDS))
    for i in (i for i in rows if graph.nodes[i].site == saes[0].site):
        node = graph.nodes[i]
        at = mean[node.position], std[node.position]
        direction = saes[0].restore(saes[0].decoder.weight[:, node.index], *at) - saes[0].restore(torch.zeros(1), *at)
        expected += rows[i][: len(IDS)] * (direction @ gradients[0][node.position])
    close(graph.effects[: len(IDS)], expected)


def test_integrated_effects_sum_to_the_difference_from_the_baseline(model):
    answer, saes = ANSWERS[1], residual_saes(model, "layers.1.resid_post")
    graph = integrated.attribute(model, PROMPT, answer, saes, 1, None, 400)
    x = model.activations(torch.tensor([IDS]), saes[0].site)[0]
    _, mean, std = saes[0].normalize(x)
    start = torch.cat([x[:1], (saes[0].b_pre * (std + saes[0].normalize_eps) + mean)[1:]])
    with model.intervene(saes[0].site, lambda _: start[None]):
        without = answer.logit(model(torch.tensor([IDS]))[0, -1])
    whole = answer.logit(model(torch.tensor([IDS]))[0, -1])
    own = [node.site == saes[0].site for node in graph.nodes]
    assert float(graph.effects[own].sum()) == pytest.approx(float(whole - without), rel=0.01, abs=0.01)
    close(graph.edges[0], torch.where(torch.tensor(own), graph.effects, 0))


# ---- files


NUMBER, TEXT, WHOLE = (int, float), (str,), (int,)
# Neuronpedia's graph-schema.json and circuit-tracer's graph_models.py, as far as they require something.
NODE_FIELDS = {
    "node_id": TEXT, "feature": WHOLE, "layer": TEXT, "ctx_idx": WHOLE, "feature_type": TEXT, "token_prob": NUMBER,
    "is_target_logit": (bool,), "run_idx": WHOLE, "reverse_ctx_idx": WHOLE, "jsNodeId": TEXT, "clerp": TEXT,
    "influence": (*NUMBER, type(None)), "activation": (*NUMBER, type(None)),
}  # fmt: skip
FEATURE_TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def check_schema(graph: dict) -> None:
    assert {"metadata", "qParams", "nodes", "links"} <= graph.keys()
    metadata = graph["metadata"]
    assert all(isinstance(metadata[name], str) for name in ("slug", "scan", "prompt"))
    assert all(isinstance(each, str) for name in ("prompt_tokens", "transcoder_list") for each in metadata[name])
    assert isinstance(metadata["node_threshold"], float) and metadata["schema_version"] == 1
    q = graph["qParams"]
    assert [type(q[name]) for name in ("pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos")] == [
        list, list, str, str, str,
    ]  # fmt: skip
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    for node in graph["nodes"]:
        for name, types in NODE_FIELDS.items():
            assert type(node[name]) in types, (name, node[name])
        assert node["feature_type"] in FEATURE_TYPES and 0 <= node["ctx_idx"] < len(metadata["prompt_tokens"])
    for link in graph["links"]:
        assert {link["source"], link["target"]} <= set(ids) and isinstance(link["weight"], float)


def test_ids_and_pairs_of_nodes_are_circuit_tracers(model):
    graph = attribute(model, PROMPT, ANSWERS[1], transcoders("topk", model.args.dim).items(), 1)
    latent = Node("latent", 2, 5, 7, 1.5, "layers.2.mlp_out")
    ids = [node_id(n) for n in (latent, graph.nodes[0], latent._replace(kind="error", index=-1), graph.nodes[-1])]
    assert ids == ["2_7_5", "E_276_0", "2_-1_5", "4_40_5"]
    drawn = graph_json(graph, prune(graph, 1.0, 1.0), {}, " a", 0.25, {})
    by_id = {node["node_id"]: node for node in drawn["nodes"]}
    pairs = set()
    for node in by_id.values():
        if node["feature_type"] == "cross layer transcoder":
            layer, index, _ = map(int, node["node_id"].split("_"))
            assert node["feature"] == (layer + index) * (layer + index + 1) // 2 + index
            pairs.add((node["jsNodeId"], layer, index))
    assert len({js for js, *_ in pairs}) == len(pairs)
    logit = by_id["4_40_5"]
    assert logit["clerp"] == 'Output " a" (p=0.250)' and logit["is_target_logit"] and logit["token_prob"] == 0.25
    row = {int(i): n for n, i in enumerate(graph.targets)}[len(graph.nodes) - 1]
    weights = {link["source"]: link["weight"] for link in drawn["links"] if link["target"] == "4_40_5"}
    for i, node in enumerate(graph.nodes[:-1]):
        assert weights.get(node_id(node), 0) == pytest.approx(float(graph.edges[row, i]), rel=1e-5)


# ---- the command


@pytest.fixture(scope="module")
def suite(model, tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    members = [*transcoders("jumprelu, relu, skip", model.args.dim).values()]
    members += residual_saes(model, "layers.0.resid_post", "layers.1.resid_post")
    for i, sae in enumerate(members):
        site = sae.info.get("site") or f"layers.{i}.ffn_norm"
        name = f"layers.{i}.transcoder" if sae.kind.target_site else site
        (folder / name).mkdir()
        info = {"site": site, "begin_of_text": True, "model_dir": str(tiny_model_dir)}
        save_sae(sae, folder / name / "sae.pth", info)
        text = {"certainty": 1.0, "common_semantic": f"words of {name}"}
        names = "\n".join(f"{latent}: {json.dumps(text)}" for latent in range(N_LATENTS))
        (folder / name / "sae.meaning_a.yaml").write_text(names)
    return folder


def printed(capsys, *words: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["latent_circuits.py", *map(str, words)])
        script.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["saes"], ["saes", "--baseline_prompt", "hello a"]], ids=" ".join)
def test_a_graph_in_files_and_in_the_terminal(command, suite, tiny_model_dir, tmp_path, capsys):
    words = [*command, "--suite_dir", suite, "--prompt", "hello the", "--output_dir", tmp_path / "out"]
    text = printed(capsys, *words, "--other_answer", " a", "--validated", "8")
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80 and "words of layers." in text and "taken away, attention held" in text
    (path,) = (path for path in (tmp_path / "out").glob("*.json") if path.name != "graph-metadata.json")
    graph = json.loads(path.read_text(encoding="utf-8"))
    check_schema(graph)
    assert path.stem == graph["metadata"]["slug"] and re.fullmatch(r"hello-the-.*minus-a(-saes)?", path.stem)
    assert graph["metadata"]["other_answer"] == " a"
    assert graph["metadata"]["prompt_tokens"][0] == "<|begin_of_text|>"
    assert graph["metadata"]["validation"][0]["change"] == "taken away"
    assert any(node["clerp"].startswith("words of layers.") for node in graph["nodes"])
    listed = json.loads((tmp_path / "out" / "graph-metadata.json").read_text())
    assert [each["slug"] for each in listed["graphs"]] == [path.stem]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "latent-card" in path.with_suffix(".html").read_text(encoding="utf-8")
    printed(capsys, *words, "--other_answer", " a", "--validated", "2")  # again: listed once
    assert len(json.loads((tmp_path / "out" / "graph-metadata.json").read_text())["graphs"]) == 1


REFUSALS = [
    ([], {"suite_dir": "nowhere"}, "There is no SAE in nowhere/*/sae.pth"),
    ([], {"prompt": ""}, "The prompt is empty"),
    ([], {"answer": "xyz"}, "The answer 'xyz' is 3 tokens"),
    ([], {"answer": " a", "other_answer": " a"}, "The answer is ·a itself"),
    ([], {"baseline_prompt": "hello a"}, "--baseline_prompt belongs to the command saes"),
    ([], {"ig_steps": 5}, "--ig_steps belongs to the command saes"),
    (["saes"], {"baseline_prompt": "hello"}, "The prompts do not align"),
    (["saes"], {"sites": "layers.2.*"}, "has no SAE at layers.2.*; it has layers.0.resid_post, layers.1.resid_post"),
    ([], {"prompt": "12 " * 9000}, "would take"),
]


@pytest.mark.parametrize("command, options, sentence", REFUSALS, ids=[each[2][:40] for each in REFUSALS])
def test_bad_input_is_refused_in_a_sentence(command, options, sentence, suite, tmp_path, capsys):
    options = {"suite_dir": suite, "prompt": "hello the", "output_dir": tmp_path / "out"} | options
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.raises(InputError) as refused:
        printed(capsys, *command, *words)
    assert sentence in str(refused.value) and not (tmp_path / "out").exists()


def test_suites_that_do_not_fit_together(suite, tmp_path):
    found = find_suite(str(suite))
    assert list(found.transcoders) == [0, 1, 2] and list(found.saes) == ["layers.0.resid_post", "layers.1.resid_post"]
    for name, info in {
        "a": {"site": "layers.1.resid_post", "begin_of_text": True},
        "b": {"site": "layers.1.resid_mid", "begin_of_text": True},
        "c": {"site": "layers.1.attention_out", "begin_of_text": True},  # not used
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "sae.pth").touch()
        write_json(tmp_path / name / "sae.json", info)
    two = find_suite(str(tmp_path))
    assert list(two.saes) == ["layers.1.resid_mid", "layers.1.resid_post"] and two.begin_of_text
    with pytest.raises(InputError, match="are both of layer 1; name one with --sites"):
        two.saes_at(["layers.*"])
    write_json(tmp_path / "b" / "sae.json", {"site": "layers.1.resid_post", "begin_of_text": True})
    with pytest.raises(InputError, match="are both at layers.1.resid_post; keep one"):
        find_suite(str(tmp_path))
    write_json(tmp_path / "b" / "sae.json", {"site": "layers.0.resid_post", "begin_of_text": False})
    with pytest.raises(InputError, match="name a suite of one kind"):
        find_suite(str(tmp_path))
    write_json(tmp_path / "b" / "sae.json", {})
    with pytest.raises(InputError, match="names no site"):
        find_suite(str(tmp_path))


# ---- beside circuit-tracer itself

PEERS = PROJECT_DIR / "data" / "circuit-tracer" / "bin" / "python"
needs_circuit_tracer = pytest.mark.skipif(
    not PEERS.exists(), reason="no circuit-tracer: see benchmarks/requirements-circuit-tracer.txt"
)


@pytest.mark.slow
@needs_circuit_tracer
def test_the_same_graph_as_circuit_tracer():
    """The benchmark stops at other latents, or edges or influences in another order."""
    options = [
        "--rounds",
        "1",
        "--n_latents",
        "256",
        "--k",
        "4",
        "--prompt",
        "The names",
        "--least_correlation",
        "0.9999",
    ]
    done = subprocess.run([PEERS, "benchmarks/circuits.py", *options], cwd=PROJECT_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| edges | ") == done.stdout.count("| circuit-tracer | ") == 1


@pytest.mark.slow
@needs_circuit_tracer
def test_its_frontend_reads_our_json(suite, tmp_path, capsys):
    printed(capsys, "--suite_dir", suite, "--prompt", "hello the", "--output_dir", tmp_path, "--validated", "2")
    (path,) = tmp_path.glob("hello-the*.json")
    read = (
        "import sys; from circuit_tracer.frontend.graph_models import Model, Node; "
        "graph = Model.model_validate_json(open(sys.argv[1], encoding='utf-8').read()); "
        "nodes = [node for node in graph.nodes if node.feature_type == 'cross layer transcoder']; "
        "places = [(int(node.layer), int(node.node_id.split('_')[1]), node.ctx_idx) for node in nodes]; "
        "made = [Node.feature_node(layer, position, latent) for layer, latent, position in places]; "
        "same = lambda node: (node.node_id, node.feature, node.jsNodeId); "
        "assert nodes and list(map(same, made)) == list(map(same, nodes))"
    )
    done = subprocess.run([PEERS, "-c", read, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

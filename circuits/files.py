"""A graph as JSON for circuit-tracer's frontend and Neuronpedia.

Fields as in circuit_tracer/frontend/graph_models.py and Neuronpedia's apps/webapp/app/api/graph/graph-schema.json.
Nodes are called LAYER_LATENT_POSITION, E_TOKEN_POSITION and, with the number of layers + 1, LAYER_TOKEN_POSITION of the
logit. Errors are LAYER_-1_POSITION, as circuit-tracer writes since its issue 78; before, they were 0_LAYER_POSITION,
which is also the name of a latent in layer 0. Beyond those fields, nodes have `effect`, and metadata has `scores` and
`validation`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuits.graph import Graph, Node
from circuits.pruning import Kept
from pipeline.files import read_json, write_json

_TYPES = {
    "latent": "cross layer transcoder",  # what frontends call every latent
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}
METADATA = "graph-metadata.json"


def slug_of(*texts: str) -> str:
    """Texts as a file's name: lower-case words with hyphens."""
    return re.sub(r"\W+", "-", " ".join(texts).lower()).strip("-")[:80].strip("-") or "graph"


def node_id(node: Node) -> str:
    if node.kind == "embedding":
        return f"E_{node.index}_{node.position}"
    return f"{node.layer + (node.kind == 'logit')}_{node.index}_{node.position}"


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _feature(node: Node) -> int:
    """Of a latent the Cantor pairing of its layer and number, which frontends look its details up by."""
    if node.kind == "latent":
        total = node.layer + node.index
        return total * (total + 1) // 2 + node.index
    return node.position if node.kind == "embedding" else node.index


def _node(node: Node, cumulative: float, effect: float, text: str, probability: float) -> dict[str, Any]:
    """text: shown beside the node."""
    layer, _, _ = node_id(node).partition("_")
    begin = {"logit": "L", "embedding": "E"}.get(node.kind, layer)
    # Latents of one number share a jsNodeId at all positions; everything else is told apart by position.
    end = 0 if node.kind == "latent" else node.position
    return {
        "node_id": node_id(node),
        "feature": _feature(node),
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "token_prob": probability if node.kind == "logit" else 0.0,
        "is_target_logit": node.kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{begin}_{node.index}-{end}",
        "clerp": text,
        "influence": None if node.kind == "logit" else _short(cumulative),
        "activation": _short(node.activation) if node.kind == "latent" else None,
        "effect": None if node.kind == "logit" else _short(effect),
    }


def graph_json(
    graph: Graph, kept: Kept, names: Mapping[Node, str], token: str, probability: float, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The kept part of a graph. names: of latents; token, probability: the answer's."""
    texts = {**names, graph.nodes[-1]: f'Output "{token}" (p={probability:.3f})'}
    numbers = kept.nodes.nonzero().flatten().tolist()
    nodes = [
        _node(node, float(kept.cumulative[i]), float(graph.effects[i]), texts.get(node, ""), probability)
        for i, node in ((i, graph.nodes[i]) for i in numbers)
    ]
    links = []
    for row, source in kept.edges.nonzero().tolist():
        target = int(graph.targets[row])
        ids = {"source": node_id(graph.nodes[source]), "target": node_id(graph.nodes[target])}
        links.append(ids | {"weight": _short(float(graph.edges[row, source]))})
    nothing = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": dict(metadata), "qParams": nothing, "nodes": nodes, "links": links}


def write_graph(path: Path, graph: Mapping[str, Any]) -> None:
    """SLUG.json, and its entry in graph-metadata.json, circuit-tracer's list of the graphs of a folder."""
    write_json(path, graph)
    index = path.with_name(METADATA)
    known: Sequence[dict] = read_json(index, "remove it.")["graphs"] if index.exists() else []
    others = [each for each in known if each.get("slug") != graph["metadata"]["slug"]]
    write_json(index, {"graphs": [*others, graph["metadata"]]})

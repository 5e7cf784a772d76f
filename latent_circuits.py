"""Which latents cause an answer, and one another: an attribution graph of one prompt, checked against the model.

Reads   SUITE_DIR/*/sae.pth: transcoders of MLPs (sites layers.N.ffn_norm -> layers.N.mlp_out), or SAEs of the residual
        stream, with the names and tables beside them; MODEL_DIR
Writes  OUTPUT_DIR: SLUG.html, the graph to look through; SLUG.json, the same for circuit-tracer's frontend and
        Neuronpedia; SLUG.png, predicted and measured changes; graph-metadata.json. SLUG is of prompt and answers
Method  transcoders: linear attribution with attention patterns and norms frozen, Ameisen et al. 2025, "Circuit
        Tracing", transformer-circuits.pub (circuits/replacement.py). saes: integrated gradients, Marks et al. 2024,
        arXiv:2403.19647 (circuits/integrated.py). Pruned by influence (circuits/pruning.py); then the strongest latents
        are taken away, and doubled, in the model itself (circuits/validation.py)
Cost    a backward pass per batch of latents: for SmolLM2, 30 transcoders and 6 tokens 20 seconds of a core

    python latent_circuits.py --suite_dir data/suite --prompt "The capital of Japan is" --output_dir graphs
    python latent_circuits.py --suite_dir data/suite --prompt "The capital of Japan is" --answer " Tokyo" \\
        --other_answer " Paris" --output_dir graphs
    python latent_circuits.py saes --suite_dir data/suite --prompt "The capital of Germany is" --output_dir graphs \\
        --baseline_prompt "The capital of Italy is"
"""

from pipeline.options import Count, Share, parse_constants
from pipeline.run import run

SUITE_DIR: str  # folder of transcoders or SAEs: NAME/sae.pth
PROMPT: str  # the text; begin-of-text comes before it if the suite was trained so
OUTPUT_DIR: str  # folder for the graph's files
MODEL_DIR: str | None = None  # Llama folder; the suite's own when not given
ANSWER: str | None = None  # a single token, with the space before it; the likeliest next token when not given
OTHER_ANSWER: str | None = None  # a token whose logit is subtracted; the vocabulary's mean when not given
BASELINE_PROMPT: str | None = None  # saes: a prompt of as many tokens to integrate from; zero latents when not given
SITES: list[str] = ["layers.*.resid_post"]  # saes: which SAEs, by site, one per layer; * stands for any layer
IG_STEPS: Count = 10  # saes: steps of the integration
NODE_SHARE: Share = 0.8  # keep the fewest nodes that hold this share of all influence
EDGE_SHARE: Share = 0.98  # keep the fewest edges that carry this share of what passes between these nodes
MAX_LATENTS: Count = 8192  # latents whose inputs are computed: of the highest influence; saes: the largest effects
VALIDATED: Count = 64  # latents taken away and doubled in the model, those of the largest effects
TOP: Count = 20  # nodes in the table
DEVICE = "auto"  # auto: a GPU if there is one

_COMMANDS = {
    "transcoders": "the graph of transcoder latents, by linear attribution",
    "saes": "the graph of the latents of residual SAEs, by integrated gradients",
}

if __name__ == "__main__":
    run(lambda: parse_constants(globals(), commands=_COMMANDS))  # before the slow imports: --help answers at once

import resource
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from circuits import integrated, replacement, validation
from circuits.files import graph_json, slug_of, write_graph
from circuits.graph import Answer, Graph, Node
from circuits.page import MOST_EDGES, write_page
from circuits.pruning import Kept, Scores, prune, scores
from circuits.suite import Suite, find_suite
from circuits.validation import Agreement, validate
from latents.cards import card_html
from latents.index import LatentIndex
from latents.origin import source_of
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import model_name
from llama_3.generation import check_context
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from microscope import shown
from microscope.prompts import Prompt, answer_ids, check_aligned, check_pattern_size, token_text
from pipeline.errors import InputError
from pipeline.files import require_writable
from pipeline.progress import duration, gb
from sae import SparseAutoencoder
from serving.steered_model import latent_meanings, pick_device, sae_of


class Session(NamedTuple):
    """What was opened."""

    model: Transformer
    model_dir: str
    tokenizer: Tokenizer
    paths: Mapping[int, Path]  # layer -> its transcoder or SAE
    first: int  # the first position that these were trained on: 1 after begin-of-text

    def text(self, token_id: int) -> str:
        return token_text(self.tokenizer, token_id)

    def prompt(self, text: str) -> Prompt:
        """As the suite's sentences were read. Raises InputError for an empty text, and one that is too long."""
        ids = self.tokenizer.encode(text, bos=self.first > 0)
        if len(ids) == self.first:
            raise InputError("The prompt is empty; write one.")
        check_context(self.model, len(ids), 1)
        check_pattern_size(self.model, self.model.args.n_layers, len(ids))
        return Prompt(ids, [self.text(each) for each in ids])

    def saes(self) -> Iterator[tuple[int, SparseAutoencoder]]:
        """Layers and what belongs to them, loaded one at a time."""
        for layer, path in self.paths.items():
            yield layer, sae_of(str(path), self.model, self.model_dir, str(self.model.device))


def open_session(config: Any, suite: Suite) -> Session:
    """Raises InputError for a suite without what the command needs, or of another model."""
    paths = suite.saes_at(config.sites) if config.command == "saes" else suite.transcoders
    if not paths:
        raise InputError(
            f"{suite.folder} has no transcoder from a layer's ffn_norm to its mlp_out; train some with sae_suite.py, "
            "or write saes for a graph of residual SAEs."
        )
    sources = [source_of(path) for path in paths.values()]
    model_dir = config.model_dir or sources[0].model_dir(option="--model_dir")
    for source in sources:
        source.check_model(model_dir, "--model_dir")
    device = pick_device(config.device)
    # Unpacked: the packed layers have no gradient.
    model, tokenizer = load_model(model_dir, device, torch.float32), load_tokenizer(model_dir)
    begins = tokenizer.starts_with_bos if suite.begin_of_text is None else suite.begin_of_text
    if begins and tokenizer.bos_id is None:
        raise InputError(f"{suite.folder} was trained after begin-of-text, which {model_dir} does not have.")
    return Session(model, model_dir, tokenizer, paths, int(begins))


def pick_answer(session: Session, prompt: Prompt, given: str | None, other: str | None) -> tuple[Answer, float]:
    """What is explained, and the probability of the answer."""
    with torch.inference_mode():
        p = session.model(prompt.batch(session.model), last_only=True)[0, -1].softmax(-1)
    ids = [None if text is None else answer_ids(session.tokenizer, [text])[0] for text in (given, other)]
    token = int(p.argmax()) if ids[0] is None else ids[0]
    if token == ids[1]:
        raise InputError(f"The answer is {session.text(token)} itself; name another token with --other_answer.")
    return Answer(token, ids[1]), float(p[token])


def build(session: Session, prompt: Prompt, answer: Answer, config: Any) -> Graph:
    if config.command == "transcoders":
        transcoders = session.saes()
        return replacement.attribute(session.model, prompt, answer, transcoders, session.first, config.max_latents)
    baseline = session.prompt(config.baseline_prompt) if config.baseline_prompt else None
    if baseline:
        check_aligned(prompt, baseline)
    saes, options = [sae for _, sae in session.saes()], (baseline, config.ig_steps, config.max_latents)
    return integrated.attribute(session.model, prompt, answer, saes, session.first, *options)


# ---- what is shown


def say(*lines: str) -> None:
    """Print lines, each wrapped."""
    print("\n".join(textwrap.fill(line, shown.WIDTH) for line in lines))


def name_latents(session: Session, latents: Sequence[Node]) -> dict[Node, str]:
    """Meanings of those that have one."""
    meanings = {layer: latent_meanings(str(session.paths[layer]), unusable=[]) for layer in {n.layer for n in latents}}
    return {node: meanings[node.layer][node.index] for node in latents if node.index in meanings[node.layer]}


def make_cards(session: Session, latents: Sequence[Node]) -> dict[tuple[int, int], str]:
    """(layer, latent) -> its card's HTML."""
    cards: dict[tuple[int, int], str] = {}
    for layer in sorted({node.layer for node in latents}):
        index = LatentIndex(session.paths[layer], session.tokenizer, session.model)
        for latent in sorted({node.index for node in latents if node.layer == layer}):
            cards[layer, latent] = card_html(index.card(latent))
    return cards


def show_graph(graph: Graph, kept: Kept, found: Scores) -> None:
    n_latents = int(graph.which("latent").sum())
    say(
        f"{n_latents:,} latents fire; the inputs of {len(graph.targets) - 1:,} were computed.",
        f"Replacement score {found.replacement:.2f}: the share of what reaches the answer that comes from tokens "
        f"through latents alone. Completeness score {found.completeness:.2f}: the share of inputs that is no error.",
        f"Kept: {int(kept.nodes.sum()):,} of {len(graph.nodes):,} nodes, with {kept.node_share:.0%} of the influence, "
        f"and {int(kept.edges.sum()):,} edges, with {kept.edge_share:.0%} of what these nodes add to one another.",
    )


def node_table(prompt: Prompt, graph: Graph, kept: Kept, names: Mapping[Node, str], n: int) -> str:
    rows = []
    for i in graph.strongest(n, "latent", "error", "embedding"):
        node = graph.nodes[i]
        name = {"latent": f"{node.layer}.{node.index}", "error": f"{node.layer}, error"}.get(node.kind, "embedding")
        token = shown.cut(f"{node.position} {prompt.tokens[node.position]}", 16)
        rows.append([name, token, float(graph.effects[i]), float(kept.influence[i]), names.get(node, "")])
    return shown.table(["node", "on", "adds", "influence", "meaning"], rows, left=2)


def agreement_table(agreements: Sequence[Agreement]) -> str:
    rows = [[each.name, each.pearson, each.spearman, each.slope] for each in agreements]
    return shown.table([f"{len(agreements[0].measured)} latents", "Pearson", "Spearman", "slope"], rows)


def about(
    config: Any, session: Session, prompt: Prompt, slug: str, found: Scores, agreements: Sequence[Agreement]
) -> dict[str, Any]:
    """The graph's metadata."""
    validated = [
        {"change": a.name, "latents": len(a.measured), "pearson": a.pearson, "spearman": a.spearman, "slope": a.slope}
        for a in agreements
    ]
    return {
        "slug": slug,
        "scan": model_name(session.model_dir),
        "transcoder_list": [path.parent.name for path in session.paths.values()],
        "prompt_tokens": [session.tokenizer.decode([token]) for token in prompt.ids],
        "prompt": config.prompt,
        "other_answer": config.other_answer,  # None: the mean over the vocabulary
        "baseline_prompt": config.baseline_prompt,
        "node_threshold": config.node_share,
        "schema_version": 1,
        "info": {"generator": {"name": "latent_circuits.py"}},
        "generation_settings": {"method": config.command, "max_feature_nodes": config.max_latents},
        "pruning_settings": {"node_threshold": config.node_share, "edge_threshold": config.edge_share},
        "scores": found._asdict(),
        "validation": validated,
    }


def main() -> None:
    config = parse_constants(globals(), commands=_COMMANDS)
    for name in ("baseline_prompt", "sites", "ig_steps") if config.command == "transcoders" else ():
        if getattr(config, name) != globals()[name.upper()]:
            raise InputError(f"--{name} belongs to the command saes; leave it out, or write saes.")
    folder = Path(config.output_dir)
    require_writable(folder / "graph.json")
    session = open_session(config, find_suite(config.suite_dir))
    prompt = session.prompt(config.prompt)
    answer, probability = pick_answer(session, prompt, config.answer, config.other_answer)
    started = time.perf_counter()
    say(f"{' '.join(prompt.tokens)} -> {session.text(answer.token)} (probability {probability:.3f})")
    missing = [str(i) for i in range(session.model.args.n_layers) if i not in session.paths]
    if missing and config.command == "transcoders":
        say(f"Layers without a transcoder, whose MLPs are error: {', '.join(missing)}.")

    graph = build(session, prompt, answer, config)
    kept, found = prune(graph, config.node_share, config.edge_share), scores(graph)
    latents = [graph.nodes[i] for i in kept.nodes.nonzero().flatten().tolist() if graph.nodes[i].kind == "latent"]
    names = name_latents(session, latents)
    show_graph(graph, kept, found)
    say("", "What adds most to the answer's logit, on all paths; influence: share of all paths back from the answer")
    print(node_table(prompt, graph, kept, names, config.top) + "\n")
    chosen = graph.strongest(config.validated, "latent")
    if not chosen:
        raise InputError("No latent has an effect on this answer; take another prompt, or a suite of more layers.")
    agreements = validate(session.model, prompt, answer, graph, chosen)
    print(agreement_table(agreements))
    say(validation.verdict(agreements))

    texts = [session.tokenizer.decode([token]) for token in (answer.token, answer.other) if token is not None]
    slug = slug_of(config.prompt[:40], " minus".join(texts), config.command if config.command == "saes" else "")
    told = about(config, session, prompt, slug, found, agreements)
    drawn = graph_json(graph, kept, names, texts[0], probability, told)
    write_graph(folder / f"{slug}.json", drawn)
    validation.draw(folder / f"{slug}.png", agreements, f"{config.prompt} …")
    links = sorted(drawn["links"], key=lambda link: -abs(link["weight"]))[:MOST_EDGES]  # what a browser can draw
    write_page(folder / f"{slug}.html", {**drawn, "links": links}, make_cards(session, latents))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\nWritten to {folder / slug}.html, .json, .png.")
    print(f"It took {duration(time.perf_counter() - started)} and {gb(peak)} of memory.")


if __name__ == "__main__":
    run(main)

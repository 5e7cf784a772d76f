"""Whether a graph predicts what the model does: its strongest nodes are taken away, or doubled, in the model itself.

Taking node s away takes its vector off the activation at its site and position; doubling it adds the vector once more.
The model then computes everything after that anew. The graph predicts that the logit changes by -E[s], or E[s].
With attention patterns held as they were, what remains of the difference is due to norms, MLPs and gates.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.graph import Answer, Graph, batches
from llama_3.model import Transformer
from microscope.prompts import Prompt
from microscope.sweeps import Sweep
from pipeline.figures import new_figure, save_figure
from pipeline.progress import progress_bar

# A graph predicts if half of the variance is explained, not by a few large effects alone, and effects are at most twice
# too large or too small.
LEAST_PEARSON, LEAST_SPEARMAN = 0.7, 0.5
SLOPES = (0.5, 2.0)


class Agreement(NamedTuple):
    """Predicted changes of the logit against measured ones."""

    name: str
    predicted: Tensor  # (n,)
    measured: Tensor  # (n,)

    @property
    def pearson(self) -> float:
        return _correlation(self.predicted, self.measured)

    @property
    def spearman(self) -> float:
        return _correlation(*(each.argsort().argsort().float() for each in (self.predicted, self.measured)))

    @property
    def slope(self) -> float:
        """Of measured changes over predicted ones, by least squares through the origin."""
        return float((self.predicted @ self.measured) / self.predicted.square().sum().clamp(min=1e-30))

    @property
    def predicts(self) -> bool:
        correlates = self.pearson >= LEAST_PEARSON and self.spearman >= LEAST_SPEARMAN
        return correlates and SLOPES[0] <= self.slope <= SLOPES[1]


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def validate(
    model: Transformer, prompt: Prompt, answer: Answer, graph: Graph, chosen: Sequence[int]
) -> list[Agreement]:
    """Nodes `chosen` taken away, doubled, and taken away with attention held."""
    effects = graph.effects[list(chosen)]
    with progress_bar(total=3 * len(chosen), desc="Validation", unit="change") as bar:
        change = lambda factor, hold: _changes(model, prompt, answer, graph, chosen, factor, hold, bar.update)
        return [
            Agreement("taken away", -effects, change(-1.0, False)),
            Agreement("doubled", effects, change(1.0, False)),
            Agreement("taken away, attention held", -effects, change(-1.0, True)),
        ]


def _changes(
    model: Transformer, prompt: Prompt, answer: Answer, graph: Graph, chosen: Sequence[int], factor, hold, done
) -> Tensor:
    """(n,) how the logit changes when `factor` times the vector of each node is added."""
    first = min(graph.nodes[i].position for i in chosen)
    found = torch.zeros(len(chosen))
    with contextlib.ExitStack() as stack:
        sweep = Sweep(model, prompt, first)
        if hold:
            sites = [f"layers.{i}.attention_pattern" for i in range(model.args.n_layers)]
            with torch.inference_mode():
                patterns = model.activations(prompt.batch(model), sites)
            for site, pattern in patterns.items():
                held = lambda x, pattern=pattern[:, :, first:]: pattern.expand_as(x)
                stack.enter_context(model.intervene(site, held))
        for site in sorted({graph.nodes[i].site for i in chosen}):
            here = [n for n, i in enumerate(chosen) if graph.nodes[i].site == site]
            (before,) = answer.logit(sweep.logits(site, lambda x: x, 1, last_only=True)[:, -1]).tolist()
            for batch in batches(here, sweep.n_rows):
                rows = [chosen[n] for n in batch]
                vectors = factor * graph.vectors[rows].to(model.device)
                positions = [graph.nodes[i].position - first for i in rows]

                def add(x: Tensor, vectors: Tensor = vectors, positions: list[int] = positions) -> Tensor:
                    x[torch.arange(len(positions)), positions] += vectors.type_as(x)
                    return x

                logits = sweep.logits(site, add, len(rows), last_only=True)[:, -1]
                found[list(batch)] = answer.logit(logits).float().cpu() - before
                done(len(batch))
    return found


def verdict(agreements: Sequence[Agreement]) -> str:
    """Whether the graph predicts what taking nodes away does, in plain words."""
    first = agreements[0]
    numbers = f"correlation {first.pearson:.2f}, of ranks {first.spearman:.2f}, slope {first.slope:.2f}"
    if first.predicts:
        return f"The graph predicts what taking its strongest latents away does to the model ({numbers})."
    return (
        f"This graph does not predict what taking its strongest latents away does to the model ({numbers}; needed: "
        f"{LEAST_PEARSON}, {LEAST_SPEARMAN}, {SLOPES[0]} to {SLOPES[1]}). Do not rely on it."
    )


def draw(path: str, agreements: Sequence[Agreement], title: str) -> None:
    """A PNG: measured changes over predicted ones, with the line on which they would be the same."""
    figure = new_figure(5.5, 5)
    axes = figure.subplots()
    for each, marker in zip(agreements, "ox^", strict=False):
        label = f"{each.name}: r {each.pearson:.2f}, slope {each.slope:.2f}"
        axes.scatter(each.predicted, each.measured, s=18, marker=marker, alpha=0.7, label=label)
    most = float(max(each.predicted.abs().max() for each in agreements))
    axes.plot([-most, most], [-most, most], color="grey", linewidth=0.8, zorder=0)
    axes.set(xlabel="predicted change of the logit", ylabel="measured change", title=title)
    axes.legend(fontsize=8)
    save_figure(figure, path)

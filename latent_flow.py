"""Which latents of an SAE predict which of the next SAE in depth, and which mean the same all the way.

Reads   SUITE_DIR (sae_suite.py): its SAEs, their names, the activations that they encode
Writes  beside each SAE but the last of its kind NAME.flow.parquet: the latents of the next SAE that go best with each
        latent; SUITE_DIR/flow.KIND.md and .png: the tables that it prints and a picture, for each kind of SAE
Method  both SAEs encode the same TOKENS captured tokens; firings and common firings of all pairs are counted, and pairs
        compared by phi, the correlation of firing: P(next | latent) alone favours latents that always fire, pointwise
        mutual information those that hardly do. Chance: the same with the next SAE's tokens moved by half of all. Two
        latents are partners where each is the other's best and phi is at least LEAST_PHI; partner after partner is a
        chain: the same meaning followed through depth. The cosines of what partners read (encoder) and write (decoder)
        are measured beside it and decide nothing. Counts between neighbouring layers: Balcells et al. 2024,
        arXiv:2410.08869; decoder directions followed by cosine: Laptev et al. 2025, arXiv:2502.03032
Cost    encodes TOKENS tokens per SAE, 10 s for 2,048 latents on a core; memory: 4 bytes x k per token, twice

    python latent_flow.py --suite_dir data/suite
"""

from typing import Any, NamedTuple

from pipeline.options import Count, Share, parse_constants
from pipeline.run import run

SUITE_DIR = "data/suite"  # the suite
TOKENS: Count = 2**17  # captured tokens to count on, from the start of the seeded order
LEAST_FIRINGS: Count = 20  # latents that fire on fewer tokens are left out
KEPT: Count = 5  # latents of the next SAE kept per latent
LEAST_PHI: Share = 0.5  # the lowest phi at which two latents that are each other's best count as partners

_CHAINS, _PREDICTIONS = 20, 15  # shown
_RARE = 0.02  # share of tokens; a latent that fires more often is not worth predicting
_OFTEN = 100  # firings of a latent that predicts, so that its probability means something
_OTHER_DIRECTION = 0.2  # cosine below which two latents write different things
_ENCODED_AT_ONCE = 4096  # tokens
_NAME_LENGTH = 28  # characters, in the picture
_NO_NAME = "no name"

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from latents.coactivation import FLOW, associate, firings, stacked
from latents.meanings import best_meanings
from latents.pages import write_text
from latents.suites import Member, by_kind, trained
from pipeline.activation_store import ActivationStore
from pipeline.errors import InputError
from pipeline.figures import new_figure, save_figure
from pipeline.files import require_writable
from pipeline.progress import progress_bar
from sae import load_sae_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# ---- firing latents


class Named(NamedTuple):
    """An SAE of the suite, and what its latents are called."""

    member: Member
    names: dict[int, str]

    def name(self, latent: int) -> str:
        return self.names.get(latent, _NO_NAME)


class Encoded(NamedTuple):
    """What fired."""

    named: Named
    tokens: Tensor  # (n_tokens, width) int32, the latents of each token, -1 where fewer fired; on the CPU
    reads: Tensor  # (n_latents, d_model), what its encoder reads, of unit length
    writes: Tensor  # likewise, its directions

    @property
    def n_latents(self) -> int:
        return len(self.reads)


def encode(member: Member, store: ActivationStore, n_tokens: int, device: str) -> Encoded:
    """Encode the first n_tokens tokens of the store. Raises InputError if they are not the SAE's."""
    sae = load_sae_model(member.files.path, device)
    if (sae.info.get("site"), sae.d_model) != (member.reads, store.d_model):
        raise InputError(
            f"{member.files.path} reads {sae.info.get('site')}, d_model {sae.d_model}, but {store.folder} holds "
            f"{member.reads}, d_model {store.d_model}; put each SAE into the folder of its name."
        )
    parts, left = [], n_tokens
    for i in range(len(store.records)):
        store.verify(i)
        for acts in store.shard(i).acts[:left].split(_ENCODED_AT_ONCE):
            values, latents = sae.encode(acts.to(device))
            parts.append(latents.int().masked_fill_(values == 0, -1).cpu())
            left -= len(acts)
        if left == 0:
            break
    names = {latent: meaning.text for latent, meaning in best_meanings(member.files.path, sae.n_latents, []).items()}
    reads, writes = (F.normalize(it.float(), dim=1).cpu() for it in (sae.encoder.weight, sae.decoder.weight.t()))
    return Encoded(Named(member, names), stacked(parts), reads, writes)


def open_stores(members: Sequence[Member]) -> list[ActivationStore]:
    """The activations that they encode. Raises InputError unless all are of the same tokens in the same order."""
    stores = [ActivationStore(member.activations) for member in members]
    first = stores[0]
    for store in stores[1:]:
        if rows_of(store) != rows_of(first):
            raise InputError(
                f"{store.folder} and {first.folder} do not hold the same tokens in the same order; capture the sites "
                "of a suite in one run."
            )
    return stores


def rows_of(store: ActivationStore) -> list[Any]:
    """Which token stands in which row."""
    source = store.source
    shards = [(record["first_sentence_idx"], record["n_sentences"], record["n_tokens"]) for record in store.records]
    return [source.model, source.dataset, source.begin_of_text, source.max_tokens, shards]


# ---- from one SAE to the next


class Step(NamedTuple):
    """The latents of an SAE beside those of the next. Arrays have an entry per latent, or (n_latents, kept)."""

    before: Named
    after: Named
    n_tokens: int
    fired: np.ndarray
    after_fired: np.ndarray  # per latent of `after`
    latents: np.ndarray  # (n_latents, kept), of `after`, highest phi first; -1: no further one
    both: np.ndarray
    phi: np.ndarray
    mutual: np.ndarray  # (n_latents, kept) bool
    read_cosine: np.ndarray
    read_nearest: np.ndarray  # the latent of `after` with the highest cosine of what it reads
    cosine: np.ndarray  # of what they write
    nearest: np.ndarray
    chance: np.ndarray  # the highest phi where there is nothing in common

    def partners(self, least_phi: float) -> dict[int, int]:
        """Latent -> its partner in the next SAE."""
        best = np.flatnonzero(self.mutual[:, 0] & (self.phi[:, 0] >= least_phi))
        return dict(zip(best.tolist(), self.latents[best, 0].tolist(), strict=True))


def compare(before: Encoded, after: Encoded, n_kept: int, least_firings: int) -> Step:
    """The latents of an SAE beside the n_kept of the next that go best with each, of those that fire on least_firings
    tokens or more."""
    n, n_after = before.n_latents, after.n_latents
    found = associate(before.tokens, after.tokens, n, n_after, n_kept, least_firings)
    moved = after.tokens.roll(len(after.tokens) // 2, 0)
    chance = associate(before.tokens, moved, n, n_after, 1, least_firings).phi[:, 0]
    places = found.latents.clamp(min=0)
    reads = cosines(before.reads, after.reads, places)
    writes = cosines(before.writes, after.writes, places)
    mutual = (found.best_before[places] == torch.arange(n)[:, None]) & (found.latents >= 0)
    mutual[:, 1:] = False
    counts = firings(before.tokens, n), firings(after.tokens, n_after)
    columns = (*counts, found.latents, found.both, found.phi, mutual, *reads, *writes, chance)
    return Step(before.named, after.named, len(before.tokens), *(column.numpy() for column in columns))


def cosines(directions: Tensor, others: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of each direction with others[places], (n_latents, kept); and which of the others is nearest, (n_latents,)."""
    cosine = torch.stack([(directions * others[place]).sum(1) for place in places.t()], 1)
    return cosine, torch.cat([(part @ others.t()).argmax(1) for part in directions.split(1024)])


def write_flow(step: Step) -> None:
    """NAME.flow.parquet beside the first of the two SAEs."""
    latent, rank = np.nonzero(step.latents >= 0)
    after = step.latents[latent, rank]
    both = step.both[latent, rank]
    columns = {
        "latent": latent,
        "rank": rank,
        "next_sae": pa.array([step.after.member.name] * len(latent), pa.string()),
        "next_latent": after,
        "firings": step.fired[latent],
        "next_firings": step.after_fired[after],
        "both": both,
        "probability": both / np.maximum(step.fired[latent], 1),
        "phi": step.phi[latent, rank],
        "read_cosine": step.read_cosine[latent, rank],
        "cosine": step.cosine[latent, rank],
        "mutual": step.mutual[latent, rank],
    }
    types = {field.name: field.type for field in FLOW.schema}
    arrays = {name: pa.array(column, types[name]) for name, column in columns.items()}
    FLOW.write(step.before.member.files.beside(FLOW.suffix), arrays)


# ---- through all of them


class Chain(NamedTuple):
    """Partner after partner."""

    first: int  # number of the SAE in which it begins
    latents: list[int]  # one of each SAE

    def names(self, every: Sequence[Named]) -> list[str]:
        """What its latents are called, each name once, in order of depth."""
        named = [every[self.first + i].name(latent) for i, latent in enumerate(self.latents)]
        return list(dict.fromkeys(name for name in named if name != _NO_NAME))


def chains_of(partners: Sequence[dict[int, int]]) -> list[Chain]:
    """The chains, longest first, then by depth. partners: from each SAE to the next; each latent is at most one's."""
    found = []
    for i, step in enumerate(partners):
        continued = set(partners[i - 1].values()) if i else set()
        for start in sorted(step.keys() - continued):
            latents, j = [start], i
            while j < len(partners) and latents[-1] in partners[j]:
                latents.append(partners[j][latents[-1]])
                j += 1
            found.append(Chain(i, latents))
    return sorted(found, key=lambda chain: (-len(chain.latents), chain.first, chain.latents[0]))


class Prediction(NamedTuple):
    """A latent that says that a rare one of the next SAE fires, which has another name and writes something else."""

    step: Step
    latent: int
    after: int
    probability: float
    base: float  # share of all tokens on which the predicted latent fires
    cosine: float
    firings: int

    def in_words(self) -> str:
        before, after = self.step.before, self.step.after
        return (
            f"| {before.member.name} | {self.latent} {cell(before.name(self.latent))} | {self.after} "
            f"{cell(after.name(self.after))} | {self.probability:.2f} | {self.base:.4f} | {self.cosine:+.2f} | "
            f"{self.firings:,} |"
        )


def predictions_of(step: Step) -> list[Prediction]:
    """The surest of each latent that fires often."""
    found: dict[int, Prediction] = {}
    for latent, rank in np.argwhere((step.latents >= 0) & (step.fired >= _OFTEN)[:, None]).tolist():
        after, cosine = int(step.latents[latent, rank]), float(step.cosine[latent, rank])
        names = {step.before.name(latent), step.after.name(after)}
        base, n = step.after_fired[after] / step.n_tokens, int(step.fired[latent])
        if base <= _RARE and cosine < _OTHER_DIRECTION and len(names - {_NO_NAME}) == 2:
            probability = step.both[latent, rank] / n
            if latent not in found or probability > found[latent].probability:
                found[latent] = Prediction(step, latent, after, probability, base, cosine, n)
    return list(found.values())


# ---- tables


def cell(text: str) -> str:
    """A name inside a markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


class Row(NamedTuple):
    """A step in numbers."""

    names: str
    compared: int  # latents that fire often enough
    partners: float  # share of them
    phi: float  # median of the best
    chance: float  # 99th percentile of the best where there is nothing in common
    read_cosine: float  # median of the partners'; nan where there are none
    read_nearest: float  # share of partners that are also nearest in what they read
    cosine: float  # the same of what they write
    nearest: float


def row_of(step: Step, least_firings: int, least_phi: float) -> Row:
    often = step.fired >= least_firings
    partners = np.array(list(step.partners(least_phi)), dtype=np.int64)
    median = lambda values: float(np.median(values)) if len(values) else float("nan")
    share = lambda values: float(np.mean(values)) if len(values) else float("nan")
    after = step.latents[partners, 0]
    return Row(
        f"{step.before.member.layer} → {step.after.member.layer}",
        int(often.sum()),
        len(partners) / max(1, int(often.sum())),
        median(step.phi[often, 0]),
        float(np.quantile(step.chance[often], 0.99)) if often.any() else float("nan"),
        median(step.read_cosine[partners, 0]),
        share(step.read_nearest[partners] == after),
        median(step.cosine[partners, 0]),
        share(step.nearest[partners] == after),
    )


def tables(kind: str, every: Sequence[Named], steps: Sequence[Step], rows: Sequence[Row], chains: list[Chain]) -> str:
    named = [chain for chain in chains if chain.names(every)][:_CHAINS]
    predictions = sorted((p for step in steps for p in predictions_of(step)), key=lambda it: -it.probability)
    chain_lines = [
        f"| {every[chain.first].member.layer} to {every[chain.first + len(chain.latents) - 1].member.layer} | "
        f"{', '.join(map(str, chain.latents))} | {cell(' → '.join(chain.names(every)))} |"
        for chain in named
    ]
    return "\n".join(
        [
            f"# From layer to layer: {kind}",
            "",
            f"Counted on {steps[0].n_tokens:,} tokens. Partners: each is the other's best by phi. Chance: the best phi "
            "that 99 % of the latents stay below where there is nothing in common. Cosines are medians over partners; "
            "nearest: the share of partners that no other latent of the next SAE comes closer to.",
            "",
            "| layers | latents | with a partner | best phi, median | chance | partners read: cosine | … nearest "
            "| partners write: cosine | … nearest |",
            "|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {row.names} | {row.compared:,} | {row.partners:.1%} | {row.phi:.2f} | {row.chance:.2f} | "
                f"{row.read_cosine:.2f} | {row.read_nearest:.0%} | {row.cosine:.2f} | {row.nearest:.0%} |"
                for row in rows
            ),
            "",
            f"The same meaning followed through depth: the {len(named)} longest of {len(chains):,} chains with a name.",
            "",
            "| layers | latents | names |",
            "|---|---|---|",
            *chain_lines,
            "",
            f"Predictions: where the first fires, the second, on at most {_RARE:.0%} of all tokens, does so in the "
            f"next SAE, has another name and writes something else (cosine below {_OTHER_DIRECTION}).",
            "",
            "| SAE | latent | of the next | probability | on all tokens | cosine | firings |",
            "|---|---|---|---|---|---|---|",
            *(prediction.in_words() for prediction in predictions[:_PREDICTIONS]),
            "",
        ]
    )


# ---- picture


def draw(path: Path, kind: str, every: Sequence[Named], rows: Sequence[Row], chains: list[Chain]) -> None:
    """By depth: partners, their phi, their cosine; and the longest chains with a name."""
    figure = new_figure(14, 7.5)
    figure.suptitle(f"{kind}: latents of neighbouring SAEs that fire on the same tokens")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    layers = [one.member.layer for one in every]
    shares, directions = left.subplots(2, 1, sharex=True)
    draw_lines(shares, layers[:-1], rows, {"with a partner": "partners", "best phi, median": "phi", "chance": "chance"})
    shares.set_title("share of the latents with a partner, and phi")
    fields = {"cosine of what they read, median": "read_cosine", "nearest in what they read": "read_nearest"}
    fields |= {"cosine of what they write, median": "cosine", "nearest in what they write": "nearest"}
    draw_lines(directions, layers[:-1], rows, fields)
    directions.set(title="directions of partners", xlabel="layer of the first of the two", ylim=(-0.1, 1))
    draw_chains(right.subplots(), every, [chain for chain in chains if chain.names(every)][:_CHAINS])
    save_figure(figure, path)


def draw_lines(axis: "Axes", layers: list[int], rows: Sequence[Row], lines: dict[str, str]) -> None:
    for label, field in lines.items():
        style = ":" if field == "chance" else "-"
        axis.plot(layers, [getattr(row, field) for row in rows], style, marker="o", markersize=4, label=label)
    axis.set_ylim(0, 1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def draw_chains(axis: "Axes", every: Sequence[Named], chains: list[Chain]) -> None:
    for y, chain in enumerate(chains):
        layers = [one.member.layer for one in every[chain.first :][: len(chain.latents)]]
        axis.plot(layers, [y] * len(layers), marker="o", markersize=4)
        name = chain.names(every)[0]
        shown = name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
        axis.text(layers[0], y - 0.22, shown, fontsize=8.5, parse_math=False)
    first, last = every[0].member.layer, every[-1].member.layer
    axis.set(title="the longest chains of partners", xlabel="layer", xlim=(first - 0.5, last + 0.5), yticks=[])
    axis.set_ylim(len(chains) - 0.3, -1)


# ---- main


def follow(kind: str, members: list[Member], config: Any, device: str) -> None:
    """Compare the SAEs of one kind; write and print what was found."""
    stores = open_stores(members)
    n_tokens = min(config.tokens, stores[0].n_tokens)
    print(f"Reading {len(members)} SAEs of {kind} and {n_tokens:,} tokens of each of their sites.", flush=True)
    every: list[Named] = []
    steps: list[Step] = []
    before = None
    for member, store in progress_bar(list(zip(members, stores, strict=True)), unit="SAE", desc=kind):
        encoded = encode(member, store, n_tokens, device)
        if before:
            steps.append(compare(before, encoded, config.kept, config.least_firings))
            write_flow(steps[-1])
        every.append(encoded.named)
        before = encoded
    rows = [row_of(step, config.least_firings, config.least_phi) for step in steps]
    chains = chains_of([step.partners(config.least_phi) for step in steps])
    folder = members[0].suite_dir
    text = tables(kind, every, steps, rows, chains)
    write_text(folder / f"flow.{kind}.md", text)
    draw(folder / f"flow.{kind}.png", kind, every, rows, chains)
    print(f"\n{text}\n{folder / f'flow.{kind}.md'}, {folder / f'flow.{kind}.png'}", flush=True)


def main() -> None:
    config = parse_constants(globals())
    suite_dir = Path(config.suite_dir)
    kinds = {kind: members for kind, members in by_kind(trained(suite_dir)).items() if len(members) > 1}
    if not kinds:
        raise InputError(f"{suite_dir} has no two SAEs of one kind; train them at several layers with sae_suite.py.")
    for kind, members in kinds.items():
        require_writable(suite_dir / f"flow.{kind}.md", *(each.files.beside(FLOW.suffix) for each in members))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        for kind, members in kinds.items():
            follow(kind, members, config, device)


if __name__ == "__main__":
    run(main)

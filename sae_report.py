"""Write what is known about an SAE as HTML that opens anywhere: no server, no network.

Reads   NAME.json, NAME.metrics.jsonl (sae_training.py), NAME.evaluation.json and .png (sae_evaluation.py),
        NAME.steering.png (sae_steering.py),
        NAME.steered.json (demo.py), and the tables and meanings beside the SAE (latents/index.py); each may be missing
Writes  NAME.report.html: what it is, training curves, evaluation, steering before and after, latents with a search.
        Up to CARDS_A_PAGE latents fit in this one file; more go to pages in NAME.report/
Cost    about 6 kB per latent; reads NAME.top.parquet once at most

    python sae_report.py --sae_model_path data/sae.pth
"""

from pipeline.options import Count, parse_constants
from pipeline.run import run

SAE_MODEL_PATH = "data/sae.pth"  # the SAE
LATENTS: Count = 2000  # latents with a card, the most interesting first
CARDS_A_PAGE: Count = 200  # latents per page
SENTENCES: Count = 6  # top sentences per card

_FEATURED = 12  # cards in the report itself when there are further pages
_CURVE_POINTS = 400  # points drawn per training curve

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autoencoder.measures import MEASURES
from latents.cards import Card, card_html
from latents.index import LatentIndex
from latents.markup import mark_differences
from latents.pages import page_html, picture, read_part, write_text
from pipeline.errors import InputError
from pipeline.files import require_writable
from pipeline.progress import gb, progress_bar
from pipeline.sae_files import SaeFiles
from sae import kind_of
from serving.modes import steering_defaults

# ---- which latents


def chosen_latents(index: LatentIndex, n: int) -> list[int]:
    """n latents, interesting ones first."""
    return [row["latent"] for row in index.search(sort="interesting", limit=n)]


# ---- sections


def header(index: LatentIndex, name: str) -> str:
    info = index.info
    kind = kind_of(info, SaeFiles(index.sae_path).json)
    begin_of_text = info.get("begin_of_text")
    model = info.get("model", {}).get("name") or "a Llama"
    site = info.get("site", "an unnamed site")
    living = int((index.frequency > 0).sum())
    scored = ~np.isnan(index.score)
    named = sum(meaning is not None for meaning in index.meaning)
    facts = [
        ("model", model),
        ("site", site),
        ("latents", f"{index.n_latents:,}"),
        ("living latents", f"{living:,}" if living else None),
        ("with a meaning", f"{named:,}" if named else None),
        ("mean score of the meanings", f"{index.score[scored].mean():.2f} (guessing: 0.50)" if scored.any() else None),
        ("kind", kind.in_words),
        ("reconstructs", kind.target_site),
        ("active per token (k)", info.get("k")),
        ("width (d_model)", info.get("d_model")),
        ("activations trained on", _count(info.get("tokens_trained"))),
        ("sentences", _count(info.get("dataset", {}).get("sentences"))),
        ("begin-of-text", {"True": "seen in training", "False": "not seen in training"}.get(str(begin_of_text))),
    ]
    items = "".join(f"<div><dt>{n}</dt><dd>{html.escape(str(v))}</dd></div>" for n, v in facts if v is not None)
    return (
        f"<header><p class=kicker>Sparse autoencoder {html.escape(name)}</p>"
        f"<h1>What {html.escape(str(model))} represents at {html.escape(site)}</h1>"
        "<p class=lead>A sparse autoencoder rewrites each activation of the model as a sum of a few <em>latents</em>, "
        "directions that it has learnt. A latent fires on some tokens and is silent on the others; its meaning is what "
        "those tokens share. Turned up, it steers what the model writes.</p>"
        f"<dl class=facts>{items}</dl></header>"
    )


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def training_section(path: Path) -> str:
    if not path.is_file():
        return missing("Training", f"No {path.name}: sae_training.py writes it.")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curve = lambda key: [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
    charts = [
        chart("Unexplained variance (FVU)", {"training": curve("train_fvu")}, {"held out": curve("val_fvu")}, log=True),
        chart("Dead latents, share", {"dead": curve("dead_frac")}, {}, log=False),
    ]
    return f"<section><h2>Training</h2><div class=charts>{''.join(charts)}</div></section>"


def chart(title: str, lines: dict[str, list], points: dict[str, list], log: bool) -> str:
    """A small line chart as SVG; lines and points are (tokens, value) lists by name."""
    series = [xy for part in (lines, points) for values in part.values() for xy in values if not log or xy[1] > 0]
    if not series:
        return ""
    scale = (lambda y: math.log10(y)) if log else (lambda y: y)
    x_max = max(x for x, _ in series)
    low, high = (scale(edge(y for _, y in series)) for edge in (min, max))
    ticks = _ticks(low, high, log)
    low, high = min(low, scale(ticks[0])), max(high, scale(ticks[-1]))
    left, top, width, height = 46, 8, 336, 150
    place_x = lambda x: left + width * x / x_max
    place_y = lambda y: top + height * (1 - (scale(y) - low) / (high - low))
    parts = []
    for tick in ticks:
        y = place_y(tick)
        parts.append(f'<line class=grid x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class=end x="{left - 6}" y="{y + 3.5:.1f}">{tick:g}</text>')
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        where, text = place_x(share * x_max), _tokens(share * x_max)
        parts.append(f'<text class={anchor} x="{where:.0f}" y="{top + height + 16}">{text}</text>')
    for values in lines.values():
        kept = [(x, y) for x, y in values if not log or y > 0]
        step = max(1, len(kept) // _CURVE_POINTS)
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in [*kept[:-1:step], *kept[-1:]])
        parts.append(f'<polyline class=curve points="{path}"/>')
    for name, values in points.items():
        for x, y in values:
            dot = f'<circle class=dot cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="4">'
            parts.append(f"{dot}<title>{name}: {y:.4f}</title></circle>")
    last = ", ".join(f"{name} {values[-1][1]:.3g}" for name, values in {**lines, **points}.items() if values)
    about = f'viewBox="0 0 390 180" role="img" aria-label="{title} over activations seen"'
    caption = f"<figcaption>{title}<span>{last}</span></figcaption>"
    return f"<figure>{caption}<svg {about}>{''.join(parts)}</svg></figure>"


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values that enclose low..high; if log, low and high are log10."""
    if log:
        values = [m * 10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 2) for m in (1, 2, 5)]
        first = max(i for i, v in enumerate(values) if math.log10(v) <= low + 1e-9)
        last = min(i for i, v in enumerate(values) if math.log10(v) >= high - 1e-9)
        return [float(f"{v:.3g}") for v in values[first : max(last, first + 1) + 1]]
    high = max(high, 0.01)
    size = 10.0 ** math.floor(math.log10(high / 2))
    step = next(m * size for m in (1, 2, 5, 10) if high / (m * size) <= 4)
    return [float(f"{i * step:.3g}") for i in range(math.ceil(high / step - 1e-9) + 1)]


def _tokens(n: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:g}"


def evaluation_section(json_path: Path, png_path: Path) -> str:
    if not json_path.is_file():
        return missing("Evaluation", f"No {json_path.name}: sae_evaluation.py writes it.")
    quality = json.loads(json_path.read_text(encoding="utf-8"))
    rows = "".join(
        f"<tr><td>{measure.about}</td><td class=number>{measure.show(quality[measure.key])}</td></tr>"
        for measure in MEASURES
        if quality.get(measure.key) is not None
    )
    tokens, sentences = quality.get("tokens", 0), quality.get("sentences", 0)
    return (
        "<section><h2>Evaluation</h2>"
        f"<p>Measured on {tokens:,} tokens of {sentences:,} held-out sentences.</p>"
        f"<table class=measures>{rows}</table>{picture(png_path, 'Evaluation in pictures')}</section>"
    )


def strength_section(index: LatentIndex, png_path: Path) -> str:
    """How strongly to steer, from NAME.json's entry `steering` and NAME.steering.png."""
    if "steering" not in index.info:
        return missing("How to steer", "Not measured: sae_steering.py does it.")
    how, measured = steering_defaults(index.info, index.files.json), index.info["steering"]["measured"]
    clean, steered = measured["clean"], measured["steered"]
    return (
        f"<section><h2>How to steer</h2><p>In mode {how.mode} at strength {how.strength:g}, in multiples of a latent's "
        f"highest activation, <b>{steered['words_share']:.0%}</b> of the completions of neutral prompts hold the words "
        f"of the latent that steers them, {clean['words_share']:.0%} without steering: the mean over "
        f"{measured['latents']} latents. That costs {steered['nats'] - clean['nats']:.2f} nats per token. "
        f"{int(index.steers_well.sum()):,} latents steer well, as far as their effect on the next token tells.</p>"
        f"{picture(png_path, 'Words of the latent against fluency, by strength')}</section>"
    )


def steered_section(path: Path) -> str:
    """Completions before and after steering, from NAME.steered.json: latent, meaning, words, mode, strength, n, hits
    (clean and steered), and some of the completions: prompts, clean, steered."""
    if not path.is_file():
        return missing("Steering", f"No {path.name}: demo.py writes it for its SAE.")
    steering = json.loads(path.read_text(encoding="utf-8"))
    words = " or ".join(f"“{html.escape(word)}”" for word in steering["words"])
    clean_hits, steered_hits = steering["hits"]
    mode = f" ({html.escape(steering['mode'])})" if "mode" in steering else ""
    rows = []
    for prompt, clean, steered in zip(steering["prompts"], steering["clean"], steering["steered"], strict=True):
        shown = mark_differences(clean, steered, steering["words"])
        cells = "".join(
            f"<div><h3>{kind}</h3><p><b>{html.escape(prompt)}</b>{text}</p></div>"
            for kind, text in zip(("clean", "steered"), shown, strict=True)
        )
        rows.append(f"<div class=pair>{cells}</div>")
    return (
        f"<section><h2>Steering with latent {steering['latent']}: {html.escape(steering['meaning'])}</h2>"
        f"<p>Of {steering['n']} completions, <b>{clean_hits}</b> contained {words} without steering and "
        f"<b>{steered_hits}</b> with it, at strength {steering['strength']:g}{mode}, in multiples of the latent's "
        "highest activation. Same prompts and seeds. Here are the first, underlined where they differ:</p>"
        f"{''.join(rows)}</section>"
    )


def unless_broken(title: str, made_by: str, path: Path, section: Callable[[], str]) -> str:
    """The section, or a line that names the broken file."""
    try:
        return section()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, InputError) as error:
        line = f"{path} is not what {made_by} writes ({' '.join(str(error).split())}); run it again."
        print(line)
        return missing(title, line)


def missing(title: str, line: str) -> str:
    return f"<section><h2>{title}</h2><p class=missing>{html.escape(line)}</p></section>"


def index_table(index: LatentIndex, addresses: dict[int, str]) -> str:
    """The latents with a card as a table; the page's script filters and sorts it."""
    rows = []
    for latent, address in addresses.items():
        numbers = [(index.certainty[latent], "{:.2f}", 1), (index.score[latent], "{:.2f}", 1)]
        numbers += [(index.output_score[latent], "{:z.2f}", 1), (index.frequency[latent], "{:.3f}", 100)]
        cells = "".join(
            "<td></td>" if math.isnan(value) else f"<td>{form.format(value * factor)}</td>"
            for value, form, factor in numbers
        )
        meaning = html.escape(index.meaning[latent] or "no meaning")
        rows.append(f'<tr><td>{latent}</td><td><a href="{address}">{meaning}</a></td>{cells}</tr>')
    head = "".join(
        f"<th><button>{n}</button></th>"
        for n in ("latent", "meaning", "certainty", "score", "output score", "fires on, %")
    )
    return (
        '<div class=search><input type=search id=query placeholder="Search the meanings" aria-label="Search the '
        'meanings" autocomplete=off><output id=found></output></div>'
        f"<div class=scroll><table id=index><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# ---- pages


class Pages(NamedTuple):
    """Where the cards are: all in the report or, if there are too many, spread over its pages."""

    report: Path
    folder: Path  # of the pages
    pages: list[list[Card]]  # empty: all cards are in the report

    def page_path(self, number: int) -> Path:
        return self.folder / f"latents-{number:03d}.html"

    def addresses(self) -> dict[int, str]:
        """The address of each latent's card, for links from a page."""
        return {
            card.latent: f"{self.page_path(number).name}#latent-{card.latent}"
            for number, cards in enumerate(self.pages)
            for card in cards
        }


def cards_html(cards: Sequence[Card], addresses: dict[int, str]) -> str:
    shown = (f"<div id=latent-{card.latent}>{card_html(card, addresses.get)}</div>" for card in cards)
    return f"<div class=cards>{''.join(shown)}</div>"


def read_cards(index: LatentIndex, latents: list[int], n_sentences: int) -> list[Card]:
    """Cards in the given order, read in the order on disk."""
    bar = progress_bar(sorted(latents), unit="latent", desc="cards")
    cards = {latent: index.card(latent, n_sentences) for latent in bar}
    return [cards[latent] for latent in latents]


def write_pages(where: Pages, name: str) -> list[Path]:
    """Write the pages and remove those of an earlier report. Returns their paths."""
    written = []
    for number, cards in enumerate(where.pages):
        links = [f'<a href="../{where.report.name}">Report</a>']
        links += [f'<a href="{where.page_path(number - 1).name}">Previous page</a>'] if number else []
        is_last = number + 1 == len(where.pages)
        links += [] if is_last else [f'<a href="{where.page_path(number + 1).name}">Next page</a>']
        nav = f"<nav>{''.join(links)}</nav>"
        title = f"Latents of {name}, page {number + 1} of {len(where.pages)}"
        parts = [nav, f"<h1>{title}</h1>", cards_html(cards, where.addresses()), nav]
        write_text(where.page_path(number), page_html(title, parts))
        written.append(where.page_path(number))
    for old in set(where.folder.glob("latents-*.html")) - set(written):
        old.unlink()
    return written


def latents_section(index: LatentIndex, cards: list[Card], where: Pages) -> str:
    """The table of all latents with a card, and the cards, or the first of them and links to the pages."""
    addresses, shown, nav = {card.latent: f"#latent-{card.latent}" for card in cards}, cards, ""
    if where.pages:
        shown, folder = cards[:_FEATURED], where.folder.name
        addresses = {latent: f"{folder}/{address}" for latent, address in where.addresses().items()}
        numbers = range(len(where.pages))
        nav = "".join(f'<a href="{folder}/{where.page_path(i).name}">Page {i + 1}</a>' for i in numbers)
        nav = f"<nav>{nav}</nav>"
    rule = (
        f"{len(cards):,} of {index.n_latents:,} latents have a card. First come those that fire neither rarely nor "
        "everywhere and have a certain meaning in plain words, each about different words, best score first; then the "
        "others."
    )
    lines = "".join(f"<p class=missing>{html.escape(line)}</p>" for line in index.missing)
    return (
        f"<section><h2>Latents</h2><p>{rule}</p>{lines}"
        f"{index_table(index, addresses)}{cards_html(shown, addresses)}{nav}</section>"
    )


def write_report(sae_path: str | Path, n_latents: int, cards_a_page: int, n_sentences: int) -> list[Path]:
    """Write the report and, if there are too many latents for it, its pages. Returns their paths, report first."""
    index, files = LatentIndex(sae_path), SaeFiles(sae_path)
    require_writable(files.beside("report.html"), files.beside("report") / "latents-0.html")
    name = Path(files.name).name
    cards = read_cards(index, chosen_latents(index, n_latents), n_sentences)
    pages = [cards[i : i + cards_a_page] for i in range(0, len(cards), cards_a_page)]
    where = Pages(files.beside("report.html"), files.beside("report"), pages if len(pages) > 1 else [])
    written = write_pages(where, name)
    metrics, steered = files.beside("metrics.jsonl"), files.beside("steered.json")
    quality, png = files.beside("evaluation.json"), files.beside("evaluation.png")
    responses = files.beside("steering.png")
    parts = [
        header(index, name),
        unless_broken("Training", "sae_training.py", metrics, lambda: training_section(metrics)),
        unless_broken("Evaluation", "sae_evaluation.py", quality, lambda: evaluation_section(quality, png)),
        unless_broken("How to steer", "sae_steering.py", Path(files.json), lambda: strength_section(index, responses)),
        unless_broken("Steering", "demo.py", steered, lambda: steered_section(steered)),
        latents_section(index, cards, where),
    ]
    write_text(where.report, page_html(f"{name}: what its latents mean", parts, read_part("report.js")))
    for line in index.missing:
        print(line)
    return [where.report, *written]


def main() -> None:
    config = parse_constants(globals())
    written = write_report(config.sae_model_path, config.latents, config.cards_a_page, config.sentences)
    sizes = [path.stat().st_size for path in written]
    pages = f", and {len(written) - 1} pages of up to {gb(max(sizes[1:]))}" if len(written) > 1 else ""
    print(f"{written[0]}: {gb(sizes[0])}{pages}")


if __name__ == "__main__":
    run(main)

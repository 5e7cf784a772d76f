"""Write what is known of an SAE as HTML that opens anywhere: no server, no network.

Reads   NAME.json, NAME.metrics.jsonl (sae_training.py), NAME.evaluation.json and .png (sae_evaluation.py),
        NAME.steering.json (demo.py), and what latent_index.py finds beside the SAE; each may be missing
Writes  NAME.report.html: what it is, training curves, evaluation, steering before and after, latents with a search.
        Up to CARDS_A_PAGE latents stand in this one file; more go to pages of NAME.report/
Cost    about 6 kB a latent; reads NAME.top.parquet once at most

    python sae_report.py --sae_model_path data/sae.pth
"""

from pipeline.options import Count, parse_constants
from pipeline.run import run

SAE_MODEL_PATH = "data/sae.pth"  # the SAE
LATENTS: Count = 2000  # latents with a card, the most interesting first
CARDS_A_PAGE: Count = 200  # latents a page
SENTENCES: Count = 6  # top sentences a card

_FEATURED = 12  # cards in the report itself when there are further pages
_CURVE_POINTS = 400  # drawn of a training curve

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latents.cards import CARD_CSS, Card, card_html
from latents.index import LatentIndex
from latents.interesting import best_first, interesting_latents
from latents.markup import mark_differences
from pipeline.errors import InputError
from pipeline.files import atomic_path, read_json
from pipeline.progress import gb, progress_bar
from pipeline.sae_files import SaeFiles

# ---- which latents


def chosen_latents(index: "LatentIndex", n: int) -> list[int]:
    """The interesting ones, then the others, n in all."""
    first = interesting_latents(index)
    return (first + [latent for latent in best_first(index) if latent not in set(first)])[:n]


# ---- sections


def header(index: "LatentIndex", name: str) -> str:
    info = index.info
    model = info.get("model", {}).get("name") or "a Llama"
    site = info.get("site", "a site not named")
    living = int((index.frequency > 0).sum())
    scored = ~np.isnan(index.score)
    named = sum(meaning is not None for meaning in index.meaning)
    facts = [
        ("model", model),
        ("site", site),
        ("latents", f"{index.n_latents:,}"),
        ("of them living", f"{living:,}" if living else None),
        ("with a meaning", f"{named:,}" if named else None),
        ("score of a meaning, mean", f"{index.score[scored].mean():.2f} (a guess: 0.50)" if scored.any() else None),
        ("active a token (k)", info.get("k")),
        ("width (d_model)", info.get("d_model")),
        ("activations trained on", _count(info.get("tokens_trained"))),
        ("sentences", _count(info.get("dataset", {}).get("sentences"))),
        ("begin-of-text", {True: "seen in training", False: "not seen in training"}.get(info.get("begin_of_text"))),
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
        return missing("Training", f"No {path.name}: sae_training.py makes it.")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is not JSON lines ({error}); run sae_training.py again.") from None
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
    """Round values that enclose low..high (their log10 where log)."""
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


_MEASURES = [  # key of NAME.evaluation.json, what it is, its form
    ("fvu", "variance of the activations left unexplained (FVU)", "{:.4f}"),
    ("cosine", "cosine between activation and reconstruction", "{:.4f}"),
    ("l0", "latents active a token (L0)", "{:.1f}"),
    ("silent_frac", "latents silent on all these tokens", "{:.1%}"),
    ("dead_frac", "latents dead at the end of training", "{:.1%}"),
    ("dense_frac", "latents that fire on more than 10 % of tokens", "{:.1%}"),
    ("loss_clean", "cross-entropy of the model as it is, nats a token", "{:.4f}"),
    ("loss_spliced", "… with the site replaced by its reconstruction", "{:.4f}"),
    ("loss_mean", "… with the site set to its mean", "{:.4f}"),
    ("loss_zeroed", "… with the site set to zero", "{:.4f}"),
    ("loss_recovered", "loss recovered, against zero", "{:.1%}"),
    ("loss_recovered_mean", "loss recovered, against the mean", "{:.1%}"),
    ("kl_spliced", "KL divergence of the spliced model from the clean one, nats a token", "{:.4f}"),
]


def evaluation_section(json_path: Path, png_path: Path) -> str:
    if not json_path.is_file():
        return missing("Evaluation", f"No {json_path.name}: sae_evaluation.py makes it.")
    quality = read_json(json_path, "run sae_evaluation.py again.")
    rows = "".join(
        f"<tr><td>{about}</td><td class=number>{form.format(quality[key])}</td></tr>"
        for key, about, form in _MEASURES
        if quality.get(key) is not None
    )
    picture = ""
    if png_path.is_file():
        data = base64.b64encode(png_path.read_bytes()).decode()
        picture = f'<div class=plot><img alt="Evaluation in pictures" src="data:image/png;base64,{data}"></div>'
    tokens, sentences = quality.get("tokens", 0), quality.get("sentences", 0)
    return (
        "<section><h2>Evaluation</h2>"
        f"<p>Measured on {tokens:,} tokens of {sentences:,} held-out sentences.</p>"
        f"<table class=measures>{rows}</table>{picture}</section>"
    )


def steering_section(path: Path) -> str:
    """Completions before and after, from NAME.steering.json: latent, meaning, words, mode, strength, n, hits (clean and
    steered), and some of the completions: prompts, clean, steered."""
    if not path.is_file():
        return missing("Steering", f"No {path.name}: demo.py makes it for its SAE.")
    steering = read_json(path, "run demo.py again.")
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
        f"<p>Of {steering['n']} completions, <b>{clean_hits}</b> held {words} without steering and "
        f"<b>{steered_hits}</b> with it, at strength {steering['strength']:g}{mode}: multiples of the latent's highest "
        "activation. Same prompts and seeds. The first of them, underlined where they differ:</p>"
        f"{''.join(rows)}</section>"
    )


def missing(title: str, *lines: str) -> str:
    return (
        f"<section><h2>{title}</h2>" + "".join(f"<p class=missing>{html.escape(x)}</p>" for x in lines) + "</section>"
    )


def index_table(index: "LatentIndex", addresses: dict[int, str]) -> str:
    """The latents with a card as a table; the page's script filters and sorts it."""
    rows = []
    for latent, address in addresses.items():
        numbers = [(index.certainty[latent], "{:.2f}", 1), (index.score[latent], "{:.2f}", 1)]
        numbers.append((index.frequency[latent], "{:.3f}", 100))
        cells = "".join(
            "<td></td>" if math.isnan(value) else f"<td>{form.format(value * factor)}</td>"
            for value, form, factor in numbers
        )
        meaning = html.escape(index.meaning[latent] or "no meaning")
        rows.append(f'<tr><td>{latent}</td><td><a href="{address}">{meaning}</a></td>{cells}</tr>')
    head = "".join(f"<th><button>{n}</button></th>" for n in ("latent", "meaning", "certainty", "score", "fires on, %"))
    return (
        '<div class=search><input type=search id=query placeholder="Search the meanings" aria-label="Search the '
        'meanings" autocomplete=off><output id=found></output></div>'
        f"<div class=scroll><table id=index><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# ---- pages

_CSS = """
:root { color-scheme: light dark; --paper: #fdfcf9; --ink: #1f1f22; --line: #1f1f2224; --soft: #1f1f229c;
  --accent: #c25a00; --mark: #ff88004d; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --ink: #e7e5df; --line: #e7e5df2b; --soft: #e7e5dfa6;
  --accent: #ff9d45; --mark: #ff880066; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 58rem; margin: 0 auto; padding: 3.2rem 1.4rem 5rem; }
h1, h2 { font-family: ui-serif, "Iowan Old Style", "Palatino Linotype", Georgia, "DejaVu Serif", serif;
  font-weight: 500; line-height: 1.2; text-wrap: balance; }
h1 { font-size: 2.3rem; margin: .2rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.55rem; margin: 0 0 .8rem; }
section { margin-top: 3.4rem; }
p { margin: 0 0 1rem; max-width: 44rem; }
a { color: var(--accent); }
.kicker { color: var(--soft); margin: 0; }
.lead { font-size: 1.08rem; }
.missing { color: var(--soft); font-style: italic; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: .9rem 1.2rem;
  margin: 1.6rem 0; padding: 1.1rem 0; border: solid var(--line); border-width: 1px 0; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.4rem; }
figure { margin: 0; }
figcaption { display: grid; font-size: .88rem; line-height: 1.4; margin-bottom: .5rem; }
figcaption span { color: var(--soft); }
svg text { fill: var(--soft); font-size: 11px; } svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); } svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.8;
  stroke-linejoin: round; } svg .dot { fill: var(--ink); stroke: var(--paper); stroke-width: 1.5; }
table { border-collapse: collapse; font-size: .93rem; width: 100%; }
td, th { padding: .34rem .9rem .34rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.measures { max-width: 44rem; }
.measures .number { text-align: right; font-variant-numeric: tabular-nums; padding: .34rem 0; }
.plot { margin-top: 1.6rem; border-radius: 8px; background: #fff; padding: .4rem; overflow-x: auto; }
.plot img { display: block; width: 100%; min-width: 44rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; border-top: 1px solid var(--line);
  padding-top: .8rem; }
.pair h3 { margin: 0; font-size: .8rem; font-weight: 500; color: var(--soft); }
.pair p { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .96rem; }
ins, del { text-decoration: underline; text-decoration-color: color-mix(in srgb, var(--ink) 28%, transparent);
  text-underline-offset: .22em; text-decoration-thickness: 1px; }
mark { background: var(--mark); color: inherit; border-radius: .2em; padding: .08em .15em; }
.search { display: flex; align-items: baseline; gap: 1rem; margin: 1.2rem 0 .6rem; }
.search input { font: inherit; color: inherit; background: transparent; border: 1px solid var(--line);
  border-radius: 8px; padding: .4rem .8rem; flex: 1; max-width: 26rem; min-width: 0; }
.search output { color: var(--soft); font-size: .88rem; }
.scroll { max-height: 21rem; overflow: auto; border: 1px solid var(--line); border-radius: 8px; margin-bottom: 2rem; }
.scroll td, .scroll th { padding: .3rem .8rem; } .scroll tr:last-child td { border-bottom: 0; }
.scroll td:nth-child(n+3), .scroll td:first-child, .scroll th:nth-child(n+3) { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll th { position: sticky; top: 0; background: var(--paper); }
.scroll button { font: inherit; font-size: .85rem; color: var(--soft); background: none; border: 0; padding: 0;
  cursor: pointer; white-space: nowrap; }
.cards { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.4rem; }
.latent-card { scroll-margin-top: 1rem; } .latent-card:target { outline: 2px solid var(--accent); }
.latent-card h3 { font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; margin: 1rem 0; }
footer { margin-top: 4rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) { body { font-size: 16px; } main { padding-top: 1.8rem; } h1 { font-size: 1.75rem; }
  .facts { grid-template-columns: 1fr 1fr; font-size: .92rem; } .pair { grid-template-columns: 1fr; }
  .scroll tr > :nth-child(3) { display: none; } .scroll td, .scroll th { padding: .3rem .5rem; }
  .latent-card { padding: .9em; } .latent-sentences li { padding-left: 0; padding-top: 1.5em; }
  .latent-sentences .latent-value { top: .3em; } }
@media print { .search, .scroll { display: none; } .latent-card { break-inside: avoid; } }
"""

_SCRIPT = """
const body = document.querySelector('#index tbody'), rows = [...body.rows], query = document.getElementById('query');
const texts = rows.map(row => (row.cells[0].textContent + ' ' + row.cells[1].textContent).toLowerCase());
function filter() {
  const words = query.value.toLowerCase().split(/\\s+/);
  let found = 0;
  rows.forEach((row, i) => { row.hidden = !words.every(word => texts[i].includes(word)); found += !row.hidden; });
  document.getElementById('found').textContent = found.toLocaleString('en') + ' of ' + rows.length.toLocaleString('en');
}
query.addEventListener('input', filter);
document.querySelectorAll('#index th').forEach((head, column) => {
  let direction = column < 2 ? 1 : -1;
  head.addEventListener('click', () => {
    const key = row => row.cells[column].textContent;
    const compare = column === 1 ? (a, b) => key(a).localeCompare(key(b)) : (a, b) => (key(a) || -1) - (key(b) || -1);
    body.append(...[...rows].sort((a, b) => direction * compare(a, b)));
    direction = -direction;
  });
});
filter();
"""


def page(title: str, parts: Sequence[str], script: str = "") -> str:

    return (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{CARD_CSS}{_CSS}</style></head>\n<body><main>"
        + "\n".join(parts)
        + f"</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def cards_html(cards: Sequence["Card"], addresses: dict[int, str]) -> str:

    shown = (f"<div id=latent-{card.latent}>{card_html(card, addresses.get)}</div>" for card in cards)
    return f"<div class=cards>{''.join(shown)}</div>"


def read_cards(index: "LatentIndex", latents: list[int], n_sentences: int) -> list["Card"]:
    """In the order given; read in the order in which they lie on disk."""
    bar = progress_bar(sorted(latents), unit="latent", desc="cards")
    cards = {latent: index.card(latent, n_sentences) for latent in bar}
    return [cards[latent] for latent in latents]


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_report(
    sae_path: str | Path, n_latents: int, cards_a_page: int = CARDS_A_PAGE, n_sentences: int = SENTENCES
) -> list[Path]:
    """Write the report and, for more latents than one page holds, its pages. Returns what was written, report first."""

    index = LatentIndex(sae_path)
    cards = read_cards(index, chosen_latents(index, n_latents), n_sentences)
    report, folder = SaeFiles(sae_path).beside("report.html"), SaeFiles(sae_path).beside("report")
    name = Path(sae_path).name.removesuffix(".pth")
    pages = [cards[i : i + cards_a_page] for i in range(0, len(cards), cards_a_page)]
    pages = pages if len(pages) > 1 else []
    page_name = lambda number: f"latents-{number:03d}.html"
    inside = {card.latent: f"#latent-{card.latent}" for card in cards}  # addresses within one page
    for number, some in enumerate(pages):
        inside |= {card.latent: f"{page_name(number)}#latent-{card.latent}" for card in some}
    addresses = {latent: f"{folder.name}/{address}" if pages else address for latent, address in inside.items()}

    written = []
    for number, some in enumerate(pages):
        links = [f'<a href="../{report.name}">Report</a>']
        links += [f'<a href="{page_name(number - 1)}">Page before</a>'] if number else []
        links += [f'<a href="{page_name(number + 1)}">Next page</a>'] if number + 1 < len(pages) else []
        nav = f"<nav>{''.join(links)}</nav>"
        title = f"Latents of {name}, page {number + 1} of {len(pages)}"
        write_text(folder / page_name(number), page(title, [nav, f"<h1>{title}</h1>", cards_html(some, inside), nav]))
        written.append(folder / page_name(number))
    for old in set(folder.glob("latents-*.html")) - set(written):
        old.unlink()

    featured = cards[:_FEATURED] if pages else cards
    rule = (
        f"{len(cards):,} of {index.n_latents:,} latents have a card. First come those with a certain meaning in plain "
        "words that fire neither rarely nor everywhere, each about other words, best score first; then the others."
    )
    latents = [f"<section><h2>Latents</h2><p>{rule}</p>", *(f"<p class=missing>{x}</p>" for x in index.missing)]
    latents += [index_table(index, addresses), cards_html(featured, addresses), "</section>"]
    if pages:
        links = "".join(f'<a href="{folder.name}/{page_name(i)}">Page {i + 1}</a>' for i in range(len(pages)))
        latents.append(f"<nav>{links}</nav>")
    parts = [
        header(index, name),
        training_section(SaeFiles(sae_path).beside("metrics.jsonl")),
        evaluation_section(SaeFiles(sae_path).beside("evaluation.json"), SaeFiles(sae_path).beside("evaluation.png")),
        steering_section(SaeFiles(sae_path).beside("steering.json")),
        *latents,
    ]
    write_text(report, page(f"{name}: what its latents mean", parts, _SCRIPT))
    for line in index.missing:
        print(line)
    return [report, *written]


def main() -> None:
    config = parse_constants(globals())
    written = write_report(config.sae_model_path, config.latents, config.cards_a_page, config.sentences)
    sizes = [path.stat().st_size for path in written]
    pages = f", and {len(written) - 1} pages of up to {gb(max(sizes[1:]))}" if len(written) > 1 else ""
    print(f"{written[0]}: {gb(sizes[0])}{pages}")


if __name__ == "__main__":
    run(main)

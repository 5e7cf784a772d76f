"""The HTML report: every section from its file, working links, nothing loaded from elsewhere; read in a browser.

.venv/bin/python -m pytest tests/test_report.py

REPORT_PICTURE=report.png also writes the picture of the README, of SmolLM2.
"""

import html
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.latent_files import DEAD, MEANINGS, N_LATENTS, write_latents
from support.pipeline_runs import call, refusal

import sae_report
from latents.index import LatentIndex, match_rank
from latents.interesting import interesting_latents, latents_to_steer
from latents.markup import mark_differences
from llama_3 import load_tokenizer
from pipeline.files import write_json
from serving.steered_model import fetched_reference, reference_sae

SMOLLM2 = fetched_reference()
LIVING = N_LATENTS - len(DEAD)
PNG = b"\x89PNG not really"
STEERED = {
    "latent": 3,
    "meaning": "Dogs in fiction",
    "words": ["dog"],
    "strength": 2.5,
    "n": 128,
    "hits": [7, 93],
    "prompts": ["This is", "The <b>"],
    "clean": [" a cat & a house.", " end"],
    "steered": [" a Dog & a house.", " dogs"],
}


@pytest.fixture
def sae_path(tmp_path, tiny_model_dir):
    """An SAE with everything beside it."""
    path = write_latents(tmp_path, tiny_model_dir, load_tokenizer(str(tiny_model_dir)))
    metrics = [
        {"step": i, "tokens": 1000 * i, "train_fvu": 0.9 / i, "dead_frac": 0.1 + i / 100}
        | ({"val_fvu": 1 / i} if i % 25 == 0 else {})
        for i in range(1, 51)
    ]
    (tmp_path / "sae.metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    quality = {"fvu": 0.12345, "l0": 6.0, "loss_recovered": None, "kl_spliced": 0.0625, "tokens": 5000, "sentences": 70}
    (tmp_path / "sae.evaluation.json").write_text(json.dumps(quality))
    (tmp_path / "sae.evaluation.png").write_bytes(PNG)
    (tmp_path / "sae.steered.json").write_text(json.dumps(STEERED))
    figures = {"words_share": 0.25, "nats": 3.5, "repeated": 0.01}
    measured = {"latents": 16, "clean": figures, "steered": figures | {"words_share": 0.75, "nats": 3.875}}
    how = {"mode": "clamp", "strength": 0.625, "slider": [-2, 2], "measured": measured}
    write_json(tmp_path / "sae.json", json.loads((tmp_path / "sae.json").read_text()) | {"steering": how})
    (tmp_path / "sae.steering.png").write_bytes(PNG)
    return path


class Page(HTMLParser):
    """A page's text, ids and addresses; tags closed in order."""

    VOID = ("meta", "input", "img")

    def __init__(self, path: Path):
        super().__init__()
        self.stack, self.ids, self.addresses, self.texts = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.stack == []
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.stack.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [attributes[name] for name in ("href", "src") if name in attributes]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.texts.append(data)


def latents_of(page: Page) -> list[int]:
    return [int(name.removeprefix("latent-")) for name in page.ids if name.startswith("latent-")]


def write(sae_path, **options) -> Page:
    call(sae_report, sae_model_path=sae_path, **options)
    return Page(sae_path.with_suffix(".report.html"))


def test_the_kind_is_said(sae_path, capsys):
    assert "kindTopK" in write(sae_path).text
    info = json.loads(sae_path.with_suffix(".json").read_text())
    kind = {"gate": "jumprelu", "normalization": "none", "target_site": "layers.1.mlp_out", "skip": True}
    write_json(sae_path.with_suffix(".json"), info | kind)
    text = write(sae_path).text
    assert "kindskip transcoder, JumpReLU" in text and "reconstructslayers.1.mlp_out" in text
    write_json(sae_path.with_suffix(".json"), info | {"gate": "softmax"})
    assert "gate = 'softmax' is none of topk" in refusal(capsys, sae_report, sae_model_path=sae_path)


def test_one_file_with_every_section(sae_path, capsys):
    page = write(sae_path)
    for part in ("tiny", "layers.1.attention_norm", "12,345", f"{LIVING}", "Training", "training 0.018, held out 0.02"):
        assert part in page.text
    assert (
        "(FVU)0.1235" in page.text
        and "one, nats per prediction0.0625" in page.text
        and "loss recovered" not in page.text
    )
    assert "5,000 tokens of 70 held-out sentences" in page.text
    assert "In mode clamp at strength 0.625" in page.text and "75% of the completions" in page.text
    assert "25% without steering" in page.text and "costs 0.38 nats" in page.text
    assert page.text.count(" steers well") == sum(LatentIndex(sae_path).steers_well) > 0
    assert "Steering with latent 3: Dogs in fiction" in page.text and "7 contained “dog” without" in page.text
    assert "This is a cat & a house." in page.text and "The <b> dogs" in page.text
    assert sorted(latents_of(page)) == [i for i in range(N_LATENTS) if i not in DEAD]
    assert not sae_path.with_suffix(".report").exists()
    said = capsys.readouterr().out
    assert f"{sae_path.with_suffix('.report.html')}: 0." in said and "MB" in said


def test_the_page_stands_alone(sae_path):
    """No links except to its own cards, and pictures are embedded."""
    page = write(sae_path)
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert outside == [] and not re.search(r"url\(|@import|https?:", page.source)
    assert {a[1:] for a in page.addresses if a.startswith("#")} == {i for i in page.ids if i.startswith("latent-")}
    import base64

    picture = next(a for a in page.addresses if a.startswith("data:"))
    assert base64.b64decode(picture.partition(",")[2]) == PNG


def test_many_latents_stand_on_pages(sae_path, capsys):
    page = write(sae_path, cards_a_page=15)
    folder = sae_path.with_suffix(".report")
    paths = sorted(folder.iterdir())
    pages = {path: Page(path) for path in paths}
    assert [path.name for path in paths] == [f"latents-00{i}.html" for i in range(3)]
    shown = [latent for p in pages.values() for latent in latents_of(p)]
    assert len(shown) == len(set(shown)) == LIVING and [len(latents_of(p)) for p in pages.values()] == [
        15,
        15,
        LIVING - 30,
    ]
    assert latents_of(page) == shown[:12]  # the most interesting ones are in the report too
    pages[sae_path.with_suffix(".report.html")] = page
    for path, one in pages.items():
        for address in one.addresses:
            if address.startswith("data:"):
                continue
            file, _, name = address.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert not name or name in pages[target].ids
    assert len([a for a in page.addresses if "report/latents-002" in a]) >= LIVING - 30
    assert "2 pages" not in capsys.readouterr().out
    write(sae_path, cards_a_page=25)
    assert len(list(folder.iterdir())) == 2  # leftovers of an earlier report are gone
    write(sae_path, latents=9)
    assert list(folder.iterdir()) == []


def test_what_is_missing_is_said_with_the_script_that_makes_it(tmp_path):
    (tmp_path / "sae.json").write_text('{"n_latents": 3}')
    page = write(tmp_path / "sae.pth")
    scripts = [
        "sae_training",
        "sae_evaluation",
        "sae_steering",
        "demo",
        "capture_top_activating_sentences",
        "promoted_tokens",
    ]
    for script in (*scripts, "interpret_top_sentences_parse_responses"):
        assert f"{script}.py" in page.text
    assert latents_of(page) == [0, 1, 2] and "nan" not in page.text and "None" not in page.text


def test_bad_options_and_files_are_refused(sae_path, tmp_path, capsys):
    assert "--latents 0 is too small" in refusal(capsys, sae_report, sae_model_path=sae_path, latents=0)
    assert "how many latents" in refusal(capsys, sae_report, sae_model_path=tmp_path / "other.pth")
    assert not sae_path.with_suffix(".report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b'{"step": 1', b"[1, 2]", b"3", b'{"tokens": "x", "hits": [], "train_fvu": 1}', b"\xff", None]
)
@pytest.mark.parametrize(
    ("name", "script"),
    [("metrics.jsonl", "sae_training"), ("evaluation.json", "sae_evaluation"), ("steered.json", "demo")],
)
def test_a_broken_file_is_named_and_the_rest_is_shown(sae_path, capsys, name, script, content):
    """None: no rights to read it, or a disk that fails."""
    path = sae_path.with_suffix(f".{name}")
    whole = write(sae_path)
    with pytest.MonkeyPatch.context() as patch:
        if content is None:
            patch.setattr(Path, "read_text", failing_for(path))
        else:
            path.write_bytes(content)
        page = write(sae_path)
    assert f"{path} is not what {script}.py writes (" in page.text
    assert f"{path} is not what {script}.py writes (" in capsys.readouterr().out
    assert latents_of(page) == latents_of(whole)


def test_a_broken_entry_of_steering_is_named_and_the_rest_is_shown(sae_path):
    info = json.loads(sae_path.with_suffix(".json").read_text())
    write_json(sae_path.with_suffix(".json"), info | {"steering": {"mode": "push"}})
    page = write(sae_path)
    assert "sae.json is not what sae_steering.py writes (" in page.text and "Steering with latent 3" in page.text


def failing_for(path: Path):
    read = Path.read_text

    def read_text(self, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    return read_text


# ---- which latents


def test_interesting_latents_by_hand(tmp_path):
    """latent: meaning, certainty, frequency, score; the reason it is left out."""
    rows = [
        ("error", 1.0, 1e-3, 0.7),
        ("rate", 1.0, 1e-3, 0.9),
        ("rates, prices", 1.0, 1e-3, 0.8),  # half its words are already in the list
        ("…ing", 1.0, 1e-3, 0.95),  # part of a word
        ("“,”", 1.0, 1e-3, 0.95),  # a sign
        ("number, zero", 1.0, 1e-3, 0.95),
        ("doubtful", 0.8, 1e-3, 0.95),
        ("rare", 1.0, 1e-5, 0.95),
        ("frequent", 1.0, 0.2, 0.95),
        ("both, each other", 1.0, 1e-3, 0.95),  # says nothing of what a text is about
        ("in the, harbour", 1.0, 1e-3, 0.95),  # nor does its first part
        ("sea", 1.0, 1e-3, 0.55),
        ('References to "rate" in contracts (legal)', 0.9, 2e-3, 0.6),
        ("unscored", 1.0, 1e-3, math.nan),
        (None, math.nan, 1e-3, math.nan),
        ("silent", 1.0, 0.0, 0.99),
    ]

    class Index(LatentIndex):
        def __init__(self):
            self.n_latents = len(rows)
            self._orders = {}
            self.meaning = np.array([row[0] for row in rows], dtype=object)
            self.certainty, self.frequency, self.score = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
            self.highest = self.frequency
            self.output_score, self.steers_well = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=bool)

    index = Index()
    assert interesting_latents(index) == latents_to_steer(index) == [1, 0, 12, 11, 13]
    index.output_score[[3, 11, 12]] = 0.9, 0.2, 0.1
    assert latents_to_steer(index) == [11, 12, 1, 0, 13]
    assert sae_report.chosen_latents(Index(), 7) == [1, 0, 12, 11, 13, 3, 4]
    assert sorted(sae_report.chosen_latents(Index(), 99)) == list(range(15))


# ---- differences, charts


WORDS = st.lists(st.sampled_from(["dog", "Dog", "a", "<b>", "dogs", "é", " ", "  ", "\n", "."]), max_size=12).map(
    "".join
)


@given(WORDS, WORDS)
def test_marked_texts_are_the_texts(clean, steered):
    for text, marked in zip((clean, steered), mark_differences(clean, steered, ["dog"]), strict=True):
        assert html.unescape(re.sub(r"</?(ins|del|mark)>", "", marked)) == text
        concept = [word for word in re.findall(r"\w+", text) if word.lower() == "dog"]
        assert re.findall(r"<mark>(.*?)</mark>", marked) == concept
        if clean == steered:
            assert "<ins>" not in marked and "<del>" not in marked


def test_differences_by_hand():
    found = mark_differences("a red cat sat.", "a blue old dog sat.", ["dog"])
    assert found == ("a <del>red cat</del> sat.", "a <ins>blue old</ins> <mark>dog</mark> sat.")


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.booleans())
def test_ticks_enclose_the_values_and_are_few(a, b, log):
    low, high = sorted((a, b))
    ticks = sae_report._ticks(*((math.log10(low), math.log10(high)) if log else (low, high)), log)
    assert len(ticks) >= 2 and ticks == sorted(set(ticks)) and len(ticks) <= (32 if log else 6)
    assert (ticks[0] <= low * 1.000001 if log else ticks[0] == 0) and ticks[-1] >= high * 0.999999


@pytest.mark.parametrize("log", [True, False])
def test_a_chart_draws_its_values_in_their_place(log):
    points = [(0, 1.0), (500, 0.1), (1000, 0.01)]
    drawn = sae_report.chart("title", {"line": points}, {"dots": points[1:2]}, log)
    line = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]*)"', drawn)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 < y1 < y2  # downwards in SVG
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.5 if log else 0.9 / 0.99, abs=0.01)
    dot = re.search(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert (float(dot[1]), float(dot[2])) == (x1, y1)
    assert sae_report.chart("title", {"line": []}, {}, log) == ""


# ---- in a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.slow
def test_search_and_sort_in_a_browser(sae_path):
    from playwright.sync_api import sync_playwright

    write(sae_path, cards_a_page=15)
    report = sae_path.with_suffix(".report.html")
    asked, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(report.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0  # a phone shows it whole
        rows = page.locator("#index tbody tr:visible")
        assert rows.count() == LIVING and page.inner_text("#found") == f"{LIVING} of {LIVING}"
        page.fill("#query", "DOGS rome")
        expected = {i for i, (text, _) in MEANINGS.items() if "dogs" in text.lower() and "rome" in text.lower()} - {
            *DEAD
        }
        assert {int(row.split()[0]) for row in rows.all_inner_texts()} == expected and expected
        assert page.inner_text("#found") == f"{len(expected)} of {LIVING}"
        page.fill("#query", "at")  # whole words before parts of words, whatever order the table is in
        ranks = [match_rank(text.lower(), ["at"]) for text in rows.all_inner_texts()]
        assert ranks == sorted(ranks) and {0, 2} <= set(ranks)
        page.fill("#query", "")
        for column, order in ((3, -1), (3, 1), (0, 1)):  # score, highest first; again: lowest first; number
            page.locator("#index th").nth(column).locator("button").click()
            cells = page.evaluate("[...document.querySelectorAll('#index td')].map(cell => cell.textContent)")
            values = [float(text or -1) for text in cells[column::6]]
            assert values == sorted(values, reverse=order < 0)
        page.click(f"#index tbody tr >> nth={LIVING - 1} >> a")
        assert "/sae.report/latents-00" in page.url or "#latent-" in page.url
        assert page.locator(".latent-card:visible").count() > 0
        browser.close()
    assert errors == [] and all(url.startswith("file:") or url.startswith("data:") for url in asked)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="no SmolLM2 with a reference SAE: make page fetches it")
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_smollm2(tmp_path):
    """A real model's report: nothing is missing, and its first cards say something. Also takes its picture."""
    from playwright.sync_api import sync_playwright

    reference = Path(reference_sae(SMOLLM2))
    for path in reference.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    info = json.loads(reference.with_suffix(".json").read_text()) | {"model_dir": SMOLLM2}
    (tmp_path / "sae.json").unlink()
    (tmp_path / "sae.json").write_text(json.dumps(info))
    index = LatentIndex(tmp_path / "sae.pth")
    assert index.missing == []
    cards = [index.card(latent, 3) for latent in interesting_latents(index)[:12]]
    assert len(cards) == 12 and all(card.sentences and card.promoted and card.score > 0.5 for card in cards)
    if picture := os.environ.get("REPORT_PICTURE"):
        write(tmp_path / "sae.pth", latents=200)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1100, "height": 1000}, color_scheme="light")
            page.goto((tmp_path / "sae.report.html").as_uri())
            page.locator("#index").scroll_into_view_if_needed()
            page.locator("h2", has_text="Latents").evaluate("heading => heading.scrollIntoView()")
            page.screenshot(path=picture)
            browser.close()


def test_a_place_that_cannot_be_written_is_said_before_the_cards_are_read(sae_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sae_report, "read_cards", None)
    (tmp_path / "sae.report").touch()  # the folder of the pages
    said = refusal(capsys, sae_report, sae_model_path=sae_path)
    assert "sae.report/latents-0.html cannot be written (Not a directory)" in said

"""llama_3_inference_gradio.py in a real browser (Debian's Chromium, driven by Playwright), used as a person would.

What the page shows is compared with what `complete` and the SAE give in this process, one prompt and one user at a
time. Without Chromium these tests skip. PAGE_PICTURE=page.png also writes the picture of the README, of SmolLM2.

.venv/bin/python -m pytest tests/test_page.py
"""

import contextlib
import html
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
import uuid
from pathlib import Path
from urllib.request import proxy_bypass

import numpy as np
import pytest
import torch
from conftest import PROJECT_DIR, write_tiny_model
from support.gguf_files import write_vector
from support.pipeline_runs import as_flags, refusal

import llama_3_inference_gradio as page_script
from latents.index import LatentIndex
from latents.interesting import interesting_latents, latents_to_steer
from latents.markup import visible, visible_token
from latents.origin import read_info
from llama_3 import generation, load_model, load_tokenizer
from llama_3.chat import Message
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import encode_text, stream_chat
from microscope.ablation import Ablation, ablated, effect, every_head
from microscope.attention import patterns
from microscope.attribution import attribution
from microscope.lens import logit_lens
from microscope.patching import contrast_of, patch_map
from microscope.prompts import Prompt, continuation, read_prompt
from pipeline.errors import InputError
from sae import SparseAutoencoder, load_sae_model, save_sae
from serving.local_requests import past_proxies
from serving.modes import steering_defaults
from serving.page_html import strongest_html
from serving.requests import Limits, at_token, completions, look_at
from serving.steered_model import ModelChoice, Sampling, VectorChoice, fetched_reference, taken_from
from serving.steering import Steering, highest_activations, make_steering

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SAE_PATH = str(Path(TINY_LLAMA_DIR) / "sae.pth")
DEFAULT = steering_defaults(read_info(SAE_PATH), SAE_PATH)
SMOLLM2 = fetched_reference()
pytestmark = pytest.mark.slow  # importing gradio takes three seconds
SECONDS = 30_000  # a busy machine is not a failure


# ---- what the page should show


class Alone:
    """The embedded model and its SAE, serving one request in this process."""

    def __init__(self):
        self.model, self.tokenizer = load_model(TINY_LLAMA_DIR, packed=True), load_tokenizer(TINY_LLAMA_DIR)
        self.sae, self.highest = load_sae_model(SAE_PATH), highest_activations(SAE_PATH)
        self.index = LatentIndex(SAE_PATH, self.tokenizer, self.model, self.sae)

    def steering(self, strengths: dict[int, float], **how):
        return make_steering(self.sae, Steering(strengths, **how), self.highest, self.tokenizer.bos_id)

    def complete(self, prompts, n, steering=None, seed=0, temperature=0.7, top_p=0.95) -> list[str]:
        """Prompt and completion of each prompt by itself."""
        options = {"max_new_tokens": n, "temperature": temperature, "top_p": top_p, "steering": steering}
        seeds = [seed * 1_000_003 + i for i in range(len(prompts))]
        return [
            prompt + generation.complete(self.model, self.tokenizer, [prompt], seeds=[s], **options)[0].rstrip("\ufffd")
            for prompt, s in zip(prompts, seeds, strict=True)
        ]

    def first(self, word: str) -> int:
        """The latent that a search for the word finds first."""
        return self.index.search(word, sort="score", limit=1)[0]["latent"]

    def example(self) -> int:
        """The latent that steers the embedded model when the page opens."""
        found = self.index.search(page_script._TINY_LATENT, sort="score", limit=100)
        return next(row["latent"] for row in found if row["meaning"] == page_script._TINY_LATENT)


@pytest.fixture(scope="module")
def alone():
    return Alone()


# ---- the server and the browser


@contextlib.contextmanager
def serving(**options):
    """The real command, on the tiny Llama unless another is named; yields the page's address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"port": port, "llama_model_dir": TINY_LLAMA_DIR, **options}
    command = [sys.executable, page_script.__file__, *as_flags(options)]
    process = subprocess.Popen(command, cwd=PROJECT_DIR, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"Ready: http://127.0.0.1:{port}"), line + process.stderr.read()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def address():
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, request, tmp_path):
    """visit(address): a new user's window, which may request nothing except from the page's own server. If the test
    fails, a picture of every window is left in tmp_path."""
    windows, asked, failed_before = [], [], request.session.testsfailed

    def open_window(address: str):
        context = chromium.new_context(viewport={"width": 1400, "height": 950}, color_scheme="light")
        context.set_default_timeout(SECONDS)
        context.on("request", lambda asked_for: asked.append((address, asked_for.url)))
        window = context.new_page()
        windows.append(window)
        window.goto(address)
        window.get_by_role("button").locator("visible=true").first.wait_for()
        return window

    yield open_window
    for number, window in enumerate(windows):
        if request.session.testsfailed > failed_before:
            window.screenshot(path=tmp_path / f"window-{number}.png")
            print(f"picture: {tmp_path / f'window-{number}.png'}")
        assert "Traceback" not in window.content()
        window.context.close()
    own = [url for address, url in asked if url.startswith((address + "/", "data:", "blob:"))]
    assert own and len(own) == len(asked), [url for _, url in asked if url not in own]


def tab(window, name: str):
    window.get_by_role("tab", name=name, exact=True).click()


def press(window, name: str):
    window.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def field(window, label: str):
    return window.get_by_label(label, exact=True).locator("visible=true")


def set_slider(window, label: str, value: float, place: str = "body"):
    number = window.locator(place).get_by_label(f"number input for {label}").locator("visible=true")
    number.fill(str(value))
    number.press("Enter")
    number.blur()


def search(window, words: str):
    field(window, "Find a latent to steer with").fill(words)
    window.locator(f".results li:first-child:has-text('{words}')").wait_for()


def choose(window, latent: int):
    """Add a latent to those that steer, by its number."""
    search(window, str(latent))
    window.locator(f".results a[href='#steer-{latent}']").click()
    window.locator(f".slot a[href='#card-{latent}']").wait_for()


def remove_all(window):
    while (buttons := window.locator(".slot button:has-text('✕')").locator("visible=true")).count():
        n = buttons.count()
        buttons.first.click()
        playwright.expect(buttons).to_have_count(n - 1, timeout=SECONDS)


def status(window, text: str):
    window.locator(".status", has_text=re.compile(text)).locator("visible=true").first.wait_for()


def complete(window, prompts: list[str], n: int, **numbers):
    """Ask for completions and wait for them: {"clean": [...], "steered": [...]} with their prompts."""
    field(window, re.compile("Prompts, one per line")).fill("\n".join(prompts))
    set_slider(window, "Tokens", n)
    for label, value in numbers.items():
        if label == "Seed":
            field(window, label).fill(str(value))
        else:
            set_slider(window, label, value)
    press(window, "Complete")
    return lambda: table_of(window, n_rows=len(prompts))


def table_of(window, n_rows: int) -> dict[str, list[str]]:
    status(window, "^Done in")
    kinds = window.locator(".completions .kind").all_text_contents()
    texts = window.locator(".completions .text").all_text_contents()
    assert len(texts) == n_rows * len(kinds)
    return {kind: texts[i :: len(kinds)] for i, kind in enumerate(kinds)}


def error_of(window) -> str:
    """The sentence of the newest error shown, which is then closed."""
    toast = window.get_by_test_id("toast-body").first
    toast.wait_for()
    text = toast.get_by_test_id("toast-text").text_content().strip()
    toast.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")
    return text


# ---- each tab


@needs_browser
def test_first_visit(visit, address, alone):
    """A newcomer sees something in every tab without a click: steered completions, the latents of a text, a card."""
    window = visit(address)
    latent = alone.example()
    window.locator(f".slot a[href='#card-{latent}']").wait_for()
    opened = window.locator(".completions .text").all_text_contents()
    press(window, "Complete")
    table = table_of(window, 3)
    count = lambda kind: sum(text.lower().count("state") for text in table[kind])
    assert count("clean") == 0 and count("steered") > 3
    whole = [text for row in zip(table["clean"], table["steered"], strict=True) for text in row]
    assert len(opened) == 6  # and as long as _EXAMPLE_S allowed
    assert all(text.startswith(begun) for begun, text in zip(opened, whole, strict=True))
    assert opened[0] != page_script._TINY_EXAMPLES.prompts[0]

    tab(window, "Look inside")
    here = window.locator(".strongest li.here")
    colouring = int(here.locator(".latent-number").text_content())
    assert colouring in interesting_latents(alone.index)
    assert "--a" in window.locator(".look a.here").get_attribute("style")
    tab(window, "Latents")
    first = alone.index.search(limit=1)[0]
    window.locator(f".latent-card[data-latent='{first['latent']}']").wait_for()
    assert first["meaning"] in window.locator(".latents tr:has(td)").first.text_content()
    suggested, latent = window.locator(".suggested a"), latents_to_steer(alone.index)[0]
    assert suggested.first.text_content() == alone.index.meaning_of(latent)
    suggested.first.click()
    window.locator(f".slot a[href='#card-{latent}']").wait_for()


@needs_browser
@pytest.mark.skipif(not SMOLLM2, reason="no SmolLM2 with a reference SAE: make page fetches it")
def test_smollm2(visit):
    """What `make page` opens: a real model, of which a word of everyday life is found and turned up."""
    picture = os.environ.get("PAGE_PICTURE")
    with serving(llama_model_dir=SMOLLM2, **({} if picture else {"max_new_tokens": 12})) as address:
        window = visit(address)
        assert "SmolLM2-135M-Instruct" in window.locator("h1").text_content()
        remove_all(window)
        search(window, "sea")
        window.locator(".results a").first.click()
        named = window.locator(".slot a").locator("visible=true").first.text_content()
        assert re.search(r"\bsea\b", named)
        press(window, "Complete")
        assert table_of(window, 3)["steered"]
        if picture:
            window.set_viewport_size({"width": 1400, "height": 1000})
            window.mouse.move(0, 0)
            window.screenshot(path=picture)


@needs_browser
def test_complete_and_steer(visit, address, alone):
    """Two latents, each with its own strength, sampled; text that looks like HTML or a template stays text."""
    window = visit(address)
    prompts = ["The file is", "<b>${1+1}</b> {{value}} &amp;", "再见 é"]
    latents = [alone.first("matrix"), alone.first("number")]
    remove_all(window)
    status(window, "^Nothing steers yet")
    for latent in latents:
        choose(window, latent)
    set_slider(window, "Strength × its highest", 3, "#slot-0")
    set_slider(window, "Strength × its highest", -1.5, "#slot-1")
    table = complete(window, prompts, 24, Temperature=0.9, Seed=7)()
    steering = alone.steering(dict(zip(latents, (3.0, -1.5), strict=True)))
    sampling = {"n": 24, "seed": 7, "temperature": 0.9}
    assert table["clean"] == alone.complete(prompts, **sampling)
    assert table["steered"] == alone.complete(prompts, **sampling, steering=steering)
    assert table["clean"] != table["steered"]
    cells = window.locator(".completions .text")
    for row in range(3):  # unmarked words are the same on both sides
        sides = (cells.nth(2 * row + side) for side in (0, 1))
        # A sign is marked apart from the word before it, so the space between them is ignored.
        clean, steered = ("".join(side.evaluate(_UNMARKED).split()) for side in sides)
        assert clean == steered
    assert cells.locator("ins").count() and cells.locator("del").count()


_UNMARKED = """cell => {
    const copy = cell.cloneNode(true);
    copy.querySelectorAll('ins, del').forEach(marked => marked.replaceWith(' '));
    return copy.textContent;
}"""


@needs_browser
def test_modes(visit, address, alone):
    """Another mode, without the SAE's error; then a removed latent leaves a clean page."""
    window = visit(address)
    latent = alone.example()
    field(window, "Mode").click()
    window.get_by_role("option", name="clamp", exact=True).click()
    window.get_by_text(page_script.MODES["clamp"]).wait_for()
    field(window, "Keep what the SAE does not reconstruct").uncheck()
    table = complete(window, ["The file"], 16, Temperature=0)()
    steering = alone.steering({latent: DEFAULT.strength}, mode="clamp", keep_error=False)
    assert table["steered"] == alone.complete(["The file"], 16, steering, temperature=0)
    remove_all(window)
    press(window, "Complete")
    playwright.expect(window.locator(".completions .kind")).to_have_text(["clean"], timeout=SECONDS)
    status(window, "^Done in")
    assert table_of(window, 1) == {"clean": table["clean"]}


@needs_browser
def test_look_inside(visit, address, alone):
    """Tokens, the latents of one token, the text coloured by a latent, its card, and steering with it."""
    window = visit(address)
    text = "Read the file, é, and\nopen the file."
    ids = alone.tokenizer.encode(text, bos=True)
    with torch.inference_mode():
        values, indices = alone.sae.encode(alone.model.activations(torch.tensor([ids]), alone.sae.info["site"])[0, 1:])
    tab(window, "Look inside")
    field(window, "Text").fill(text)
    press(window, "Look")
    tokens = window.locator(".look a")
    playwright.expect(tokens).to_have_count(len(ids) - 1, timeout=SECONDS)
    assert "".join(tokens.all_text_contents()).replace("⏎", "").replace("·", "") == text
    place = tokens.all_text_contents().index(" file")
    tokens.nth(place).click()
    window.locator(".strongest li").first.wait_for()
    shown = window.locator(".strongest li > a .latent-number").all_text_contents()
    best = values[place].sort(descending=True)
    assert [int(number) for number in shown] == indices[place][best.indices[: len(shown)]].tolist()
    assert window.locator(".strongest .value").all_text_contents() == [f"{v:.2f}" for v in best.values[: len(shown)]]
    latent = int(shown[0])
    assert (alone.index.meaning_of(latent) or "no meaning") in window.locator(".strongest li").first.text_content()

    window.locator(".strongest li > a").first.click()
    status(window, f"^Coloured by latent {latent} ")
    coloured = tokens.evaluate_all("links => links.map(link => Number(link.style.getPropertyValue('--a')))")
    activations = (values * (indices == latent)).sum(1) / alone.highest[latent]
    assert coloured == pytest.approx(activations.clamp(max=1).tolist(), abs=0.0051)

    window.locator(".strongest .actions a").nth(0).click()  # its card, in another tab
    window.locator(f".latent-card[data-latent='{latent}']").wait_for()
    tab(window, "Look inside")
    window.locator(".strongest .actions a").nth(3).click()  # the second latent steers
    window.locator(f".slot a[href='#card-{shown[1]}']").wait_for()
    field(window, re.compile("Prompts, one per line")).wait_for()


@needs_browser
def test_latents(visit, address, alone):
    """The list, searched, sorted and turned; a card; from card to card; to steering."""
    window = visit(address)
    tab(window, "Latents")
    rows = window.locator(".latents tr:has(td)")
    number_of = lambda row: int(row.locator(".latent-number").text_content())
    playwright.expect(rows).to_have_count(50, timeout=SECONDS)
    first_page = rows.all_text_contents()
    press(window, "Next")
    status(window, "^51 to 100 of 4,0")
    assert not set(first_page) & set(rows.all_text_contents())
    press(window, "Previous")
    status(window, "^1 to 50 of 4,0")
    assert rows.all_text_contents() == first_page

    field(window, "Sort by").click()
    window.get_by_role("option", name="frequency", exact=True).click()
    most = int(alone.index.frequency.argmax())
    playwright.expect(rows.first.locator(".latent-number")).to_have_text(str(most), timeout=SECONDS)
    shares = [float(text.rstrip("%")) for text in rows.locator("td:last-child").all_text_contents()]
    assert shares == sorted(shares, reverse=True)

    field(window, "Search the meanings").fill("FILE path")
    named = [
        i for i, text in enumerate(alone.index.meaning) if text and "file" in text.lower() and "path" in text.lower()
    ]
    playwright.expect(rows).to_have_count(len(named), timeout=SECONDS)
    assert named and {number_of(row) for row in rows.all()} == set(named)

    rows.first.locator("a").click()
    card = window.locator(f".latent-card[data-latent='{number_of(rows.first)}']")
    card.wait_for()
    companion = card.locator("a[href^='#card-']").first
    other = int(companion.get_attribute("href").removeprefix("#card-"))
    companion.click()
    card = window.locator(f".latent-card[data-latent='{other}']")
    card.wait_for()
    known = alone.index.card(other)
    shown = card.text_content()
    assert known.sentences and all("".join(s.tokens).strip() in shown for s in known.sentences)
    assert f"{alone.highest[other]:.2f}" in shown and known.meaning in shown
    window.get_by_text("Steer with this latent").click()
    window.locator(f".slot a[href='#card-{other}']").wait_for()
    field(window, re.compile("Prompts, one per line")).wait_for()


@needs_browser
def test_microscope(visit, address, alone):
    """Cost first; lens and a cell; attention, a head and a token; every head off, and one; a patch map."""
    window, model = visit(address), alone.model
    read = lambda text: read_prompt(model, alone.tokenizer, text)
    shown = lambda token: visible_token(alone.tokenizer.decode([int(token)]))
    tab(window, "Microscope")
    field(window, "Prompt").fill("Open the file <b>")
    press(window, "Read")
    prompt, n_layers, n_heads = read("Open the file <b>"), model.args.n_layers, model.args.n_heads
    n = len(prompt.ids)
    status(window, f"^{n} tokens. On this machine: lens and attention about .* s; every head switched off about .* s; ")
    layers = logit_lens(model, prompt, "resid_post", 10)
    cells = window.locator(".map td").locator("visible=true")
    playwright.expect(cells).to_have_count(n_layers * n, timeout=SECONDS)
    expected = [shown(token) for layer in reversed(layers) for token in layer.token_ids[:, 0]]
    assert cells.all_text_contents() == expected
    window.locator(f".map a[href='#lens-{2 * n + 1}']").click()
    window.get_by_role("heading", name="After layer 2, on").wait_for()
    listed = window.locator(".ranked li").locator("visible=true").all_text_contents()
    pairs = zip(layers[2].token_ids[1], layers[2].probabilities[1], strict=True)
    assert listed == [f"{shown(token)}{p:.3f}" for token, p in pairs]

    tab(window, "Attention")
    frame = window.frame_locator("iframe.microscope")
    pattern = patterns(model, prompt, [5])[0][3]
    frame.get_by_role("button", name="Head 5.3", exact=True).click()
    frame.get_by_role("heading", name="Head 5.3", exact=True).wait_for()
    for query in (n - 1, 2):
        frame.locator("#to span").nth(query).click()
        titles = frame.locator("#to span").evaluate_all("tokens => tokens.map(token => token.title)")
        found = [float(title.partition(": ")[2]) for title in titles]
        assert found == pytest.approx(pattern[query].tolist(), abs=0.0071)

    tab(window, "Ablation")
    press(window, "Switch off every head")
    status(window, "Click one.$")
    effects = list(every_head(model, prompt, "zero"))
    clean = effect(model, prompt)
    answer = int(clean.log_p.argmax())
    titles = cells.evaluate_all("cells => cells.map(cell => Number(cell.title.split(': ')[1]))")
    drops = [float(clean.log_p[answer] - each.log_p[answer]) for layer in reversed(effects) for each in layer]
    assert titles == pytest.approx(drops, abs=0.0011)
    window.locator(f".map a[href='#head-{4 * n_heads + 2}']").click()
    window.get_by_role("heading", name="Without head 4.2", exact=True).wait_for()
    with ablated(model, Ablation(heads={4: [2]})):
        written = continuation(model, alone.tokenizer, prompt.ids, 16)
    assert written.split() == window.locator(".side p", has_text="…").last.text_content().removeprefix("…").split()

    tab(window, "Patching")
    other = "Open the line <b>"
    field(window, "Another prompt of as many tokens").fill(other)
    press(window, "Patch every layer and token")
    assert error_of(window) == "Both answers are '>'; name two different ones."
    field(window, "Answer after the prompt").fill(" file")
    field(window, "Answer after the other").fill(" line")
    press(window, "Patch every layer and token")
    status(window, "^Share restored of the logit .* after the other.$")
    contrast = contrast_of(model, alone.tokenizer, prompt, read(other), [" file", " line"])
    sites = [f"layers.{i}.resid_pre" for i in range(n_layers)]
    restored = patch_map(model, contrast, sites, contrast.ends(model)).flip(0).flatten()
    titles = cells.evaluate_all("cells => cells.map(cell => Number(cell.title.split(': ')[1]))")
    assert titles == pytest.approx(restored.tolist(), abs=0.0011)
    field(window, "Another prompt of as many tokens").fill("Open")
    press(window, "Patch every layer and token")
    assert error_of(window).startswith("The prompts do not align: ")
    field(window, "Prompt").fill("file " * 80)
    press(window, "Read")
    assert "maps here have at most 64 columns; shorten it" in error_of(window)


def test_look_inside_says_what_latents_add_to_the_next_token(tmp_path):
    """The amounts of a token equal the attribution of the prompt that ends there. The embedded SAE reads what no logit
    is a sum of, so another stands beside it."""
    path = str(tmp_path / "sae.pth")
    torch.manual_seed(0)
    sae = SparseAutoencoder(256, 300, 8)
    sae.initialize(torch.randn(256) * 0.1)
    info = {"site": "layers.5.resid_post", "rope_scaling_factor": 1.0}
    save_sae(sae, path, info)
    served = page_script.open_served(
        ModelChoice(TINY_LLAMA_DIR, sae_model_path=path), Limits(8, 4000, 256), VectorChoice()
    )
    opened = served.opened
    text = "Open the file and read"
    look = look_at(served, text)
    ids = encode_text(opened.tokenizer, text)
    for token in (0, 3):
        look = at_token(served, look, token)
        prompt = Prompt(ids[: token + 2], [])
        answer = int(opened.model(prompt.batch(opened.model))[0, -1].argmax())
        parts, _ = attribution(opened.model, prompt, answer, None, opened.sae)
        expected = {name: amount for name, amount in parts if name.startswith("latent")}
        found = {f"latent {latent}": adds for (latent, _), adds in zip(look.latents[token], look.adds, strict=True)}
        assert found == pytest.approx(expected, abs=1e-4)
        listed = strongest_html(served, served.index, look)
        assert f"{look.adds[0]:+.2f}" in listed and "Next is" in listed
    assert "Next is" not in strongest_html(served, served.index, look._replace(outlook=None, adds=()))


@needs_browser
def test_chat(visit, address, alone):
    """Two turns with a latent steering, answered as outside the page; then a new dialogue."""
    window = visit(address)
    steering = alone.steering({alone.example(): DEFAULT.strength})
    tab(window, "Chat")
    set_slider(window, "Tokens", 12)
    dialogue = [Message("system", "Be brief.")]
    field(window, "System message").fill(dialogue[0].content)
    for turn, question in enumerate(("What is a file?", "And <b>why</b>?")):
        dialogue.append(Message("user", question))
        pieces = stream_chat(
            alone.model, alone.tokenizer, [dialogue], None, max_new_tokens=12, temperature=0.7, top_p=0.95,
            seeds=[turn], steering=steering,
        )  # fmt: skip
        dialogue.append(Message("assistant", "".join(piece for (piece,) in pieces)))
        field(window, "Message").fill(question)
        field(window, "Message").press("Enter")
        answers = window.locator(".bot .message-content, .message.bot")
        playwright.expect(answers.last).to_have_text(dialogue[-1].content, timeout=SECONDS)
        playwright.expect(field(window, "Message")).to_have_value("", timeout=SECONDS)
    press(window, "New dialogue")
    playwright.expect(window.get_by_text("What is a file?")).to_have_count(0, timeout=SECONDS)


# ---- several users, wrong input, stopping


@needs_browser
def test_two_users_at_once(visit, address, alone):
    """Each gets what the same request gives alone, though they are served in turns."""
    requests = [
        {"latent": alone.first("matrix"), "prompts": ["The file", "A list"], "seed": 3},
        {"latent": alone.first("function"), "prompts": ["If the argument is", "The", "Note that"], "seed": 4},
    ]
    windows = [visit(address) for _ in requests]
    for window, request in zip(windows, requests, strict=True):
        remove_all(window)
        choose(window, request["latent"])
    tables = [
        complete(window, request["prompts"], 40, Seed=request["seed"])
        for window, request in zip(windows, requests, strict=True)
    ]
    for table, request in zip(tables, requests, strict=True):
        steering = alone.steering({request["latent"]: DEFAULT.strength})
        texts = table()
        assert texts["clean"] == alone.complete(request["prompts"], 40, seed=request["seed"])
        assert texts["steered"] == alone.complete(request["prompts"], 40, steering, request["seed"])
    for window, request in zip(windows, requests, strict=True):
        assert window.locator(".slot a").locator("visible=true").count() == 1
        assert window.locator(f".slot a[href='#card-{request['latent']}']").count() == 1


@needs_browser
def test_wrong_input(visit, address, alone):
    """Each gives a sentence in the page; afterwards everything still works."""
    window = visit(address)
    complete(window, [f"Prompt {i}" for i in range(9)], 8)
    assert error_of(window) == "There are 9 prompts, but the limit is 8; remove some."
    complete(window, ["one", "x" * 4001], 8)
    assert error_of(window) == "Prompt 2 has 4,001 characters, but the limit is 4,000; shorten it."
    complete(window, [" "], 8)
    assert error_of(window) == "There is no prompt; write at least one line."
    field(window, "Seed").fill("")
    complete(window, ["The file"], 8)
    assert error_of(window) == "The seed must be a whole number from 0 to 4294967295; correct it."
    field(window, "Seed").fill("0")
    complete(window, ["word " * 60], 255)
    assert "exceed the model's context of 256" in error_of(window)

    search_box = field(window, "Find a latent to steer with")
    search_box.fill("4096")
    status(window, "^There is no latent 4096; this SAE has latents 0 to 4095.$")
    search_box.fill("<i>zzz")
    status(window, "^No latent's meaning contains '<i>zzz'; try another word")
    remove_all(window)
    for latent in range(4):
        choose(window, latent)
    for latent, sentence in (
        (55, "At most 4 latents can steer at once; remove one first."),
        (3, "Latent 3 is already chosen."),
    ):
        search(window, str(latent))
        window.locator(f".results a[href='#steer-{latent}']").click()
        assert error_of(window) == sentence

    tab(window, "Look inside")
    window.locator(".look a").first.wait_for()  # the example, which must not come over what follows
    field(window, "Text").fill("word " * 300)
    press(window, "Look")
    assert "exceed the model's context of 256" in error_of(window)
    tab(window, "Chat")
    press(window, "Send")
    assert error_of(window) == "There is no message; write one."
    tab(window, "Complete and steer")
    remove_all(window)
    assert complete(window, ["The file"], 8)() == {"clean": alone.complete(["The file"], 8)}


@needs_browser
def test_stop(visit, address):
    """The text so far stays, nothing more comes, and the next request is served."""
    window = visit(address)
    complete(window, ["The file is"] * 8, 250)
    playwright.expect(window.locator(".completions .text")).to_have_count(16, timeout=SECONDS)
    press(window, "Stop")
    status(window, "^Stopped")
    window.wait_for_timeout(300)
    status(window, "^Stopped")
    texts = window.locator(".completions .text").all_text_contents()
    window.wait_for_timeout(1000)
    assert window.locator(".completions .text").all_text_contents() == texts
    complete(window, ["The file is"], 8)()


# ---- without an SAE, with a password


@needs_browser
def test_plain_page_with_a_password_behind_a_proxy(visit, tmp_path, monkeypatch):
    """A model alone: complete, microscope and chat, nothing to steer with. Nobody gets in without the password. The
    proxies, one of them SOCKS, are in nobody's way."""
    for name, proxy in (("HTTP_PROXY", "http"), ("HTTPS_PROXY", "http"), ("ALL_PROXY", "socks5")):
        monkeypatch.setenv(name, f"{proxy}://127.0.0.1:1")
    folder = write_tiny_model(tmp_path / "model")
    with serving(llama_model_dir=folder, auth="ann:se:cret") as address:
        window = visit(address)
        for password, is_right in (("wrong", False), ("se:cret", True)):
            window.get_by_label("username").fill("ann")
            window.get_by_label("password").fill(password)
            window.get_by_role("button", name="Login").click()
            if not is_right:
                window.get_by_text("Incorrect Credentials").wait_for()
        window.get_by_role("tab", name="Complete", exact=True).wait_for()
        assert window.get_by_role("tab").all_text_contents() == ["Complete", "Microscope", "Chat"]
        assert window.get_by_label("Find a latent to steer with").count() == 0
        model, tokenizer = load_model(folder, packed=True), load_tokenizer(folder)
        options = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.95, "seeds": [0]}
        expected = "hello" + generation.complete(model, tokenizer, ["hello"], **options)[0].rstrip("\ufffd")
        assert complete(window, ["hello"], 8)() == {"clean": [visible(expected)]}


# ---- without a browser


def complete_by_request(address: str, **values) -> dict:
    """What the server answers to Complete, pressed by a program: the boxes hold these values, by their labels."""
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    parts = {part["id"]: part["props"] for part in config["components"]}
    label = lambda part: str(parts[part].get("label"))
    event = next(d for d in config["dependencies"] if any(label(i).startswith("Prompts") for i in d["inputs"]))
    data = [values.get(label(i).partition(" ")[0], parts[i].get("value")) for i in event["inputs"]]
    session = uuid.uuid4().hex
    body = {"data": data, "fn_index": event["id"], "session_hash": session, "event_data": None, "trigger_id": None}
    sent = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/queue/join", sent, headers)).close()
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=40) as lines:
        done = next(line for line in lines if b"process_completed" in line)
    return json.loads(done.removeprefix(b"data:"))["output"]


STRENGTH = "cannot have strength {}; give a number from -1,000,000 to 1,000,000."


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, None),
        ({"Tokens": 2.5}, "Tokens must be a whole number from 1 to 256; correct it."),
        ({"Tokens": None}, "Tokens must be a whole number from 1 to 256; correct it."),
        ({"Tokens": math.nan}, "Tokens must be a whole number from 1 to 256; correct it."),
        ({"Temperature": None}, "Temperature must be a number from 0 to 10; correct it."),
        ({"Temperature": math.nan}, "Temperature must be a number from 0 to 10; correct it."),
        ({"Top-p": math.inf}, "Top-p must be a number from 0 to 1; correct it."),
        ({"Seed": None}, "The seed must be a whole number from 0 to 4294967295; correct it."),
        ({"Seed": 10**30}, "The seed must be a whole number from 0 to 4294967295; correct it."),
        ({"Strength": None}, STRENGTH.format("None")),
        ({"Strength": math.nan}, STRENGTH.format("nan")),
        ({"Strength": 1e30}, STRENGTH.format("1e+30")),
        ({"Prompts,": None}, "There is no prompt; write at least one line."),
    ],
    ids=str,
)
def test_numbers_that_no_slider_gives(address, values, said):
    found = complete_by_request(address, **{"Tokens": 3, **values})
    assert "error" not in found if said is None else html.unescape(found["error"]).endswith(said), found


@pytest.mark.parametrize("before", [{}, {"NO_PROXY": "a.b"}, {"no_proxy": "a.b"}, {"NO_PROXY": "a.b", "no_proxy": "c"}])
def test_no_proxy_variable_is_lost(monkeypatch, before):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HTTPS_PROXY": "http://proxy:1"} | before).items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    with past_proxies("127.0.0.1"):
        assert proxy_bypass("127.0.0.1") and not proxy_bypass("gradio.live")
        assert all(proxy_bypass(host) for host in [before.get("no_proxy") or before.get("NO_PROXY") or "127.0.0.1"])
        assert os.environ["HTTPS_PROXY"] == "http://proxy:1"
    with past_proxies():
        assert proxy_bypass("gradio.live")
    assert dict(os.environ) == environment


def test_port_0_is_a_free_one():
    port = page_script.free_port("127.0.0.1", 0)
    assert port > 0
    socket.create_server(("127.0.0.1", port)).close()


def test_refusals(capsys, tmp_path):
    """They come before anything is loaded."""
    refused = lambda **options: refusal(capsys, page_script, **options)
    assert refused(share=True) == "--share lets anyone in; set a password with --auth user:password."
    assert refused(auth="ann") == "--auth has no user and password; write it as user:password."
    assert refused(max_prompts=0) == "--max_prompts 0 is too small; it must be at least 1."
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Cannot listen on 127.0.0.1:{port}" in refused(port=port)


def test_sae_without_a_json(capsys, tmp_path):
    """A published file: the options say what it is; options that contradict a JSON or the model are refused."""
    path = shutil.copy(SAE_PATH, tmp_path / "published.pth")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    refused = lambda **options: refusal(capsys, page_script, port=port, llama_model_dir=TINY_LLAMA_DIR, **options)
    told = {"sae_layer_idx": 6, "k": 32, "normalize_eps": 1e-5}
    assert "name its layer with --sae_layer_idx" in refused(sae_model_path=path, k=32, normalize_eps=1e-5)
    assert "give k" in refused(sae_model_path=path, sae_layer_idx=6)
    assert "is beyond the model's 8 layers" in refused(sae_model_path=path, **told | {"sae_layer_idx": 8})
    assert "'layers.6.attention_norm', not 'layers.5.attention_norm'" in refused(sae_layer_idx=5)
    assert "says k = 32, not 64" in refused(k=64)
    assert "says rope_scaling_factor = 1.0, not 8.0" in refused(rope_scaling_factor=8)
    with pytest.MonkeyPatch.context() as patch:
        options = {"llama_model_dir": TINY_LLAMA_DIR, "sae_model_path": path, **told}
        patch.setattr(sys, "argv", ["page", *as_flags(options)])
        config = page_script.parse_constants(vars(page_script))
    served = page_script.open_served(taken_from(vars(config), ModelChoice), Limits(8, 4000, 256), VectorChoice())
    assert served.opened.sae.info["site"] == "layers.6.attention_norm"
    assert served.opened.sae.k == 32 and served.index.n_latents == 4096
    assert served.opened.highest is None  # no file beside it has the highest activations
    assert page_script.first_chosen(served, served.index) == []
    config = page_script.build(served).get_config_file()
    shown = [part["props"].get("value") for part in config["components"] if part["type"] == "html"]
    assert any("Nothing steers yet" in str(value) for value in shown)
    assert any("latent-card" in str(value) and "no meaning" in str(value) for value in shown)


def test_control_vectors_have_number_boxes(tiny_model_dir, tmp_path):
    """Also where there is no SAE; what the boxes hold steers."""
    vectors = {name: np.random.default_rng(i).standard_normal(36).astype(np.float32) for i, name in enumerate("ab")}
    paths = [str(write_vector(tmp_path / f"{name}.gguf", {"direction.1": v})) for name, v in vectors.items()]
    choice = ModelChoice(llama_model_dir=str(tiny_model_dir), dtype="float32", device="cpu")
    served = page_script.open_served(choice, Limits(8, 4000, 256), VectorChoice(paths, [9, 0]))
    config = page_script.build(served).get_config_file()
    boxes = {part["props"].get("label"): part["props"] for part in config["components"] if part["type"] == "number"}
    assert boxes["Control vector a"]["value"] == 9 and boxes["Control vector b"]["value"] == 0
    with page_script.gr.Blocks():
        controls = page_script.steering_controls(served, None)
    assert controls.first.control_vectors == {"a": 9}
    steering = controls.read(dict(zip(controls.inputs, [0, -4.5], strict=True)))
    assert steering.control_vectors == {"b": -4.5}
    sampling = Sampling(6, 0, 1, 0)
    *_, texts = completions(served, ["hello"], controls.first, sampling)
    with served.opened.model.intervene("layers.1.resid_post", lambda x: x + 9 * torch.from_numpy(vectors["a"])):
        expected = generation.complete(served.opened.model, served.opened.tokenizer, ["hello"], max_new_tokens=6)
    assert texts["steered"] == expected != texts["clean"]
    with pytest.raises(InputError, match="cannot have scale None"):
        list(completions(served, ["hello"], controls.read(dict.fromkeys(controls.inputs)), sampling))

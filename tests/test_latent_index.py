"""The index of latents against naive readings of its files; cards as HTML; the reference SAE's sentences.

.venv/bin/python -m pytest tests/test_latent_index.py
"""

import html
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import blobfile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.latent_files import DEAD, MEANINGS, N_LATENTS, TEXTS, known, write_latents, write_meaning_file
from support.pipeline_runs import call

import openwebtext_sentences_dataset
from embedded import corpus as documentation_corpus
from embedded.places import write_places
from latents.cards import card_html, tokens_html
from latents.index import SORTS, LatentIndex, pieces
from latents.meanings import Meaning, best_meanings, read_meanings
from llama_3 import load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR, checkpoint_identity
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR, write_json
from pipeline.sentences import SentenceDataset

REFERENCE = f"{TINY_LLAMA_DIR}/sae.pth"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture(scope="module")
def sae_path(tmp_path_factory, tiny_model_dir, tokenizer):
    return write_latents(tmp_path_factory.mktemp("latents"), tiny_model_dir, tokenizer)


@pytest.fixture(scope="module")
def index(sae_path):
    return LatentIndex(sae_path)


# ---- meanings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_meanings_saved_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.yaml").write_text("3: {certainty: 0.5, common_semantic: größer}", encoding=encoding)
    assert read_meanings(tmp_path / "a.yaml") == {3: Meaning("größer", 0.5)}


def test_of_several_meanings_the_best_scored_wins(tmp_path):
    (tmp_path / "sae.json").write_text('{"n_latents": 9}')
    first = {0: ("good", 0.2), 1: ("bad", 1.0), 2: ("sure", 0.9), 3: ("tie", 0.5), 4: ("only", 0.1)}
    first |= {5: ("proved", 0.1)}
    write_meaning_file(tmp_path / "sae.meaning_a.yaml", first, {0: 0.8, 1: 0.4, 3: 0.7, 5: 0.6})
    second = {0: ("worse", 1.0), 1: ("not scored", 0.1), 2: ("less sure", 0.8), 3: ("surer", 0.6), 5: ("guessed", 1.0)}
    write_meaning_file(tmp_path / "sae.meaning_b.yaml", second, {0: 0.6, 3: 0.7})
    write_meaning_file(tmp_path / "other.meaning_a.yaml", {6: ("of another SAE", 1.0)})
    found = best_meanings(tmp_path / "sae.pth")
    texts = {latent: meaning.text for latent, meaning in found.items()}
    assert texts == {0: "good", 1: "not scored", 2: "sure", 3: "surer", 4: "only", 5: "proved"}
    assert found[0].score == pytest.approx(0.8) and found[1].score is None
    index = LatentIndex(tmp_path / "sae.pth")
    assert index.meaning_of(3) == "surer" and index.meaning_of(8) is None and math.isnan(index.certainty[8])


def test_endings_in_capitals(tmp_path):
    (tmp_path / "sae.json").write_text('{"n_latents": 9}')
    write_meaning_file(tmp_path / "sae.meaning_a.YAML", {1: ("one", 1.0)}, {1: 0.8})
    index = LatentIndex(tmp_path / "sae.PTH")
    assert index.meaning_of(1) == "one" and index.score[1] == pytest.approx(0.8)


def test_null_and_empty_are_no_meaning(tmp_path):
    (tmp_path / "sae.json").write_text('{"n_latents": 9}')
    text = "3: {certainty: 0.0, common_semantic: null}\n4: {certainty: null, common_semantic: ' '}\n"
    (tmp_path / "sae.meaning_a.yaml").write_text(text + "5: {certainty: 1, common_semantic: 'no'}\n")
    index = LatentIndex(tmp_path / "sae.pth")
    assert [index.meaning_of(latent) for latent in (3, 4, 5)] == [None, None, "no"] and index.search("none") == []


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "a: {certainty: 1}",
        "1: {certainty: x, common_semantic: y}",
        "{",
        "1: 2",
        "-1: {certainty: 0.9, common_semantic: minus one}",
        "1.5: {certainty: 0.9, common_semantic: one and a half}",
        "true: {certainty: 0.9, common_semantic: one}",
        "null: {certainty: 0.9, common_semantic: nothing}",
        *(f"1: {{certainty: 0.9, common_semantic: {text}}}" for text in ("no", "2024", "1.5", "2024-01-01", "[a, b]")),
        *(
            f"1: {{certainty: {value}, common_semantic: y}}"
            for value in (".nan", ".inf", "-0.1", "90", "90%", "null", "true")
        ),
    ],
)
def test_a_broken_file_of_meanings_is_named(tmp_path, text):
    path = tmp_path / "sae.meaning_a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="sae.meaning_a.yaml holds no meanings"):
        best_meanings(tmp_path / "sae.pth")


# ---- the list


@given(
    st.lists(
        st.sampled_from(["dogs", "DOGS", "cat", "of", "é", "fiction", "&", "<b>", "3", "7", "39", "40"]), max_size=3
    ),
    st.sampled_from(SORTS),
    st.booleans(),
    st.integers(0, 12),
    st.integers(0, 50),
)
def test_search_against_a_loop(index, words, sort, living_only, offset, limit):
    query = " ".join(words)
    latents = pq.read_table(str(index.sae_path)[:-4] + ".latents.parquet").to_pylist()
    scored = pq.read_table(str(index.sae_path)[:-4] + ".meaning_a.scores.parquet").to_pylist()
    scores = {row["latent"]: row["balanced_accuracy"] for row in scored}
    rows = []
    for i, of in enumerate(latents):
        text, certainty = MEANINGS.get(i, (None, None))
        asked = query == str(i)
        fits = all(word.lower() in (text or "").lower() for word in words)
        if asked or (fits and not (living_only and i in DEAD)):
            row = {"certainty": certainty, "score": scores.get(i), "frequency": of["frequency"], "latent": i}
            order = [-1.0 if row[key] is None else row[key] for key in (sort, "score", "certainty")]
            key = (i,) if sort == "latent" else (*(-value for value in order), i)
            rows.append(((not asked, *key), {**row, "meaning": text, "highest": of["max"]}))
    expected = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    found = index.search(query, sort, limit, offset, living_only)
    assert [row["latent"] for row in found] == [row["latent"] for row in expected[offset : offset + limit]]
    for row, right in zip(found, expected[offset : offset + limit], strict=True):
        assert row == right
    assert index.count(query, living_only) == len(expected)


def test_what_is_not_known_is_none_and_json(index):
    rows = index.search(limit=N_LATENTS, living_only=False)
    assert json.loads(json.dumps(rows)) == rows
    assert next(row for row in rows if row["latent"] == 31)["certainty"] is None


# ---- cards


@pytest.mark.parametrize("latent", [0, 1, 12, 35, 39, *DEAD])
def test_a_card_holds_what_the_files_say(index, sae_path, tokenizer, latent):
    card = index.card(latent, 3)
    row = pq.read_table(sae_path.with_suffix(".latents.parquet")).to_pylist()[latent]
    assert (card.latent, card.frequency, card.mean, card.highest) == (
        latent,
        *(row[n] for n in ("frequency", "mean", "max")),
    )
    assert card.sentences_by_tenth == row["sentences_by_tenth"]
    assert (card.meaning, known(card.certainty)) == MEANINGS.get(latent, (None, None))
    after = (latent + 1) % N_LATENTS
    assert card.co_firing == [(after, index.meaning[after], 0.5), (35, None, 0.25)]
    promoted = pq.read_table(sae_path.with_suffix(".promoted.parquet")).to_pylist()[latent]
    assert card.promoted == list(zip(promoted["tokens"], promoted["scores"], strict=True))
    assert card.suppressed == [(token, -value) for token, value in card.promoted]

    rows = pq.read_table(sae_path.with_suffix(".top.parquet")).to_pylist()
    rows = [r for r in rows if r["latent"] == latent and r["aggregation"] == "max"]
    distinct = list({row["text"]: row for row in reversed(rows)}.values())[::-1]
    assert len(distinct) == (0 if latent in DEAD else 4)
    assert ["".join(s.tokens) for s in card.sentences] == [r["text"] for r in distinct][:3]
    for sentence, row in zip(card.sentences, distinct, strict=False):
        assert sentence.activations == [float(a) for a in row["token_activations"]]
        assert sentence.activation == max(sentence.activations) == row["activation"]
        assert len(sentence.tokens) == len(row["token_ids"])


def test_a_latents_rows_lie_in_several_row_groups(sae_path):
    """Otherwise the test above would not notice a card that reads only one group."""
    file = pq.ParquetFile(sae_path.with_suffix(".top.parquet"))
    groups = [set(file.read_row_group(i, ["latent"])["latent"].to_pylist()) for i in range(file.num_row_groups)]
    assert any(len(a & b) for a, b in zip(groups, groups[1:], strict=False))


def test_there_is_no_such_latent(index):
    for latent in (-1, N_LATENTS):
        with pytest.raises(InputError, match=f"no latent {latent}: .* has 0 to {N_LATENTS - 1}"):
            index.card(latent)


@given(st.text(max_size=30))
def test_pieces_are_the_text_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert "".join(found) == text and len(found) == len(ids)


# ---- missing files


def test_missing_files_make_missing_fields(tmp_path):
    (tmp_path / "sae.json").write_text('{"n_latents": 5}')
    index = LatentIndex(tmp_path / "sae.pth")
    card = index.card(4)
    assert card.meaning is None and math.isnan(card.frequency) and math.isnan(card.score)
    assert card.sentences == card.promoted == card.suppressed == card.co_firing == card.sentences_by_tenth == []
    assert [row["latent"] for row in index.search(limit=3)] == [0, 1, 2] and index.count("") == 5
    said = "\n".join(index.missing)
    for script in (
        "capture_top_activating_sentences.py",
        "promoted_tokens.py",
        "interpret_top_sentences_parse_responses.py",
    ):
        assert script in said and (PROJECT_DIR / script).exists()
    write_meaning_file(tmp_path / "sae.meaning_a.yaml", {1: ("one", 0.5)})
    assert "score_interpretations.py" in "\n".join(LatentIndex(tmp_path / "sae.pth").missing)


def test_everything_there_nothing_missing(index):
    assert index.missing == []


def test_no_tokenizer_no_sentences(tmp_path, tiny_model_dir, tokenizer):
    path = write_latents(tmp_path, tmp_path / "nowhere", tokenizer)
    index = LatentIndex(path)
    assert index.card(0).sentences == [] and "tokenizer" in index.missing[-1]
    assert len(LatentIndex(path, tokenizer).card(0).sentences) == 4


def test_the_model_is_found_beside_the_sae_and_compared(tmp_path, tiny_model_dir, tokenizer, monkeypatch):
    path = write_latents(tmp_path / "sae", tiny_model_dir, tokenizer)
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    identity = checkpoint_identity(str(tiny_model_dir))

    def n_sentences(model: dict) -> int:
        info = json.loads(path.with_suffix(".json").read_text())
        moved = {"model_dir": "../model", "absolute": {"model_dir": "/nowhere"}, "model": model}
        write_json(path.with_suffix(".json"), info | moved)
        index = LatentIndex("sae.pth")
        n = len(index.card(0).sentences)
        assert n or "is not the model of" in index.missing[-1]
        return n

    monkeypatch.chdir(path.parent)
    assert n_sentences(identity) == 4
    assert n_sentences(identity | {"weights_sha256": "another"}) == 0
    (tmp_path / "model" / "consolidated.00.pth").unlink()  # the tokenizer alone is enough
    assert n_sentences(identity) == 4


def test_cards_opened_at_once_are_each_their_own(index):
    from concurrent.futures import ThreadPoolExecutor

    latents = [i % N_LATENTS for i in range(0, 7 * N_LATENTS, 7)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(index.card, latents))
    # repr: nan is not equal to itself
    assert list(map(repr, together)) == [repr(index.card(latent)) for latent in latents]


class Sae41:
    n_latents = N_LATENTS + 1


def test_nothing_says_how_many_latents_there_are(tmp_path):
    with pytest.raises(InputError, match="how many latents"):
        LatentIndex(tmp_path / "sae.pth")


def test_files_of_another_sae_are_named_and_the_rest_works(tmp_path, tiny_model_dir, tokenizer):
    path = write_latents(tmp_path, tiny_model_dir, tokenizer)
    write_meaning_file(tmp_path / "sae.meaning_b.yaml", {N_LATENTS: ("beyond", 1.0)})
    write_meaning_file(tmp_path / "sae.meaning_c.yaml", {31: ("scored for others", 0.5)}, {0: 0.9})
    index = LatentIndex(path)
    assert [line.partition("; ")[0] for line in index.missing] == [
        f"{tmp_path}/sae.meaning_b.yaml names latent {N_LATENTS} of {N_LATENTS}",
        f"{tmp_path}/sae.meaning_c.scores.parquet scores latent 0, which sae.meaning_c.yaml does not name",
    ]
    assert index.meaning_of(0) == MEANINGS[0][0] and index.meaning_of(31) == "scored for others"
    index = LatentIndex(path, tokenizer, sae=Sae41())
    for kind in ("latents", "promoted"):
        assert any(f"sae.{kind}.parquet has 40 latents, {path} 41; run" in line for line in index.missing)
    card = index.card(0)
    assert math.isnan(card.highest) and card.promoted == [] and len(card.sentences) == 4


TABLES = ["latents", "top", "promoted", "meaning_a.scores"]


@pytest.mark.parametrize("kind", [*TABLES, "json", "meaning_a.yaml"])
@pytest.mark.parametrize("how", ["no parquet", "cut", "damaged", "another type", "null", "a folder", "no rights"])
def test_a_broken_file_is_named_and_the_rest_works(tmp_path, tiny_model_dir, tokenizer, monkeypatch, kind, how):
    path = write_latents(tmp_path, tiny_model_dir, tokenizer)
    file = tmp_path / (f"sae.{kind}.parquet" if kind in TABLES else f"sae.{kind}")
    if kind not in TABLES and how not in ("no parquet", "a folder", "no rights"):
        return
    whole = file.read_bytes()
    if how in ("another type", "null"):
        table = pq.read_table(file)
        column = {"latents": "frequency", "top": "activation", "promoted": "tokens"}.get(kind, "balanced_accuracy")
        values = pa.array(["x"] * len(table)) if how == "another type" else pa.nulls(len(table), table[column].type)
        place = table.schema.get_field_index(column)
        pq.write_table(table.set_column(place, column, values), file)
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how == "no rights":
        refuse(monkeypatch, file)
    else:
        n = len(whole)
        damaged = whole[:8] + bytes(b ^ 255 for b in whole[8 : n // 2]) + whole[n // 2 :]
        file.write_bytes({"no parquet": b"{PAR1 not at all", "cut": whole[: n // 2], "damaged": damaged}[how])
    index = LatentIndex(path)
    card = index.card(0)
    assert any(str(file) in line for line in index.missing)
    assert (card.meaning is None) == (kind == "meaning_a.yaml")
    assert math.isnan(card.score) == ("meaning_a" in kind)
    assert math.isnan(card.highest) == (kind == "latents")
    assert (card.promoted == []) == (kind == "promoted")
    assert (card.sentences == []) == (kind in ("top", "json"))
    assert card_html(card) and len(index.search("")) >= 38


def refuse(monkeypatch, path: Path) -> None:
    """As if nobody may read this file."""

    def guarded(read):
        def attempt(source, *args, **kwargs):
            if os.fsdecode(source) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return read(source, *args, **kwargs)

        return attempt

    monkeypatch.setattr(pa, "memory_map", guarded(pa.memory_map))
    monkeypatch.setattr(Path, "read_bytes", guarded(Path.read_bytes))
    monkeypatch.setattr(blobfile, "BlobFile", guarded(blobfile.BlobFile))


# ---- HTML


class Checker(HTMLParser):
    """Collects text and attributes; every tag must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.links, self.titles = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.links += [value for name, value in attributes if name == "href"]
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@given(st.lists(st.tuples(st.text(max_size=6), st.sampled_from([0.0, 0.5, 1.0, 3.0])), max_size=12))
def test_coloured_tokens_keep_the_text(pairs):
    tokens, activations = [token for token, _ in pairs], [value for _, value in pairs]
    found = tokens_html(tokens, activations, 2.0)
    assert html.unescape(re.sub(r"<[^>]*>", "", found)) == "".join(tokens)
    depths = [float(depth) for depth in re.findall(r"--a:([\d.]+)", found)]
    assert depths == [min(1.0, value / 2) for token, value in pairs if token and value > 0]


def test_coloured_tokens_by_hand():
    found = tokens_html(["<a", " big", "\n"], [0.0, 1.5, 3.0], 3.0)
    spans = '<span style="--a:0.50" title="1.5">big</span><span style="--a:1.00" title="3">\n</span>'
    assert found == f'<span class="latent-tokens">&lt;a {spans}</span>'
    assert "--a:1.00" in tokens_html(["a"], [1.0], 0.0)


def test_promoted_tokens_are_visible_whatever_they_are(index):
    card = index.card(0)._replace(
        promoted=[(" a b", 1.0), ("\n", 0.5), ("\x07<", 0.25), ("\u202e", 0.25), ("", 0.125)], suppressed=[]
    )
    rows = re.findall(r"<code>(.*?)</code><span>(.*?)</span>", card_html(card))
    assert rows == [("·a·b", "+1.0"), ("↵", "+0.5"), ("␇&lt;", "+0.2"), (r"\u202e", "+0.2"), ("∅", "+0.1")]


@pytest.mark.parametrize("latent", [5, 31, *DEAD])
def test_a_card_in_html(index, latent):
    card = index.card(latent)
    checker = Checker(card_html(card, lambda other: f"#latent-{other}" if other == 35 else None))
    text = "".join(checker.texts)
    assert (card.meaning or "no meaning") in text and str(latent) in text
    assert all("".join(sentence.tokens) in text for sentence in card.sentences)
    assert ("score" in checker.texts) == (not math.isnan(card.score))
    assert checker.links == ["#latent-35"]
    for i, count in enumerate(card.sentences_by_tenth):
        assert f"{10 * i}% to {10 * i + 10}% of its highest: {count:,} sentences" in text


def test_a_card_of_which_nothing_is_known(tmp_path):
    (tmp_path / "sae.json").write_text('{"n_latents": 5}')
    text = card_html(LatentIndex(tmp_path / "sae.pth").card(2))
    Checker(text)
    assert "nan" not in text and "None" not in text


def test_the_bars_grow_with_the_logarithm(index):
    card = index.card(0)._replace(sentences_by_tenth=[0, 1, 9, 99, 999, 0, 0, 0, 0, 12345])
    heights = [float(h) for h in re.findall(r'width="16" height="([\d.]+)"', card_html(card))]
    expected = [math.log1p(count) for count in card.sentences_by_tenth]
    np.testing.assert_allclose(np.array(heights) / heights[-1], np.array(expected) / expected[-1], atol=0.003)
    assert ">12k</text>" in card_html(card) and ">999</text>" in card_html(card)


# ---- the reference SAE


@pytest.fixture(scope="module")
def reference():
    return LatentIndex(REFERENCE)


@pytest.mark.slow
def test_the_reference_saes_sentences_come_from_the_installed_documentation(reference):
    """The texts are in the packages, and the activations shown equal a dense computation from the model's."""
    import torch

    from llama_3 import load_model
    from sae import load_sae_model

    assert reference.missing == [] and reference.n_latents == 4096
    path = f"{TINY_LLAMA_DIR}/sae.top_places.parquet"
    places = pq.read_table(path).to_pylist()
    model, sae, tokenizer = load_model(), load_sae_model(REFERENCE), load_tokenizer()
    n_shown = 0
    for latent in (17, 1279, 3577):
        mine = [place for place in places if place["latent"] == latent]
        assert [place["rank"] for place in mine] == list(range(len(mine))) and len(mine) == 5
        texts = {}
        for place in mine:
            paragraphs = documentation_corpus.read_source(place["source"])
            if place["paragraph"] < len(paragraphs):
                text = paragraphs[place["paragraph"]][place["start"] : place["start"] + place["length"]]
                texts[text] = place["activation"]
        for sentence in reference.card(latent).sentences:
            n_shown += 1
            text = "".join(sentence.tokens)
            assert sentence.activation == pytest.approx(texts[text], rel=0.02)  # captured in another batch
            x = model.activations(torch.tensor([tokenizer.encode(text)]), sae.info["site"])[0].double()
            z = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
            pre_acts = (z - sae.b_pre) @ sae.encoder.weight.double().t() + sae.encoder.bias
            kept = pre_acts >= pre_acts.topk(sae.k).values[:, -1:]
            dense = (pre_acts * kept).clamp(min=0)[:, latent]
            np.testing.assert_allclose(sentence.activations, dense, atol=1e-3)
    assert n_shown >= 8, "hardly any sentence of the reference SAE stands in this installation's packages"


def test_a_sentence_that_another_version_changed_is_left_out(monkeypatch, reference):
    whole = reference.card(1279).sentences
    changed = "".join(whole[1].tokens)
    read = documentation_corpus.read_source
    other = lambda name: [p.replace(changed, changed.replace("the", "thy", 1).upper()) for p in read(name)]
    monkeypatch.setattr("embedded.places.read_source", other)
    assert reference.card(1279).sentences == [whole[0], *whole[2:]]
    monkeypatch.setattr("embedded.places.read_source", lambda name: [])
    assert reference.card(1279).sentences == []


def test_the_places_quote_nothing_and_are_small():
    path = Path(TINY_LLAMA_DIR, "sae.top_places.parquet")
    file = pq.ParquetFile(path)
    texts = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
    assert texts == ["source"] and file.metadata.num_rows > 4 * 4096
    assert path.stat().st_size < 500_000


def test_sources_by_name():
    sources = dict(documentation_corpus.find_sources())
    for name in ("textwrap.py", "tqdm/std.py"):
        assert documentation_corpus.read_source(name) == documentation_corpus.read_file((name, sources[name]))[1] != []
    topics = dict(documentation_corpus.read_topics())
    assert documentation_corpus.read_source("topics:with") == topics["topics:with"] != []
    assert documentation_corpus.read_source("nowhere/at_all.py") == documentation_corpus.read_source("topics:no") == []


def test_places_lead_back_to_the_sentences(tmp_path):
    """Documents with some paragraphs dropped, split by the real script; every place gives its sentence."""
    names = ["textwrap.py", "topics:with", "csv.py"]
    documents = {name: documentation_corpus.read_source(name) for name in names}
    kept = {name: [p for i, p in enumerate(paragraphs) if i % 5 != 1] for name, paragraphs in documents.items()}
    (tmp_path / "documents").mkdir()
    texts = ["\n\n".join(paragraphs) for paragraphs in kept.values()]
    pq.write_table(pa.table({"text": texts, "source": names}), tmp_path / "documents" / "documents.parquet")
    options = {"input_path": tmp_path / "documents", "output_dir": tmp_path / "sentences", "punkt": "corpus"}
    call(openwebtext_sentences_dataset, **options, num_processes=1)
    dataset = SentenceDataset(tmp_path / "sentences")
    rows = [
        {"latent": i // 8, "aggregation": a, "rank": i % 8, "activation": 1.0, "sentence_idx": i, "text": dataset[i]}
        for i in range(len(dataset))
        for a in ("max", "mean")
    ]
    rows.insert(1, rows[0] | {"rank": 1, "aggregation": "max"})  # the same text again
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sae.top.parquet")
    write_places(
        tmp_path / "sae.top.parquet", tmp_path / "sentences", tmp_path / "documents", tmp_path / "places.parquet"
    )
    found: dict[int, list[str]] = {}
    for place in pq.read_table(tmp_path / "places.parquet").to_pylist():
        text = documents[place["source"]][place["paragraph"]][place["start"] :][: place["length"]]
        assert place["rank"] == len(found.setdefault(place["latent"], []))
        found[place["latent"]].append(text)
    inside = [i for i in range(len(dataset)) if "\n\n" not in dataset[i]]
    expected = {i // 8: [dataset[j] for j in inside if j // 8 == i // 8] for i in inside}
    assert found == {latent: list(dict.fromkeys(some))[:5] for latent, some in expected.items()}
    assert len(found) > 5


def test_the_texts_of_these_tests_need_several_tokens_a_character(tokenizer):
    assert any("" in pieces(tokenizer, tokenizer.encode(text)) for text in TEXTS)

"""Names of latents by their distinctive words: planted words must be found, scores must equal the published formula,
and features must be those one reads off the marked text.

.venv/bin/python -m pytest tests/test_distinctive_words.py
"""

import json
import math
import random
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import PROJECT_DIR
from hypothesis import given
from hypothesis import strategies as st
from support.pipeline_runs import call, refusal, write_sentences

import interpret_top_sentences_distinctive_words as distinctive
from interpret_top_sentences_distinctive_words import Corpus
from latents.words import features
from llama_3 import load_tokenizer
from pipeline.files import write_json

TOKENIZER_DIR = PROJECT_DIR / "llama_3/tiny_llama"
TOKENIZER = load_tokenizer(TOKENIZER_DIR)
COMMON = ["the", "a", "of", "file", "returns", "value", "and", "is", "to", "user", "if", "not", "object", "it"]
# latent -> word in all its sentences. YAML would read a bare `no` or `null` as something else.
PLANTED = {3: "llama", 40: "no", 7: "null", 12: "naïve", 11: "don't"}


def sentence(rng: random.Random, *words: str) -> str:
    chosen = [*rng.choices(COMMON, k=rng.randint(3, 9)), *words]
    rng.shuffle(chosen)
    return " ".join(chosen).capitalize() + "."


def top_rows(latent: int, aggregation: str, texts: list[str], word: str | None = None) -> list[dict]:
    """Rows of sentences; the latent fires on all their tokens, or on those of one word."""
    rows = []
    for rank, text in enumerate(texts):
        ids = TOKENIZER.encode(text)
        activations = [1.0] * len(ids)
        if word is not None:
            start = text.index(word)
            ends = [len(TOKENIZER.decode(ids[: i + 1])) for i in range(len(ids))]
            activations = [2.0 * (end > start and begin < start + len(word)) + 0.9
                           for begin, end in zip([0, *ends], ends, strict=False)]  # fmt: skip
        about = {"latent": latent, "aggregation": aggregation, "rank": rank, "text": text, "activation": 1.0}
        rows.append(about | {"token_ids": ids, "token_activations": activations})
    return rows


@pytest.fixture
def sae_path(tmp_path):
    """An SAE's files (without its weights, which naming does not need) and the sentences."""
    rng = random.Random(0)
    rare = [*PLANTED.values(), "camel", "zebra", "guanaco", "vicuna", "tail", "beyond"]
    corpus = [sentence(rng, *([rng.choice(rare)] if i % 8 == 0 else [])) for i in range(600)]
    sentences_dir = write_sentences(tmp_path / "sentences", corpus)
    rows = []
    for latent, word in PLANTED.items():
        rows += top_rows(latent, "mean", [sentence(rng, word) for _ in range(30)])
    # Latent 20: one word in 80 % of the sentences. 21: two words, each in half. 22, 23: too few. 24: no words.
    rows += top_rows(20, "mean", [sentence(rng, *(["camel"] if i % 5 else [])) for i in range(30)])
    rows += top_rows(21, "mean", [sentence(rng, "zebra" if i % 2 else "guanaco") for i in range(30)])
    rows += top_rows(22, "mean", [sentence(rng, "vicuna") for _ in range(4)])
    rows += top_rows(23, "mean", ["Llama."])
    rows += top_rows(24, "mean", [f"{i} + {i}" for i in range(10)])
    # Latent 25 fires on the word, not on the rarer one beside it.
    rows += top_rows(25, "mean", [f"The quokka reads a file and then {i} more." for i in range(30)], "file")
    # By last token, latent 3 has another meaning; only the first 50 ranks count.
    rows += top_rows(3, "last", [sentence(rng, "tail" if i < 50 else "beyond") for i in range(100)])
    rows.sort(key=lambda row: row["latent"])
    table = pa.Table.from_pylist(rows)
    kinds = table.column("aggregation").dictionary_encode()
    pq.write_table(table.set_column(1, "aggregation", kinds), tmp_path / "sae.top.parquet")
    write_json(
        tmp_path / "sae.json",
        {
            "sentences_dir": str(sentences_dir),
            "dataset": {"sentences": 600, "seed": 42},
            "model_dir": str(TOKENIZER_DIR),
            "max_tokens": 192,
        },
    )
    return str(tmp_path / "sae.pth")


def meanings(sae_path: str, aggregation: str) -> dict:
    path = sae_path.removesuffix(".pth") + f".meaning_distinctive-words_{aggregation}.yaml"
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


def test_planted_words_are_found(sae_path):
    call(distinctive, model_path=sae_path)
    found = meanings(sae_path, "mean")
    for latent, word in PLANTED.items():
        assert found[latent] == {"certainty": 1.0, "common_semantic": word}
    assert found[20]["common_semantic"].split(", ")[0] == "camel" and found[20]["certainty"] >= 0.8
    assert sorted(found[21]["common_semantic"].split(", ")[:2]) == ["guanaco", "zebra"]
    assert found[21]["certainty"] == 1.0
    assert meanings(sae_path, "last") == {3: {"certainty": 1.0, "common_semantic": "tail"}}


def test_only_what_the_latent_fires_on_counts(sae_path):
    call(distinctive, model_path=sae_path)
    parts = meanings(sae_path, "mean")[25]["common_semantic"].split(", ")
    assert "file" in " ".join(parts) and not any("quokka" in part.split() for part in parts if "file" not in part)


def test_few_sentences_or_no_words_give_no_name(sae_path):
    call(distinctive, model_path=sae_path)
    found = meanings(sae_path, "mean")
    assert not {22, 23} & found.keys() and "number" in found[24]["common_semantic"]  # "3 + 3"
    call(distinctive, model_path=sae_path, min_sentences=4)
    found = meanings(sae_path, "mean")
    assert found[22] == {"certainty": 1.0, "common_semantic": "vicuna"} and 23 not in found


def test_file_is_in_order_of_certainty_with_two_keys(sae_path):
    call(distinctive, model_path=sae_path)
    found = meanings(sae_path, "mean")  # a dict keeps the file's order
    order = [(-meaning["certainty"], latent) for latent, meaning in found.items()]
    assert order == sorted(order) and len({certainty for certainty, _ in order}) > 1
    for latent, meaning in found.items():
        assert isinstance(latent, int)
        assert list(meaning) == ["certainty", "common_semantic"]
        assert isinstance(meaning["common_semantic"], str) and 0 < meaning["certainty"] <= 1


def test_top_sentences_and_n_words(sae_path):
    call(distinctive, model_path=sae_path, top_sentences=100, n_words=1)
    found = meanings(sae_path, "last")[3]
    assert found["common_semantic"] in ("tail", "beyond") and found["certainty"] == 0.5
    assert all("," not in meaning["common_semantic"] for meaning in meanings(sae_path, "mean").values())


def test_moved_data_and_another_working_directory(sae_path, tmp_path, monkeypatch):
    call(distinctive, model_path=sae_path)
    before = meanings(sae_path, "mean")
    shutil.copytree(tmp_path / "sentences", tmp_path / "moved" / "sentences")
    for name in ("sae.json", "sae.top.parquet"):
        shutil.copy(tmp_path / name, tmp_path / "moved")
    info = json.loads((tmp_path / "sae.json").read_text()) | {"sentences_dir": "sentences"}
    write_json(tmp_path / "moved" / "sae.json", info)
    monkeypatch.chdir(tmp_path / "moved")
    call(distinctive, model_path="sae.pth")
    assert meanings("sae.pth", "mean") == before


def test_output_dir(sae_path, tmp_path):
    call(distinctive, model_path=sae_path, output_dir=tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"sae.meaning_distinctive-words_{a}.yaml" for a in ("last", "max", "mean")]
    assert meanings(str(tmp_path / "out" / "sae.pth"), "max") == {}  # no sentences by max: no name


# ---- the score

words = st.sampled_from("abcdefgh")


@given(
    st.dictionaries(words, st.integers(0, 100), min_size=1),
    st.fixed_dictionaries({word: st.integers(1, 100) for word in "abcdefgh"}),
    st.integers(0, 20),
    st.integers(100, 1000),
    st.floats(0.1, 500),
)
def test_z_scores_equal_the_published_formula(top, corpus, more, n_corpus, prior):
    """Monroe, Colaresi and Quinn (2008), equations 16, 20 and 22, with "the sentence contains word w" as the event:

    delta_w = log((y_w + a_w) / (n + a_0 - y_w - a_w)) - log((Y_w + a_w) / (N + a_0 - Y_w - a_w))
    var_w   = 1 / (y_w + a_w) + 1 / (Y_w + a_w)
    z_w     = delta_w / sqrt(var_w)

    y of the n top sentences and Y of the N corpus sentences contain w; the prior's a_0 sentences are like the corpus.
    """
    n_top = max(top.values()) + more + 1
    scores = distinctive.z_scores(Counter(top), n_top, Corpus(Counter(corpus), n_corpus), prior)
    assert scores.keys() == top.keys()
    for word, y in top.items():
        Y = corpus.get(word, 0)
        a = prior * (Y + 0.5) / (n_corpus + 1)
        delta = math.log((y + a) / (n_top + prior - y - a)) - math.log((Y + a) / (n_corpus + prior - Y - a))
        z = delta / math.sqrt(1 / (y + a) + 1 / (Y + a))
        assert scores[word] == pytest.approx(z, rel=1e-6, abs=1e-9)


def test_scores_order_words_as_one_would():
    corpus = Counter({"the": 900, "file": 90, "llama": 9, "alpaca": 3})
    scores = distinctive.z_scores(
        Counter({"the": 45, "file": 30, "llama": 45, "alpaca": 1}), 50, Corpus(corpus, 1000), 20.0
    )
    assert scores["llama"] > scores["file"] > scores["alpaca"] > 0
    assert abs(scores["the"]) < 1  # as frequent as everywhere


def test_a_word_unseen_in_the_sample_of_the_corpus_beats_a_common_one():
    """The corpus is only sampled: a word in 300 of 25 million sentences is usually not in the sample."""
    corpus = Counter({"the": 30_000, "llama": 0})
    scores = distinctive.z_scores(Counter({"the": 45, "llama": 50}), 50, Corpus(corpus, 50_000), 20.0)
    assert scores["llama"] > scores["the"]


def test_a_word_comes_before_parts_and_sequences_that_add_nothing():
    corpus = Counter(
        {"model": 30, "…el": 60, "the model": 20, "the": 500, "baseline": 10, "for": 400, "for example": 9}
    )
    name = lambda *sentences: distinctive.name_latent([set(s) for s in sentences], Corpus(corpus, 1000), 20.0, 3)
    assert name(*[["model", "…el", "the model"]] * 10) == (["model"], 1.0)
    assert name(*[["model", "…el"]] * 5, *[["baseline", "…el"]] * 5) == (["…el"], 1.0)
    assert name(*[["for", "for example"]] * 10) == (["for example"], 1.0)  # its words are everywhere
    assert name(*[["model"]] * 6, *[["for example"]] * 3, []) == (["model", "for example"], 0.9)
    assert name([], []) == ([], 0.0)


# ---- features


def held(*marked: str) -> set[str]:
    """The features of tokens; those between * are strong."""
    tokens = [token.strip("*").encode() for token in marked]
    return features(tokens, [token.startswith("*") for token in marked])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["The", "* file", " is"], {"file", "the file", "file is", "the file is"}),
        (["The", " file", " is"], set()),
        (["A", "*Tim*", "er"], {"atimer", "…Tim"}),
        (["A ", "*Tim*", "er"], {"timer", "a timer", "Tim…"}),
        (["A", " mod", "*el*"], {"model", "a model", "…el"}),
        (["A", " bas", "*el*", "ine"], {"baseline", "a baseline", "…el"}),
        (["f", "*(*", "x"], {"“(”"}),
        (["x", "*).\n*"], {"“).”"}),
        (["of", "* 12*", "."], {"number"}),
        (["a", "*\n\n*", "b"], {"line break"}),
        (["a", "* *", "b"], set()),
        (["CAF", "*É*"], {"café", "…É"}),
        (["don", "*’*", "t"], {"don’t", "“’”"}),
        (["Say", "* “*", "naïve"], {"““”"}),
        (["in", "* _con*", "fig"], {"config", "in config", "_con…"}),
        ([], set()),
    ],
)
def test_features(tokens, expected):
    assert held(*tokens) == expected


def test_a_character_of_several_tokens_goes_to_the_last():
    tokens = [b"caf", b"\xc3", b"\xa9", b"s"]
    assert features(tokens, [False, False, True, False]) == {"cafés", "…é"}
    assert features(tokens, [False, True, False, False]) == set()
    assert features(tokens[:2], [True, True]) == {"caf"}  # cut in the middle of a character


@given(st.text(st.sampled_from("abé再 .,(1\n’"), max_size=30), st.randoms(use_true_random=False))
def test_all_tokens_strong_give_every_word_and_pair(text, rng):
    """However a text is cut into tokens, even inside characters."""
    data = text.encode()
    cuts = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(5))})
    tokens = [data[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    found = features(tokens, [True] * len(tokens))
    words = [word.lower() for word in distinctive.WORD.findall(text)]
    sequences = {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
    signs = {feature for feature in found if feature[0] in "…“" or feature[-1] == "…"} | {"number", "line break"}
    assert found - signs == sequences - signs
    assert not features(tokens, [False] * len(tokens))


# ---- refusals


def test_refuses_missing_files(sae_path, tmp_path, capsys):
    (tmp_path / "sae.top.parquet").unlink()
    said = refusal(capsys, distinctive, model_path=sae_path)
    assert "sae.top.parquet" in said and "capture_top_activating_sentences.py" in said
    (tmp_path / "sae.json").unlink()
    assert "sae.json" in refusal(capsys, distinctive, model_path=sae_path)
    assert not list(tmp_path.glob("*.yaml"))


def test_a_place_that_cannot_be_written_is_said_before_the_sentences_are_counted(
    sae_path, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(distinctive, "count_corpus", None)
    (tmp_path / "sae.meaning_distinctive-words_last.yaml").mkdir()
    said = refusal(capsys, distinctive, model_path=sae_path)
    assert "sae.meaning_distinctive-words_last.yaml cannot be written (Is a directory)" in said

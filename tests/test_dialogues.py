"""Captured dialogues: the stored tokens' activations are those of the whole dialogue, alone; spans; every later stage.

.venv/bin/python -m pytest tests/test_dialogues.py
"""

import json

import pyarrow.parquet as pq
import pytest
import torch
from support.chat_models import TEMPLATE, write_chat_model
from support.pipeline_runs import SITE, call, refusal
from test_capture import assert_within_an_ulp

import capture_activations
import capture_top_activating_sentences
import interpret_top_sentences_distinctive_words
import sae_evaluation
import sae_preprocessing
import sae_training
from latents.index import LatentIndex
from llama_3 import load_model, load_tokenizer
from llama_3.chat import Message, encode_answered
from pipeline.activation_store import ActivationStore
from pipeline.dialogues import Cutter, DialogueSpans
from pipeline.manifests import MANIFEST, read_manifest
from sae import load_sae_model

OPTIONS = {
    "dtype": "float32",
    "sites": [SITE],
    "max_tokens": 30,
    "max_dialogue_tokens": 150,
    "batch_tokens": 300,
    "window_sentences": 20,
    "shard_gb": 60 * 2 * 36 / 1e9,
}
DIALOGUES = [
    [("user", "Why?"), ("assistant", "The sea is blue. It is wide.\nHello! ")],
    [
        ("system", "Be kind."),
        ("user", "é <|eot_id|> 再"),
        ("assistant", "No."),
        ("user", "So?"),
        ("assistant", "On <|eot_id|>."),
    ],
    [("user", "Nobody answers.")],
    [("user", "Tell me."), ("assistant", "the hello ring in the sea " * 9)],
    [("assistant", "I begin.")],
    *([("user", f"Number {i}?"), ("assistant", f"It is {i}. The hello of {i} is here. On it!")] for i in range(20)),
]  # fmt: skip


def as_objects(dialogue):
    return [{"role": role, "content": content} for role, content in dialogue]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def options(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("dialogues") / "dialogues.jsonl"
    path.write_text("\n".join(json.dumps({"messages": as_objects(dialogue)}) for dialogue in DIALOGUES))
    return {"model_dir": model_dir, "dialogues": path, **OPTIONS}


@pytest.fixture(scope="module")
def captured(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    call(capture_activations, **options, output_dir=folder / "out")
    return folder / "out"


def seeded_order(seed: int = 42) -> list[int]:
    import numpy as np

    return np.random.default_rng(seed).permutation(len(DIALOGUES)).tolist()


def check_store(folder, model_dir, whose: str) -> None:
    """Compare everything stored with the activations of each dialogue alone, at the wanted places."""
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    shards = list(ActivationStore(folder / SITE).shards())
    acts, token_ids = (torch.cat([getattr(shard, name) for shard in shards]) for name in ("acts", "token_ids"))
    row = 0
    for i in seeded_order():
        ids, answers = encode_answered(tokenizer, [Message(*message) for message in DIALOGUES[i]])
        ids = ids[: OPTIONS["max_dialogue_tokens"]]
        wanted = [place for answer in answers for place in answer] if whose == "assistant" else range(len(ids))
        wanted = [place for place in wanted if place < len(ids) and ids[place] != tokenizer.bos_id]
        if not wanted:
            continue
        rows = slice(row, row + len(wanted))
        assert token_ids[rows].tolist() == [ids[place] for place in wanted]
        assert_within_an_ulp(acts[rows], model.activations(torch.tensor([ids]), SITE)[0, wanted])
        row += len(wanted)
    assert row == len(acts)


# ---- what is stored


def test_the_assistants_tokens_have_the_activations_of_the_whole_dialogue(captured, model_dir):
    check_store(captured, model_dir, "assistant")


def test_all_tokens_have_them_too(options, model_dir, tmp_path):
    call(capture_activations, **options | {"dialogue_tokens": "all", "batch_tokens": 100}, output_dir=tmp_path)
    check_store(tmp_path, model_dir, "all")


def test_spans_are_the_sentences_of_what_was_stored(captured, model_dir):
    tokenizer, spans = load_tokenizer(str(model_dir)), DialogueSpans(captured / "dialogues")
    store = ActivationStore(captured / SITE)
    assert len(store.records) > 2
    assert [i for shard in store.shards() for i in shard.sentence_idx.tolist()] == list(range(len(spans)))
    found = store.source.sentences()
    assert isinstance(found, DialogueSpans) and list(found) == list(spans)
    for number in range(spans.n_contexts):
        context = spans.context(number)
        for i, places in enumerate(context.spans, int(spans.first_span[number])):
            ids = context.token_ids[places.start : places.stop]
            assert 0 < len(ids) <= OPTIONS["max_tokens"]
            assert store.sentence(i)[1].tolist() == ids and spans[i] == tokenizer.decode(ids)
        assert context.spans[-1].stop == len(context.token_ids)  # no more is read than needed
    assert {"The sea is blue.", " It is wide.\n", "No.<|eot_id|>"} <= set(spans)


def test_the_manifest_counts_dialogues(captured, model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    lengths = [len(encode_answered(tokenizer, [Message(*m) for m in dialogue]).ids) for dialogue in DIALOGUES]
    n_cut = sum(n > OPTIONS["max_dialogue_tokens"] for n in lengths)
    assert 0 < n_cut < 3
    counts = read_manifest(captured / SITE, "capture_activations.py")["counts"]
    spans = read_manifest(captured / "dialogues", "capture_activations.py")["counts"]
    assert (counts["dialogues"], counts["empty_dialogues"], counts["cut_dialogues"]) == (len(DIALOGUES) - 1, 1, n_cut)
    assert (counts["sentences"], counts["tokens"]) == (spans["spans"], spans["tokens"])
    assert spans["tokens_read"] > spans["tokens"]


def test_a_second_site_and_a_killed_run_continue(captured, options, tmp_path, capsys):
    """A window's shard that is missing is made again, from the spans that are there."""
    call(capture_activations, **options, output_dir=tmp_path / "out")
    site, manifest = tmp_path / "out" / SITE, tmp_path / "out" / SITE / MANIFEST
    shards = sorted(site.glob("acts-*"))
    expected = {path.name: path.read_bytes() for path in shards}
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"complete": False}))
    shards[-1].unlink()
    call(capture_activations, **options, output_dir=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in site.glob("acts-*")} == expected
    call(capture_activations, **options | {"sites": ["layers.0.mlp_out"]}, output_dir=tmp_path / "out")
    assert ActivationStore(tmp_path / "out/layers.0.mlp_out").n_tokens == ActivationStore(site).n_tokens
    said = refusal(capsys, capture_activations, **options | {"dialogue_tokens": "all"}, output_dir=tmp_path / "out")
    assert "begun with dialogue_tokens = 'assistant', but now it is 'all'" in said


# ---- spans


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ("A list:\n1. Flour\n2. Salt.\n\nThen.", ["A list:\n", "1. Flour\n", "2. Salt.\n\n", "Then."]),
        ('She said "Go." He went...', ['She said "Go."', " He went..."]),
        ("In 3.5 or e.g.this", ["In 3.5 or e.g.this"]),
        ("再。再！a", ["再。", "再！", "a"]),
        ("hello" * 9, ["hello" * 8, "hello"]),
        ("", []),
    ],
)
def test_spans_end_where_sentences_and_lines_seem_to_end(model_dir, text, expected):
    tokenizer = load_tokenizer(str(model_dir))
    cutter = Cutter(
        tokenizer, None, all_tokens=False, max_tokens=8 if "hellohello" in text else 99, max_dialogue_tokens=9
    )
    ids = [0, 0, *tokenizer.encode(text)]
    spans = cutter.spans(ids, range(2, len(ids)))
    assert [tokenizer.decode(ids[span.start : span.stop]) for span in spans] == expected


# ---- refusals


def test_bad_input_is_refused_in_a_sentence(options, model_dir, tiny_model_dir, tmp_path, capsys):
    def said(**changes) -> str:
        found = refusal(capsys, capture_activations, **options | changes, output_dir=tmp_path / "out")
        assert not (tmp_path / "out" / "dialogues").exists() or not list((tmp_path / "out/dialogues").iterdir())
        return found

    def written(name: str, text: str):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    assert "nothing at nowhere; name a file or folder of dialogues" in said(dialogues="nowhere")
    assert "dialogues come as parquet or jsonl" in said(dialogues=written("a.txt", "Text."))
    assert "Line 1 of" in said(dialogues=written("a.jsonl", '{"text": "Text."}'))
    assert "There are no dialogues in" in said(dialogues=written("b.jsonl", ""))
    tool = json.dumps({"messages": [{"role": "tool", "content": "1"}]})
    assert "Dialogue 0 of" in (found := said(dialogues=written("c.jsonl", tool))) and "has a message of 'tool'" in found
    asked = json.dumps({"messages": as_objects([("user", "Anyone?")])})
    assert "None of the 1 dialogues has a token to store" in said(dialogues=written("d.jsonl", asked))
    assert "leave out --begin_of_text" in said(begin_of_text="true")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}" + TEMPLATE
    stubborn = write_chat_model(tmp_path / "model", template=template)
    assert "Dialogue 1 cannot be read by the model: The chat template in" in said(model_dir=stubborn)


# ---- every later stage


@pytest.mark.slow
def test_later_stages_take_spans_for_sentences(options, captured, model_dir, tmp_path):
    batches, sae_path = tmp_path / "batches", tmp_path / "sae.pth"
    call(
        sae_preprocessing,
        input_dir=captured / SITE,
        output_dir=batches,
        batch_size=16,
        validation_fraction=0.3,
        num_processes=1,
    )
    call(
        sae_training,
        data_dir=batches,
        model_save_path=sae_path,
        checkpoint_dir=tmp_path / "checkpoints",
        n_latents=64,
        k=4,
        k_aux=8,
        num_epochs=12,
        batch_size=64,
        learning_rate=3e-3,
        wandb="off",
    )
    call(sae_evaluation, sae_model_path=[sae_path])
    call(capture_top_activating_sentences, data_dir=captured / SITE, model_path=sae_path, top_sentences=8)
    call(interpret_top_sentences_distinctive_words, model_path=sae_path, top_sentences=8, min_sentences=2)

    spans, sae, store = (
        DialogueSpans(captured / "dialogues"),
        load_sae_model(str(sae_path)),
        ActivationStore(captured / SITE),
    )
    first = sae.info["first_validation_sentence"]
    found = json.loads((tmp_path / "sae.evaluation.json").read_text())
    whole = [spans.context(i) for i in range(spans.n_contexts) if spans.first_span[i] >= first]
    n_stored = sum(len(span) for context in whole for span in context.spans)
    assert 0 < found["tokens"] == n_stored and found["sentences"] == len(whole)
    acts = torch.cat([store.sentence(i)[0] for i in range(len(spans) - sum(len(c.spans) for c in whole), len(spans))])
    z, _, _ = sae.normalize(acts)
    z_hat = sae.decode(*sae.encode_normalized(z))
    expected = (z - z_hat).square().sum() / (z - z.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(expected), rel=0.02)  # captured activations are rounded

    top = pq.read_table(tmp_path / "sae.top.parquet").to_pylist()
    assert top and all(row["text"] == spans[row["sentence_idx"]] for row in top)
    assert all(row["token_ids"] == store.sentence(row["sentence_idx"])[1].tolist() for row in top)
    index = LatentIndex(str(sae_path))
    card = index.card(top[0]["latent"])
    assert card.meaning and card.sentences and card.sentences[0].activation == pytest.approx(card.highest, rel=1e-3)

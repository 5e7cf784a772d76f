"""Control vectors: the direction against one planted in made-up activations, files against llama.cpp's rules, latents,
and steering with them in the terminal, against the addition written out here.

.venv/bin/python -m pytest tests/test_control_vectors.py
"""

import contextlib
import json

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_PARAMS
from support.gguf_files import write_vector
from support.pipeline_runs import call, refusal

import control_vectors as script
import llama_3_inference as terminal
from llama_3 import load_model, load_tokenizer
from llama_3.generation import complete, encode_text
from microscope.control import (
    control_vector,
    last_activations,
    mean_activations,
    nearest_latents,
    pursuit,
    read_gguf_vectors,
    steered,
    write_gguf,
)
from pipeline.errors import InputError
from sae import SparseAutoencoder
from serving.engine import Engine
from serving.steered_model import ModelChoice, Sampling, VectorChoice, open_model, with_control_vectors
from serving.steering import Steering

DIM = TINY_PARAMS["dim"]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir))


def planted(n_pairs: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations of pairs that differ by a direction per layer and noise: positive, negative, directions."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    directions = F.normalize(randn(3, DIM), dim=-1)
    negative = randn(n_pairs, 3, DIM)
    amounts = 4 + randn(n_pairs, 1, 1)
    return negative + amounts * directions + 0.1 * randn(n_pairs, 3, DIM), negative, directions


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_finds_the_planted_direction_with_its_sign_and_length(method):
    positive, negative, directions = planted()
    vector = control_vector(positive, negative, method)
    assert (F.cosine_similarity(vector.vectors, directions, dim=-1) > 0.99).all()
    length = torch.cat([positive, negative]).norm(dim=-1).mean(0)
    torch.testing.assert_close(vector.vectors.norm(dim=-1), length)
    assert (vector.separation == 1).all()
    flipped = control_vector(negative, positive, method)
    torch.testing.assert_close(flipped.vectors, -vector.vectors, atol=1e-4, rtol=1e-4)
    held_out = positive.clone(), negative.clone()
    held_out[0][-8:], held_out[1][-8:] = negative[-8:], positive[-8:]  # the last fifth the other way round
    assert (control_vector(*held_out, method).separation == 0).all()
    with pytest.raises(InputError, match="at least two pairs"):
        control_vector(positive[:1], negative[:1], method)


def test_activations_and_steering(model, tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    found = last_activations(model, tokenizer, ["hello the", "aa"])
    ids = torch.tensor([tokenizer.encode("hello the", bos=True)])
    torch.testing.assert_close(found[0, 1], model.activations(ids, "layers.1.resid_post")[0, -1])
    vector = torch.linspace(-1, 1, DIM)
    with steered(model, {1: vector, 2: -vector}, 0.5):
        both = model.activations(ids, ["layers.1.resid_post", "layers.2.mlp_out", "layers.2.resid_post"])
    torch.testing.assert_close(both["layers.1.resid_post"], model.activations(ids, "layers.1.resid_post") + vector / 2)


def test_a_file_as_llama_cpp_reads_it_and_back(model, tmp_path):
    path, vectors = tmp_path / "v.gguf", {1: torch.randn(DIM), 2: torch.randn(DIM)}
    write_gguf(path, vectors)
    reader = gguf.GGUFReader(str(path))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("direction.1", "F32", [DIM]),
        ("direction.2", "F32", [DIM]),
    ]
    found = read_gguf_vectors(path, model)
    assert list(found) == [1, 2] and all(torch.equal(found[i], vectors[i]) for i in found)
    write_gguf(path, {3: torch.zeros(DIM)})
    with pytest.raises(InputError, match="has direction.3 of 36 numbers, but this model has layers 1 to 2 of 36"):
        read_gguf_vectors(path, model)
    path.write_bytes(b"none")
    with pytest.raises(InputError, match="cannot be read"):
        read_gguf_vectors(path, model)


def test_the_latents_of_a_vector():
    torch.manual_seed(1)
    sae = SparseAutoencoder(DIM, 60, 4)
    sae.initialize(torch.zeros(DIM))
    directions = F.normalize(sae.decoder.weight.detach(), dim=0)
    vector = 3 * directions[:, 7] - 2 * directions[:, 31] + 5.0  # a constant, which normalisation takes off
    target = F.normalize(vector - vector.mean(), dim=0)
    near = nearest_latents(vector, sae, 60)
    expected = (target @ directions).abs().sort(descending=True)
    assert [i for i, _ in near] == expected.indices.tolist() and near[0][0] == 7
    composed, share = pursuit(vector, sae, 2)
    assert {i for i, _ in composed} == {7, 31}
    basis = directions[:, [i for i, _ in composed]]
    left = target - basis @ torch.linalg.pinv(basis) @ target
    assert share == pytest.approx(1 - float(left.square().sum()), abs=1e-5)
    assert pursuit(vector, sae, 6)[1] > share


def test_two_sets_of_texts(model, tiny_model_dir):
    """As many as there are; the mean over tokens without begin-of-text; every held-out text with every other."""
    positive, negative, _ = planted()
    negative = negative[:23]
    vector = control_vector(positive, negative, "sets")
    expected = F.normalize(positive[:32].mean(0) - negative[:19].mean(0), dim=-1)
    torch.testing.assert_close(F.normalize(vector.vectors, dim=-1), expected)
    for layer in range(3):
        along = [float(x @ expected[layer]) for x in positive[32:, layer]]
        other = [float(x @ expected[layer]) for x in negative[19:, layer]]
        share = sum(a > b for a in along for b in other) / (len(along) * len(other))
        assert float(vector.separation[layer]) == pytest.approx(share)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    found = mean_activations(model, tokenizer, ["hello the"])
    ids = torch.tensor([tokenizer.encode("hello the", bos=True)])
    torch.testing.assert_close(found[0, 1], model.activations(ids, "layers.1.resid_post")[0, 1:].mean(0))


def run_script(monkeypatch, tmp_path, positive: str, negative: str, *words: str) -> None:
    (tmp_path / "p.txt").write_text(positive), (tmp_path / "n.txt").write_text(negative)
    paths = ["--positive_path", str(tmp_path / "p.txt"), "--negative_path", str(tmp_path / "n.txt")]
    monkeypatch.setattr("sys.argv", ["control_vectors.py", *paths, *words])
    script.main()


def test_the_script(tiny_model_dir, tmp_path, monkeypatch, capsys, model):
    folder = ["--llama_model_dir", str(tiny_model_dir)]
    words = [*folder, "--output_path", str(tmp_path / "v.gguf"), "--try_prompt", "hello", "--new_tokens", "3"]
    run_script(monkeypatch, tmp_path, "hello the\nhello a\nhello in\n", "aa the\naa a\naa in\n", *words)
    text = capsys.readouterr().out
    assert "3 pairs" in text and "steered  hello" in text and max(map(len, text.splitlines()[:6])) <= 80
    assert list(read_gguf_vectors(tmp_path / "v.gguf", model)) == [1, 2]
    for words, sentence in {
        ("--layers", "0"): "Layer 0 cannot be steered",
        ("--layers", "9"): "There is no layer 9",
    }.items():
        with pytest.raises(InputError, match=sentence):
            run_script(monkeypatch, tmp_path, "a\nb\n", "c\nd\n", *folder, *words)
    with pytest.raises(InputError, match="they must form pairs"):
        run_script(monkeypatch, tmp_path, "a\nb\n", "c\n", *folder)


def test_a_template_and_sets_from_the_command_line(tiny_model_dir, tmp_path, monkeypatch, capsys, model):
    def run(*words: str) -> str:
        folder = ["--llama_model_dir", str(tiny_model_dir)]
        monkeypatch.setattr("sys.argv", ["control_vectors.py", *folder, *words])
        script.main()
        return capsys.readouterr().out

    words = ["--positive_words", "the", "a", "in", "--negative_words", "aa", "12", "ed"]
    by_template, by_files = tmp_path / "t.gguf", tmp_path / "f.gguf"
    assert "3 pairs" in run("--template", "hello {}!", *words, "--output_path", str(by_template))
    (tmp_path / "p.txt").write_text("hello the!\nhello a!\nhello in!\n")
    (tmp_path / "n.txt").write_text("hello aa!\nhello 12!\nhello ed!\n\n")
    files = ["--positive_path", str(tmp_path / "p.txt"), "--negative_path", str(tmp_path / "n.txt")]
    run(*files, "--output_path", str(by_files))
    one, other = read_gguf_vectors(by_template, model), read_gguf_vectors(by_files, model)
    assert all(torch.equal(one[i], other[i]) for i in (1, 2))
    (tmp_path / "n.txt").write_text("hello aa!\nhello 12!\n")
    assert "3 and 2 texts" in run(*files, "--method", "sets")
    for wrong, sentence in {
        (*files,): "they must form pairs",
        ("--template", "hello", *words): "has no {}; write it where the word goes",
        ("--template", "hello {}", *words, *files): "leave --positive_path and --negative_path out",
        (*words,): "need a --template",
        ("--positive_path", str(tmp_path / "p.txt")): "Prompts are missing",
        ("--template", "hello {}", *words[:4]): "--positive_words has 3 prompts, --negative_words 0",
        ("--template", "{}", *words, "--sae_model_path", "llama_3/tiny_llama/sae.pth"): "has d_model 256, but",
    }.items():
        with pytest.raises(InputError) as refused:
            run(*wrong)
        assert sentence in str(refused.value)


# ---- steering with files


@pytest.fixture
def two_vectors(tmp_path):
    """Two files of unit vectors, as both tools write them: in every layer, and in one."""
    generator = np.random.default_rng(0)
    unit = lambda: (v := generator.standard_normal(DIM).astype(np.float32)) / np.linalg.norm(v)
    sea = {1: unit(), 2: unit()}
    war = {2: unit()}
    named = lambda vectors: {f"direction.{layer}": vector for layer, vector in vectors.items()}
    return {
        str(write_vector(tmp_path / "sea.gguf", named(sea))): sea,
        str(write_vector(tmp_path / "war.v2.GGUF", named(war))): war,
    }


@pytest.fixture
def opened(tiny_model_dir):
    return open_model(ModelChoice(llama_model_dir=str(tiny_model_dir), dtype="float32", device="cpu"))


def residuals(model, ids: torch.Tensor) -> list[torch.Tensor]:
    found = model.activations(ids, [f"layers.{i}.resid_post" for i in range(3)])
    return [found[f"layers.{i}.resid_post"] for i in range(3)]


def test_vectors_are_added_after_their_layers_at_every_token(opened, two_vectors, tiny_model_dir):
    steered_model = with_control_vectors(opened, VectorChoice(list(two_vectors), [3.0, -2.0]))
    assert [(name, each.scale) for name, each in steered_model.control_vectors.items()] == [
        ("sea", 3.0), ("war.v2", -2.0),
    ]  # fmt: skip
    assert [each.where for each in steered_model.control_vectors.values()] == ["after layers 1 to 2", "after layer 2"]
    sea, war = two_vectors.values()
    found = steered_model.interventions(Steering(control_vectors={"sea": 5.0, "war.v2": -4.0}))
    ids = torch.tensor([encode_text(opened.tokenizer, "hello the")])
    model, clean = opened.model, residuals(opened.model, ids)
    with model.intervene(*found[0]), model.intervene(*found[1]), model.intervene(*found[2]):
        got = residuals(model, ids)
    assert torch.equal(got[0], clean[0])
    torch.testing.assert_close(got[1], clean[1] + 5 * torch.from_numpy(sea[1]))
    with model.intervene("layers.2.resid_pre", lambda x: x + 5 * torch.from_numpy(sea[1])):
        expected = model.activations(ids, "layers.2.resid_post")
    expected = expected + 5 * torch.from_numpy(sea[2]) - 4 * torch.from_numpy(war[2])
    torch.testing.assert_close(got[2], expected)
    assert not torch.equal(got[2][0, 0], clean[2][0, 0])  # begin-of-text too, as in llama.cpp
    options = {"max_new_tokens": 8, "temperature": 0.0}
    by_hand = complete(model, opened.tokenizer, ["hello the", "in"], steering=found, **options)
    prompts = [encode_text(opened.tokenizer, text) for text in ("hello the", "in")]
    tokens: list[list[int]] = [[], []]
    with contextlib.closing(Engine(model, max_rows=2, max_waiting=0)) as engine:
        for number, token in engine.tokens(opened.rows(prompts, Sampling(8, 0, 1, 0), 0, found)):
            tokens[number].append(token)
    assert [opened.text_after(*both) for both in zip(prompts, tokens, strict=True)] == by_hand
    assert by_hand != complete(model, opened.tokenizer, ["hello the", "in"], **options)


def test_the_shift_of_cvector_generator(model, two_vectors):
    path, sea = next(iter(two_vectors.items()))
    assert list(read_gguf_vectors(path, model)) == [1, 2]
    shifted = read_gguf_vectors(path, model, shift=1)
    assert list(shifted) == [0, 1] and torch.equal(shifted[0], torch.from_numpy(sea[1]))


def test_vectors_that_cannot_be_used(model, opened, two_vectors, tmp_path):
    vector = np.ones(DIM, np.float32)
    bad = {
        "no direction.N": {},
        "direction.1 as F16": {"direction.1": vector.astype(np.float16)},
        "holds blk.0.attn_q.weight, not only": {"blk.0.attn_q.weight": vector},
        "holds direction.1, not only direction.N": {"direction.1": np.ones((2, DIM), np.float32)},
        "NaN or infinite numbers in direction.2": {"direction.1": vector, "direction.2": vector * np.nan},
        "has direction.0 of 36 numbers, but this model has layers 1 to 2": {"direction.0": vector},
        "has direction.1 of 35 numbers": {"direction.1": vector[1:]},
    }
    for sentence, tensors in bad.items():
        with pytest.raises(InputError, match=sentence):
            read_gguf_vectors(write_vector(tmp_path / "bad.gguf", tensors), model)
    with pytest.raises(InputError, match=r"none is open; name its file with --control_vectors"):
        opened.interventions(Steering(control_vectors={"sea": 1.0}))
    known = with_control_vectors(opened, VectorChoice(list(two_vectors)))
    for name, scale, sentence in (
        ("see", 1.0, r"no control vector 'see'; open are sea, war.v2"),
        ("sea", float("nan"), "sea cannot have scale nan"),
        ("sea", None, "sea cannot have scale None"),
        ("sea", 1e30, "give a number from -1,000,000 to 1,000,000"),
    ):
        with pytest.raises(InputError, match=sentence):
            known.interventions(Steering(control_vectors={name: scale}))  # type: ignore[dict-item]
    (tmp_path / "more").mkdir()
    with pytest.raises(InputError, match="have one name; rename one"):
        VectorChoice([*two_vectors, str(tmp_path / "more" / "sea.gguf")])
    with pytest.raises(InputError, match="--control_vectors names 2, --vector_scales 3"):
        VectorChoice(list(two_vectors), [1, 2, 3])


def test_in_the_terminal(opened, two_vectors, tiny_model_dir, tmp_path, capsys):
    options = {"llama_model_dir": tiny_model_dir, "device": "cpu", "max_new_tokens": 6, "temperature": 0}
    vectors = {"control_vectors": list(two_vectors), "vector_scales": [9, -4]}
    steering = with_control_vectors(opened, VectorChoice(list(two_vectors)))
    expected = complete(
        opened.model, opened.tokenizer, ["hello"], max_new_tokens=6,
        steering=steering.interventions(Steering(control_vectors={"sea": 9, "war.v2": -4})),
    )  # fmt: skip
    call(terminal, prompts=["hello"], **options, **vectors)
    said = capsys.readouterr()
    assert f"steered  {expected[0]!r}" in said.out
    assert "Steered by the control vector sea, added after layers 1 to 2: scale 9." in said.err
    (tmp_path / "in.txt").write_text("hello\n")
    files = {"input_path": tmp_path / "in.txt", "output_path": tmp_path / "out.jsonl"}
    call(terminal, **options, **vectors, **files)
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["completion"] == expected[0]
    assert row["steering"] == {"control_vectors": {"sea": 9.0, "war.v2": -4.0}}
    assert "--control_vectors names 2, --vector_scales 3" in refusal(
        capsys, terminal, **options, **vectors | {"vector_scales": [1, 2, 3]}
    )

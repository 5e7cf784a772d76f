"""Control vectors: the direction against one planted in made-up activations, files against llama.cpp's rules, latents.

.venv/bin/python -m pytest tests/test_control_vectors.py
"""

import gguf
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_PARAMS

import control_vectors as script
from llama_3 import load_model, load_tokenizer
from microscope.control import (
    control_vector,
    last_activations,
    nearest_latents,
    pursuit,
    read_gguf_vectors,
    steered,
    write_gguf,
)
from pipeline.errors import InputError
from sae import SparseAutoencoder

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

"""sae_convert.py and formats/: files in every format, written here from their published layouts, against what their
programs compute (support/foreign_saes.py); exports read back; each refusal in a sentence.

.venv/bin/python -m pytest tests/test_formats.py
make interop    # exports also through the real programs
"""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from support import foreign_saes, latent_files
from support.fake_hub import FakeHub, Repo
from support.foreign_saes import D, K, N, Weights
from support.pipeline_runs import call, refusal

import sae_convert as script
from formats.comparison import difference, made_up_activations
from formats.table import FORMATS, recognise
from latents.index import LatentIndex
from latents.tables import PROMOTED, top_sentences
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from pipeline.errors import InputError
from sae import Kind, SparseAutoencoder, load_sae_model, save_sae

IMPORTS = {
    "llamascope": [
        ("", foreign_saes.llama_scope, {}),
        ("transcoder", foreign_saes.llama_scope, {"norm_out": 7.0, "hook_point_in": "blocks.3.hook_resid_mid",
                                                  "hook_point_out": "blocks.3.hook_mlp_out"}),
    ],
    "llamascope-r1": [
        ("", foreign_saes.llama_scope_r1, {}),
        ("without norms", foreign_saes.llama_scope_r1, {"include_norm": False}),
        ("newer names", foreign_saes.llama_scope_r1, {"newer": True}),
    ],
    "sparsify": [
        ("", foreign_saes.sparsify, {}),
        ("skip transcoder of before", foreign_saes.sparsify, {"skip": True, "skip_connection": True}),
        ("skip transcoder", foreign_saes.sparsify, {"skip": True, "skip_connection": True, "transcode": True}),
        ("transcoder", foreign_saes.sparsify, {"transcode": True}),
    ],
    "saelens": [
        ("standard", foreign_saes.saelens, {}),
        ("not centred", foreign_saes.saelens, {"apply_b_dec_to_input": False}),
        ("topk", foreign_saes.saelens, {"architecture": "topk"}),
        ("layer norm", foreign_saes.saelens, {"architecture": "topk", "normalize_activations": "layer_norm"}),
        ("by decoder norm", foreign_saes.saelens, {"architecture": "topk", "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", foreign_saes.saelens, {"architecture": "jumprelu", "apply_b_dec_to_input": False}),
        ("transcoder", foreign_saes.saelens, {"architecture": "transcoder", "apply_b_dec_to_input": False}),
        ("jumprelu skip", foreign_saes.saelens, {"architecture": "jumprelu_skip_transcoder"}),
        ("version 5", foreign_saes.saelens, {"version": 5}),
        ("version 5 topk", foreign_saes.saelens, {"version": 5, "architecture": "topk"}),
    ],
    "dictionary_learning": [
        (name, foreign_saes.dictionary_learning, {"dict_class": name})
        for name in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
    ],
    "openai": [("", foreign_saes.openai, {}), ("relu", foreign_saes.openai, {"activation": "ReLU"})],
    "gemmascope": [("", foreign_saes.gemma_scope, {}), ("lower case", foreign_saes.gemma_scope, {"lower": True})],
    "goodfire": [("", foreign_saes.goodfire, {})],
    "qresearch": [("", foreign_saes.goodfire, {"encoder": "encoder", "decoder": "decoder"})],
}  # fmt: skip
CASES = [(name, *case) for name, cases in IMPORTS.items() for case in cases]
LISTS_AND_FILES = (
    "Open the file and read all of its lines. If it does not exist, an error is raised. Returns a list of all the "
    "names in the module. The first argument must be a string; the second is optional and defaults to None. When the "
    "iterator is exhausted, StopIteration is raised. This function returns true if the object is an instance. "
)
NO_SITE = ("openai", "gemmascope", "goodfire", "qresearch")


def dense(sae: SparseAutoencoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sae.requires_grad_(False)
    values, indices = sae.encode(x)
    latents = torch.zeros(len(x), sae.n_latents)
    for row in range(len(x)):
        for value, latent in zip(values[row], indices[row], strict=True):
            latents[row, latent] += value
    return latents, sae(x)


def show_differences(capsys: pytest.CaptureFixture, what: str, lines: list[str]) -> None:
    """In make interop, where people want to see them."""
    if "INTEROP" in os.environ:
        with capsys.disabled():
            print(f"\n{what}", *(line for line in lines if line.startswith("Against")), sep="\n    ")


@pytest.mark.parametrize(
    ("name", "variant", "write", "options"), CASES, ids=lambda part: getattr(part, "__name__", str(part)[:30])
)
def test_import(tmp_path, capsys, name, variant, write, options):
    w, folder = Weights(), tmp_path / "layers.3.mlp"
    folder.mkdir()
    latents, x_hat = write(folder, w, **options)
    found, foreign = recognise(folder)
    assert found == name
    row = FORMATS[name]
    formula = row.formula(foreign, w.x)
    torch.testing.assert_close(formula[0], latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(formula[1], x_hat, atol=1e-5, rtol=1e-4)
    site = {"site": "layers.3.resid_post"} if name in NO_SITE else {}
    call(script, command_word="import", path=folder, output_path=tmp_path / "sae.pth", **site)
    against = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Against")]
    show_differences(capsys, f"import {name} {variant}", against)
    assert against[0].startswith("Against its formula: largest difference over 256 activations")
    if "INTEROP" in os.environ and row.package is not None:
        assert against[1].startswith("Against its own program: largest difference over 256 activations")
    sae = load_sae_model(tmp_path / "sae.pth")
    ours = dense(sae, w.x)
    assert 0 < float((latents > 0).float().mean()) < 0.9  # something fires, not everything
    torch.testing.assert_close(ours[0], latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1], x_hat, atol=1e-4, rtol=1e-4)
    info = json.loads((tmp_path / "sae.json").read_text())
    assert info["imported"]["format"] == name and info["layer"] == 3
    hooks = {"transcoder": "resid_mid" if name == "llamascope" else "ffn_norm"}
    if name == "saelens":
        assert info["site"] == "layers.3.resid_post" and info["begin_of_text"] is False
        assert info["imported"]["model_name"] == "a-llama"
    if name == "sparsify":
        assert info["site"] == ("layers.3.mlp_out" if not variant else "layers.3.ffn_norm")
    if name == "llamascope":
        assert info["site"] == f"layers.3.{hooks.get(variant, 'resid_post')}"


def test_llama_scope_by_another_tools_formula_differs(tmp_path):
    """SAELens leaves the norms of directions out, and keeps other latents: the check would see it."""
    w = Weights()
    latents, x_hat = foreign_saes.llama_scope(tmp_path, w)
    _, foreign = recognise(tmp_path)
    sae = FORMATS["llamascope"].to_ours(foreign).sae()
    s = D**0.5 / 3
    pre = s * w.x @ w.W_enc.t() + w.b_enc
    theirs = foreign_saes.jump(pre, 0.8 * s)
    found = difference(sae, w.x, (theirs, theirs @ w.W_dec / s + w.b_dec / s))
    assert not found.is_small and found.support > 100
    assert difference(sae, w.x, (latents, x_hat)).is_small


# ---- out


def random_sae(kind: Kind, k: int | None = K, seed: int = 3, one_threshold: bool = True) -> SparseAutoencoder:
    w = Weights(seed)
    sae = SparseAutoencoder(D, N, k, 1e-5, kind=kind)
    state = {"b_pre": w.b_dec, "encoder.weight": w.W_enc, "encoder.bias": w.b_enc}
    state |= {"decoder.weight": torch.nn.functional.normalize(w.W_dec, dim=1).t()}
    state |= {"threshold": torch.full((N,), 0.7) if one_threshold else w.threshold} if kind.gate == "jumprelu" else {}
    state |= {"skip": w.skip} if kind.skip else {}
    sae.load_state_dict(state)
    return sae


def to_mlp(gate, **more) -> Kind:
    return Kind(gate, "scale", 2.5, target_site="layers.3.mlp_out", target_scale=0.7, **more)


EXPORTS = {
    "saelens": [
        Kind(), Kind("topk", "none"), Kind("topk", "scale", 2.5), Kind("jumprelu", "scale", 0.4, centred=False),
        Kind("relu", "none"), to_mlp("relu"), to_mlp("jumprelu", skip=True), Kind("jumprelu", "layer_norm"),
    ],
    "sparsify": [
        Kind("topk", "none"), Kind("topk", "scale", 2.5), Kind("topk", "none", centred=False), to_mlp("topk"),
        to_mlp("topk", skip=True),
    ],
    "dictionary_learning": [
        Kind("topk", "scale", 2.5), Kind("jumprelu", "scale", 2.5), Kind("relu", "none", centred=False),
    ],
    "openai": [Kind(), Kind("relu", "scale", 2.5, centred=False)],
    "llamascope": [Kind("jumprelu", "scale", 2.5), Kind("relu", "none", centred=False)],
    "gemmascope": [Kind("jumprelu", "scale", 2.5), Kind("relu", "none")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("to", "kind"), [(to, kind) for to, kinds in EXPORTS.items() for kind in kinds], ids=lambda part: str(part)[:60]
)
def test_export_and_back(tmp_path, capsys, to, kind):
    """The written files compute the same by the steps of support/foreign_saes.py's formulas, and come back equal."""
    sae = random_sae(kind)
    site = "layers.3.ffn_norm" if kind.target_site else "layers.3.resid_post"
    save_sae(sae, tmp_path / "sae.pth", {"site": site, "begin_of_text": False, "model": {"name": "a-llama"}})
    folder = tmp_path / ("layers.3.mlp" if to == "sparsify" and kind.target_site else "layers.3")
    call(script, command_word="export", path=tmp_path / "sae.pth", to=to, output_path=folder)
    lines = capsys.readouterr().out.splitlines()
    show_differences(capsys, f"export to {to}: {kind.in_words}, {kind.normalization}", lines)
    assert any(line.startswith("Against its formula: largest difference") for line in lines[-2:])
    if "INTEROP" in os.environ and FORMATS[to].package is not None:
        assert lines[-1].startswith("Against its own program: largest difference")
    assert not list(tmp_path.glob(".*.tmp"))
    at = {} if to in ("sparsify", "saelens", "llamascope", "dictionary_learning") else {"site": site}
    if to == "saelens" and kind.target_site:
        at = {}
    call(script, command_word="import", path=folder, output_path=tmp_path / "back.pth", **at)
    back = load_sae_model(tmp_path / "back.pth")
    assert back.site == site
    x = made_up_activations(sae, 64, seed=7)
    latents, x_hat = dense(sae, x)
    their_latents, their_x_hat = dense(back, x)
    scale = float(latents.max())
    torch.testing.assert_close(their_latents / scale, latents / scale, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(their_x_hat, x_hat, atol=1e-4 * float(x_hat.abs().max()), rtol=1e-4)


def test_exports_that_cannot_be(tmp_path, capsys):
    for kind, one, to, sentence in (
        (Kind(), True, "sparsify", "sparsify cannot and no weights can; train with --normalization none or scale"),
        (Kind(), True, "llamascope", "holds SAEs with jumprelu or relu, but this one has topk"),
        (Kind("jumprelu", "none"), False, "llamascope", "has one threshold for all latents, but these lie between"),
        (Kind("topk", "none"), True, "openai", "TopK normalises each activation with eps 1e-5, but this SAE has"),
        (Kind("topk", "none"), True, "gemmascope", "holds SAEs with jumprelu or relu, but this one has topk"),
        (to_mlp("topk"), True, "saelens", "SAELens has no TopK transcoder"),
        (to_mlp("relu"), True, "gemmascope", "holds autoencoders, but this is a transcoder to layers.3.mlp_out"),
    ):
        save_sae(random_sae(kind, one_threshold=one), tmp_path / "sae.pth", {"site": "layers.3.ffn_norm"})
        options = {"path": tmp_path / "sae.pth", "to": to, "output_path": tmp_path / "out"}
        assert sentence in refusal(capsys, script, command_word="export", **options)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))
    sae = SparseAutoencoder(D, N, K, 1e-6)
    sae.load_state_dict(random_sae(Kind()).state_dict())
    save_sae(sae, tmp_path / "old.pth", {"site": "layers.3.attention_norm"})
    options = {"path": tmp_path / "old.pth", "to": "saelens", "output_path": tmp_path / "out"}
    assert "SAELens normalises with eps 1e-5, but this SAE has 1e-06" in refusal(
        capsys, script, command_word="export", **options
    )


def test_an_export_that_differs_is_removed(tmp_path, capsys, monkeypatch):
    save_sae(random_sae(Kind("topk", "none")), tmp_path / "sae.pth", {"site": "layers.3.resid_post"})
    row = FORMATS["saelens"]

    def wrong(sae, folder):
        row.write(sae, folder)
        cfg = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": False}))

    monkeypatch.setitem(FORMATS, "saelens", row._replace(write=wrong))
    options = {"path": tmp_path / "sae.pth", "to": "saelens", "output_path": tmp_path / "out"}
    assert "The two differ: against its formula" in refusal(capsys, script, command_word="export", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae.json", "sae.pth"]


def test_rounding_at_a_gates_edge_is_no_difference():
    sae = random_sae(Kind("topk", "none"))
    x = made_up_activations(sae, 50)
    latents, x_hat = dense(sae, x)
    least = torch.where(latents[0] > 0, latents[0], torch.inf).argmin()
    other = latents.clone()
    other[0, least], other[0, (latents[0] == 0).nonzero()[0, 0]] = 0, latents[0, least]
    found = difference(sae, x, (other, x_hat))
    assert found.is_small and (found.support, found.at_edge) == (0, 1)
    largest = latents[0].argmax()
    other = latents.clone()
    other[0, largest] = 0
    found = difference(sae, x, (other, x_hat))
    assert not found.is_small and found.support == 1
    assert not difference(sae, x, (latents * 1.001, x_hat)).is_small
    assert not difference(sae, x, (latents, x_hat * 1.001)).is_small


# ---- bad input


class Unpickled:
    def __reduce__(self):
        return print, ("code was run",)


def test_what_cannot_be_imported(tmp_path, capsys):
    w = Weights()
    n = iter(range(100))

    def refused(write=None, output="new.pth", **options) -> str:
        folder = tmp_path / f"{next(n)}" / "layers.3"
        folder.mkdir(parents=True)
        if write:
            write(folder)
        told = {"path": folder, "output_path": tmp_path / output} | options
        said = refusal(capsys, script, command_word="import", **told)
        assert not (tmp_path / "new.pth").exists() and not (tmp_path / "new.json").exists()
        return said

    unknown = refused()
    for marker in ("hyperparams.json", "cfg.json with sae.safetensors", "sae_weights.safetensors", "ae.pt", "pre_bias"):
        assert marker in unknown
    assert "is of no known format" in unknown
    assert "There is nothing at" in refused(path=tmp_path / "none" / "there")
    assert "ending in .pth" in refused(output="new.safetensors")
    assert "does not say where it reads; give --site" in refused(lambda f: foreign_saes.goodfire(f, w))
    bad_site = refused(lambda f: foreign_saes.goodfire(f, w), site="layers.3.somewhere")
    assert "somewhere" in bad_site
    contradicts = refused(lambda f: foreign_saes.llama_scope(f, w), site="layers.4.resid_post")
    assert "says it reads layers.3.resid_post, not layers.4.resid_post" in contradicts

    def with_pickle(folder):
        torch.save({"encoder_linear.weight": w.W_enc, "x": Unpickled()}, folder / "sae.pt")

    said = refused(with_pickle)
    assert "holds more than tensors and plain values" in said and "print" in said
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "sae.pt").write_bytes(pickle.dumps(Unpickled()))
    assert "it is refused" in refused(path=tmp_path / "p") and "code was run" not in capsys.readouterr().out
    (tmp_path / "p" / "sae.pt").write_bytes(b"PK\3\4 no more")
    assert "truncated" in refused(path=tmp_path / "p")

    def shapes(folder):
        foreign_saes.sparsify(folder, w)
        foreign_saes.write_safetensors(folder / "sae.safetensors", {
            "encoder.weight": w.W_enc, "encoder.bias": w.b_enc[1:], "W_dec": w.W_dec, "b_dec": w.b_dec,
        })  # fmt: skip

    assert "holds encoder.bias as (95,) instead of (96,): its shapes contradict" in refused(shapes)
    assert "lacks the tensor threshold" in refused(
        lambda f: (foreign_saes.saelens(f, w), foreign_saes.write_json(f / "cfg.json", {"architecture": "jumprelu"}))
    )
    for options, sentence in (
        ({"hook_point_in": "blocks.3.ln2.hook_normalized"}, "the norm's output before the norm's weight"),
        ({"use_glu_encoder": True}, "gated linear unit"),
        ({"sae_type": "lorsa"}, "sparse attention layer (lorsa)"),
        ({"sae_type": "clt"}, "cross-layer transcoder (clt)"),
        ({"sae_type": "crosscoder"}, "a crosscoder"),
        ({"norm_activation": "token-wise"}, "norm_activation 'token-wise'"),
        ({"act_fn": "prolu"}, "act_fn 'prolu'; jumprelu and relu are read here"),
    ):
        assert sentence in refused(lambda f, options=options: foreign_saes.llama_scope(f, w, **options))
    assert "architecture gated" in refused(lambda f: foreign_saes.saelens(f, w, architecture="gated"))
    normalise = {"normalize_activations": "constant_norm_rescale"}
    assert "constant_norm_rescale, which has no form" in refused(lambda f: foreign_saes.saelens(f, w, **normalise))
    assert "a GatedAutoEncoder" in refused(lambda f: foreign_saes.dictionary_learning(f, w, "GatedAutoEncoder"))
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "params.npz", W_enc=np.array([object()]))
    assert "not a whole file of numpy arrays" in refused(path=tmp_path / "npz")
    (tmp_path / "ours").mkdir()
    torch.save({"b_pre": w.b_dec}, tmp_path / "ours" / "sae.pth")
    assert "already an SAE of this project" in refused(path=tmp_path / "ours")


def test_files_name_their_folder(tmp_path):
    w = Weights()
    for file, write in (
        ("checkpoints/final.safetensors", foreign_saes.llama_scope),
        ("sae.safetensors", foreign_saes.sparsify),
        ("params.npz", foreign_saes.gemma_scope),
    ):
        folder = tmp_path / write.__name__
        write(folder, w)
        assert recognise(folder / file)[0] == recognise(folder)[0]
    with pytest.raises(InputError, match="There is nothing at"):
        recognise(tmp_path / "nothing")


# ---- the hub


@pytest.fixture
def a_hub(monkeypatch, tmp_path):
    """A local hub, asked by this process."""
    from huggingface_hub import constants

    with FakeHub() as running:
        running.tokens.add("hf_mine")
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield running


def test_push_and_pull(a_hub, tmp_path, capsys):
    sae = random_sae(Kind("topk", "none"))
    info = {"site": "layers.3.resid_post", "begin_of_text": False, "model": {"name": "a-llama"}, "tokens_trained": 1234}
    save_sae(sae, tmp_path / "sae.pth", info | {"quality": {"val_fvu": 0.123456}})
    (tmp_path / "sae.meaning_a.yaml").write_text("{}")
    (tmp_path / "other.txt").write_text("not pushed")
    call(script, command_word="export", path=tmp_path / "sae.pth", push="me/an-sae", licence="apache-2.0")
    assert f"Uploaded to {a_hub.url}/me/an-sae" in capsys.readouterr().out
    repo = a_hub.repos["me/an-sae"]
    files = repo.commits[repo.main]
    assert set(files) == {"README.md", "sae.json", "sae.meaning_a.yaml", "sae.pth"}
    card = files["README.md"].decode()
    for part in ("license: apache-2.0", "| model | a-llama |", "| FVU, held out | 0.1235 |", "1,234", "--to saelens"):
        assert part in card
    call(script, command_word="import", path="me/an-sae", pull=True, output_path=tmp_path / "theirs" / "b.pth")
    again = load_sae_model(tmp_path / "theirs" / "b.pth")
    assert again.info == load_sae_model(tmp_path / "sae.pth").info
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), sae.state_dict().values(), strict=True))
    assert (tmp_path / "theirs" / "b.meaning_a.yaml").exists()

    call(script, command_word="export", path=tmp_path / "sae.pth", to="sparsify", push="me/theirs")
    repo = a_hub.repos["me/theirs"]
    assert set(repo.commits[repo.main]) == {"README.md", "cfg.json", "sae.safetensors"}
    at = {"site": "layers.3.resid_post"}
    call(script, command_word="import", path="me/theirs", output_path=tmp_path / "back.pth", **at)
    assert load_sae_model(tmp_path / "back.pth").info["imported"]["path"] == "me/theirs"


def test_a_folder_of_a_repository(a_hub, tmp_path, capsys):
    w = Weights()
    foreign_saes.sparsify(tmp_path / "layers.7", w)
    files = {f"layers.7/{path.name}": path.read_bytes() for path in (tmp_path / "layers.7").iterdir()}
    repo = a_hub.repos["them/saes"] = Repo()
    repo.commit(files | {"layers.8/cfg.json": b"{}"})
    call(script, command_word="import", path="them/saes/layers.7", output_path=tmp_path / "sae.pth")
    assert load_sae_model(tmp_path / "sae.pth").site == "layers.7.resid_post"
    refused = lambda path: refusal(capsys, script, command_word="import", path=path, output_path=tmp_path / "x.pth")
    assert "does not have them/none or its files (404)" in refused("them/none")
    assert "them/saes has no layers.9" in refused("them/saes/layers.9")
    assert "is of no known format" in refused("them/saes/layers.8")


# ---- latents for other programs' pages


@pytest.fixture
def known_latents(tmp_path, tiny_model_dir):
    """A random SAE of the tiny model with everything beside it."""
    tokenizer = load_tokenizer(str(tiny_model_dir))
    path = latent_files.write_latents(tmp_path / "known", tiny_model_dir, tokenizer)
    info = json.loads(path.with_suffix(".json").read_text())
    sae = SparseAutoencoder(36, latent_files.N_LATENTS, 6)
    sae.initialize(torch.zeros(36), torch.Generator().manual_seed(0))
    save_sae(sae, path, info | {"site": "layers.1.resid_post"})
    return path


def test_latents_for_sae_dashboard(known_latents, tmp_path, tiny_model_dir):
    options = {"path": known_latents, "llama_model_dir": tiny_model_dir, "text_path": tmp_path / "t.txt"}
    options["text_path"].write_text("hello the ring. " * 9)
    call(script, command_word="export", to="sae_dashboard", output_path=tmp_path / "out", **options)
    (path,) = (tmp_path / "out").iterdir()
    batch = json.loads(path.read_text())
    assert {name: batch[name] for name in ("model_id", "layer", "sae_set", "sae_id_suffix")} == {
        "model_id": "tiny", "layer": 1, "sae_set": "sae", "sae_id_suffix": None,
    }  # fmt: skip
    index, tokenizer = LatentIndex(known_latents), load_tokenizer(str(tiny_model_dir))
    alive = [i for i in range(latent_files.N_LATENTS) if i not in latent_files.DEAD]
    assert [feature["feature_index"] for feature in batch["features"]] == alive
    sae, model = load_sae_model(known_latents), load_model(str(tiny_model_dir))
    ids = tokenizer.encode("hello the ring. " * 9)
    std = float(sae.normalize(model.activations(torch.tensor([ids[:128]]), sae.site)[0, 1:])[2].double().mean())
    top = dict(top_sentences(known_latents.with_name("sae.top.parquet"), "max", 20))
    for feature in batch["features"][:5]:
        latent = feature["feature_index"]
        sentences = top[latent]
        for shown, sentence in zip(feature["activations"], sentences, strict=True):
            assert "".join(shown["tokens"]) == tokenizer.decode(sentence.token_ids)
            assert shown["values"] == pytest.approx(sentence.token_activations, abs=1e-4)
            assert shown["values"][shown["qualifying_token_index"]] == max(shown["values"])
        assert feature["vector"] == pytest.approx((std * sae.decoder.weight[:, latent]).tolist(), rel=1e-4)
        assert feature["frac_nonzero"] == pytest.approx(index.frequency[latent], rel=1e-5)


def test_latents_for_neuronpedia(known_latents, tmp_path, tiny_model_dir, capsys):
    options = {"path": known_latents, "to": "neuronpedia", "output_path": tmp_path / "out"}
    assert "name it with --llama_model_dir" in refusal(capsys, script, command_word="export", **options)
    call(script, command_word="export", llama_model_dir=tiny_model_dir, **options)
    assert "1 files, each read back and equal" in capsys.readouterr().out
    body = json.loads((tmp_path / "out" / "upload-0.json").read_text())
    assert (body["modelId"], body["source"]) == ("tiny", "1-sae")
    named = {f["index"]: f["explanations"][0]["text"] for f in body["features"] if f["explanations"]}
    assert named == {i: text for i, (text, _) in latent_files.MEANINGS.items() if i not in latent_files.DEAD}
    assert all(0 <= f["density"] <= 1 and 1 <= len(f["activations"]) <= 20 for f in body["features"])
    promoted = PROMOTED.read(known_latents.with_name("sae.promoted.parquet"), ["tokens", "scores"]).to_pylist()
    for feature in body["features"]:
        row = promoted[feature["index"]]
        expected = [{"token": t, "value": v} for t, v in zip(row["tokens"], row["scores"], strict=True)]
        assert feature["topLogits"] == expected[:20] and len(feature["bottomLogits"]) <= 20
    info = json.loads(known_latents.with_suffix(".json").read_text())
    known_latents.with_suffix(".json").write_text(json.dumps(info | {"site": "layers.1.attention_norm"}))
    options |= {"llama_model_dir": tiny_model_dir, "output_path": tmp_path / "other"}
    assert "and layers.1.attention_norm is none" in refusal(capsys, script, command_word="export", **options)


@pytest.mark.skipif("INTEROP" not in os.environ, reason="make interop")
def test_an_export_of_latents_in_the_programs_themselves(known_latents, tmp_path, tiny_model_dir, monkeypatch):
    """SAEDashboard's classes read a batch and write the same; Neuronpedia's client sends the same features as we do."""
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_explanation import Explanation
    from neuronpedia.np_feature import Feature, Logit
    from neuronpedia.requests.feature_request import FeatureRequest
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    options = {"path": known_latents, "llama_model_dir": tiny_model_dir}
    for to in ("sae_dashboard", "neuronpedia"):
        call(script, command_word="export", to=to, output_path=tmp_path / to, **options)
    batch = json.loads((tmp_path / "sae_dashboard" / "batch-0.json").read_text())
    found = NeuronpediaDashboardBatch(**batch).to_dict()
    assert {name: found[name] for name in batch if name != "features"} == {
        name: value for name, value in batch.items() if name != "features"
    }
    for theirs, ours in zip(found["features"], batch["features"], strict=True):
        assert {name: theirs[name] for name in ours} == ours

    body, sent = json.loads((tmp_path / "neuronpedia" / "upload-0.json").read_text()), []
    monkeypatch.setattr(FeatureRequest, "send_request", lambda self, json, **_: sent.append(json))
    features = []
    for each in body["features"]:
        about = {"modelId": body["modelId"], "source": body["source"], "index": each["index"]}
        top, bottom = ([Logit(**logit) for logit in each[name]] for name in ("topLogits", "bottomLogits"))
        explanations = [Explanation(**about, **explanation) for explanation in each["explanations"]]
        activations = [Activation(**about, **activation) for activation in each["activations"]]
        features.append(Feature(**about, density=each["density"], top_logits=top, bottom_logits=bottom,
                                explanations=explanations, activations=activations))  # fmt: skip
    FeatureRequest("key").upload_batch(body["modelId"], body["source"], features)
    (theirs,) = sent

    def without_none(part):
        if isinstance(part, dict):
            return {name: without_none(value) for name, value in part.items() if value is not None}
        return [without_none(each) for each in part] if isinstance(part, list) else part

    assert without_none(theirs) == body


@pytest.mark.slow
def test_a_site_that_is_a_layer_off_is_noticed(tmp_path, capsys):
    """With the model at hand: the tiny Llama's reference SAE, exported, and once listed a layer too low."""
    sae, folder = f"{TINY_LLAMA_DIR}/sae.pth", tmp_path / "out"
    call(script, command_word="export", path=sae, to="saelens", output_path=folder)
    (tmp_path / "texts.txt").write_text(LISTS_AND_FILES)
    options = {"llama_model_dir": TINY_LLAMA_DIR, "text_path": tmp_path / "texts.txt"}
    call(script, command_word="import", path=folder, output_path=tmp_path / "right.pth", **options)
    said = capsys.readouterr().out
    assert "better than" not in said and "Note: such numbers" not in said
    info = json.loads((tmp_path / "right.json").read_text())
    assert info["site"] == "layers.6.attention_norm" and info["model"]["name"] == "tiny_llama"
    measured = info["imported"]["measured"]
    assert list(measured) == [f"layers.{i}.attention_norm" for i in (6, 5, 7)]
    assert measured["layers.6.attention_norm"]["l0"] == 32
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "model.layers.5.input_layernorm"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    call(script, command_word="import", path=folder, output_path=tmp_path / "off.pth", **options)
    said = capsys.readouterr().out
    assert "Note: it fits layers.6.attention_norm better than layers.5.attention_norm, where it is said to read" in said
    assert load_sae_model(tmp_path / "off.pth").site == "layers.5.attention_norm"

"""The microscope against transformers' own model, changed or hooked by hand, in float32 to 1e-4.

Lens: hidden states through transformers' norm and head. Ablation: columns of o_proj set to zero. Patching: a forward
hook that replaces one position. Attribution: sums, and a part of the residual stream computed from o_proj's columns.
Gradients: finite differences. Then the commands: what they print, and what they refuse.

    .venv/bin/python -m pytest tests/test_microscope.py
"""

import base64
import contextlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import PROJECT_DIR, write_tiny_model
from test_llama import NORM_EPS, SHAPES, VOCAB_SIZE, hf_model, meta_state

import llama_3_microscope as script
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from microscope.ablation import Ablation, effect, every_head, head_name, parse_heads
from microscope.attention import head_scores, patterns, repeated_tokens
from microscope.attention_page import attention_html
from microscope.attribution import attribution, latents_add, outlook
from microscope.lens import logit_lens
from microscope.patching import Contrast, attribution_patch, normalised, patch_heads, patch_map
from microscope.prompts import Prompt
from microscope.tensors import all_sites, load_tensors, patches_from, save_tensors, tensors
from pipeline.errors import InputError
from sae import SparseAutoencoder
from serving.steered_model import fetched_reference

SHAPE = SHAPES["3.2-3B"]
N_LAYERS, N_HEADS, HEAD_DIM = SHAPE["n_layers"], SHAPE["n_heads"], SHAPE["dim"] // SHAPE["n_heads"]
ANSWER, OTHER = 12, 34


@pytest.fixture(scope="module")
def hf():
    return hf_model(SHAPE, 32.0, True)


@pytest.fixture(scope="module")
def model_dir(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("microscope")
    params = {key: value for key, value in SHAPE.items() if key != "hidden"}
    write_tiny_model(folder, vocab_size=VOCAB_SIZE, norm_eps=NORM_EPS, **params)
    torch.save(meta_state(hf, SHAPE), folder / "consolidated.00.pth")
    return str(folder)


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir, rope_scaling_factor=32.0)


def prompt_of(*ids: int) -> Prompt:
    return Prompt(list(ids), [str(i) for i in ids])


CLEAN, CORRUPTED = prompt_of(5, 17, 60, 33, 2, 71), prompt_of(5, 17, 44, 33, 2, 71)


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def hf_logits(hf, prompt: Prompt) -> torch.Tensor:
    return hf(torch.tensor([prompt.ids]), use_cache=False).logits[0]


@contextlib.contextmanager
def without_heads(hf, layer: int, heads):
    """transformers' model with what these heads write multiplied by zero."""
    weight = hf.model.layers[layer].self_attn.o_proj.weight
    kept = weight.clone()
    for head in heads:
        weight.data[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
    try:
        yield
    finally:
        weight.data.copy_(kept)


# ---- instruments


def test_lens_is_the_norm_and_head_over_hidden_states(hf, model):
    with torch.no_grad():
        hidden = hf(torch.tensor([CLEAN.ids]), output_hidden_states=True).hidden_states
        final = hf_logits(hf, CLEAN).log_softmax(-1)
        for layer, found in enumerate(logit_lens(model, CLEAN, "resid_pre", 4)):
            p = hf.lm_head(hf.model.norm(hidden[layer][0])).softmax(-1)
            close(found.probabilities, p.topk(4).values)
            assert torch.equal(found.token_ids, p.topk(4).indices)
            close(found.entropy, torch.distributions.Categorical(p).entropy())
            close(found.kl, torch.nn.functional.kl_div(p.log(), final, log_target=True, reduction="none").sum(-1))
    assert logit_lens(model, CLEAN, "resid_post", 1)[-1].kl.abs().max() < 1e-4


def test_patterns_and_scores(hf, model):
    tokens = [7, *range(20, 28), *range(20, 28)]
    with torch.no_grad():
        expected = torch.stack(hf(torch.tensor([tokens]), output_attentions=True).attentions)[:, 0]
    close(patterns(model, prompt_of(*tokens), [0, 2]), expected[[0, 2]])
    scores = head_scores(model, tokens, 8)
    mean = lambda key: torch.stack([expected[:, :, q, key(q)] for q in range(9, 17)]).mean(0)
    close(scores.induction, mean(lambda q: q - 7))
    close(scores.previous, mean(lambda q: q - 1))
    close(scores.first, mean(lambda q: 0))


def test_ablating_heads_equals_weights_of_zero(hf, model):
    with without_heads(hf, 1, [0, 4]):
        logits = hf_logits(hf, CLEAN)
    found = effect(model, CLEAN, Ablation(heads={1: [0, 4]}))
    close(found.log_p, logits[-1].log_softmax(-1))
    close(found.loss, torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(CLEAN.ids[1:])))
    for head, each in enumerate(list(every_head(model, CLEAN, "zero"))[1]):
        with without_heads(hf, 1, [head]):
            close(each.log_p, hf_logits(hf, CLEAN)[-1].log_softmax(-1))


def test_mean_ablation_and_whole_layers(hf, model):
    def mean(_, args):
        return (args[0].mean(1, keepdim=True).expand_as(args[0]),)

    handle = hf.model.layers[2].self_attn.o_proj.register_forward_pre_hook(mean)
    expected = hf_logits(hf, CLEAN)
    handle.remove()
    every = Ablation(heads={2: list(range(N_HEADS))}, value="mean")
    close(effect(model, CLEAN, every).log_p, expected[-1].log_softmax(-1))
    handle = hf.model.layers[1].mlp.register_forward_hook(lambda *args: 0 * args[2])
    with without_heads(hf, 0, range(N_HEADS)):
        expected = hf_logits(hf, CLEAN)
    handle.remove()
    found = effect(model, CLEAN, Ablation(attention_layers=[0], mlp_layers=[1]))
    close(found.log_p, expected[-1].log_softmax(-1))


def test_patching_equals_a_hook_that_replaces_one_position(hf, model):
    contrast = Contrast(CLEAN, CORRUPTED, ANSWER, OTHER)
    ends = contrast.ends(model)
    difference = lambda logits: float(logits[-1, ANSWER] - logits[-1, OTHER])
    close(ends, (difference(hf_logits(hf, CLEAN)), difference(hf_logits(hf, CORRUPTED))))
    sites = [f"layers.{i}.resid_post" for i in range(N_LAYERS)]
    found = patch_map(model, contrast, sites, ends)
    with torch.no_grad():
        hidden = hf(torch.tensor([CLEAN.ids]), output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):  # the last hidden state is normalised
        for position in range(6):

            def patch(_, args, output, layer=layer, position=position):
                output[:, position] = hidden[layer + 1][:, position]
                return output

            handle = hf.model.layers[layer].register_forward_hook(patch)
            expected = difference(hf_logits(hf, CORRUPTED))
            handle.remove()
            close(found[layer, position], normalised(torch.tensor(expected), ends))
    close(found[0, :2], torch.zeros(2))  # nothing differs before the changed word
    close(found[-1], torch.tensor([0.0, 0, 0, 0, 0, 1]))


def test_patching_heads_equals_replacing_their_part_of_the_input_of_o_proj(hf, model):
    contrast = Contrast(CLEAN, CORRUPTED, ANSWER, OTHER)
    ends = contrast.ends(model)
    found = patch_heads(model, contrast, ends)
    kept: list[torch.Tensor] = []
    o_proj = hf.model.layers[1].self_attn.o_proj
    handle = o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    hf_logits(hf, CLEAN)
    handle.remove()
    for head in range(N_HEADS):

        def patch(_, args, head=head):
            own = args[0].clone()
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            own[..., part] = kept[0][..., part]
            return (own,)

        handle = o_proj.register_forward_pre_hook(patch)
        logits = hf_logits(hf, CORRUPTED)
        handle.remove()
        close(found[1, head], normalised(logits[-1, ANSWER] - logits[-1, OTHER], ends))


def test_attribution_patching_is_the_derivative_of_patching(model):
    contrast = Contrast(CLEAN, CORRUPTED, ANSWER, OTHER)
    ends, site, step = contrast.ends(model), "layers.1.resid_mid", 1e-2
    found = attribution_patch(model, contrast, ["layers.0.mlp_out", site], ends)[1]
    clean = model.activations(torch.tensor([CLEAN.ids]), site)
    corrupted = model.activations(torch.tensor([CORRUPTED.ids]), site)
    for position in range(6):
        differences = []
        for sign in (1, -1):
            with model.intervene(site, lambda x, s=sign: x + s * step * (clean - corrupted), positions=[position]):
                differences.append(contrast.difference(model(torch.tensor([CORRUPTED.ids])))[0])
        slope = (differences[0] - differences[1]) / (2 * step) / (ends[0] - ends[1])
        torch.testing.assert_close(found[position], slope, atol=2e-3, rtol=2e-2)
    assert found.abs().max() > 0.05


def test_attribution_sums_to_the_logit_difference(hf, model):
    parts, difference = attribution(model, CLEAN, ANSWER, OTHER)
    logits = hf_logits(hf, CLEAN)[-1]
    close(difference, logits[ANSWER] - logits[OTHER])
    close(sum(part.amount for part in parts), difference)
    assert len(parts) == 1 + N_LAYERS * (N_HEADS + 1)
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        attn = hf.model.layers[2].self_attn
        handles = [attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1]))]
        handles.append(hf.model.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1])))
        hf_logits(hf, CLEAN)
        for handle in handles:
            handle.remove()
        part = slice(3 * HEAD_DIM, 4 * HEAD_DIM)
        vector = attn.o_proj.weight[:, part] @ kept[0][part] * hf.model.norm.weight
        by_hand = hf.lm_head(vector / (kept[1].square().mean() + NORM_EPS).sqrt())
    close(dict(parts)["head 2.3"], by_hand[ANSWER] - by_hand[OTHER])


@pytest.mark.parametrize("site", ["layers.1.resid_post", "layers.1.resid_pre"])
def test_attribution_to_latents_sums_too(model, site):
    torch.manual_seed(0)
    sae = SparseAutoencoder(SHAPE["dim"], 80, 5)
    sae.initialize(torch.randn(SHAPE["dim"]) * 0.1)
    sae.info["site"] = site
    parts, difference = attribution(model, CLEAN, ANSWER, None, sae)
    close(sum(part.amount for part in parts), difference)
    latents = [part.name for part in parts if part.name.startswith("latent")]
    values, indices = sae.encode(model.activations(torch.tensor([CLEAN.ids]), site)[0, -1])
    assert latents == [f"latent {int(i)}" for i, value in zip(indices, values, strict=True) if value > 0]
    assert not any(part.name.startswith(("head 0.", "embedding")) for part in parts)
    sae.info["site"] = "layers.1.attention_norm"
    with pytest.raises(InputError, match="needs an SAE of the residual stream"):
        attribution(model, CLEAN, ANSWER, None, sae)


def test_saved_tensors_bring_the_clean_answer_back(model, model_dir, tmp_path):
    path, site = tmp_path / "clean.safetensors", "layers.2.resid_post"
    save_tensors(path, tensors(model, CLEAN, [site, "layers.1.attention_pattern"]), model_dir)
    found = load_tensors(path, model_dir)
    assert set(found) == {site, "layers.1.attention_pattern"}
    (patch,) = patches_from({site: found[site]}, 6, None, False)
    with model.intervene(*patch):
        close(model(torch.tensor([CORRUPTED.ids])), model(torch.tensor([CLEAN.ids])))
    (patch,) = patches_from({site: found[site]}, 3, None, True)
    with model.intervene(*patch):
        close(model.activations(torch.tensor([[1, 2, 3]]), site)[0], found[site].mean(0).expand(3, -1))
    with pytest.raises(InputError, match="was saved for 6 tokens, this prompt has 3"):
        patches_from({site: found[site]}, 3, None, False)
    assert len(all_sites(model.args, [0, 2])) == 26


def test_sweeps_that_share_a_prefix_equal_whole_runs(model):
    """A change at position 4 of 9: keys and values of what stands before are taken over, in several batches of rows."""
    clean, corrupted = prompt_of(5, 17, 60, 33, 2, 71, 8, 9, 10), prompt_of(5, 17, 60, 33, 41, 71, 8, 9, 10)
    contrast = Contrast(clean, corrupted, ANSWER, OTHER)
    ends = contrast.ends(model)
    sites = ["layers.0.resid_pre", "layers.1.mlp_out", "layers.2.attention_out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microscope.sweeps._TOKENS", 11)  # two variants at a time
        found, heads = patch_map(model, contrast, sites, ends), patch_heads(model, contrast, ends)
        off = list(every_head(model, clean, "mean"))
    source = model.activations(clean.batch(model), [*sites, "layers.1.head_out"])
    for i, site in enumerate(sites):
        for position in range(9):
            with model.intervene(site, lambda x, s=site: source[s].clone(), positions=[position]):
                expected = contrast.difference(model(corrupted.batch(model)))[0]
            close(found[i, position], normalised(expected, ends))
    assert found[:, :4].abs().max() == 0 and found[:2, 4].abs().min() > 1e-3
    for head in range(N_HEADS):
        with model.intervene("layers.1.head_out", lambda x: source["layers.1.head_out"].clone(), heads=[head]):
            expected = contrast.difference(model(corrupted.batch(model)))[0]
        close(heads[1, head], normalised(expected, ends))
        alone = effect(model, clean, Ablation(heads={2: [head]}, value="mean"))
        close(off[2][head].log_p, alone.log_p)
        close(off[2][head].losses, alone.losses)


@pytest.mark.parametrize("kind", ["resid_mid", "mlp_out"])
def test_what_latents_add_to_the_next_token_is_their_part_of_its_logit(model, kind):
    torch.manual_seed(0)
    site = f"layers.2.{kind}"
    sae = SparseAutoencoder(SHAPE["dim"], 80, 5)
    sae.initialize(torch.randn(SHAPE["dim"]) * 0.1)
    sae.info["site"] = site
    ahead = outlook(model, CLEAN.ids, sae)
    logits = model(CLEAN.batch(model))[0]
    assert ahead.answers == logits.argmax(-1).tolist()
    close(ahead.probabilities, logits.softmax(-1).max(-1).values)
    acts = model.activations(CLEAN.batch(model), [site, "layers.2.resid_post"])
    for position, answer in enumerate(ahead.answers):
        values, indices = sae.encode(acts[site][0, position])
        latents = list(zip(indices.tolist(), values.tolist(), strict=True))
        found = latents_add(model, sae, latents, answer, ahead.scales[position])
        last = acts["layers.2.resid_post"][0, position]
        length = (last.square().mean() + NORM_EPS).sqrt()
        _, _, std = sae.normalize(acts[site][0, position])
        for (latent, value), amount in zip(latents, found, strict=True):
            vector = value * sae.decoder.weight[:, latent] * (std + sae.normalize_eps) / length
            by_hand = model.output(vector * model.norm.weight)
            close(amount, by_hand[answer] - by_hand.mean())
    sae.info["site"] = "layers.2.attention_norm"
    assert outlook(model, CLEAN.ids, sae) is None and latents_add(model, sae, [], 0, 1.0) == []


# ---- known facts, on a real model

SMOLLM2 = fetched_reference()
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="SmolLM2 is not here: make model fetches it")


@pytest.mark.slow
@needs_smollm2
def test_induction_heads_copy_in_smollm2():
    """Olsson et al. 2022: some heads look from a token at what followed it before; without them, less is copied."""
    model, n = load_model(SMOLLM2), 32
    tokens = repeated_tokens(list(range(100, 40_000)), n, 0, 1)
    scores = head_scores(model, tokens, n)
    order = scores.induction.flatten().argsort(descending=True).tolist()
    assert scores.induction.max() > 0.6 and scores.induction.median() < 0.05
    prompt = prompt_of(*tokens)
    again = lambda *heads: float(effect(model, prompt, Ablation(heads=by_layer(heads))).losses[-n:].mean())
    by_layer = lambda heads: parse_heads([head_name(i, model.args.n_heads) for i in heads], model)
    whole = float(effect(model, prompt).losses[-n:].mean())
    first = float(effect(model, prompt).losses[:n].mean())
    assert whole < first / 3  # what was read is copied
    others = torch.randperm(len(order) - 20, generator=torch.Generator().manual_seed(0))[:3]
    without_induction, without_random = again(*order[:3]), again(*(order[20 + int(i)] for i in others))
    assert without_induction > whole + 0.3
    assert abs(without_random - whole) < (without_induction - whole) / 3


PEERS = PROJECT_DIR / "data" / "transformer-lens" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="no TransformerLens: see benchmarks/requirements-transformer-lens.txt")
def test_the_same_numbers_as_transformer_lens():
    """Lens, patterns, ablation, patching, attribution, gradients to 1e-4; the benchmark stops beyond."""
    folders = ["llama_3/tiny_llama", *([SMOLLM2] if SMOLLM2 else [])]
    command = [PEERS, "benchmarks/microscope.py", "--rounds", "1", "--prompt_tokens", "6", "--model_dirs", *folders]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| patching, resid_pre, logit difference | ") == 2 * len(folders)  # differences, times


# ---- commands

TEXT = ["--prompt", "hello a"]
TINY_SAE = str(Path(TINY_LLAMA_DIR) / "sae.pth")


def printed(capsys, *words: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["llama_3_microscope.py", *words])
        script.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["lens", *TEXT, "--kind", "mlp_out"],
        ["attention", "--repeated_tokens", "6"],
        ["attention", *TEXT],
        ["attention", *TEXT, "--head", "1.2"],
        ["ablate", "--all_heads", "--repeated_tokens", "6"],
        ["ablate", *TEXT, "--all_heads", "--value", "mean"],
        ["patch", *TEXT, "--corrupted", "hello the", "--answers", " the", " a"],
        ["attribution", *TEXT],
    ],
    ids=lambda words: " ".join(word for word in words if word[:1] not in "0123456789 "),
)
def test_tables_fit_80_columns_and_pictures_appear(words, tiny_model_dir, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    words = [*words, "--llama_model_dir", str(tiny_model_dir)]
    text = printed(capsys, *words, "--picture_path", str(picture))
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) > 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    for line in printed(capsys, *words, "--json").splitlines():
        assert json.loads(line)["rows"]


def test_tensors_to_a_file_and_into_a_prompt(tiny_model_dir, tmp_path, capsys):
    path, folder = str(tmp_path / "t.safetensors"), ["--llama_model_dir", str(tiny_model_dir)]
    text = printed(capsys, "tensors", *TEXT, *folder, "--sites", "layers.1.mlp_out", "--save_path", path)
    assert "layers.1.mlp_out" in text and path in text
    assert "patched" in printed(capsys, "patch", "--prompt", "aa 12", *folder, "--from_path", path, "--average")
    ablated = printed(capsys, "ablate", *TEXT, *folder, "--keep_heads", "1.0", "--mlp_layers", "0", "--new_tokens", "3")
    assert "ablated" in ablated


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["lens"], "This needs a prompt; give one with --prompt."),
        (["attention", *TEXT, "--position", "99"], "There is no position 99; this prompt has positions 0 to"),
        (["attention", "--html_path", "a.html"], "--html_path shows all heads on a prompt"),
        (
            ["attention", "--repeated_tokens", "9999"],
            "Attention patterns of 19,999 tokens (1 x 6 heads) would take 9.6 GB",
        ),
        (["lens", *TEXT, "--position", "99"], "There is no position 99; this prompt has positions 0 to"),
        (["attention", *TEXT, "--head", "1.6"], "There is no head 1.6; layers have heads 0 to 5."),
        (["attention", *TEXT, "--head", "one"], "'one' is not a head; write LAYER.HEAD"),
        (["ablate", *TEXT, "--heads", "3.0"], "There is no layer 3; this model has layers 0 to 2."),
        (["ablate", *TEXT, "--heads", "1.0", "--keep_heads", "1.1"], "Layer 1 is in both --heads and --keep_heads"),
        (["ablate", *TEXT, "--mlp_layers", "3"], "There is no layer 3; this model has layers 0 to 2."),
        (["ablate", *TEXT], "Nothing is switched off"),
        (["patch", *TEXT, "--corrupted", "hello"], "The prompts do not align"),
        (["patch", *TEXT, "--corrupted", "hello a"], "Both prompts are the same"),
        (["patch", *TEXT], "This needs a prompt; give one with --corrupted."),
        (["patch", *TEXT, "--corrupted", "hello the", "--answers", "a", "a"], "Both answers are 'a'; name two"),
        (["attribution", *TEXT, "--answers", "xyz"], "The answer 'xyz' is 3 tokens"),
        (["attribution", *TEXT, "--answers", "x", "y", "z"], "There are 3 answers; give the answer and at most one"),
        (["attribution", *TEXT, "--sae_model_path", TINY_SAE], f"{TINY_SAE} has d_model 256, but"),
        (["tensors", *TEXT, "--sites", "layers.0.nothing"], "'layers.0.nothing' is not a site"),
        (["patch", *TEXT, "--from_path", "none.safetensors"], "none.safetensors cannot be read"),
    ],
    ids=lambda each: " ".join(each)[:40] if isinstance(each, list) else "",
)
def test_bad_input_is_refused_in_a_sentence(words, sentence, tiny_model_dir, capsys):
    with pytest.raises(InputError) as refused:
        printed(capsys, *words, "--llama_model_dir", str(tiny_model_dir))
    assert str(refused.value).startswith(sentence)


def test_a_file_of_another_model_and_too_long_a_prompt(model, model_dir, tiny_model_dir, tmp_path, monkeypatch):
    save_tensors(tmp_path / "t.safetensors", tensors(model, CLEAN, ["layers.0.mlp_out"]), model_dir)
    with pytest.raises(InputError, match="is of another model"):
        load_tensors(tmp_path / "t.safetensors", str(tiny_model_dir))
    monkeypatch.setattr("microscope.prompts.MOST_PATTERN_BYTES", 100)
    with pytest.raises(InputError, match="would take"):
        patterns(model, CLEAN, [0])


def test_copying_without_a_head(tiny_model_dir, capsys):
    """No prompt: losses of the first and the second reading of random tokens."""
    words = ["ablate", "--heads", "1.2", "--repeated_tokens", "6", "--json", "--llama_model_dir", str(tiny_model_dir)]
    rows = json.loads(printed(capsys, *words))["rows"]
    assert [row["model"] for row in rows] == ["whole", "ablated"]
    model = load_model(str(tiny_model_dir))
    prompt = script.repeated_prompt(
        script.Session(model, str(tiny_model_dir), load_tokenizer(str(tiny_model_dir)), 3, None, False), 6, 0
    )
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(prompt.batch(model))[0, :-1], torch.tensor(prompt.ids[1:]), reduction="none"
        )
    close(rows[0]["first"], losses[:-6].mean())
    close(rows[0]["again"], losses[-6:].mean())
    assert rows[1]["again"] != rows[0]["again"]


def test_the_page_of_attention_holds_every_pattern(model, tiny_model_dir, tmp_path, capsys):
    path = tmp_path / "attention.html"
    folder = ["--llama_model_dir", str(tiny_model_dir)]
    printed(capsys, "attention", "--prompt", "a <b> 12", *folder, "--html_path", str(path))
    page = path.read_text(encoding="utf-8")
    assert "http" not in page and "<b>" not in page
    found = patterns(model, CLEAN, [0, 1, 2])
    page = attention_html(found, ["</script>", *CLEAN.tokens[1:]])
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert data["tokens"][0] == "</script>" and (data["n_layers"], data["n_heads"]) == (N_LAYERS, N_HEADS)
    seen = torch.frombuffer(bytearray(base64.b64decode(data["bytes"])), dtype=torch.uint8).view(N_LAYERS * N_HEADS, -1)
    position, key = 4, 2
    assert abs(float(seen[7, position * (position + 1) // 2 + key]) / 255 - float(found.flatten(0, 1)[7, 4, 2])) < 0.003
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microscope.attention_page.MOST_BYTES", 100)
        with pytest.raises(InputError, match="would take .* shorten the prompt"):
            attention_html(found, CLEAN.tokens)

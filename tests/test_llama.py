"""The hand-written Llama 3 against transformers' LlamaForCausalLM, and against itself where two ways must agree.

Compared in float32 to 1e-4, on scaled-down shapes of the released models with random weights: the logits and all
thirteen sites of every layer, whole and with a cache; RoPE frequencies out to position 131072; padded rows against
each row alone. Then what `activations` leaves uncomputed, what `intervene` changes and when it stops, and the loader's
errors for broken checkpoints.

    .venv/bin/python -m pytest tests/test_llama.py
"""

import asyncio
import json
import os
import threading

import pytest
import torch
from conftest import TINY_PARAMS, TINY_VOCAB_SIZE, write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_3 import load_model, load_tokenizer
from llama_3.loading import read_params
from llama_3.model import (
    INNER_SITES,
    SITES,
    ModelArgs,
    Transformer,
    check_site,
    hidden_dim,
    rope_frequencies,
    rope_tables,
)
from pipeline.errors import InputError

BOS = 7  # any id serves as the token to skip

# Scaled-down shapes: heads, ratio of query to key heads, tied output, scaling and depth follow the released models.
# hidden_size is explicit, so that the width params.json implies is checked too.
SHAPES = {
    "3.2-1B": dict(dim=96, n_layers=2, n_heads=8, n_kv_heads=2, multiple_of=16, ffn_dim_multiplier=1.5, hidden=384),
    "3.2-3B": dict(dim=60, n_layers=3, n_heads=6, n_kv_heads=2, multiple_of=14, ffn_dim_multiplier=1.0, hidden=168),
    "3.1-8B": dict(dim=56, n_layers=4, n_heads=4, n_kv_heads=1, multiple_of=32, ffn_dim_multiplier=1.3, hidden=224),
    "3.0-8B": dict(dim=40, n_layers=2, n_heads=5, n_kv_heads=5, multiple_of=8, ffn_dim_multiplier=None, hidden=112),
}
CASES = [("3.2-1B", 32.0, True), ("3.2-3B", 32.0, True), ("3.1-8B", 8.0, False), ("3.0-8B", 1.0, False)]
VOCAB_SIZE, NORM_EPS = 101, 3e-4  # eps of a size that shows


# ---- against transformers


def hf_rope(factor: float) -> dict:
    if factor == 1.0:
        return dict(rope_type="default", rope_theta=500000.0)
    return dict(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def hf_model(shape: dict, factor: float, tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape["dim"],
        intermediate_size=shape["hidden"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        rms_norm_eps=NORM_EPS,
        max_position_embeddings=131072,
        rope_parameters=hf_rope(factor),
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(std=1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5)  # sharp attention
    return model


def meta_state(hf, shape: dict) -> dict[str, torch.Tensor]:
    """The weights of a transformers model under Meta's names, rotated pairs side by side instead of in two halves."""

    def interleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
        return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    state = {
        "tok_embeddings.weight": hf.model.embed_tokens.weight,
        "norm.weight": hf.model.norm.weight,
        "output.weight": hf.lm_head.weight,
    }
    for i, layer in enumerate(hf.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        state |= {
            f"layers.{i}.attention.wq.weight": interleave(attention.q_proj.weight, shape["n_heads"]),
            f"layers.{i}.attention.wk.weight": interleave(attention.k_proj.weight, shape["n_kv_heads"]),
            f"layers.{i}.attention.wv.weight": attention.v_proj.weight,
            f"layers.{i}.attention.wo.weight": attention.o_proj.weight,
            f"layers.{i}.feed_forward.w1.weight": mlp.gate_proj.weight,
            f"layers.{i}.feed_forward.w2.weight": mlp.down_proj.weight,
            f"layers.{i}.feed_forward.w3.weight": mlp.up_proj.weight,
            f"layers.{i}.attention_norm.weight": layer.input_layernorm.weight,
            f"layers.{i}.ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
    return {name: weight.detach() for name, weight in state.items()}


def hf_run(hf, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the thirteen sites of every layer, read by hooks; q and k where transformers rotates them."""
    from transformers.models.llama import modeling_llama

    sites, handles, rotated = {}, [], []

    def keep(module, name, of_input=False):
        def hook(_, args, output):
            found = args[0] if of_input else output
            sites[name] = found[0] if isinstance(found, tuple) else found
            if name.endswith("attention_out"):
                sites[name.replace("attention_out", "attention_pattern")] = found[1]

        handles.append(module.register_forward_hook(hook))

    def rotate_and_keep(q, k, *rope):
        q, k = rotate(q, k, *rope)
        halves = lambda x: x.transpose(1, 2).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # our order of pairs
        rotated.append((halves(q), halves(k)))
        return q, k

    for i, layer in enumerate(hf.model.layers):
        keep(layer.input_layernorm, f"layers.{i}.resid_pre", of_input=True)
        keep(layer.input_layernorm, f"layers.{i}.attention_norm")
        keep(layer.self_attn, f"layers.{i}.attention_out")
        keep(layer.post_attention_layernorm, f"layers.{i}.resid_mid", of_input=True)
        keep(layer.post_attention_layernorm, f"layers.{i}.ffn_norm")
        keep(layer.mlp, f"layers.{i}.mlp_out")
        keep(layer, f"layers.{i}.resid_post")
        keep(layer.self_attn.v_proj, f"layers.{i}.v")
        keep(layer.self_attn.o_proj, f"layers.{i}.head_out", of_input=True)
        keep(layer.mlp.down_proj, f"layers.{i}.mlp_hidden", of_input=True)
    rotate = modeling_llama.apply_rotary_pos_emb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_keep)
        logits = hf(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    for i, (q, k) in enumerate(rotated):
        sites |= {f"layers.{i}.q": q, f"layers.{i}.k": k}
        for name in ("v", "head_out"):
            sites[f"layers.{i}.{name}"] = sites[f"layers.{i}.{name}"].unflatten(-1, (-1, q.shape[-1]))
    return logits, sites


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-rope{case[1]:g}")
def pair(request, tmp_path_factory):
    """Our model with the weights of transformers' model, tokens, that model's results, and whether it is tied."""
    name, factor, tied = request.param
    shape = SHAPES[name]
    hf = hf_model(shape, factor, tied)
    folder = tmp_path_factory.mktemp("pair")
    params = {key: value for key, value in shape.items() if key != "hidden"}
    write_tiny_model(folder, vocab_size=VOCAB_SIZE, norm_eps=NORM_EPS, **params)
    torch.save(meta_state(hf, shape), folder / "consolidated.00.pth")
    model = load_model(str(folder), rope_scaling_factor=factor)
    tokens = torch.randint(VOCAB_SIZE, (2, 330), generator=torch.Generator().manual_seed(4))
    return model, tokens, *hf_run(hf, tokens), tied


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_logits_equal_transformers(pair):
    model, tokens, logits, _, _ = pair
    close(model(tokens), logits)
    close(model(tokens, last_only=True), logits[:, -1:])


def test_every_site_equals_transformers(pair):
    model, tokens, _, sites, _ = pair
    ours = model.activations(tokens, list(sites))
    assert list(ours) == list(sites) and len(sites) == (len(SITES) + len(INNER_SITES)) * model.args.n_layers
    for site, expected in sites.items():
        torch.testing.assert_close(ours[site], expected, atol=1e-4, rtol=0, msg=lambda text, s=site: f"{s}: {text}")


def test_cache_in_chunks_then_single_tokens_equals_transformers(pair):
    model, tokens, logits, _, _ = pair
    cache = model.new_cache(batch_size=2, max_len=330)
    ends = [150, 151, 327, 328, 329, 330]
    parts = [model(tokens[:, start:end], cache) for start, end in zip([0, *ends], ends, strict=False)]
    assert cache.length == cache.max_len == 330
    close(torch.cat(parts, dim=1), logits)
    with pytest.raises(ValueError, match="331 positions do not fit the cache of 330"):
        model(tokens[:, :1], cache)


def test_a_wrong_rope_factor_would_show(pair):
    """The comparisons above would catch it: their positions reach far enough for the scaling to matter."""
    model, tokens, logits, _, _ = pair
    other = Transformer(ModelArgs(**{**vars(model.args), "rope_scaling_factor": 4.0}))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (other(tokens) - logits).abs().max() > 1e-2


def test_output_is_tied_as_in_the_checkpoint(pair):
    model, *_, tied = pair
    assert (model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()) == tied
    assert (model.output.weight is model.tok_embeddings.weight) == tied  # else `.to` would make two of them


@pytest.mark.parametrize("head_dim", [14, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_rope_equals_transformers_to_position_131072(factor, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=3 * head_dim,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=131072,
        rope_parameters=hf_rope(factor),
    )
    rotary = LlamaRotaryEmbedding(config)
    args = ModelArgs(3 * head_dim, 1, 3, 3, 11, 5, rope_theta=500000.0, rope_scaling_factor=factor)
    freqs = rope_frequencies(args)
    assert freqs.dtype == torch.float32 and freqs.shape == (head_dim // 2,)
    torch.testing.assert_close(freqs, rotary.inv_freq, atol=0, rtol=0)  # one ulp is 0.01 rad at the last position
    positions = torch.tensor([[0, 1, 2, 8191, 8192, 8193, 65535, 131071, 131072]])
    cos, sin = rope_tables(freqs, positions)  # (1, 9, 1, head_dim / 2)
    expected_cos, expected_sin = rotary(torch.zeros(1), positions)  # (1, 9, head_dim), the half twice
    close(cos.squeeze(2), expected_cos[..., : head_dim // 2])
    close(sin.squeeze(2), expected_sin[..., : head_dim // 2])


def test_rope_frequencies_stay_float32_under_another_default_dtype():
    args = ModelArgs(128, 1, 2, 2, 11, 5, rope_scaling_factor=8.0)
    expected = rope_frequencies(args)
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.testing.assert_close(rope_frequencies(args), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- padding


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir))


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(BOS + 1, TINY_VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, longest), zeros at the left, and n_pad."""
    longest = max(map(len, rows))
    n_pad = torch.tensor([longest - len(row) for row in rows])
    return torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows]), n_pad


@pytest.mark.parametrize("ends", [[13], [5, 9, 10, 11, 12, 13], [1, 2, 13], [12, 13]], ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_left_padded_rows_equal_each_row_alone(model, ends, cached):
    rows = [random_tokens(n, seed=n) for n in (13, 4, 8, 1)]
    tokens, n_pad = left_padded(rows)
    if cached:
        cache = model.new_cache(len(rows), 13)
        parts = [model(tokens[:, a:b], cache, n_pad) for a, b in zip([0, *ends], ends, strict=False)]
        logits = torch.cat(parts, dim=1)
    else:
        logits = model(tokens, n_pad=n_pad)
    assert logits.isfinite().all()
    for row, padded in zip(rows, logits, strict=True):
        close(padded[13 - len(row) :], model(row[None])[0])


def test_right_padding_does_not_change_earlier_positions(model):
    tokens = random_tokens(2, 9)
    padded = torch.cat([tokens, random_tokens(2, 6, seed=1)], dim=1)
    close(model(padded)[:, :9], model(tokens))
    for site in ("layers.0.attention_out", "layers.2.resid_post"):
        close(model.activations(padded, site)[:, :9], model.activations(tokens, site))


# ---- activations


def modules_run_for(site: str) -> list[str]:
    """The modules with weights that the site needs, in the order in which they run."""
    own = {
        "attention_norm": ["attention_norm"],
        "attention_out": ["attention.wq", "attention.wk", "attention.wv", "attention.wo"],
        "ffn_norm": ["ffn_norm"],
        "mlp_out": ["feed_forward.w1", "feed_forward.w3", "feed_forward.w2"],
    }
    _, layer, last = site.split(".")
    before = [f"layers.{i}.{name}" for i in range(int(layer)) for s in SITES for name in own.get(s, [])]
    here = [f"layers.{layer}.{name}" for s in SITES[: SITES.index(last) + 1] for name in own.get(s, [])]
    return ["tok_embeddings", *before, *here]


@pytest.mark.parametrize("site", [f"layers.{i}.{site}" for i in range(3) for site in SITES])
def test_nothing_beyond_the_site_is_computed(model, site):
    ran = []
    leaves = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    handles = [m.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, m in leaves]
    try:
        single = model.activations(random_tokens(2, 5), site)
        alone, ran[:] = list(ran), []
        several = model.activations(random_tokens(2, 5), [site, "layers.0.resid_pre", site])
    finally:
        for handle in handles:
            handle.remove()
    assert alone == ran == modules_run_for(site)
    assert list(several) == list(dict.fromkeys([site, "layers.0.resid_pre"]))
    assert single.shape == (2, 5, model.args.dim)
    assert torch.equal(several[site], single)


def test_unknown_sites_are_refused_by_name(model):
    assert check_site("layers.2.mlp_out", 3) == 2
    for site in ("layers.3.mlp_out", "layers.0.mlp", "layers.-1.mlp_out", "layer.0.mlp_out", "norm", ""):
        for refuse in (
            lambda s: model.activations(random_tokens(1, 2), s),
            lambda s: model.intervene(s, id).__enter__(),
        ):
            with pytest.raises(ValueError, match=f"'{site}'"):
                refuse(site)


# ---- interventions


class Recorder:
    """A function for `intervene` that changes nothing and records what it saw."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.clone())
        return x


@settings(max_examples=40)
@given(layer=st.integers(0, 2), site=st.sampled_from(SITES), skip=st.booleans())
def test_intervention_replaces_what_follows(model, layer, site, skip):
    """Against a model whose hook is a plain Python loop over the site's values, position by position."""
    tokens = random_tokens(2, 6)
    tokens[:, 0] = tokens[1, 3] = BOS
    vector = torch.linspace(-2, 3, model.args.dim)
    name = f"layers.{layer}.{site}"
    clean = model.activations(tokens, name)
    with model.intervene(name, lambda x: 0.5 * x + vector, skip_tokens=(BOS,) if skip else ()):
        changed = model.activations(tokens, name)
        logits = model(tokens)
    for row in range(2):
        for position in range(6):
            keeps = skip and tokens[row, position] == BOS
            expected = clean[row, position] if keeps else 0.5 * clean[row, position] + vector
            close(changed[row, position], expected)
    with model.intervene(name, lambda x: changed):
        close(model(tokens), logits)
    assert (logits - model(tokens)).abs().max() > 1e-2


def test_interventions_nest_outer_first(model):
    tokens, site = random_tokens(1, 4), "layers.1.attention_norm"
    clean = model.activations(tokens, site)
    with model.intervene(site, lambda x: x + 1):
        with model.intervene(site, lambda x: x * 3):
            both = model.activations(tokens, site)
        outer = model.activations(tokens, site)
        with model.intervene("layers.0.resid_post", torch.zeros_like), model.intervene(site, torch.zeros_like):
            assert not model.activations(tokens, site).any()
    close(both, 3 * (clean + 1))
    close(outer, clean + 1)


@pytest.mark.parametrize("site", ["layers.0.resid_pre", "layers.1.attention_norm", "layers.2.mlp_out"])
def test_skip_tokens_hold_with_cache_and_left_padding(model, site):
    rows = [torch.cat([torch.tensor([BOS]), random_tokens(n, seed=n)]) for n in (11, 3, 6)]
    rows[0][9] = rows[2][4] = BOS  # again in the middle, where single tokens are decoded
    tokens, n_pad = left_padded(rows)
    ends = [5, 8, 9, 10, 11, 12]
    recorder, cache = Recorder(), model.new_cache(3, 12)
    with model.intervene(site, lambda x: x.flip(-1), skip_tokens=[BOS, 3]), model.intervene(site, recorder):
        parts = [model(tokens[:, a:b], cache, n_pad) for a, b in zip([0, *ends], ends, strict=False)]
    logits, seen = torch.cat(parts, dim=1), torch.cat(recorder.seen, dim=1)
    for i, row in enumerate(rows):
        by_hand = lambda x, row=row: torch.where((row == BOS)[None, :, None], x, x.flip(-1))
        recorder = Recorder()
        with model.intervene(site, by_hand), model.intervene(site, recorder):
            alone = model(row[None])[0]
        close(logits[i, n_pad[i] :], alone)
        close(seen[i, n_pad[i] :], recorder.seen[0][0])


def test_skip_tokens_hold_when_the_function_works_in_place(model):
    tokens, site = torch.tensor([[BOS, 30, 31]]), "layers.1.mlp_out"
    clean = model.activations(tokens, site)
    with model.intervene(site, lambda x: x.mul_(2), skip_tokens=(BOS,)):
        changed = model.activations(tokens, site)
    close(changed[:, 0], clean[:, 0])
    close(changed[:, 1:], 2 * clean[:, 1:])


def test_intervention_ends_with_its_block(model):
    tokens = random_tokens(1, 5)
    clean = model(tokens)
    with model.intervene("layers.1.resid_mid", torch.zeros_like):
        assert not torch.equal(model(tokens), clean)
    assert torch.equal(model(tokens), clean)


def test_intervention_ends_with_an_exception_inside_or_in_its_function(model):
    tokens = random_tokens(1, 5)
    clean = model(tokens)
    with pytest.raises(KeyError), model.intervene("layers.1.resid_mid", torch.zeros_like):
        raise KeyError
    assert torch.equal(model(tokens), clean)
    with pytest.raises(ZeroDivisionError), model.intervene("layers.1.resid_mid", lambda x: 1 / 0):
        model(tokens)
    assert torch.equal(model(tokens), clean)


def test_intervention_is_not_seen_from_another_thread(model):
    """Two threads inside their blocks at the same time, the main thread inside neither."""
    tokens, site = random_tokens(1, 5), "layers.1.resid_mid"
    clean = model.activations(tokens, site)
    barrier, found = threading.Barrier(3), {}

    def work(factor: float):
        with model.intervene(site, lambda x: factor * x):
            barrier.wait(timeout=20)
            found[factor] = model.activations(tokens, site)
            barrier.wait(timeout=20)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    barrier.wait(timeout=20)
    found[1.0] = model.activations(tokens, site)
    barrier.wait(timeout=20)
    for thread in threads:
        thread.join()
    for factor, acts in found.items():
        close(acts, factor * clean)


def test_intervention_is_not_seen_from_another_task(model):
    tokens, site = random_tokens(1, 5), "layers.1.resid_mid"
    clean = model.activations(tokens, site)

    async def task(factor: float) -> torch.Tensor:
        with model.intervene(site, lambda x: factor * x):
            await asyncio.sleep(0)  # the other task enters its block here
            return model.activations(tokens, site)

    async def both():
        return await asyncio.gather(task(2.0), task(3.0))

    for factor, acts in zip((2.0, 3.0), asyncio.run(both()), strict=True):
        close(acts, factor * clean)


def test_intervention_belongs_to_its_model(model, tiny_model_dir):
    tokens, other = random_tokens(1, 5), load_model(str(tiny_model_dir))
    clean = other(tokens)
    with model.intervene("layers.0.resid_pre", torch.zeros_like):
        assert torch.equal(other(tokens), clean)


# ---- params.json

RELEASED = {  # from the models' own params.json: factor, width of the feed-forward layer, then the file
    "3.2 1B": (32, 8192, dict(dim=2048, n_layers=16, n_heads=32, ffn_dim_multiplier=1.5, multiple_of=256)),
    "3.2 3B": (32, 8192, dict(dim=3072, n_layers=28, n_heads=24, ffn_dim_multiplier=1.0, multiple_of=256)),
    "3.1 8B": (8, 14336, dict(dim=4096, n_layers=32, n_heads=32, ffn_dim_multiplier=1.3, multiple_of=1024)),
    "3.1 70B": (8, 28672, dict(dim=8192, n_layers=80, n_heads=64, ffn_dim_multiplier=1.3, multiple_of=4096)),
    "3.1 405B": (8, 53248, dict(dim=16384, n_layers=126, n_heads=128, ffn_dim_multiplier=1.2, multiple_of=4096)),
    "unknown": (8, 1792, dict(dim=640, n_layers=9, n_heads=5, ffn_dim_multiplier=None, multiple_of=256)),
}


def params_folder(folder, **params) -> str:
    common = dict(n_kv_heads=8, vocab_size=128256, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True)
    (folder / "params.json").write_text(json.dumps(common | params))
    return str(folder)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_get_their_rope_factor_and_width(tmp_path, name):
    factor, width, params = RELEASED[name]
    folder = params_folder(tmp_path, **params)
    args = read_params(folder)
    assert args.rope_scaling_factor == factor and args.hidden_dim == width
    assert (args.rope_low_freq_factor, args.rope_high_freq_factor, args.rope_original_context) == (1, 4, 8192)
    assert read_params(folder, rope_scaling_factor=1.0).rope_scaling_factor == 1
    assert read_params(params_folder(tmp_path, **params, use_scaled_rope=False)).rope_scaling_factor == 1


def test_an_explicit_rope_factor_wins(tmp_path):
    folder = params_folder(tmp_path, **RELEASED["3.2 1B"][2], rope_scaling_factor=16)
    assert read_params(folder).rope_scaling_factor == 16
    assert read_params(folder, rope_scaling_factor=8.0).rope_scaling_factor == 8


def test_llama_3_0_params_have_no_scaling(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(dict(dim=64, n_layers=2, n_heads=4, vocab_size=9)))
    args = read_params(str(tmp_path))
    assert (args.rope_scaling_factor, args.n_kv_heads, args.rope_theta) == (1.0, 4, 500000.0)
    assert args.hidden_dim == hidden_dim(64, 256, None) == 256


# ---- loading


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_the_asked_dtype_and_keeps_ties(tmp_path, dtype, tied, stored):
    folder = write_tiny_model(tmp_path, tied=tied, dtype=stored)
    model = load_model(folder, dtype=dtype)
    saved = torch.load(folder / "consolidated.00.pth")
    assert (model.tok_embeddings.weight.data_ptr() == model.output.weight.data_ptr()) == tied
    assert not model.training
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert weight.dtype == dtype and not weight.requires_grad
        assert torch.equal(weight, saved.pop(name).to(dtype))
    assert not saved
    tokens = random_tokens(1, 4)
    assert model(tokens).dtype == torch.float32
    assert model.activations(tokens, "layers.0.mlp_out").dtype == dtype
    assert model.new_cache(1, 2).layers[0].keys.dtype == dtype


def test_an_older_checkpoint_with_rope_table_loads_and_needs_no_tokenizer(tmp_path):
    folder = write_tiny_model(tmp_path)
    change_state(folder, lambda state: state.update({"rope.freqs": torch.zeros(3)}))
    (folder / "tokenizer.model").unlink()
    load_model(str(folder))


def test_the_tokenizer_of_a_folder(tiny_model_dir):
    assert load_tokenizer(str(tiny_model_dir)).vocab_size == TINY_PARAMS["vocab_size"] == TINY_VOCAB_SIZE


def change_state(folder, change) -> None:
    path = folder / "consolidated.00.pth"
    state = torch.load(path)
    change(state)
    torch.save(state, path)


def truncate(folder) -> None:
    path = folder / "consolidated.00.pth"
    os.truncate(path, path.stat().st_size // 2)


WK = "layers.1.attention.wk.weight"
BREAKAGES = {
    "missing weights": (lambda f: (f / "consolidated.00.pth").unlink(), ["no consolidated.00.pth in"]),
    "missing parameters": (lambda f: (f / "params.json").unlink(), ["no params.json beside", "consolidated.00.pth"]),
    "broken parameters": (lambda f: (f / "params.json").write_text('{"dim": 36'), ["params.json"]),
    "parameters without dim": (lambda f: (f / "params.json").write_text("{}"), ["params.json", "dim"]),
    "missing tensor": (
        lambda f: change_state(f, lambda s: s.pop(WK)),
        ["consolidated.00.pth", f"lacks the tensor {WK}"],
    ),
    "surplus tensor": (
        lambda f: change_state(f, lambda s: s.update(extra=torch.ones(2))),
        ["consolidated.00.pth", "holds extra"],
    ),
    "misshapen tensor": (
        lambda f: change_state(f, lambda s: s.update({WK: s[WK].T})),
        ["consolidated.00.pth", WK, "(36, 12)", "(12, 36)"],
    ),
    "truncated": (truncate, ["consolidated.00.pth is truncated or not a checkpoint"]),
    "empty": (lambda f: os.truncate(f / "consolidated.00.pth", 0), ["consolidated.00.pth is truncated"]),
    "not a dict": (lambda f: torch.save([torch.ones(2)], f / "consolidated.00.pth"), ["consolidated.00.pth"]),
    "parameters in a list": (lambda f: (f / "params.json").write_text("[1, 2]"), ["params.json"]),
    "text": (lambda f: (f / "consolidated.00.pth").write_text("version https://git-lfs\n"), ["consolidated.00.pth"]),
}


@pytest.mark.parametrize(
    "breakage",
    BREAKAGES,
)
def test_a_broken_checkpoint_is_refused_in_a_sentence_naming_the_file(tmp_path, breakage):
    damage, names = BREAKAGES[breakage]
    damage(write_tiny_model(tmp_path))
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    for name in names:
        assert name in message


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"no model at {tmp_path}/nowhere"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=f"no tokenizer at {tmp_path}/nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    folder = write_tiny_model(tmp_path / "model")
    torch.save({"tok_embeddings.weight": Bomb()}, folder / "consolidated.00.pth")
    with pytest.raises(InputError, match="consolidated.00.pth"):
        load_model(str(folder))
    assert not (tmp_path / "boom").exists()

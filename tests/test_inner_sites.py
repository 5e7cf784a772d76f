"""Sites inside attention and the feed-forward layer, and interventions on some heads and positions only.

That the sites hold the right values, tests/test_llama.py compares with transformers. Here: what replacing them does,
against the same layers written out by hand; heads and positions with a cache and padding; gradients against finite
differences; that nothing changes where nothing is asked for.

    .venv/bin/python -m pytest tests/test_inner_sites.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VOCAB_SIZE

from llama_3 import load_model
from llama_3.model import INNER_SITES, SITES, rope_frequencies, rope_tables, rotate

ALL_SITES = [*SITES, *INNER_SITES]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir))


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY_VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def by_hand(model, tokens, change=lambda layer, name, x: x):
    """Logits of one sequence from loops over layers, heads, queries; change(layer, site, x) may replace a value."""
    args, x = model.args, model.tok_embeddings(tokens)
    n = len(tokens)
    rope = rope_tables(rope_frequencies(args), torch.arange(n))
    for i, layer in enumerate(model.layers):
        at = lambda name, value, i=i: change(i, name, value)
        h = layer.attention_norm(x)
        heads = lambda weight, h=h: F.linear(h, weight).view(n, -1, args.head_dim)
        q = at("q", rotate(heads(layer.attention.wq.weight)[None], rope)[0])
        k = at("k", rotate(heads(layer.attention.wk.weight)[None], rope)[0])
        v = at("v", heads(layer.attention.wv.weight))
        pattern = torch.zeros(args.n_heads, n, n)
        for head in range(args.n_heads):
            for query in range(n):
                kv = head // (args.n_heads // args.n_kv_heads)
                scores = k[: query + 1, kv] @ q[query, head] / math.sqrt(args.head_dim)
                pattern[head, query, : query + 1] = scores.softmax(0)
        pattern = at("attention_pattern", pattern)
        out = torch.stack(
            [pattern[head] @ v[:, head // (args.n_heads // args.n_kv_heads)] for head in range(args.n_heads)], 1
        )
        x = x + layer.attention.wo(at("head_out", out).flatten(1))
        h, mlp = layer.ffn_norm(x), layer.feed_forward
        x = x + mlp.w2(at("mlp_hidden", F.silu(mlp.w1(h)) * mlp.w3(h)))
    return model.output(model.norm(x))


@pytest.mark.parametrize("site", INNER_SITES)
def test_replacing_equals_the_layer_by_hand(model, site):
    tokens = random_tokens(7)
    fn = lambda x: 0.3 * x + 0.2 * x.flip(-1)
    with torch.no_grad():
        expected = by_hand(model, tokens, lambda i, name, x: fn(x) if (i, name) == (1, site) else x)
        with model.intervene(f"layers.1.{site}", fn):
            changed = model(tokens[None])[0]
        close(changed, expected)
        assert (changed - model(tokens[None])[0]).abs().max() > 1e-2


@pytest.mark.parametrize("site", ["q", "v", "attention_pattern", "head_out"])
def test_only_the_chosen_heads_and_positions_change(model, site):
    tokens, heads, positions = random_tokens(7), [1], [2, 5]

    def change(layer, name, x):
        if (layer, name) != (1, site):
            return x
        x = x.clone()
        for position in positions:
            index = (1, position) if site == "attention_pattern" else (position, 1)
            x[index] = 0.5 * x[index].flip(-1)
        return x

    with torch.no_grad():
        expected = by_hand(model, tokens, change)
    with model.intervene(f"layers.1.{site}", lambda x: 0.5 * x.flip(-1), positions=positions, heads=heads):
        close(model(tokens[None])[0], expected)


@pytest.mark.parametrize("site", [each for each in ALL_SITES if each != "attention_pattern"])
def test_positions_hold_with_cache_and_left_padding(model, site):
    rows, name = [random_tokens(n, seed=n) for n in (12, 4, 7)], f"layers.1.{site}"
    n_pad = torch.tensor([12 - len(row) for row in rows])
    tokens = torch.stack([F.pad(row, (12 - len(row), 0)) for row in rows])
    options = dict(positions=[0, 3, 6, 11]) | (dict(heads=[1]) if site in ("q", "k", "v", "head_out") else {})
    fn = lambda x: x.flip(-1)
    with model.intervene(name, fn, **options):
        cache = model.new_cache(3, 12)
        ends = [5, 8, 9, 10, 11, 12]
        parts = [model(tokens[:, a:b], cache, n_pad) for a, b in zip([0, *ends], ends, strict=False)]
        logits = torch.cat(parts, 1)
        for row, padded in zip(rows, logits, strict=True):
            close(padded[12 - len(row) :], model(row[None])[0])
    assert (logits[0] - model(rows[0][None])[0]).abs().max() > 1e-2


def test_the_pattern_with_cache_and_left_padding(model):
    """A pattern that each query spreads evenly over the keys it sees."""
    rows = [random_tokens(n, seed=n) for n in (9, 4)]
    n_pad = torch.tensor([0, 5])
    tokens = torch.stack([rows[0], F.pad(rows[1], (5, 0))])
    even = lambda pattern: F.normalize((pattern > 0).float(), p=1, dim=-1)
    with model.intervene("layers.1.attention_pattern", even, heads=[0, 4]):
        cache = model.new_cache(2, 9)
        logits = torch.cat([model(tokens[:, a:b], cache, n_pad) for a, b in [(0, 4), (4, 8), (8, 9)]], 1)
        for row, padded in zip(rows, logits, strict=True):
            close(padded[9 - len(row) :], model(row[None])[0])
    assert (logits[0] - model(tokens[:1])[0]).abs().max() > 1e-2


@pytest.mark.parametrize("site", ALL_SITES)
def test_gradients_equal_finite_differences(model, site):
    tokens, name = random_tokens(2, 6), f"layers.1.{site}"
    value = model.activations(tokens, name)
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))

    def loss(shift: torch.Tensor) -> torch.Tensor:
        with model.intervene(name, lambda x: x + shift * direction):
            return model(tokens)[:, -1, 5].sum()

    shift = torch.zeros((), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(shift), shift)
    with torch.no_grad():
        step = torch.tensor(1e-2)
        expected = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-2)
    assert gradient.abs() > 1e-2


def test_nothing_is_recorded_and_no_pattern_computed_where_nothing_asks(model, monkeypatch):
    tokens, computed = random_tokens(1, 5), []
    explicit = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *args: computed.append(1) or explicit(*args))
    assert not model(tokens).requires_grad and not computed
    pattern = model.activations(tokens, "layers.2.attention_pattern")
    assert len(computed) == 1
    close(pattern.sum(-1), torch.ones(1, model.args.n_heads, 5))
    with model.intervene("layers.0.attention_pattern", lambda x: x):
        close(model(tokens), model(tokens))


def test_what_does_not_exist_is_refused_in_a_sentence(model):
    for part, words in {
        ("layers.0.head_out", (), (6,)): "layers.0.head_out has no head 6; its heads are 0 to 5.",
        ("layers.0.k", (), (2,)): "layers.0.k has no head 2; its heads are 0 to 1.",
        ("layers.0.mlp_out", (), (0,)): "layers.0.mlp_out has no heads",
        ("layers.0.mlp_out", (-1,), None): "There is no position -1; positions are counted from 0.",
        ("layers.0.heads", (), None): "'layers.0.heads' is not a site",
    }.items():
        site, positions, heads = part
        with pytest.raises(ValueError, match=words):
            model.intervene(site, lambda x: x, positions=positions, heads=heads).__enter__()

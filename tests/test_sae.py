"""The SAE against slow, obvious references: the spec's formulas in float64, and the losses dense, through autograd.

Also: the interface that other programs call, what training guarantees about the decoder, the files, and refusals.

    .venv/bin/python -m pytest tests/test_sae.py
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT_DIR
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.sae_runs import random_sae

import sae as sae_module
from autoencoder.losses import Dead, loss_sums
from pipeline.errors import InputError
from pipeline.sae_files import SaeFiles
from sae import SparseAutoencoder, load_sae_model, save_sae, top_k

D, N, K = 6, 20, 3
KEYS = {"b_pre": (D,), "encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N)}


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    """Raw activations, each position with its own mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=generator)
    return rand(*shape) * (0.2 + rand(*shape[:-1], 1).abs()) + 3 * rand(*shape[:-1], 1)


def reference_forward(state: dict, x: torch.Tensor, k: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Spec, section 2, one position at a time in float64: reconstructions (..., d_model), h (..., n_latents)."""
    w = {name: tensor.detach().double().numpy() for name, tensor in state.items()}
    rows = x.double().numpy().reshape(-1, x.shape[-1])
    out, hs = [], []
    for row in rows:
        mean, std = row.mean(), row.std(ddof=1)
        z = (row - mean) / (std + eps)
        pre = w["encoder.weight"] @ (z - w["b_pre"]) + w["encoder.bias"]
        h = np.zeros_like(pre)
        kept = np.argsort(-pre)[:k]
        h[kept] = np.maximum(pre[kept], 0)
        out.append((w["decoder.weight"] @ h + w["b_pre"]) * std + mean)
        hs.append(h)
    return np.reshape(out, x.shape), np.reshape(hs, (*x.shape[:-1], len(state["encoder.bias"])))


# ---- the training losses


def reference_losses(sae: SparseAutoencoder, z, dead: list[int], k_aux: int):
    """Dense, in float64, through autograd. Returns main, aux, the parameters they depend on, how often
    each latent fired, and how close a choice was.

    The auxiliary pre-activations take b_pre as given: b_pre's gradient comes from the main loss alone.
    """
    p = {name: tensor.detach().double().requires_grad_() for name, tensor in sae.named_parameters()}
    z = z.double()
    pre = (z - p["b_pre"]) @ p["encoder.weight"].t() + p["encoder.bias"]
    top = pre.topk(sae.k, dim=1)
    h = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    z_hat = h @ p["decoder.weight"].t() + p["b_pre"]
    main = (z_hat - z).square().sum()

    aux, masked = torch.zeros((), dtype=torch.float64), pre[:, :0]
    n_kept_aux = min(k_aux, len(dead))
    if dead:
        residual = (z - z_hat).detach()
        is_dead = torch.zeros(sae.n_latents, dtype=torch.bool)
        is_dead[dead] = True
        all_pre = (z - p["b_pre"].detach()) @ p["encoder.weight"].t() + p["encoder.bias"]
        masked = all_pre.masked_fill(~is_dead, -torch.inf)
        best = masked.topk(n_kept_aux, dim=1)
        residual_hat = torch.zeros_like(masked).scatter(1, best.indices, best.values) @ p["decoder.weight"].t()
        aux = (residual_hat - residual).square().sum()

    closest = pre.detach().abs().min().item()  # to ReLU's corner, or between the last kept and the first left out
    for values, k in ((pre, sae.k), (masked, n_kept_aux)):
        ranked = values.detach().sort(dim=1, descending=True).values
        if 0 < k < ranked.shape[1]:
            closest = min(closest, (ranked[:, k - 1] - ranked[:, k]).min().item())
    return main, aux, p, (h > 0).sum(0), closest


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance`, relative to the largest entry if that is above 1."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1.0))


def dead_of(latents: list[int], n_latents: int, k_aux: int) -> Dead | None:
    is_dead = torch.zeros(n_latents, dtype=torch.bool)
    is_dead[latents] = True
    return Dead.where(is_dead, [len(latents)], k_aux)


def check_losses(d_model: int, n_latents: int, k: int, batch: int, dead: list[int], k_aux: int, seed: int, coeff=0.4):
    sae = random_sae(d_model, n_latents, k, seed=seed)
    z = torch.randn(batch, d_model, generator=torch.Generator().manual_seed(seed + 1))
    main, aux, p, fired, closest = reference_losses(sae, z, dead, k_aux)
    if closest < 1e-5:  # float32 may choose other latents; one draw in thousands
        return sae, None
    (main + coeff * aux).backward()

    sums = loss_sums(sae, z, dead_of(dead, n_latents, k_aux))
    (sums.main + coeff * sums.aux).backward()
    assert_close(sums.main.detach(), main.detach())
    assert_close(sums.aux.detach(), aux.detach())
    assert sums.fired.shape == (n_latents,) and not sums.fired.requires_grad
    assert torch.equal(sums.fired, fired)
    for name, parameter in sae.named_parameters():
        assert parameter.grad.shape == parameter.shape, name
        assert_close(parameter.grad, p[name].grad)
    return sae, sums


@st.composite
def shapes(draw):
    n_latents = draw(st.integers(1, 23))
    return {
        "d_model": draw(st.integers(2, 9)),
        "n_latents": n_latents,
        "k": draw(st.integers(1, n_latents)),
        "batch": draw(st.integers(1, 11)),
        "dead": draw(st.lists(st.integers(0, n_latents - 1), unique=True).map(sorted)),
        "k_aux": draw(st.integers(1, 26)),
        "seed": draw(st.integers(0, 10_000)),
    }


@given(shapes())
@example({"d_model": 5, "n_latents": 13, "k": 13, "batch": 7, "dead": [], "k_aux": 4, "seed": 0})
@example({"d_model": 5, "n_latents": 13, "k": 13, "batch": 1, "dead": list(range(13)), "k_aux": 13, "seed": 1})
@example({"d_model": 9, "n_latents": 17, "k": 2, "batch": 1, "dead": [3], "k_aux": 8, "seed": 2})
@settings(max_examples=100)
def test_losses_and_gradients_equal_a_dense_reference(shape):
    check_losses(**shape)


def test_kept_pre_activations_below_zero_give_nothing():
    """n_latents == k keeps everything: negative values add nothing and get no gradient."""
    sae, sums = check_losses(d_model=5, n_latents=13, k=13, batch=3, dead=[], k_aux=4, seed=0)
    assert 0 < sums.fired.sum() < 3 * 13
    with torch.no_grad():
        sae.encoder.bias.fill_(-1000.0)
    sae.zero_grad()
    z = torch.randn(4, 5)
    sums = loss_sums(sae, z)
    sums.main.backward()
    torch.testing.assert_close(sums.main, (z - sae.b_pre).square().sum())
    assert not sums.fired.any()
    assert not sae.encoder.weight.grad.any() and not sae.decoder.weight.grad.any()


def test_auxiliary_gradient_reaches_dead_latents_whatever_their_sign():
    sae = random_sae(5, 13, 2)
    dead = [1, 4, 12]
    with torch.no_grad():
        sae.encoder.bias[dead] = -1000.0  # never kept by the main TopK
    sums = loss_sums(sae, torch.randn(7, 5), dead_of(dead, 13, k_aux=64))
    assert not sums.fired[dead].any()
    sums.aux.backward()
    for grad in (sae.encoder.weight.grad, sae.encoder.bias.grad[:, None], sae.decoder.weight.grad.t()):
        alive = torch.ones(13, dtype=torch.bool)
        alive[dead] = False
        assert (grad[dead].abs().sum(1) > 0).all()
        assert not grad[alive].any()
    assert sae.b_pre.grad is None or not sae.b_pre.grad.any()


@pytest.mark.parametrize(("dead", "k_aux"), [([], 4), ([1, 4, 12], 0)])
def test_no_dead_latents_or_none_to_keep_no_auxiliary_loss(dead, k_aux):
    sae = random_sae(5, 13, 2)
    assert dead_of(dead, 13, k_aux) is None
    sums = loss_sums(sae, torch.randn(7, 5), None)
    assert sums.aux.item() == 0
    (sums.main + sums.aux).backward()
    assert sae.encoder.weight.grad.isfinite().all()


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 1000))
@settings(max_examples=20)
def test_losses_of_parts_add_up(parts, seed):
    """Several processes rely on it: sums and gradients of parts of a batch add up to the whole's."""
    z = torch.randn(sum(parts), 5, generator=torch.Generator().manual_seed(seed))
    whole, split = random_sae(5, 13, 2, seed=seed), random_sae(5, 13, 2, seed=seed)
    dead = dead_of([2, 7], 13, k_aux=3)
    sums = loss_sums(whole, z, dead)
    (sums.main + sums.aux).backward()
    total = 0.0
    for part in z.split(parts):
        sums_of_part = loss_sums(split, part, dead)
        (sums_of_part.main + sums_of_part.aux).backward()
        total += (sums_of_part.main + sums_of_part.aux).item()
    assert total == pytest.approx((sums.main + sums.aux).item(), rel=1e-5)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert_close(b.grad, a.grad)


@given(shapes())
@settings(max_examples=30)
def test_blocks_change_nothing(shape):
    """Blocks of three rows: a sum too large for memory at once stays the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_module, "_LEAST_ROWS", 3)
        patch.setattr(sae_module, "_BLOCK_BYTES", {"cpu": 1})
        check_losses(**shape)


@given(
    n_latents=st.sampled_from([32, 64, 160, 163, 1024]),
    k=st.integers(1, 40),
    batch=st.integers(0, 5),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_top_k_in_two_rounds(n_latents, k, batch, ties, seed):
    k = min(k, n_latents)
    x = torch.randn(batch, n_latents, generator=torch.Generator().manual_seed(seed))
    x = x.round() if ties else x
    values, indices = top_k(x, k)
    assert torch.equal(values.sort(dim=1, descending=True).values, x.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_encoder_in_bfloat16():
    """bfloat16 chooses; the values of the chosen, and so the loss and every gradient, are float32's."""
    sae = random_sae(16, 200, 5)
    z = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    rough = torch.addmm(sae.encoder.bias.bfloat16(), (z - sae.b_pre).bfloat16(), sae.encoder.weight.bfloat16().t())
    chosen = rough.topk(5).indices
    pre_acts = (z - sae.b_pre) @ sae.encoder.weight.t() + sae.encoder.bias
    assert not torch.equal(chosen.sort().values, pre_acts.topk(5).indices.sort().values)  # the dtype matters here
    values = pre_acts.gather(1, chosen).relu()
    h = torch.zeros_like(pre_acts).scatter(1, chosen, values)
    expected = (h @ sae.decoder.weight.t() + sae.b_pre - z).square().sum()
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    sums = loss_sums(sae, z, encoder_dtype=torch.bfloat16)
    sums.main.backward()
    assert_close(sums.main.detach(), expected.detach())
    assert torch.equal(sums.fired, (h > 0).sum(0))
    for name, parameter in sae.named_parameters():
        assert_close(parameter.grad, gradients[name])


_SLICES = """
import torch, torch.distributed as dist
from conftest import PROJECT_DIR
from support.sae_runs import random_sae
from autoencoder.losses import Dead, loss_sums
from pipeline.distributed import World


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    slices = World(rank, size, torch.device("cpu"))
    cases = [(3, [], 4), (14, [2], 4), (3, [1, 2, 12, 13], 3), (2, [0, 1, 5], 9), (1, list(range(14)), 5)]
    for seed, (k, dead, k_aux) in enumerate(cases):
        whole = random_sae(6, 14, k, seed=seed)
        z = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))
        is_dead = torch.zeros(14, dtype=torch.bool)
        is_dead[dead] = True
        expected = loss_sums(whole, z, Dead.where(is_dead, [len(dead)], k_aux))
        (expected.main + 0.4 * expected.aux).backward()
        n, part = 14 // size, whole.slice(rank, size)
        assert (part.n_latents, part.k) == (n, k)
        own = slice(rank * n, (rank + 1) * n)
        n_dead = [sum(r * n <= i < (r + 1) * n for i in dead) for r in range(size)]
        dead_here = Dead.where(is_dead[own], n_dead, k_aux, rank)
        for encoder_dtype in (torch.float32, torch.bfloat16):
            part.zero_grad()
            sums = loss_sums(part, z, dead_here, slices, encoder_dtype)
            (sums.main + 0.4 * sums.aux).backward()
            if encoder_dtype == torch.bfloat16:
                continue  # runs; its choice may differ
            pairs = [
                (sums.main, expected.main), (sums.aux, expected.aux), (sums.fired, expected.fired[own]),
                (part.b_pre.grad, whole.b_pre.grad), (part.encoder.bias.grad, whole.encoder.bias.grad[own]),
                (part.encoder.weight.grad, whole.encoder.weight.grad[own]),
                (part.decoder.weight.grad, whole.decoder.weight.grad[:, own]),
            ]
            for i, (got, wanted) in enumerate(pairs):
                say = lambda m: f"case {seed}, pair {i}: {m}"
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4, msg=say)
    print("equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()  # so that no group outlives it: gloo aborts in one that dies with the interpreter
"""


@pytest.mark.slow
def test_slices_of_an_sae_in_two_processes(tmp_path):
    """Losses and gradients of two slices are those of the whole, dead latents in one slice, in both and in none."""
    script = tmp_path / "slices.py"
    script.write_text(_SLICES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    paths = os.pathsep.join([str(PROJECT_DIR), str(PROJECT_DIR / "tests")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2


# ---- the interface


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.3])
@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 5, D)])
def test_forward_equals_the_formula(shape, eps):
    sae = random_sae(D, N, K, eps)
    x = inputs(*shape)
    expected, _ = reference_forward(sae.state_dict(), x, K, eps)
    got = sae(x)
    assert got.shape == x.shape and got.dtype == x.dtype
    np.testing.assert_allclose(got.detach().double().numpy(), expected, atol=2e-5)


def test_forward_keeps_bfloat16_outside_and_float32_inside():
    sae = random_sae(D, N, K)
    x = inputs(4, 5, D).bfloat16()
    got = sae(x)
    assert got.shape == x.shape and got.dtype == torch.bfloat16
    assert torch.equal(got, sae(x.float()).bfloat16())
    for a, b in zip(sae.encode(x), sae.encode(x.float()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:std\\(\\)")
def test_no_positions_at_all():
    sae = random_sae(D, N, K)
    assert sae(torch.zeros(0, D)).shape == (0, D)
    assert [tuple(part.shape) for part in sae.encode(torch.zeros(2, 0, D))] == [(2, 0, K)] * 2


def test_normalize_and_back():
    sae = random_sae(D, N, K, eps=0.1)
    x = inputs(4, 5, D)
    z, mean, std = sae.normalize(x)
    rows = x.double().numpy()
    centre, spread = rows.mean(-1, keepdims=True), rows.std(-1, ddof=1, keepdims=True)
    assert mean.shape == std.shape == (4, 5, 1)
    np.testing.assert_allclose(z.numpy(), (rows - centre) / (spread + 0.1), atol=1e-5)
    torch.testing.assert_close(z * (std + 0.1) + mean, x)


def test_encode_gives_the_largest_sorted_without_negatives():
    sae = random_sae(D, N, K)
    with torch.no_grad():
        sae.encoder.bias.sub_(4.0)  # so that some kept values are cut at zero
    x = inputs(40, D)
    values, indices = sae.encode(x)
    _, h = reference_forward(sae.state_dict(), x, K, sae.normalize_eps)
    assert values.shape == indices.shape == (40, K) and indices.dtype == torch.int64
    assert (values >= 0).all() and (values == 0).any() and (values > 0).any()
    assert (values.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == K for row in indices.tolist())
    dense = torch.zeros(40, N).scatter(1, indices, values.detach())
    np.testing.assert_allclose(dense.numpy(), h, atol=1e-5)


@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 5, D)])
def test_decode_of_encode_mapped_back_is_forward(shape):
    sae = random_sae(D, N, K)
    x = inputs(*shape)
    values, indices = sae.encode(x)
    assert values.shape == indices.shape == (*shape[:-1], K)
    z_hat = sae.decode(values, indices)
    _, mean, std = sae.normalize(x)
    torch.testing.assert_close(z_hat * std + mean, sae(x))


def test_decode_takes_any_number_of_latents():
    """Steering decodes chosen latents, not always k."""
    sae = random_sae(D, N, K)
    values, indices = torch.tensor([[2.0, -1.0]]), torch.tensor([[4, 17]])
    expected = 2 * sae.decoder.weight[:, 4] - sae.decoder.weight[:, 17] + sae.b_pre
    torch.testing.assert_close(sae.decode(values, indices)[0], expected)


def test_steering_raises_the_chosen_latent_and_zero_changes_nothing():
    sae = random_sae(D, N, K)
    x = inputs(3, 5, D)
    values, indices = sae.encode(x)
    for a, b in zip(sae.encode(x, torch.zeros(N)), (values, indices), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(sae(x, torch.zeros(N)), sae(x))

    h_bias = torch.zeros(N)
    h_bias[11] = 50.0
    z, _, _ = sae.normalize(x)
    pre_acts = (z - sae.b_pre) @ sae.encoder.weight.T + sae.encoder.bias
    steered, where = sae.encode(x, h_bias)
    assert (where[..., 0] == 11).all()
    torch.testing.assert_close(steered[..., 0], pre_acts[..., 11] + 50)
    rest = pre_acts.clone()
    rest[..., 11] = -torch.inf
    torch.testing.assert_close(steered[..., 1:], rest.topk(K - 1).values.relu())  # the others as they were
    assert not torch.allclose(sae(x, h_bias), sae(x))

    h_bias[11] = -50.0
    assert (sae.encode(x, h_bias)[1] != 11).all()


# ---- what training guarantees


def test_decoder_columns_have_unit_norm_after_normalizing():
    sae = random_sae(D, N, K)
    before = sae.decoder.weight.detach().clone()
    sae.normalize_decoder()
    torch.testing.assert_close(sae.decoder.weight.norm(dim=0), torch.ones(N))
    torch.testing.assert_close(F.cosine_similarity(sae.decoder.weight, before, dim=0), torch.ones(N))


def test_normalizing_a_zero_column_gives_no_nan():
    sae = random_sae(D, N, K)
    with torch.no_grad():
        sae.decoder.weight[:, 7] = 0
    sae.normalize_decoder()
    assert torch.isfinite(sae.decoder.weight).all()


def test_projected_gradient_has_no_part_along_its_direction():
    sae = random_sae(D, N, K)
    sae.normalize_decoder()
    weight = sae.decoder.weight.detach()
    along, rest = torch.randn(N), torch.randn(D, N)
    rest -= weight * (weight * rest).sum(0)
    sae.decoder.weight.grad = weight * along + rest
    sae.project_decoder_grad()
    torch.testing.assert_close((weight * sae.decoder.weight.grad).sum(0), torch.zeros(N), rtol=0, atol=1e-6)
    torch.testing.assert_close(sae.decoder.weight.grad, rest)


def test_initialize():
    sae, again, other = (SparseAutoencoder(D, N, K) for _ in range(3))
    b_pre = torch.randn(D)
    sae.initialize(b_pre, torch.Generator().manual_seed(3))
    again.initialize(b_pre, torch.Generator().manual_seed(3))
    other.initialize(b_pre, torch.Generator().manual_seed(4))
    assert torch.equal(sae.encoder.weight, sae.decoder.weight.t())
    torch.testing.assert_close(sae.decoder.weight.norm(dim=0), torch.ones(N))
    assert not sae.encoder.bias.any()
    assert torch.equal(sae.b_pre, b_pre)
    assert torch.equal(sae.decoder.weight, again.decoder.weight)
    assert not torch.equal(sae.decoder.weight, other.decoder.weight)
    assert sae.encoder.weight.data_ptr() != sae.decoder.weight.data_ptr()  # tied at the start only


def test_orthogonal_start():
    sae = SparseAutoencoder(D, N, K)  # 20 latents: three bases of 6 and two more directions
    sae.initialize(torch.zeros(D), torch.Generator().manual_seed(3), orthogonal=True)
    directions = sae.decoder.weight.t()
    for basis in directions.split(D):
        torch.testing.assert_close(basis @ basis.t(), torch.eye(len(basis)), rtol=0, atol=1e-5)
    assert not torch.allclose(directions[:D], directions[D : 2 * D])
    assert torch.equal(sae.encoder.weight, directions)


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    sae = random_sae(D, N, K, eps=1e-4)
    path = tmp_path / "layer1.v2.pth"
    save_sae(sae, path, {"site": "layers.1.attention_norm", "quality": {"val_fvu": 0.25}}, dtype)

    state = torch.load(path, weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == KEYS
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in state.values())

    loaded = load_sae_model(path)
    assert (loaded.d_model, loaded.n_latents, loaded.k, loaded.normalize_eps) == (D, N, K, 1e-4)
    assert loaded.info["site"] == "layers.1.attention_norm" and loaded.info["quality"] == {"val_fvu": 0.25}
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    for name, tensor in sae.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float()), name
    x = inputs(9, D)
    if dtype == torch.float32:
        assert torch.equal(loaded(x), sae(x))
    else:
        expected, _ = reference_forward(state, x, K, 1e-4)
        np.testing.assert_allclose(loaded(x).numpy(), expected, atol=2e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer1.v2.json", "layer1.v2.pth"]
    assert SaeFiles(path).json == str(SaeFiles(path).beside("json")) == str(tmp_path / "layer1.v2.json")


def test_weights_kept_in_bfloat16_reconstruct(tmp_path):
    save_sae(random_sae(D, N, K), tmp_path / "sae.pth", {})
    x = inputs(9, D)
    expected = load_sae_model(tmp_path / "sae.pth")(x)
    got = load_sae_model(tmp_path / "sae.pth", dtype=torch.bfloat16)(x)
    assert got.dtype == x.dtype and F.cosine_similarity(got, expected).mean() > 0.9


@pytest.fixture
def published(tmp_path):
    """A plain torch.save of a state dict, without a JSON, as the original author published his."""
    state = {name: tensor.contiguous() for name, tensor in random_sae(D, N, K).state_dict().items()}
    torch.save(state, tmp_path / "published.pth")
    return tmp_path / "published.pth"


def test_published_file_gives_the_formula(published):
    sae = load_sae_model(published, k=K, normalize_eps=1e-6)
    x = inputs(2, 5, D) * 1e-4  # so small that eps shows
    expected, _ = reference_forward(torch.load(published), x, K, 1e-6)
    np.testing.assert_allclose(sae(x).double().numpy(), expected, atol=1e-8)
    other = load_sae_model(str(published), k=K, normalize_eps=1e-5)
    assert not np.allclose(other(x).double().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("keywords", [{}, {"k": K}, {"normalize_eps": 1e-6}])
def test_published_file_needs_k_and_eps(published, keywords):
    missing = "normalize_eps" if "k" in keywords else "k"
    with pytest.raises(InputError, match=f"published.pth.* give {missing} "):
        load_sae_model(published, **keywords)


def test_keyword_that_contradicts_the_json(tmp_path):
    save_sae(random_sae(D, N, K), tmp_path / "sae.pth", {"site": "layers.1.attention_norm"})
    for name, wrong in (("k", 4), ("normalize_eps", 1e-6), ("site", "layers.2.attention_norm")):
        with pytest.raises(InputError, match=rf"sae\.json says {name} = "):
            load_sae_model(tmp_path / "sae.pth", **{name: wrong})
    assert load_sae_model(tmp_path / "sae.pth", k=K, normalize_eps=1e-5, layer=1).info["layer"] == 1


def refused(path) -> str:
    with pytest.raises(InputError) as info:
        load_sae_model(path, k=K, normalize_eps=1e-6)
    assert path.name in str(info.value) and "\n" not in str(info.value)
    return str(info.value)


def test_missing_file(tmp_path):
    assert "no SAE" in refused(tmp_path / "absent.pth")
    assert "no SAE" in refused(tmp_path / "absent" / "absent.pth")


def test_folder_instead_of_a_file(tmp_path):
    refused(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_file(published, kept):
    content = published.read_bytes()
    published.write_bytes(content[: int(kept * len(content))])
    assert "truncated" in refused(published)


@pytest.mark.parametrize("content", [b"hello\n", b'{"k": 3}', b"PK\x03\x04", b"\0" * 99])
def test_not_a_checkpoint(tmp_path, content):
    (tmp_path / "text.pth").write_bytes(content)
    refused(tmp_path / "text.pth")


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), {"weight": torch.zeros(3)}, {}])
def test_not_an_sae(tmp_path, value):
    torch.save(value, tmp_path / "other.pth")
    assert "not an SAE" in refused(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.weight", torch.zeros(N, D)),
        ("encoder.weight", torch.zeros(D, N)),
        ("encoder.bias", torch.zeros(N + 1)),
        ("b_pre", torch.zeros(D, 1)),
        ("encoder.weight", torch.zeros(N)),
        ("b_pre", 0.5),
    ],
)
def test_misshapen_file(published, name, value):
    torch.save({**torch.load(published), name: value}, published)
    refused(published)


def test_k_beyond_the_number_of_latents(published):
    with pytest.raises(InputError, match="published.pth"):
        load_sae_model(published, k=N + 1, normalize_eps=1e-6)


@pytest.mark.parametrize("text", ["{", "", "[1]"])
def test_broken_json(tmp_path, text):
    save_sae(random_sae(D, N, K), tmp_path / "sae.pth", {})
    (tmp_path / "sae.json").write_text(text)
    with pytest.raises(InputError, match=r"sae\.json is not JSON"):
        load_sae_model(tmp_path / "sae.pth")


def test_json_holds_what_belongs_to_the_sae(tmp_path):
    save_sae(random_sae(D, N, K, eps=1e-4), tmp_path / "sae.pth", {"site": "layers.1.attention_norm"})
    info = json.loads((tmp_path / "sae.json").read_text())
    shape = {"d_model": D, "n_latents": N, "k": K, "normalize_eps": 1e-4}
    assert info == {"format_version": 1, **shape, "site": "layers.1.attention_norm"}


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_impossible_k(k):
    with pytest.raises(ValueError, match="must lie between 1 and n_latents"):
        SparseAutoencoder(D, N, k)

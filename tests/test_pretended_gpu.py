"""Every script that uses torch, on a pretended GPU (support/pretend_gpu.py, which says what that cannot see).

Each test runs a stage on the CPU and then on the pretended GPU, from the same input, and compares what they write.

    .venv/bin/python -m pytest tests/test_pretended_gpu.py
"""

import contextlib
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from support.pipeline_runs import SITE, call, some_texts, write_sentences
from support.pretend_gpu import GpuTensor, pretended_gpu
from support.sae_runs import (
    TRAINING,
    assert_similar_run,
    places,
    random_sae,
    train,
    write_batches,
    write_target_batches,
)

import capture_activations
import capture_top_activating_sentences
import llama_3_inference
import promoted_tokens
import sae_evaluation
import sae_preprocessing
import sae_training
import sample_dialogues
from autoencoder.step import Step, StepOptions
from latents.index import LatentIndex
from llama_3 import load_model, load_tokenizer
from llama_3.generation import complete
from pipeline.activation_store import ActivationStore
from pipeline.distributed import World, make_grid
from pipeline.files import write_json
from serving.engine import Engine
from serving.modes import MODES
from serving.requests import Limits, Served, completions, look_at
from serving.steered_model import ModelChoice, Sampling, open_model
from serving.steering import Steering, highest_activations, make_steering

pytestmark = pytest.mark.slow

DTYPES = ("float32", "bfloat16")
WAITS_PER_STEP = 2  # of training: the CPU waits for the GPU so often at most


class Folders(SimpleNamespace):
    """What earlier stages wrote, on the CPU."""

    model: Path
    sentences: Path
    acts: Path
    batches: Path
    sae: Path  # with its tables beside it
    capture: dict  # options


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory) -> Folders:
    folder = tmp_path_factory.mktemp("on_the_cpu")
    sentences = write_sentences(folder / "sentences", some_texts(200))
    capture = {"model_dir": tiny_model_dir, "sentences_dir": sentences, "sites": [SITE]}
    capture |= {"batch_tokens": 200, "window_sentences": 64, "max_tokens": 30, "dtype": "float32"}
    call(capture_activations, **capture, output_dir=folder / "acts")
    acts = folder / "acts" / SITE
    options = {"batch_size": 32, "validation_fraction": 0.1, "num_processes": 1}
    call(sae_preprocessing, input_dir=acts, output_dir=folder / "batches", **options)
    sae = train(folder / "batches", folder / "sae", num_epochs=2)
    call(capture_top_activating_sentences, data_dir=acts, model_path=sae, top_sentences=5)
    call(promoted_tokens, model_path=sae)
    return Folders(
        model=tiny_model_dir, sentences=sentences, acts=acts, batches=folder / "batches", sae=sae, capture=capture
    )


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of the SAE alone: NAME.pth and NAME.json, whose folders are given absolutely."""
    (tmp_path / "copy").mkdir()
    shutil.copy(made.sae, tmp_path / "copy")
    info = json.loads(made.sae.with_suffix(".json").read_text())
    info |= {"model_dir": str(made.model), "sentences_dir": str(made.sentences), "activations_dir": str(made.acts)}
    write_json(tmp_path / "copy" / "sae.json", info)
    return tmp_path / "copy" / "sae.pth"


@pytest.fixture(scope="module")
def alive(made) -> list[int]:
    return highest_activations(made.sae).topk(2).indices.tolist()


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def assert_similar(found: object, expected: object) -> None:
    """The same, numbers to a thousandth."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_similar(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_similar(one, two)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    else:
        assert found == expected


# ---- what the pretended GPU notices


def test_tensors_on_both_devices_are_an_error():
    with pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        assert (2 * there + torch.tensor(1.0)).tolist() == [3, 3, 3]  # single numbers may


@pytest.mark.parametrize("read", [lambda x: x.numpy(), lambda x: x.data_ptr()])
def test_the_host_cannot_read_a_gpus_memory(read):
    with pretended_gpu(), pytest.raises((TypeError, RuntimeError)):
        read(torch.ones(3, device="cuda"))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).to("cuda"),
        lambda x: bool((x > 0).all()),
    ],
)
def test_it_counts_where_the_cpu_waits(waits):
    with pretended_gpu() as seen:
        x = torch.arange(3.0, device="cuda")
        assert isinstance(x, GpuTensor) and x.device == torch.device("cuda", 0)
        (x * 2).sum()
        assert seen.n_waits() == 0
        waits(x)
        assert seen.n_waits() == 1 and "test_pretended_gpu.py" in next(iter(seen.waits))


def test_nothing_of_it_remains():
    before = torch.zeros, torch.load, torch.Tensor.to, torch.cuda.is_available
    with pretended_gpu():
        assert torch.cuda.is_available()
    assert before == (torch.zeros, torch.load, torch.Tensor.to, torch.cuda.is_available)
    assert not torch.cuda.is_available()


# ---- the stages


@pytest.mark.parametrize("dtype", DTYPES)
def test_capture(made, tmp_path, dtype):
    options = made.capture | {"dtype": dtype}
    call(capture_activations, **options, output_dir=tmp_path / "cpu")
    with pretended_gpu() as seen:
        call(capture_activations, **options, output_dir=tmp_path / "gpu")
    cpu, gpu = (ActivationStore(tmp_path / name / SITE) for name in ("cpu", "gpu"))
    for one, two in zip(cpu.shards(), gpu.shards(), strict=True):
        assert one.token_ids.equal(two.token_ids) and one.sentence_idx.equal(two.sentence_idx)
        close = {"rtol": 0.05, "atol": 0.05} if dtype == "bfloat16" else {}
        torch.testing.assert_close(two.acts, one.acts, **close)
    # Once model and RoPE table are there, nothing waits for the GPU but the copies back, which have an event.
    assert all("model.to(w.device)" in line or "rope_frequencies(args).to(device)" in line for line in seen.waits)


def test_training_on_a_stream(made, tmp_path):
    """Of an SAE and a transcoder; and from batches at 8 bits a value, unpacked on the GPU."""
    sites = ("layers.1.resid_post", "layers.1.ffn_norm:layers.1.mlp_out")
    options = {"stream": made.model, "sentences_dir": made.sentences, "sites": sites, "max_tokens": 30}
    options |= {"dtype": "float32", "batch_tokens": 200, "buffer_size": 1500}
    options |= TRAINING | {"batch_size": 64, "num_epochs": 1}
    packed = made.capture | {"store_dtype": "int8"}
    saes = [
        Path(SITE) / "sae.pth",
        *(Path(name) / "sae.pth" for name in ("layers.1.resid_post", "layers.1.transcoder")),
    ]
    for name, device in (("cpu", contextlib.nullcontext()), ("gpu", pretended_gpu())):
        with device as seen, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sae_training.Training, "draw", lambda *args: None)
            call(sae_training, **options, **places(tmp_path / name))
            call(capture_activations, **packed, output_dir=tmp_path / name / "acts")
            folders = {"input_dir": tmp_path / name / "acts" / SITE, "output_dir": tmp_path / name / "batches"}
            call(sae_preprocessing, **folders, batch_size=32, num_processes=1)
            train(tmp_path / name / "batches", tmp_path / name / SITE, num_epochs=1)
            assert seen is None or seen.n_waits() > 0
    for sae in saes:
        assert_similar_run(tmp_path / "cpu" / sae, tmp_path / "gpu" / sae)


def test_training(made, tmp_path):
    with pretended_gpu() as seen:
        path = train(made.batches, tmp_path / "sae", num_epochs=2)
    assert_similar_run(made.sae, path)
    assert seen.n_waits() > 0  # it did run there


def test_training_with_the_bfloat16_encoder(made, tmp_path):
    cpu = train(made.batches, tmp_path / "cpu", num_epochs=1, encoder_dtype="bfloat16")
    with pretended_gpu():
        gpu = train(made.batches, tmp_path / "gpu", num_epochs=1, encoder_dtype="bfloat16")
    assert_similar_run(cpu, gpu)


def test_training_of_the_other_kinds(tmp_path):
    """BatchTopK with prefixes, of a skip transcoder, whose thresholds are then those of a JumpReLU."""
    options = {"gate": "batch_topk", "matryoshka": (16, 40), "normalization": "scale", "skip": True, "num_epochs": 1}
    options["target_data_dir"] = write_target_batches(tmp_path)
    data = write_batches(tmp_path)
    cpu = train(data, tmp_path / "cpu", **options)
    with pretended_gpu() as seen:
        gpu = train(data, tmp_path / "gpu", **options)
    assert_similar_run(cpu, gpu)
    assert seen.n_waits() > 0


@pytest.mark.parametrize("encoder_dtype", DTYPES)
def test_a_training_step_waits_for_the_gpu_at_most_twice(encoder_dtype):
    options = StepOptions(64, k_aux=8, dead_after_tokens=100, grad_clip=0.25, encoder_dtype=encoder_dtype)
    generator = torch.Generator().manual_seed(0)
    with pretended_gpu() as seen:
        step = Step(random_sae(14, 96, 4), options, make_grid(World(0, 1, torch.device("cuda", 0)), 1))
        for n_before in range(5):
            x = torch.randn(64, 14, generator=generator).to(torch.bfloat16).to("cuda")
            seen.waits.clear()
            pending = step.gradients(x)
            step.apply(pending, step.agree(pending), 1e-3, n_before)
            assert 0 < seen.n_waits() <= WAITS_PER_STEP, seen.waits
        assert step.n_dead[0] > 0  # the auxiliary loss was counted, too
    assert not seen.not_contiguous  # nccl would refuse them


def test_evaluation(made, copied):
    call(sae_evaluation, sae_model_path=made.sae)
    with pretended_gpu():
        call(sae_evaluation, sae_model_path=copied)
    found, expected = (json.loads((sae.parent / "sae.evaluation.json").read_text()) for sae in (copied, made.sae))
    assert_similar(found, expected)


def test_top_sentences(made, copied):
    with pretended_gpu():
        call(capture_top_activating_sentences, data_dir=made.acts, model_path=copied, top_sentences=5)
    for name in ("sae.top.parquet", "sae.examples.parquet", "sae.latents.parquet"):
        assert_similar(rows_of(copied.parent / name), rows_of(made.sae.parent / name))


def test_promoted_tokens(made, copied):
    shutil.copy(made.sae.parent / "sae.latents.parquet", copied.parent)
    with pretended_gpu():
        call(promoted_tokens, model_path=copied)
    assert_similar(*(rows_of(sae.parent / "sae.promoted.parquet") for sae in (copied, made.sae)))


def test_dialogues(made, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_dialogues, "whole_sentences", lambda answer: answer)
    monkeypatch.setattr(sample_dialogues, "is_worth_keeping", lambda answer: True)
    options = {"model_dir": made.model, "num_dialogues": 5, "max_new_tokens": 4, "batch_size": 3, "dtype": "float32"}
    call(sample_dialogues, **options, output_dir=tmp_path / "cpu")
    with pretended_gpu():
        call(sample_dialogues, **options, output_dir=tmp_path / "gpu")
    cpu, gpu = (rows_of(tmp_path / name / "dialogues.parquet") for name in ("cpu", "gpu"))
    assert cpu == gpu and len(cpu) == 5


# ---- generation


@pytest.mark.parametrize("mode", MODES)
def test_steered_completions(made, alive, mode):
    tokenizer, highest = load_tokenizer(made.model), highest_activations(made.sae)

    def completed(device: str) -> list[list[str]]:
        opened = open_model(ModelChoice(str(made.model), device, "float32", sae_model_path=str(made.sae)))
        sae = opened.need_sae()
        assert sae.b_pre.device.type == opened.model.device.type == device
        texts = []
        for keep_error in (True, False):
            steering = make_steering(sae, Steering(dict.fromkeys(alive, 2.0), mode, keep_error), highest, 276)
            options = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "steering": steering}
            texts.append(complete(opened.model, tokenizer, ["the ring", "a"], **options))
        return texts

    on_cpu = completed("cpu")
    with pretended_gpu():
        assert completed("cuda") == on_cpu


def test_the_terminal(made, alive, capsys):
    options = {"llama_model_dir": made.model, "sae_model_path": made.sae, "dtype": "float32", "temperature": 0}
    options |= {"latents": alive, "prompts": ["the ring", "a"], "max_new_tokens": 4, "show_latents": 2}
    call(llama_3_inference, **options, device="cpu")
    on_cpu = capsys.readouterr().out
    with pretended_gpu():
        call(llama_3_inference, **options)
    assert capsys.readouterr().out == on_cpu and "the ring" in on_cpu


def test_the_pages_requests(made, alive):
    def shown(device: str) -> tuple:
        opened = open_model(ModelChoice(str(made.model), device, "float32", sae_model_path=str(made.sae)))
        index = LatentIndex(opened.sae_path, opened.tokenizer, opened.model, opened.sae)
        engine = Engine(opened.model, max_rows=8, max_waiting=8)
        served = Served(opened, Limits(8, 4000, 256), index, engine, threading.Lock())
        steering, sampling = Steering({alive[0]: 2.0}), Sampling(5, 0.7, 0.95, 0)
        *_, texts = completions(served, ["the ring", "a"], steering, sampling)
        engine.close()
        engine.join()
        look = look_at(served, "hello the ring")
        strongest = [[latent for latent, _ in row] for row in look.latents]
        return texts, look.tokens, strongest, index.card(alive[0], 3).sentences

    on_cpu = shown("cpu")
    with pretended_gpu():
        assert shown("auto") == on_cpu


def test_a_decoding_step_waits_at_few_places(made):
    """For the logits' check, the samples, the random numbers and the tokens that are shown."""
    n_waits = []
    with pretended_gpu() as seen:
        model = load_model(made.model, "cuda", torch.bfloat16)
        for n in (2, 12):
            seen.waits.clear()
            options = {"max_new_tokens": n, "temperature": 0.7, "top_p": 0.5}
            complete(model, load_tokenizer(made.model), ["the ring", "a"], **options)
            n_waits.append(seen.n_waits())
    assert n_waits[1] - n_waits[0] <= 4 * 10, seen.waits.most_common()


# ---- attention


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_given_what_a_fused_kernel_takes(made, monkeypatch, dtype):
    """FlashAttention takes 16 bits without a mask, with fewer key heads too; the memory-efficient kernel takes the rest
    if keys have all heads. Nothing is left for cuDNN or for the path that holds all scores (torch's sdp_utils.cpp)."""
    attention, calls = F.scaled_dot_product_attention, []

    def noted(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        calls.append((attn_mask is not None, enable_gqa))
        assert enable_gqa == (q.shape[1] != k.shape[1] or q.shape[1] != v.shape[1])
        if enable_gqa:
            assert q.dtype == torch.bfloat16 and attn_mask is None
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    tokens, n_pad = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])

    def logits(device: str) -> torch.Tensor:
        """Without a cache, with it, one token later, several tokens later; then the same for unequal prompts."""
        model = load_model(made.model, device, getattr(torch, dtype))
        found = [model(tokens.to(device))]
        for padding in (None, n_pad.to(device)):
            cache = model.new_cache(2, 9)
            parts = tokens.to(device).split([4, 1, 2], dim=1)
            found += [model(part, cache, padding) for part in parts]
        return torch.cat(found, dim=1).cpu()

    torch.backends.cuda.enable_cudnn_sdp(True)
    with torch.inference_mode(), pretended_gpu():
        on_gpu = logits("cuda")
    masked, fewer_heads = zip(*calls, strict=True)
    assert any(masked) and not all(masked) and any(fewer_heads) == (dtype == "bfloat16")
    monkeypatch.undo()
    if dtype == "float32":
        with torch.inference_mode():
            torch.testing.assert_close(on_gpu, logits("cpu"), rtol=1e-4, atol=1e-3)


def test_an_old_gpu_without_flash_attention_gets_all_key_heads(made):
    shapes, attention = [], F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        shapes.append((q.shape[1], k.shape[1]))
        return attention(q, k, v, **options)

    with torch.inference_mode(), pretended_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", noted)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4
        load_model(made.model, "cuda", torch.bfloat16)(torch.tensor([[1, 2, 3]], device="cuda"))
    assert shapes and all(n_heads == n_kv_heads for n_heads, n_kv_heads in shapes)

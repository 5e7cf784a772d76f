"""Our Llama against transformers' `generate` and llama.cpp: prefill and decode rates, time to load, memory.

Both load the same checkpoint: random weights, Llama 3.2 1B with every width and the vocabulary halved (309 million
parameters, tied output, bfloat16 on disk), or MODEL_DIR's, written again as transformers reads them. Rates are medians
of ROUNDS interleaved measurements in one process; loading is measured in separate processes. Ours uses `pack()` on a
CPU, as llama_3_inference.py does. llama.cpp, in a process of its own between the rounds, computes with the weights as
MODEL_DIR's GGUF file holds them, always takes the likeliest token, and needs a Python of its own:

    python -m venv data/llama_cpp
    data/llama_cpp/bin/pip install cffi numpy xllamacpp==2026.10.11549
    data/llama_cpp/bin/pip install --no-deps llama-cpp-py-sync==0.11739    # for its C declarations

    .venv/bin/python benchmarks/llama_inference.py
    .venv/bin/python benchmarks/llama_inference.py --model_dir models/smollm2-135M-Instruct-Q4_1 --temperature 0.8 \
        --llama_cpp_python data/llama_cpp/bin/python
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from common import processor, timed

from pipeline.files import PROJECT_DIR
from pipeline.options import Count, NotNegative, parse_constants
from pipeline.run import run

MODEL_DIR: str | None = None  # a real model, in transformers' format or GGUF, instead of the shape below
LLAMA_CPP_PYTHON: str | None = None  # a Python that has llama.cpp; MODEL_DIR must then hold a GGUF file
TEMPERATURE: NotNegative = 0.0  # 0: greedy; above: sampled, top-p 0.95
ROUNDS: Count = 5  # measurements of each, interleaved; medians are reported
PROMPT_TOKENS: Count = 256  # tokens per prompt
NEW_TOKENS: Count = 32  # tokens decoded after the first
BATCH_SIZES: tuple[Count, ...] = (1, 8)
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
DEVICE = "cpu"  # or cuda
DIM: Count = 1024  # 3072 with 28 layers, 24 heads, 8 kv heads, vocabulary 128256, feed-forward 8192 is Llama 3.2 3B
N_LAYERS: Count = 16
N_HEADS: Count = 16
N_KV_HEADS: Count = 4
FEED_FORWARD: Count = 4096
VOCAB_SIZE: Count = 64128

_TOP_P = 0.95  # nucleus sampling

_LOAD = """
import re, sys, threading, time
import torch
from transformers import LlamaForCausalLM
from llama_3 import load_model
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
folder, dtype, kind = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
tokens = torch.arange(8)[None]
torch.ones(64, 64) @ torch.ones(64, 64)
before, highest, done = memory("RssAnon"), 0, False
resident = memory("VmRSS")
def watch():
    global highest
    while not done:
        highest = max(highest, memory("RssAnon"))
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
begin = time.perf_counter()
with torch.inference_mode():
    if kind == "ours":
        model = load_model(folder, dtype=dtype, packed=True)
    else:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = time.perf_counter() - begin
    loading = highest - before
    model(tokens)
    ran = time.perf_counter() - begin
    model(tokens)
done = True
thread.join()
print("RESULT", loaded, ran, max(loading, 0), highest - before, memory("VmHWM") - resident)
"""


_LLAMA_CPP = """
import glob, json, os, re, sys, sysconfig, time
import cffi
import numpy as np
site = sysconfig.get_paths()["purelib"]
source = open(os.path.join(site, "llama_cpp_py_sync", "_cffi_bindings.py"), encoding="utf-8").read()
ffi = cffi.FFI()
ffi.cdef(re.search(r'(?:cdef\\(\\s*|=\\s*)(?:r|f)?\"{3}(.*?)\"{3}', source, re.S)[1])
lib = ffi.dlopen(glob.glob(os.path.join(site, "xllamacpp", "xllamacpp*.so"))[0])
quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
lib.llama_log_set(quiet, ffi.NULL)
lib.llama_backend_init()
path, threads, n_new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = np.array(json.load(sys.stdin), np.int32)
batch_size, prompt_tokens = rows.shape
options = lib.llama_model_default_params()
options.n_gpu_layers = 0
model = lib.llama_model_load_from_file(path.encode(), options)
n_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
options = lib.llama_context_default_params()
options.n_seq_max, options.n_threads, options.n_threads_batch = batch_size, threads, threads
options.n_ctx, options.n_batch = batch_size * (-(-(prompt_tokens + n_new + 1) // 256) * 256), rows.size
context = lib.llama_init_from_model(model, options)
batch = lib.llama_batch_init(rows.size, 0, 1)

def step(tokens, first):
    # tokens: (batch_size, n) at positions first, first + 1, ...; returns the likeliest next one of each row
    batch.n_tokens, last = tokens.size, []
    for i, (row, place) in enumerate(np.ndindex(tokens.shape)):
        batch.token[i], batch.pos[i] = int(tokens[row, place]), first + place
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        batch.logits[i] = place == tokens.shape[1] - 1
        last += [i] * (place == tokens.shape[1] - 1)
    assert lib.llama_decode(context, batch) == 0
    logits = (ffi.buffer(lib.llama_get_logits_ith(context, i), 4 * n_tokens) for i in last)
    return np.array([[np.frombuffer(row, np.float32).argmax()] for row in logits])

step(rows[:, :4], 0)  # to warm up
lib.llama_memory_clear(lib.llama_get_memory(context), True)
begin = time.perf_counter()
tokens = step(rows, 0)
prefill = time.perf_counter()
for n in range(n_new):
    tokens = step(tokens, prompt_tokens + n)
print("RESULT", prefill - begin, time.perf_counter() - prefill)
"""

_WHAT_LOADING_TAKES = (
    "seconds to load",
    "seconds to load and run 8 tokens",
    "GB of private memory while loading",
    "GB of private memory in all",
    "GB of resident memory in all",
)

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import torch

from llama_3 import load_model
from llama_3.generation import generate
from pipeline.errors import InputError


class Shape(NamedTuple):
    """The model's shape; named like the options."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    feed_forward: int
    vocab_size: int


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} cores, {processor()}"


def write_checkpoint(folder: Path, shape: Shape) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(llama).bfloat16().save_pretrained(folder)


def write_again(model_dir: Path, folder: Path) -> None:
    """A real model as a Hugging Face folder in bfloat16. GGUF files are converted by transformers' own reader."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    files = sorted(model_dir.glob("*.gguf"))
    if files:
        config = LlamaConfig(**load_gguf_checkpoint(str(files[0]))["config"])
        model = LlamaForCausalLM(config)
        read = load_gguf_checkpoint(str(files[0]), return_tensors=True, model_to_load=model)["tensors"]
        model.load_state_dict(read, strict=not config.tie_word_embeddings)
    else:
        model = LlamaForCausalLM.from_pretrained(model_dir)
    model.bfloat16().save_pretrained(folder)


def measure_loading(folder: Path, dtype: str, rounds: int) -> dict[str, list[float]]:
    """Medians of _WHAT_LOADING_TAKES, in seconds and bytes."""
    results: dict[str, list[list[float]]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for kind, found in results.items():
            command = [sys.executable, "-c", _LOAD, str(folder), dtype, kind]
            done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, encoding="utf-8", check=True)
            found.append([float(x) for x in done.stdout.split("RESULT")[1].split()])
    return {kind: [median(column) for column in zip(*found, strict=True)] for kind, found in results.items()}


class Decoding(NamedTuple):
    """What is decoded; named like the options."""

    device: str
    llama_cpp_python: str | None
    model_dir: str | None
    rounds: int
    prompt_tokens: int
    new_tokens: int
    temperature: float


def measure_rates(folder: Path, dtype: str, batch_size: int, what: Decoding) -> dict[str, tuple[float, float]]:
    """Medians of prefill and decode tokens/s, by who computed."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(what.device)
    ours = load_model(str(folder), what.device, getattr(torch, dtype), packed=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(ours.args.vocab_size, (batch_size, what.prompt_tokens), generator=generator)
    rows = prompts.tolist()
    prompts = prompts.to(what.device)
    options: dict[str, Any] = dict(attention_mask=torch.ones_like(prompts), pad_token_id=0, eos_token_id=None)
    options |= dict(do_sample=False)
    if what.temperature:
        options |= dict(do_sample=True, temperature=what.temperature, top_p=_TOP_P, top_k=0)

    def decode(kind: str, n_new: int) -> list[Any]:
        if kind == "ours":
            return list(generate(ours, rows, n_new, stop_tokens=[], temperature=what.temperature, top_p=_TOP_P))
        with torch.inference_mode():
            return theirs.generate(prompts, max_new_tokens=n_new, **options)[:, what.prompt_tokens :].T.tolist()

    times: dict[str, list[tuple[float, float]]] = {"ours": [], "transformers": []}
    if what.llama_cpp_python:
        times["llama.cpp"] = []
    first = {kind: decode(kind, 4) for kind in ("ours", "transformers")}  # to warm up
    assert dtype != "float32" or what.temperature or first["ours"] == first["transformers"]  # the same tokens
    for _ in range(what.rounds):
        for kind, found in times.items():
            if kind == "llama.cpp":
                found.append(by_llama_cpp(rows, what))
                continue
            prefill, whole = timed(decode, kind, 1)[0], timed(decode, kind, 1 + what.new_tokens)[0]
            found.append((prefill, whole - prefill))
    return {
        kind: (
            batch_size * what.prompt_tokens / median(prefill for prefill, _ in found),
            batch_size * what.new_tokens / median(decode for _, decode in found),
        )
        for kind, found in times.items()
    }


def by_llama_cpp(rows: list[list[int]], what: Decoding) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    gguf_path = next(Path(what.model_dir or "").glob("*.gguf"))
    sizes = [str(torch.get_num_threads()), str(what.new_tokens)]
    command = [what.llama_cpp_python or "", "-c", _LLAMA_CPP, str(gguf_path), *sizes]
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, encoding="utf-8", check=True)
    prefill, decoding = done.stdout.split("RESULT")[1].split()
    return float(prefill), float(decoding)


def row(name: str, ours: float, transformers: float, digits: int, llama_cpp: float | None = None) -> str:
    """A row of the table, printed at once."""
    text = f"| {name} | {ours:.{digits}f} | {transformers:.{digits}f} | {ours / max(transformers, 1e-9):.2f} |"
    if llama_cpp is not None:
        text += f" {llama_cpp:.{digits}f} |"
    print(text, flush=True)
    return text


def main() -> None:
    config = parse_constants(globals())
    if config.llama_cpp_python and not list(Path(config.model_dir or "").glob("*.gguf")):
        raise InputError("llama.cpp reads a GGUF file; name a folder with one by --model_dir.")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape = Shape(*(getattr(config, name) for name in Shape._fields))
    what = Decoding(*(getattr(config, name) for name in Decoding._fields))
    rows: list[str] = []
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if config.model_dir:
            write_again(Path(config.model_dir), Path(folder))
        else:
            write_checkpoint(Path(folder), shape)
        for dtype in config.dtypes:
            for batch_size in config.batch_sizes:
                found = results[f"{dtype}, batch {batch_size}"] = measure_rates(Path(folder), dtype, batch_size, what)
                for i, name in enumerate(("prefill", "decode")):
                    llama_cpp = found["llama.cpp"][i] if "llama.cpp" in found else None
                    title = f"{name}, {dtype}, batch {batch_size}"
                    rows.append(row(title, found["ours"][i], found["transformers"][i], 1, llama_cpp))
            if config.device == "cpu":
                loading = results[f"loading, {dtype}"] = measure_loading(Path(folder), dtype, config.rounds)
                for name, *pair in zip(_WHAT_LOADING_TAKES, loading["ours"], loading["transformers"], strict=True):
                    ours, theirs = (x / 1e9 if name.startswith("GB") else x for x in pair)
                    rows.append(row(f"{name}, {dtype}", ours, theirs, 2))
    columns = f"tokens/s | ours | transformers {transformers.__version__} | ratio"
    if config.llama_cpp_python:
        columns += " | llama.cpp"
    print(f"\n| {machine(config.device)}; {columns} |\n" + "|---" * columns.count("|") + "|---|")
    print(*rows, sep="\n")
    print(json.dumps(results))


if __name__ == "__main__":
    run(main)

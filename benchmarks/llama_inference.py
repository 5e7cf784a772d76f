"""Our Llama against transformers' `generate`: prefill and decode rates, time to load, memory.

Both load the same checkpoint of random weights: Llama 3.2 1B with every width and the vocabulary halved (309 million
parameters, tied output, bfloat16 on disk). Greedy. Rates are medians of ROUNDS interleaved measurements in one process;
loading is measured in processes of its own. Ours uses `pack()` on a CPU, as llama_3_inference.py does.

    .venv/bin/python benchmarks/llama_inference.py
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from pipeline.files import PROJECT_DIR
from pipeline.options import parse_constants
from pipeline.run import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


ROUNDS = 5  # measurements of each, interleaved; the median counts
PROMPT_TOKENS = 256  # of each prompt
NEW_TOKENS = 32  # decoded after the first
BATCH_SIZES = (1, 8)
DTYPES = ("float32", "bfloat16")
DEVICE = "cpu"  # or cuda
DIM = 1024  # 3072 with 28 layers, 24 heads, 8 kv heads, vocabulary 128256, feed-forward 8192 is Llama 3.2 3B
N_LAYERS = 16
N_HEADS = 16
N_KV_HEADS = 4
FEED_FORWARD = 4096
VOCAB_SIZE = 64128

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


def machine() -> str:
    import torch

    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{torch.get_num_threads()} cores, {found[1] if found else 'unknown CPU'}"


def write_checkpoint(folder: Path, config) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.feed_forward,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
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


def measure_loading(folder: Path, dtype: str, rounds: int) -> dict[str, list[float]]:
    """Medians of seconds to load, seconds to load and run 8 tokens, and private bytes at the highest."""
    results: dict[str, list[list[float]]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for kind, found in results.items():
            command = [sys.executable, "-c", _LOAD, str(folder), dtype, kind]
            run = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
            found.append([float(x) for x in run.stdout.split("RESULT")[1].split()])
    return {kind: [median(column) for column in zip(*found, strict=True)] for kind, found in results.items()}


def measure_rates(folder: Path, dtype: str, batch_size: int, config) -> dict[str, tuple[float, float]]:
    """Medians of prefill and decode tokens/s."""
    import torch
    from transformers import LlamaForCausalLM

    from llama_3 import load_model
    from llama_3.generation import generate

    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(config.device)
    ours = load_model(folder, config.device, getattr(torch, dtype), packed=True)
    prompts = torch.randint(
        config.vocab_size, (batch_size, config.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    rows = prompts.tolist()
    prompts = prompts.to(config.device)
    options = dict(attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0)

    def seconds(kind: str, n_new: int) -> tuple[float, list]:
        begin = time.perf_counter()
        if kind == "ours":
            found = list(generate(ours, rows, n_new, stop_tokens=[]))
        else:
            with torch.inference_mode():
                found = theirs.generate(prompts, max_new_tokens=n_new, **options)[:, config.prompt_tokens :].T.tolist()
        return time.perf_counter() - begin, found

    times: dict[str, list[tuple[float, float]]] = {"ours": [], "transformers": []}
    first = {kind: seconds(kind, 4)[1] for kind in times}  # to warm up
    assert dtype != "float32" or first["ours"] == first["transformers"]  # the same tokens
    for _ in range(config.rounds):
        for kind, found in times.items():
            prefill, whole = seconds(kind, 1)[0], seconds(kind, 1 + config.new_tokens)[0]
            found.append((prefill, whole - prefill))
    return {
        kind: (
            batch_size * config.prompt_tokens / median(prefill for prefill, _ in found),
            batch_size * config.new_tokens / median(decode for _, decode in found),
        )
        for kind, found in times.items()
    }


def main() -> None:
    config = parse_constants(globals())
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config)
        for dtype in config.dtypes:
            for batch_size in config.batch_sizes:
                found = measure_rates(folder, dtype, batch_size, config)
                results[f"{dtype}, batch {batch_size}"] = found
                for i, what in enumerate(("prefill", "decode")):
                    a, b = found["ours"][i], found["transformers"][i]
                    rows.append(f"| {what}, {dtype}, batch {batch_size} | {a:.1f} | {b:.1f} | {a / b:.2f} |")
                    print(rows[-1], flush=True)
            if config.device == "cpu":
                found = measure_loading(Path(folder), dtype, config.rounds)
                results[f"loading, {dtype}"] = found
                names = (
                    "seconds to load",
                    "seconds to load and run 8 tokens",
                    "GB of private memory while loading",
                    "GB of private memory in all",
                    "GB of resident memory in all",
                )
                for name, a, b in zip(names, found["ours"], found["transformers"], strict=True):
                    a, b = (a / 1e9, b / 1e9) if name.startswith("GB") else (a, b)
                    rows.append(f"| {name}, {dtype} | {a:.2f} | {b:.2f} | {a / max(b, 1e-9):.2f} |")
                    print(rows[-1], flush=True)
    print(f"\n| {machine()}; tokens/s | ours | transformers {transformers.__version__} | ratio |\n|---|---|---|---|")
    print(*rows, sep="\n")
    print(json.dumps(results))


if __name__ == "__main__":
    run(main)

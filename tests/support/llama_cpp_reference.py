"""Writes tests/support/llama_cpp.json: what real llama.cpp makes of the tiny Llama as a GGUF file. To make it again:

    python -m venv data/llama_cpp
    data/llama_cpp/bin/pip install cffi gguf numpy xllamacpp==2026.10.11549
    data/llama_cpp/bin/pip install --no-deps llama-cpp-py-sync==0.11739    # for its C declarations
    PYTHONPATH=.:tests .venv/bin/python -m support.llama_cpp_reference data/llama_cpp/bin/python

The project's Python writes the GGUF files, the other one asks llama.cpp.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).with_name("llama_cpp.json")
PROMPT = "The function returns a list of files that don't exist; see 1234."
LINES = [
    "The capital of France is Paris, isn't it? I'LL say: YES, we'Ve been there 3 times in 2019.",
    "  two  spaces,\ttabs\t\tand line breaks\r\n\n\n  then the end   ",
    "3.14159 1,000,000 ½ ² ٣ 0x1F 1e-10 v2.0.1",
    "naïve café Ünder ŁÓDŹ русский العربية 日本語テキスト 한국어 12345字",
    "def f(x): return x**2 + y_1 != `code` ~ ^ | $x_{1}$ <b>&amp;</b> C:\\path\\to",
    "“quotes” – dash — … · !!!???... 👩\u200d👧 é e\u0301",
    "<|begin_of_text|>user <|eot_id|> are text here",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa HTTPServer camelCase ALLCAPS Title",
]

_ASK = '''
import glob, json, os, re, sys, sysconfig
import cffi
site = sysconfig.get_paths()["purelib"]
source = open(os.path.join(site, "llama_cpp_py_sync", "_cffi_bindings.py"), encoding="utf-8").read()
ffi = cffi.FFI()
ffi.cdef(re.search(r'(?:cdef\\(\\s*|=\\s*)(?:r|f)?"""(.*?)"""', source, re.S)[1])
lib = ffi.dlopen(glob.glob(os.path.join(site, "xllamacpp", "xllamacpp*.so"))[0])
quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
lib.llama_log_set(quiet, ffi.NULL)
lib.llama_backend_init()
job = json.load(sys.stdin)

def load(path, vocab_only):
    options = lib.llama_model_default_params()
    options.n_gpu_layers, options.vocab_only = 0, vocab_only
    return lib.llama_model_load_from_file(path.encode(), options)

def tokenize(vocab, text, special):
    text = text.encode()
    ids = ffi.new("int32_t[]", len(text) + 8)
    n = lib.llama_tokenize(vocab, text, len(text), ids, len(text) + 8, special, False)
    return list(ids[0:n])

found = {"ids": {}, "add_bos": {}}
for pre, path in job["vocabularies"].items():
    vocab = lib.llama_model_get_vocab(load(path, True))
    found["ids"][pre] = [tokenize(vocab, line, False) for line in job["lines"]]
    found["add_bos"][pre] = bool(lib.llama_vocab_get_add_bos(vocab))
model = load(job["model"], False)
vocab = lib.llama_model_get_vocab(model)
ids = tokenize(vocab, job["prompt"], True)
options = lib.llama_context_default_params()
options.n_ctx, options.type_k, options.type_v = 256, 0, 0  # keys and values in float32
options.flash_attn_type = 0  # off: it rounds
context = lib.llama_init_from_model(model, options)
assert lib.llama_decode(context, lib.llama_batch_get_one(ffi.new("int32_t[]", ids), len(ids))) == 0
logits = lib.llama_get_logits_ith(context, len(ids) - 1)
found["prompt_ids"] = ids
found["logits"] = [round(logits[i], 4) for i in range(0, lib.llama_vocab_n_tokens(vocab), 16)]
json.dump(found, sys.stdout)
'''


def main() -> None:
    from llama_3.checkpoint import TINY_LLAMA_DIR
    from llama_3.gguf import PRE_TOKENIZERS
    from support.gguf_files import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(TINY_LLAMA_DIR)
        distinct = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}  # the first name of each kind
        vocabularies = {
            name: str(write_gguf(Path(folder, f"{name}.gguf"), tiny, "Q8_0", pre=name)) for name in distinct.values()
        }
        job = {"vocabularies": vocabularies, "lines": LINES, "prompt": PROMPT}
        job["model"] = str(write_gguf(Path(folder, "model.gguf"), tiny, tied=True))
        done = subprocess.run([sys.argv[1], "-c", _ASK], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    OUT.write_text(json.dumps(json.loads(done.stdout)) + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

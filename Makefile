# Two commands do it all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SHELL := bash

# Python may keep compiled modules here even where the environment forbids it: without them each of the demo's and the
# tests' many processes compiles torch's anew, 3 seconds instead of 1.5.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo test faults lint format lock tiny reference

install: $(VENV)/.installed

# Direct dependencies come from pyproject.toml, every version (transitive ones too) from poetry.lock as pip constraints.
$(VENV)/.installed: pyproject.toml poetry.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; $(PYTHON) is `$(PYTHON) -V`. Run: make PYTHON=python3.11 install"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -c 'import tomllib; print(*(p["name"] + "==" + p["version"] for p in tomllib.load(open("poetry.lock", "rb"))["package"]), sep="\n")' > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --requirement $(VENV)/requirements.txt --constraint $(VENV)/constraints.txt
	touch $@

demo: install
	$(BIN)/python demo.py

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

# Kills every data stage and the training again and again, and compares with what an unbroken run leaves: 3 minutes.
faults: install
	FAULT_KILLS=30 $(BIN)/python -m pytest tests/test_faults.py
	SENTENCES_KILLS=12 $(BIN)/python -m pytest tests/test_sentences.py -k killed
	KILLS=30 $(BIN)/python -m pytest tests/test_sae_parallel.py -k random

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs Poetry: make lock POETRY=/path/to/poetry
POETRY ?= poetry
lock:
	$(POETRY) lock
	$(POETRY) check --lock

# How the embedded model was made (about an hour on two cores; see the README) ...
tiny: install
	$(BIN)/python -m embedded.corpus
	$(BIN)/python openwebtext_sentences_dataset.py --input_path data/documents --punkt corpus --punkt_train_mb 3 --shard_mb 2
	$(BIN)/python -m embedded.training --output_dir llama_3/tiny_llama

# ... and its reference SAE: the demo's, in bfloat16, with its names.
reference: demo
	$(BIN)/python -m embedded.reference

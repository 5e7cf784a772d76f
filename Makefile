# Two commands do it all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint format lock tiny

install: $(VENV)/.installed

# Direct dependencies come from pyproject.toml, every version (transitive ones too) from poetry.lock as pip constraints.
$(VENV)/.installed: pyproject.toml poetry.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; $(PYTHON) is `$(PYTHON) -V`. Run: make PYTHON=python3.11 install"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -c 'import tomllib; print(*(p["name"] + "==" + p["version"] for p in tomllib.load(open("poetry.lock", "rb"))["package"]), sep="\n")' > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement $(VENV)/requirements.txt --constraint $(VENV)/constraints.txt
	touch $@

demo: install
	$(BIN)/python demo.py

test: install
	$(BIN)/python -m pytest

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

# Retrains the embedded tiny Llama (about an hour on two cores); see the README.
tiny: install
	$(BIN)/python documentation_corpus.py
	$(BIN)/python tiny_llama_training.py

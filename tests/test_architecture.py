"""The layout's rules, read from the imports: docs/architecture.md states them for people.

.venv/bin/python -m pytest tests/test_architecture.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT_DIR

# Each imports only from itself and those before it.
ORDER = ["pipeline.errors", "llama_3", "pipeline", "sae", "autoencoder", "embedded", "latents", "microscope"]
ORDER += ["circuits", "claude", "serving", "formats"]
ROOMS = [name for name in ORDER if (PROJECT_DIR / name).is_dir()]
SCRIPTS = sorted(path.stem for path in PROJECT_DIR.glob("*.py") if path.stem != "sae")
# A benchmark times a stage's own method from inside; it imports that stage in the function that does so.
STAGES_IN_BENCHMARKS = {("capture", "capture_activations")}


def modules(folder: str = "") -> Iterator[Path]:
    yield from sorted((PROJECT_DIR / folder).glob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules of this project imported anywhere in a file, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from pipeline import batches` names a module, `from pipeline.files import gb` a part of one.
            found |= {f"{node.module}.{alias.name}" if is_room(node.module) else node.module for alias in node.names}
    return {name for name in found if name.split(".")[0] in {*ORDER, *SCRIPTS}}


def is_room(module: str | None) -> bool:
    return module in ROOMS


def place(module: str) -> int:
    """A module's position in ORDER; scripts come last."""
    if module in ORDER:
        return ORDER.index(module)
    room = module.split(".")[0]
    return ORDER.index(room) if room in ORDER else len(ORDER)


def test_the_top_level_holds_what_can_be_run_and_what_belongs_to_a_repository():
    for path in modules():
        runs = 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
        assert runs or path.name == "sae.py", f"{path.name} cannot be run; what scripts share has a room"
    files = {path.name for path in PROJECT_DIR.iterdir() if path.is_file() and not path.name.startswith(".")}
    others = files - {path.name for path in modules()}
    belong = {"README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "poetry.lock"}
    assert others <= belong


def test_names_of_the_scripts_that_users_know():
    fixed = {
        "capture_activations",
        "openwebtext_sentences_dataset",
        "sae_preprocessing",
        "sae_training",
        "capture_top_activating_sentences",
        "interpret_top_sentences_send_batches",
        "interpret_top_sentences_retrieve_batches",
        "interpret_top_sentences_parse_responses",
        "llama_3_inference",
        "llama_3_inference_gradio",
    }
    assert fixed <= set(SCRIPTS)
    assert (PROJECT_DIR / "sae.py").is_file() and (PROJECT_DIR / "latent_index_meaning").is_dir()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_a_script(script):
    assert not {name.split(".")[0] for name in imports(PROJECT_DIR / f"{script}.py")} & set(SCRIPTS)


@pytest.mark.parametrize("room", [*ROOMS, "sae"])
def test_rooms_import_downwards_only(room):
    paths = [PROJECT_DIR / "sae.py"] if room == "sae" else list(modules(room))
    for path in paths:
        module = ".".join(path.relative_to(PROJECT_DIR).with_suffix("").parts)
        for imported in imports(path):
            assert place(imported) <= place(module), f"{module} imports {imported}, which stands above it"


def test_the_llama_imports_nothing_of_ours_but_the_errors():
    for path in modules("llama_3"):
        foreign = {name for name in imports(path) if name.split(".")[0] != "llama_3"}
        assert foreign <= {"pipeline.errors"}, path.name


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_subject_and_at_least_three_files(room):
    files = [path for path in modules(room) if path.name != "__init__.py"]
    assert len(files) >= 3
    for path in modules(room):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_there_are_no_cycles_between_modules():
    paths = [PROJECT_DIR / "sae.py", *(path for room in ROOMS for path in modules(room))]
    graph = {".".join(p.relative_to(PROJECT_DIR).with_suffix("").parts): imports(p) for p in paths}
    graph = {name.removesuffix(".__init__"): found for name, found in graph.items() if name != "llama_3.__init__"}
    finished: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module in graph and module not in finished:
            for imported in sorted(graph[module]):
                visit(imported, (*way, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("benchmark", [path.stem for path in modules("benchmarks")])
def test_benchmarks_run_stages_instead_of_importing_them(benchmark):
    scripts = {name.split(".")[0] for name in imports(PROJECT_DIR / "benchmarks" / f"{benchmark}.py")} & set(SCRIPTS)
    assert {(benchmark, script) for script in scripts} <= STAGES_IN_BENCHMARKS


# ---- every locale, every disk

CODE = [path for folder in ("", "benchmarks", *{name.split(".")[0] for name in ROOMS}) for path in modules(folder)]


def reads_text_in_the_locales_encoding(call: ast.Call) -> bool:
    keywords = {keyword.arg for keyword in call.keywords}
    name, owner = getattr(call.func, "attr", getattr(call.func, "id", "")), getattr(call.func, "value", None)
    if "encoding" in keywords or getattr(owner, "id", "") == "blobfile":  # that one's is always UTF-8
        return False
    strings = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    modes = [mode for mode in strings if set(mode) <= set("rwab+")]
    if name == "open":
        return not any("b" in mode for mode in modes) and (owner is None or bool(modes))
    if owner and name in ("read_text", "write_text"):
        return not any(text.lower() in ("utf-8", "utf8") for text in strings)
    return bool(keywords & {"text", "universal_newlines"}) and name in ("run", "Popen", "check_output")


@pytest.mark.parametrize("path", sorted(CODE), ids=lambda path: str(path.relative_to(PROJECT_DIR)))
def test_what_is_text_has_its_encoding_named(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if reads_text_in_the_locales_encoding(node)] == []


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"llama_3_inference_gradio", "llama_3_inference_server"}))
def test_scripts_ask_whether_they_can_write_before_they_work(script):
    tree = ast.parse((PROJECT_DIR / f"{script}.py").read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names & {"require_writable", "locked", "output_folder", "open_journal", "complete_file"}

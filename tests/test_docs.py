"""README, CONTRIBUTING and docs/ against the code: commands and their options, links, the tree, names, fields of files.

A command is parsed with the options of the script it names, so an outdated option or value fails here. Of a script only
the part above its first function is run: its cheap imports and its constants.

    .venv/bin/python -m pytest tests/test_docs.py
"""

import ast
import dataclasses
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import PROJECT_DIR

from embedded import recipe
from latents import tables
from pipeline.errors import InputError
from pipeline.options import parse_constants
from pipeline.source import Source

PAGES = [PROJECT_DIR / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((PROJECT_DIR / "docs").glob("*.md"))
ROOMS = sorted(path.parent for path in PROJECT_DIR.glob("*/__init__.py") if path.parent.name != "tests")
SCRIPTS = [
    path
    for folder in (PROJECT_DIR, *ROOMS, PROJECT_DIR / "benchmarks")
    for path in sorted(folder.glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
]
README_BYTES = 12_000

_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
_OTHERS = ("source", "export", "pip")  # programs in examples that are not ours
_OTHER_MODULES = ("venv", "pytest")
_EXAMPLES = ("my_stage.py",)  # files that do not exist


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT_DIR).as_posix()


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=name_of)


# ---- commands


def code_blocks(page: str, language: str) -> list[str]:
    return [code for found, code in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S) if found == language]


def commands(code: str) -> Iterator[list[str]]:
    """The command lines of shell code, split into words, without comments and the assignments before a command."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        if words:
            yield words


def examples_in(docstring: str) -> str:
    """The indented command lines of a docstring as shell code. Remarks follow after # or several spaces."""
    joined = re.sub(r"\\\n *", " ", docstring)
    lines = re.findall(r"^ {4}((?:[A-Z_]+=\S+ )*(?:\S*python|torchrun|make) .*)$", joined, re.M)
    return "\n".join(re.split(" {4,}", line)[0] for line in lines)


def check_command(words: list[str]) -> Path | None:
    """Fail for a command that does not fit the script or target it names; returns the script, if it is one of ours."""
    program, *rest = words
    program = program.rpartition("/")[2]
    if program == "make":
        targets = [word for word in rest if not _ASSIGNMENT.fullmatch(word)]
        known = re.findall(r"^([\w-]+):", (PROJECT_DIR / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(targets) <= set(known), f"make has no target {targets}"
        return None
    if program == "torchrun":
        at = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        assert all(word.startswith("--") for word in rest[:at]), f"torchrun's own options: {rest[:at]}"
        rest = rest[at:]
    elif program != "python":
        assert program in _OTHERS, f"{program} is not a program that these pages use"
        return None
    if rest[0] == "-m":
        if rest[1] in _OTHER_MODULES:
            return None
        rest = [rest[1].replace(".", "/") + ".py", *rest[2:]]
    script = PROJECT_DIR / rest[0]
    assert script in SCRIPTS, f"there is no script {rest[0]}"
    above = what_stands_above_the_functions(script)
    parse_constants(above, rest[1:], above.get("_COMMANDS"), above.get("_ARGUMENT"))  # raises InputError
    return script


def what_stands_above_the_functions(script: Path) -> dict:
    """The globals of a script after its constants."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    end = (ast.FunctionDef, ast.ClassDef, ast.If)
    is_check = lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    first = next(i for i, node in enumerate(tree.body) if isinstance(node, end) and not is_check(node))
    body = [node for node in tree.body[:first] if not isinstance(node, ast.Expr)]
    module_globals = {"__file__": str(script), "__doc__": ast.get_docstring(tree), "__name__": script.stem}
    sys.path.insert(0, str(script.parent))  # as when a script is run
    try:
        exec(compile(ast.Module(body, []), script, "exec"), module_globals)
    finally:
        sys.path.remove(str(script.parent))
    return module_globals


@each(PAGES)
def test_every_command_fits_the_script_it_names(path):
    for code in code_blocks(path.read_text(encoding="utf-8"), "bash"):
        for words in commands(code):
            check_command(words)


@each(SCRIPTS)
def test_every_example_in_a_docstring_fits_its_script(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    found = [check_command(words) for words in commands(examples_in(docstring))]
    assert path in found or path.stem in ("demo", "reference"), f"{path.name} has no example of its own"


@pytest.mark.parametrize(
    "command",
    [
        "python sae_training.py --no_such_option 1",
        "python sae_training.py --dtype int7",
        "python sae_training.py --k 0",
        "python sae_training.py --encoder_dtype int7",
        "python capture_activations.py --sites layers.6.attention_norm",  # without the option it needs
        "python no_such_script.py",
        "python -m embedded.no_such_module",
        "torchrun --standalone no_such_script.py",
        "make no_such_target",
        "sae_training.py",
    ],
)
def test_a_wrong_command_would_be_found(command):
    with pytest.raises((AssertionError, InputError)):
        check_command(shlex.split(command))


def test_the_python_example_runs(monkeypatch):
    monkeypatch.chdir(PROJECT_DIR)
    (code,) = code_blocks((PROJECT_DIR / "README.md").read_text(encoding="utf-8"), "python")
    found: dict = {}
    exec(code, found)
    assert found["values"].shape[-1] == 32 and found["logits"].isfinite().all()


def test_the_readme_trains_as_the_demo_does():
    def options(words: list[str]) -> dict[str, str]:
        pairs = zip(words, words[1:], strict=False)
        return {a: b for a, b in pairs if a.startswith("--") and not re.search("dir|path|standalone|nproc", a)}

    readme = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
    shown = [words for code in code_blocks(readme, "bash") for words in commands(code) if "sae_training.py" in words]
    demo = next(words for _, words in recipe.stages(recipe.SMOLLM2, Path("run")) if "sae_training.py" in words)
    number = lambda values: {name: float(v) if re.match(r"[\d.]", v) else v for name, v in values.items()}
    assert [number(options(words)) for words in shown] == [number(options(demo))]


# ---- pages


def prose(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    slugs: list[str] = []
    seen: Counter = Counter()
    for heading in re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        slugs.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return set(slugs)


@each(PAGES)
def test_every_link_leads_somewhere(path):
    text = re.sub(r"`[^`\n]*`", "code", prose(path.read_text(encoding="utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{link}: no such heading"


def test_every_page_is_linked_from_the_readme():
    """Or from a page that is."""
    text = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
    linked = [page for page in PAGES[1:] if f"]({name_of(page)}" in text]
    further = "".join(page.read_text(encoding="utf-8") for page in linked if page.parent.name == "docs")
    assert [page.name for page in PAGES[1:] if page not in linked and f"]({page.name}" not in further] == []


def test_the_readme_is_short():
    assert (PROJECT_DIR / "README.md").stat().st_size <= README_BYTES


def test_the_readme_says_early_what_it_has_not_run_on():
    first_screen = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")[:1500]
    assert "has run on a real Llama 3.2 or on a GPU" in first_screen


@each([page for page in PAGES if page.name != "CHANGELOG.md"])
def test_files_and_names_in_the_text_exist(path):
    text = prose(path.read_text(encoding="utf-8"))
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (PROJECT_DIR / file).is_file() or file in _EXAMPLES, f"there is no {file}"
    for file, names in re.findall(r"`([\w/]+\.py)`:\s((?:`\w+`(?:,\s)?)+)", text):
        nodes = ast.walk(ast.parse((PROJECT_DIR / file).read_text(encoding="utf-8")))
        defined = {getattr(node, "name", None) or getattr(node, "id", None) for node in nodes}
        for name in re.findall(r"\w+", names):
            assert name in defined, f"{file} has no {name}"


def tree() -> set[str]:
    """The paths in the tree of CONTRIBUTING.md."""
    section = (PROJECT_DIR / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## The tree\n")[2]
    paths, folder = set(), ""
    for indent, name in re.findall(r"^( *)([\w./-]+)", code_blocks(section, "")[0], re.M):
        paths.add(folder + name if indent else name)
        if not indent:
            folder = name if name.endswith("/") else ""
    return paths


def test_the_tree_is_the_tree():
    shown = tree()
    assert [path for path in sorted(shown) if not (PROJECT_DIR / path).exists()] == []
    folders = (PROJECT_DIR, *ROOMS, PROJECT_DIR / "benchmarks")
    files = [name_of(path) for folder in folders for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert sorted(set(files) - shown) == []


def test_the_architecture_names_every_room():
    page = (PROJECT_DIR / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert all(f"| `{room.name}/` |" in page for room in ROOMS)


# ---- fields of files


def names_on_the_page_of_files() -> set[str]:
    return set(re.findall(r"`(\w+)`", (PROJECT_DIR / "docs" / "files.md").read_text(encoding="utf-8")))


def fields_of(path: Path) -> set[str]:
    if path.suffix == ".parquet":
        return set(pq.read_schema(path).names)
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return {field for line in lines for field in json.loads(line)}
    return set(json.loads(path.read_text(encoding="utf-8")))


REFERENCE_FILES = [
    *sorted((PROJECT_DIR / "llama_3" / "tiny_llama").glob("sae.*.parquet")),
    *sorted((PROJECT_DIR / "latent_index_meaning").glob("*max*.parquet")),
    *(PROJECT_DIR / "llama_3" / "tiny_llama" / f"sae.{name}" for name in ("metrics.jsonl", "evaluation.json", "json")),
]
TABLES = [table for table in vars(tables).values() if isinstance(table, tables.Table)]


@each(REFERENCE_FILES)
def test_the_page_of_files_names_every_field(path):
    assert sorted(fields_of(path) - names_on_the_page_of_files()) == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.suffix)
def test_the_page_of_files_names_every_column(table):
    assert sorted(set(table.schema.names) - names_on_the_page_of_files()) == []


def test_the_page_of_files_names_every_field_of_a_source():
    fields = {field.name for field in dataclasses.fields(Source)} - {"file", "folders"}
    assert sorted(fields - names_on_the_page_of_files()) == []

"""Constants at the top of a script as its options: types, bounds, help; --help of every script answers quickly.

.venv/bin/python -m pytest tests/test_options.py
"""

import importlib.util
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PROJECT_DIR

from embedded.recipe import command
from pipeline.errors import InputError
from pipeline.options import parse_constants
from pipeline.run import run

# ---- constants as options

SCRIPT = '''"""A script.

    python script.py 100 % of the time
"""

from typing import Optional

PATH: str  # where the data is
NAME = "a"  # a name
STEPS = 10_000  # steps, 5% of them warm
RATE = 1 / 4
LIMIT: int | None = None  # a limit, if any
SCALE: Optional[float] = None
FLAG = False  # yes or no
KEEP: bool = True
LAYERS = (1, 2)  # several
SITES: list = ["x", "y"]
_HIDDEN = 3
lower = 4
NESTED = dict(
    a=1,
)["a"]  # on the last line


def function():
    LOCAL = 5
    return LOCAL
'''


def options(path: Path, *argv: str, script: str = SCRIPT) -> dict:
    path = path / "script.py"
    path.write_text(script)
    spec = importlib.util.spec_from_file_location("script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(parse_constants(vars(module), list(argv)))


def test_constants_are_the_defaults(tmp_path):
    assert options(tmp_path, "--path", "p") == {
        "path": "p",
        "name": "a",
        "steps": 10_000,
        "rate": 0.25,
        "limit": None,
        "scale": None,
        "flag": False,
        "keep": True,
        "layers": (1, 2),
        "sites": ["x", "y"],
        "nested": 1,
    }


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--name", "7"], "name", "7"),
        (["--steps", "7"], "steps", 7),
        (["--rate", "7"], "rate", 7.0),
        (["--rate", "1e-5"], "rate", 1e-5),
        (["--limit", "7"], "limit", 7),
        (["--scale", "7"], "scale", 7.0),
        (["--flag"], "flag", True),
        (["--flag", "true"], "flag", True),
        (["--flag", "No"], "flag", False),
        (["--keep", "false"], "keep", False),
        (["--keep", "0"], "keep", False),
        (["--layers", "3", "4", "5"], "layers", [3, 4, 5]),
        (["--sites", "3", "z"], "sites", ["3", "z"]),
    ],
)
def test_an_option_has_its_constants_type(tmp_path, argv, name, value):
    found = options(tmp_path, "--path", "p", *argv)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "required: --path"),
        (["--path", "p", "--steps", "1.5"], "--steps: invalid int value: '1.5'"),
        (["--path", "p", "--limit", "none"], "--limit: invalid int value"),
        (["--path", "p", "--flag", "maybe"], "'maybe' is neither true nor false"),
        (["--pathh", "p"], "unrecognized arguments: --pathh; did you mean --path?"),
        (["--path", "p", "--_hidden", "1"], "unrecognized arguments: --_hidden"),
        (["--path", "p", "--lower", "1"], "unrecognized arguments: --lower"),
        (["--path", "p", "--local", "1"], "unrecognized arguments: --local"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, argv, complaint):
    with pytest.raises(SystemExit) as caught:
        run(lambda: options(tmp_path, *argv))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and complaint in said and said.startswith("error: ") and said.count("\n") == 1


def test_help_is_the_docstring_and_the_comments(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        options(tmp_path, "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "python script.py 100 % of the time",
        "--path PATH where the data is --name",  # a required option has no default
        "--steps STEPS steps, 5% of them warm (default: 10000)",
        "--rate RATE (default: 0.25)",
        "--limit LIMIT a limit, if any (default: None)",
        "--nested NESTED on the last line (default: 1)",
    ):
        assert line in text
    assert "hidden" not in text.lower()


@pytest.mark.parametrize("annotation", ["tuple[int, ...]", "list[int]"])
def test_annotated_sequences_take_several_values(tmp_path, annotation):
    script = f'"""Doc."""\nLAYERS: {annotation} = (1, 2)  # several\n'
    assert list(options(tmp_path, "--layers", "3", "4", script=script)["layers"]) == [3, 4]


def test_annotated_sequences_that_may_be_missing_take_several_values(tmp_path):
    script = '"""Doc."""\nLAYERS: tuple[int, ...] | None = None  # several\n'
    assert options(tmp_path, script=script) == {"layers": None}
    assert options(tmp_path, "--layers", "3", "4", script=script) == {"layers": [3, 4]}


def test_help_shows_defaults_with_percent_and_hash(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options(tmp_path, "--help", script='"""Doc."""\nNAME = "#1, 50%s"  # a name\n')
    assert "--name NAME a name (default: #1, 50%s)" in " ".join(capsys.readouterr().out.split())


# ---- bounds and choices

BOUNDED = '''"""Doc."""
from typing import Literal
from pipeline.options import Count, CountOrZero, NotNegative, Port, Positive, Seed, Share, ShareBelowOne, Size

COUNT: Count = 1
ZERO: CountOrZero = 0
RATE: Positive = 1.0
DECAY: NotNegative = 0.0
SHARE: Share = 1.0
HELD_OUT: ShareBelowOne = 0.0
PORT: Port = 7860
SEED: Seed | None = None
BETAS: tuple[Share, Share] = (0.9, 0.99)
LAYERS: tuple[Count, ...] = (1,)
KIND: Literal["mean", "max"] = "max"
PLAIN = 1.5
SIZE: Size = 1.0
'''


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("count", ["0"], "--count 0 is too small; it must be at least 1."),
        ("zero", ["-1"], "--zero -1 is too small; it must be at least 0."),
        ("rate", ["0"], "--rate 0.0 is too small; it must be above 0."),
        ("decay", ["-0.5"], "--decay -0.5 is too small; it must be at least 0."),
        ("share", ["1.01"], "--share 1.01 is too large; it must be at most 1."),
        ("held_out", ["1"], "--held_out 1.0 is too large; it must be below 1."),
        ("port", ["65536"], "--port 65536 is too large; it must be at most 65535."),
        ("seed", ["-1"], "--seed -1 is too small; it must be at least 0."),
        ("betas", ["0.5", "2"], "--betas 2.0 is too large; it must be at most 1."),
        ("betas", ["0.5"], "--betas has 1 values but takes 2; correct it."),
        ("layers", ["3", "0"], "--layers 0 is too small; it must be at least 1."),
        ("kind", ["last"], "--kind last is unknown; write mean or max."),
        ("plain", ["nan"], "--plain nan is not a finite number; give one."),
        (
            "seed",
            [str(2**63)],
            "--seed 9223372036854775808 is too large; a whole number is at most 9223372036854775807.",
        ),
        ("count", ["1" + "0" * 400], f"--count 1{'0' * 400} is too large; a whole number is at most {2**63 - 1}."),
        ("size", ["1e300"], "--size 1e+300 is too large; it must be at most 1e+09."),
        ("rate", ["inf"], "--rate inf is not a finite number; give one."),
    ],
)
def test_a_value_out_of_bounds_is_refused(tmp_path, name, values, complaint):
    with pytest.raises(InputError) as caught:
        options(tmp_path, f"--{name}", *values, script=BOUNDED)
    assert str(caught.value) == complaint


def test_values_within_bounds_and_defaults_are_taken(tmp_path):
    assert options(tmp_path, script=BOUNDED)["seed"] is None
    found = options(tmp_path, "--share", "0", "--betas", "0", "1", "--kind", "mean", "--seed", "0", script=BOUNDED)
    assert (found["share"], list(found["betas"]), found["kind"], found["seed"]) == (0, [0, 1], "mean", 0)


def test_a_default_out_of_bounds_is_refused_too(tmp_path):
    with pytest.raises(InputError, match="--count 0 is too small"):
        options(tmp_path, script=BOUNDED.replace("COUNT: Count = 1", "COUNT: Count = 0"))


def test_help_names_the_choices(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options(tmp_path, "--help", script=BOUNDED)
    assert "(one of mean, max; default: max)" in " ".join(capsys.readouterr().out.split())


# ---- the scripts

SCRIPTS = sorted(path.name for path in PROJECT_DIR.glob("*.py") if "parse_constants(" in path.read_text())
MODULES = ["embedded/corpus.py", "embedded/training.py"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_help_of_every_script_answers_within_3_seconds(script):
    """In a terminal that has ASCII alone, too."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    best = float("inf")
    for _ in range(3):  # a busy machine is not a slow script
        begin = time.perf_counter()
        found = subprocess.run(
            [*command(script), "--help"], cwd=PROJECT_DIR, env=environment, capture_output=True, text=True, timeout=60
        )
        best = min(best, time.perf_counter() - begin)
        assert found.returncode == 0, found.stderr
        assert found.stdout.startswith(f"usage: {Path(script).name}") and not found.stderr
        if best < 3:
            break
    assert best < 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_seed_is_declared_one(script):
    source = (PROJECT_DIR / script).read_text(encoding="utf-8")
    assert "\nSEED" not in source or "\nSEED: Seed = " in source

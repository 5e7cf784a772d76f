"""Every benchmark starts as its docstring shows, from any folder; and tests of what they share.

.venv/bin/python -m pytest tests/test_benchmarks.py
"""

import os
import subprocess
import sys

import pytest
from conftest import PROJECT_DIR

BENCHMARKS = sorted((PROJECT_DIR / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in BENCHMARKS if path.stem != "common"], ids=lambda path: path.stem)
def test_help(path, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, path, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"benchmarks/{path.name}" in done.stdout and "(default: " in done.stdout


def test_what_they_share(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT_DIR / "benchmarks")
    import common

    seconds = {"ours": [2.0, 1.0, 4.0], "theirs": [3.0, 3.0, 3.0]}
    assert common.median_rates(6, seconds) == {"ours": 3.0, "theirs": 2.0} and common.spread(seconds) == 4.0
    took, found = common.timed(divmod, 7, 2)
    assert took >= 0 and found == (3, 1)
    assert "cores" in common.machine() and common.processor() in common.machine()

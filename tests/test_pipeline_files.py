"""What every stage shares: one-sentence errors, atomic files, the folder lock, manifests, work ahead.

.venv/bin/python -m pytest tests/test_pipeline_files.py
"""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT_DIR

from pipeline.activation_store import open_shard, write_shard
from pipeline.errors import InputError, Stop
from pipeline.files import atomic_path, locked, read_json, require_disk, require_writable, sha256, utf8_path, write_json
from pipeline.manifests import (
    FORMAT_VERSION,
    begin_or_continue,
    check_files,
    check_sum,
    output_folder,
    read_manifest,
    verifying,
    write_manifest,
)
from pipeline.progress import duration, gb
from pipeline.run import run
from pipeline.workers import ahead

PYTHON = [sys.executable, "-c"]


def python(source: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
    command = [*PYTHON, textwrap.dedent(source), *args]
    return subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, timeout=60, **kwargs)


# ---- errors


@pytest.mark.slow
def test_bad_input_is_one_sentence_and_exit_code_2():
    found = python(
        """
        from pipeline.errors import InputError, Stop
        from pipeline.run import run
        def main():
            print("begun")
            raise InputError("No a.json in b; run c.py first.")
        run(main)
        """
    )
    assert (found.returncode, found.stderr) == (2, "error: No a.json in b; run c.py first.\n")
    assert found.stdout == "begun\n"


def test_an_interrupt_exits_with_130_and_says_how_to_continue(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 130 and "run the same command again" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


@pytest.mark.parametrize("rank", [0, 3])
def test_under_torchrun_rank_0_speaks_first_and_nobody_waits_for_the_group(monkeypatch, capsys, rank):
    slept = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(f"at once {code}")))

    def main():
        raise InputError("Wrong.")

    with pytest.raises(SystemExit, match="at once 2"):
        run(main)
    assert bool(slept) == (rank > 0)
    assert capsys.readouterr().err == "error: Wrong.\n"


# ---- files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_renames_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # the same disk, so that renaming is atomic
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one" and names(path.parent) == ["a.txt"]
    with atomic_path(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_leaves_nothing_behind_after_an_exception(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_full_disk_stops_the_run(tmp_path):
    with (
        pytest.raises(Stop, match="Could not write .*a.txt .*No space left"),
        atomic_path(tmp_path / "a.txt") as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_on_a_read_only_disk_the_error_is_not_hidden_and_its_fix_not_more_disk(tmp_path, monkeypatch):
    """There the removal of the temporary file fails as well."""
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(Stop, match="Could not write .*Read-only file system.*; fix that and run again"):  # noqa: SIM117
        with atomic_path(tmp_path / "a.txt"):
            read_only()
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(Stop, match="Read-only"), atomic_path(tmp_path / "new" / "a.txt"):
        pass


def test_require_writable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    require_writable(tmp_path / "file", tmp_path / "new" / "newer" / "a.txt")
    assert names(tmp_path) == ["file", "folder"]  # nothing is made
    for path, reason in (("folder", "Is a directory"), ("file/a.txt", "Not a directory")):
        with pytest.raises(InputError, match=f"{tmp_path}/{path} cannot be written .{reason}.; make it writable"):
            require_writable(tmp_path / "b.txt", tmp_path / path)
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(InputError, match="a.txt cannot be written .Read-only file system.; .* in another folder"):
        require_writable(tmp_path / "a.txt")


def test_json_with_a_byte_order_mark_and_of_names_that_are_not_utf8(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text('{"a": "ä"}', encoding=encoding)
        assert read_json(tmp_path / "a.json", "mend.") == {"a": "ä"}
    value = {"folder": os.fsdecode(b"caf\xe9 \xc3\xa9")}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "mend.") == value
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "folder": "caf\\udce9 é"\n}\n'


def test_tensors_in_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_shard(folder / "a.safetensors", {"acts": torch.ones(2)})
    assert open_shard(folder / "a.safetensors", "b.py").get_tensor("acts").tolist() == [1, 1]
    torch.save({"a": torch.ones(2)}, folder / "a.pt")
    with utf8_path(folder / "a.pt") as name:
        assert torch.load(name, mmap=True)["a"].tolist() == [1, 1]


def test_what_the_terminal_cannot_show_is_printed_as_escapes(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    monkeypatch.setattr(sys, "stdout", out)
    run(lambda: print(os.fsdecode(b"caf\xe9"), "é文\U0001f600", flush=True))
    assert out.buffer.getvalue().decode("gbk") == "caf\\udce9 é文\\U0001f600\n"


def test_json_round_trip(tmp_path):
    value = {"b": [None, True, 0.1, 2**70], "a": {"\u4e2d\U0001f600": '"\\\n\0'}}
    write_json(tmp_path / "a.json", value)
    found = read_json(tmp_path / "a.json", "mend.")
    assert found == value and list(found) == ["b", "a"]
    assert "\u4e2d\U0001f600" in (tmp_path / "a.json").read_text()  # for people to read


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_broken_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}/a.json cannot be read .*; make it again."):
        read_json(tmp_path / "a.json", "make it again.")
    with pytest.raises(InputError, match=f"No b.json in {tmp_path}; make it."):
        read_json(tmp_path / "b.json", "make it.")


def test_require_disk(tmp_path):
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(Stop, match="not/yet needs about 1000000000.00 GB but its disk has"):
        require_disk(tmp_path / "not" / "yet", 10**18)


def test_words_for_sizes_and_times():
    assert [gb(n) for n in (2e6, 99e6, 1e8, 3.2e12)] == ["2.00 MB", "99.00 MB", "0.10 GB", "3200.00 GB"]
    assert [duration(s) for s in (0, 59.4, 60, 3599, 3600, 90061)] == [
        "0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "25 h 1 min",
    ]  # fmt: skip


# ---- the lock

HOLD = """
import sys, time
from pipeline.files import locked
from pipeline.run import run
def main():
    with locked(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
run(main)
"""


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([*PYTHON, HOLD, str(tmp_path), "60"], cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (tmp_path / ".a.txt.1.tmp").write_text("half")
        second = python(HOLD, str(tmp_path), "0")
        assert second.returncode == 2 and second.stdout == ""
        assert second.stderr.startswith(f"error: {tmp_path} is in use by another process;")
        with pytest.raises(InputError, match="in use"), locked(tmp_path):
            pass
        assert names(tmp_path) == [
            ".a.txt.1.tmp",
            ".lock",
            ".workers.lock",
        ]  # the refused run left the holder's files alone
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with locked(tmp_path):
        assert names(tmp_path) == [".lock", ".workers.lock"]  # and the killed run's half file is removed
    with locked(tmp_path):
        pass


def test_the_ranks_of_one_run_share_the_lock(tmp_path):
    entered = []
    with locked(tmp_path, rank=0, barrier=lambda: entered.append("barrier")):
        with locked(tmp_path, rank=1):
            entered.append("rank 1")
        with pytest.raises(InputError, match="in use"), locked(tmp_path, rank=0):
            pass
    with locked(tmp_path, rank=1), pytest.raises(InputError), locked(tmp_path):
        pass  # a worker that outlived its run keeps others out
    assert entered == ["barrier", "rank 1"]


def test_the_lock_ends_with_an_exception(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


# ---- manifests


def test_manifest_round_trip(tmp_path):
    written = write_manifest(tmp_path / "out", "a.py", complete=True, d_model=6, name="\u4e2d")
    found = read_manifest(tmp_path / "out", "a.py")
    assert found == written and found["d_model"] == 6 and found["name"] == "\u4e2d"
    assert {"format_version", "stage", "complete", "git_commit", "written_at"} <= found.keys()


def changed_manifest(**changes) -> str:
    return json.dumps({"format_version": FORMAT_VERSION, "stage": "a.py", "complete": True} | changes)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No manifest.json in {folder}; run a.py to make it."),
        ("{", "{folder}/manifest.json cannot be read ("),
        ("[1]", "{folder}/manifest.json is from something else, not from a.py;"),
        (changed_manifest(stage="b.py"), "{folder}/manifest.json is from b.py, not from a.py;"),
        (changed_manifest(format_version=9), "{folder}/manifest.json has format version 9, this code reads"),
        (changed_manifest(complete=False), "{folder} is not complete; run a.py again"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path, "a.py")
    assert str(caught.value).startswith(complaint.format(folder=tmp_path))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"no folder {tmp_path}/out; run a.py"):
        read_manifest(tmp_path / "out", "a.py")


DECIDES = {"seed": 1, "files": [("a", 3), ("b", 4)], "rate": 0.5, "model": None}


def test_begin_then_continue_then_complete(tmp_path):
    folder = tmp_path / "out"
    assert begin_or_continue(folder, "a.py", DECIDES) is False
    with pytest.raises(InputError, match="not complete"):
        read_manifest(folder, "a.py")
    (folder / "shard-00000.bin").touch()
    assert begin_or_continue(folder, "a.py", dict(reversed(DECIDES.items()))) is False
    write_manifest(folder, "a.py", complete=True, decides=DECIDES)
    assert begin_or_continue(folder, "a.py", DECIDES) is True


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 2}, "begun with seed = 1, but now it is 2;"),
        ({"files": [("a", 3)]}, "begun with files = [['a', 3], ['b', 4]], but now it is [['a', 3]];"),
        ({"model": "m"}, "begun with model = None, but now it is 'm';"),
        ({"extra": 5}, "begun with extra = None, but now it is 5;"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_a_folder_begun_otherwise_is_refused_by_the_differing_field(tmp_path, change, complaint, complete):
    write_manifest(tmp_path, "a.py", complete=complete, decides=DECIDES)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError) as caught:
        begin_or_continue(tmp_path, "a.py", DECIDES | change)
    assert f"{tmp_path} was {complaint}" in str(caught.value)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_folder_of_another_stage_or_of_other_files_is_refused(tmp_path):
    write_manifest(tmp_path / "theirs", "b.py", complete=False, decides=DECIDES)
    with pytest.raises(InputError, match=f"{tmp_path}/theirs"):
        begin_or_continue(tmp_path / "theirs", "a.py", DECIDES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds other files \(thesis.tex, ...\) but no manifest.json"):
        begin_or_continue(tmp_path / "full", "a.py", DECIDES)
    assert names(tmp_path / "full") == ["thesis.tex"]


def test_an_output_folder_is_held_begun_continued_and_complete(tmp_path, capsys, monkeypatch):
    folder, shard = tmp_path / "out", {"file": "s.bin", "bytes": 10}
    with output_folder(folder, "a.py", DECIDES, 10) as complete:
        assert complete is False
        with pytest.raises(InputError, match="in use"), output_folder(folder, "a.py", DECIDES, 10):
            pass
        (folder / "s.bin").write_bytes(bytes(10))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with output_folder(folder, "a.py", DECIDES, 1010) as complete:  # 10 bytes are on disk, and the manifest
        assert complete is False
        write_manifest(folder, "a.py", complete=True, decides=DECIDES, shards=[shard])
    assert "already complete" not in capsys.readouterr().out
    with output_folder(folder, "a.py", DECIDES, 10**9) as complete:  # nothing is to be written
        assert complete is True
    assert capsys.readouterr().out == f"{folder} is already complete.\n"
    with (
        pytest.raises(InputError, match="begun with seed = 1"),
        output_folder(folder, "a.py", {**DECIDES, "seed": 2}, 0),
    ):
        pass
    (folder / "s.bin").unlink()
    with pytest.raises(InputError, match=r"s\.bin is missing"), output_folder(folder, "a.py", DECIDES, 0):
        pass


def test_an_output_folder_without_room_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with (
        pytest.raises(Stop, match="free some or write elsewhere"),
        output_folder(tmp_path / "out", "a.py", DECIDES, 1001),
    ):
        pass
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_and_truncated_shards_are_refused_by_name(tmp_path):
    shards = [{"file": f"s-{i}.bin", "bytes": 10 + i} for i in range(3)]
    for shard in shards:
        (tmp_path / shard["file"]).write_bytes(bytes(shard["bytes"]))
    check_files(tmp_path, shards, "a.py")
    os.truncate(tmp_path / "s-1.bin", 4)
    with pytest.raises(InputError, match=f"{tmp_path}/s-1.bin has 4 bytes instead of 11; .* run a.py again"):
        check_files(tmp_path, shards, "a.py")
    (tmp_path / "s-1.bin").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}/s-1.bin is missing; remove {tmp_path} and run a.py again"):
        check_files(tmp_path, shards, "a.py")


@pytest.fixture
def shards(tmp_path) -> list[dict]:
    records = []
    for i in range(3):
        path = tmp_path / f"s-{i}.bin"
        path.write_bytes(bytes([i]) * 1000)
        records.append({"file": path.name, "bytes": 1000, "sha256": sha256(path)})
    return records


@pytest.mark.parametrize("damage", ["a flipped bit", "another shard", "gone"])
def test_an_altered_shard_is_refused_by_name(tmp_path, shards, damage):
    path = tmp_path / "s-1.bin"
    content = {"a flipped bit": bytes([1]) * 999 + b"\0", "another shard": (tmp_path / "s-2.bin").read_bytes()}
    path.unlink() if damage == "gone" else path.write_bytes(content[damage])
    check_sum(tmp_path, shards[0], "a.py")
    expected = "cannot be read" if damage == "gone" else "was altered or is from another run"
    with pytest.raises(InputError, match=f"{path} {expected}.*run a.py again"):
        check_sum(tmp_path, shards[1], "a.py")


def test_verifying_lets_the_caller_work_and_tells_when_asked(tmp_path, shards):
    with verifying(tmp_path, shards, "a.py") as verified:
        verified()
    (tmp_path / "s-2.bin").write_bytes(bytes(1000))
    worked = []
    with (
        pytest.raises(InputError, match=r"s-2\.bin was altered"),
        verifying(tmp_path, shards, "a.py") as verified,
    ):
        worked.append(1)
        verified()
    assert worked


def test_verifying_does_not_hold_up_an_error(tmp_path, shards, monkeypatch):
    """Files not read yet are left unread: there may be a terabyte of them."""
    seen = []
    monkeypatch.setattr("pipeline.manifests.check_sum", lambda *args: seen.append(args) or time.sleep(0.1))
    with pytest.raises(KeyError), verifying(tmp_path, shards * 100, "a.py"):
        raise KeyError
    assert len(seen) <= 8  # a few threads each had begun one


def test_verifying_uses_several_threads(tmp_path, shards, monkeypatch):
    both = threading.Barrier(2, timeout=20)  # passed only when two files are read at once
    monkeypatch.setattr("pipeline.manifests.check_sum", lambda *args: both.wait())
    with verifying(tmp_path, [*shards, *shards][:4], "a.py") as verified:
        verified()


def test_ahead_keeps_order_and_is_bounded():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        return item * 2

    found = []
    for value in ahead(work, range(50), 4):
        found.append(value)
        assert len(begun) <= len(found) + 5  # 4 ahead, and the one handed out
    assert found == [2 * i for i in range(50)]


def test_ahead_raises_where_the_result_is_read():
    def work(item):
        if item == 3:
            raise InputError("Bad item 3.")
        return item

    results = ahead(work, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="Bad item 3"):
        next(results)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out cannot be written to"), locked(tmp_path / "file" / "out"):
        pass

"""llama_3_inference.py with the embedded model, in a terminal (Python's pty), in pipes and from file to file.

What it prints and writes is compared with `complete` of each prompt alone, and with the model's activations.

.venv/bin/python -m pytest tests/test_terminal.py
"""

import codecs
import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT_DIR
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipeline_runs import as_flags, call, refusal

import llama_3_inference as inference
from latents.origin import read_info
from llama_3 import generation, load_model, load_tokenizer
from llama_3.chat import Message, encode_dialogue
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import stream_chat
from pipeline.errors import InputError
from sae import load_sae_model
from serving import prompt_files
from serving.modes import steering_defaults
from serving.steered_model import latent_meanings
from serving.steering import Steering, highest_activations, make_steering

pytestmark = pytest.mark.slow  # each test starts the script anew

SCRIPT = inference.__file__
DEFAULT = steering_defaults(read_info(Path(TINY_LLAMA_DIR) / "sae.pth"), "sae.json")
LATENT = 747  # named state; steering changes every text here
TEXTS = ["The file is", "If", "再见 é", "Returns a list of all the names in the module"]
SAMPLED = {"temperature": 0.9, "top_p": 0.95}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module", autouse=True)
def tiny_llama():
    """The model when none is named, as where SmolLM2 was not fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "LLAMA_MODEL_DIR", TINY_LLAMA_DIR)
        yield


@pytest.fixture(scope="module")
def model():
    return load_model(TINY_LLAMA_DIR, packed=True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_LLAMA_DIR)


@pytest.fixture(scope="module")
def sae():
    return load_sae_model(Path(TINY_LLAMA_DIR) / "sae.pth")


@pytest.fixture(scope="module")
def alone(model, tokenizer, sae):
    """alone(texts, n, temperature, ...): the completion of each text by itself; with a strength, steered."""

    def complete(texts, n, strength=None, seed=0, **options):
        steering = None
        if strength is not None:
            highest = highest_activations(Path(TINY_LLAMA_DIR) / "sae.pth")
            steering = make_steering(sae, Steering({LATENT: strength}), highest, tokenizer.bos_id)
        return [
            generation.complete(
                model, tokenizer, [text], max_new_tokens=n, seeds=[seed * 1_000_003 + i], steering=steering, **options
            )[0]
            for i, text in enumerate(texts)
        ]

    return complete


def rows_of(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def plain(text: str) -> str:
    """Without a terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def words(table: str) -> str:
    return " ".join(re.sub(r"[│┃]", " ", table).split())


# ---- a terminal


class Terminal:
    """The real command in its own pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 100, **environment: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            changes = {"COLUMNS": str(columns), "LINES": "30", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
            os.chdir(PROJECT_DIR)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore Ctrl-C
            command = [sys.executable, SCRIPT, *arguments, "--llama_model_dir", TINY_LLAMA_DIR]
            os.execve(sys.executable, command, os.environ | changes | environment)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""

    def read(self) -> bool:
        """Read the next output; False at the end."""
        ready, _, _ = select.select([self.fd], [], [], 40)
        assert ready, f"nothing more came after {self.text!r}"
        try:
            piece = os.read(self.fd, 65536)
        except OSError:  # the other side has closed
            return False
        self.text += self.decoder.decode(piece)
        return bool(piece)

    def read_until(self, wanted: str) -> str:
        """Its output up to the first `wanted`."""
        while wanted not in plain(self.text):
            assert self.read(), f"it ended before {wanted!r} came: {self.text!r}"
        before, _, self.text = plain(self.text).partition(wanted)
        return before

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def interrupt(self) -> None:
        time.sleep(0.2)  # until it waits again: a signal that comes just before is noticed at the next key
        self.type(CTRL_C)

    def exit_code(self) -> int:
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def terminal(*arguments: str, **how):
    session = Terminal(*arguments, **how)
    try:
        yield session
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(session.pid, signal.SIGKILL)
            os.waitpid(session.pid, 0)
        os.close(session.fd)


PROMPT = "\n> "
CTRL_C, CTRL_D = "\x03", "\x04"
PASTE = "\x1b[200~{}\x1b[201~"


def cells_of(shown: str, width: int) -> list[list[str]]:
    """The words in each cell of the last table, row by row, its header first."""
    table = shown[shown.rindex("┏") :]
    assert {len(line) for line in table.splitlines()} == {width}
    rows = []
    for lines in re.split("[┏┡├└].*\n?", table)[1:-1]:
        cells = [re.split("[│┃]", line)[1:-1] for line in lines.splitlines()]
        rows.append([words(" ".join(column)) for column in zip(*cells, strict=True)])
    return rows


def test_text_in_a_terminal(alone):
    """A dropped line, prompts pasted together, side by side, Ctrl-C in a completion, a too long prompt, Ctrl-D."""
    texts = TEXTS[:2]
    clean, steered = alone(texts, 60, **GREEDY), alone(texts, 60, strength=DEFAULT.strength, **GREEDY)
    assert all(one != other for one, other in zip(clean, steered, strict=True))
    whole = [[words(t + one), words(t + other)] for t, one, other in zip(texts, clean, steered, strict=True)]
    flags = {"latents": LATENT, "max_new_tokens": 60, "temperature": 0}
    with terminal("text", *as_flags(flags), columns=70) as session:
        session.read_until(PROMPT)
        session.type("not this")
        session.read_until("not this")
        session.interrupt()
        session.read_until(PROMPT)
        session.type(PASTE.format("\n".join(texts)) + "\r")
        session.read_until(PROMPT)
        session.type("\r")
        assert cells_of(session.read_until(PROMPT), 70) == [["clean", "steered"], *whole]
        session.type(texts[0] + "\r\r")
        session.read_until("┏")
        session.type(CTRL_C)
        _, begun = cells_of(session.read_until(PROMPT), 70)
        assert all(w.startswith(some) and w != some for w, some in zip(whole[0], begun, strict=True))
        session.type("1 " * 300 + "\r\r")
        session.read_until("error: '1 1 1 ")
        session.read_until(PROMPT)
        session.type("The file\r" + CTRL_D)  # it finishes the request before it quits
        session.read_until("└")
        assert session.exit_code() == 0


def test_chat_in_a_terminal(tokenizer):
    """Ctrl-C at the prompt and in an answer, a full context, a too long message; the session continues."""
    first, second = "What is a file?", "Why?" + " really" * 25
    room = 256 - 180
    n_tokens = [len(encode_dialogue(tokenizer, [Message("user", text)])) for text in (first, second)]
    assert max(n_tokens) <= room < sum(n_tokens)
    flags = {"max_new_tokens": 180, "temperature": 0, "show_latents": 2}
    with terminal("chat", *as_flags(flags), columns=60, TERM="dumb") as session:
        session.read_until(PROMPT)
        session.interrupt()
        session.read_until(PROMPT)
        session.type(first + "\r")
        session.read_until(first)
        session.interrupt()
        session.read_until("'<|begin_of_tex")
        lines = session.read_until(PROMPT).splitlines()
        assert n_tokens[0] <= len(lines) < n_tokens[0] + 180 and max(map(len, lines)) <= 60
        session.type(second + "\r")
        session.read_until("The context is full; the oldest messages were forgotten.")
        session.read_until(PROMPT)
        session.type("1 " * 300 + "\r")
        session.read_until("error: A prompt of ")
        session.read_until(PROMPT)
        session.type(CTRL_D)
        assert session.exit_code() == 0


# ---- pipes


def run_piped(monkeypatch, capsys, text: str | bytes, **options) -> str:
    """What the script prints when `text` is piped in."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n"))
    command = options.pop("command", "text")
    monkeypatch.setattr(sys, "argv", [SCRIPT, command, *as_flags(options)])
    capsys.readouterr()
    inference.main()
    return capsys.readouterr().out


def printed(texts, *columns) -> str:
    lines = []
    for text, *completions in zip(texts, *columns, strict=True):
        lines.append(repr(text))
        lines += [f"  {kind:8} {c!r}" for kind, c in zip(("clean", "steered"), completions, strict=False)]
    return "".join(line + "\n" for line in lines)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_piped_prompts_are_completed_in_order_whatever_the_batch(monkeypatch, capsys, alone, batch_size):
    text = "\n\n".join(TEXTS) + "\r\n \n"
    options = {"max_new_tokens": 10, "seed": 3, "batch_size": batch_size, **SAMPLED}
    found = run_piped(monkeypatch, capsys, text, **options, latents=LATENT, strengths=2.0)
    own = {"seed": 3, **SAMPLED}
    clean, steered = alone(TEXTS, 10, **own), alone(TEXTS, 10, strength=2.0, **own)
    assert found == printed(TEXTS, clean, steered)
    assert clean != steered


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(monkeypatch, capsys):
    texts = [run_piped(monkeypatch, capsys, mark + "The file", max_new_tokens=2) for mark in ("\ufeff", "")]
    assert texts[0] == texts[1]
    chats = [run_piped(monkeypatch, capsys, mark + "\n", command="chat") for mark in ("\ufeff", "")]
    assert chats[0] == chats[1]  # an empty message in both


def test_seeds_of_a_clock_and_beyond(monkeypatch, capsys):
    for seed in (1764064920123456789, 2**63 - 1):
        assert run_piped(monkeypatch, capsys, "The file", max_new_tokens=2, seed=seed)
    with pytest.raises(InputError, match=f"--seed {2**63} is too large"):
        run_piped(monkeypatch, capsys, "The file", seed=2**63)


def test_latents_of_generated_tokens(capsys, model, tokenizer, sae, alone):
    """Every token with its latents and their names, in columns; steered ones from the first difference on."""
    options = {"max_new_tokens": 12, "temperature": 0, "latents": LATENT, "show_latents": 3}
    call(inference, prompts=["The file is"], **options)
    head, clean, steered = re.split(r"latents of 'The file is', .*\n", capsys.readouterr().out)
    texts = [alone(["The file is"], 12, strength=strength, **GREEDY)[0] for strength in (None, DEFAULT.strength)]
    assert head == printed(["The file is"], *[[text] for text in texts])
    meanings = latent_meanings(str(Path(TINY_LLAMA_DIR) / "sae.pth"))
    expected = []
    for text in texts:
        ids = tokenizer.encode("The file is" + text, bos=True)
        values, indices = sae.encode(model.activations(torch.tensor([ids]), sae.info["site"])[0])
        rows = [["'<|begin_of_tex…"]]
        for token, value, index in zip(ids[1:], values[1:].tolist(), indices[1:].tolist(), strict=True):
            best = sorted(zip(value, index, strict=True), reverse=True)[:3]
            rows.append([repr(tokenizer.decode([token])), *(f"{i} {v:.2f} {meanings[i]}" for v, i in best)])
        expected.append([" ".join(" ".join(row).split()) for row in rows])
    assert [words(line) for line in clean.splitlines()] == expected[0]
    same = len(os.path.commonprefix(expected))
    assert 4 <= same < len(expected[1])
    assert [words(line) for line in steered.splitlines()] == expected[1][same:]
    assert len({re.search(r" \d+\.\d\d ", line).start() for line in steered.splitlines()}) == 1  # aligned


@pytest.mark.parametrize("columns", [20, 33, 80, 200])
@pytest.mark.parametrize("n", [1, 8, 32, 64])
def test_numbers_stay_whole_in_a_narrow_window(monkeypatch, tokenizer, columns, n):
    """All latents of a token, in order, on as many lines as they need; no line is wider than the window."""
    from rich.cells import cell_len

    values = [1234.5 if i == 0 else 100.25 / i for i in range(n)]
    latents = [(97 * i % 4096, value) for i, value in enumerate(values)]
    meanings = dict.fromkeys((latent for latent, _ in latents[::2]), "再见 and words of that kind")
    rows = [("<|begin_of_text|>", []), ("再 long token", latents), ("a", latents[:1])]
    monkeypatch.setattr(inference, "strongest_latents", lambda *_: rows)
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "25")  # else rich takes a dumb terminal for 80 columns wide
    monkeypatch.setenv("TERM", "dumb")
    sae = SimpleNamespace(n_latents=4096)
    opened = SimpleNamespace(need_sae=lambda: sae, meanings=meanings)
    inference.print_latents(opened, [1, 2, 3], n, [])
    lines = screen.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= columns
    found = [(int(latent), value) for latent, value in re.findall(r"(\d+) (\d+\.\d\d)(?= |$)", "\n".join(lines), re.M)]
    assert found == [(latent, f"{value:.2f}") for latent, value in [*latents, latents[0]]]
    assert len(lines) == 2 + -(-n // max(1, len(re.findall(r"\d\.\d\d", lines[1]))))


def test_piped_chat_prints_answers_alone(monkeypatch, capsys, model, tokenizer):
    questions = ["What is a file?", "And a list?"]
    options = {"max_new_tokens": 12, "temperature": 0, "system": "Be brief.", "date": "none"}
    found = run_piped(monkeypatch, capsys, "\n\n".join(questions), command="chat", **options)
    messages, expected = [Message("system", "Be brief.")], ""
    for question in questions:
        messages.append(Message("user", question))
        steps = stream_chat(model, tokenizer, [messages], None, max_new_tokens=12)
        messages.append(Message("assistant", "".join(piece for (piece,) in steps)))
        expected += messages[-1].content + "\n"
    assert found == expected


def test_a_model_cannot_send_control_characters_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("serving.engine.Engine.tokens", lambda *_: iter([(0, byte) for byte in b"a\x1b[2J\x07\tb\n"]))
    monkeypatch.setattr("llama_3.tokenizer.TiktokenTokenizer.decode", lambda self, ids: "".join(map(chr, ids)))
    assert run_piped(monkeypatch, capsys, "x", command="chat") == "a␛[2J␇\tb\n\n"


def test_nothing_piped_in_is_nothing_to_do(monkeypatch, capsys):
    assert run_piped(monkeypatch, capsys, "\n") == run_piped(monkeypatch, capsys, "", command="chat") == ""


@pytest.mark.parametrize("command", ["text", "chat"])
def test_refuses_piped_bytes_that_are_no_text(monkeypatch, capsys, command):
    with pytest.raises(inference.InputError, match="utf-8"):
        run_piped(monkeypatch, capsys, b"caf\xe9\n", command=command)


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        call(inference, prompts=TEXTS, max_new_tokens=2)


def test_a_terminal_that_lacks_characters(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    call(inference, prompts=["再"], max_new_tokens=1, temperature=0)
    assert out.buffer.getvalue().decode("ascii").startswith("'?'\n  clean ")


# ---- files


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_file(tmp_path, alone, tokenizer, sampling, batch_size):
    (tmp_path / "in.txt").write_bytes(("\ufeff" + "\r\n\n".join(TEXTS)).encode())
    output = tmp_path / "new" / "out.jsonl"
    options = {"input_path": tmp_path / "in.txt", "max_new_tokens": 9, "batch_size": batch_size, **sampling}
    call(inference, output_path=output, **options, latents=LATENT, strengths=2)
    rows = rows_of(output)
    assert [row["prompt"] for row in rows] == TEXTS
    assert [row["completion"] for row in rows] == alone(TEXTS, 9, strength=2.0, **sampling)
    for i, row in enumerate(rows):
        assert row["n_prompt_tokens"] == len(tokenizer.encode(TEXTS[i], bos=True))
        assert row["seed"] == i
        assert row["steering"] == {"mode": DEFAULT.mode, "keep_error": True, "strengths": {str(LATENT): 2.0}}
        assert row["stopped"] == (row["n_tokens"] < 9)
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]  # nothing else stays


def test_a_seed_repeats_a_line_alone(tmp_path, model, tokenizer):
    """A line contains enough to repeat its completion."""
    rows = [{"prompt": text, "id": i} for i, text in enumerate(TEXTS)]
    write_lines(tmp_path / "in.jsonl", rows)
    call(inference, input_path=tmp_path / "in.jsonl", output_path=tmp_path / "out.jsonl", max_new_tokens=7, seed=5)
    for row in rows_of(tmp_path / "out.jsonl"):
        options = {"max_new_tokens": 7, "temperature": inference.TEMPERATURE, "top_p": inference.TOP_P}
        again = generation.complete(model, tokenizer, [row["prompt"]], seeds=[row["seed"]], **options)
        assert again == [row["completion"]] and row["id"] == TEXTS.index(row["prompt"])


def test_chat_file(tmp_path, model, tokenizer):
    dialogue = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", "What is a file?")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in dialogue]},
        {"prompt": "What is a list?"},
        {"messages": [{"role": "user", "content": "What is a list?"}], "prompt": "not this"},
    ]
    write_lines(tmp_path / "in.jsonl", rows)
    options = {"input_path": tmp_path / "in.jsonl", "output_path": tmp_path / "out.jsonl", "system": "Be kind."}
    with pytest.MonkeyPatch.context() as patch:
        flags = as_flags({**options, "max_new_tokens": 8, "temperature": 0, "show_latents": 2})
        patch.setattr(sys, "argv", [SCRIPT, "chat", *flags])
        inference.main()
    found = rows_of(tmp_path / "out.jsonl")
    short = [Message("system", "Be kind."), Message("user", "What is a list?")]
    for row, messages in zip(found, [[Message(*m) for m in dialogue], short, short], strict=True):
        steps = stream_chat(model, tokenizer, [messages], None, max_new_tokens=8)
        assert row["completion"] == "".join(piece for (piece,) in steps)
        assert len(row["latents"]) == row["n_prompt_tokens"] + row["n_tokens"]
        assert row["latents"][0] == ["<|begin_of_text|>", []]
        assert all(len(latents) <= 2 for _, latents in row["latents"])
    assert found[0]["messages"] == rows[0]["messages"]


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"))), st.sampled_from(["\n", "\r\n"]))
def test_a_prompt_is_a_line(tmp_path_factory, prompts, end):
    """Only line ends separate prompts: Unicode's other separators may be inside them."""
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(end.join(["first", *prompts]).encode())
    wanted = [(number, {"prompt": p}) for number, p in enumerate(["first", *prompts], 1) if p.strip()]
    assert prompt_files.read_prompts(str(path), "text") == wanted
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in ["first", *prompts]) + "\n\n")
    assert [row["prompt"] for _, row in prompt_files.read_prompts(str(path), "text")] == ["first", *prompts]


# ---- files: a run that ends early


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path, monkeypatch, capsys):
    """kill -9 of the real command, a second one at the same time, other options, half a line: still the same file."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"{text} {i}"} for i in range(6) for text in TEXTS])
    options = {"input_path": source, "max_new_tokens": 12, **SAMPLED}
    call(inference, **options, output_path=tmp_path / "whole.jsonl", batch_size=7)
    whole = (tmp_path / "whole.jsonl").read_bytes()

    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial" / "completions.jsonl"
    flags = as_flags({**options, "output_path": output, "batch_size": 1, "llama_model_dir": TINY_LLAMA_DIR})
    with subprocess.Popen([sys.executable, SCRIPT, "text", *flags], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        beside = refusal(capsys, inference, **options, output_path=output)
        process.kill()
    assert "in use by another process" in beside and process.returncode == -signal.SIGKILL
    done = partial.read_bytes().count(b"\n")
    assert 0 < done < 24 and not output.exists()
    said = refusal(capsys, inference, **{**options, "temperature": 0.3}, output_path=output)
    assert "out.jsonl.partial was begun with temperature = 0.9" in said

    with partial.open("ab") as file:
        file.write('{"prompt": "hälf'.encode()[:-3])
    computed = []
    complete = prompt_files.completed
    monkeypatch.setattr(
        prompt_files,
        "completed",
        lambda session, prompts, first: computed.append((first, len(prompts))) or complete(session, prompts, first),
    )
    call(inference, **options, output_path=output, batch_size=4)
    assert output.read_bytes() == whole
    assert computed == [(done, 24 - done)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


# ---- refusals


def refused(tmp_path, capsys, content: str | bytes | None, name="in.jsonl", **options) -> str:
    """The error sentence; checks that nothing was written."""
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = set(tmp_path.rglob("*"))
    options = {"input_path": tmp_path / name, "output_path": tmp_path / "new" / "out.jsonl", **options}
    said = refusal(capsys, inference, **options)
    assert set(tmp_path.rglob("*")) == before
    return said


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "line",
    ["prompt", '"prompt"', "[1]", "{}", '{"prompt": 1}', '{"prompt": null}', '{"prompt": "a"', '{"prompt": "\\ud800"}'],
)
def test_refuses_a_line_that_is_no_request(tmp_path, capsys, line):
    assert "in.jsonl, line 3 is not an object" in refused(tmp_path, capsys, GOOD + "\n" + line + "\n" + GOOD)


@pytest.mark.parametrize(
    "field", ["completion", "n_prompt_tokens", "n_tokens", "stopped", "seed", "steering", "latents"]
)
def test_refuses_a_request_whose_field_would_be_overwritten(tmp_path, capsys, field):
    lines = GOOD + json.dumps({"prompt": "a", field: "own"}) + "\n"
    said = refused(tmp_path, capsys, lines, latents=LATENT, show_latents=1, max_new_tokens=1)
    assert said.endswith(f'in.jsonl, line 2 has a field "{field}", which its result would overwrite; rename it.')


def test_refuses_a_request_that_has_a_field_twice(tmp_path, capsys):
    assert "line 2 is not an object" in refused(tmp_path, capsys, GOOD + '{"prompt": "a", "id": 1, "id": 2}')


def test_a_field_that_no_result_has_is_kept(tmp_path):
    row = {"prompt": "a", "steering": "mine", "latents": [1], "temperature": 3, "id": None}
    write_lines(tmp_path / "in.JSONL", [row])
    call(inference, input_path=tmp_path / "in.JSONL", output_path=tmp_path / "out.jsonl", max_new_tokens=1)
    (found,) = rows_of(tmp_path / "out.jsonl")
    assert found | row == found


@pytest.mark.parametrize(
    "messages",
    ["[]", '"hello"', "[1]", '[{"role": "user"}]', '[{"role": "robot", "content": "a"}]', "null", "{}", "3"],
)
def test_refuses_messages_that_are_no_dialogue(tmp_path, messages):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{GOOD}{{"messages": {messages}}}\n')
    with pytest.raises(inference.InputError, match='line 2 is not .* "messages"'):
        prompt_files.read_prompts(str(path), "chat")


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
def test_refuses_a_file_without_prompts(tmp_path, capsys, name):
    for content in (b"", b"\n \r\n"):
        assert f"{name} holds no prompts" in refused(tmp_path, capsys, content, name=name)


def test_refuses_a_file_that_is_no_text_or_not_there(tmp_path, capsys):
    assert "in.jsonl cannot be read as text" in refused(tmp_path, capsys, b"\xff\xfe")
    assert "There is no" in refused(tmp_path, capsys, None, name="nowhere.txt")
    assert "cannot be read" in refused(tmp_path, capsys, None, input_path=tmp_path)


def test_refuses_a_prompt_beyond_the_context_by_its_line(tmp_path, capsys):
    said = refused(tmp_path, capsys, "a\n\n" + "1 " * 300 + "\nb\n", name="in.txt", max_new_tokens=10)
    assert "in.txt, line 3: " in said and "256" in said


def test_refuses_an_output_that_cannot_be(tmp_path, capsys):
    assert "is also the input" in refused(tmp_path, capsys, GOOD, output_path=tmp_path / "in.jsonl")
    assert "is a folder" in refused(tmp_path, capsys, GOOD, output_path=tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path, capsys, GOOD, output_path=tmp_path / "file" / "out.jsonl")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"max_new_tokens": -1}, "--max_new_tokens -1"),
        ({"temperature": "nan"}, "--temperature nan"),
        ({"show_latents": -1}, "--show_latents -1"),
        ({"prompts": "a"}, "--prompts"),
        ({"device": "abacus"}, "--device abacus"),
        ({"dtype": "int3"}, "--dtype int3"),
    ],
)
def test_refuses_options(tmp_path, capsys, options, wanted):
    assert wanted in refused(tmp_path, capsys, GOOD, **options)


def test_refuses_one_path_without_the_other(capsys):
    assert "--output_path" in refusal(capsys, inference, input_path="in.txt")


def test_refuses_an_sae_of_a_deeper_model(tmp_path, capsys, sae):
    from sae import save_sae

    save_sae(sae, tmp_path / "sae.pth", {**sae.info, "site": "layers.22.attention_norm"})
    said = refusal(capsys, inference, sae_model_path=tmp_path / "sae.pth", prompts="a")
    assert "sae.pth" in said and "layers.22.attention_norm" in said

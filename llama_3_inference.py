"""Complete text or hold a chat with Llama 3, optionally steered by an SAE's latents or by control vectors.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: SmolLM2 and its reference SAE if
        fetch_model.py has fetched it, else the embedded tiny Llama and its
Writes  completions to the terminal as they grow; with INPUT_PATH, JSON lines to OUTPUT_PATH
Method  serving/steering.py explains the modes at the SAE's site; strength 1 is a latent's highest observed activation

    python llama_3_inference.py text                       # asks for prompts, one per line; completes them together
    python llama_3_inference.py text --llama_model_dir llama_3/tiny_llama --prompts "When the" --latents 747
    python llama_3_inference.py chat --llama_model_dir models/llama_3.2-3B-Instruct --system "Answer in one sentence."
    python llama_3_inference.py text --input_path prompts.txt --output_path completions.jsonl
"""

from typing import Literal

from pipeline.options import Count, CountOrZero, NotNegative, Positive, Seed, Share, parse_constants
from pipeline.run import run
from serving.modes import Mode

LLAMA_MODEL_DIR: str | None = (
    None  # Llama folder; when not given: the SAE's, else SmolLM2's if fetched, else the tiny one
)
DEVICE = "auto"  # auto: a GPU if there is one
DTYPE: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
SAE_MODEL_PATH: str | None = None  # the SAE; the model's reference SAE in llama_3/ when not given
SAE_LAYER_IDX: CountOrZero | None = None  # for an SAE without a JSON: its layer, at attention_norm (published SAE: 22)
K: Count | None = None  # for an SAE without a JSON: latents kept per token (published SAE: 64)
NORMALIZE_EPS: NotNegative | None = None  # for an SAE without a JSON (published SAE: 1e-6)
ROPE_SCALING_FACTOR: Positive | None = None  # overrides the checkpoint's (published SAE's activations: 8)
LATENTS: list[int] = []  # latents to steer with
STRENGTHS: list[float] = []  # one per latent or one for all, x its highest activation; the SAE's own when not given
MODE: Mode | None = None  # steering mode (scale: the strength is the factor); the SAE's own when not given
KEEP_ERROR = True  # steering keeps what the SAE does not reconstruct
CONTROL_VECTORS: list[str] = []  # GGUF files to steer with: of control_vectors.py, repeng or llama.cpp
VECTOR_SCALES: list[float] = [1.0]  # one per control vector or one for all; below 0 for the opposite
VECTOR_SHIFT: Literal[0, 1] = 0  # 1: files of llama.cpp's cvector-generator, which names each layer one too high
SHOW_LATENTS: CountOrZero = 0  # strongest latents listed per token
PROMPTS: list[str] = []  # text: what to complete; asked for when not given
SYSTEM = ""  # chat: the system message
DATE = "auto"  # chat: today's date, written like "26 Jul 2024", or none; auto: that date from Llama 3.1 on, else none
INPUT_PATH: str | None = None  # file of prompts: one per line, or .jsonl with "prompt" or "messages" in each
OUTPUT_PATH: str | None = None  # JSON lines with the completions of INPUT_PATH
BATCH_SIZE: Count = 8  # prompts completed together
MAX_NEW_TOKENS: Count = 64  # tokens to add
TEMPERATURE: NotNegative = 0.7  # 0: always the most likely token
TOP_P: Share = 0.95  # sample from the most likely tokens that together have this probability
SEED: Seed = 0  # each prompt's samples depend only on this and on its place in the list

_LEAST_NAME = 11  # a column needs room for this much of a name, with the space before it
_COMMANDS = {"text": "complete text", "chat": "hold a dialogue"}

if __name__ == "__main__":
    run(lambda: parse_constants(globals(), commands=_COMMANDS))  # before the slow imports: --help answers at once

import contextlib
import io
import itertools
import os
import reprlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from latents.markup import visible
from llama_3.chat import Message, check_chat, encode_dialogue
from llama_3.generation import check_context, check_temperature, encode_text
from llama_3.tokenizer import TextStream
from pipeline.errors import InputError
from pipeline.files import sha256
from serving.engine import Engine
from serving.prompt_files import Session, check_prompts, complete_file, read_prompts
from serving.requests import prompts_in
from serving.steered_model import (
    ModelChoice,
    Sampling,
    SteeredModel,
    VectorChoice,
    open_model,
    strongest_latents,
    taken_from,
    with_control_vectors,
)
from serving.steering import Steering, strength_of_each

# ---- text


def text_session(session: Session, prompts: list[str]) -> None:
    """Complete the prompts, or, without any, those piped in or typed."""
    if prompts or not sys.stdin.isatty():
        return complete_texts(session, prompts or prompts_in(sys.stdin))
    print("Write one prompt per line; an empty line completes them together. Ctrl-C stops a completion, Ctrl-D leaves.")
    line: str | None = ""
    while line is not None:
        if line := ask():
            prompts += prompts_in(line.split("\n"))
            continue
        try:
            complete_texts(session, prompts)
        except KeyboardInterrupt:
            print()
        except InputError as error:  # a prompt is too long: reported, and the session goes on
            print(f"error: {error}", file=sys.stderr)
        prompts = []
    return None


def complete_texts(session: Session, texts: list[str]) -> None:
    """Complete texts, BATCH_SIZE together, clean and (if anything steers) steered side by side, from the same seeds."""
    prompts = [encode_text(session.opened.tokenizer, text) for text in texts]
    check_prompts(session, prompts, map(reprlib.repr, texts))
    for first in range(0, len(texts), session.batch_size):
        batch = slice(first, first + session.batch_size)
        complete_together(session, texts[batch], prompts[batch], first)


def complete_together(session: Session, texts: list[str], prompts: list[list[int]], first: int) -> None:
    """Complete a batch, whose first prompt is number `first`."""
    opened = session.opened
    interventions = {"clean": []} | ({"steered": session.interventions} if session.interventions else {})
    rows = [row for each in interventions.values() for row in opened.rows(prompts, session.sampling, first, each)]
    added: list[list[int]] = [[] for _ in rows]
    tokens = {kind: added[i * len(texts) : (i + 1) * len(texts)] for i, kind in enumerate(interventions)}

    def completions() -> dict[str, list[str]]:
        return {
            kind: [opened.text_after(*both) for both in zip(prompts, column, strict=True)]
            for kind, column in tokens.items()
        }

    with side_by_side(texts, completions) as refresh:
        for number, token in session.engine.tokens(rows):
            added[number].append(token)
            refresh()
    for i, text in enumerate(texts if session.show_latents else ()):
        listed: list[int] = []
        for kind, column in tokens.items():
            print(f"latents of {text!r}, {kind}" + (", from the first difference on" if listed else ""))
            ids = prompts[i] + column[i]
            print_latents(opened, ids, session.show_latents, listed)
            listed = ids
    sys.stdout.flush()


@contextlib.contextmanager
def side_by_side(texts: list[str], completions: Callable[[], dict[str, list[str]]]) -> Iterator[Callable[[], None]]:
    """Show texts and their completions in a table, which stays, even after Ctrl-C. A pipe gets lines at the end.

    completions: returns those of every text, by kind. Yields a function to call when they have grown.
    """
    if not sys.stdout.isatty():
        yield lambda: None
        columns = completions()
        for i, text in enumerate(texts):
            print(repr(text))
            for kind, column in columns.items():
                print(f"  {kind:8} {column[i]!r}")
        return
    from rich.console import Console
    from rich.live import Live
    from rich.segment import Segment, Segments
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def table() -> Table:
        columns = completions()
        grown = Table(show_lines=True, expand=True)
        for kind in columns:
            grown.add_column(kind, ratio=1)  # as wide as the others, however long its texts are
        for text, *row in zip(texts, *columns.values(), strict=True):
            row = [visible(completion.rstrip("\ufffd")) for completion in row]  # half a character is held back
            cells = [Text.assemble((visible(text), "bold"), completion) for completion in row]
            cells[-1].stylize("yellow", len(text) + len(os.path.commonprefix(row)))  # what steering changed
            grown.add_row(*cells)
        return grown

    def end_of_table() -> Segments:
        """The table's last lines, where it grows: as many as fit the window."""
        lines = console.render_lines(table(), pad=False)[1 - console.height :]
        return Segments(itertools.chain.from_iterable([*line, Segment.line()] for line in lines))

    shown_at = 0.0

    def refresh() -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > 0.1:
            live.refresh()
            shown_at = time.monotonic()

    try:
        # Not on Live's own thread: nothing waits for it, and Python aborts if that ends inside the tokenizer.
        with Live(console=console, get_renderable=end_of_table, transient=True, auto_refresh=False) as live:
            yield refresh
    finally:
        console.print(table())


# ---- chat


def chat_session(session: Session, system: str) -> None:
    """Hold a dialogue; its oldest messages are forgotten when the context is full."""
    if sys.stdin.isatty():
        print("Write a message. Ctrl-C stops an answer, Ctrl-D leaves.")
    opened, max_new_tokens = session.opened, session.sampling.max_new_tokens
    first = [Message("system", system)] if system else []
    encode = lambda messages: encode_dialogue(opened.tokenizer, [*first, *messages], opened.date)
    room = opened.model.args.max_seq_len - max_new_tokens
    messages: list[Message] = []
    n_answers = 0
    while (line := ask()) is not None:
        if not line.strip():
            continue
        question = Message("user", line)
        try:
            check_context(opened.model, len(encode([question])), max_new_tokens)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        messages.append(question)
        if len(encode(messages)) > room:
            while len(encode(messages)) > room:
                del messages[:2]
            print("The context is full; the oldest messages were forgotten.", file=sys.stderr)
        prompt = encode(messages)
        answer = print_answer(session, prompt, n_answers)
        messages.append(Message("assistant", opened.text_after(prompt, answer)))
        n_answers += 1
        if session.show_latents:
            before = encode(messages[:-2]) if n_answers > 1 else []
            with contextlib.suppress(KeyboardInterrupt):
                print_latents(opened, prompt + answer, session.show_latents, before)


def print_answer(session: Session, prompt: list[int], number: int) -> list[int]:
    """Print an answer as it is generated and return its tokens; Ctrl-C stops it."""
    text = TextStream(session.opened.tokenizer, prompt)
    answer: list[int] = []
    try:
        rows = session.opened.rows([prompt], session.sampling, number, session.interventions)
        for _, token in session.engine.tokens(rows):
            answer.append(token)
            print(visible(text.add(token)), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(visible(text.end()))
    return answer


# ---- shared by both


def ask() -> str | None:
    """A line typed by the user, or several pasted at once; None at the end (Ctrl-D). Ctrl-C drops the line."""
    if not sys.stdin.isatty():
        line = next(sys.stdin, None)
        return line and line.removeprefix("\ufeff")
    with contextlib.suppress(ImportError):
        import readline  # arrow keys, earlier lines

        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines pasted are one message
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None


def print_latents(opened: SteeredModel, ids: list[int], n: int, listed: list[int]) -> None:
    """List each token of `ids` with its n strongest latents, from where the tokens differ from `listed` on.

    The model reads them without steering, so tokens that both lists begin with have the same latents.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    n_same = len(os.path.commonprefix([ids, listed]))
    rows = strongest_latents(opened, ids, n)[n_same:]
    digits = len(str(opened.need_sae().n_latents - 1))
    # A pipe has no width: there nothing is cut.
    console = Console(width=None if sys.stdout.isatty() else 100 * (1 + n))
    least = digits + max((len(f" {value:.2f}") for _, latents in rows for _, value in latents), default=0)
    longest = max((cell_len(repr(text)) for text, _ in rows), default=0)
    token_width = max(1, min(16, longest, console.width - 1 - least))
    room = console.width - token_width  # each column adds a space to its width
    n_columns = max(1, min(n, room // (1 + least + _LEAST_NAME)))
    width = max(least, room // n_columns - 1)
    has_room = width > least + 2  # for names beside the numbers
    name = lambda latent: opened.meanings.get(latent, "") if has_room else ""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, width=token_width)
    for _ in range(n_columns):
        table.add_column(no_wrap=True, min_width=least, max_width=width)
    for text, latents in rows:
        named = [f"{latent:>{digits}} {value:.2f} {name(latent)}" for latent, value in latents]
        cells = [Text(each.rstrip(), no_wrap=True, overflow="ellipsis") for each in named]
        for first in range(0, max(1, len(cells)), n_columns):  # what does not fit goes to the next line
            table.add_row(Text("" if first else repr(text), "bold"), *cells[first : first + n_columns])
    console.print(table)


# ---- options


def check_files(prompts: Sequence[str], command: str, input_path: str | None, output_path: str | None) -> None:
    """Raise InputError if the options that name prompts and files do not fit together."""
    if (input_path is None) != (output_path is None):
        raise InputError("--input_path and --output_path belong together; give both or neither.")
    if prompts and (command == "chat" or input_path):
        raise InputError("--prompts goes only with text and without --input_path; leave one of them out.")
    if input_path and output_path and Path(output_path).resolve() == Path(input_path).resolve():
        raise InputError(f"{output_path} is also the input; name another file for --output_path.")
    if output_path and Path(output_path).is_dir():
        raise InputError(f"{output_path} is a folder; name a file for --output_path.")


def asked_steering(
    opened: SteeredModel,
    strengths: Mapping[int, float | None],
    mode: Mode | None,
    keep_error: bool,
    scales: Mapping[str, float],
) -> Steering:
    """What the options ask for; mode and strength are the SAE's own where they are None."""
    default = opened.defaults
    known = {latent: default.strength if strength is None else strength for latent, strength in strengths.items()}
    return Steering(known, mode or default.mode, keep_error, scales)


def announce(opened: SteeredModel, steering: Steering) -> None:
    """Print what steers."""
    for latent, strength in steering.strengths.items():
        named = f" ({opened.meanings[latent]})" if latent in opened.meanings else ""
        how = "set to 0" if steering.mode == "ablate" else f"{steering.mode}, strength {strength:g}"
        print(f"Steered by latent {latent}{named}: {how}.", file=sys.stderr)
    for name, scale in steering.control_vectors.items():
        where = opened.control_vectors[name].where
        print(f"Steered by the control vector {name}, added {where}: scale {scale:g}.", file=sys.stderr)


def main() -> None:
    config = parse_constants(globals(), commands=_COMMANDS)
    strengths = strength_of_each(config.latents, config.strengths or [None]) if config.latents else {}
    vectors = taken_from(vars(config), VectorChoice)
    scales = vectors.scales
    check_files(config.prompts, config.command, config.input_path, config.output_path)
    check_temperature(config.temperature)
    requests = read_prompts(config.input_path, config.command) if config.input_path else []
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show every character
    choice = taken_from(vars(config), ModelChoice)
    print(f"Loading {choice.name} ...", file=sys.stderr, flush=True)

    needs_sae = bool(config.latents or config.show_latents)
    opened = with_control_vectors(open_model(choice, needs_sae), vectors)
    if config.command == "chat":
        check_chat(opened.tokenizer)
    steering = asked_steering(opened, strengths, config.mode, config.keep_error, scales)
    interventions = opened.interventions(steering)
    announce(opened, steering)
    sampling = taken_from(vars(config), Sampling)
    # Texts are completed clean and steered side by side; of a file all may wait.
    engine = Engine(opened.model, max_rows=(1 if requests else 2) * config.batch_size, max_waiting=len(requests))
    session = Session(opened, engine, steering, interventions, sampling, config.batch_size, config.show_latents)
    try:
        if requests:
            free = ("input_path", "output_path", "batch_size")  # options that do not affect the completions
            decides = {name: value for name, value in vars(config).items() if name not in free}
            decides |= {"mode": steering.mode, "strengths": list(steering.strengths.values())}
            decides |= {"control_vectors": {path: sha256(path) for path in config.control_vectors}}
            paths = (config.input_path, config.output_path)
            complete_file(session, requests, config.command, config.system, *paths, decides)
        elif config.command == "chat":
            chat_session(session, config.system)
        else:
            text_session(session, config.prompts)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError as error:
        raise InputError(f"The input is not {error.encoding}; set the terminal to UTF-8.") from None
    finally:
        engine.close()
        engine.join()


if __name__ == "__main__":
    run(main)

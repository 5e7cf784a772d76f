"""Complete text or hold a chat with Llama 3, optionally steered by latents of a sparse autoencoder.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: the embedded model and its SAE
Writes  completions to the terminal, as they come; with INPUT_PATH, JSON lines to OUTPUT_PATH
Method  steering.py says what each mode does at the SAE's site; strength 1 is a latent's highest observed activation

    python llama_3_inference.py text                            # asks for prompts, one a line; completes them together
    python llama_3_inference.py text --prompts "This function returns" "When the" --latents 747 --strengths 5
    python llama_3_inference.py chat --llama_model_dir models/llama_3.2-3B-Instruct --system "Answer in one sentence."
    python llama_3_inference.py text --input_path prompts.txt --output_path completions.jsonl
"""

from typing import Literal

from pipeline.options import Count, CountOrZero, NotNegative, Positive, Share, parse_constants
from pipeline.run import run
from serving.steering import DEFAULT_MODE, DEFAULT_STRENGTH, Mode

LLAMA_MODEL_DIR: str | None = None  # Llama folder; the embedded tiny Llama when not given
DEVICE = "auto"  # auto: a GPU where there is one
DTYPE: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
SAE_MODEL_PATH: str | None = None  # the SAE; the embedded one with the embedded model when not given
SAE_LAYER_IDX: CountOrZero | None = (
    None  # for an SAE without a JSON: it reads this layer's attention_norm (published: 22)
)
K: Count | None = None  # for an SAE without a JSON: latents kept (the published: 64)
NORMALIZE_EPS: NotNegative | None = None  # for an SAE without a JSON (the published: 1e-6)
ROPE_SCALING_FACTOR: Positive | None = None  # overrides the checkpoint's (the published SAE's activations: 8)
LATENTS: list[int] = []  # latents to steer with
STRENGTHS = [DEFAULT_STRENGTH]  # one each, or one for all: in multiples of the latent's highest observed activation
MODE: Mode = DEFAULT_MODE  # of steering: h_bias, add, clamp, scale (the strength is the factor) or ablate
KEEP_ERROR = True  # steering keeps what the SAE does not reconstruct
SHOW_LATENTS: CountOrZero = 0  # strongest latents listed per token
PROMPTS: list[str] = []  # text: what to complete; asked for when not given
SYSTEM = ""  # chat: the system message
DATE = "auto"  # chat: today's date as in "26 Jul 2024", or none; auto: that one from Llama 3.1 on, none before
INPUT_PATH: str | None = None  # file of prompts: one a line, or .jsonl with "prompt" or "messages" in each
OUTPUT_PATH: str | None = None  # JSON lines with the completions of INPUT_PATH
BATCH_SIZE: Count = 8  # prompts completed together
MAX_NEW_TOKENS: Count = 64  # tokens to add
TEMPERATURE: NotNegative = 0.7  # 0: always the most likely token
TOP_P: Share = 0.95  # sample from the most likely tokens that together have this probability
SEED = 0  # each prompt's samples depend on this and on its place in the list alone

_COMMANDS = {"text": "complete text", "chat": "hold a dialogue"}

if __name__ == "__main__":
    run(lambda: parse_constants(globals(), commands=_COMMANDS))  # before the slow imports: --help answers at once

import contextlib
import itertools
import json
import os
import reprlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from llama_3.chat import ROLES, Message, check_chat, encode_dialogue
from llama_3.checkpoint import TINY_LLAMA_DIR, checkpoint_identity
from llama_3.generation import check_context, encode_text, generate
from llama_3.tokenizer import TextStream
from pipeline.errors import InputError
from pipeline.files import atomic_path, locked, sha256
from pipeline.manifests import begin_or_continue
from pipeline.progress import progress_bar
from serving.steered_model import _VISIBLE, Setup, prompts_in, seeds_of, set_up, strength_of_each, strongest_latents

# ---- generation


# ---- set-up


def print_latents(setup: Setup, ids: list[int], n: int, listed: list[int]) -> None:
    """List each token of `ids` with its n strongest latents, from where the tokens differ from `listed` on.

    Steering acts behind the place where the SAE reads, so tokens that two lists begin with have the same latents.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    n_same = len(os.path.commonprefix([ids, listed]))
    digits = len(str(setup.sae.n_latents - 1))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, max_width=16)  # the other columns share what the window leaves
    for text, latents in strongest_latents(setup, ids, n)[n_same:]:
        named = [f"{latent:>{digits}} {value:.2f} {setup.meanings.get(latent, '')}" for latent, value in latents]
        table.add_row(Text(repr(text), "bold"), *(Text(name, no_wrap=True, overflow="ellipsis") for name in named))
    width = None if sys.stdout.isatty() else 100 * (1 + n)  # the window's; a pipe cuts nothing
    Console(width=width).print(table)


# ---- the terminal


def check_prompts(setup: Setup, prompts: Sequence[list[int]], names: Iterable[str]) -> None:
    """Raise InputError, with its name, for the first prompt that does not fit the model's context."""
    for prompt, name in zip(prompts, names, strict=True):
        try:
            check_context(setup.model, len(prompt), setup.options["max_new_tokens"])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def steps_of(setup: Setup, prompts: list[list[int]], seeds: list[int], steering) -> Iterator[list[int | None]]:
    """`generate` with what the options say."""
    stop_tokens = setup.tokenizer.stop_ids
    return generate(setup.model, prompts, stop_tokens=stop_tokens, seeds=seeds, steering=steering, **setup.options)


def add_step(rows: list[list[int]], step: list[int | None]) -> None:
    """Add what `generate` gave to the tokens of each row."""
    for row, token in zip(rows, step, strict=True):
        if token is not None:
            row.append(token)


def text_after(setup: Setup, prompt: list[int], tokens: list[int]) -> str:
    """What the tokens add to the prompt's text."""
    return setup.tokenizer.decode(prompt + tokens)[len(setup.tokenizer.decode(prompt)) :]


def complete_texts(setup: Setup, texts: list[str], config) -> None:
    """Complete texts, BATCH_SIZE together, clean and (with latents) steered side by side, from the same seeds."""
    prompts = [encode_text(setup.tokenizer, text) for text in texts]
    check_prompts(setup, prompts, map(reprlib.repr, texts))
    for first in range(0, len(texts), config.batch_size):
        batch = slice(first, first + config.batch_size)
        complete_together(setup, texts[batch], prompts[batch], first, config)


def complete_together(setup: Setup, texts: list[str], prompts: list[list[int]], first: int, config) -> None:
    seeds = seeds_of(config, len(texts), first)
    steerings = {"clean": None} | ({"steered": setup.steering} if setup.steering else {})
    streams = [steps_of(setup, prompts, seeds, steering) for steering in steerings.values()]
    added: dict[str, list[list[int]]] = {kind: [[] for _ in texts] for kind in steerings}

    def completions() -> dict[str, list[str]]:
        return {kind: [text_after(setup, *x) for x in zip(prompts, rows, strict=True)] for kind, rows in added.items()}

    with side_by_side(texts, completions) as refresh:
        for steps in itertools.zip_longest(*streams, fillvalue=[None] * len(texts)):
            for rows, step in zip(added.values(), steps, strict=True):
                add_step(rows, step)
            refresh()
    for i, text in enumerate(texts if config.show_latents else ()):
        listed: list[int] = []
        for kind, rows in added.items():
            print(f"latents of {text!r}, {kind}" + (", from the first difference on" if listed else ""))
            ids = prompts[i] + rows[i]
            print_latents(setup, ids, config.show_latents, listed)
            listed = ids
    sys.stdout.flush()


@contextlib.contextmanager
def side_by_side(texts: list[str], completions: Callable[[], dict[str, list[str]]]) -> Iterator[Callable[[], None]]:
    """Show texts and their completions in a table, which stays, at Ctrl-C too. A pipe gets lines at the end.

    completions: gives those of every text, by kind. Yields what to call when they have grown.
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
            row = [completion.rstrip("\ufffd").translate(_VISIBLE) for completion in row]  # half a character waits
            cells = [Text.assemble((text.translate(_VISIBLE), "bold"), completion) for completion in row]
            cells[-1].stylize("yellow", len(text) + len(os.path.commonprefix(row)))  # what steering changed
            grown.add_row(*cells)
        return grown

    def end_of_table() -> Segments:
        """Its last lines, as many as the window holds: there it grows."""
        lines = console.render_lines(table(), pad=False)[1 - console.height :]
        return Segments(itertools.chain.from_iterable([*line, Segment.line()] for line in lines))

    shown_at = 0.0

    def refresh() -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > 0.1:
            live.refresh()
            shown_at = time.monotonic()

    try:
        # Not by Live's own thread: nobody waits for it, and Python aborts when it ends inside the tokenizer.
        with Live(console=console, get_renderable=end_of_table, transient=True, auto_refresh=False) as live:
            yield refresh
    finally:
        console.print(table())


def ask() -> str | None:
    """A line typed by the user, or several pasted at once; None at the end (Ctrl-D). Ctrl-C drops what is typed."""
    if not sys.stdin.isatty():
        return next(sys.stdin, None)
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


def text_session(setup: Setup, config) -> None:
    if config.prompts or not sys.stdin.isatty():
        return complete_texts(setup, config.prompts or prompts_in(sys.stdin), config)
    print("Write one prompt a line; an empty line completes them together. Ctrl-C stops a completion, Ctrl-D leaves.")
    prompts: list[str] = []
    line: str | None = ""
    while line is not None:
        if line := ask():
            prompts += prompts_in(line.split("\n"))
            continue
        try:
            complete_texts(setup, prompts, config)
        except KeyboardInterrupt:
            print()
        except InputError as error:  # a prompt is too long: said, and the session goes on
            print(f"error: {error}", file=sys.stderr)
        prompts = []
    return None


def chat_session(setup: Setup, config) -> None:

    if sys.stdin.isatty():
        print("Write a message. Ctrl-C stops an answer, Ctrl-D leaves.")
    system = [Message("system", config.system)] if config.system else []
    encode = lambda messages: encode_dialogue(setup.tokenizer, [*system, *messages], setup.date)
    room = setup.model.args.max_seq_len - config.max_new_tokens
    messages: list[Message] = []
    n_answers = 0
    while (line := ask()) is not None:
        if not line.strip():
            continue
        question = Message("user", line)
        try:
            check_context(setup.model, len(encode([question])), config.max_new_tokens)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        messages.append(question)
        if len(encode(messages)) > room:
            while len(encode(messages)) > room:
                del messages[:2]
            print("The context is full; the oldest messages were forgotten.", file=sys.stderr)
        prompt = encode(messages)
        answer = print_answer(setup, prompt, seeds_of(config, 1, n_answers))
        messages.append(Message("assistant", text_after(setup, prompt, answer)))
        n_answers += 1
        if config.show_latents:
            before = encode(messages[:-2]) if n_answers > 1 else []
            with contextlib.suppress(KeyboardInterrupt):
                print_latents(setup, prompt + answer, config.show_latents, before)


def print_answer(setup: Setup, prompt: list[int], seeds: list[int]) -> list[int]:
    """Print an answer as it comes and return its tokens; Ctrl-C ends it."""

    text = TextStream(setup.tokenizer, prompt)
    answer: list[int] = []
    try:
        for (token,) in steps_of(setup, [prompt], seeds, setup.steering):
            answer.append(token)
            print(text.add(token).translate(_VISIBLE), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(text.end().translate(_VISIBLE))
    return answer


# ---- files of prompts


def read_prompts(path: str, command: str) -> list[tuple[int, dict]]:
    """The requests of a file by line number: prompts, or JSON objects with "prompt" or, for chat, "messages".

    Empty lines are no requests.
    """

    try:
        # Not splitlines: the line separators of Unicode may stand inside a prompt.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"There is no {path}; name a file of prompts.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); save it as UTF-8.") from None
    wanted = {"text": 'an object with a text "prompt"', "chat": 'an object with a text "prompt" or a list "messages"'}
    rows: list[tuple[int, dict]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            rows.append((number, {"prompt": line}))
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            if command == "chat" and "messages" in row:
                right = all(m["role"] in ROLES and isinstance(m["content"], str) for m in row["messages"])
                right &= len(row["messages"]) > 0
            else:
                right = isinstance(row["prompt"], str)
        except (ValueError, TypeError, KeyError):
            right = False
        if not right:
            raise InputError(f"{path}, line {number} is not {wanted[command]}; correct it.")
        rows.append((number, row))
    if not rows:
        raise InputError(f"{path} holds no prompts; write one a line.")
    return rows


def encode_request(setup: Setup, row: dict, config) -> list[int]:

    if config.command == "text":
        return encode_text(setup.tokenizer, row["prompt"])
    said = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    messages = [Message(m["role"], m["content"]) for m in said]
    if config.system and messages[0].role != "system":
        messages.insert(0, Message("system", config.system))
    return encode_dialogue(setup.tokenizer, messages, setup.date)


def run_file(setup: Setup, requests: list[tuple[int, dict]], config) -> None:
    """Complete every request into OUTPUT_PATH. What a killed run has done waits in a folder beside it."""

    rows = [row for _, row in requests]
    prompts = [encode_request(setup, row, config) for row in rows]
    check_prompts(setup, prompts, (f"{config.input_path}, line {number}" for number, _ in requests))
    free = ("input_path", "output_path", "batch_size")  # what the completions do not depend on
    decides = {name: value for name, value in vars(config).items() if name not in free}
    decides |= {"input_sha256": sha256(config.input_path), "sae": setup.sae and setup.sae.info}
    decides |= {"model": checkpoint_identity(config.llama_model_dir or TINY_LLAMA_DIR)}
    output = Path(config.output_path)
    folder = output.with_name(output.name + ".partial")
    try:
        with locked(folder):
            begin_or_continue(folder, "llama_3_inference.py", decides)
            complete_file(setup, rows, prompts, folder / "completions.jsonl", config)
            with atomic_path(output) as temporary:
                shutil.copyfile(folder / "completions.jsonl", temporary)
            shutil.rmtree(folder)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}); name another or mend that.") from None
    print(f"{len(rows):,} completions: {output}")


def complete_file(setup: Setup, rows: list[dict], prompts: list[list[int]], path: Path, config) -> None:
    """Write the lines of the completions that `path` does not hold yet."""
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]  # a killed process may leave half a line
    path.write_bytes(whole)
    n_done = whole.count(b"\n")
    with (
        path.open("a", encoding="utf-8") as file,
        progress_bar(total=len(rows), initial=n_done, unit="prompt") as bar,
    ):
        for first in range(n_done, len(rows), config.batch_size):
            batch = slice(first, first + config.batch_size)
            results = complete_requests(setup, prompts[batch], first, config)
            for row, result in zip(rows[batch], results, strict=True):
                file.write(json.dumps({**row, **result}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(results))


def complete_requests(setup: Setup, prompts: list[list[int]], first: int, config) -> list[dict]:
    """Completions of requests `first` and following, with what is needed to repeat them."""
    seeds = seeds_of(config, len(prompts), first)
    added: list[list[int]] = [[] for _ in prompts]
    for step in steps_of(setup, prompts, seeds, setup.steering):
        add_step(added, step)
    results = []
    for prompt, tokens, seed in zip(prompts, added, seeds, strict=True):
        result = {
            "completion": text_after(setup, prompt, tokens),
            "n_prompt_tokens": len(prompt),
            "n_tokens": len(tokens),
            "stopped": len(tokens) < config.max_new_tokens,  # by a stop token, not by the limit
            "seed": seed,
        }
        if config.latents:
            steering = {"mode": config.mode, "keep_error": config.keep_error}
            strengths = strength_of_each(config.latents, config.strengths)
            result["steering"] = {**steering, "strengths": {str(n): strength for n, strength in strengths.items()}}
        if config.show_latents:
            result["latents"] = strongest_latents(setup, prompt + tokens, config.show_latents)
        results.append(result)
    return results


def check_options(config) -> None:
    if config.latents:
        strength_of_each(config.latents, config.strengths)
    if (config.input_path is None) != (config.output_path is None):
        raise InputError("--input_path and --output_path belong together; give both or neither.")
    if config.prompts and (config.command == "chat" or config.input_path):
        raise InputError("--prompts are completed by text without --input_path; leave one of them out.")
    if config.output_path and Path(config.output_path).resolve() == Path(config.input_path).resolve():
        raise InputError(f"{config.output_path} is the input too; name another file for --output_path.")
    if config.output_path and Path(config.output_path).is_dir():
        raise InputError(f"{config.output_path} is a folder; name a file for --output_path.")


def main() -> None:
    config = parse_constants(globals(), commands=_COMMANDS)
    check_options(config)
    requests = read_prompts(config.input_path, config.command) if config.input_path else []
    sys.stdout.reconfigure(errors="replace")  # not every terminal knows every character
    print(f"Loading {config.llama_model_dir or 'the embedded tiny Llama'} ...", file=sys.stderr, flush=True)
    setup = set_up(config)
    if config.command == "chat":
        check_chat(setup.tokenizer)
    if setup.steering:
        for latent, strength in strength_of_each(config.latents, config.strengths).items():
            named = f" ({setup.meanings[latent]})" if latent in setup.meanings else ""
            how = "set to 0" if config.mode == "ablate" else f"{config.mode}, strength {strength:g}"
            print(f"Steered by latent {latent}{named}: {how}.", file=sys.stderr)
    try:
        if requests:
            run_file(setup, requests, config)
        elif config.command == "chat":
            chat_session(setup, config)
        else:
            text_session(setup, config)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads (head, less) has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError as error:
        raise InputError(f"What was written is not {error.encoding}; set the terminal to UTF-8.") from None


if __name__ == "__main__":
    run(main)

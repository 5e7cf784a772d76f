"""Complete text or hold a chat with Llama 3, optionally steered by latents of a sparse autoencoder.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: the embedded model and its SAE
Writes  completions to the terminal, as they come; with INPUT_PATH, JSON lines to OUTPUT_PATH
Method  steering.py says what each mode does at the SAE's site; strength 1 is a latent's highest observed activation

    python llama_3_inference.py text                            # asks for prompts, one a line; completes them together
    python llama_3_inference.py text --prompts "This function returns" "When the" --latents 747 --strengths 5
    python llama_3_inference.py chat --llama_model_dir models/llama_3.2-3B-Instruct --system "Answer in one sentence."
    python llama_3_inference.py text --input_path prompts.txt --output_path completions.jsonl
"""

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
from typing import TYPE_CHECKING, Any, NamedTuple

import stage
from steering import DEFAULT_MODE, DEFAULT_STRENGTH, MODES

if TYPE_CHECKING:
    from torch import Tensor

    from llama_3.chat import Message
    from llama_3.model import Transformer
    from llama_3.tokenizer import Tokenizer
    from sae import TopKSparseAutoencoder

LLAMA_MODEL_DIR: str | None = None  # Llama folder; the embedded tiny Llama when not given
DEVICE = "auto"  # auto: a GPU where there is one
DTYPE = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
SAE_MODEL_PATH: str | None = None  # the SAE; the embedded one with the embedded model when not given
SAE_LAYER_IDX: int | None = None  # for an SAE without a JSON: it reads attention_norm of this layer (the published: 22)
K: int | None = None  # for an SAE without a JSON: latents kept (the published: 64)
NORMALIZE_EPS: float | None = None  # for an SAE without a JSON (the published: 1e-6)
ROPE_SCALING_FACTOR: float | None = None  # overrides the checkpoint's (the published SAE's activations: 8)
LATENTS: list[int] = []  # latents to steer with
STRENGTHS = [DEFAULT_STRENGTH]  # one each, or one for all: in multiples of the latent's highest observed activation
MODE = DEFAULT_MODE  # of steering: h_bias, add, clamp, scale (the strength is the factor) or ablate
KEEP_ERROR = True  # steering keeps what the SAE does not reconstruct
SHOW_LATENTS = 0  # strongest latents listed per token
PROMPTS: list[str] = []  # text: what to complete; asked for when not given
SYSTEM = ""  # chat: the system message
DATE = "auto"  # chat: today's date as in "26 Jul 2024", or none; auto: that one from Llama 3.1 on, none before
INPUT_PATH: str | None = None  # file of prompts: one a line, or .jsonl with "prompt" or "messages" in each
OUTPUT_PATH: str | None = None  # JSON lines with the completions of INPUT_PATH
BATCH_SIZE = 8  # prompts completed together
MAX_NEW_TOKENS = 64  # tokens to add
TEMPERATURE = 0.7  # 0: always the most likely token
TOP_P = 0.95  # sample from the most likely tokens that together have this probability
SEED = 0  # each prompt's samples depend on this and on its place in the list alone

_DATE_OF_THE_TEMPLATE = "26 Jul 2024"  # what Llama 3.1's published template writes when nobody names a date


# ---- generation


def sample(logits: "Tensor", temperature: float, top_p: float, uniform: "Tensor") -> "Tensor":
    """One token a row: nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) with given random numbers.

    logits: (batch, vocab_size); uniform: (batch,) in [0, 1). Returns (batch,). temperature 0 takes the largest logit.
    """
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    probs, tokens = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    outside = cumulative - probs >= top_p
    outside[..., 0] = False  # the likeliest token always stays
    probs[outside] = 0
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, (uniform.to(probs) * cumulative[:, -1])[:, None], right=True)
    return tokens.gather(-1, place.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


def generate(
    model: "Transformer",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    steering: "tuple[str, Callable[[Tensor], Tensor], Sequence[int]] | None" = None,
) -> Iterator[list[int | None]]:
    """Stream the next token of every prompt, None for one that has stopped.

    prompts: token ids, of any lengths, each at least one. seeds: one a prompt; a prompt's samples depend on its seed,
    not on its neighbours. steering: (site, function, skip_tokens) for `model.intervene`, in force in this call only.
    Raises InputError where the longest prompt and the new tokens do not fit the model's context.
    """
    import torch

    batch, longest = len(prompts), max(map(len, prompts))
    check_context(model, longest, max_new_tokens)
    device = model.device
    n_pad = None  # rows of one length need no mask
    if min(map(len, prompts)) < longest:
        n_pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    generators = [torch.Generator().manual_seed(s) for s in (seeds or range(batch))]
    cache = model.new_cache(batch, longest + max_new_tokens)
    stops = set(stop_tokens)
    alive = [True] * batch
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            if steering is None:
                logits = model(tokens, cache, n_pad, last_only=True)[:, 0]
            else:
                with model.intervene(*steering):
                    logits = model(tokens, cache, n_pad, last_only=True)[:, 0]
            uniform = torch.stack([torch.rand((), generator=g) for g in generators])
            tokens = sample(logits, temperature, top_p, uniform.to(device))[:, None]
        step: list[int | None] = []
        for row, token in enumerate(tokens[:, 0].tolist()):
            alive[row] = alive[row] and token not in stops
            step.append(token if alive[row] else None)
        if not any(alive):
            return
        yield step


def check_context(model: "Transformer", n_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise InputError where they exceed the model's context."""
    if n_prompt_tokens + max_new_tokens > model.args.max_seq_len:
        raise stage.InputError(
            f"A prompt of {n_prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.args.max_seq_len}; shorten the prompt or ask for fewer tokens."
        )


def stream(
    model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[Sequence[int]], **options
) -> Iterator[list[str]]:
    """Stream what each prompt gains, step by step, in whole characters; prompts and options as of `generate`."""
    from llama_3.tokenizer import TextStream

    texts = [TextStream(tokenizer, prompt) for prompt in prompts]
    for step in generate(model, prompts, stop_tokens=tokenizer.stop_ids, **options):
        yield [text.end() if token is None else text.add(token) for text, token in zip(texts, step, strict=True)]
    yield [text.end() for text in texts]


def encode_text(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """A prompt's token ids, after begin-of-text where the model knows it."""
    return tokenizer.encode(prompt, bos=tokenizer.starts_with_bos) or [tokenizer.bos_id]


def stream_text(model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[str], **options) -> Iterator[list[str]]:
    """Stream the completions of texts; options as of `generate`."""
    return stream(model, tokenizer, [encode_text(tokenizer, prompt) for prompt in prompts], **options)


def stream_chat(
    model: "Transformer",
    tokenizer: "Tokenizer",
    dialogues: "Sequence[Sequence[Message]]",
    date: str | None = None,
    **options,
) -> Iterator[list[str]]:
    """Stream the assistant's next message of each dialogue; date as of `encode_dialogue`, options as of `generate`."""
    from llama_3.chat import encode_dialogue

    return stream(model, tokenizer, [encode_dialogue(tokenizer, d, date) for d in dialogues], **options)


def complete(model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[str], **options) -> list[str]:
    """The whole completions of texts."""
    return ["".join(pieces) for pieces in zip(*stream_text(model, tokenizer, prompts, **options), strict=True)]


# ---- set-up


class Setup(NamedTuple):
    """What the options name, opened."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    sae: "TopKSparseAutoencoder | None"
    meanings: dict[int, str]
    options: dict[str, Any]  # of generate, but for seeds and steering
    steering: "tuple[str, Callable[[Tensor], Tensor], Sequence[int]] | None"
    date: str | None  # of a chat


def set_up(config) -> Setup:
    import torch

    from llama_3 import load_model, load_tokenizer
    from llama_3.loading import TINY_LLAMA_DIR
    from llama_3.model import check_site
    from sae import load_sae_model
    from steering import make_steering

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if config.dtype == "auto" else config.dtype
    if dtype not in ("bfloat16", "float16", "float32"):
        raise stage.InputError(f"--dtype {dtype} is unknown; write bfloat16, float16 or float32.")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise stage.InputError(f"--device {device} cannot be used here ({reason}); write cpu or cuda.") from None
    model_dir = config.llama_model_dir or TINY_LLAMA_DIR
    sae, sae_path = None, config.sae_model_path
    if config.latents or config.show_latents or sae_path:
        if sae_path is None and config.llama_model_dir is not None:
            raise stage.InputError("Latents need an SAE of this model; name it with --sae_model_path.")
        sae_path = sae_path or str(Path(TINY_LLAMA_DIR) / "sae.pth")
        sae = load_sae_model(sae_path, device, **what_options_say(config))
        if "site" not in sae.info:
            raise stage.InputError(f"{sae_path} has no JSON that names its site; name its layer with --sae_layer_idx.")
    rope_scaling_factor = sae.info.get("rope_scaling_factor") if sae else config.rope_scaling_factor
    model = load_model(model_dir, device, getattr(torch, dtype), rope_scaling_factor, packed=True)
    tokenizer = load_tokenizer(model_dir)
    if sae and sae.d_model != model.args.dim:
        raise stage.InputError(
            f"{sae_path} has d_model {sae.d_model}, {model_dir} has {model.args.dim}; they do not belong together."
        )
    if sae:
        try:
            check_site(sae.info["site"], model.args.n_layers)
        except ValueError as error:
            raise stage.InputError(f"{sae_path} does not belong to {model_dir}: {error}") from None
    steering = None
    if config.latents:
        strengths = strength_of_each(config.latents, config.strengths)
        highest = known_highest(sae_path, sae.n_latents)
        function = make_steering(sae, strengths, highest, config.mode, config.keep_error)
        steering = (sae.info["site"], function, (tokenizer.bos_id,))  # no SAE here was trained on begin-of-text
    options = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p")}
    date = None if config.date == "none" else config.date
    if config.date == "auto":  # the date header came with Llama 3.1, as did scaled RoPE
        date = _DATE_OF_THE_TEMPLATE if model.args.rope_scaling_factor != 1 else None
    meanings = latent_meanings(sae_path) if sae else {}
    return Setup(model, tokenizer, sae, meanings, options, steering, date)


def what_options_say(config) -> dict[str, Any]:
    """What the options say of the SAE: it must not contradict its JSON, and stands for one that is missing."""
    told = {name: getattr(config, name) for name in ("k", "normalize_eps", "rope_scaling_factor")}
    if config.sae_layer_idx is not None:
        told["site"] = f"layers.{config.sae_layer_idx}.attention_norm"
    return {name: value for name, value in told.items() if value is not None}


def known_highest(sae_path: str, n_latents: int) -> "Tensor":
    """`steering.highest_activations`, or ones, with a line that says so, where a published SAE comes without them."""
    import torch

    from steering import highest_activations

    try:
        return highest_activations(sae_path)
    except stage.InputError as error:
        print(f"{error} Until then a strength counts in plain activation.", file=sys.stderr)
        return torch.ones(n_latents)


def strength_of_each(latents: list[int], strengths: list[float]) -> dict[int, float]:
    """Latent -> strength. A single strength is that of all. Raises InputError where they do not fit together."""
    if len(strengths) == 1:
        strengths = strengths * len(latents)
    if len(strengths) != len(latents):
        raise stage.InputError(
            f"--latents names {len(latents)}, --strengths {len(strengths)}; give one strength for each or one for all."
        )
    if len(set(latents)) < len(latents):
        raise stage.InputError("--latents names a latent twice; name it once, with the strength it shall have.")
    return dict(zip(latents, strengths, strict=True))


def latent_meanings(sae_path: str) -> dict[int, str]:
    """The best meaning of each latent that has one (`latent_index.read_meanings`)."""
    from latent_index import read_meanings

    return {latent: meaning.text for latent, meaning in read_meanings(sae_path).items()}


def strongest_latents(setup: Setup, ids: list[int], n: int) -> list[tuple[str, list[tuple[int, float]]]]:
    """Each token's text and its n strongest latents with their activations, normalised space; none on begin-of-text."""
    import torch

    with torch.inference_mode():
        acts = setup.model.activations(torch.tensor([ids], device=setup.model.device), setup.sae.info["site"])[0]
        values, indices = setup.sae.encode(acts)
    rows = []
    for token, value, index in zip(ids, values.tolist(), indices.tolist(), strict=True):
        pairs = sorted(zip(index, value, strict=True), key=lambda pair: -pair[1])[:n]
        kept = [] if token == setup.tokenizer.bos_id else [pair for pair in pairs if pair[1] > 0]
        rows.append((setup.tokenizer.decode([token]), kept))
    return rows


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

# Control characters that a model writes could move the cursor or worse. Pictures of them are shown.
_VISIBLE = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def seeds_of(config, n: int, first: int = 0) -> list[int]:
    return [config.seed * 1_000_003 + first + i for i in range(n)]


def check_prompts(setup: Setup, prompts: Sequence[list[int]], names: Iterable[str]) -> None:
    """Raise InputError, with its name, for the first prompt that does not fit the model's context."""
    for prompt, name in zip(prompts, names, strict=True):
        try:
            check_context(setup.model, len(prompt), setup.options["max_new_tokens"])
        except stage.InputError as error:
            raise stage.InputError(f"{name}: {error}") from None


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


def prompts_in(lines: Iterable[str]) -> list[str]:
    return [prompt for line in lines if (prompt := line.rstrip("\r\n")).strip()]


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
        except stage.InputError as error:  # a prompt is too long: said, and the session goes on
            print(f"error: {error}", file=sys.stderr)
        prompts = []
    return None


def chat_session(setup: Setup, config) -> None:
    from llama_3.chat import Message, encode_dialogue

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
        except stage.InputError as error:
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
    from llama_3.tokenizer import TextStream

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
    from llama_3.chat import ROLES

    try:
        # Not splitlines: the line separators of Unicode may stand inside a prompt.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise stage.InputError(f"There is no {path}; name a file of prompts.") from None
    except (OSError, ValueError) as error:
        raise stage.InputError(f"{path} cannot be read as text ({error}); save it as UTF-8.") from None
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
            raise stage.InputError(f"{path}, line {number} is not {wanted[command]}; correct it.")
        rows.append((number, row))
    if not rows:
        raise stage.InputError(f"{path} holds no prompts; write one a line.")
    return rows


def encode_request(setup: Setup, row: dict, config) -> list[int]:
    from llama_3.chat import Message, encode_dialogue

    if config.command == "text":
        return encode_text(setup.tokenizer, row["prompt"])
    said = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    messages = [Message(m["role"], m["content"]) for m in said]
    if config.system and messages[0].role != "system":
        messages.insert(0, Message("system", config.system))
    return encode_dialogue(setup.tokenizer, messages, setup.date)


def run_file(setup: Setup, requests: list[tuple[int, dict]], config) -> None:
    """Complete every request into OUTPUT_PATH. What a killed run has done waits in a folder beside it."""
    from llama_3.loading import TINY_LLAMA_DIR, checkpoint_identity

    rows = [row for _, row in requests]
    prompts = [encode_request(setup, row, config) for row in rows]
    check_prompts(setup, prompts, (f"{config.input_path}, line {number}" for number, _ in requests))
    free = ("input_path", "output_path", "batch_size")  # what the completions do not depend on
    decides = {name: value for name, value in vars(config).items() if name not in free}
    decides |= {"input_sha256": stage.sha256(config.input_path), "sae": setup.sae and setup.sae.info}
    decides |= {"model": checkpoint_identity(config.llama_model_dir or TINY_LLAMA_DIR)}
    output = Path(config.output_path)
    folder = output.with_name(output.name + ".partial")
    try:
        with stage.locked(folder):
            stage.begin_or_continue(folder, "llama_3_inference.py", decides)
            complete_file(setup, rows, prompts, folder / "completions.jsonl", config)
            with stage.atomic_path(output) as temporary:
                shutil.copyfile(folder / "completions.jsonl", temporary)
            shutil.rmtree(folder)
    except OSError as error:
        raise stage.InputError(f"{output} cannot be written ({error}); name another or mend that.") from None
    print(f"{len(rows):,} completions: {output}")


def complete_file(setup: Setup, rows: list[dict], prompts: list[list[int]], path: Path, config) -> None:
    """Write the lines of the completions that `path` does not hold yet."""
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]  # a killed process may leave half a line
    path.write_bytes(whole)
    n_done = whole.count(b"\n")
    with (
        path.open("a", encoding="utf-8") as file,
        stage.progress(total=len(rows), initial=n_done, unit="prompt") as bar,
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
    stage.check_at_least(config, batch_size=1, max_new_tokens=1, temperature=0, top_p=0, show_latents=0)
    if config.latents:
        strength_of_each(config.latents, config.strengths)
    if config.mode not in MODES:
        raise stage.InputError(f"There is no steering mode {config.mode!r}; choose one of {', '.join(MODES)}.")
    if (config.input_path is None) != (config.output_path is None):
        raise stage.InputError("--input_path and --output_path belong together; give both or neither.")
    if config.prompts and (config.command == "chat" or config.input_path):
        raise stage.InputError("--prompts are completed by text without --input_path; leave one of them out.")
    if config.output_path and Path(config.output_path).resolve() == Path(config.input_path).resolve():
        raise stage.InputError(f"{config.output_path} is the input too; name another file for --output_path.")
    if config.output_path and Path(config.output_path).is_dir():
        raise stage.InputError(f"{config.output_path} is a folder; name a file for --output_path.")


def main() -> None:
    config = stage.parse_constants(globals(), commands={"text": "complete text", "chat": "hold a dialogue"})
    check_options(config)
    requests = read_prompts(config.input_path, config.command) if config.input_path else []
    sys.stdout.reconfigure(errors="replace")  # not every terminal knows every character
    print(f"Loading {config.llama_model_dir or 'the embedded tiny Llama'} ...", file=sys.stderr, flush=True)
    setup = set_up(config)
    if config.command == "chat":
        from llama_3.chat import check_chat

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
        raise stage.InputError(f"What was written is not {error.encoding}; set the terminal to UTF-8.") from None


if __name__ == "__main__":
    stage.run(main)

"""Complete text or hold a chat with Llama 3, optionally steered by a latent of a sparse autoencoder.

Reads   LLAMA_MODEL_DIR; SAE_MODEL_PATH and what lies beside it. Without either: the embedded model and its SAE
Writes  completions to the terminal, as they come; with INPUT_PATH, JSON lines to OUTPUT_PATH
Method  steering adds strength x the latent's highest observed activation to its pre-activation before TopK, at the
        SAE's site (the original's h_bias), and keeps what the SAE does not reconstruct: strength 0 changes nothing

    python llama_3_inference.py text                            # asks for prompts, one a line; completes them together
    python llama_3_inference.py text --prompts "The file" "If the argument is" --latent 123 --strength 4
    python llama_3_inference.py chat --llama_model_dir models/llama_3.2-3B-Instruct --system "Answer in one sentence."
    python llama_3_inference.py text --input_path prompts.txt --output_path completions.jsonl
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import stage

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
LATENT: int | None = None  # latent to steer with
STRENGTH = 4.0  # in multiples of the latent's highest observed activation
SHOW_LATENTS = 0  # strongest latents listed per token
PROMPTS: list[str] = []  # text: what to complete; asked for when not given
SYSTEM = ""  # chat: the system message
DATE = "auto"  # chat: today's date as in "26 Jul 2024", or none; auto: that one from Llama 3.1 on, none before
INPUT_PATH: str | None = None  # file of prompts: one a line, or .jsonl with "prompt" or "messages" in each
OUTPUT_PATH: str | None = None  # JSON lines with the completions of INPUT_PATH
BATCH_SIZE = 8  # prompts of INPUT_PATH completed together
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


# ---- steering


def steer_by_latent(
    sae: "TopKSparseAutoencoder", latent: int, strength: float, highest: float
) -> "Callable[[Tensor], Tensor]":
    """A function for `model.intervene`: add strength x highest to the latent's pre-activation, keep the SAE's error.

    highest: the latent's highest observed activation, normalised space (NAME.latents.parquet).
    """
    import torch

    h_bias = torch.zeros(sae.n_latents, device=sae.b_pre.device)
    h_bias[latent] = strength * highest

    def steer(x: "Tensor") -> "Tensor":
        return x + (sae(x, h_bias) - sae(x))

    return steer


def highest_activation(sae_path: str, latent: int) -> float:
    """A latent's highest activation in NAME.latents.parquet. Raises InputError where it is not known."""
    import pyarrow.parquet as pq

    from sae import beside

    path = beside(sae_path, "latents.parquet")
    if not path.exists():
        raise stage.InputError(f"There is no {path}; run capture_top_activating_sentences.py first.")
    highest = pq.read_table(path, columns=["max"]).column("max")
    if not 0 <= latent < len(highest):
        raise stage.InputError(f"--latent {latent} is not among the {len(highest)} latents of {sae_path}.")
    if not (value := highest[latent].as_py()) > 0:
        raise stage.InputError(f"Latent {latent} of {sae_path} never fired; choose a living one.")
    return value


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
    from sae import load_sae_model

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if config.dtype == "auto" else config.dtype
    if dtype not in ("bfloat16", "float16", "float32"):
        raise stage.InputError(f"--dtype {dtype} is unknown; write bfloat16, float16 or float32.")
    model_dir = config.llama_model_dir or TINY_LLAMA_DIR
    sae, sae_path = None, config.sae_model_path
    if config.latent is not None or config.show_latents or sae_path:
        if sae_path is None and config.llama_model_dir is not None:
            raise stage.InputError("Latents need an SAE of this model; name it with --sae_model_path.")
        sae_path = sae_path or str(Path(TINY_LLAMA_DIR) / "sae.pth")
        sae = load_sae_model(sae_path, device)
        if "site" not in sae.info:
            raise stage.InputError(f"{sae_path} has no JSON that names its site; train it with this project.")
    rope_scaling_factor = sae.info.get("rope_scaling_factor") if sae else None
    model = load_model(model_dir, device, getattr(torch, dtype), rope_scaling_factor, packed=True)
    tokenizer = load_tokenizer(model_dir)
    if sae and sae.d_model != model.args.dim:
        raise stage.InputError(
            f"{sae_path} has d_model {sae.d_model}, {model_dir} has {model.args.dim}; they do not belong together."
        )
    steering = None
    if config.latent is not None:
        function = steer_by_latent(sae, config.latent, config.strength, highest_activation(sae_path, config.latent))
        steering = (sae.info["site"], function, (tokenizer.bos_id,))  # no SAE here was trained on begin-of-text
    options = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p")}
    date = None if config.date == "none" else config.date
    if config.date == "auto":  # the date header came with Llama 3.1, as did scaled RoPE
        date = _DATE_OF_THE_TEMPLATE if model.args.rope_scaling_factor != 1 else None
    meanings = latent_meanings(sae_path) if config.show_latents else {}
    return Setup(model, tokenizer, sae, meanings, options, steering, date)


def latent_meanings(sae_path: str) -> dict[int, str]:
    """What is known of an SAE's latents: the most certain meaning of each in NAME.meaning_*.yaml."""
    import yaml

    from llama_3.loading import TINY_LLAMA_DIR
    from sae import beside

    if Path(sae_path).resolve() == Path(TINY_LLAMA_DIR, "sae.pth"):
        paths = sorted((stage.PROJECT_DIR / "latent_index_meaning").glob("*.yaml"))
    else:
        name = beside(sae_path, "meaning_")
        paths = sorted(name.parent.glob(f"{name.name}*.yaml"))
    best: dict[int, dict] = {}
    for path in paths:
        entries = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        for latent, entry in entries.items():
            if latent not in best or entry["certainty"] > best[latent]["certainty"]:
                best[latent] = entry
    return {latent: entry["common_semantic"] for latent, entry in best.items()}


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


def print_latents(setup: Setup, ids: list[int], n: int) -> None:
    for text, latents in strongest_latents(setup, ids, n):
        named = [f"{i} {value:.2f} {setup.meanings.get(i, '')}".strip() for i, value in latents]
        print(f"    {text!r:16} {'; '.join(named)}")


# ---- the terminal


def seeds_of(config, n: int, first: int = 0) -> list[int]:
    return [config.seed * 1_000_003 + first + i for i in range(n)]


def complete_texts(setup: Setup, prompts: list[str], config) -> None:
    """Complete prompts together, clean and (with a latent) steered side by side, as they grow; Ctrl-C ends them."""
    options = {**setup.options, "seeds": seeds_of(config, len(prompts))}
    streams = {"clean": stream_text(setup.model, setup.tokenizer, prompts, **options)}
    if setup.steering:
        streams["steered"] = stream_text(setup.model, setup.tokenizer, prompts, **options, steering=setup.steering)
    texts = {kind: [""] * len(prompts) for kind in streams}
    with side_by_side(prompts, texts):
        for steps in zip_longest(*streams.values()):
            for kind, pieces in zip(streams, steps, strict=True):
                if pieces:
                    texts[kind] = [text + piece for text, piece in zip(texts[kind], pieces, strict=True)]
    for i, prompt in enumerate(prompts):
        print(repr(prompt))
        for kind, rows in texts.items():
            print(f"  {kind:8} {rows[i]!r}")
        if config.show_latents:
            for kind, rows in texts.items():
                print(f"  latents, {kind}")
                print_latents(setup, encode_text(setup.tokenizer, prompt + rows[i]), config.show_latents)
        print()


@contextlib.contextmanager
def side_by_side(prompts: list[str], texts: dict[str, list[str]]) -> Iterator[None]:
    """Where somebody watches, show a table of the texts as they grow; at the end, or at Ctrl-C, it makes way."""
    if not sys.stdout.isatty():
        yield
        return
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table() -> Table:
        grown = Table(*texts, show_lines=True, expand=True)
        for prompt, *row in zip(prompts, *texts.values(), strict=True):
            grown.add_row(*(Text.assemble((prompt, "bold"), text) for text in row))
        return grown

    with contextlib.suppress(KeyboardInterrupt), Live(get_renderable=table, transient=True, refresh_per_second=10):
        yield


def ask(question: str) -> str | None:
    """A line typed by the user; None at the end (Ctrl-D) or at Ctrl-C."""
    try:
        return input(question)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def text_session(setup: Setup, config) -> None:
    if config.prompts:
        return complete_texts(setup, list(config.prompts), config)
    if not sys.stdin.isatty():
        if prompts := [line.rstrip("\n") for line in sys.stdin if line.strip()]:
            complete_texts(setup, prompts, config)
        return None
    print("Write one prompt a line; an empty line completes them together. Ctrl-C stops a completion, Ctrl-D leaves.")
    prompts: list[str] = []
    while (line := ask("> ")) is not None:
        if line:
            prompts.append(line)
        elif prompts:
            try:
                complete_texts(setup, prompts, config)
            except stage.InputError as error:  # too long, for example: said, and the session goes on
                print(f"error: {error}", file=sys.stderr)
            prompts = []
    return None


def chat_session(setup: Setup, config) -> None:
    from llama_3.chat import Message, encode_dialogue

    if sys.stdin.isatty():
        print("Write a message. Ctrl-C stops an answer, Ctrl-D leaves.")
    messages = [Message("system", config.system)] if config.system else []
    n_turns = 0
    while (line := ask("> ")) is not None:
        if not line.strip():
            continue
        messages.append(Message("user", line))
        answer = ""
        options = {**setup.options, "seeds": seeds_of(config, 1, n_turns), "steering": setup.steering}
        try:
            for (piece,) in stream_chat(setup.model, setup.tokenizer, [messages], setup.date, **options):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            pass
        except stage.InputError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        print()
        messages.append(Message("assistant", answer))
        n_turns += 1
        if config.show_latents:
            print_latents(setup, encode_dialogue(setup.tokenizer, messages, setup.date), config.show_latents)


# ---- files of prompts


def read_prompts(path: str, command: str) -> list[dict]:
    """The requests of a file: one prompt a line, or JSON lines with "prompt" or, for chat, "messages"."""
    from llama_3.chat import ROLES

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise stage.InputError(f"There is no {path}; name a file of prompts.") from None
    except (OSError, ValueError) as error:
        raise stage.InputError(f"{path} cannot be read as text ({error}); save it as UTF-8.") from None
    if not path.endswith(".jsonl"):
        return [{"prompt": line} for line in lines if line]
    wanted = {"text": 'an object with a text "prompt"', "chat": 'an object with a text "prompt" or a list "messages"'}
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            right = isinstance(row.get("prompt"), str)
            if command == "chat" and "messages" in row:
                right = all(m["role"] in ROLES and isinstance(m["content"], str) for m in row["messages"])
        except (ValueError, TypeError, KeyError, AttributeError):
            right = False
        if not right:
            raise stage.InputError(f"{path}, line {number} is not {wanted[command]}; correct it.")
        rows.append(row)
    return rows


def run_file(setup: Setup, rows: list[dict], config) -> None:
    """Complete every request into OUTPUT_PATH. What a killed run had done stays in a partial file beside it."""
    from llama_3.chat import Message, encode_dialogue

    prompts = []
    for row in rows:
        if config.command == "chat":
            messages = [Message(m["role"], m["content"]) for m in row.get("messages", [])]
            if "messages" not in row:
                system = [Message("system", config.system)] if config.system else []
                messages = [*system, Message("user", row["prompt"])]
            prompts.append(encode_dialogue(setup.tokenizer, messages, setup.date))
        else:
            prompts.append(encode_text(setup.tokenizer, row["prompt"]))
    check_context(setup.model, max(map(len, prompts), default=0), config.max_new_tokens)
    output = Path(config.output_path)
    partial = output.with_name(output.name + ".partial")
    decides = json.dumps({**vars(config), "rows": stage.sha256(config.input_path)})
    with stage.locked(output.parent):
        done: list[str] = []
        if partial.exists():
            first, *lines = partial.read_text(encoding="utf-8").split("\n")
            done = lines[:-1] if first == decides else []  # the last line is not whole
        partial.write_text("\n".join([decides, *done, ""]), encoding="utf-8")
        with partial.open("a", encoding="utf-8") as file, stage.progress(total=len(rows), unit="prompt") as bar:
            bar.update(len(done))
            for start in range(len(done), len(rows), config.batch_size):
                batch = range(start, min(start + config.batch_size, len(rows)))
                for i, result in zip(
                    batch, complete_batch(setup, [prompts[i] for i in batch], start, config), strict=True
                ):
                    file.write(json.dumps({**rows[i], **result}, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(batch))
        with stage.atomic_path(output) as temporary:
            temporary.write_text(partial.read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
        partial.unlink()
    print(f"{len(rows):,} completions: {output}")


def complete_batch(setup: Setup, prompts: list[list[int]], first: int, config) -> list[dict]:
    """Completions of requests `first` and following, with what is needed to repeat them."""
    seeds = seeds_of(config, len(prompts), first)
    added: list[list[int]] = [[] for _ in prompts]
    options = {**setup.options, "stop_tokens": setup.tokenizer.stop_ids, "seeds": seeds, "steering": setup.steering}
    for step in generate(setup.model, prompts, **options):
        for row, token in zip(added, step, strict=True):
            if token is not None:
                row.append(token)
    results = []
    for prompt, tokens, seed in zip(prompts, added, seeds, strict=True):
        context = setup.tokenizer.decode(prompt)
        result = {
            "completion": setup.tokenizer.decode(prompt + tokens)[len(context) :],
            "n_prompt_tokens": len(prompt),
            "n_tokens": len(tokens),
            "stopped": len(tokens) < config.max_new_tokens,  # by a stop token, not by the limit
            "seed": seed,
        }
        if config.latent is not None:
            result |= {"latent": config.latent, "strength": config.strength}
        if config.show_latents:
            result["latents"] = strongest_latents(setup, prompt + tokens, config.show_latents)
        results.append(result)
    return results


def main() -> None:
    config = stage.parse_constants(globals(), commands={"text": "complete text", "chat": "hold a dialogue"})
    if (config.input_path is None) != (config.output_path is None):
        raise stage.InputError("--input_path and --output_path belong together; give both or neither.")
    rows = read_prompts(config.input_path, config.command) if config.input_path else []
    setup = set_up(config)
    if config.command == "chat":
        from llama_3.chat import check_chat

        check_chat(setup.tokenizer)
    if config.input_path:
        run_file(setup, rows, config)
    elif config.command == "chat":
        chat_session(setup, config)
    else:
        text_session(setup, config)


if __name__ == "__main__":
    stage.run(main)

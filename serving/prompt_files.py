"""Complete a file of prompts into a file of JSON lines; a killed run continues where it stopped."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_3.chat import ROLES, Message, encode_dialogue
from llama_3.checkpoint import checkpoint_identity
from llama_3.generation import check_context, encode_text
from llama_3.model import Intervention
from pipeline.errors import InputError
from pipeline.files import atomic_path, locked, sha256
from pipeline.manifests import begin_or_continue
from pipeline.progress import progress_bar
from serving.engine import Engine, Row, Token
from serving.steered_model import Sampling, SteeredModel, strongest_latents
from serving.steering import Steering

Command = Literal["text", "chat"]


@dataclass(frozen=True)
class Session:
    """A model, and how its user wants prompts completed."""

    opened: SteeredModel
    engine: Engine  # continues all prompts
    steering: Steering
    interventions: Sequence[Intervention]  # `steering` for this model; none where nothing is steered
    sampling: Sampling
    batch_size: int  # prompts completed together
    show_latents: int  # strongest latents listed per token


def check_prompts(session: Session, prompts: Sequence[list[int]], names: Iterable[str]) -> None:
    """Raise InputError, with the prompt's name, for the first one that does not fit the model's context."""
    for prompt, name in zip(prompts, names, strict=True):
        try:
            check_context(session.opened.model, len(prompt), session.sampling.max_new_tokens)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


# ---- requests


def read_prompts(path: str, command: Command) -> list[tuple[int, dict[str, Any]]]:
    """The requests of a file by line number: prompts, or JSON objects with "prompt" or, for chat, "messages".

    Empty lines are skipped.
    """
    try:
        # Not splitlines: a prompt may contain Unicode's line separators.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"There is no {path}; name a file of prompts.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); save it as UTF-8.") from None
    wanted = {"text": 'an object with a text "prompt"', "chat": 'an object with a text "prompt" or a list "messages"'}
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.lower().endswith(".jsonl"):
            rows.append((number, {"prompt": line}))
            continue
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
            json.dumps(row, ensure_ascii=False).encode()  # fails for half a surrogate pair
            if command == "chat" and "messages" in row:
                is_right = all(m["role"] in ROLES and isinstance(m["content"], str) for m in row["messages"])
                is_right &= len(row["messages"]) > 0
            else:
                is_right = isinstance(row["prompt"], str)
        except (ValueError, TypeError, KeyError):
            is_right = False
        if not is_right:
            raise InputError(f"{path}, line {number} is not {wanted[command]}; correct it.")
        rows.append((number, row))
    if not rows:
        raise InputError(f"{path} holds no prompts; write one per line.")
    return rows


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a request. Raises ValueError for a field that stands in it twice: one would be lost."""
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError
    return fields


def check_fields(session: Session, requests: list[tuple[int, dict[str, Any]]], input_path: str) -> None:
    """Raise InputError for a request with a field that its result adds."""
    added = ["completion", "n_prompt_tokens", "n_tokens", "stopped", "seed"]
    added += ["steering"] * session.steering.steers + ["latents"] * bool(session.show_latents)
    for number, row in requests:
        if both := [name for name in added if name in row]:
            raise InputError(
                f'{input_path}, line {number} has a field "{both[0]}", which its result would overwrite; rename it.'
            )


def encode_request(opened: SteeredModel, row: dict[str, Any], command: Command, system: str) -> list[int]:
    """Token ids of a request. system: the system message for chats without one."""
    if command == "text":
        return encode_text(opened.tokenizer, row["prompt"])
    turns = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    messages = [Message(turn["role"], turn["content"]) for turn in turns]
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return encode_dialogue(opened.tokenizer, messages, opened.date)


# ---- completions


def complete_file(
    session: Session,
    requests: list[tuple[int, dict[str, Any]]],
    command: Command,
    system: str,
    input_path: str,
    output_path: str,
    decides: dict[str, Any],
) -> None:
    """Complete every request into `output_path`. A folder beside it keeps what a killed run has done.

    decides: the options that the completions depend on; a run that was begun with others is not continued.
    """
    check_fields(session, requests, input_path)
    opened, rows = session.opened, [row for _, row in requests]
    prompts = [encode_request(opened, row, command, system) for row in rows]
    check_prompts(session, prompts, (f"{input_path}, line {number}" for number, _ in requests))
    decides |= {"input_sha256": sha256(input_path), "sae": opened.sae and opened.sae.info}
    decides |= {"model": checkpoint_identity(opened.choice.model_dir)}
    output = Path(output_path)
    folder = output.with_name(output.name + ".partial")
    try:
        with locked(folder):
            begin_or_continue(folder, "llama_3_inference.py", decides)
            complete_rows(session, rows, prompts, folder / "completions.jsonl")
            with atomic_path(output) as temporary:
                shutil.copyfile(folder / "completions.jsonl", temporary)
            shutil.rmtree(folder)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}); correct that or name another --output_path.") from None
    print(f"{len(rows):,} completions: {output}")


def complete_rows(session: Session, rows: list[dict[str, Any]], prompts: list[list[int]], path: Path) -> None:
    """Append the completions that `path` does not have yet."""
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]  # a killed process may leave half a line
    path.write_bytes(whole)
    n_done = whole.count(b"\n")
    with (
        path.open("a", encoding="utf-8") as file,
        progress_bar(total=len(rows), initial=n_done, unit="prompt") as bar,
    ):
        for request, result in zip(rows[n_done:], completed(session, prompts[n_done:], n_done), strict=True):
            file.write(json.dumps({**request, **result}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()


def completed(session: Session, prompts: list[list[int]], first: int) -> Iterator[dict[str, Any]]:
    """The completion of each request from number `first` on, in their order, with what is needed to repeat it."""
    rows = session.opened.rows(prompts, session.sampling, first, session.interventions)
    tokens: list[list[int]] = [[] for _ in rows]
    stopped: dict[int, bool] = {}  # of those that have ended but wait for an earlier one
    n_given = 0
    for number, event in session.engine.stream(rows):
        if isinstance(event, Token):
            tokens[number].append(event.id)
            continue
        if event.error is not None:
            raise event.error
        stopped[number] = event.reason == "stop"
        while n_given in stopped:
            yield as_result(session, rows[n_given], tokens[n_given], stopped.pop(n_given))
            n_given += 1


def as_result(session: Session, row: Row, tokens: list[int], stopped: bool) -> dict[str, Any]:
    """What a request gains. stopped: by a stop token, not by the limit."""
    opened = session.opened
    result: dict[str, Any] = {
        "completion": opened.text_after(row.prompt, tokens),
        "n_prompt_tokens": len(row.prompt),
        "n_tokens": len(tokens),
        "stopped": stopped,
        "seed": row.seed,
    }
    if session.steering.steers:
        result["steering"] = as_json(session.steering)
    if session.show_latents:
        result["latents"] = strongest_latents(opened, [*row.prompt, *tokens], session.show_latents)
    return result


def as_json(steering: Steering) -> dict[str, Any]:
    """What steers, as a result states it."""
    found: dict[str, Any] = {}
    if steering.strengths:
        strengths = {str(latent): strength for latent, strength in steering.strengths.items()}
        found |= {"mode": steering.mode, "keep_error": steering.keep_error, "strengths": strengths}
    if steering.control_vectors:
        found["control_vectors"] = dict(steering.control_vectors)
    return found

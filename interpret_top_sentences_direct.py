"""Ask what each latent means one request at a time, for servers without batches: local models, or when hours matter.

Reads   what interpret_top_sentences_send_batches.py reads, and its journal: latents in a batch are left out
Writes  RESPONSE_OUTPUT_DIR/direct.jsonl: a line an answer, as it comes, of the same form as a batch's
Method  the same questions, CONCURRENCY at a time, at most REQUESTS_PER_MINUTE. Latents that have an answer are left
        out: after a kill run it again, only what was under way is asked again. A request that breaks off is repeated
Cost    it prints requests, tokens and price (twice that of batches) before anything is sent, and asks

    ANTHROPIC_BASE_URL=http://localhost:8080 ANTHROPIC_API_KEY=none python interpret_top_sentences_direct.py \\
        --model my-model --effort "" --latents 0-99
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import interpret_top_sentences_send_batches as batches
import message_batches
import stage

TOP_SENTENCES_DICT_FILEPATH = batches.TOP_SENTENCES_DICT_FILEPATH  # top sentences of each latent
RESPONSE_IDS_FILEPATH = batches.RESPONSE_IDS_FILEPATH  # journal of the batches
RESPONSE_OUTPUT_DIR = batches.RESPONSE_OUTPUT_DIR  # folder for the answers; latents that have one are not asked again
MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one NAME.json names when not given
AGGREGATION = batches.AGGREGATION  # how a latent's activation over a sentence was measured: mean, max or last
LATENTS: str | None = None  # which latents, such as 0-99,512; all when not given
MODEL = batches.MODEL  # who is asked
EFFORT = (
    batches.EFFORT
)  # how much it thinks before it writes; empty for models and servers that do not know this option
MAX_TOKENS = batches.MAX_TOKENS  # of an answer, thinking included
OUTPUT_TOKENS = batches.OUTPUT_TOKENS  # of an answer on average, for the price
SENTENCES_PER_REQUEST = batches.SENTENCES_PER_REQUEST  # strongest ones shown
MIN_SENTENCES = batches.MIN_SENTENCES  # a latent with fewer is not asked about
MARK_SHARE = batches.MARK_SHARE  # tokens with at least this share of the sentence's highest activation are marked
CONCURRENCY = 8  # requests under way at a time
REQUESTS_PER_MINUTE = 1000.0  # at most
RETRIES = 6  # of a request when the server is busy or out of order
YES = False  # send without asking
DRY_RUN = False  # stop after the price

_HOPELESS = 10  # errors before the first success, after which it stops: they will not end


def ask(client, request: dict) -> dict:
    """The answer to a request, in the form of a line of a batch's results.

    A request that the server refuses for what it is gives an "errored" line. Raises the API's error for what would
    befall the next request too: no connection, no credit, a wrong key, an unknown model.
    """
    import anthropic

    try:
        message = client.messages.create(**request["params"])
    except (anthropic.BadRequestError, anthropic.ContentTooLargeError, anthropic.UnprocessableEntityError) as error:
        if "credit balance" in str(error).lower():
            raise
        said = {"type": error.type or "invalid_request_error", "message": error.api_message or str(error)}
        errored = {"type": "errored", "error": {"type": "error", "error": said, "request_id": error.request_id}}
        return {"custom_id": request["custom_id"], "result": errored}
    return {"custom_id": request["custom_id"], "result": {"type": "succeeded", "message": message.to_dict(mode="json")}}


def ask_all(client, requests: Iterator[dict], concurrency: int, per_minute: float) -> Iterator[dict]:
    """Answers in the order in which they come: `concurrency` requests at a time, at most `per_minute` started.

    When one raises, no more are started; its error is raised when the answers under way have come.
    """
    running: set[Future] = set()
    failure: BaseException | None = None
    following = next(requests, None)
    next_start = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        while running or (following and not failure):
            pause = max(0.0, next_start - time.monotonic())
            may_start = following and not failure and len(running) < concurrency
            if may_start and not pause:
                running.add(pool.submit(ask, client, following))
                following = next(requests, None)
                next_start = time.monotonic() + 60 / per_minute
                continue
            if not running:
                time.sleep(pause)
                continue
            finished, running = wait(running, timeout=pause if may_start else None, return_when=FIRST_COMPLETED)
            for future in finished:
                if future.exception():
                    failure = future.exception()
                else:
                    yield future.result()
    if failure:
        raise failure


def append_answers(path: Path, answers: Iterable[dict]) -> None:
    """Write each answer to the end of the file as it comes. Raises InputError when the server refuses everything."""
    n_succeeded = n_errored = 0
    try:
        end_last_line(path)
        with open(path, "ab") as file:
            for answer in answers:
                file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                file.flush()
                succeeded = answer["result"]["type"] == "succeeded"
                n_succeeded, n_errored = n_succeeded + succeeded, n_errored + (not succeeded)
                if n_errored == _HOPELESS and not n_succeeded:
                    said = answer["result"]["error"]["error"]["message"]
                    raise stage.InputError(f"The server refuses every request ({said}); correct the option it names.")
    except OSError as error:
        raise stage.InputError(
            f"Could not write {path} ({error}); free some disk and run again to continue."
        ) from error
    print(f"{n_succeeded:,} answers, {n_errored:,} refused: {path}")


def end_last_line(path: Path) -> None:
    """Let the file end with a whole line: a kill may have cut the last one short."""
    whole, newline, last = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if not last:
        return
    try:
        json.loads(last)
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:
        os.truncate(path, len(whole) + len(newline))


def main() -> None:
    config = stage.parse_constants(globals())
    if config.concurrency < 1 or config.requests_per_minute <= 0:
        raise stage.InputError("--concurrency and --requests_per_minute must be above 0; choose larger ones.")
    batches.check_top_sentences(Path(config.top_sentences_dict_filepath))
    message_batches.require_consent_possible(config.yes, config.dry_run)
    client = message_batches.connect(config.retries)
    journal_path, response_dir = batches.journal_and_answers(config)
    out_path = response_dir / "direct.jsonl"
    print(f"Reading {config.top_sentences_dict_filepath} and the answers in {response_dir}; writing {out_path}.")
    purpose = f"meanings by {config.aggregation}"
    with (
        message_batches.open_journal(journal_path, purpose) as journal,
        stage.locked(response_dir),
        message_batches.api_errors(),
    ):
        done, under_way = message_batches.answered(response_dir), message_batches.pending(journal, response_dir)
        print(f"{len(done):,} latents have an answer, {len(under_way):,} are in batches not retrieved yet.")
        with message_batches.spooled(batches.questions(config, done | under_way), response_dir) as requests:
            if requests.n == 0:
                print("Nothing is left to ask.")
                return
            tokens = batches.output_tokens(response_dir, config.output_tokens)
            message_batches.announce(client, requests, tokens, price_ratio=1.0)
            if message_batches.may_send(config.yes, config.dry_run):
                each = map(json.loads, requests.lines())
                answers = ask_all(client, each, config.concurrency, config.requests_per_minute)
                append_answers(out_path, stage.progress(answers, total=requests.n, desc="asking", unit="request"))


if __name__ == "__main__":
    stage.run(main)

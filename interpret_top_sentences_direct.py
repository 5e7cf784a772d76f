"""Ask what each latent means, one request at a time: for local servers without batches, or when hours matter.

Reads   what interpret_top_sentences_send_batches.py reads, and its journal: latents in a batch are left out
Writes  RESPONSE_OUTPUT_DIR/direct.jsonl: a line per answer, as it arrives, in the format of a batch's
Method  the same questions, CONCURRENCY at a time, at most REQUESTS_PER_MINUTE. Latents that have an answer are left
        out: after a kill run it again, and only requests that were in flight are repeated. Broken requests are retried
Cost    prints requests, tokens and price (twice that of batches) and asks before anything is sent

    ANTHROPIC_BASE_URL=http://localhost:8080 ANTHROPIC_API_KEY=none python interpret_top_sentences_direct.py \\
        --model my-model --effort "" --latents 0-99
"""

import json
from pathlib import Path

from claude.answers import answered, fill_in, mean_output_tokens
from claude.connection import api_errors, connect
from claude.direct import append_answers, ask_all
from claude.journal import open_journal
from claude.prices import FULL_PRICE
from claude.questions import Questions, parse_latents
from claude.requests import Respondent, announce, may_send, require_consent_possible, spooled
from latents.origin import source_of, tokenizer_of
from latents.tables import TOP, Aggregation, open_top
from pipeline.files import locked
from pipeline.options import Count, CountOrZero, NotNegative, Positive, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run
from pipeline.sae_files import without_ending

# Same as in interpret_top_sentences_send_batches.py, so that both ask the same questions.
TOP_SENTENCES_DICT_FILEPATH = "data/sae.top.parquet"  # top sentences of each latent
RESPONSE_IDS_FILEPATH = "{name}.{aggregation}.response_ids.jsonl"  # journal; {name}: the NAME of NAME.top.parquet
RESPONSE_OUTPUT_DIR = "{name}.{aggregation}.responses"  # answers; latents that have one are not asked about again
MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one NAME.json names when not given
AGGREGATION: Aggregation = "mean"  # how a latent's activation over a sentence is measured
LATENTS: str | None = None  # which latents, such as 0-99,512; all when not given
MODEL = "claude-haiku-5-5"  # the model that is asked
EFFORT = "low"  # how much it thinks before it writes; empty for models and servers without this option
MAX_TOKENS: Count = 4000  # most tokens per answer, thinking included
OUTPUT_TOKENS: Count = 500  # tokens assumed per answer for the price; 387 in the published run, with another tokenizer
SENTENCES_PER_REQUEST: Count = 50  # top sentences shown to the model
MIN_SENTENCES: Count = 5  # latents with fewer are left out
MARK_SHARE: NotNegative = 0.5  # tokens are marked from this share of the sentence's highest activation
CONCURRENCY: Count = 8  # requests in flight at a time
REQUESTS_PER_MINUTE: Positive = 1000.0  # most requests started per minute
RETRIES: CountOrZero = 6  # retries of a request when the server is busy or failing
YES = False  # send without asking
DRY_RUN = False  # stop after printing the price


def main() -> None:
    config = parse_constants(globals())
    top_path = Path(config.top_sentences_dict_filepath)
    open_top(top_path).close()  # a bad table is reported before anything else
    require_consent_possible(config.yes, config.dry_run)
    client = connect(config.retries)
    name = without_ending(top_path, f".{TOP.suffix}")
    journal_path = fill_in(config.response_ids_filepath, config.aggregation, name)
    response_dir = fill_in(config.response_output_dir, config.aggregation, name)
    out_path = response_dir / "direct.jsonl"
    questions = Questions(
        top_path,
        config.aggregation,
        parse_latents(config.latents),
        config.sentences_per_request,
        config.min_sentences,
        config.mark_share,
        Respondent(config.model, config.max_tokens, config.effort),
    )
    tokenizer = tokenizer_of(source_of(f"{name}.pth"), config.model_dir, "--model_dir")
    print(f"Reading {top_path} and the answers in {response_dir}; writing {out_path}.")

    purpose = f"meanings by {config.aggregation}"
    with open_journal(journal_path, purpose) as journal, locked(response_dir), api_errors():
        done, under_way = answered(response_dir), journal.pending(response_dir)
        print(f"{len(done):,} latents have an answer, {len(under_way):,} are in batches not retrieved yet.")
        with spooled(questions.requests(tokenizer.token_bytes, done | under_way), response_dir) as requests:
            if requests.n == 0:
                print("Nothing is left to ask.")
                return
            announce(client, requests, mean_output_tokens(response_dir, config.output_tokens), FULL_PRICE)
            if may_send(config.yes, config.dry_run):
                each = map(json.loads, requests.lines())
                answers = ask_all(client, each, config.concurrency, config.requests_per_minute)
                append_answers(out_path, progress_bar(answers, total=requests.n, desc="asking", unit="request"))


if __name__ == "__main__":
    run(main)

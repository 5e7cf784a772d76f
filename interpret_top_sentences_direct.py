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
from pathlib import Path

from claude import batches, direct, questions
from claude.direct import append_answers, ask_all
from claude.questions import journal_and_answers, output_tokens
from latents.tables import Aggregation, check_top_sentences
from pipeline.files import locked
from pipeline.options import Count, CountOrZero, NotNegative, Positive, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run

TOP_SENTENCES_DICT_FILEPATH = questions.TOP_SENTENCES_DICT_FILEPATH  # top sentences of each latent
RESPONSE_IDS_FILEPATH = questions.RESPONSE_IDS_FILEPATH  # journal of the batches
RESPONSE_OUTPUT_DIR = questions.RESPONSE_OUTPUT_DIR  # folder for the answers; latents that have one are not asked again
MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one NAME.json names when not given
AGGREGATION: Aggregation = questions.AGGREGATION  # how a latent's activation over a sentence is measured
LATENTS: str | None = None  # which latents, such as 0-99,512; all when not given
MODEL = questions.MODEL  # who is asked
EFFORT = questions.EFFORT  # how much it thinks before it writes; empty where this option is not known
MAX_TOKENS: Count = questions.MAX_TOKENS  # of an answer, thinking included
OUTPUT_TOKENS: Count = questions.OUTPUT_TOKENS  # of an answer on average, for the price
SENTENCES_PER_REQUEST: Count = questions.SENTENCES_PER_REQUEST  # strongest ones shown
MIN_SENTENCES: Count = questions.MIN_SENTENCES  # a latent with fewer is not asked about
MARK_SHARE: NotNegative = (
    questions.MARK_SHARE
)  # share of the sentence's highest activation from which tokens are marked
CONCURRENCY: Count = direct.CONCURRENCY  # requests under way at a time
REQUESTS_PER_MINUTE: Positive = direct.REQUESTS_PER_MINUTE  # at most
RETRIES: CountOrZero = direct.RETRIES  # of a request when the server is busy or out of order
YES = False  # send without asking
DRY_RUN = False  # stop after the price


def main() -> None:
    config = parse_constants(globals())
    check_top_sentences(Path(config.top_sentences_dict_filepath))
    batches.require_consent_possible(config.yes, config.dry_run)
    client = batches.connect(config.retries)
    journal_path, response_dir = journal_and_answers(config)
    out_path = response_dir / "direct.jsonl"
    print(f"Reading {config.top_sentences_dict_filepath} and the answers in {response_dir}; writing {out_path}.")
    purpose = f"meanings by {config.aggregation}"
    with (
        batches.open_journal(journal_path, purpose) as journal,
        locked(response_dir),
        batches.api_errors(),
    ):
        done, under_way = batches.answered(response_dir), batches.pending(journal, response_dir)
        print(f"{len(done):,} latents have an answer, {len(under_way):,} are in batches not retrieved yet.")
        with batches.spooled(questions.questions(config, done | under_way), response_dir) as requests:
            if requests.n == 0:
                print("Nothing is left to ask.")
                return
            tokens = output_tokens(response_dir, config.output_tokens)
            batches.announce(client, requests, tokens, price_ratio=1.0)
            if batches.may_send(config.yes, config.dry_run):
                each = map(json.loads, requests.lines())
                answers = ask_all(client, each, config.concurrency, config.requests_per_minute)
                append_answers(out_path, progress_bar(answers, total=requests.n, desc="asking", unit="request"))


if __name__ == "__main__":
    run(main)

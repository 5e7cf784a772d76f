"""Ask Claude what each latent means: one question a latent, with the sentences that activate it most, in batches.

Reads   TOP_SENTENCES_DICT_FILEPATH: NAME.top.parquet of capture_top_activating_sentences.py; NAME.json beside it
Writes  RESPONSE_IDS_FILEPATH, the journal of what was sent: keep it, it is the way to answers that were paid for
Method  strongest sentence first, as far as the model read it, the tokens that activate the latent <<marked>>. Latents
        that have an answer in RESPONSE_OUTPUT_DIR, or are in a batch that was not retrieved yet, are left out: run it
        again to send what failed. claude/batches.py says how nothing is paid twice
Cost    it prints requests, tokens and price before anything is sent, and asks; minutes for 65,536 latents

    export ANTHROPIC_API_KEY=...
    python interpret_top_sentences_send_batches.py --top_sentences_dict_filepath data/sae.top.parquet --latents 0-99
"""

from pathlib import Path

from claude import batches, questions
from claude.questions import journal_and_answers, output_tokens
from latents.tables import Aggregation, check_top_sentences
from pipeline.options import Count, NotNegative, parse_constants
from pipeline.run import run

TOP_SENTENCES_DICT_FILEPATH = questions.TOP_SENTENCES_DICT_FILEPATH  # top sentences of each latent
RESPONSE_IDS_FILEPATH = questions.RESPONSE_IDS_FILEPATH  # journal; {name} is that of NAME.top.parquet
RESPONSE_OUTPUT_DIR = questions.RESPONSE_OUTPUT_DIR  # answers; latents that have one are not asked again
MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one NAME.json names when not given
AGGREGATION: Aggregation = (
    questions.AGGREGATION
)  # how a latent's activation over a sentence was measured: mean, max or last
LATENTS: str | None = None  # which latents, such as 0-99,512; all when not given
MODEL = questions.MODEL  # who is asked
EFFORT = (
    questions.EFFORT
)  # how much it thinks before it writes; empty for models and servers that do not know this option
MAX_TOKENS: Count = questions.MAX_TOKENS  # of an answer, thinking included
OUTPUT_TOKENS: Count = questions.OUTPUT_TOKENS  # of an answer on average, for the price; 387 in the published run
SENTENCES_PER_REQUEST: Count = questions.SENTENCES_PER_REQUEST  # strongest ones shown
MIN_SENTENCES: Count = questions.MIN_SENTENCES  # a latent with fewer is not asked about
MARK_SHARE: NotNegative = (
    questions.MARK_SHARE
)  # share of the sentence's highest activation from which tokens are marked
REQUESTS_PER_BATCH: Count = 10_000  # the API allows 100,000, and 256 MB
SETTLE_S: NotNegative = 300.0  # seconds after an unclear failure until an unlisted batch counts as not created
YES = False  # send without asking
DRY_RUN = False  # stop after the price


def main() -> None:
    config = parse_constants(globals())
    check_top_sentences(Path(config.top_sentences_dict_filepath))
    batches.require_consent_possible(config.yes, config.dry_run)
    client = batches.connect()
    journal_path, response_dir = journal_and_answers(config)
    print(f"Reading {config.top_sentences_dict_filepath} and the answers in {response_dir}; writing {journal_path}.")

    purpose = f"meanings by {config.aggregation}"
    with batches.open_journal(journal_path, purpose) as journal, batches.api_errors():
        batches.reconcile(client, journal, config.settle_s)
        done, under_way = batches.answered(response_dir), batches.pending(journal, response_dir)
        print(f"{len(done):,} latents have an answer, {len(under_way):,} are in batches not retrieved yet.")
        with batches.spooled(questions.questions(config, done | under_way), journal_path.parent) as requests:
            if requests.n == 0:
                print("Nothing is left to send.")
                return
            price_ratio = batches.BATCH_PRICE_RATIO
            batches.announce(client, requests, output_tokens(response_dir, config.output_tokens), price_ratio)
            if batches.may_send(config.yes, config.dry_run):
                batches.send(client, journal, requests, config.requests_per_batch, config.settle_s)
                print(
                    f"{requests.n:,} requests sent. Next: python interpret_top_sentences_retrieve_batches.py --wait "
                    f"--response_ids_filepath {journal_path} --response_output_dir {response_dir}"
                )


if __name__ == "__main__":
    run(main)

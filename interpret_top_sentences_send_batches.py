"""Ask Claude what each latent means: a question per latent, with the sentences that activate it most, in batches.

Reads   TOP_SENTENCES_DICT_FILEPATH: NAME.top.parquet of capture_top_activating_sentences.py; NAME.json beside it
Writes  RESPONSE_IDS_FILEPATH, the journal of what was sent: keep it, you need it to fetch the answers you paid for
Method  strongest sentence first, as far as the model read it, the tokens that activate the latent <<marked>>. Latents
        that have an answer in RESPONSE_OUTPUT_DIR, or are in a batch not retrieved yet, are left out: run it again to
        send what failed. claude/batches.py explains how nothing is paid for twice
Cost    prints requests, tokens and price and asks before anything is sent; minutes for 65,536 latents

    export ANTHROPIC_API_KEY=...
    python interpret_top_sentences_send_batches.py --top_sentences_dict_filepath data/sae.top.parquet --latents 0-99
"""

from pathlib import Path

from claude.answers import answered, fill_in, mean_output_tokens
from claude.batches import reconcile, send
from claude.connection import api_errors, connect
from claude.journal import open_journal
from claude.prices import BATCH_PRICE
from claude.questions import Questions, parse_latents
from claude.requests import Respondent, announce, may_send, require_consent_possible, spooled
from latents.origin import source_of, tokenizer_of
from latents.tables import TOP, Aggregation, open_top
from pipeline.options import Count, NotNegative, parse_constants
from pipeline.run import run
from pipeline.sae_files import without_ending

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
REQUESTS_PER_BATCH: Count = 10_000  # the API allows 100,000 and 256 MB
SETTLE_S: NotNegative = 300.0  # after an unclear failure, seconds until an unlisted batch counts as not created
YES = False  # send without asking
DRY_RUN = False  # stop after printing the price


def main() -> None:
    config = parse_constants(globals())
    top_path = Path(config.top_sentences_dict_filepath)
    open_top(top_path).close()  # a bad table is reported before anything else
    require_consent_possible(config.yes, config.dry_run)
    client = connect()
    name = without_ending(top_path, f".{TOP.suffix}")
    journal_path = fill_in(config.response_ids_filepath, config.aggregation, name)
    response_dir = fill_in(config.response_output_dir, config.aggregation, name)
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
    print(f"Reading {top_path} and the answers in {response_dir}; writing {journal_path}.")

    with open_journal(journal_path, f"meanings by {config.aggregation}") as journal, api_errors():
        reconcile(client, journal, config.settle_s)
        done, under_way = answered(response_dir), journal.pending(response_dir)
        print(f"{len(done):,} latents have an answer, {len(under_way):,} are in batches not retrieved yet.")
        with spooled(questions.requests(tokenizer.token_bytes, done | under_way), journal_path.parent) as requests:
            if requests.n == 0:
                print("Nothing is left to send.")
                return
            announce(client, requests, mean_output_tokens(response_dir, config.output_tokens), BATCH_PRICE)
            if may_send(config.yes, config.dry_run):
                send(client, journal, requests, config.requests_per_batch, config.settle_s)
                print(
                    f"{requests.n:,} requests sent. Next: python interpret_top_sentences_retrieve_batches.py --wait "
                    f"--response_ids_filepath {journal_path} --response_output_dir {response_dir}"
                )


if __name__ == "__main__":
    run(main)

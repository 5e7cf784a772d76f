"""Fetch Claude's answers to the batches that interpret_top_sentences_send_batches.py sent.

Reads   RESPONSE_IDS_FILEPATH, the journal of the batches
Writes  RESPONSE_OUTPUT_DIR/BATCH_ID.jsonl for each batch that has ended: a line per request, as the API returns it
Method  a batch's file appears once all its answers have arrived, and is not fetched again. Requests that errored,
        expired or were canceled cost nothing; run the send script again to resend them
Cost    nothing; most batches end within an hour, all within 24. The API keeps answers for 29 days

    python interpret_top_sentences_retrieve_batches.py --wait
"""

from claude.answers import add_up, fill_in
from claude.batches import retrieve
from claude.connection import api_errors, connect
from claude.journal import read_batches
from claude.prices import BATCH_PRICE
from latents.tables import Aggregation
from pipeline.errors import InputError
from pipeline.files import locked
from pipeline.options import NotNegative, parse_constants
from pipeline.run import run

RESPONSE_IDS_FILEPATH = "data/sae.{aggregation}.response_ids.jsonl"  # journal of the batches
RESPONSE_OUTPUT_DIR = "data/sae.{aggregation}.responses"  # folder for the answers
AGGREGATION: Aggregation = "mean"  # fills in {aggregation}: mean, max or last
WAIT = False  # keep polling until all batches have ended
POLL_S: NotNegative = 60.0  # seconds between polls


def main() -> None:
    config = parse_constants(globals())
    journal_path = fill_in(config.response_ids_filepath, config.aggregation)
    response_dir = fill_in(config.response_output_dir, config.aggregation)
    if not journal_path.is_file():
        raise InputError(f"There is no {journal_path}; run interpret_top_sentences_send_batches.py first.")
    client = connect()
    print(f"Reading {journal_path}; writing answers to {response_dir}.")
    with locked(response_dir), api_errors():
        waiting = retrieve(client, journal_path, response_dir, config.wait, config.poll_s)
    sent = read_batches(journal_path)
    paths = [path for batch in sent if (path := response_dir / f"{batch['batch_id']}.jsonl").is_file()]
    print(add_up(paths).report(BATCH_PRICE) + f": {response_dir}")
    if waiting:
        print(f"{len(waiting)} of {len(sent)} batches have not ended; run again later, or with --wait.")
    if any(batch["batch_id"] is None for batch in sent):
        print("It is unclear whether the last batch was created; run the send script again to find out.")


if __name__ == "__main__":
    run(main)

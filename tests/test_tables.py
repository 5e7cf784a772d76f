"""The tables beside an SAE: what each reader gives, whatever the row groups, and what it refuses.

.venv/bin/python -m pytest tests/test_tables.py
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.claude_runs import TOKENIZER, write_top_sentences

from latents.tables import (
    AGGREGATIONS,
    EXAMPLES,
    LATENTS,
    PROMOTED,
    TOP,
    TopFile,
    example_sentences,
    highest_activations,
    top_sentences,
    top_texts,
)
from pipeline.errors import InputError


@settings(max_examples=20)  # each writes and reads files
@given(
    st.dictionaries(st.integers(0, 30), st.lists(st.sampled_from(["the ring", "hello é", "in"]), max_size=6)),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_all_readers_of_top_sentences_agree(tmp_path_factory, texts, row_group_size, n):
    texts = dict(sorted(texts.items()))
    path = write_top_sentences(tmp_path_factory.mktemp("tables"), texts, row_group_size)
    file = TopFile(path)
    filled = {latent: shown[:n] for latent, shown in texts.items() if shown}
    for aggregation in AGGREGATIONS:
        found = dict(top_sentences(path, aggregation, n))
        assert found.keys() == filled.keys()
        for latent, shown in texts.items():
            anywhere = file.sentences(latent, aggregation)
            assert anywhere[:n] == found.get(latent, []) and len(anywhere) == len(shown)
            said = [TOKENIZER.decode(sentence.token_ids) for sentence in anywhere]
            assert said == [text if aggregation == "mean" else f"{aggregation} {text}" for text in shown]
            assert [s.activation for s in anywhere] == [float(len(shown) - rank) for rank in range(len(shown))]
        assert dict(top_sentences(path, aggregation, n, [range(5, 9), range(20, 21)])) == {
            latent: sentences for latent, sentences in found.items() if 5 <= latent < 9 or latent == 20
        }
    assert file.sentences(31, "max") == []
    expected = {latent: {f"{text} that the model did not read" for text in shown} for latent, shown in filled.items()}
    assert dict(top_texts(path, n)) == expected


def test_examples_and_highest_activations(tmp_path):
    rows = [{"latent": 2, "tenth": -1, "sentence_idx": 7, "text": "silent", "token_ids": [1, 2]}]
    rows += [{"latent": 2, "tenth": 9, "sentence_idx": 3, "text": "strong", "token_ids": [3]}]
    rows += [{"latent": 5, "tenth": 0, "sentence_idx": 3, "text": "strong", "token_ids": [3]}]
    pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLES.schema), tmp_path / "a.examples.parquet", 2)
    found = dict(example_sentences(tmp_path / "a.examples.parquet"))
    assert found == {2: [(-1, "silent", [1, 2]), (9, "strong", [3])], 5: [(0, "strong", [3])]}
    pq.write_table(pa.table({"max": pa.array([1.5, 0], pa.float32())}), tmp_path / "a.latents.parquet")
    highest = highest_activations(tmp_path / "a.latents.parquet")
    assert highest.dtype == np.float32 and highest.tolist() == [1.5, 0.0]


@pytest.mark.parametrize("table", [TOP, EXAMPLES, LATENTS, PROMOTED])
def test_a_missing_or_broken_table_names_the_script_that_makes_it(tmp_path, table):
    path = tmp_path / f"a.{table.suffix}"
    with pytest.raises(InputError, match=rf"no .*a\.{table.suffix}; run {table.made_by} first"):
        table.open(path, ["latent"])
    path.write_bytes(b"PAR1 half a file")
    with pytest.raises(InputError, match=rf"cannot be read as a parquet file .*; run {table.made_by} again"):
        table.open(path, ["latent"])
    pq.write_table(pa.table({"other": [1]}), path)
    with pytest.raises(InputError, match=rf"has? no column latent; run {table.made_by} again"):
        table.open(path, ["latent"])

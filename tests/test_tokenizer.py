"""The tokenizer against transformers' TikTokenConverter, in round trips, and against known Llama 3 ids.

Also `tokenizer.json` against the same vocabulary in `tokenizer.model` and against the tokenizers library, chats against
Meta's published format, and text streamed token by token. Texts come from hypothesis; the tests with the real
vocabulary are skipped without its file, which is not in the repository.

    .venv/bin/python -m pytest tests/test_tokenizer.py
"""

import base64
import json
import os
import re
import tempfile
import time
from functools import cache

import pytest
import tokenizers
from conftest import PROJECT_DIR, TINY_MERGES, tiny_ranks
from hypothesis import example, given
from hypothesis import strategies as st
from support.llama_chat_examples import EXAMPLES, Special

from llama_3 import load_tokenizer
from llama_3.chat import Message, check_chat, encode_dialogue
from llama_3.generation import encode_text
from llama_3.tokenizer import (
    MAX_CHARS,
    MAX_RUN_CHARS,
    JsonTokenizer,
    TextStream,
    TiktokenTokenizer,
    read_ranks,
    read_tokenizer_json,
    write_ranks,
)
from pipeline.errors import InputError

DATA_DIR = PROJECT_DIR.parent / "shared" / "data"
REAL_TOKENIZER = DATA_DIR / "llama3_tokenizer.model"
REAL_TEXT = DATA_DIR / "real_text.parquet"

TINY = TiktokenTokenizer(tiny_ranks())
N_RANKS = 256 + len(TINY_MERGES)

characters = st.characters(exclude_categories=["Cs"])  # everything except surrogates, which UTF-8 cannot encode
pieces = st.sampled_from(
    ["hello", " the", "  ", "\n\n", "\r\n", "12345", "'Ll", "<|eot_id|>", "é", "\u3000", "👩‍🚀", "\0"]
)
texts = st.lists(st.one_of(pieces, st.text(characters, max_size=8))).map("".join)


# ---- round trips


@given(texts)
def test_round_trip(text):
    ids = TINY.encode(text)
    assert TINY.decode(ids) == text


@given(texts, st.booleans(), st.booleans())
def test_bos_and_eos_are_added_at_the_ends_alone(text, bos, eos):
    plain = TINY.encode(text)
    assert TINY.encode(text, bos=bos, eos=eos) == [TINY.bos_id] * bos + plain + [TINY.eos_id] * eos


def test_special_tokens_follow_the_ranks():
    assert TINY.vocab_size == N_RANKS + 256
    assert sorted(set(TINY.special_tokens.values())) == list(range(N_RANKS, N_RANKS + 256))
    assert TINY.decode([TINY.bos_id]) == "<|begin_of_text|>" and TINY.decode([TINY.eos_id]) == "<|end_of_text|>"
    assert len(TINY.special_tokens) == 256
    assert all(TINY.decode([i]) == name for name, i in TINY.special_tokens.items())


def test_a_special_token_in_a_text_is_text():
    for name in TINY.special_tokens:
        text = f"hello{name} {name}"
        ids = TINY.encode(text, bos=True)
        assert not set(TINY.special_tokens.values()) & set(ids[1:])
        assert TINY.decode(ids[1:]) == text


def test_half_a_character_decodes_to_the_replacement_character():
    ids = TINY.encode("\u4e2d")
    assert len(ids) == 3 and TINY.decode(ids[:2]) == "\ufffd" and TINY.decode([]) == ""


# ---- against transformers


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """transformers' conversion of the tiny tokenizer, with its own split pattern and merging."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: tiny_ranks()  # tiktoken's loader caches by path
    return converter.converted()


@given(texts)
@example("hello  the\n\n  aaaaa 123456 it'LL  \t x\r\n!?\r\n\n end ")
def test_ids_equal_transformers(oracle, text):
    assert TINY.encode(text) == oracle.encode(text).ids


# ---- tokenizer.json


@pytest.fixture(scope="module")
def same_in_json(oracle, tmp_path_factory) -> JsonTokenizer:
    """The tiny vocabulary and Llama 3's special tokens as a tokenizer.json in a Hugging Face folder."""
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    library = Library.from_str(oracle.to_str())
    library.add_special_tokens(list(TINY.special_tokens))
    library.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", TINY.bos_id)]
    )
    folder = tmp_path_factory.mktemp("json")
    library.save(str(folder / "tokenizer.json"))
    config = {
        "vocab_size": TINY.vocab_size,
        "bos_token_id": 5,
        "eos_token_id": TINY.eos_id,
    }  # the template's bos counts
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"\0a file of sentencepiece's\xff")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [TINY.eos_id, 7]}))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def with_metaspace(tmp_path_factory) -> JsonTokenizer:
    """A vocabulary like TinyLlama's: words begin with ▁, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    letters = "abcdefghijklmnopqrstuvwxyz▁"
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("l", "l"), ("ll", "o"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("metaspace")
    library.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": len(tokens), "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder))


@given(texts, st.booleans(), st.booleans())
def test_tokenizer_json_gives_the_ids_of_tokenizer_model(same_in_json, text, bos, eos):
    ids = TINY.encode(text, bos=bos, eos=eos)
    assert same_in_json.encode(text, bos=bos, eos=eos) == ids
    assert same_in_json.decode(ids) == TINY.decode(ids)
    assert [*map(same_in_json.token_bytes, ids)] == [*map(TINY.token_bytes, ids)]
    assert b"".join(map(TINY.token_bytes, TINY.encode(text))) == text.encode()


def test_tokenizer_json_knows_its_special_tokens(same_in_json, with_metaspace):
    assert same_in_json.special_tokens == TINY.special_tokens and same_in_json.vocab_size == TINY.vocab_size
    assert (same_in_json.bos_id, same_in_json.eos_id, same_in_json.starts_with_bos) == (TINY.bos_id, TINY.eos_id, True)
    assert same_in_json.stop_ids == TINY.stop_ids | {7}
    assert (with_metaspace.bos_id, with_metaspace.eos_id, with_metaspace.starts_with_bos) == (1, 2, False)
    assert with_metaspace.stop_ids == {2}


def test_a_model_without_begin_and_end_of_text(with_metaspace):
    """Neither the template nor config.json names them, so nothing is put in their place."""
    library = tokenizers.Tokenizer.from_str(with_metaspace.model.to_str())
    with tempfile.TemporaryDirectory() as folder:
        library.save(f"{folder}/tokenizer.json")
        without = read_tokenizer_json(f"{folder}/tokenizer.json", bos_id=None, eos_ids=None)
    assert (without.bos_id, without.eos_id, without.starts_with_bos) == (None, None, False)
    assert without.encode("the", bos=True, eos=True) == with_metaspace.encode("the") == encode_text(without, "the")
    with pytest.raises(InputError, match="no begin-of-text token, so it cannot begin without a prompt"):
        encode_text(without, "")
    with pytest.raises(IndexError, match="no token 99999"):
        without.token_bytes(99_999)


@given(texts)
def test_metaspace_round_trip_and_special_tokens_stay_text(with_metaspace, text):
    text = f"the <s>{text}</s>".replace("▁", "")
    ids = with_metaspace.encode(text)
    assert not {1, 2} & set(ids)
    assert with_metaspace.decode(ids) == text
    assert b"".join(map(with_metaspace.token_bytes, ids)) == f" {text}".encode()


def test_a_broken_tokenizer_json_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for content in ("", "{}", "version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=re.escape(str(tmp_path / "tokenizer.json"))):
            load_tokenizer(str(tmp_path))


# ---- token by token


@given(data=st.data())
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json", "metaspace"])
def test_streamed_text_is_the_decoded_text(kind, data, same_in_json, with_metaspace):
    """For any tokens, including broken characters."""
    tokenizer = {"tokenizer.model": TINY, "tokenizer.json": same_in_json, "metaspace": with_metaspace}[kind]
    token = st.integers(3, tokenizer.vocab_size - 1)
    prompt = tokenizer.encode(data.draw(texts))
    if kind == "metaspace":  # its decoder spoils valid bytes beside broken ones, so only encodable text
        ids = tokenizer.encode(data.draw(texts))
    else:
        ids = data.draw(st.lists(token | st.integers(0x80, 0xFF) | st.sampled_from(TINY.encode("再 é")), max_size=12))
    stream = TextStream(tokenizer, prompt)
    pieces = [*map(stream.add, ids), stream.end()]
    assert "".join(pieces) == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


@given(texts)
def test_no_half_character_is_given_out(text):
    text = text.replace("\ufffd", "")
    ids = list(text.encode())  # the first 256 tokens are the bytes
    stream = TextStream(TINY, TINY.encode("the"))
    pieces = list(map(stream.add, ids))
    assert "".join(pieces) == text and stream.end() == ""
    assert [len(piece.encode()) for piece in pieces if piece] == [len(character.encode()) for character in text]


def test_what_is_left_half_is_shown_at_the_end():
    stream = TextStream(TINY)
    assert [stream.add(token) for token in "再".encode()[:2]] == ["", ""]
    assert stream.end() == "\ufffd" and stream.end() == ""


def test_a_space_before_the_first_new_word_is_kept(with_metaspace):
    prompt, answer = with_metaspace.encode("the"), with_metaspace.encode("hello")
    stream = TextStream(with_metaspace, prompt)
    assert "".join(map(stream.add, answer)) == " hello"


# ---- chat


def expected_ids(tokenizer, pieces: list) -> list[int]:
    ids = []
    for piece in pieces:
        ids += [tokenizer.special_tokens[piece.name]] if isinstance(piece, Special) else tokenizer.encode(piece)
    return ids


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_chats_have_metas_published_format(example, same_in_json):
    messages = [Message(**message) for message in example.messages]
    for tokenizer in (TINY, same_in_json):
        assert encode_dialogue(tokenizer, messages) == expected_ids(tokenizer, example.llama_3)
        dated = encode_dialogue(tokenizer, messages, date=example.date)
        assert dated == expected_ids(tokenizer, example.llama_3_1)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), max_size=4))
def test_a_message_cannot_forge_another(turns):
    ids = encode_dialogue(TINY, [Message(*turn) for turn in turns])
    special = [token for token in ids if token in TINY.special_tokens.values()]
    header, end_header, end_of_turn = (
        TINY.special_tokens[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id")
    )
    assert special == [TINY.bos_id, *[header, end_header, end_of_turn] * len(turns), header, end_header]


def test_unknown_roles_and_models_without_chat_tokens_are_refused(with_metaspace):
    with pytest.raises(ValueError, match="'tool' is not a role"):
        encode_dialogue(TINY, [Message("tool", "a")])
    check_chat(TINY)
    with pytest.raises(InputError, match="cannot chat"):
        encode_dialogue(with_metaspace, [Message("user", "a")])


# ---- long texts


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 200_000, "a b" * 150_000, "\u00e9\n" * 210_000, "xy " * 200_000])
def test_long_texts_round_trip_quickly(text):
    begin = time.perf_counter()
    ids = TINY.encode(text)
    assert time.perf_counter() - begin < 5  # takes 0.02 to 0.3 s
    assert TINY.decode(ids) == text


def test_runs_just_under_the_limit_are_quick():
    text = ("x" * 20_000 + "\n") * 3  # like lines of base64
    begin = time.perf_counter()
    assert TINY.decode(TINY.encode(text)) == text
    assert time.perf_counter() - begin < 0.5  # 0.02 s for the same characters in runs over the limit


@pytest.mark.parametrize("n", [MAX_RUN_CHARS - 1, MAX_RUN_CHARS, MAX_RUN_CHARS + 1, 2 * MAX_RUN_CHARS, MAX_CHARS + 1])
@pytest.mark.parametrize("character", "a ")
def test_cuts_lose_and_repeat_nothing(n, character):
    text = "hello" + character * n + "\u4e2d hello"
    assert TINY.decode(TINY.encode(text)) == text


def test_only_runs_beyond_the_limit_are_cut():
    """A cut splits merges: the letters after it pair up differently."""
    text = "x" + "a" * (MAX_RUN_CHARS - 1)  # three letters are left over, as four make a token
    assert TINY.encode(text) == TINY.model.encode(text)
    assert TINY.encode(text + "aaaa") == TINY.encode(text) + TINY.encode("aaaa") != TINY.model.encode(text + "aaaa")
    assert TINY.encode(f"{text} {text}") == TINY.model.encode(f"{text} {text}")


# ---- the file


def test_write_then_read_gives_the_ranks(tmp_path):
    path = tmp_path / "tokenizer.model"
    shuffled = dict(sorted(tiny_ranks().items(), key=lambda item: hash(item[0])))
    write_ranks(path, shuffled)
    assert read_ranks(str(path)) == tiny_ranks()
    lines = path.read_text().splitlines()  # what tiktoken and Meta write: base64, a space, the rank, in order of rank
    assert lines[256] == f"{base64.b64encode(TINY_MERGES[0]).decode()} 256" and len(lines) == N_RANKS


def test_a_tokenizer_retrained_at_the_same_path_is_read_anew(tmp_path):
    path = tmp_path / "tokenizer.model"
    write_ranks(path, tiny_ranks())
    assert len(TiktokenTokenizer(read_ranks(str(path))).encode("hello")) == 1
    retrained = {token: rank for token, rank in tiny_ranks().items() if rank < 256}
    write_ranks(path, retrained | {b"he": 256, b"lo": 257})
    assert TiktokenTokenizer(read_ranks(str(path))).encode("hello") == [256, ord("l"), 257]


def ranks_file(change) -> bytes:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in tiny_ranks().items()]
    change(lines)
    return b"\n".join(lines) + b"\n"


def doubled_rank(lines: list[bytes]) -> None:
    lines[-1] = lines[-1].split()[0] + b" 5"


BROKEN = {
    "empty": b"",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2183982\n",
    "binary": bytes(range(256)) * 9,
    "not base64": ranks_file(lambda lines: lines.insert(3, b"!!!! 3")),
    "rank is no number": ranks_file(lambda lines: lines.insert(3, b"IQ== three")),
    "three fields": ranks_file(lambda lines: lines.insert(3, b"IQ== 3 4")),
    "a rank missing": ranks_file(lambda lines: lines.pop(77)),
    "a rank twice": ranks_file(doubled_rank),
    "fewer than 256": ranks_file(lambda lines: lines.__delitem__(slice(200, None))),
    "cut inside a token": ranks_file(lambda lines: None)[:-7],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read_ranks(str(path))
    assert "fetch it again" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match=f"no tokenizer at {re.escape(str(path))}"):
        read_ranks(str(path))


# ---- the real vocabulary


@cache
def real_tokenizer() -> TiktokenTokenizer:
    return TiktokenTokenizer(read_ranks(str(REAL_TOKENIZER)))


needs_real = pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason=f"no {REAL_TOKENIZER}: fetch Llama 3's tokenizer")


@needs_real
def test_real_ids():
    tokenizer = real_tokenizer()
    assert tokenizer.vocab_size == 128256
    assert tokenizer.encode("hello world") == [15339, 1917]
    assert tokenizer.encode("hello world", bos=True, eos=True) == [128000, 15339, 1917, 128001]
    published = {  # where Meta's and Hugging Face's files agree
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|reserved_special_token_1|>": 128003,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
    }
    assert {name: tokenizer.special_tokens.get(name) for name in published} == published


@needs_real
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_real_chats(example):
    messages = [Message(**message) for message in example.messages]
    assert encode_dialogue(real_tokenizer(), messages) == example.llama_3_ids
    assert encode_dialogue(real_tokenizer(), messages, date=example.date) == example.llama_3_1_ids


@needs_real
@pytest.mark.skipif(not REAL_TEXT.exists(), reason=f"no {REAL_TEXT}")
def test_real_texts_round_trip():
    """Every fourth text, and all of them with ALL_TEXTS=1."""
    import pyarrow.parquet as pq

    n_bytes = n_tokens = 0
    every = 1 if os.environ.get("ALL_TEXTS") else 4
    for text in pq.read_table(REAL_TEXT, columns=["text"]).column(0).to_pylist()[::every]:
        ids = real_tokenizer().encode(text)
        assert real_tokenizer().decode(ids) == text
        n_bytes += len(text.encode())
        n_tokens += len(ids)
    assert n_tokens < n_bytes / 3

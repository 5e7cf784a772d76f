"""The parse script: every well-formed meaning is read, however it is wrapped; the rest is listed with its reason.

Compares with the meanings put into the answers: handwritten answers of every shape seen so far, and arbitrary ones.

.venv/bin/python -m pytest tests/test_parse_responses.py
"""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from support.claude_runs import in_a_process
from support.fake_anthropic import message
from support.pipeline_runs import call, refusal

import interpret_top_sentences_parse_responses as script
from claude.answers import Answer, Rejection, from_result
from interpret_top_sentences_parse_responses import Meaning, certainty_of, judge


def judged(text: str, detail: str = "end_turn") -> Meaning | Rejection:
    return judge(Answer("7", text, "succeeded", detail))


def status(text: str, detail: str = "end_turn") -> str:
    found = judged(text, detail)
    assert isinstance(found, Rejection), found
    return found.status


# ---- the shapes of answers

PLAIN = '{"common_semantic": "rain in spring", "certainty": 0.8}'


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"Key words: rain.\n\n{PLAIN}",
        f"{PLAIN}\n\nI hope this helps {{really}}.",
        f"```json\n{PLAIN}\n```",
        f"```\n{PLAIN}\n```\nDone.",
        f"**{PLAIN}**",
        '{"certainty": 0.8, "common_semantic": "rain in spring"}',
        '{"common_semantic": "rain in spring",\n   "certainty": 0.8,\n  "outliers": [3, {"x": null}]}',
        f'{{"analysis": "…", "answer": {PLAIN}}}',
        f"[{PLAIN}]",
        f'A first try: {{"common_semantic": "snow", "certainty": 0.1}}. Better:\n{PLAIN}',
        f'{PLAIN}\nThe fields are {{"common_semantic"}} and {{"certainty": 1}}.',
        f'{{"common_semantic": "cut {PLAIN}',
        '{"common_semantic": "rain in spring", "certainty": "0.8"}',
        '{"common_semantic": "rain in spring", "certainty": "80%"}',
        '{"common_semantic": "rain in spring", "certainty": "80 %"}',
        '{"common_semantic": "rain in spring", "certainty": 80}',
        '{"common_semantic": "rain in spring", "certainty": 8e-1}',
    ],
)
def test_however_it_is_wrapped_the_last_object_counts(text):
    assert judged(text) == Meaning("rain in spring", 0.8)


@pytest.mark.parametrize(
    ("inside", "meaning"),
    [
        ("code such as {x: {y}}", "code such as {x: {y}}"),
        ("an open { brace", "an open { brace"),
        ("a closing } brace", "a closing } brace"),
        (r"a pattern like \d+\.\w", r"a pattern like \d+\.\w"),
        (r"a path C:\Windows\x and \\server", "a path C:\\Windows\\x and \\server"),
        (r"math \( a \) and \u00e9 \"quoted\"", r"math \( a \) and é " + '"quoted"'),
        ("two\nlines", "two\nlines"),
        (r"half a pair \ud83d", "half a pair \ufffd"),
        (r"a whole pair \ud83d\ude00", "a whole pair 😀"),
    ],
)
def test_braces_backslashes_and_line_breaks_inside_the_text(inside, meaning):
    assert judged(f'So:\n{{"common_semantic": "{inside}", "certainty": 0.5}}\n') == Meaning(meaning, 0.5)


ALMOST_JSON = [
    ('{"common_semantic": "rain", "certainty": 0.8,}', "rain"),
    ('{"common_semantic": "the word "state" in code", "certainty": 0.8}', 'the word "state" in code'),
    ('{"common_semantic": "words like "if", "else"", "certainty": 0.8}', 'words like "if", "else"'),
    ('{"certainty": "80%", "common_semantic": "words like "if", "else""}', 'words like "if", "else"'),
    ('{"common_semantic": "a \\"b\\" and "c"", "certainty": 0.8}', 'a "b" and "c"'),
    ('{"common_semantic": "rain", // sure\n "certainty": 0.8}', "rain"),
    ('{"common_semantic": "see // here", /* a "note" */ "certainty": 0.8 # sure\n}', "see // here"),
    ("{“common_semantic”: “rain”, “certainty”: 0.8}", "rain"),
    ("{“common_semantic”: “the word “state” in code”, “certainty”: 0.8}", "the word “state” in code"),
    ("{'common_semantic': 'it\\'s rain, isn't it', 'certainty': 0.8}", "it's rain, isn't it"),
    ('{common_semantic: "rain", certainty: 0.8}', "rain"),
    ('{"common_semantic": "snow", "certainty": 0.1,} or rather {"common_semantic": "rain", "certainty": 0.8,}', "rain"),
    (
        '{"common_semantic": "snow", "certainty": 0.1} or {"common_semantic": "heavy "rain"", "certainty": 0.8}',
        'heavy "rain"',
    ),
]


@pytest.mark.parametrize(("text", "meaning"), ALMOST_JSON)
def test_what_is_almost_json_is_read(text, meaning):
    assert judged(f"So:\n```json\n{text}\n```\nIt is clear.") == Meaning(meaning, 0.8)


@pytest.mark.parametrize(
    "text",
    [
        '{"certainty": 0.9, "common_semantic": "the "if" here"} and {"if"}',
        '{"common_semantic": "a", "certainty": 0.5, "certainty": 0.9,}',
        '{"common_semantic": "the word "state", "certainty": 0.9}',
        '{"common_semantic": "snow {"common_semantic": "rain", "certainty": 0.8,}',
        '{"common_semantic": "the word "state" in code", "certainty": }',
        '{"common_semantic": "the word "state" in code, "certainty": 0.9',
    ],
)
def test_what_can_be_read_in_two_ways_is_not(text):
    assert status(text) == "no_json"


@pytest.mark.parametrize(
    ("text", "detail", "expected"),
    [
        ("", "end_turn", "empty"),
        (" \n", "end_turn", "empty"),
        ("", "refusal", "refusal"),
        ("Some words", "refusal", "refusal"),
        ("I apologize, but these sentences are not something to analyse.", "", "refusal"),
        ("I'm sorry, this is content that I do not summarise.", "", "refusal"),
        ("I cannot help with that {text}.", "", "refusal"),
        ("I will not repeat what these sentences say.", "end_turn", "refusal"),
        ("1. Key words: rain, cloud", "max_tokens", "cut"),
        ("The sentences are about rain.", "end_turn", "no_json"),
        ('{"common_semantic": "rain"}', "end_turn", "no_json"),
        ('{"common_semantic": "rain", "certainty": }', "end_turn", "no_json"),
        ('{"common_semantic": null, "certainty": 0}', "end_turn", "no_meaning"),
        ('{"common_semantic": " ", "certainty": 0}', "end_turn", "no_meaning"),
        ('{"common_semantic": null, "certainty": 0,}', "end_turn", "no_meaning"),
        ('{"common_semantic": "rain", "certainty": NaN,}', "end_turn", "bad_certainty"),
        ('{"common_semantic": ["rain"], "certainty": 0.5}', "end_turn", "bad_common_semantic"),
        ('{"common_semantic": "rain", "certainty": "high"}', "end_turn", "bad_certainty"),
        ('{"common_semantic": "rain", "certainty": null}', "end_turn", "bad_certainty"),
        ('{"common_semantic": "rain", "certainty": true}', "end_turn", "bad_certainty"),
        ('{"common_semantic": "rain", "certainty": NaN}', "end_turn", "bad_certainty"),
        ('{"common_semantic": "rain", "certainty": -0.1}', "end_turn", "bad_certainty"),
        ('{"common_semantic": "rain", "certainty": 101}', "end_turn", "bad_certainty"),
        ('{"common_semantic": "rain", "certainty": 1' + "0" * 400 + "}", "end_turn", "bad_certainty"),
        ('{"common_semantic": "rain", "certainty": 1' + "0" * 5000 + "}", "end_turn", "no_json"),
        ('{"common_semantic": "rain", "certainty": ' + "[" * 100_000, "end_turn", "no_json"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_answer_without_a_meaning_has_its_reason(text, detail, expected):
    assert status(text, detail) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0, 0.0), (1.0, 1.0), ("1", 1.0), ("1%", 0.01), (100, 1.0), ("100%", 1.0), ("", None), ("%", None)],
)
def test_certainties(value, expected):
    assert certainty_of(value) == expected


WRAPPINGS = st.sampled_from(
    ["{}", "```json\n{}\n```", "Thoughts {{a}}\n{}", "{} and more }} words {{", '{{"inner": {}}}', "[1, {}, 2]"]
)


@given(
    meaning=st.text(min_size=1).filter(str.strip),
    certainty=st.floats(0, 1) | st.integers(0, 1),
    wrapping=WRAPPINGS,
    ascii_only=st.booleans(),
    before=st.text(max_size=20),
    swapped=st.booleans(),
)
@example('{"common_semantic": "x", "certainty": 1}', 0.5, "{}", False, "", False)
@example("\\", 0.5, "{}", False, "", True)
def test_any_meaning_in_any_wrapping_comes_back(meaning, certainty, wrapping, ascii_only, before, swapped):
    fields = {"common_semantic": meaning, "certainty": certainty}
    if swapped:
        fields = dict(reversed(fields.items()))
    text = before + wrapping.format(json.dumps(fields, ensure_ascii=ascii_only))
    assert judged(text) == Meaning(meaning, float(certainty))


@given(
    st.text()
    | st.lists(st.sampled_from(['{"common_semantic"', '"certainty"', ":", "{", "}", '"', "\\", "1"])).map("".join)
)
def test_no_text_raises(text):
    assert isinstance(judged(text), (Meaning, Rejection))


# ---- files


def write_jsonl(path: Path, results: dict[str, dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"custom_id": i, "result": result}) + "\n" for i, result in results.items()]
    path.write_text("".join(lines))


def said(semantic: str | None, certainty: float) -> dict:
    text = "Words.\n" + json.dumps({"common_semantic": semantic, "certainty": certainty})
    return {"type": "succeeded", "message": message(text)}


def parse(source: Path, out: Path) -> tuple[dict, dict[str, dict]]:
    call(script, retrieved_responses_dir=source, parsed_responses_output_filepath=out)
    rejected = [json.loads(line) for line in out.with_suffix(".rejected.jsonl").open()]
    return yaml.safe_load(out.read_text()), {line["custom_id"]: line for line in rejected}


def test_ours_in_order_of_certainty_with_the_rest_beside_it(tmp_path, capsys):
    error = {"type": "error", "error": {"type": "api_error", "message": "it broke"}}
    write_jsonl(
        tmp_path / "in" / "msgbatch_1.jsonl",
        {
            "12": said("middling", 0.5),
            "3": said("déjà vu: “yes” 再", 0.9),
            "5": said("certain", 1),
            "10": said("also middling", 0.5),
            "20": {"type": "errored", "error": error},
            "21": {"type": "expired"},
            "22": {"type": "canceled"},
            "23": {"type": "succeeded", "message": message("", stop_reason="refusal")},
            "x": said("whose", 0.5),
        },
    )
    out = tmp_path / "out" / "m.yaml"
    meanings, rejected = parse(tmp_path / "in", out)
    assert list(meanings.items()) == [
        (5, {"certainty": 1.0, "common_semantic": "certain"}),
        (3, {"certainty": 0.9, "common_semantic": "déjà vu: “yes” 再"}),
        (10, {"certainty": 0.5, "common_semantic": "also middling"}),
        (12, {"certainty": 0.5, "common_semantic": "middling"}),
    ]
    assert "déjà vu: “yes” 再" in out.read_text()
    statuses = {i: (line["status"], line["reason"]) for i, line in rejected.items()}
    assert statuses.pop("x")[0] == "bad_custom_id" and statuses.pop("23")[0] == "refusal"
    assert statuses == {"20": ("errored", "it broke"), "21": ("expired", ""), "22": ("canceled", "")}
    assert "4 latents have a meaning" in capsys.readouterr().out


def test_published_answers(tmp_path):
    (tmp_path / "a.yaml").write_text(
        yaml.dump(
            {
                "41": {
                    "content": 'Words {x}. {"common_semantic": "a", "certainty": 1}',
                    "model": "m",
                    "input_tokens": 5,
                },
                42: {"content": "I apologize, but no.", "model": "m", "input_tokens": 5, "output_tokens": 2},
                "43": {"canceled": True},
                "44": {"content": None, "model": "m"},
            }
        )
    )
    (tmp_path / "b.yml").write_text('"45": {content: "{\\"common_semantic\\": \\"b {y\\", \\"certainty\\": 0.2}"}\n')
    meanings, rejected = parse(tmp_path, tmp_path / "out" / "m.yaml")
    assert meanings == {
        41: {"certainty": 1.0, "common_semantic": "a"},
        45: {"certainty": 0.2, "common_semantic": "b {y"},
    }
    assert {i: line["status"] for i, line in rejected.items()} == {"42": "refusal", "43": "canceled", "44": "empty"}


def test_endings_in_capitals(tmp_path):
    write_jsonl(tmp_path / "a.JSONL", {"1": said("rain", 0.8)})
    (tmp_path / "b.YAML").write_text(yaml.dump({"2": {"content": PLAIN}}))
    assert set(parse(tmp_path, tmp_path / "out.yaml")[0]) == {1, 2}


def test_a_meaning_stays_and_of_two_the_later(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", {"1": {"type": "expired"}, "2": said("first", 0.5), "3": said("first", 0.5)})
    write_jsonl(tmp_path / "b.jsonl", {"1": said("second", 0.5), "2": said("second", 0.4), "3": {"type": "errored"}})
    meanings, rejected = parse(tmp_path, tmp_path / "out" / "m.yaml")
    assert {latent: entry["common_semantic"] for latent, entry in meanings.items()} == {
        1: "second",
        2: "second",
        3: "first",
    }
    assert rejected == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda part: (
        st.lists(part, max_size=2) | st.dictionaries(st.sampled_from(["error", "message", "content", "text"]), part)
    ),
    max_leaves=6,
)


@given(st.sampled_from(["succeeded", "errored", "odd"]), JSON, JSON)
def test_no_result_raises(kind, first, second):
    result = {"type": kind, "error": first, "message": {"content": [{"type": "text", "text": second}, first]}}
    for odd in (result, result | {"message": first}, result | {"message": {"content": second}}):
        assert isinstance(judge(from_result({"custom_id": "1", "result": odd})), Rejection | Meaning)


def test_half_of_a_surrogate_pair_is_written(tmp_path):
    text = r'{"common_semantic": "a \ud83d", "certainty": 0.5}'
    write_jsonl(tmp_path / "a.jsonl", {"1": {"type": "succeeded", "message": message(text)}})
    (tmp_path / "a.jsonl").open("a").write(
        r'{"custom_id": "2", "result": {"type": "odd", "error": {"message": "\ud83d"}}}' + "\n"
    )
    meanings, rejected = parse(tmp_path, tmp_path / "out" / "m.yaml")
    assert meanings[1]["common_semantic"] == "a \ufffd" and rejected["2"]["status"] == "odd"


@given(meanings=st.dictionaries(st.integers(0, 70_000), st.tuples(st.floats(0, 1), st.text(min_size=1))))
def test_the_yaml_gives_back_every_meaning_in_order(tmp_path_factory, meanings):
    path = tmp_path_factory.getbasetemp() / "m.yaml"
    script.write_meanings(path, {latent: Meaning(text, certainty) for latent, (certainty, text) in meanings.items()})
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {latent: (entry["certainty"], entry["common_semantic"]) for latent, entry in loaded.items()} == meanings
    order = [(-entry["certainty"], latent) for latent, entry in loaded.items()]
    assert order == sorted(order)


def test_the_real_command_line_fills_in_the_aggregation(tmp_path):
    write_jsonl(tmp_path / "last" / "a.jsonl", {"1": said("rain", 0.5)})
    options = {
        "retrieved_responses_dir": tmp_path / "{aggregation}",
        "parsed_responses_output_filepath": tmp_path / "{aggregation}-aggregated.yaml",
        "aggregation": "last",
    }
    done = in_a_process(script, options)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "last-aggregated.yaml").read_text()) == {
        1: {"certainty": 0.5, "common_semantic": "rain"}
    }


def test_bad_input_is_refused_in_a_sentence_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "out" / "m.yaml"
    refused = lambda source: refusal(
        capsys, script, retrieved_responses_dir=source, parsed_responses_output_filepath=out
    )
    assert "There are no answers in" in refused(tmp_path / "nowhere")
    for name, text, words in [
        ("a.yaml", "{", "cannot be read"),
        ("b.yaml", "- 1\n", "does not map"),
        ("c.yaml", "1: text\n", "does not map"),
        ("d.jsonl", "{}\n", "Line 1"),
    ]:
        (tmp_path / name).write_text(text)
        assert words in refused(tmp_path / name)
    assert not out.parent.exists()


def test_a_place_that_cannot_be_written_is_said_before_the_answers_are_judged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "judge_all", None)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "m.yaml"
    said = refusal(capsys, script, retrieved_responses_dir=tmp_path / "a.jsonl", parsed_responses_output_filepath=out)
    assert f"{out} cannot be written (Not a directory)" in said

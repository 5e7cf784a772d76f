"""llama_3_inference_server.py, asked by the unmodified openai package, by curl, by httpx and over raw sockets.

Answers are compared with what `generate` gives in this process for one prompt at a time.

.venv/bin/python -m pytest tests/test_server.py
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from conftest import PROJECT_DIR, TINY_PARAMS
from support.chat_models import write_chat_model
from support.latent_files import DEAD, N_LATENTS, write_latents
from support.pipeline_runs import SITE, as_flags, refusal
from support.sae_runs import random_sae

import llama_3_inference_server as script
from llama_3 import load_tokenizer
from llama_3.chat import Message, encode_answered, encode_dialogue
from llama_3.generation import encode_text, generate, stream
from llama_3.model import Intervention
from microscope.control import steered as steered_by
from microscope.control import write_gguf
from sae import Kind, SparseAutoencoder, save_sae
from serving import inspection
from serving.steered_model import ModelChoice, Sampling, VectorChoice, fetched_reference, strongest_latents
from serving.steering import Steering

pytestmark = pytest.mark.slow  # a server

SECONDS = 60  # a busy machine is not a failure
LIMITS = script.Limits(max_rows=4, max_prompt_tokens=200, max_new_tokens=300)
DEFAULT = {"mode": "clamp", "strength": 1.5, "slider": [-3, 3]}
SMOLLM2 = fetched_reference()
NO_VECTORS = VectorChoice()


# ---- the server


@pytest.fixture(scope="module")
def choice(tmp_path_factory) -> ModelChoice:
    """A tiny random model that can chat, and an SAE of it with everything beside it."""
    folder = tmp_path_factory.mktemp("served")
    model_dir = write_chat_model(folder)
    tokenizer = load_tokenizer(str(model_dir))
    path = write_latents(folder / "sae", model_dir, tokenizer)
    sae = SparseAutoencoder(TINY_PARAMS["dim"], N_LATENTS, 6)
    sae.initialize(torch.zeros(TINY_PARAMS["dim"]), torch.Generator().manual_seed(5))
    save_sae(sae, path, json.loads(path.with_suffix(".json").read_text()) | {"steering": DEFAULT})
    return ModelChoice(str(model_dir), sae_model_path=str(path))


@contextlib.contextmanager
def started(choice: ModelChoice, api_key=None, limits=LIMITS, max_waiting=100, vectors=NO_VECTORS):
    """A server in a thread of this process: its address and what it serves."""
    served = script.open_served(choice, vectors, max_waiting, limits)
    listening = script.listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # of its connections: a slow reader blocks soon
    server = script.make_server(served, api_key, grace_s=1.0)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", served
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        served.engine.join(SECONDS)
        assert not thread.is_alive() and not served.engine._thread.is_alive()


@pytest.fixture(scope="module")
def running(choice):
    with started(choice) as (address, served):
        yield address, served


@pytest.fixture
def address(running):
    return running[0]


@pytest.fixture
def served(running):
    """After the test no row may be left."""
    yield running[1]
    until(lambda: running[1].engine.n_rows == running[1].engine.n_waiting == 0)


def until(holds, seconds=SECONDS):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def post(address, path, body, **how) -> httpx.Response:
    return httpx.post(f"{address}{path}", json=body, timeout=SECONDS, **how)


def complaint(response: httpx.Response, status=400) -> str:
    """The sentence of an error in OpenAI's form."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".") and "Traceback" not in error["message"]
    return error["message"]


def events(text: str) -> list[dict]:
    """The data of server-sent events, which end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- what it should answer


def alone(served, ids, n, seed=0, temperature=0.0, top_p=1.0, steering=None, first=0) -> str:
    """The completion of one prompt by itself; first: number of the choice in its request."""
    opened = served.opened
    seeds = Sampling(n, temperature, top_p, seed).seeds(1, first)
    options = {"max_new_tokens": n, "temperature": temperature, "top_p": top_p, "seeds": seeds}
    pieces = stream(opened.model, opened.tokenizer, [ids], steering=steering, **options)
    return "".join(piece for (piece,) in pieces)


def steered(served, strengths, mode="add"):
    return served.opened.interventions(Steering(strengths, mode))[0]


def dialogue(served, *contents, system=None) -> list[int]:
    turns = [Message("system", system)] if system else []
    turns += [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return encode_dialogue(served.opened.tokenizer, turns, served.opened.date)


# ---- the openai package


@pytest.fixture(scope="module")
def client(running):
    openai = pytest.importorskip("openai", reason="openai is not installed: make install")
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="any", timeout=SECONDS, max_retries=0) as client:
        yield client


def test_openai_models(client, served):
    (model,) = client.models.list()
    assert model.id == served.model_id == "chat" == client.models.retrieve("chat").id
    assert model.sae["n_latents"] == N_LATENTS and model.sae["mode"] == "clamp"


def test_openai_completion(client, served):
    found = client.completions.create(model="chat", prompt="the ring", max_tokens=12, temperature=0)
    ids = encode_text(served.opened.tokenizer, "the ring")
    assert found.choices[0].text == alone(served, ids, 12) and found.choices[0].finish_reason in ("length", "stop")
    assert found.object == "text_completion" and found.usage.prompt_tokens == len(ids)
    assert found.usage.total_tokens == len(ids) + found.usage.completion_tokens
    default = client.completions.create(model="chat", prompt="the ring")
    assert default.usage.completion_tokens <= 16


def test_openai_several_prompts_and_choices_are_sampled_by_seed(client, served):
    """As texts and as tokens; choices come prompt by prompt, each with a seed of its own, which can be repeated."""
    prompts = ["the ring", "hello"]
    tokens = [encode_text(served.opened.tokenizer, prompt) for prompt in prompts]
    options = {"model": "chat", "n": 2, "max_tokens": 8, "temperature": 1.2, "top_p": 0.9, "seed": 7}
    found = client.completions.create(prompt=prompts, **options)
    expected = [alone(served, tokens[i // 2], 8, 7, 1.2, 0.9, first=i) for i in range(4)]
    assert [choice.text for choice in found.choices] == expected and len(set(expected)) > 2
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3] and found.seed == 7
    again = client.completions.create(prompt=tokens, **options)
    assert [choice.text for choice in again.choices] == expected
    unseeded = client.completions.create(prompt="hello", model="chat", max_tokens=8)
    repeated = client.completions.create(prompt="hello", model="chat", max_tokens=8, seed=unseeded.seed)
    assert repeated.choices[0].text == unseeded.choices[0].text


def test_openai_chat(client, served):
    messages = [
        {"role": "developer", "content": "be the ring"},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "on"},
        {"role": "user", "content": "and <|eot_id|> the ring?"},
    ]
    found = client.chat.completions.create(model="chat", messages=messages, max_completion_tokens=10, temperature=0)
    ids = dialogue(served, "hello there", "on", "and <|eot_id|> the ring?", system="be the ring")
    assert found.choices[0].message.content == alone(served, ids, 10)
    assert found.choices[0].message.role == "assistant" and found.usage.prompt_tokens == len(ids)


def test_openai_streams(client, served):
    """Piece by piece the same as whole, with usage where it is asked for."""
    options = {"model": "chat", "max_tokens": 30, "temperature": 1.0, "seed": 3, "n": 2}
    for create, body in (
        (client.completions.create, {"prompt": "the é ring"}),
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        whole = create(**options, **body)
        chunks = list(create(**options, **body, stream=True, stream_options={"include_usage": True}))
        said, reasons = ["", ""], [None, None]
        for chunk in chunks[:-1]:
            assert chunk.usage is None and chunk.id == chunks[0].id
            for choice in chunk.choices:
                text = choice.delta.content if hasattr(choice, "delta") else choice.text
                said[choice.index] += text or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        text_of = lambda choice: choice.message.content if hasattr(choice, "message") else choice.text
        assert said == [text_of(choice) for choice in whole.choices]
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert len(chunks) > 10


def test_openai_stop(client, served):
    """A stop string ends the text before it, streamed or not, even where pieces cut it."""
    ids = encode_text(served.opened.tokenizer, "the ring")
    text = alone(served, ids, 40, 5, 1.0)
    stop = text[9:12]
    expected = text[: text.index(stop)]
    options = {"model": "chat", "prompt": "the ring", "max_tokens": 40, "seed": 5}
    whole = client.completions.create(**options, stop=["zzzz", stop])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_openai_logprobs(client, served):
    """Of both kinds, streamed and not, against a full forward pass."""
    model, tokenizer = served.opened.model, served.opened.tokenizer
    ids = encode_text(tokenizer, "hello")
    options = {"model": "chat", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**options, logprobs=2).choices[0]
    (tokens,) = zip(*generate(model, [ids], 6, tokenizer.stop_ids), strict=True)
    with torch.inference_mode():
        expected = model(torch.tensor([ids + list(tokens)]))[0, len(ids) - 1 : -1].log_softmax(-1)
    own = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    assert whole.logprobs.tokens == [tokenizer.decode([token]) for token in tokens]
    assert whole.logprobs.token_logprobs == pytest.approx(own, abs=1e-4)
    assert [max(top.values()) for top in whole.logprobs.top_logprobs] == pytest.approx(
        expected.amax(1).tolist(), abs=1e-4
    )
    chunks = list(client.completions.create(**options, logprobs=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == whole.logprobs.tokens
    assert [at for part in parts for at in part.text_offset] == whole.logprobs.text_offset

    asked = {"model": "chat", "messages": [{"role": "user", "content": "é"}], "max_tokens": 6, "temperature": 0}
    content = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert content[0].logprob == pytest.approx(content[0].top_logprobs[0].logprob)
    assert all(len(each.top_logprobs) == 3 and each.bytes for each in content)
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_openai_steering(client, served):
    """By number, by search and with the SAE's own mode and strength; the answer says what was done."""
    ids = dialogue(served, "hello")
    asked = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10, "temperature": 0}
    clean = client.chat.completions.create(**asked)
    assert clean.steering == [] and clean.choices[0].message.content == alone(served, ids, 10)

    def ask(*steering):
        found = client.chat.completions.create(**asked, extra_body={"steering": steering})
        return found.choices[0].message.content, found.steering

    text, applied = ask({"latent": 5, "strength": 3.0, "mode": "add"})
    assert text == alone(served, ids, 10, steering=steered(served, {5: 3.0})) != clean.choices[0].message.content
    assert applied == [{"latent": 5, "strength": 3.0, "mode": "add", "meaning": served.index.meaning_of(5)}]

    text, applied = ask({"search": "dogs"})
    (best,) = served.index.search("dogs", sort="output_score", limit=1)
    assert applied[0]["latent"] == best["latent"] and applied[0]["mode"] == "clamp" and applied[0]["strength"] == 1.5
    assert text == alone(served, ids, 10, steering=steered(served, {best["latent"]: 1.5}, "clamp"))

    text, applied = ask({"latent": 5, "strength": 2, "mode": "add"}, {"latent": 6, "strength": -1, "mode": "add"})
    assert text == alone(served, ids, 10, steering=steered(served, {5: 2.0, 6: -1.0}))
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body={"steering": [{"latent": 5}]}))
    assert chunks[0].steering[0]["latent"] == 5


def test_openai_many_at_once_with_different_steering(client, served):
    """Nine threads, four rows: each gets what it would get alone."""
    ids = encode_text(served.opened.tokenizer, "the ring")
    latents = [i for i in range(16) if i not in DEAD][:9]
    expected = [alone(served, ids, 20, 1, 1.0, steering=steered(served, {i: 2.0})) for i in latents]
    found = {}

    def ask(latent):
        steering = {"steering": [{"latent": latent, "strength": 2.0, "mode": "add"}]}
        options = {"model": "chat", "prompt": "the ring", "max_tokens": 20, "seed": 1, "extra_body": steering}
        chunks = client.completions.create(**options, stream=True)
        found[latent] = "".join(chunk.choices[0].text for chunk in chunks)

    threads = [threading.Thread(target=ask, args=(latent,)) for latent in latents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [found[latent] for latent in latents] == expected and len(set(expected)) > 5


def test_openai_errors(client, choice):
    import openai

    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'; this server has chat"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="chat", prompt="a", temperature=3)
    with pytest.raises(openai.BadRequestError, match="There is no latent 99"):
        client.completions.create(model="chat", prompt="a", extra_body={"steering": [{"latent": 99}]})
    with started(choice, api_key="secret", max_waiting=0) as (address, served):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        friend = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0, timeout=SECONDS)
        options = {"model": "chat", "prompt": "a", "max_tokens": 300, "extra_body": {}, "temperature": 1.0}
        streams = [friend.completions.create(**options, n=4, stream=True)]
        with pytest.raises(openai.RateLimitError) as refused:
            friend.completions.create(**options)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        streams[0].close()
        until(lambda: served.engine.n_rows == 0)
        assert friend.completions.create(model="chat", prompt="a", max_tokens=1).choices


# ---- Goodfire's controller


def test_goodfires_controller(address, served):
    """nudge, pin and mul on features as its client writes them, and on plain numbers."""
    feature = lambda i: {"uuid": "0", "label": "x", "max_activation_strength": 1.0, "index_in_sae": i}
    interventions = [
        {"mode": "nudge", "features": {"features": [feature(5), feature(6)]}, "value": 2.0},
        {"mode": "pin", "features": [feature(8)], "value": 1.0},
        {"mode": "mul", "features": [9], "value": 0.5},
    ]
    controller = {"interventions": interventions, "scopes": [], "name": None, "nonzero_strength_threshold": None}
    body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    found = post(address, "/v1/chat/completions", body | {"controller": controller}).json()
    applied = [(each["latent"], each["mode"], each["strength"]) for each in found["steering"]]
    assert applied == [(5, "add", 2.0), (6, "add", 2.0), (8, "clamp", 1.0), (9, "scale", 0.5)]
    ids = dialogue(served, "hello")
    model = served.opened.model
    tokens = list(ids)
    for _ in range(8):
        with contextlib.ExitStack() as stack:
            for strengths, mode in (({5: 2.0, 6: 2.0}, "add"), ({8: 1.0}, "clamp"), ({9: 0.5}, "scale")):
                stack.enter_context(model.intervene(*steered(served, strengths, mode)))
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    said = found["choices"][0]["message"]["content"]
    assert (
        served.opened.text_after(ids, tokens[len(ids) :]).startswith(said) and found["usage"]["completion_tokens"] > 0
    )
    scoped = controller | {"scopes": [{"conditionals": []}]}
    assert "scopes" in complaint(post(address, "/v1/chat/completions", body | {"controller": scoped}))


# ---- control vectors


def test_control_vectors(choice, tmp_path):
    """By name, alone and with a latent, at the file's scale or the request's."""
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: 3 * torch.randn(TINY_PARAMS["dim"], generator=generator) for layer in (1, 2)}
    write_gguf(tmp_path / "calm.gguf", vectors)
    chosen = VectorChoice([str(tmp_path / "calm.gguf")], [2.0])
    with started(choice, vectors=chosen) as (address, served):
        ids = encode_text(served.opened.tokenizer, "the ring")
        body = {"prompt": "the ring", "max_tokens": 8, "temperature": 0}
        clean = post(address, "/v1/completions", body).json()["choices"][0]["text"]
        latent = {"latent": 5, "strength": 2.0, "mode": "clamp"}
        for item, scale in (({"control_vector": "calm"}, 2.0), ({"control_vector": "calm", "scale": -1.0}, -1.0)):
            for further in ([], [latent]):
                found = post(address, "/v1/completions", body | {"steering": [*further, item]}).json()
                tokens = list(ids)
                for _ in range(8):
                    with contextlib.ExitStack() as stack:
                        stack.enter_context(steered_by(served.opened.model, vectors, scale))
                        for _ in further:
                            stack.enter_context(served.opened.model.intervene(*steered(served, {5: 2.0}, "clamp")))
                        with torch.inference_mode():
                            tokens.append(int(served.opened.model(torch.tensor([tokens]))[0, -1].argmax()))
                text = found["choices"][0]["text"]
                assert served.opened.text_after(ids, tokens[len(ids) :]).startswith(text) and text != clean
                assert {"control_vector": "calm", "scale": scale} in found["steering"]
        (model,) = httpx.get(f"{address}/v1/models").json()["data"]
        assert model["control_vectors"] == {"calm": {"scale": 2.0, "where": "after layers 1 to 2"}}
        twice = {"steering": [{"control_vector": "calm"}] * 2}
        assert "twice" in complaint(post(address, "/v1/completions", body | twice))
        unknown = {"steering": [{"control_vector": "../calm"}]}
        assert "There is no control vector '../calm'" in complaint(post(address, "/v1/completions", body | unknown))


# ---- bad requests

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("completions", {}, "prompt: Field required"),
        ("completions", [], "not a JSON object"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 301}, "max_tokens is 301, but the limit is 300"),
        ("completions", {"prompt": "a" * 2000}, "but the limit is 200; shorten it"),
        ("completions", {"prompt": []}, "no tokens"),
        ("completions", {"prompt": [5, 999]}, "There is no token 999"),
        ("completions", {"prompt": [-1]}, "There is no token -1"),
        ("completions", {"prompt": ["a", "b", "c"], "n": 2}, "for 6 completions, but the limit is 4"),
        ("completions", {"prompt": {"a": 1}}, "prompt"),
        ("completions", {"prompt": "a", "temprature": 1}, "Unrecognized request argument: temprature"),
        ("completions", {"prompt": "a", "echo": True}, "echo is not supported"),
        ("completions", {"prompt": "a", "top_p": 1.5}, "top_p"),
        ("completions", {"prompt": "a", "temperature": 1e-40}, "A temperature of"),
        ("completions", {"prompt": "a", "stop": ""}, "stop"),
        ("completions", {"prompt": "a", "stop": ["a"] * 17}, "stop"),
        ("completions", {"prompt": "a", "seed": 2**63}, "seed"),
        ("completions", {"prompt": "a", "stream": "maybe"}, "stream"),
        ("completions", {"prompt": "a", "steering": [{}]}, "exactly one of latent, search and control_vector"),
        ("completions", {"prompt": "a", "steering": [{"latent": 1, "search": "x"}]}, "exactly one"),
        ("completions", {"prompt": "a", "steering": [{"latent": 1, "scale": 2}]}, "scale belongs to a control_vector"),
        ("completions", {"prompt": "a", "steering": [{"latent": 1, "mode": "push"}]}, "mode"),
        ("completions", {"prompt": "a", "steering": [{"latent": 1}, {"latent": 1}]}, "twice"),
        ("completions", {"prompt": "a", "steering": [{"latent": 7}]}, "Latent 7 never fired"),
        ("completions", {"prompt": "a", "steering": [{"latent": 40}]}, "There is no latent 40"),
        ("completions", {"prompt": "a", "steering": [{"latent": 1, "strength": 1e9}]}, "give a number from"),
        ("completions", {"prompt": "a", "steering": [{"search": "zebra"}]}, "No latent's meaning contains 'zebra'"),
        ("chat/completions", {}, "messages: Field required"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
        ("chat/completions", CHAT | {"tools": [{}]}, "tools is not supported"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ("chat/completions", CHAT | {"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ("latents/inspect", {}, "Give either text or messages"),
        ("latents/inspect", {"text": "a" * 2000}, "but the limit is 200"),
        ("latents/contrast", {"positive": ["a"]}, "negative: Field required"),
        ("latents/contrast", {"positive": [], "negative": ["a"]}, "positive"),
    ],
)
def test_bad_bodies_get_one_sentence(address, served, path, body, said):
    assert said in complaint(post(address, f"/v1/{path}", body))


def test_a_steered_model_that_overflows_says_so(address, served, monkeypatch):
    """With a status before the first token, as an event of the stream after it; a neighbour goes on."""
    slowly(served, monkeypatch, 0.001)
    calls = []
    broken = lambda x: x * float("nan") if (calls.append(1) or len(calls)) > n_good else x
    monkeypatch.setattr(script, "resolve", lambda asked, *_: ([Intervention(SITE, broken)] if asked else [], []))
    body = {"prompt": "a", "max_tokens": 20, "temperature": 0, "stream": True}
    whole = httpx.post(f"{address}/v1/completions", json=body, timeout=SECONDS)
    for n_good in (0, 5):
        calls.clear()
        found = httpx.post(f"{address}/v1/completions", json=body | {"steering": [{"latent": 1}]}, timeout=SECONDS)
        if n_good == 0:
            assert "lower the strength" in complaint(found)
        else:
            last = found.text.strip().rpartition("data: ")[2]
            assert found.status_code == 200 and "lower the strength" in json.loads(last)["error"]["message"]
            assert found.text.count("data: ") == 1 + 5 + 1  # the opening, five tokens, the error
    again = httpx.post(f"{address}/v1/completions", json=body, timeout=SECONDS)
    texts = [[event["choices"][0]["text"] for event in events(each.text)] for each in (whole, again)]
    assert texts[0] == texts[1]


def test_fields_that_change_nothing_are_accepted(address):
    body = CHAT | {"max_tokens": 2, "user": "me", "metadata": {"a": "b"}, "tools": [], "frequency_penalty": 0.0}
    body |= {"response_format": {"type": "text"}, "logit_bias": {}, "store": False, "n": None, "stop": None}
    body |= {"temperature": None, "top_p": None, "stream": None, "logprobs": None, "seed": None, "steering": None}
    assert post(address, "/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b'{"prompt": ', "application/json", 400, "The body is not JSON"),
        (b"\xff\xfe", "application/json", 400, ""),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "prompt"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400, "temperature"),
        (b'{"prompt": "a"}', "text/plain", 400, "Content-Type: application/json"),
        (b"", "application/json", 400, "There is no body"),
        (b"[" * 100_000, "application/json", 400, "cannot be read as JSON"),
        (b'{"\\ud800": 1, "prompt": ""}', "application/json", 400, "unicode"),
        (b" " * (LIMITS.body_bytes + 1), "application/json", 413, "bytes, which is the limit"),
    ],
)
def test_bodies_that_are_none(address, content, kind, status, said):
    headers = {"Content-Type": kind}
    found = httpx.post(f"{address}/v1/completions", content=content, headers=headers, timeout=SECONDS)
    assert said in complaint(found, status)


def test_addresses_that_do_not_exist(address):
    assert "There is no /v2 here; /docs lists" in complaint(httpx.get(f"{address}/v2"), 404)
    assert "does not take GET" in complaint(httpx.get(f"{address}/v1/completions"), 405)
    assert "There is no latent 40" in complaint(httpx.get(f"{address}/v1/latents/40"), 404)
    assert "There is no model 'x'" in complaint(httpx.get(f"{address}/v1/models/x"), 404)
    assert "sort" in complaint(httpx.get(f"{address}/v1/latents?sort=size"))


# ---- inspection


def test_search_and_cards(address, served):
    found = httpx.get(
        f"{address}/v1/latents", params={"search": "dogs", "limit": 3, "offset": 1, "sort": "score"}
    ).json()
    assert found["data"] == served.index.search("dogs", "score", 3, 1) and found["total"] == served.index.count("dogs")
    card = httpx.get(f"{address}/v1/latents/3").json()
    expected = served.index.card(3)
    assert card["meaning"] == expected.meaning and card["frequency"] == pytest.approx(expected.frequency)
    assert [s["text"] for s in card["sentences"]] == ["".join(s.tokens) for s in expected.sentences]
    assert card["promoted"] == [{"token": token, "score": score} for token, score in expected.promoted]
    assert card["steering"] == {"latent": 3, "strength": 1.5, "mode": "clamp"}
    unknown = httpx.get(f"{address}/v1/latents/{DEAD[0]}").json()
    assert math.isnan(served.index.card(DEAD[0]).output_score) and unknown["output_score"] is None


def test_inspect_a_text_and_a_dialogue(address, served, monkeypatch):
    monkeypatch.setattr(inspection, "_PART", 5)  # read in several parts
    opened = served.opened
    ids = encode_text(opened.tokenizer, "the ring é and another ring of gold")
    turns = [Message("user", "hello"), Message("assistant", "the ring")]
    for body, tokens in (
        ({"text": "the ring é and another ring of gold"}, ids),
        ({"messages": [turn._asdict() for turn in turns]}, encode_answered(opened.tokenizer, turns, opened.date).ids),
    ):
        found = post(address, "/v1/latents/inspect", body | {"top_k": 3}).json()
        skipped = int(tokens[0] == opened.tokenizer.bos_id)
        expected = strongest_latents(opened, tokens, 3)[skipped:]
        assert [row["token_id"] for row in found["data"]] == tokens[skipped:]
        assert found["usage"]["prompt_tokens"] == len(tokens)
        for row, (_, latents) in zip(found["data"], expected, strict=True):
            assert [each["latent"] for each in row["latents"]] == [latent for latent, _ in latents]
            values = [value for _, value in latents]
            assert [each["activation"] for each in row["latents"]] == pytest.approx(values, abs=1e-4)
            assert all(each["meaning"] == served.index.meaning_of(each["latent"]) for each in row["latents"])


def test_texts_read_in_parts_with_an_sae_whose_latents_vary_in_number(served, monkeypatch):
    monkeypatch.setattr(inspection, "_PART", 3)
    opened = dataclasses.replace(served.opened, sae=random_sae(TINY_PARAMS["dim"], 30, None, kind=Kind(gate="relu")))
    opened.sae.info = {"site": SITE}
    ids = encode_text(opened.tokenizer, "the ring é and another ring of gold")
    steps = inspection.kept_latents(opened, ids)
    with pytest.raises(StopIteration) as done:
        while True:
            next(steps)
    kept = done.value.value
    rows = [latents for _, latents in strongest_latents(opened, ids)][len(ids) - len(kept.ids) :]
    for latents, values, indices in zip(rows, kept.values.tolist(), kept.indices.tolist(), strict=True):
        found = {latent: value for latent, value in zip(indices, values, strict=True) if value > 0}
        assert found == pytest.approx(dict(latents), abs=1e-4)
    assert len({len(latents) for latents in rows}) > 1


def test_contrast_against_plain_loops(address, served):
    opened, highest = served.opened, served.opened.highest.tolist()
    positive = ["the ring", [{"role": "user", "content": "hello ring"}], "12 rings é"]
    negative = ["hello", "edited on aaaa"]

    def means(asked):
        turns = asked if isinstance(asked, str) else [Message(**turn) for turn in asked]
        rows = strongest_latents(opened, inspection.encode_asked(opened, turns, 200), opened.sae.k)
        rows = [latents for _, latents in rows[int(rows[0][1] == []) :]]
        return [
            sum(dict(row).get(i, 0.0) for row in rows) / len(rows) / highest[i] if highest[i] else 0.0
            for i in range(N_LATENTS)
        ]

    a, b = ([means(each) for each in given] for given in (positive, negative))
    scores = {}
    for i in range(N_LATENTS):
        difference = sum(row[i] for row in a) / 3 - sum(row[i] for row in b) / 2
        pairs = [1.0 if x[i] > y[i] else 0.5 if x[i] == y[i] else 0.0 for x in a for y in b]
        scores[i] = (2 * sum(pairs) / 6 - 1) * difference, difference, sum(pairs) / 6
    found = post(address, "/v1/latents/contrast", {"positive": positive, "negative": negative, "top_k": 4}).json()
    for name, sign in (("positive", 1), ("negative", -1)):
        towards = {i: score for i, (score, difference, _) in scores.items() if sign * difference > 0 and score > 0}
        expected = sorted(towards, key=towards.get, reverse=True)[:4]
        assert [row["latent"] for row in found[name]] == expected and expected
        for row in found[name]:
            assert row["score"] == pytest.approx(scores[row["latent"]][0], abs=1e-4)
            assert row["separation"] == pytest.approx(scores[row["latent"]][2], abs=1e-6)
            assert row["steering"] == {"latent": row["latent"], "strength": 1.5, "mode": "clamp"}


def test_without_an_sae(choice):
    with started(ModelChoice(choice.llama_model_dir)) as (address, _):
        assert post(address, "/v1/completions", {"prompt": "a", "max_tokens": 3}).status_code == 200
        assert "no SAE" in complaint(httpx.get(f"{address}/v1/latents"))
        body = {"prompt": "a", "steering": [{"latent": 3}]}
        assert "--sae_model_path" in complaint(post(address, "/v1/completions", body))


# ---- state, docs, access


def test_health_and_metrics(choice):
    with started(choice) as (address, served):
        post(address, "/v1/completions", {"prompt": "the ring", "max_tokens": 7, "temperature": 0, "stop": "qqq"})
        post(address, "/v1/completions", {"prompt": 5})
        httpx.get(f"{address}/anything")
        health = httpx.get(f"{address}/health").json()
        assert health["status"] == "ok" and health["rows"] == 0
        found = httpx.get(f"{address}/metrics")
        assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
        sample = re.compile(r'^[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? \S+$')
        lines = [line for line in found.text.splitlines() if not line.startswith("#")]
        assert all(sample.match(line) for line in lines)
        values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
        assert values['llama_responses_total{path="/v1/completions",status="200"}'] == 1
        assert values['llama_responses_total{path="/v1/completions",status="400"}'] == 1
        assert values['llama_responses_total{path="other",status="404"}'] == 1
        n = len(encode_text(served.opened.tokenizer, "the ring"))
        assert values["llama_prompt_tokens_total"] == n and values["llama_new_tokens_total"] <= 7
        assert values["llama_first_token_seconds_count"] == 1 == values['llama_first_token_seconds_bucket{le="+Inf"}']
        assert sum(value for name, value in values.items() if "rows_ended" in name) == 1


def test_the_api_describes_itself_without_network(address):
    document = httpx.get(f"{address}/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/latents/contrast"} <= document["paths"].keys()
    page = httpx.get(f"{address}/docs").text
    assert page == httpx.get(address).text
    assert not re.search(r"""(src|href)=['"]?(https?:)?//""", page) and "<script" not in page
    for words in ("/v1/latents/{latent}", "steering", "GoodfireController", "in multiples of its highest activation"):
        assert words in page


def test_a_key_is_asked_for(choice):
    with started(choice, api_key="secret") as (address, _):
        assert "API key is missing or wrong" in complaint(httpx.get(f"{address}/v1/models"), 401)
        assert httpx.get(f"{address}/metrics").status_code == 401
        for path in ("/health", "/docs", "/openapi.json"):
            assert httpx.get(address + path).status_code == 200
        for wrong in ("Bearer secre", "Bearer secret2", "Basic secret", "secret"[:0]):
            assert httpx.get(f"{address}/v1/models", headers={"Authorization": wrong}).status_code == 401
        right = {"Authorization": "Bearer secret", "Host": "elsewhere.example"}
        assert httpx.get(f"{address}/v1/models", headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:1", 200), ("[::1]", 200), ("127.0.0.2", 200), ("evil.example", 403), ("", 403)]
)
def test_a_web_page_under_a_name_of_its_own_is_refused(address, host, status):
    assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == status


def test_refusals(capsys, monkeypatch, choice):
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    said = refusal(capsys, script, host="0.0.0.0", port=0)
    assert "set a key" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refusal(capsys, script, port=taken.getsockname()[1])
    assert "Cannot listen on" in refusal(capsys, script, host="192.0.2.1", port=0, api_key="x")
    assert "--max_rows 0" in refusal(capsys, script, max_rows=0)


# ---- clients that misbehave


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), SECONDS)


def request_bytes(body: dict, length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode() + content


LONG = {"prompt": "the ring", "max_tokens": 300, "temperature": 1.5, "seed": 2}


def slowly(served, monkeypatch, seconds=0.005):
    """Make every step take a while, so that a client can leave in the middle."""
    monkeypatch.setattr(served.opened.tokenizer, "stop_ids", frozenset())
    forward = served.engine._forward
    monkeypatch.setattr(served.engine, "_forward", lambda *what: time.sleep(seconds) or forward(*what))


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_rows(address, served, monkeypatch, streams):
    slowly(served, monkeypatch)
    before = served.engine.counts.rows["cancelled"]
    with connect(address) as client:
        client.sendall(request_bytes(LONG | {"stream": streams, "n": 3}))
        until(lambda: served.engine.n_rows == 3)
        if streams:
            assert client.recv(100)
    until(lambda: served.engine.n_rows == 0, 5)
    assert served.engine.counts.rows["cancelled"] == before + 3


def test_a_client_that_leaves_while_it_waits(address, served, monkeypatch):
    slowly(served, monkeypatch)
    with connect(address) as first, connect(address) as second:
        first.sendall(request_bytes(LONG | {"n": 4}))
        until(lambda: served.engine.n_rows == 4)
        second.sendall(request_bytes(LONG | {"n": 2}))
        until(lambda: served.engine.n_waiting == 2)
        second.close()
        until(lambda: served.engine.n_waiting == 0, 5)
        assert served.engine.n_rows == 4


def test_half_a_body(address, served, monkeypatch):
    """It is given up after a while, and others are served meanwhile."""
    monkeypatch.setattr(script, "_BODY_S", 0.5)
    with connect(address) as client, connect(address) as leaves:
        for each in (client, leaves):
            each.sendall(request_bytes(LONG, length=10_000))
        leaves.close()
        assert post(address, "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
        answer = b""
        while piece := client.recv(10_000):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.5 seconds" in answer
    assert served.engine.n_rows == 0


def test_a_slow_reader_holds_no_row(address, served, monkeypatch):
    """Its answer waits for it, whole, while its place goes to others."""
    monkeypatch.setattr(served.opened.tokenizer, "stop_ids", frozenset())
    ids = encode_text(served.opened.tokenizer, "the ring")
    expected = alone(served, ids, 150, 2, 1.5)
    with connect(address) as client:
        n_before = served.engine.counts.rows["length"]
        client.sendall(
            request_bytes(LONG | {"max_tokens": 150, "stream": True, "logprobs": 20})
        )  # more than the sockets' buffers hold
        until(lambda: served.engine.counts.rows["length"] == n_before + 1)
        assert served.engine.n_rows == 0
        assert post(address, "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
        answer = b""
        while b"[DONE]" not in answer:
            answer += client.recv(1_000_000)
    said = re.findall(r'"text": ("(?:[^"\\]|\\.)*"), "logprobs"', answer.decode())
    assert "".join(json.loads(text) for text in said) == expected


def test_nonsense_on_the_wire(address, served):
    for nonsense in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"\r\n",
    ):
        with connect(address) as client:
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            client.recv(1000)
    assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(address, served):
    body = json.dumps({"prompt": "the ring", "max_tokens": 12, "temperature": 0, "stream": True})
    command = ["curl", "-sN", "--noproxy", "*", f"{address}/v1/completions", "-H", "Content-Type: application/json"]
    found = subprocess.run([*command, "-d", body], capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    text = "".join(event["choices"][0]["text"] for event in events(found))
    assert text == alone(served, encode_text(served.opened.tokenizer, "the ring"), 12)


# ---- many clients


def memory_mb() -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def test_sixty_four_clients_for_a_while(choice):
    """Mixed steering, sampling and lengths; every third client leaves in mid-stream. No answer is lost, mixed or cut
    short, and memory does not grow."""
    kinds = []
    limits = script.Limits(max_rows=16, max_prompt_tokens=200, max_new_tokens=300)
    with started(choice, limits=limits, max_waiting=64) as (address, served):
        for i in range(16):
            latent = (i * 5 + 1) % N_LATENTS
            steering = [] if latent in DEAD or i % 4 == 0 else [{"latent": latent, "strength": 2.0, "mode": "add"}]
            prompt = ("the ring", "hello there, the é ring of 12", "on " * (10 * (i % 5) + 1))[i % 3]
            body = {"prompt": prompt, "max_tokens": 8 + 3 * i, "seed": i, "temperature": 1.0, "steering": steering}
            applied = steered(served, {latent: 2.0}) if steering else None
            ids = encode_text(served.opened.tokenizer, prompt)
            kinds.append((body, alone(served, ids, body["max_tokens"], i, 1.0, steering=applied)))
        assert len({text for _, text in kinds}) == len(kinds)
        wrong, n_whole, n_left = [], 0, 0
        ends_at, memory = time.monotonic() + 3, []

        async def client(number: int, http: httpx.AsyncClient) -> None:
            nonlocal n_whole, n_left
            turn = number
            while time.monotonic() < ends_at or (n_whole < 64 and time.monotonic() < ends_at + SECONDS):
                body, expected = kinds[turn % len(kinds)]
                turn += 7
                said, done = "", False
                async with http.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}) as answer:
                    if answer.status_code == 429:
                        await asyncio.sleep(int(answer.headers["Retry-After"]))
                        continue
                    async for line in answer.aiter_lines():
                        if line == "data: [DONE]":
                            done = True
                        elif line:
                            said += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                        if number % 3 == 0 and len(said) > 6:
                            break
                if done:
                    n_whole += 1
                    wrong.extend([] if said == expected else [(said, expected)])
                else:
                    n_left += 1
                    wrong.extend([] if number % 3 == 0 and expected.startswith(said) else [(said, expected)])

        async def clients() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=SECONDS, trust_env=False) as http:
                tasks = [asyncio.ensure_future(client(number, http)) for number in range(64)]
                await asyncio.sleep(1.5)
                memory.append(memory_mb())
                await asyncio.gather(*tasks)
                memory.append(memory_mb())

        asyncio.run(clients())
        assert wrong == [] and n_whole >= 64 and n_left > 10
        assert memory[1] < memory[0] + 60, memory
        until(lambda: served.engine.n_rows == served.engine.n_waiting == 0)
        assert not any(served.engine._slots.filled)
        print(f"{n_whole} whole answers, {n_left} left, {served.engine.counts.new_tokens} tokens; MB: {memory}")


# ---- the real command


@contextlib.contextmanager
def process(**options):
    """The command itself: its process, and its address."""
    command = [sys.executable, script.__file__, *as_flags({"port": 0, "grace_s": SECONDS, **options})]
    found = subprocess.Popen(command, cwd=PROJECT_DIR, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = found.stdout.readline()
        ready = re.match(r"Ready: (http://127\.0\.0\.1:\d+)/v1", line)
        assert ready, line + found.stderr.read()
        yield found, ready[1]
    finally:
        found.kill()
        found.wait()


def stopped(server, address, stop: signal.Signals) -> int:
    """End the server while an answer streams and another waits: both get theirs, whole or a sentence. Returns its exit
    code."""
    with httpx.stream("POST", f"{address}/v1/completions", json=LONG | {"stream": True}, timeout=SECONDS) as answer:
        lines = answer.iter_lines()
        next(lines)
        waiting = []
        other = threading.Thread(target=lambda: waiting.append(post(address, "/v1/completions", LONG)))
        other.start()
        until(lambda: httpx.get(f"{address}/health").json()["waiting"] == 1 or not other.is_alive())
        server.send_signal(stop)
        *_, last = (line for line in lines if line)
    other.join(SECONDS)
    assert last == "data: [DONE]"
    assert waiting[0].status_code in (200, 503)  # in time, or told to come again
    code = server.wait(SECONDS)
    assert "Traceback" not in server.stderr.read()
    return code


def test_ctrl_c_lets_answers_end(choice):
    options = {"llama_model_dir": choice.llama_model_dir, "sae_model_path": choice.sae_model_path}
    with process(**options, max_rows=1) as (server, address):
        assert stopped(server, address, signal.SIGINT) == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_clients_killed_in_mid_stream_and_sigterm(choice):
    """kill -9 of whole processes that read streams, from which rows are free at once; then the server's own end."""
    options = {"llama_model_dir": choice.llama_model_dir, "sae_model_path": choice.sae_model_path}
    with process(**options, max_rows=1) as (server, address):
        body = json.dumps(LONG | {"max_tokens": 1000, "stream": True, "stop": ["zzzzzzzz"]})
        command = ["curl", "-sN", "--noproxy", "*", f"{address}/v1/completions", "-H", "Content-Type: application/json"]
        clients = [subprocess.Popen([*command, "-d", body], stdout=subprocess.PIPE) for _ in range(4)]
        clients[0].stdout.readline()
        for client in clients:
            os.kill(client.pid, signal.SIGKILL)
            client.wait()
        until(lambda: (h := httpx.get(f"{address}/health").json())["rows"] == h["waiting"] == 0, 10)
        assert post(address, "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
        assert stopped(server, address, signal.SIGTERM) == -signal.SIGTERM


# ---- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    if SMOLLM2 is None:
        pytest.skip("SmolLM2 is not here: make model")
    with started(ModelChoice(SMOLLM2), limits=script.Limits(16, 200, 100)) as running:
        yield running


def test_sixteen_people_steer_smollm2_with_latents_of_their_own(smollm2):
    """Each gets what it would get alone, at the same time."""
    openai = pytest.importorskip("openai", reason="openai is not installed: make install")
    address, served = smollm2
    sea = served.index.search("sea", sort="output_score", limit=1)[0]["latent"]
    good = [i for i in range(served.index.n_latents) if served.index.steers_well[i] and i != sea]
    latents = [sea, *good[:15]]
    strength = 2 * served.opened.defaults.strength
    ids = dialogue(served, "What do you like?")
    expected = [alone(served, ids, 7, 1, 0.7, steering=steered(served, {i: strength})) for i in latents[:2]]
    found = {}

    def ask(latent):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=SECONDS)
        chat = client.chat.completions.create(
            model=served.model_id,
            messages=[{"role": "user", "content": "What do you like?"}],
            max_tokens=7,
            temperature=0.7,
            seed=1,
            extra_body={"steering": [{"latent": latent, "strength": strength, "mode": "add"}]},
        )
        found[latent] = chat.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(latent,)) for latent in latents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [found[latent] for latent in latents[:2]] == expected
    assert len(found) == 16 and len(set(found.values())) > 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_examples_of_the_docs(smollm2, capsys):
    """Every one, with fewer tokens."""
    pytest.importorskip("openai", reason="openai is not installed: make install")
    address, _ = smollm2
    page = (PROJECT_DIR / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```", page, re.M | re.S)
    here = lambda code: re.sub(r"(max_tokens\W+)\d+", r"\g<1>3", code.replace("http://127.0.0.1:8000", address))
    names: dict = {}
    for _, code in (block for block in blocks if block[0] == "python"):
        exec(here(code), names)
    assert names["chat"].steering[0]["meaning"] and "'latent'" in capsys.readouterr().out
    shell = [here(code).replace("curl ", "curl -s --noproxy '*' ") for language, code in blocks if language == "sh"]
    assert len(shell) >= 3
    for code in shell:
        found = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, timeout=SECONDS)
        assert found.returncode == 0 and "{" in found.stdout and '"error"' not in found.stdout, found.stdout

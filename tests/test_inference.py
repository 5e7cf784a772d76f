"""Generation against a loop of full forward passes without a cache, one prompt at a time, and steering against none.

.venv/bin/python -m pytest tests/test_inference.py
"""

import json
import math
import shutil
from itertools import zip_longest

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_PARAMS, TINY_VOCAB_SIZE, write_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from support.pipeline_runs import SITE, call, refusal

import llama_3_inference as inference
from llama_3 import generation, load_model, load_tokenizer
from llama_3.chat import Message
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import complete, generate, sample, stream_chat, stream_text
from llama_3.model import Intervention
from pipeline.errors import InputError
from pipeline.files import write_json
from sae import SparseAutoencoder, save_sae
from serving import steered_model
from serving.modes import UNMEASURED
from serving.steered_model import ModelChoice, open_model
from serving.steering import Steering, make_steering, steering_function

N_LATENTS, K = 50, 4
PROMPTS = [
    [276, 5, 44],
    [7],  # 276: begin-of-text
    [9, 8, 7, 6, 5, 4, 3, 2, 260],
    [100, 101],
]
STRONG = 3.0
HIGHEST = 2.5


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def sae():
    sae = SparseAutoencoder(TINY_PARAMS["dim"], N_LATENTS, K)
    sae.initialize(torch.zeros(TINY_PARAMS["dim"]), torch.Generator().manual_seed(5))
    return sae.requires_grad_(False)


def rows_of(steps) -> list[list[int]]:
    """The tokens of each row. Once a row has stopped it gives only None."""
    rows = [list(row) for row in zip(*steps, strict=True)]
    for row in rows:
        n = row.index(None) if None in row else len(row)
        assert set(row[n:]) <= {None}
    return [[token for token in row if token is not None] for row in rows]


def greedy(model, prompt: list[int], n: int, *steering) -> list[int]:
    """Greedy decoding by full forward passes without a cache."""
    tokens = list(prompt)
    for _ in range(n):
        if steering:
            with model.intervene(*steering):
                logits = model(torch.tensor([tokens]))
        else:
            logits = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---- sampling


def test_temperature_0_takes_the_largest():
    logits = torch.randn(20, 31, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(20, generator=torch.Generator().manual_seed(1))
    assert sample(logits, 0.0, 0.5, uniform).equal(logits.argmax(-1))
    assert sample(logits, 1e-6, 1.0, uniform).equal(logits.argmax(-1))


def test_the_smallest_nucleus_is_the_likeliest_token():
    logits = torch.randn(20, 31, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(20, generator=torch.Generator().manual_seed(1))
    for top_p in (1e-9, 0.0):
        assert sample(logits, 1.0, top_p, uniform).equal(logits.argmax(-1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8), (1.0, 0.35), (1.0, 0.999)])
def test_frequencies_equal_the_nucleus_of_softmax(temperature, top_p):
    n = 40_000
    logits = 1.5 * torch.randn(13, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(3))
    counts = sample(logits.expand(n, -1), temperature, top_p, uniform).bincount(minlength=13)
    probs = (logits.double() / temperature).softmax(-1).tolist()
    kept, total = {}, 0.0
    for token in sorted(range(13), key=lambda t: -probs[t]):  # the smallest set whose probability reaches top_p
        if total < top_p:
            kept[token] = probs[token]
            total += probs[token]
    for token in range(13):
        expected = kept.get(token, 0.0) / total
        assert abs(counts[token] / n - expected) <= 4 * math.sqrt(expected * (1 - expected) / n)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8),
    st.floats(1e-6, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_a_sample_is_always_in_the_nucleus(logits, top_p, uniform):
    logits = torch.tensor([logits])
    token = int(sample(logits, 1.0, top_p, torch.tensor([uniform], dtype=torch.float64)))
    probs = logits[0].double().softmax(-1)
    assert probs[probs > probs[token]].sum() <= top_p + 1e-9


def by_sorting(logits, temperature, top_p, uniform):
    """`sample` the obvious way: sort everything, cut off what is outside the nucleus, invert the distribution."""
    probs, tokens = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside = probs.cumsum(-1) - probs >= top_p
    outside[..., 0] = False
    probs[outside] = 0
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, (uniform.to(probs) * cumulative[:, -1])[:, None], right=True)
    return tokens.gather(-1, place.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("likeliest", [16, 256])
def test_a_sample_is_that_of_the_sorted_vocabulary(likeliest, spread, top_p, monkeypatch):
    """Rows whose nucleus holds a few tokens, hundreds, or nearly all of 2,000."""
    monkeypatch.setattr(generation, "_LIKELIEST", likeliest)
    generator = torch.Generator().manual_seed(int(10 * spread))
    logits = spread * torch.randn(100, 2000, generator=generator)
    uniform = torch.rand(100, generator=generator)
    found, expected = sample(logits, 0.8, top_p, uniform), by_sorting(logits, 0.8, top_p, uniform)
    assert (found == expected).sum() >= 99  # a number may fall on the border of two tokens, which rounding decides
    for row in (0, 50, 99):
        assert int(sample(logits[row : row + 1], 0.8, top_p, uniform[row : row + 1])) == int(found[row])


# ---- generation


def test_greedy_equals_full_forward_passes(model):
    found = rows_of(generate(model, PROMPTS, 12, stop_tokens=[]))
    assert found == [greedy(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 2.0}])
def test_prompts_together_equal_each_alone(model, sampling):
    seeds = [11, 12, 13, 14]
    together = rows_of(generate(model, PROMPTS, 10, [], seeds=seeds, **sampling))
    alone = []
    for prompt, seed in zip(PROMPTS, seeds, strict=True):
        alone += rows_of(generate(model, [prompt], 10, [], seeds=[seed], **sampling))
    assert together == alone
    assert all(len(row) == 10 for row in together)


def test_samples_depend_on_the_seed(model):
    options = {"temperature": 2.0, "stop_tokens": [], "max_new_tokens": 10}
    same = rows_of(generate(model, [[7]] * 3, seeds=[1, 1, 2], **options))
    assert same[0] == same[1] != same[2]


def test_stop_tokens_end_a_row(model):
    n = 12
    free = [greedy(model, prompt, n) for prompt in PROMPTS]
    stop = free[0][3]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert rows_of(generate(model, PROMPTS, n, stop_tokens=[stop])) == expected
    assert len({len(row) for row in expected}) > 1  # one continues after another has stopped
    alone = list(generate(model, PROMPTS[:1], n, stop_tokens=[stop, 531]))
    assert alone == [[token] for token in expected[0]]  # and the stream ends
    assert list(generate(model, PROMPTS, n, stop_tokens=[row[0] for row in free])) == []


def test_complete_decodes_whole_characters_and_stops(model, tokenizer, monkeypatch):
    """The tokens of one character come in separate steps."""
    texts = ["é 再", "no"]
    ids = [list(text.encode()) for text in texts]  # the first 256 tokens are the bytes
    seen = {}

    def generate(model, prompts, stop_tokens, **options):
        seen.update(prompts=prompts, stop_tokens=stop_tokens)
        yield from map(list, zip_longest(*ids))

    monkeypatch.setattr("llama_3.generation.generate", generate)
    assert complete(model, tokenizer, ["the", ""]) == texts
    assert seen["prompts"] == [[tokenizer.bos_id, *tokenizer.encode("the")], [tokenizer.bos_id]]
    assert tokenizer.eos_id in seen["stop_tokens"]


DIALOGUES = [
    [Message("user", "the")],
    [
        Message("system", "hello " * 30),
        Message("user", "the ring"),
        Message("assistant", "12<|eot_id|> on"),
        Message("user", "é 再" * 20),
    ],
    [Message("user", ""), Message("assistant", "lo"), Message("user", "hello the\n\n12")],
]


@pytest.mark.parametrize("date", [None, "26 Jul 2024"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_p": 0.95}])
def test_chats_of_unequal_length_equal_each_alone(model, tokenizer, sampling, date):
    """The longer ones' prompts contain stop tokens, which must not end their answers."""
    options = {"max_new_tokens": 25, "date": date, **sampling}
    together = stream_chat(model, tokenizer, DIALOGUES, seeds=[4, 5, 6], **options)
    answers = ["".join(pieces) for pieces in zip(*together, strict=True)]
    alone = []
    for dialogue, seed in zip(DIALOGUES, [4, 5, 6], strict=True):
        alone.append("".join(piece for (piece,) in stream_chat(model, tokenizer, [dialogue], seeds=[seed], **options)))
    assert answers == alone
    assert all(len(tokenizer.encode(answer)) > 3 for answer in answers) and len(set(answers)) == 3


def test_a_stream_gives_the_whole_completion_piece_by_piece(model, tokenizer):
    prompts = ["hello", "the ring on the"]
    steps = list(stream_text(model, tokenizer, prompts, max_new_tokens=9))
    assert len(steps) == 10 and sum(bool(step[1]) for step in steps) > 3
    for prompt, pieces in zip(prompts, zip(*steps, strict=True), strict=True):
        ids = tokenizer.encode(prompt, bos=True)
        assert "".join(pieces) == tokenizer.decode(greedy(model, ids, 9))


def test_more_than_the_context_is_refused_before_anything_is_computed(tmp_path):
    model = load_model(write_tiny_model(tmp_path, max_seq_len=12))
    assert len(list(generate(model, [[1], list(range(7))], 5, stop_tokens=[]))) == 5
    with pytest.raises(InputError, match="prompt of 7 tokens and 6 new ones exceed the model's context of 12"):
        next(generate(model, [[1], list(range(7))], 6, stop_tokens=[]))


@pytest.mark.parametrize(("scaled", "expected"), [(True, 131072), (False, 8192)])
def test_the_context_of_released_models(tmp_path, scaled, expected):
    assert load_model(write_tiny_model(tmp_path, use_scaled_rope=scaled)).args.max_seq_len == expected


# ---- steering


def steering_of(sae, latent, strength, skip=()):
    function = steering_function(sae, {latent: strength}, torch.full((N_LATENTS,), HIGHEST), "h_bias")
    return Intervention(SITE, function, skip)


def test_strength_0_changes_nothing(model, sae):
    steering = steering_of(sae, 3, 0.0)
    with model.intervene(*steering):
        steered = model(torch.tensor(PROMPTS[2:3]))
    assert steered.equal(model(torch.tensor(PROMPTS[2:3])))  # not a bit
    options = {"temperature": 1.5, "stop_tokens": [], "max_new_tokens": 15}
    clean = list(generate(model, PROMPTS, **options))
    assert list(generate(model, PROMPTS, **options, steering=steering)) == clean


@pytest.mark.parametrize("latent", [0, 17, N_LATENTS - 1])
def test_steering_raises_the_latent(model, sae, latent):
    tokens = torch.tensor(PROMPTS[2:3])

    def activation(x):
        values, indices = sae.encode(x)
        return (values * (indices == latent)).sum(-1)

    clean = activation(model.activations(tokens, SITE))
    found = []
    for strength in (1.0, STRONG):
        with model.intervene(*steering_of(sae, latent, strength)):
            found.append(activation(model.activations(tokens, SITE)))
    assert (found[0] >= clean).all() and (found[1] > clean).all() and (found[1] >= found[0]).all()
    assert not activation(model.activations(tokens, SITE)).gt(clean).any()  # and it is over


def test_steered_generation_equals_full_forward_passes(model, sae):
    steering = steering_of(sae, 9, STRONG, skip=(PROMPTS[0][0],))
    found = rows_of(generate(model, PROMPTS, 10, [], steering=steering))
    assert found == [greedy(model, prompt, 10, *steering) for prompt in PROMPTS]
    assert found != rows_of(generate(model, PROMPTS, 10, []))  # it does something


def test_steering_does_not_reach_another_request(model, sae):
    steering = steering_of(sae, 9, STRONG)
    options = {"temperature": 1.0, "stop_tokens": [], "max_new_tokens": 12}
    clean_alone = list(generate(model, PROMPTS, **options))
    steered_alone = list(generate(model, PROMPTS, **options, steering=steering))
    assert clean_alone != steered_alone
    steered = generate(model, PROMPTS, **options, steering=steering)
    clean = generate(model, PROMPTS, **options)
    together = list(zip(steered, clean, strict=True))  # step by step, in turn
    assert [step for step, _ in together] == steered_alone
    assert [step for _, step in together] == clean_alone
    abandoned = generate(model, PROMPTS, **options, steering=steering)
    next(abandoned)  # left open in the middle
    assert list(generate(model, PROMPTS, **options)) == clean_alone


def test_begin_of_text_keeps_its_value(model, sae, tokenizer):
    tokens = torch.tensor([[tokenizer.bos_id, 5, 6, tokenizer.bos_id, 7]])
    clean = model.activations(tokens, SITE)
    with model.intervene(*steering_of(sae, 9, STRONG, skip=(tokenizer.bos_id,))):
        steered = model.activations(tokens, SITE)
    same = (steered == clean).all(-1)[0].tolist()
    assert same == [True, False, False, True, False]


# ---- the script


@pytest.fixture
def sae_path(sae, tokenizer, tmp_path):
    """An SAE with its JSON and latents; latent 2 never fired."""
    path = tmp_path / "sae.pth"
    save_sae(sae, path, {"site": SITE, "begin_of_text": False})
    highest = [0.0 if latent == 2 else HIGHEST for latent in range(N_LATENTS)]
    latents = pa.table({"latent": range(N_LATENTS), "max": pa.array(highest, pa.float32())})
    pq.write_table(latents, tmp_path / "sae.latents.parquet")
    return path


def test_what_opens_when_no_model_is_named(tmp_path, tiny_model_dir, monkeypatch):
    """The SAE's model, or the first of those with a reference SAE of which everything is here."""
    fetched, sae = tmp_path / "models" / "fetched", tmp_path / "sae.pth"
    references = {str(fetched): str(sae), **steered_model.REFERENCE_SAES}
    monkeypatch.setattr(steered_model, "REFERENCE_SAES", references)
    sae.touch()
    fetched.mkdir(parents=True)  # a fetch that has just begun
    assert ModelChoice().model_dir != str(fetched)
    shutil.copytree(tiny_model_dir, fetched, dirs_exist_ok=True)
    choice = ModelChoice()
    assert (choice.model_dir, choice.name, choice.sae_path) == (str(fetched), "fetched", str(sae))
    sae.unlink()
    assert ModelChoice().model_dir != str(fetched)
    tiny = ModelChoice(TINY_LLAMA_DIR + "/")
    assert (tiny.name, tiny.sae_path) == ("the tiny Llama", f"{TINY_LLAMA_DIR}/sae.pth")
    (tmp_path / "sae.json").write_text(json.dumps({"model_dir": "models/fetched"}))
    assert ModelChoice(sae_model_path=str(sae)).model_dir == str(fetched)
    assert ModelChoice(str(tiny_model_dir), sae_model_path=str(sae)).model_dir == str(tiny_model_dir)


@pytest.mark.parametrize(
    ("flags", "strengths", "how"),
    [
        ({"latents": 9, "strengths": 3}, {9: 3.0}, ()),
        ({"latents": 9}, {9: UNMEASURED.strength}, ()),
        ({"latents": [9, 4], "strengths": [3, -7], "mode": "add"}, {9: 3.0, 4: -7.0}, ("add",)),
        ({"latents": [9, 4], "strengths": 5, "mode": "h_bias", "keep_error": "no"}, {9: 5, 4: 5}, ("h_bias", False)),
    ],
)
def test_script_prints_clean_and_steered(tiny_model_dir, sae_path, model, tokenizer, capsys, flags, strengths, how):
    prompts = ["the", "hello there"]
    options = {"llama_model_dir": tiny_model_dir, "prompts": prompts, "max_new_tokens": 8, "temperature": 0}
    call(inference, **options)
    clean = capsys.readouterr().out
    assert "steered" not in clean and all(f"{prompt!r}\n  clean " in clean for prompt in prompts)
    call(inference, **options, sae_model_path=sae_path, **flags)
    both = capsys.readouterr().out
    sae = SparseAutoencoder(TINY_PARAMS["dim"], N_LATENTS, K)
    sae.load_state_dict(torch.load(sae_path, weights_only=True))
    sae.info = {"site": SITE}
    steering = make_steering(sae, Steering(strengths, *how), torch.full((N_LATENTS,), HIGHEST), tokenizer.bos_id)
    for prompt in prompts:
        ids = tokenizer.encode(prompt, bos=True)
        clean, steered = greedy(model, ids, 8), greedy(model, ids, 8, *steering)
        assert f"clean    {tokenizer.decode(clean)!r}" in both and clean != steered
        assert f"steered  {tokenizer.decode(steered)!r}" in both


def test_mode_and_strength_of_the_sae_unless_given(tiny_model_dir, sae_path, capsys):
    """Also that an SAE's entry that says nothing sensible is refused."""
    options = {"llama_model_dir": tiny_model_dir, "prompts": "the", "max_new_tokens": 8, "temperature": 0}
    options |= {"sae_model_path": sae_path, "latents": [9, 4]}

    def steered(**given):
        call(inference, **options, **given)
        return capsys.readouterr().out

    explicit = steered(mode="clamp", strengths=7)
    info = json.loads(sae_path.with_suffix(".json").read_text())
    entry = {"mode": "clamp", "strength": 7, "slider": [-9, 9]}
    write_json(sae_path.with_suffix(".json"), info | {"steering": entry})
    assert steered() == explicit != steered(mode="ablate")
    assert steered(strengths=-7) == steered(strengths=[-7, -7], mode="clamp") != explicit
    for broken in (
        {"mode": "push"},
        {"slider": [1]},
        {"strength": 10},
        {"strength": "strong"},
        {"slider": [0, math.inf]},
    ):
        write_json(sae_path.with_suffix(".json"), info | {"steering": entry | broken})
        said = refusal(capsys, inference, **options)
        assert f"{sae_path.with_suffix('.json')} does not say under `steering`" in said and "sae_steering.py" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"latents": [9, 4], "strengths": [1, 2, 3]}, "--latents names 2, --strengths 3"),
        ({"latents": [9, 4, 9]}, "names a latent twice"),
        ({"latents": 9, "mode": "boost"}, "--mode boost"),
        ({"latents": 9, "strengths": "nan"}, "--strengths nan"),
    ],
)
def test_refuses_what_is_no_steering(tiny_model_dir, sae_path, capsys, flags, said):
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": sae_path, "max_new_tokens": 1}
    assert said in refusal(capsys, inference, **options, **flags)


@pytest.mark.parametrize("latent", [N_LATENTS, -1, TINY_VOCAB_SIZE])
def test_refuses_a_latent_out_of_range(tiny_model_dir, sae_path, capsys, latent):
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": sae_path, "max_new_tokens": 1}
    said = refusal(capsys, inference, **options, latents=latent)
    assert f"latent {latent}" in said and f"0 to {N_LATENTS - 1}" in said


def test_refuses_a_latent_that_never_fired(tiny_model_dir, sae_path, capsys):
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": sae_path, "max_new_tokens": 1}
    assert "never fired" in refusal(capsys, inference, **options, latents=2)


def test_published_sae(tiny_model_dir, sae, sae_path, tokenizer, capsys, monkeypatch):
    """A state dict and nothing else: the options say what it is, and strengths are plain activations."""
    for name in ("sae.json", "sae.latents.parquet"):
        (sae_path.parent / name).unlink()
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": sae_path, "prompts": "the", "max_new_tokens": 8}
    options |= {"temperature": 0, "latents": 9, "strengths": 30}
    assert "give k" in refusal(capsys, inference, **options, rope_scaling_factor=8)
    options |= {"k": K, "normalize_eps": 1e-5, "rope_scaling_factor": 8}
    assert "name its layer with --sae_layer_idx" in refusal(capsys, inference, **options)
    models = []
    monkeypatch.setattr(
        inference, "open_model", lambda *what: (opened := open_model(*what), models.append(opened.model))[0]
    )
    call(inference, **options, sae_layer_idx=SITE.split(".")[1])
    printed = capsys.readouterr()
    assert "sae.latents.parquet; run capture_top_activating_sentences.py first. Until then" in printed.err
    assert models[0].args.rope_scaling_factor == 8
    model = load_model(tiny_model_dir, rope_scaling_factor=8)
    sae.info = {"site": SITE}
    steering = make_steering(sae, Steering({9: 30.0}), None, tokenizer.bos_id)
    steered = greedy(model, tokenizer.encode("the", bos=True), 8, *steering)
    assert f"steered  {tokenizer.decode(steered)!r}" in printed.out


@pytest.mark.parametrize("latents", ["another SAE's", "broken", "a folder"])
def test_files_beside_the_sae_that_cannot_be_used_are_named(tiny_model_dir, sae_path, capsys, latents):
    table = sae_path.with_suffix(".latents.parquet")
    table.unlink()
    if latents == "a folder":
        table.mkdir()
    elif latents == "broken":
        table.write_bytes(b"PAR1")
    else:
        pq.write_table(pa.table({"latent": [0, 1], "max": [1.0, 2.0]}), table)
    sae_path.with_suffix(".meaning_a.yaml").write_text("9: {certainty: 0.9, common_semantic: nine}")
    sae_path.with_suffix(".meaning_b.yaml").write_text(f"{N_LATENTS}: {{certainty: 1, common_semantic: beyond}}")
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": sae_path, "prompts": "the", "max_new_tokens": 4}
    call(inference, **options, latents=9, strengths=30, show_latents=2)
    said = capsys.readouterr().err
    assert "Steered by latent 9 (nine): add, strength 30." in said
    assert said.count(f"{table} ") == said.count(f"sae.meaning_b.yaml names latent {N_LATENTS} of {N_LATENTS};") == 1
    assert "Until then strengths are plain activations." in said


def test_options_that_contradict_the_json_of_an_sae(tiny_model_dir, sae_path, capsys):
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": sae_path, "max_new_tokens": 1, "latents": 9}
    assert f"says k = {K}, not 64" in refusal(capsys, inference, **options, k=64)
    assert "not 'layers.2.attention_norm'" in refusal(capsys, inference, **options, sae_layer_idx=2)


def test_refuses_a_latent_without_an_sae(tiny_model_dir, capsys):
    said = refusal(capsys, inference, llama_model_dir=tiny_model_dir, max_new_tokens=1, latents=9)
    assert "--sae_model_path" in said


def test_refuses_an_sae_of_another_width(tiny_model_dir, tmp_path, capsys):
    sae = SparseAutoencoder(d_model=12, n_latents=24, k=5)
    sae.initialize(torch.zeros(12))
    save_sae(sae, tmp_path / "sae.pth", {"site": SITE, "begin_of_text": False})
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": tmp_path / "sae.pth", "max_new_tokens": 1}
    assert "d_model 12" in refusal(capsys, inference, **options, latents=9)


def test_refuses_a_missing_sae(tiny_model_dir, tmp_path, capsys):
    missing = tmp_path / "nowhere.pth"
    options = {"llama_model_dir": tiny_model_dir, "sae_model_path": missing, "max_new_tokens": 1}
    assert str(missing) in refusal(capsys, inference, **options, latents=9)

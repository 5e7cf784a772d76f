"""The microscope against TransformerLens: the same numbers, and the time of the sweeps.

Both run the same weights in float32, ours as loaded. For each of MODEL_DIRS: the largest differences of lens,
attention, ablation, patching, attribution and gradients; and the time of three sweeps, taking turns: the patch maps of
resid_pre and of heads, and the ablation of every head. TransformerLens' patch maps are its own
(`transformer_lens.patching`); it has no ablation of every head, so that is a loop over its hooks. CPU seconds are of
all threads of this process: with other work on the machine, only they mean something. Needs the environment of
benchmarks/requirements-transformer-lens.txt.

    data/transformer-lens/bin/python benchmarks/microscope.py
    data/transformer-lens/bin/python benchmarks/microscope.py --model_dirs llama_3/tiny_llama --rounds 1
"""

from typing import Any, NamedTuple

from common import load_into_transformer_lens, machine, transformer_lens_config, transformer_lens_state

from pipeline.options import Count, CountOrZero, Seed, parse_constants
from pipeline.run import run

MODEL_DIRS: tuple[str, ...] = ("llama_3/tiny_llama", "models/smollm2-135M-Instruct-Q4_1")
ROUNDS: Count = 3  # measurements of each sweep; medians are printed
PROMPT_TOKENS: Count = 20  # tokens drawn for the prompts, after begin-of-text where the model knows it
CHANGED: CountOrZero = 4  # position of the token in which the corrupted prompt differs
SEED: Seed = 0  # of the prompts
TOLERANCE = 1e-4  # absolute, and relative to each value: more fails

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from llama_3 import load_model, load_tokenizer
from llama_3.model import Transformer
from microscope import ablation, patching
from microscope.attention import patterns
from microscope.attribution import attribution
from microscope.lens import logit_lens
from microscope.prompts import Prompt
from pipeline.errors import Stop
from pipeline.files import PROJECT_DIR


class Both(NamedTuple):
    """One model in both libraries, and two prompts."""

    ours: Transformer
    theirs: Any  # HookedTransformer
    contrast: patching.Contrast

    @property
    def clean(self) -> Tensor:
        return self.contrast.clean.batch(self.ours)

    @property
    def corrupted(self) -> Tensor:
        return self.contrast.corrupted.batch(self.ours)


# ---- the same model, twice


def hooked(model: Transformer) -> Any:
    """TransformerLens' model with our weights."""
    from transformer_lens import HookedTransformer

    with warnings.catch_warnings(action="ignore"):  # until version 4, which does without this class
        theirs = HookedTransformer(transformer_lens_config(model))
    load_into_transformer_lens(theirs, transformer_lens_state(model))
    return theirs.eval().requires_grad_(False)


def prompts(model: Transformer, bos_id: int | None, n_tokens: int, changed: int, seed: int) -> patching.Contrast:
    """Two random prompts that differ in one token, and the answers of each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(model.args.vocab_size, (n_tokens + 1,), generator=generator).tolist()
    first = [] if bos_id is None else [bos_id]
    ids = [*first, *drawn[:-1]]
    other = ids.copy()
    other[changed] = drawn[-1]
    both = [Prompt(each, [str(i) for i in each]) for each in (ids, other)]
    with torch.inference_mode():
        answers = [int(model(each.batch(model))[0, -1].argmax()) for each in both]
    if answers[0] == answers[1]:  # any other token will do
        answers[1] = drawn[0]
    return patching.Contrast(*both, *answers)


# ---- the sweeps


def sweeps(both: Both) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each by us and by TransformerLens, to the same numbers."""
    from transformer_lens import patching as their_patching

    their_patching.tqdm = lambda each, **_: each  # no bars
    model, contrast = both.ours, both.contrast
    sites = [f"layers.{i}.resid_pre" for i in range(model.args.n_layers)]
    ends = contrast.ends(model)
    metric = lambda out: contrast.difference(out)[0]
    in_logits = lambda restored: ends[1] + restored * (ends[0] - ends[1])  # undoes the normalisation

    def ours_off() -> Tensor:
        effects = [each for layer in ablation.every_head(model, contrast.clean, "zero") for each in layer]
        return torch.stack([each.log_p for each in effects])

    @torch.no_grad()
    def their_map(function: Callable) -> Tensor:
        _, clean = both.theirs.run_with_cache(both.clean)
        return function(both.theirs, both.corrupted, clean, metric)

    return {
        "patching, resid_pre, logit difference": (
            lambda: in_logits(patching.patch_map(model, contrast, sites, ends)),
            lambda: their_map(their_patching.get_act_patch_resid_pre),
        ),
        "patching, heads, logit difference": (
            lambda: in_logits(patching.patch_heads(model, contrast, ends)),
            lambda: their_map(their_patching.get_act_patch_attn_head_out_all_pos),
        ),
        "ablation of every head, log p": (ours_off, lambda: torch.stack(their_ablations(both))),
    }


@torch.no_grad()
def their_ablations(both: Both) -> list[Tensor]:
    """The log probabilities after the prompt without each head, by a loop of forward passes."""
    found = []
    for layer in range(both.ours.args.n_layers):
        for head in range(both.ours.args.n_heads):

            def switch_off(z: Tensor, hook: Any, head: int = head) -> Tensor:
                z[:, :, head] = 0
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", switch_off)]
            found.append(both.theirs.run_with_hooks(both.clean, fwd_hooks=hooks)[0, -1].log_softmax(-1))
    return found


# ---- single passes


def ours_of(both: Both) -> dict[str, Tensor]:
    model, contrast = both.ours, both.contrast
    args, clean = model.args, contrast.clean
    sites = [f"layers.{i}.resid_pre" for i in range(args.n_layers)]
    with torch.inference_mode():
        found = {"logits": model(both.clean)[0]}
    lens = logit_lens(model, clean, "resid_post", args.vocab_size)
    found["lens, probabilities"] = torch.stack(
        [torch.empty_like(each.probabilities).scatter_(1, each.token_ids, each.probabilities) for each in lens]
    )
    found["lens, entropy and KL"] = torch.stack([torch.stack([each.entropy, each.kl]) for each in lens])
    found["attention patterns"] = patterns(model, clean, list(range(args.n_layers)))
    parts, _ = attribution(model, clean, contrast.answer, contrast.other)
    of = lambda begin: torch.tensor([part.amount for part in parts if part.name.startswith(begin)])
    found["attribution, heads"], found["attribution, MLPs"] = of("head"), of("mlp")
    found["attribution, embedding"] = of("embedding")
    found["gradient patching"] = patching.attribution_patch(model, contrast, sites, contrast.ends(model))
    return found


@torch.no_grad()
def theirs_of(both: Both) -> dict[str, Tensor]:
    """What TransformerLens finds, under the names of `ours_of`."""
    model, contrast = both.theirs, both.contrast
    n_layers, n_heads = both.ours.args.n_layers, both.ours.args.n_heads
    logits, clean = model.run_with_cache(both.clean)
    streams = torch.stack([clean[f"blocks.{i}.hook_resid_post"][0] for i in range(n_layers)])
    log_p = model.unembed(model.ln_final(streams)).log_softmax(-1)  # (n_layers, seq, vocab_size)
    found = {"logits": logits[0], "lens, probabilities": log_p.exp()}
    final = logits[0].log_softmax(-1)
    found["lens, entropy and KL"] = torch.stack(
        [torch.stack([-(p.exp() * p).sum(-1), (final.exp() * (final - p)).sum(-1)]) for p in log_p]
    )
    found["attention patterns"] = torch.stack([clean[f"blocks.{i}.attn.hook_pattern"][0] for i in range(n_layers)])
    parts, labels = clean.get_full_resid_decomposition(layer=-1, pos_slice=-1, return_labels=True, expand_neurons=False)
    scaled = clean.apply_ln_to_stack(parts, layer=-1, pos_slice=-1) * model.ln_final.w
    amounts = scaled[:, 0] @ (model.W_U[:, contrast.answer] - model.W_U[:, contrast.other])
    heads = n_layers * n_heads
    assert labels[0] == "L0H0" and labels[heads] == "0_mlp_out" and labels[heads + n_layers] == "embed", labels
    found["attribution, heads"], found["attribution, MLPs"] = amounts[:heads], amounts[heads : heads + n_layers]
    found["attribution, embedding"] = amounts[heads + n_layers :][:1]
    ends = [float(contrast.difference(each)) for each in (logits, model(both.corrupted))]
    found["gradient patching"] = their_gradients(both, clean, ends)
    return found


def their_gradients(both: Both, clean: Any, ends: list[float]) -> Tensor:
    """(n_layers, seq): gradient times difference at resid_pre."""
    kept: dict[str, Tensor] = {}
    names = [f"blocks.{i}.hook_resid_pre" for i in range(both.ours.args.n_layers)]

    def keep(x: Tensor, hook: Any) -> Tensor:
        kept[hook.name] = x if x.requires_grad else x.requires_grad_()
        return kept[hook.name]

    with torch.enable_grad():
        logits = both.theirs.run_with_hooks(both.corrupted, fwd_hooks=[(name, keep) for name in names])
        gradients = torch.autograd.grad(both.contrast.difference(logits).sum(), [kept[name] for name in names])
    changes = [
        (gradient * (clean[name] - kept[name].detach())).sum(-1)[0]
        for name, gradient in zip(names, gradients, strict=True)
    ]
    return torch.stack(changes) / (ends[0] - ends[1])


# ---- both compared


def show(both: Both, name: str, rounds: int, tolerance: float) -> None:
    """Raises Stop where the two differ by more than the tolerance."""
    print(f"\n| {name}, float32 | values | largest | difference | of 1 + value |\n|---|---|---|---|---|", flush=True)
    theirs = theirs_of(both)
    worst = max(show_difference(what, ours, theirs[what]) for what, ours in ours_of(both).items())
    rows = []
    for what, (by_us, by_them) in sweeps(both).items():
        seconds: list[tuple[float, ...]] = []
        for _ in range(rounds):
            (ours, *our_seconds), (found, *their_seconds) = timed(by_us), timed(by_them)
            seconds.append((*our_seconds, *their_seconds))
        worst = max(worst, show_difference(what, ours, found))
        wall, cpu, their_wall, their_cpu = (median(column) for column in zip(*seconds, strict=True))
        times = f"{wall:.2f} | {their_wall:.2f} | {their_wall / wall:.1f} | {cpu:.2f} | {their_cpu:.2f}"
        rows.append(f"| {what} | {len(found.flatten())} | {times} | {their_cpu / cpu:.1f} |")
    columns = "ours, s | TransformerLens, s | ratio | ours, CPU s | TransformerLens, CPU s | ratio"
    print(f"\n| {both.clean.shape[1]} tokens; {machine()} | values | {columns} |\n|---|---|---|---|---|---|---|---|")
    print(*rows, sep="\n", flush=True)
    if not worst <= tolerance:
        raise Stop(f"{name}: the largest difference is {worst:.1e} of 1 + the value, above {tolerance:g}.")


def show_difference(what: str, ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in shares of 1 + the value's size."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    difference = (ours - theirs).abs()
    relative = float((difference / (1 + theirs.abs())).max())
    sizes = f"{theirs.numel():,} | {theirs.abs().max():.3g} | {difference.max():.1e} | {relative:.1e}"
    print(f"| {what} | {sizes} |", flush=True)
    return relative


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """What it returns, seconds, CPU seconds."""
    started, cpu = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - started, time.process_time() - cpu


def main() -> None:
    config = parse_constants(globals())
    if not 0 <= config.changed < config.prompt_tokens:
        raise Stop(f"--changed {config.changed} lies outside the {config.prompt_tokens} tokens; name a smaller one.")
    for name in config.model_dirs:
        path = str(PROJECT_DIR / name)
        model, tokenizer = load_model(path), load_tokenizer(path)
        bos_id = tokenizer.bos_id if tokenizer.starts_with_bos else None
        contrast = prompts(model, bos_id, config.prompt_tokens, config.changed, config.seed)
        show(Both(model, hooked(model), contrast), name, config.rounds, config.tolerance)


if __name__ == "__main__":
    run(main)

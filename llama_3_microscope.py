"""Look into a Llama at work on one prompt: lens, attention, ablation, patching, attribution, tensors.

Reads   LLAMA_MODEL_DIR; for attribution to latents also SAE_MODEL_PATH
Writes  tables to the terminal; a PNG to PICTURE_PATH, attention as a page to HTML_PATH, tensors to SAVE_PATH, where
        these are given
Method  each instrument's formula stands at the top of its module in microscope/. Heads are written LAYER.HEAD, both
        counted from 0; positions too. Answers are single tokens, given with the space before them
Cost    a forward pass or a few; ablate --all_heads takes one row of a batch per head, patch one per position and site

    python llama_3_microscope.py lens --prompt "The file is"
    python llama_3_microscope.py attention --picture_path scores.png
    python llama_3_microscope.py attention --prompt "The file is" --html_path attention.html
    python llama_3_microscope.py attention --prompt "The file is" --head 3.1
    python llama_3_microscope.py ablate --prompt "The file is" --all_heads --picture_path heads.png
    python llama_3_microscope.py ablate --prompt "The file is" --heads 3.1 4.0 --value mean
    python llama_3_microscope.py ablate --heads 3.1
    python llama_3_microscope.py patch --prompt "The file is" --corrupted "The line is"
    python llama_3_microscope.py attribution --prompt "The file is" --answers " not"
    python llama_3_microscope.py tensors --prompt "The file is" --sites layers.3.head_out --save_path heads.safetensors
"""

from typing import Literal

from pipeline.options import Count, CountOrZero, Seed, parse_constants
from pipeline.run import run

LLAMA_MODEL_DIR: str | None = None  # Llama folder; the embedded tiny Llama when not given
DEVICE = "auto"  # auto: a GPU if there is one
DTYPE: Literal["auto", "bfloat16", "float16", "float32"] = "float32"  # of the computation
PROMPT: str | None = None  # the text; attention and ablate do without: they read random tokens twice
ANSWERS: list[str] = []  # patch, attribution: the answer, and one to compare with; the likeliest tokens when not given
PICTURE_PATH: str | None = None  # PNG to write
HTML_PATH: str | None = None  # attention of a prompt: a page with every head of every layer, to click through
JSON = False  # print JSON instead of tables
TOP: Count = 3  # lens, ablate: tokens shown; attention, attribution: 5 times as many heads or parts
KIND: Literal["resid_post", "resid_pre", "resid_mid", "attention_out", "mlp_out"] = "resid_post"  # lens, patch: where
POSITION: CountOrZero | None = None  # lens, attention: the position in the table; the last when not given
HEAD: str | None = None  # attention: the head whose pattern is listed; the picture shows all heads of its layer
REPEATED_TOKENS: Count = 50  # attention, ablate without a prompt: length of the random sequence that is read twice
SEED: Seed = 0  # of that sequence
HEADS: list[str] = []  # ablate: heads to switch off
KEEP_HEADS: list[str] = []  # ablate: the only heads to keep in their layers
ATTENTION_LAYERS: list[int] = []  # ablate: layers whose whole attention is switched off
MLP_LAYERS: list[int] = []  # ablate: layers whose feed-forward layer is switched off
VALUE: Literal["zero", "mean"] = "zero"  # ablate: what heads give instead; mean: over the prompt's positions
ALL_HEADS = False  # ablate: every head alone
NEW_TOKENS: CountOrZero = 16  # ablate: tokens written, always the likeliest
CORRUPTED: str | None = None  # patch: a prompt of as many tokens with another answer
FROM_PATH: str | None = None  # patch: saved tensors to put into the prompt instead
AVERAGE = False  # patch: put in their average over positions
POSITIONS: list[int] | None = None  # patch with a file: only at these positions
SITES: list[str] = []  # tensors: which; all of the first and last layer when not given
SAVE_PATH: str | None = None  # tensors: safetensors file to write
SAE_MODEL_PATH: str | None = None  # attribution: an SAE of the residual stream

_COMMANDS = {
    "lens": "what each layer would say next",
    "attention": "where heads look; without a prompt, which heads copy",
    "ablate": "heads and layers switched off",
    "patch": "activations of one prompt in another",
    "attribution": "what each part adds to the answer",
    "tensors": "every site's tensor, shown and saved",
}

if __name__ == "__main__":
    run(lambda: parse_constants(globals(), commands=_COMMANDS))  # before the slow imports: --help answers at once

import contextlib
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import check_context
from llama_3.model import Intervention, Transformer
from llama_3.tokenizer import Tokenizer
from microscope import ablation, attention, attribution, lens, patching, shown, tensors
from microscope.attention_page import write_attention_html
from microscope.prompts import Prompt, answer_ids, continuation, read_prompt, token_text
from pipeline.errors import InputError
from pipeline.files import require_writable
from serving.steered_model import latent_meanings, pick_device, pick_dtype, sae_of


@dataclass(frozen=True)
class Session:
    """What every instrument needs."""

    model: Transformer
    model_dir: str
    tokenizer: Tokenizer
    top: int
    picture_path: str | None
    as_json: bool

    def prompt(self, text: str | None, option: str = "--prompt") -> Prompt:
        if not text:
            raise InputError(f"This needs a prompt; give one with {option}.")
        return read_prompt(self.model, self.tokenizer, text)

    def text(self, token_id: int) -> str:
        return token_text(self.tokenizer, int(token_id))

    def likeliest(self, log_p: Tensor) -> str:
        """The top tokens of (vocab_size,) with their probabilities."""
        best = log_p.topk(self.top)
        return "  ".join(f"{self.text(i)} {p:.3f}" for p, i in zip(best.values.exp(), best.indices, strict=True))

    def show(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A titled table, or a line of JSON with a record per row."""
        if self.as_json:
            records = [dict(zip(heads, row, strict=True)) for row in rows]
            print(json.dumps({"title": title, "rows": records}, ensure_ascii=False, default=list))
        else:
            wrapped = "\n".join(textwrap.fill(line, shown.WIDTH) for line in title.splitlines())
            print(f"{wrapped}\n{shown.table(heads, rows)}\n")


# ---- instruments


def show_lens(session: Session, prompt: Prompt, kind: str, position: int) -> None:
    layers = lens.logit_lens(session.model, prompt, kind, session.top)
    rows = []
    for i, layer in enumerate(layers):
        best = zip(layer.token_ids[position], layer.probabilities[position], strict=True)
        said = "  ".join(f"{session.text(token)} {p:.2f}" for token, p in best)
        rows.append([f"{i}", float(layer.entropy[position]), float(layer.kl[position]), said])
    after = " ".join(prompt.tokens[max(0, position - 3) : position + 1])
    title = f"What {kind} of each layer would say after {after!r}; entropy and KL to the end in nats"
    session.show(title, ["layer", "entropy", "KL", "next token"], rows)
    if session.picture_path:
        texts = [[session.text(ids[0]) for ids in layer.token_ids] for layer in layers]
        values = torch.stack([layer.probabilities[:, 0] for layer in layers])
        title = f"Likeliest next token by {kind}, and its probability"
        shown.heat_map(session.picture_path, values, "layer", prompt.tokens, title, texts, centred=False)


def repeated_prompt(session: Session, n_tokens: int, seed: int) -> Prompt:
    """A random sequence of tokens, read twice."""
    tokenizer = session.tokenizer
    special = set(tokenizer.special_tokens.values())
    vocab = [i for i in range(tokenizer.vocab_size) if i not in special]
    bos_id = tokenizer.bos_id if tokenizer.starts_with_bos else None
    ids = attention.repeated_tokens(vocab, n_tokens, seed, bos_id)
    check_context(session.model, len(ids), 1)
    return Prompt(ids, [session.text(i) for i in ids])


def show_scores(session: Session, prompt: Prompt, n_tokens: int) -> None:
    scores = attention.head_scores(session.model, prompt.ids, n_tokens)._asdict()
    n_heads = session.model.args.n_heads
    columns = []
    for values in scores.values():
        best = values.flatten().topk(min(5 * session.top, values.numel()))
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        columns.append([(ablation.head_name(i, n_heads), value) for value, i in found])
    rows = [[cell for pair in row for cell in pair] for row in zip(*columns, strict=True)]
    heads = [name for kind in scores for name in (kind, f"{kind} score")]
    session.show(f"Heads by mean weight on {n_tokens} random tokens read twice", heads, rows)
    if session.picture_path:
        shown.score_maps(session.picture_path, scores)


def show_heads(session: Session, prompt: Prompt, position: int, html_path: str | None) -> None:
    """The heads that look from one position at one other most, begin-of-text or the first token left out."""
    args = session.model.args
    patterns = attention.patterns(session.model, prompt, list(range(args.n_layers)))
    weights = patterns[:, :, position, 1 : position + 1].flatten(0, 1)  # (all heads, keys)
    rows = []
    if position > 0:
        best = weights.max(1)
        for i in best.values.argsort(descending=True)[: 5 * session.top].tolist():
            key = int(best.indices[i]) + 1
            rows.append([ablation.head_name(i, args.n_heads), float(best.values[i]), f"{key}", prompt.tokens[key]])
    title = f"Heads that look from {prompt.tokens[position]!r} ({position}) most at one token, the first left out"
    session.show(title, ["head", "weight", "position", "looks at"], rows)
    if session.picture_path:
        shown.all_patterns(session.picture_path, patterns)
    if html_path:
        write_attention_html(html_path, patterns, prompt.tokens)
        print(f"Written to {html_path}.", file=sys.stderr)


def show_pattern(session: Session, prompt: Prompt, layer: int, head: int) -> None:
    pattern = attention.patterns(session.model, prompt, [layer])[0]  # (n_heads, query, key)
    rows = []
    for i, weights in enumerate(pattern[head]):
        best = weights.topk(min(session.top, i + 1))
        looks = "  ".join(f"{prompt.tokens[k]} ({k}) {w:.2f}" for w, k in zip(best.values, best.indices, strict=True))
        rows.append([f"{i}", prompt.tokens[i], looks])
    session.show(f"Where each token looks, head {layer}.{head}", ["", "token", "looks at"], rows)
    if session.picture_path:
        shown.pattern_grid(session.picture_path, pattern, prompt.tokens, layer)


def show_ablation(session: Session, prompt: Prompt, without: ablation.Ablation, new_tokens: int) -> None:
    clean, changed = (ablation.effect(session.model, prompt, each) for each in (ablation.Ablation(), without))
    kl = float((clean.log_p.exp() * (clean.log_p - changed.log_p)).sum())
    rows = [["whole", clean.loss, 0.0, session.likeliest(clean.log_p)]]
    rows.append(["ablated", changed.loss, kl, session.likeliest(changed.log_p)])
    session.show("Loss of the prompt and KL in nats", ["model", "loss", "KL", "next token"], rows)
    if new_tokens:
        write = lambda: continuation(session.model, session.tokenizer, prompt.ids, new_tokens)
        written = [write()]
        with ablation.ablated(session.model, without):
            written.append(write())
        session.show("Written", ["model", "text"], [["whole", written[0]], ["ablated", written[1]]])


def show_copying(session: Session, prompt: Prompt, without: ablation.Ablation, n_tokens: int) -> None:
    """What is switched off, by the loss of random tokens read for the first and for the second time."""
    rows = []
    for name, each in (("whole", ablation.Ablation()), ("ablated", without)):
        losses = ablation.effect(session.model, prompt, each).losses
        rows.append([name, float(losses[:-n_tokens].mean()), float(losses[-n_tokens:].mean())])
    title = f"Loss of {n_tokens} random tokens in nats per token, when they are read"
    session.show(title, ["model", "first", "again"], rows)


def show_every_head(session: Session, prompt: Prompt, value: ablation.Value) -> None:
    args = session.model.args
    clean = ablation.effect(session.model, prompt)
    answer = int(clean.log_p.argmax())
    effects = [each for layer in ablation.every_head(session.model, prompt, value) for each in layer]
    drops = torch.tensor([float(clean.log_p[answer] - each.log_p[answer]) for each in effects])
    rows = []
    for i in drops.abs().argsort(descending=True)[: 5 * session.top].tolist():
        loss, likeliest = effects[i].loss - clean.loss, session.likeliest(effects[i].log_p)
        rows.append([ablation.head_name(i, args.n_heads), float(drops[i]), loss, likeliest])
    said = f"{session.text(answer)} (probability {float(clean.log_p[answer].exp()):.3f})"
    title = f"Each head alone set to {value}: what {said} loses in log probability, and the loss gained"
    session.show(title, ["head", "answer loses", "loss gains", "next token"], rows)
    if session.picture_path:
        draw_heads(session, drops, f"Log probability that {said} loses without each head")


def show_every_copying(session: Session, prompt: Prompt, value: ablation.Value, n_tokens: int) -> None:
    """What every head alone does for tokens that were read before."""
    args = session.model.args
    clean = ablation.effect(session.model, prompt).losses
    effects = [each.losses for layer in ablation.every_head(session.model, prompt, value) for each in layer]
    gains = torch.stack(effects) - clean  # (all heads, seq - 1)
    first, again = gains[:, :-n_tokens].mean(1), gains[:, -n_tokens:].mean(1)
    order = again.argsort(descending=True)[: 5 * session.top].tolist()
    rows = [[ablation.head_name(i, args.n_heads), float(again[i]), float(first[i])] for i in order]
    whole = float(clean[-n_tokens:].mean())
    title = f"Each head alone set to {value}: loss gained on {n_tokens} random tokens, nats per token"
    session.show(f"{title}; read again, they have {whole:.3f} with all heads", ["head", "again", "first"], rows)
    if session.picture_path:
        draw_heads(session, again, "Loss gained on tokens read before without each head")


def draw_heads(session: Session, values: Tensor, title: str) -> None:
    """values: (all heads,)"""
    n_heads = session.model.args.n_heads
    shown.heat_map(session.picture_path, values.view(-1, n_heads), "layer", [str(i) for i in range(n_heads)], title)


def show_patching(session: Session, contrast: patching.Contrast, kind: str) -> None:
    model, clean = session.model, contrast.clean
    ends = contrast.ends(model)
    answers = f"{session.text(contrast.answer)} minus {session.text(contrast.other)}"
    title = f"Logit of {answers}: clean {ends[0]:.3f}, corrupted {ends[1]:.3f}"
    sites = [f"layers.{i}.{kind}" for i in range(model.args.n_layers)]
    exact = patching.patch_map(model, contrast, sites, ends)
    fast = patching.attribution_patch(model, contrast, sites, ends)
    heads = patching.patch_heads(model, contrast, ends)
    rows = []
    for i in exact.abs().flatten().argsort(descending=True)[: 5 * session.top].tolist():
        layer, position = divmod(i, len(clean.ids))
        token = f"{position} {contrast.corrupted.tokens[position]} <- {clean.tokens[position]}"
        rows.append([f"{layer}", token, float(exact[layer, position]), float(fast[layer, position])])
    session.show(
        f"{title}.\nShare that {kind} of the clean prompt restores", ["layer", "token", "exact", "gradient"], rows
    )
    best = heads.flatten().abs().argsort(descending=True)[: 5 * session.top].tolist()
    n_heads = model.args.n_heads
    named = [[ablation.head_name(i, n_heads), float(heads.flatten()[i])] for i in best]
    session.show("Share that one head's output restores, all positions", ["head", "exact"], named)
    error = (exact - fast).abs()
    agreement = float(torch.corrcoef(torch.stack([exact.flatten(), fast.flatten()]))[0, 1])
    rows = [[float(error.mean()), float(error.max()), agreement]]
    session.show("Gradient against exact", ["mean error", "largest error", "correlation"], rows)
    if session.picture_path:
        shown.heat_map(session.picture_path, exact, "layer", clean.tokens, f"Share restored by {kind}: {answers}")


def show_patched(session: Session, prompt: Prompt, patches: list[Intervention]) -> None:
    """The prompt with saved tensors put in."""
    clean = ablation.effect(session.model, prompt)
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(session.model.intervene(*patch))
        changed = ablation.effect(session.model, prompt)
    rows = [["own", clean.loss, session.likeliest(clean.log_p)]]
    rows.append(["patched", changed.loss, session.likeliest(changed.log_p)])
    session.show("Loss of the prompt in nats", ["tensors", "loss", "next token"], rows)


def show_attribution(session: Session, prompt: Prompt, answers: list[int], sae_path: str | None) -> None:
    model = session.model
    sae = sae_of(sae_path, model, session.model_dir, str(model.device)) if sae_path else None
    answer = answers[0] if answers else int(ablation.effect(model, prompt).log_p.argmax())
    other = answers[1] if len(answers) > 1 else None
    parts, difference = attribution.attribution(model, prompt, answer, other, sae)
    against = session.text(other) if other is not None else "the mean token"
    total = sum(part.amount for part in parts)
    best = sorted(parts, key=lambda part: -abs(part.amount))
    latents = [part for part in best if part.name.startswith("latent ")][: 5 * session.top]
    others = [part for part in best if not part.name.startswith("latent ")][: 5 * session.top]
    title = f"Logit of {session.text(answer)} minus {against}: {difference:.4f}, sum of {len(parts)} parts {total:.4f}"
    session.show(title, ["part", "adds"], others)
    added = f"Added to {session.text(answer)} minus {against}"
    if sae_path:
        meanings = latent_meanings(sae_path)
        names = [meanings.get(int(part.name.split()[1]), "") for part in latents]
        rows = [[part.name, part.amount, name] for part, name in zip(latents, names, strict=True)]
        of_all = sum(part.amount for part in parts if part.name.startswith("latent "))
        session.show(f"{added} by latents; all of them add {of_all:.4f}", ["latent", "adds", "meaning"], rows)
    if not session.picture_path:
        return
    if sae_path:
        amounts = {f"{part.name} {name}": part.amount for part, name in zip(latents, names, strict=True)}
        shown.bars(session.picture_path, amounts, added)
        return
    args, amounts = model.args, {part.name: part.amount for part in parts}
    names = [[*(f"head {i}.{h}" for h in range(args.n_heads)), f"mlp {i}"] for i in range(args.n_layers)]
    values = torch.tensor([[amounts[name] for name in row] for row in names])
    shown.heat_map(session.picture_path, values, "layer", [*map(str, range(args.n_heads)), "MLP"], added)


def show_tensors(session: Session, prompt: Prompt, sites: Sequence[str], save_path: str | None) -> None:
    last = session.model.args.n_layers - 1
    sites = sites or tensors.all_sites(session.model.args, sorted({0, last}))
    found = tensors.tensors(session.model, prompt, sites)
    rows = []
    for site, x in found.items():
        row = tensors.row_of(site, x)
        shape = "x".join(map(str, row.shape))
        rows.append([row.site, shape, row.dtype, row.mean, row.std, row.norm, row.nan])
    session.show(f"Tensors of {len(prompt.ids)} tokens", ["site", "shape", "dtype", "mean", "std", "norm", "NaN"], rows)
    if save_path:
        tensors.save_tensors(save_path, found, session.model_dir)
        print(f"Saved to {save_path}.")


# ---- options


def run_command(session: Session, config: Any) -> None:
    if config.html_path and (config.command != "attention" or not config.prompt or config.head):
        raise InputError("--html_path shows all heads on a prompt; give attention a --prompt, and no --head.")
    repeats = config.command in ("attention", "ablate") and not config.prompt
    drawn = lambda: repeated_prompt(session, config.repeated_tokens, config.seed)
    prompt = drawn() if repeats else session.prompt(config.prompt)
    if config.command == "lens":
        return show_lens(session, prompt, config.kind, prompt.position(config.position))
    if config.command == "attention":
        if config.head is not None:
            ((layer, (head,)),) = ablation.parse_heads([config.head], session.model).items()
            return show_pattern(session, prompt, layer, head)
        if repeats:
            return show_scores(session, prompt, config.repeated_tokens)
        return show_heads(session, prompt, prompt.position(config.position), config.html_path)
    if config.command == "ablate":
        return run_ablation(session, prompt, config.repeated_tokens if repeats else None, config)
    if config.command == "patch" and config.from_path:
        found = tensors.load_tensors(config.from_path, session.model_dir)
        for position in config.positions or ():
            prompt.position(position)
        patches = tensors.patches_from(found, len(prompt.ids), config.positions, config.average)
        return show_patched(session, prompt, patches)
    if config.command == "patch":
        corrupted = session.prompt(config.corrupted, "--corrupted")
        contrast = patching.contrast_of(session.model, session.tokenizer, prompt, corrupted, config.answers)
        return show_patching(session, contrast, config.kind)
    if config.command == "attribution":
        return show_attribution(session, prompt, answer_ids(session.tokenizer, config.answers), config.sae_model_path)
    return show_tensors(session, prompt, config.sites, config.save_path)


def run_ablation(session: Session, prompt: Prompt, n_repeated: int | None, config: Any) -> None:
    """n_repeated: so many random tokens, twice, are the prompt; None where it is a text."""
    if config.all_heads and n_repeated:
        return show_every_copying(session, prompt, config.value, n_repeated)
    if config.all_heads:
        return show_every_head(session, prompt, config.value)
    heads = ablation.parse_heads(config.heads, session.model)
    kept = ablation.parse_heads(config.keep_heads, session.model)
    if both := sorted(heads.keys() & kept.keys()):
        raise InputError(f"Layer {both[0]} is in both --heads and --keep_heads; name it in one.")
    heads |= ablation.all_but(kept, session.model.args.n_heads)
    ablation.check_layers([*config.attention_layers, *config.mlp_layers], session.model)
    if not (heads or config.attention_layers or config.mlp_layers):
        raise InputError("Nothing is switched off; name --heads, --keep_heads, layers, or --all_heads.")
    without = ablation.Ablation(heads, config.attention_layers, config.mlp_layers, config.value)
    if n_repeated:
        return show_copying(session, prompt, without, n_repeated)
    return show_ablation(session, prompt, without, config.new_tokens)


def main() -> None:
    config = parse_constants(globals(), commands=_COMMANDS)
    require_writable(*filter(None, (config.picture_path, config.html_path, config.save_path)))
    device = pick_device(config.device)
    model_dir = config.llama_model_dir or TINY_LLAMA_DIR
    # Unpacked: the packed layers have no gradient.
    model = load_model(model_dir, device, pick_dtype(config.dtype, device))
    session = Session(model, model_dir, load_tokenizer(model_dir), config.top, config.picture_path, config.json)
    run_command(session, config)


if __name__ == "__main__":
    run(main)

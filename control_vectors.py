"""Make a control vector from pairs of prompts, see how good it is in every layer, and write it for llama.cpp.

Reads   POSITIVE_PATH, NEGATIVE_PATH: one prompt per line, the first lines a pair, and so on; \\n in a line is a line
        break. Or, without files, TEMPLATE with each of POSITIVE_WORDS and NEGATIVE_WORDS. LLAMA_MODEL_DIR;
        SAE_MODEL_PATH to see which latents the vector consists of
Writes  OUTPUT_PATH, a GGUF file that llama.cpp reads with --control-vector; tables to the terminal
Method  microscope/control.py. Strength 1 adds as much as the stream is long; useful strengths lie well below
Cost    a forward pass per prompt

    python control_vectors.py --positive_path glad.txt --negative_path sad.txt --output_path glad.gguf
    python control_vectors.py --positive_path glad.txt --negative_path sad.txt --layers 3 4 --try_prompt "The file is"
    python control_vectors.py --positive_path sea.txt --negative_path land.txt --method sets
    python control_vectors.py --template "I feel {}." --positive_words happy glad --negative_words sad unhappy
"""

from typing import Literal

from pipeline.options import Count, CountOrZero, parse_constants
from pipeline.run import run

POSITIVE_PATH: str | None = None  # prompts that show what is wanted
NEGATIVE_PATH: str | None = None  # prompts that show the opposite, as many unless the method is sets
TEMPLATE: str | None = None  # instead of files: a prompt in which {} stands for a word
POSITIVE_WORDS: list[str] = []  # of the template
NEGATIVE_WORDS: list[str] = []  # as many
LLAMA_MODEL_DIR: str | None = None  # Llama folder; the embedded tiny Llama when not given
DEVICE = "auto"  # auto: a GPU if there is one
METHOD: Literal["mean", "pca", "sets"] = "mean"  # of the pairs' differences: mean, pca; of unpaired texts: sets
LAYERS: list[int] | None = None  # layers to steer in; all but the first when not given
OUTPUT_PATH: str | None = None  # GGUF file to write
SAE_MODEL_PATH: str | None = None  # an SAE of the residual stream
LATENTS: Count = 10  # of these, how many to list and to compose the vector of
TRY_PROMPT: str | None = None  # continued with and without the vector
STRENGTH = 0.2  # of that trial, as a share of the activations' length
NEW_TOKENS: CountOrZero = 24  # of that trial

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

from pathlib import Path
from typing import Any

from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR
from llama_3.generation import encode_text
from microscope import control, shown
from microscope.ablation import check_layers
from microscope.prompts import continuation
from pipeline.errors import InputError
from pipeline.files import require_writable
from sae import SparseAutoencoder
from serving.steered_model import latent_meanings, pick_device, sae_of


def read_prompts(config: Any) -> tuple[list[str], list[str]]:
    """The positive and the negative prompts. Raises InputError unless the options name both, once, and as many."""
    paths, words = (config.positive_path, config.negative_path), (config.positive_words, config.negative_words)
    if config.template is None:
        if any(words):
            raise InputError("--positive_words and --negative_words need a --template with {} for the word.")
        if None in paths:
            raise InputError("Prompts are missing; name --positive_path and --negative_path, or a --template.")
        positive, negative = map(read_lines, paths)
        names = paths
    else:
        if any(paths):
            raise InputError("--template takes the place of files; leave --positive_path and --negative_path out.")
        if "{}" not in config.template:
            raise InputError(f"The template {config.template!r} has no {{}}; write it where the word goes.")
        positive, negative = ([config.template.replace("{}", word) for word in each] for each in words)
        names = ("--positive_words", "--negative_words")
    if config.method != "sets" and len(positive) != len(negative):
        raise InputError(
            f"{names[0]} has {len(positive)} prompts, {names[1]} {len(negative)}; they must form pairs, or be two sets "
            "of texts (--method sets)."
        )
    return positive, negative


def read_lines(path: str) -> list[str]:
    """The prompts of a file. Raises InputError if it cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); name a text file with a prompt per line.") from None
    return [line.replace("\\n", "\n") for line in lines if line.strip()]


def layer_of(sae: SparseAutoencoder) -> int:
    """The layer whose resid_post the SAE reconstructs. Raises InputError for an SAE outside the residual stream."""
    _, layer, kind = sae.output_site.split(".")
    if kind not in ("resid_pre", "resid_post") or (kind, layer) == ("resid_pre", "0"):
        raise InputError(f"The SAE is at {sae.output_site}; name one at resid_post of a layer.")
    return int(layer) - (kind == "resid_pre")


def show_latents(vector: control.ControlVector, sae: SparseAutoencoder, sae_path: str, n: int) -> None:
    layer, meanings = layer_of(sae), latent_meanings(sae_path, sae.n_latents)
    near = control.nearest_latents(vector.vectors[layer], sae, n)
    composed, share = control.pursuit(vector.vectors[layer], sae, n)
    print(f"Latents nearest to the vector of layer {layer}")
    print(shown.table(["latent", "cosine", "meaning"], [[f"{i}", c, meanings.get(i, "")] for i, c in near]))
    print(f"\nThe vector as a sum of {n} latents, which explain {share:.0%} of its squared length")
    print(shown.table(["latent", "amount", "meaning"], [[f"{i}", c, meanings.get(i, "")] for i, c in composed]))
    print()


def main() -> None:
    config = parse_constants(globals())
    require_writable(*filter(None, [config.output_path]))
    positive, negative = read_prompts(config)
    model_dir, device = config.llama_model_dir or TINY_LLAMA_DIR, pick_device(config.device)
    model, tokenizer = load_model(model_dir, device), load_tokenizer(model_dir)
    layers = list(range(1, model.args.n_layers)) if config.layers is None else config.layers
    check_layers(layers, model)
    if 0 in layers:
        raise InputError("Layer 0 cannot be steered by llama.cpp; name --layers from 1 on.")
    sae = sae_of(config.sae_model_path, model, model_dir, "cpu") if config.sae_model_path else None
    read = control.mean_activations if config.method == "sets" else control.last_activations
    acts = [read(model, tokenizer, texts) for texts in (positive, negative)]
    vector = control.control_vector(*acts, config.method)

    counted = f"{len(positive)} and {len(negative)} texts" if config.method == "sets" else f"{len(positive)} pairs"
    print(f"{counted}, method {config.method}. Length: of the layer's activations; separation: share of")
    print("held-out pairs in which the positive prompt lies further along the vector")
    rows = [[f"{i}", float(vector.vectors[i].norm()), float(vector.separation[i])] for i in layers]
    print(shown.table(["layer", "length", "separation"], rows) + "\n")
    if sae is not None:
        show_latents(vector, sae, config.sae_model_path, config.latents)
    chosen = {layer: vector.vectors[layer] for layer in layers}
    if config.try_prompt:
        write = lambda: continuation(model, tokenizer, encode_text(tokenizer, config.try_prompt), config.new_tokens)
        print(f"plain    {config.try_prompt}{write()}")
        with control.steered(model, chosen, config.strength):
            print(f"steered  {config.try_prompt}{write()}")
    if config.output_path:
        control.write_gguf(config.output_path, chosen)
        print(f"Written to {config.output_path}.")


if __name__ == "__main__":
    run(main)

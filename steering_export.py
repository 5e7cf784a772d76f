"""Take steering out of the house: latents at given strengths as files that llama.cpp, transformers, vLLM and
lm-evaluation-harness open as they are.

Reads   SAE_MODEL_PATH and what lies beside it, its Llama folder, TEXT_PATH
Writes  CONTROL_VECTOR_PATH, for llama.cpp's --control-vector; CHECKPOINT_DIR, the model itself with the steering as
        biases, a Hugging Face folder, and beside the weights of a GGUF file a GGUF file; LM_EVAL_PATH, for
        lm_eval --model steered --model_args steer_path=...; any of them
Method  serving/constant_steering.py. Mode `add` moves each token by its own std, these files all tokens alike, by the
        mean std over TEXT_PATH, whose spread is printed, times what it takes for as many completions to hold the
        latents' own words. What was written is opened again and compared with this project's model with the constant
        added; if it differs, it is removed
Cost    a pass over the text, COMPLETIONS completions three to eight times; for CHECKPOINT_DIR the size of the model on
        disk, and with VERIFY twice that in memory

    python steering_export.py --sae_model_path llama_3/smollm2/sae.pth --latents 1234 --control_vector_path sea.gguf
    python steering_export.py --sae_model_path data/sae.pth --latents 1234 --strengths 0.4 --checkpoint_dir data/sea
"""

from pathlib import Path
from typing import Literal

from pipeline.options import Count, CountOrZero, Seed, parse_constants
from pipeline.run import run

SAE_MODEL_PATH: str  # the SAE
LATENTS: list[int]  # latents to steer with
STRENGTHS: list[float] = []  # one per latent or one for all, x its highest activation; the SAE's own when not given
LLAMA_MODEL_DIR: str | None = None  # Llama folder; the one the SAE was trained on when not given
CONTROL_VECTOR_PATH: str | None = None  # GGUF file to write for llama.cpp
CHECKPOINT_DIR: str | None = None  # Hugging Face folder to write: the model, steered
DTYPE: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of its weights; auto: as they are
LM_EVAL_PATH: str | None = None  # .pt file to write for lm-evaluation-harness' steer_path
TEXT_PATH = str(Path(__file__).parent / "llama_3" / "smollm2" / "dialogues.parquet")  # documents to measure the std on
TEXTS: Count = 200  # of these
MAX_TOKENS: Count = 256  # of each text
COMPLETIONS: CountOrZero = 64  # written each way and compared; 0: none, and the constant is that of the mean std
NEW_TOKENS: Count = 24  # tokens of each
SEED: Seed = 0  # of the completions
VERIFY = True  # open a checkpoint again with transformers, where that is installed

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import importlib.util
import itertools
import os
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from latents.words import words_of
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import find_checkpoint
from llama_3.generation import encode_text
from llama_3.model import Intervention, Transformer
from llama_3.saving import copy_gguf, save_hugging_face
from microscope import control
from pipeline.documents import first_texts
from pipeline.errors import InputError, Stop
from pipeline.files import atomic_path, require_disk, require_writable
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import load_sae_model
from serving.constant_steering import (
    Spread,
    biases_of,
    constant,
    control_vector_layer,
    lm_eval_hookpoint,
    stds,
)
from serving.dose_response import Concept, Opened, Task, is_plain_word, measure_each, neutral_prompts
from serving.modes import steering_defaults
from serving.steered_model import Sampling, latent_meanings
from serving.steering import Steering, check_latents, highest_activations, make_steering, strength_of_each

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of logits; biases are rounded too
_MULTIPLES = (1, 1.5, 2, 3, 4, 6)  # of the constant
_GGUF_NAME = "model.gguf"


def print_spread(spread: Spread, site: str, path: str) -> None:
    print(
        f"Std at {site} over {spread.tokens:,} tokens of {path}, the first of each text aside: {spread.mean:.4g} on "
        f"average, {spread.std:.2g} from token to token ({spread.std / spread.mean:.0%}); 90 % lie between "
        f"{spread.low:.4g} and {spread.high:.4g}. Of first tokens: {spread.first:.4g}."
    )


# ---- the same concept?


def matching_multiple(
    opened: Opened,
    steering: Steering,
    added: Tensor,
    words: list[str],
    prompts: Sequence[str],
    n: int,
    sampling: Sampling,
) -> float:
    """The multiple of the constant at which as many completions hold the words as with `add`, within two standard
    errors; prints the share at each that was tried."""
    ids = [encode_text(opened.tokenizer, prompt) for prompt in prompts]
    task = Task([Concept(min(steering.strengths), words)], list(itertools.islice(itertools.cycle(ids), n)), sampling)

    def measured(name: str, way: Intervention | None) -> float:
        row = measure_each(opened, task, [way])
        share = row["words_share"]
        print(f"  {name:20}{share:6.1%} +- {error(share):.1%}{row['nats']:10.2f}", flush=True)
        return share

    error = lambda share: (share * (1 - share) / n) ** 0.5
    print(f"Of {n} completions of {sampling.max_new_tokens} tokens, share with {', '.join(words)}; nats per token")
    measured("clean", None)
    bos_id = opened.tokenizer.bos_id
    wanted = measured("each token's own std", make_steering(opened.sae, steering, opened.highest, bos_id))
    shares = {}
    for multiple in _MULTIPLES:
        change = Intervention(opened.sae.output_site, lambda x, by=multiple: x + by * added.to(x))
        share = shares[multiple] = measured(f"the constant x {multiple:g}", change)
        if share + 2 * (error(share) ** 2 + error(wanted) ** 2) ** 0.5 >= wanted:
            return multiple
    best = max(shares, key=lambda multiple: shares[multiple])
    print(f"No multiple does as much as each token's own std; x {best:g} comes closest.")
    return best


# ---- files


def write_control_vector(path: str, site: str, added: Tensor, model: Transformer) -> str:
    layer = control_vector_layer(site)
    control.write_gguf(path, {layer: added})
    read = control.read_gguf_vectors(path, model)
    difference = float((read[layer] - added).abs().max())
    return f"{path}: direction.{layer}, {added.norm():.4g} long; read back, the largest difference is {difference:g}."


def write_checkpoint(
    folder: Path, model_dir: str, model: Transformer, site: str, added: Tensor, dtype: str, ids: list[int] | None
) -> list[str]:
    """Write the steered model, compare its logits on `ids` where given, and say what was done.

    Raises Stop, with nothing left behind, if the logits differ.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        biases = biases_of(model, site, added)
        written = save_hugging_face(model_dir, temporary, biases, None if dtype == "auto" else getattr(torch, dtype))
        says = []
        if ids is not None:
            difference = logits_difference(temporary, model, site, added, ids)
            if not difference <= _TOLERANCE[written]:
                raise Stop(
                    f"The logits of the written model differ by {difference:.2g} from those with the constant added, "
                    f"more than {_TOLERANCE[written]:g}; it was removed. Please report this."
                )
            says.append(f"transformers' logits, against ours with the constant added: they differ by {difference:.1e}.")
        source = find_checkpoint(model_dir)
        if source.format == "gguf":
            copy_gguf(source.config_path, temporary / _GGUF_NAME, biases)
            says.append(f"{folder / _GGUF_NAME}: the GGUF file, with the same biases.")
        else:
            says.append("For a GGUF file, run llama.cpp's convert_hf_to_gguf.py on it; it takes biases along.")
        temporary.rename(folder)
    except OSError as error:
        raise Stop(f"Could not write {folder} ({error}); fix that and run again.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [f"{folder}: {', '.join(f'{name}.bias' for name in biases)}, {written}".replace("torch.", "") + ".", *says]


def logits_difference(folder: Path, model: Transformer, site: str, added: Tensor, ids: list[int]) -> float:
    """The largest difference between transformers' logits of a folder and ours with a constant added."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        expected = theirs(tokens).logits
        with model.intervene(site, lambda x: x + added.to(x)):
            found = model(tokens.to(model.device)).cpu()
    return float((expected - found).abs().max())


def write_lm_eval(path: str, site: str, added: Tensor, dtype: torch.dtype) -> str:
    """A steer_path of lm-evaluation-harness (lm_eval/models/hf_steered.py): module -> what is added to its output."""
    hookpoint = lm_eval_hookpoint(site)
    entry = {"action": "add", "steering_coefficient": 1.0, "steering_vector": added.to(dtype), "bias": None}
    with atomic_path(path) as temporary:
        torch.save({hookpoint: entry}, temporary)
    return f"{path}: added to the output of {hookpoint}, in {str(dtype).removeprefix('torch.')} on the CPU."


def main() -> None:
    config = parse_constants(globals())
    outputs = [config.control_vector_path, config.checkpoint_dir, config.lm_eval_path]
    if not any(outputs):
        raise InputError("Nothing is to be written; give --control_vector_path, --checkpoint_dir or --lm_eval_path.")
    require_writable(*filter(None, [config.control_vector_path, config.lm_eval_path]))
    if config.lm_eval_path and not config.lm_eval_path.endswith((".pt", ".pth")):
        raise InputError(f"{config.lm_eval_path} must end in .pt, by which lm_eval knows its kind; rename it.")
    if config.checkpoint_dir and Path(config.checkpoint_dir).exists():
        raise InputError(f"{config.checkpoint_dir} is already there; remove it or name another --checkpoint_dir.")
    sae, files = load_sae_model(config.sae_model_path), SaeFiles(config.sae_model_path)
    source = Source.read(sae.info, files.json)
    source.need("site")
    site = sae.output_site
    if config.control_vector_path:
        control_vector_layer(site)  # refuses sites before the model is loaded
    highest = highest_activations(config.sae_model_path, sae.n_latents)
    defaults = steering_defaults(sae.info, files.json)
    strengths = strength_of_each(config.latents, config.strengths or [defaults.strength])
    check_latents(strengths, highest, "add")
    model_dir = source.model_dir(config.llama_model_dir)
    if config.checkpoint_dir:
        require_disk(Path(config.checkpoint_dir).absolute().parent, 2 * size_of(model_dir))
    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, rope_scaling_factor=source.rope_scaling_factor)
    encoded = (encode_text(tokenizer, text) for text in first_texts(config.text_path, config.texts))
    texts = [ids[: config.max_tokens] for ids in encoded]
    names = latent_meanings(config.sae_model_path, sae.n_latents)
    for latent, strength in strengths.items():
        print(f"Latent {latent} ({names.get(latent, 'no name')}): add, strength {strength:g}.")

    spread = stds(model, sae, texts, tokenizer.bos_id)
    print_spread(spread, site, config.text_path)
    added = constant(sae, strengths, highest, spread.mean)
    meanings = [names[latent] for latent in strengths if latent in names]
    words = sorted({word for name in meanings for word in words_of(name) if is_plain_word(word)})
    if config.completions and words:
        opened, sampling = Opened(model, tokenizer, sae, highest), Sampling(config.new_tokens, 0.8, 0.95, config.seed)
        steering, prompts = Steering(strengths, "add"), neutral_prompts(model_dir)
        added *= matching_multiple(opened, steering, added, words, prompts, config.completions, sampling)
    else:
        print("Completions are not compared: " + ("--completions 0." if words else "the latents' names have no words."))
    says = []
    if config.control_vector_path:
        says.append(write_control_vector(config.control_vector_path, site, added, model))
    if config.checkpoint_dir:
        can_verify = config.verify and importlib.util.find_spec("transformers") is not None
        ids = texts[0] if can_verify else None
        says += write_checkpoint(Path(config.checkpoint_dir), model_dir, model, site, added, config.dtype, ids)
        says += [] if can_verify else ["It was not opened again: transformers is not installed, or VERIFY is off."]
    if config.lm_eval_path:
        dtype = model.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        says.append(write_lm_eval(config.lm_eval_path, site, added, dtype))
    print("\n".join(["Written:", *says]))


def size_of(model_dir: str) -> int:
    return sum(os.path.getsize(path) for path in find_checkpoint(model_dir).weights)


if __name__ == "__main__":
    run(main)

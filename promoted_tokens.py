"""For every latent, the tokens that its direction makes the model say next, and those it keeps it from saying.

Reads   MODEL_PATH, an SAE with its JSON; NAME.latents.parquet (capture_top_activating_sentences.py); the Llama folder
Writes  NAME.promoted.parquet beside the SAE: latent, tokens, scores (their logits in standard deviations over the
        vocabulary), suppressed_tokens, suppressed_scores, each strongest first
Method  the direction, as strong as the latent gets, seen through the output layer ("logit lens"); `promoted_logits`
        says what that leaves out. Beside names, which say when a latent fires, this says what it does
Cost    2 x d_model x vocabulary x n_latents operations: seconds for the tiny Llama, minutes for Llama 3.2-3B

    python promoted_tokens.py --model_path data/sae.pth
"""

from pipeline.options import Count, parse_constants
from pipeline.run import run

MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one the SAE was trained on when not given
PROMOTED_TOKENS: Count = 10  # tokens kept per latent, and as many suppressed ones
LATENTS_AT_ONCE: Count = 256  # bounds memory at 4 bytes x vocabulary each

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latents.promotion import promoted_logits
from llama_3 import load_model, load_tokenizer
from pipeline.errors import InputError
from pipeline.files import atomic_path
from pipeline.progress import progress_bar
from pipeline.sae_files import SaeFiles
from sae import load_sae_model


def main() -> None:
    config = parse_constants(globals())

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = load_sae_model(config.model_path, device)
    if "site" not in sae.info:
        raise InputError(f"{config.model_path} has no JSON of sae_training.py that names its site.")
    latents_path, out_path = (
        SaeFiles(config.model_path).beside("latents.parquet"),
        SaeFiles(config.model_path).beside("promoted.parquet"),
    )
    if not latents_path.is_file():
        raise InputError(f"There is no {latents_path}; run capture_top_activating_sentences.py first.")
    highest = torch.tensor(pq.read_table(latents_path)["max"].to_pylist(), device=device)
    if len(highest) != sae.n_latents:
        raise InputError(f"{latents_path} has {len(highest)} latents, {config.model_path} {sae.n_latents}.")
    model_dir = config.llama_model_dir or sae.info["model_dir"]
    model = load_model(model_dir, device, rope_scaling_factor=sae.info.get("rope_scaling_factor"))
    tokenizer = load_tokenizer(model_dir)
    special = set(tokenizer.special_tokens.values())
    plain = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in special], device=device)
    print(f"Reading {config.model_path} and {model_dir}; writing {out_path}.")

    names = {1: ("tokens", "scores"), -1: ("suppressed_tokens", "suppressed_scores")}
    found: dict[str, list[list]] = {name: [] for pair in names.values() for name in pair}
    with torch.inference_mode(), progress_bar(total=sae.n_latents, unit="latent", desc="promoted tokens") as bar:
        for some in torch.arange(sae.n_latents, device=device).split(config.latents_at_once):
            directions = sae.decoder.weight.t()[some] * highest[some, None]
            logits = promoted_logits(model, sae.info["site"], directions, sae.b_pre)
            logits = logits[:, plain]
            z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp(min=1e-12)
            for sign, (tokens, scores) in names.items():
                best = (sign * z).topk(config.promoted_tokens)
                found[tokens] += [[tokenizer.decode([token]) for token in row] for row in plain[best.indices].tolist()]
                found[scores] += (sign * best.values).tolist()
            bar.update(len(some))
    columns = {"latent": pa.array(range(sae.n_latents), pa.int32())}
    for tokens, scores in names.values():
        columns[tokens] = pa.array(found[tokens], pa.list_(pa.string()))
        columns[scores] = pa.array(found[scores], pa.list_(pa.float32()))
    with atomic_path(out_path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    print(f"{sae.n_latents:,} latents: {out_path}")


if __name__ == "__main__":
    run(main)

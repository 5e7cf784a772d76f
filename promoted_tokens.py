"""For every latent, the tokens that its direction makes the model say next, and those it suppresses.

Reads   MODEL_PATH, an SAE with its JSON; NAME.latents.parquet (capture_top_activating_sentences.py); the Llama folder
Writes  NAME.promoted.parquet beside the SAE: latent, tokens, scores (their logits in standard deviations over the
        vocabulary), suppressed_tokens, suppressed_scores, each strongest first
Method  the direction, at the latent's highest activation, seen through the output layer ("logit lens");
        latents/promotion.py says what that leaves out. A name tells when a latent fires; this tells what it does
Cost    2 x d_model x vocabulary x n_latents operations: seconds for the tiny Llama, minutes for Llama 3.2-3B

    python promoted_tokens.py --model_path data/sae.pth
"""

from pipeline.options import Count, parse_constants
from pipeline.run import run

MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one the SAE was trained on when not given
PROMOTED_TOKENS: Count = 10  # tokens kept per latent, and as many suppressed ones
LATENTS_AT_ONCE: Count = 256  # latents handled at once, each taking 4 bytes x vocabulary of memory

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import pyarrow as pa
import torch

from latents.promotion import plain_tokens, standard_logits
from latents.tables import LATENTS, PROMOTED, highest_activations
from llama_3 import load_model, load_tokenizer
from pipeline.errors import InputError
from pipeline.files import require_writable
from pipeline.progress import progress_bar
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import load_sae_model


def main() -> None:
    config = parse_constants(globals())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae, files = load_sae_model(config.model_path, device), SaeFiles(config.model_path)
    out_path = files.beside(PROMOTED.suffix)
    require_writable(out_path)
    source = Source.read(sae.info, files.json)
    site = sae.kind.target_site or source.need("site")
    highest = torch.from_numpy(highest_activations(files.beside(LATENTS.suffix), sae.n_latents)).to(device)
    model_dir = source.model_dir(config.llama_model_dir)
    model = load_model(model_dir, device, rope_scaling_factor=source.rope_scaling_factor)
    tokenizer = load_tokenizer(model_dir)
    print(f"Reading {config.model_path} and {model_dir}; writing {out_path}.")

    plain = plain_tokens(tokenizer, device)
    columns: dict[str, list] = {name: [] for name in PROMOTED.schema.names if name != "latent"}
    with torch.inference_mode(), progress_bar(total=sae.n_latents, unit="latent", desc="promoted tokens") as bar:
        for latents in torch.arange(sae.n_latents, device=device).split(config.latents_at_once):
            z = standard_logits(model, site, *sae.at_output(latents, highest), plain)
            if not z.isfinite().all():
                raise InputError(f"The model in {model_dir} gives NaN or infinite logits; check the checkpoint.")
            for tokens, scores, sign in (("tokens", "scores", 1), ("suppressed_tokens", "suppressed_scores", -1)):
                best = (sign * z).topk(config.promoted_tokens)
                columns[tokens] += [[tokenizer.decode([i]) for i in row] for row in plain[best.indices].tolist()]
                columns[scores] += (sign * best.values).tolist()
            bar.update(len(latents))
    PROMOTED.write(out_path, {"latent": pa.array(range(sae.n_latents)), **columns})
    print(f"{sae.n_latents:,} latents: {out_path}")


if __name__ == "__main__":
    run(main)

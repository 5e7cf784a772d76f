"""For every latent, the tokens that its direction makes the model say next, and those it keeps it from saying.

Reads   MODEL_PATH, an SAE with its JSON; NAME.latents.parquet (capture_top_activating_sentences.py); the Llama folder
Writes  NAME.promoted.parquet beside the SAE: latent, tokens, scores (their logits in standard deviations over the
        vocabulary), suppressed_tokens, suppressed_scores, each strongest first
Method  the direction, as strong as the latent gets, seen through the output layer ("logit lens"); `promoted_logits`
        says what that leaves out. Beside names, which say when a latent fires, this says what it does
Cost    2 x d_model x vocabulary x n_latents operations: seconds for the tiny Llama, minutes for Llama 3.2-3B

    python promoted_tokens.py --model_path data/sae.pth
"""

import stage

MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one the SAE was trained on when not given
PROMOTED_TOKENS = 10  # tokens kept per latent, and as many suppressed ones
LATENTS_AT_ONCE = 256  # bounds memory at 4 bytes x vocabulary each


def promoted_logits(model, site: str, directions, base):
    """What latents add to the logits of the next token, (n, vocab_size); only differences within a row mean anything.

    directions: (n, d_model) at `site`, in the SAE's space; base: (d_model,) the SAE's b_pre.
    At the residual stream, and for what is added to it, a direction goes through the last norm's weights and the output
    layer; what later layers make of it is left out. At attention_norm it goes through the layer's values and output
    first, as if every head attended to this token alone; its effect on where heads attend is left out. At ffn_norm it
    goes through the feed-forward layer, as the difference it makes there at `base`.
    """
    _, layer_idx, kind = site.split(".")
    layer = model.layers[int(layer_idx)]
    if kind == "attention_norm":
        values = layer.attention.wv(directions).unflatten(-1, (model.args.n_kv_heads, model.args.head_dim))
        values = values.repeat_interleave(model.args.n_heads // model.args.n_kv_heads, dim=-2)
        directions = layer.attention.wo(values.flatten(-2))
    elif kind == "ffn_norm":
        directions = layer.feed_forward(base + directions) - layer.feed_forward(base)
    return model.output(directions * model.norm.weight)


def main() -> None:
    config = stage.parse_constants(globals())
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from llama_3 import load_model, load_tokenizer
    from sae import beside, load_sae_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = load_sae_model(config.model_path, device)
    if "site" not in sae.info:
        raise stage.InputError(f"{config.model_path} has no JSON of sae_training.py that names its site.")
    latents_path, out_path = beside(config.model_path, "latents.parquet"), beside(config.model_path, "promoted.parquet")
    if not latents_path.is_file():
        raise stage.InputError(f"There is no {latents_path}; run capture_top_activating_sentences.py first.")
    highest = torch.tensor(pq.read_table(latents_path)["max"].to_pylist(), device=device)
    if len(highest) != sae.n_latents:
        raise stage.InputError(f"{latents_path} has {len(highest)} latents, {config.model_path} {sae.n_latents}.")
    model_dir = config.llama_model_dir or sae.info["model_dir"]
    model = load_model(model_dir, device, rope_scaling_factor=sae.info.get("rope_scaling_factor"))
    tokenizer = load_tokenizer(model_dir)
    special = set(tokenizer.special_tokens.values())
    plain = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in special], device=device)
    print(f"Reading {config.model_path} and {model_dir}; writing {out_path}.")

    names = {1: ("tokens", "scores"), -1: ("suppressed_tokens", "suppressed_scores")}
    found: dict[str, list[list]] = {name: [] for pair in names.values() for name in pair}
    with torch.inference_mode(), stage.progress(total=sae.n_latents, unit="latent", desc="promoted tokens") as bar:
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
    with stage.atomic_path(out_path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    print(f"{sae.n_latents:,} latents: {out_path}")


if __name__ == "__main__":
    stage.run(main)

"""Measure a sparse autoencoder on held-out sentences: its reconstruction, and what splicing it in costs the model.

Reads   SAE_MODEL_PATH with its JSON, the model and the sentences it was trained on
Writes  NAME.evaluation.json beside the SAE; prints a table
Method  next-token cross-entropy of the model as it is, with the site replaced by the SAE's reconstruction, and with the
        site set to zero. Loss recovered = (zeroed - spliced) / (zeroed - clean) (Gao et al. 2024, arXiv:2406.04093,
        section 4.1). FVU = squared error / squared distance from the mean, over all tokens, normalised space

    python sae_evaluation.py --sae_model_path data/sae.pth
"""

import stage

SAE_MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one it was trained on when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one it was trained on when not given
NUM_SENTENCES = 2000  # held-out sentences to use, at most
BATCH_TOKENS = 8192  # tokens a forward pass, padding included


def evaluate(model, sae, site: str, sentences: list[list[int]], batch_tokens: int, bos_id: int | None) -> dict:
    """Quality over tokenised sentences. A begin-of-text, given by bos_id, is passed through and never counted."""
    import torch
    import torch.nn.functional as F

    from capture_activations import make_batches

    device = model.device
    d = sae.d_model
    skip_tokens = () if bos_id is None else (bos_id,)
    starts = [] if bos_id is None else [bos_id]
    variants = {"clean": None, "spliced": sae, "zeroed": torch.zeros_like}
    loss = dict.fromkeys(variants, 0.0)
    n_predictions = 0
    sums = torch.zeros(2 * d + 3, dtype=torch.float64, device=device)  # sum z, sum z^2, error, L0, tokens
    fired = torch.zeros(sae.n_latents, dtype=torch.bool, device=device)
    batches = make_batches([len(ids) + len(starts) for ids in sentences], batch_tokens)
    for batch in stage.progress(batches, unit="batch", desc="evaluation"):
        rows = [starts + sentences[i] for i in batch]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
        lengths = torch.tensor([len(ids) for ids in rows])[:, None]
        places = torch.arange(tokens.shape[1])[None]
        real = ((places < lengths) & (places >= len(starts))).to(device)
        targets = tokens[:, 1:].masked_fill(places[:, 1:] >= lengths, -100).flatten().to(device)
        tokens = tokens.to(device)
        n_predictions += int((targets != -100).sum())
        for name, function in variants.items():
            if function is None:
                logits = model(tokens)
            else:
                with model.intervene(site, function, skip_tokens):
                    logits = model(tokens)
            loss[name] += F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        z, _, _ = sae.normalize(model.activations(tokens, site)[real])
        values, indices = sae.encode_normalized(z)
        error = (sae.decode(values, indices) - z).double().square().sum()
        fired[indices[values > 0]] = True
        z = z.double()
        parts = [z.sum(0), z.square().sum(0), error[None], (values > 0).sum()[None].double(), z.new_tensor([len(z)])]
        sums += torch.cat(parts)
    clean, spliced, zeroed = (loss[name] / n_predictions for name in variants)
    total, squares, (error, l0, count) = sums[:d], sums[d : 2 * d], sums[2 * d :].tolist()
    return {
        "fvu": error / float((squares - total.square() / count).sum()),
        "mse_normalized": error / (count * d),
        "l0": l0 / count,
        "silent_frac": 1 - float(fired.float().mean()),  # latents that never fire on these tokens
        "loss_clean": clean,
        "loss_spliced": spliced,
        "loss_zeroed": zeroed,
        "zeroing_cost": zeroed - clean,
        "loss_recovered": (zeroed - spliced) / (zeroed - clean) if zeroed != clean else None,
        "tokens": int(count),
        "sentences": len(sentences),
    }


def main() -> None:
    config = stage.parse_constants(globals())
    import torch

    from llama_3 import load_model, load_tokenizer
    from openwebtext_sentences_dataset import SentenceDataset
    from sae import beside, load_sae_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = load_sae_model(config.sae_model_path, device)
    info = sae.info
    if "first_validation_sentence" not in info:
        raise stage.InputError(f"{config.sae_model_path} has no JSON of sae_training.py that names what was held out.")
    model_dir = config.llama_model_dir or info["model_dir"]
    model = load_model(model_dir, device, rope_scaling_factor=info.get("rope_scaling_factor"))
    tokenizer = load_tokenizer(model_dir)
    if model.args.dim != sae.d_model:
        raise stage.InputError(
            f"{config.sae_model_path} has d_model {sae.d_model}, {model_dir} has {model.args.dim}; name its own model."
        )
    dataset = SentenceDataset(
        config.sentences_dir or info["sentences_dir"], info["dataset"]["sentences"], info["dataset"]["seed"]
    )
    first = info["first_validation_sentence"]
    chosen = range(first, min(len(dataset), first + config.num_sentences))
    out_path = beside(config.sae_model_path, "evaluation.json")
    print(f"Reading {len(chosen)} held-out sentences of {dataset.folder}; writing {out_path}.")
    sentences = [ids[: info["max_tokens"]] for i in chosen if len(ids := tokenizer.encode(dataset[i])) > 1]
    if not sentences:
        raise stage.InputError(f"{dataset.folder} has no held-out sentences for {config.sae_model_path}.")
    bos_id = tokenizer.bos_id if info["begin_of_text"] else None
    with torch.inference_mode():
        result = evaluate(model, sae, info["site"], sentences, config.batch_tokens, bos_id)
    stage.write_json(out_path, {"site": info["site"], **result})
    for name, value in result.items():
        print(f"  {name:16s} " + (f"{value:,.4f}" if isinstance(value, float) else f"{value}"))


if __name__ == "__main__":
    stage.run(main)

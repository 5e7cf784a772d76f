"""Train the embedded tiny Llama 3, tokenizer included, on the documentation corpus.

Reads   DOCUMENTS_DIR (embedded/corpus.py), SENTENCES_DIR (openwebtext_sentences_dataset.py on those documents)
Writes  OUTPUT_DIR/consolidated.00.pth, params.json, tokenizer.model: a checkpoint in Meta's format; training.json
Method  byte-level BPE with Llama 3's split pattern; AdamW with cosine decay; every step sees documents, which open with
        begin-of-text, and sentences standing alone, which do not: the SAE stages feed sentences alone
Cost    the README has it: about an hour on two cores

    python -m embedded.corpus --output_dir data/documents
    python openwebtext_sentences_dataset.py --input_path data/documents --output_dir data/sentences --punkt corpus
    python -m embedded.training
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from llama_3.model import ModelArgs, Transformer, hidden_dim
from llama_3.tokenizer import SPLIT_PATTERN, TiktokenTokenizer, write_ranks
from pipeline.errors import InputError
from pipeline.files import atomic_path, write_json
from pipeline.manifests import git_commit, read_manifest
from pipeline.options import Count, CountOrZero, NotNegative, Positive, Seed, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run

DOCUMENTS_DIR = "data/documents"  # from embedded/corpus.py
SENTENCES_DIR = "data/sentences"  # the same documents as sentences
OUTPUT_DIR = "data/tiny_llama"  # folder for the checkpoint

VOCAB_SIZE: Count = 4096  # BPE tokens; 256 special ones come on top
DIM: Count = 256  # d_model
N_LAYERS: Count = 8
N_HEADS: Count = 8
N_KV_HEADS: Count = 2
MULTIPLE_OF: Count = 256  # with FFN_DIM_MULTIPLIER: feed-forward width 512
FFN_DIM_MULTIPLIER: Positive = 0.75

N_STEPS: Count = 1400  # optimiser steps
CONTEXT: Count = 256  # tokens of a document row
DOCUMENT_ROWS: Count = 14  # document rows a step
SENTENCE_ROWS: Count = 32  # lone sentences a step
LR: Positive = 3e-3  # peak learning rate
WARMUP_STEPS: CountOrZero = 60
WEIGHT_DECAY: NotNegative = 0.1  # on matrices
SEED: Seed = 0

_PROMPTS = ("The function returns", "If the file does not exist, ", "This method is used to", "Python")


def train_tokenizer(texts, vocab_size: int) -> dict[bytes, int]:
    """BPE ranks, {token: rank}: the 256 bytes first, then merges in the order learnt."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = Sequence(
        [Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    # The library writes each byte as a printable character; this is the table back (GPT-2's byte-to-unicode mapping).
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[c] for c in token): rank for rank, (token, _) in enumerate(vocab)}


def read_corpus(documents_dir: str, sentences_dir: str):
    """(documents, sentences), each a dict {False: training texts, True: held-out texts}."""

    read_manifest(documents_dir, "embedded/corpus.py")
    manifest = read_manifest(sentences_dir, "openwebtext_sentences_dataset.py")
    documents, sentences = {False: [], True: []}, {False: [], True: []}
    table = pq.read_table(Path(documents_dir) / "documents.parquet")
    held_out = table["held_out"].to_pylist()
    for text, held in zip(table["text"].to_pylist(), held_out, strict=True):
        documents[held].append(text)
    if manifest["counts"]["docs"] != len(held_out):
        raise InputError(f"{sentences_dir} is not of {documents_dir}; split those documents again.")
    for shard in manifest["shards"]:
        table = pq.read_table(Path(sentences_dir) / shard["file"], columns=["text", "doc_idx"])
        for text, doc_idx in zip(table["text"].to_pylist(), table["doc_idx"].to_pylist(), strict=True):
            if text:
                sentences[held_out[doc_idx]].append(text)
    return documents, sentences


def main() -> None:
    config = parse_constants(globals())
    documents, sentences = read_corpus(config.documents_dir, config.sentences_dir)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    n_chars = sum(map(len, documents[False]))
    print(f"Training on {n_chars / 1e6:.1f} MB in {len(documents[False])} documents; writing to {output_dir}.")

    ranks = train_tokenizer(documents[False], config.vocab_size)
    tokenizer = TiktokenTokenizer(ranks)

    def flat(texts: list[str]) -> np.ndarray:
        return np.array([i for text in texts for i in tokenizer.encode(text, bos=True, eos=True)], dtype=np.int32)

    stream = flat(documents[False])
    held_out = flat(documents[True])
    # A row opens with begin-of-text and goes on at the start of a paragraph: where a document opens or after \n\n.
    ends_paragraph = np.array([tokenizer.decode([i]).endswith("\n\n") for i in range(tokenizer.vocab_size)])
    starts = np.flatnonzero(ends_paragraph[stream] | (stream == tokenizer.bos_id)) + 1
    starts = starts[starts < len(stream) - config.context]
    alone = sorted((tokenizer.encode(s)[: config.context] for s in sentences[False]), key=len)
    alone = [s for s in alone if len(s) > 1]
    print(f"{len(stream):,} tokens, {len(stream) / n_chars:.3f} a character; {len(alone):,} lone sentences.")

    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": tokenizer.vocab_size,
        "multiple_of": config.multiple_of,
        "ffn_dim_multiplier": config.ffn_dim_multiplier,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": False,
        "max_seq_len": config.context,
    }
    width = hidden_dim(config.dim, config.multiple_of, config.ffn_dim_multiplier)
    args = ModelArgs(config.dim, config.n_layers, config.n_heads, config.n_kv_heads, tokenizer.vocab_size, width)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    model = Transformer(args).to(device)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("wo.weight", "w2.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)
    model.output.weight = model.tok_embeddings.weight  # tied, as in Llama 3.2 1B and 3B
    n_params = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )

    def loss_sum(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, summed over targets that are not -100."""
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")

    def document_rows() -> tuple[torch.Tensor, torch.Tensor]:
        begin = rng.choice(starts, config.document_rows)
        rows = stream[begin[:, None] + np.arange(config.context)]
        tokens = np.concatenate([np.full((len(rows), 1), tokenizer.bos_id), rows[:, :-1]], axis=1)
        return torch.from_numpy(tokens).long(), torch.from_numpy(rows).long()

    def sentence_rows() -> tuple[torch.Tensor, torch.Tensor]:
        i = int(rng.integers(0, len(alone) - config.sentence_rows))
        chosen = alone[i : i + config.sentence_rows]  # of similar length
        longest = len(chosen[-1]) - 1
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        targets = torch.full((len(chosen), longest), -100)
        for row, ids in enumerate(chosen):
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
        return tokens, targets

    started = time.time()
    seen = 0
    bar = progress_bar(range(config.n_steps), unit="step", desc="tiny Llama")
    for step in bar:
        warm = min(1.0, (step + 1) / config.warmup_steps)
        lr = config.lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / config.n_steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [document_rows(), sentence_rows()]
        n_targets = sum(int((targets != -100).sum()) for _, targets in batches)
        total = 0.0
        for tokens, targets in batches:
            loss = loss_sum(tokens.to(device), targets.to(device)) / n_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += n_targets
        bar.set_postfix(loss=f"{total:.3f}", tok_per_s=f"{seen / (time.time() - started):.0f}", refresh=False)
    train_s = time.time() - started

    # The files hold bfloat16; what is measured is what is written.
    model.requires_grad_(False).eval().to(torch.bfloat16)
    state = model.state_dict()
    state["output.weight"] = state["tok_embeddings.weight"]
    with atomic_path(output_dir / "consolidated.00.pth") as temporary:
        torch.save({name: tensor.cpu() for name, tensor in state.items()}, temporary)
    with atomic_path(output_dir / "tokenizer.model") as temporary:
        write_ranks(temporary, ranks)
    write_json(output_dir / "params.json", params)

    model.float()
    n_rows = (len(held_out) - 1) // config.context
    rows = torch.from_numpy(held_out[: n_rows * config.context]).long().view(n_rows, config.context)
    tokens = torch.cat([torch.full((n_rows, 1), tokenizer.bos_id), rows[:, :-1]], dim=1)
    held_out_loss = (
        sum(loss_sum(t.to(device), r.to(device)).item() for t, r in zip(tokens.split(32), rows.split(32), strict=True))
        / rows.numel()
    )
    counts = np.bincount(stream, minlength=tokenizer.vocab_size) + 1.0
    unigram_loss = -np.log(counts / counts.sum())[rows.numpy()].mean()
    report = {
        "n_params": n_params,
        "corpus_characters": n_chars,
        "corpus_tokens": len(stream),
        "tokens_trained": seen,
        "train_seconds": round(train_s),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "held_out_tokens": rows.numel(),
        "held_out_loss": held_out_loss,
        "held_out_unigram_loss": float(unigram_loss),
        "held_out_bits_per_character": held_out_loss * rows.numel() / math.log(2) / sum(map(len, documents[True])),
        "config": vars(config),
        "git_commit": git_commit(),
    }
    write_json(output_dir / "training.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "config"}, indent=2))
    torch.manual_seed(0)
    for prompt in _PROMPTS:
        ids = tokenizer.encode(prompt, bos=True)
        while len(ids) < 60 and ids[-1] != tokenizer.eos_id:
            logits = model(torch.tensor([ids], device=device))[0, -1]
            ids.append(int(torch.multinomial((logits / 0.7).softmax(-1), 1)))
        print("  " + repr(tokenizer.decode(ids[1:])))


if __name__ == "__main__":
    run(main)

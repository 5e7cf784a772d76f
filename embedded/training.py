"""Train the embedded tiny Llama 3, tokenizer included, on the documentation corpus.

Reads   DOCUMENTS_DIR (embedded/corpus.py), SENTENCES_DIR (openwebtext_sentences_dataset.py on those documents)
Writes  OUTPUT_DIR/consolidated.00.pth, params.json, tokenizer.model: a checkpoint in Meta's format; training.json
Method  byte-level BPE with Llama 3's split pattern; AdamW with cosine decay; every step sees documents, which start
        with begin-of-text, and lone sentences, which do not, because the SAE stages feed lone sentences
Cost    about an hour on two cores: docs/embedded.md

    python -m embedded.corpus --output_dir data/documents
    python openwebtext_sentences_dataset.py --input_path data/documents --output_dir data/sentences --punkt corpus
    python -m embedded.training
"""

from pipeline.options import Count, CountOrZero, NotNegative, Positive, Seed, parse_constants
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
CONTEXT: Count = 256  # tokens per document row
DOCUMENT_ROWS: Count = 14  # document rows per step
SENTENCE_ROWS: Count = 32  # lone sentences per step
LR: Positive = 3e-3  # peak learning rate
WARMUP_STEPS: CountOrZero = 60
WEIGHT_DECAY: NotNegative = 0.1  # on matrices only
SEED: Seed = 0

_PROMPTS = ("The function returns", "If the file does not exist, ", "This method is used to", "Python")

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor

from embedded.corpus import CORPUS_STAGE, read_documents
from llama_3.model import ModelArgs, Transformer, hidden_dim
from llama_3.tokenizer import SPLIT_PATTERN, TiktokenTokenizer, write_ranks
from pipeline.errors import InputError
from pipeline.files import atomic_path, write_json
from pipeline.manifests import check_complete, git_commit, read_manifest
from pipeline.progress import progress_bar
from pipeline.sentences import SENTENCES_STAGE, read_sentence_table

# ---- tokens


def train_tokenizer(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """BPE ranks, {token: rank}: the 256 bytes first, then merges in the order learnt."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = Sequence(
        [Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    # The library writes each byte as a printable character; this table maps back (GPT-2's byte-to-unicode mapping).
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[c] for c in token): rank for rank, (token, _) in enumerate(vocab)}


class Texts(NamedTuple):
    """Documents, or sentences."""

    training: list[str]
    held_out: list[str]


def read_corpus(documents_dir: str, sentences_dir: str) -> tuple[Texts, Texts]:
    """(documents, sentences). Raises InputError if the sentences are not from these documents."""
    documents, sentences = Texts([], []), Texts([], [])
    check_complete(documents_dir, CORPUS_STAGE)
    columns = read_documents(documents_dir)
    for text, is_held_out in zip(columns["text"], columns["held_out"], strict=True):
        documents[is_held_out].append(text)
    if read_manifest(sentences_dir, SENTENCES_STAGE)["counts"]["docs"] != len(columns["text"]):
        raise InputError(f"{sentences_dir} was not made from {documents_dir}; split those documents again.")
    rows = read_sentence_table(sentences_dir, ["text", "doc_idx"]).to_pydict()
    for text, doc_idx in zip(rows["text"], rows["doc_idx"], strict=True):
        if text:
            sentences[columns["held_out"][doc_idx]].append(text)
    return documents, sentences


class Rows:
    """Random rows of tokens and their targets: of documents, which start with begin-of-text, and of lone sentences."""

    def __init__(
        self, tokenizer: TiktokenTokenizer, documents: list[str], sentences: list[str], context: int, seed: int
    ):
        self.bos_id, self.context = tokenizer.bos_id, context
        self.rng = np.random.default_rng(seed)
        self.stream = encode_all(tokenizer, documents)
        # A row is begin-of-text and then text from the start of a paragraph: a document's start or after \n\n.
        ends_paragraph = np.array([tokenizer.decode([i]).endswith("\n\n") for i in range(tokenizer.vocab_size)])
        starts = np.flatnonzero(ends_paragraph[self.stream] | (self.stream == self.bos_id)) + 1
        self.starts = starts[starts < len(self.stream) - context]
        alone = sorted((tokenizer.encode(sentence)[:context] for sentence in sentences), key=len)
        self.alone = [ids for ids in alone if len(ids) > 1]

    def of_documents(self, n_rows: int) -> tuple[Tensor, Tensor]:
        begin = self.rng.choice(self.starts, n_rows)
        rows = self.stream[begin[:, None] + np.arange(self.context)]
        return with_targets(torch.from_numpy(rows).long(), self.bos_id)

    def of_sentences(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """Sentences of similar length; targets past a sentence's end are -100."""
        i = int(self.rng.integers(0, len(self.alone) - n_rows))
        chosen = self.alone[i : i + n_rows]
        longest = len(chosen[-1]) - 1
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        targets = torch.full((len(chosen), longest), -100)
        for row, ids in enumerate(chosen):
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
        return tokens, targets


def encode_all(tokenizer: TiktokenTokenizer, texts: list[str]) -> np.ndarray:
    """The documents' tokens one after the other, each document between begin-of-text and end-of-text."""
    return np.array([i for text in texts for i in tokenizer.encode(text, bos=True, eos=True)], dtype=np.int32)


def with_targets(targets: Tensor, bos_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets) of whole rows: each token predicts the next one, begin-of-text the first."""
    return torch.cat([torch.full((len(targets), 1), bos_id), targets[:, :-1]], dim=1), targets


# ---- the model


def new_model(args: ModelArgs, seed: int) -> Transformer:
    """Random weights; the output matrix is the embedding's, as in Llama 3.2 1B and 3B."""
    torch.manual_seed(seed)
    model = Transformer(args)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("wo.weight", "w2.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * args.n_layers) if residual else 0.02)
    model.output.weight = model.tok_embeddings.weight
    return model


def loss_sum(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over targets that are not -100."""
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(tokens.to(device))
    return F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=-100, reduction="sum")


class Schedule(NamedTuple):
    n_steps: int
    document_rows: int  # per step
    sentence_rows: int  # per step
    lr: float
    warmup_steps: int
    weight_decay: float

    def lr_at(self, step: int) -> float:
        """Linear warm-up; cosine decay to a fiftieth."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / self.n_steps)) / 2)


def train(model: Transformer, rows: Rows, schedule: Schedule) -> int:
    """Train in place; returns the number of tokens predicted."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    started, seen = time.time(), 0
    bar = progress_bar(range(schedule.n_steps), unit="step", desc="tiny Llama")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        batches = [rows.of_documents(schedule.document_rows), rows.of_sentences(schedule.sentence_rows)]
        n_targets = sum(int((targets != -100).sum()) for _, targets in batches)
        total = 0.0
        for tokens, targets in batches:
            loss = loss_sum(model, tokens, targets) / n_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += n_targets
        bar.set_postfix(loss=f"{total:.3f}", tok_per_s=f"{seen / (time.time() - started):.0f}", refresh=False)
    return seen


def write_checkpoint(folder: Path, model: Transformer, ranks: dict[bytes, int], params: dict[str, Any]) -> None:
    """Write it in Meta's format, in the model's precision."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    state["output.weight"] = state["tok_embeddings.weight"]
    with atomic_path(folder / "consolidated.00.pth") as temporary:
        torch.save(state, temporary)
    with atomic_path(folder / "tokenizer.model") as temporary:
        write_ranks(temporary, ranks)
    write_json(folder / "params.json", params)


# ---- results


def measure(model: Transformer, rows: Rows, tokenizer: TiktokenTokenizer, held_out: list[str]) -> dict[str, Any]:
    """Losses on held-out documents, of the model and of a table of token frequencies."""
    stream = encode_all(tokenizer, held_out)
    n_rows = (len(stream) - 1) // rows.context
    whole = torch.from_numpy(stream[: n_rows * rows.context]).long().view(n_rows, rows.context)
    tokens, targets = with_targets(whole, tokenizer.bos_id)
    pieces = zip(tokens.split(32), targets.split(32), strict=True)
    loss = sum(loss_sum(model, *piece).item() for piece in pieces) / targets.numel()
    counts = np.bincount(rows.stream, minlength=tokenizer.vocab_size) + 1.0
    unigram_loss = -np.log(counts / counts.sum())[targets.numpy()].mean()
    return {
        "held_out_tokens": targets.numel(),
        "held_out_loss": loss,
        "held_out_unigram_loss": float(unigram_loss),
        "held_out_bits_per_character": loss * targets.numel() / math.log(2) / sum(map(len, held_out)),
    }


def print_samples(model: Transformer, tokenizer: TiktokenTokenizer) -> None:
    torch.manual_seed(0)
    for prompt in _PROMPTS:
        ids = tokenizer.encode(prompt, bos=True)
        while len(ids) < 60 and ids[-1] != tokenizer.eos_id:
            logits = model(torch.tensor([ids], device=model.device))[0, -1]
            ids.append(int(torch.multinomial((logits / 0.7).softmax(-1), 1)))
        print("  " + repr(tokenizer.decode(ids[1:])))


def main() -> None:
    config = parse_constants(globals())
    documents, sentences = read_corpus(config.documents_dir, config.sentences_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    n_chars = sum(map(len, documents.training))
    print(f"Training on {n_chars / 1e6:.1f} MB in {len(documents.training)} documents; writing to {output_dir}.")

    ranks = train_tokenizer(documents.training, config.vocab_size)
    tokenizer = TiktokenTokenizer(ranks)
    rows = Rows(tokenizer, documents.training, sentences.training, config.context, config.seed)
    n_tokens = len(rows.stream)
    print(f"{n_tokens:,} tokens, {n_tokens / n_chars:.3f} per character; {len(rows.alone):,} lone sentences.")
    params = {name: getattr(config, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    params |= {"vocab_size": tokenizer.vocab_size, "multiple_of": config.multiple_of}
    params |= {"ffn_dim_multiplier": config.ffn_dim_multiplier, "norm_eps": 1e-5, "rope_theta": 500000.0}
    params |= {"use_scaled_rope": False, "max_seq_len": config.context}
    width = hidden_dim(config.dim, config.multiple_of, config.ffn_dim_multiplier)
    args = ModelArgs(config.dim, config.n_layers, config.n_heads, config.n_kv_heads, tokenizer.vocab_size, width)
    model = new_model(args, config.seed).to(device)
    schedule = Schedule(**{name: getattr(config, name) for name in Schedule._fields})

    started = time.time()
    n_trained = train(model, rows, schedule)
    train_s = time.time() - started
    model.requires_grad_(False).eval().to(torch.bfloat16)
    write_checkpoint(output_dir, model, ranks, params)
    model.float()  # measures the weights as written, rounded to bfloat16
    report = {
        "n_params": sum(p.numel() for p in model.parameters()),
        "corpus_characters": n_chars,
        "corpus_tokens": n_tokens,
        "tokens_trained": n_trained,
        "train_seconds": round(train_s),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        **measure(model, rows, tokenizer, documents.held_out),
        "config": vars(config),
        "git_commit": git_commit(),
    }
    write_json(output_dir / "training.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "config"}, indent=2))
    print_samples(model, tokenizer)


if __name__ == "__main__":
    run(main)

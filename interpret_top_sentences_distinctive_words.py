"""Name latents without asking anyone: the words, word sequences and tokens they fire on more than the corpus has them.

Reads   NAME.top.parquet beside MODEL_PATH (capture_top_activating_sentences.py), the sentences it was made from, the
        Llama folder of the SAE
Writes  NAME.meaning_distinctive-words_{mean,max,last}.yaml: latent -> {certainty, common_semantic}, most certain first
Method  log-odds of a feature's share of sentences with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008,
        Political Analysis 16:4, eq. 22). A feature counts where the latent fires with at least half its highest
        activation in the sentence: a word; two or three words in a row; “…ing” or “Tim…”, a token that is part of a
        word; “(”, a sign; “number”; “line break”. Certainty is the share of the top sentences that hold one of those
        in the name
Cost    a minute for 4,096 latents; half an hour on one core for 65,536

    python interpret_top_sentences_distinctive_words.py --model_path data/sae.pth
"""

import functools
import math
from collections import Counter
from pathlib import Path

import yaml

from latents.tables import check_top_sentences, top_sentences
from latents.words import WORD, features
from llama_3 import load_tokenizer
from pipeline.files import atomic_path, read_json
from pipeline.options import Count, Positive, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run
from pipeline.sentences import SentenceDataset

MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama checkpoint folder; the one the SAE was trained on when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one that was captured when not given
OUTPUT_DIR: str | None = None  # folder for the files; beside the SAE when not given
TOP_SENTENCES: Count = 50  # sentences a latent is named by
MIN_SENTENCES: Count = 5  # a latent with fewer gets no name
N_WORDS: Count = 3  # features in a name, at most
CORPUS_SENTENCES: Count = 50_000  # sentences the corpus is known by
PRIOR: Positive = 20.0  # sentences' worth of corpus that every latent is assumed to have seen

_STRONG = 0.5  # share of a sentence's highest activation at which the latent counts as firing on a token
# A plain word stands for a sequence or a part of a word with this share of its score, in this share of its sentences.
_WORD_SCORE, _WORD_SHARE = 0.5, 0.8


def z_scores(top: Counter, n_top: int, corpus: Counter, n_corpus: int, prior: float) -> dict[str, float]:
    """How surprisingly often each feature of `top` (feature -> sentences that hold it) stands in n_top sentences."""
    scores = {}
    for word, count in top.items():
        seen = max(corpus[word], 1)  # it does stand in the corpus, sampled or not
        expected = prior * (seen + 0.5) / (n_corpus + 1)  # the prior's sentences that hold the word
        a, b = count + expected, n_top - count + prior - expected
        in_corpus = seen + expected
        not_in_corpus = max(n_corpus - seen, 0) + prior - expected
        delta = math.log(a / b) - math.log(in_corpus / not_in_corpus)
        scores[word] = delta / math.sqrt(1 / a + 1 / in_corpus)
    return scores


def name_latent(sentences: list[set[str]], corpus: Counter, n_corpus: int, prior: float, n_words: int):
    """(features, certainty): up to n_words, best first, each after the first adding a tenth of the sentences."""
    counts = Counter(feature for held in sentences for feature in held)
    scores = z_scores(counts, len(sentences), corpus, n_corpus, prior)
    words = {feature for feature in scores if WORD.fullmatch(feature)}
    chosen: list[str] = []
    covered: set[int] = set()
    for feature in sorted(scores, key=lambda f: (-scores[f], f)):
        if chosen and (len(chosen) == n_words or scores[feature] < scores[chosen[0]] / 3):
            break
        added = {i for i, held in enumerate(sentences) if feature in held} - covered
        if not added or (chosen and len(added) < len(sentences) / 10):
            continue
        if feature not in words:
            as_good = {word for word in words if scores[word] >= _WORD_SCORE * scores[feature]}
            beside = Counter(word for i in added for word in sentences[i] & as_good)
            word, count = min(beside.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
            if count >= _WORD_SHARE * len(added):
                feature = word
        chosen.append(feature)
        covered |= {i for i, held in enumerate(sentences) if feature in held}
    return chosen, len(covered) / max(1, len(sentences))


def main() -> None:
    config = parse_constants(globals())

    name = config.model_path.removesuffix(".pth")
    info = read_json(f"{name}.json", "name an SAE that sae_training.py wrote.")
    top_path = Path(f"{name}.top.parquet")
    check_top_sentences(top_path)
    sentences_dir = config.sentences_dir or info["sentences_dir"]
    dataset = SentenceDataset(sentences_dir, info["dataset"]["sentences"], info["dataset"]["seed"])
    tokenizer = load_tokenizer(config.llama_model_dir or info["model_dir"])
    token_bytes = functools.cache(tokenizer.token_bytes)
    out_dir = Path(config.output_dir or top_path.parent)
    print(f"Reading {top_path} and {sentences_dir}; writing {Path(name).name}.meaning_*.yaml to {out_dir}.")

    corpus: Counter = Counter()
    sample = range(0, len(dataset), max(1, len(dataset) // config.corpus_sentences))
    for i in progress_bar(sample, unit="sentence", desc="corpus"):
        tokens = [token_bytes(token) for token in tokenizer.encode(dataset[i])[: info["max_tokens"]]]
        corpus.update(features(tokens, [True] * len(tokens)))
    for aggregation in ("mean", "max", "last"):
        meanings = {}
        latents = top_sentences(top_path, aggregation, config.top_sentences, None)
        for latent, sentences in progress_bar(latents, unit="latent", desc=f"names by {aggregation}"):
            if len(sentences) < config.min_sentences:
                continue
            held = []
            for sentence in sentences:
                threshold = _STRONG * max(sentence.activations)
                strong = [activation >= threshold for activation in sentence.activations]
                held.append(features([token_bytes(token) for token in sentence.token_ids], strong))
            parts, certainty = name_latent(held, corpus, len(sample), config.prior, config.n_words)
            if parts:
                meanings[latent] = {"certainty": round(certainty, 4), "common_semantic": ", ".join(parts)}
        ordered = dict(sorted(meanings.items(), key=lambda item: (-item[1]["certainty"], item[0])))
        path = out_dir / f"{Path(name).name}.meaning_distinctive-words_{aggregation}.yaml"
        with atomic_path(path) as temporary:
            dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
            text = yaml.dump(ordered, Dumper=dumper, sort_keys=False, allow_unicode=True, width=1000)
            temporary.write_text(text, encoding="utf-8")
        print(f"{len(ordered):,} latents named: {path}")


if __name__ == "__main__":
    run(main)

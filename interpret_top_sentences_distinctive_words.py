"""Name latents without any model: the words that set a latent's top sentences apart from the corpus.

Reads   NAME.top.parquet beside MODEL_PATH (capture_top_activating_sentences.py), the sentences it was made from
Writes  NAME.meaning_distinctive-words_{mean,max,last}.yaml: latent -> {certainty, common_semantic}, most certain first
Method  log-odds of a word's share of sentences with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008,
        Political Analysis 16:4, eq. 22). Certainty is the share of the top sentences that hold one of the words
Cost    seconds for thousands of latents

    python interpret_top_sentences_distinctive_words.py --model_path data/sae.pth
"""

import math
import re
from collections import Counter
from pathlib import Path

import stage

MODEL_PATH = "data/sae.pth"  # the SAE
SENTENCES_DIR: str | None = None  # folder of sentences; the one that was captured when not given
OUTPUT_DIR: str | None = None  # folder for the meanings; beside the SAE when not given
TOP_SENTENCES = 50  # sentences a latent is named by
MIN_SENTENCES = 5  # a latent with fewer gets no name
N_WORDS = 3  # words in a name, at most
CORPUS_SENTENCES = 50_000  # sentences the corpus is known by
PRIOR = 20.0  # sentences' worth of corpus that every latent is assumed to have seen

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words_of(sentence: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(sentence))


def z_scores(top: Counter, n_top: int, corpus: Counter, n_corpus: int, prior: float) -> dict[str, float]:
    """How surprisingly often each word of `top` (word -> sentences that hold it) stands in n_top sentences."""
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


def name_latent(sentences: list[frozenset[str]], corpus: Counter, n_corpus: int, prior: float, n_words: int):
    """(words, certainty): up to n_words words, best first, each after the first adding a tenth of the sentences."""
    counts = Counter(word for words in sentences for word in words)
    scores = z_scores(counts, len(sentences), corpus, n_corpus, prior)
    chosen: list[str] = []
    covered: set[int] = set()
    for word in sorted(scores, key=lambda w: (-scores[w], w)):
        holding = {i for i, words in enumerate(sentences) if word in words}
        if not chosen or len(holding - covered) >= len(sentences) / 10:
            chosen.append(word)
            covered |= holding
        if len(chosen) == n_words or scores[word] < scores[chosen[0]] / 3:
            break
    return chosen, len(covered) / len(sentences)


def main() -> None:
    config = stage.parse_constants(globals())
    import pyarrow.parquet as pq
    import yaml

    from openwebtext_sentences_dataset import SentenceDataset

    name = config.model_path.removesuffix(".pth")
    info = stage.read_json(f"{name}.json", "name an SAE that sae_training.py wrote.")
    top_path = Path(f"{name}.top.parquet")
    if not top_path.exists():
        raise stage.InputError(f"There is no {top_path}; run capture_top_activating_sentences.py first.")
    sentences_dir = config.sentences_dir or info["sentences_dir"]
    dataset = SentenceDataset(sentences_dir, info["dataset"]["sentences"], info["dataset"]["seed"])
    out_dir = Path(config.output_dir or top_path.parent)
    print(f"Reading {top_path} and {sentences_dir}; writing {Path(name).name}.meaning_*.yaml to {out_dir}.")

    step = max(1, len(dataset) // config.corpus_sentences)
    sample = range(0, len(dataset), step)
    corpus = Counter(word for i in stage.progress(sample, desc="corpus") for word in words_of(dataset[i]))
    table = pq.read_table(top_path, columns=["latent", "aggregation", "rank", "text"])
    top: dict[tuple[str, int], list[frozenset[str]]] = {}
    known: dict[str, frozenset[str]] = {}
    columns = (table[column].to_pylist() for column in ("latent", "aggregation", "rank", "text"))
    for latent, aggregation, rank, text in zip(*columns, strict=True):
        if rank < config.top_sentences:
            if text not in known:
                known[text] = words_of(text)
            top.setdefault((aggregation, latent), []).append(known[text])
    for aggregation in sorted({a for a, _ in top}):
        meanings = {}
        latents = [latent for a, latent in top if a == aggregation]
        for latent in stage.progress(latents, unit="latent", desc=f"names by {aggregation}"):
            sentences = top[aggregation, latent]
            if len(sentences) < config.min_sentences:
                continue
            words, certainty = name_latent(sentences, corpus, len(sample), config.prior, config.n_words)
            if words:
                meanings[latent] = {"certainty": round(certainty, 4), "common_semantic": ", ".join(words)}
        ordered = dict(sorted(meanings.items(), key=lambda item: (-item[1]["certainty"], item[0])))
        path = out_dir / f"{Path(name).name}.meaning_distinctive-words_{aggregation}.yaml"
        with stage.atomic_path(path) as temporary:
            temporary.write_text(
                yaml.dump(ordered, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, width=1000)
            )
        print(f"{len(ordered):,} latents named: {path}")


if __name__ == "__main__":
    stage.run(main)

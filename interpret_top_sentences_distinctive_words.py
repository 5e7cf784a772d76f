"""Name latents without a model: by the words, word sequences and tokens overrepresented where they fire.

Reads   NAME.top.parquet beside MODEL_PATH (capture_top_activating_sentences.py), the sentences it was made from, the
        SAE's Llama folder
Writes  NAME.meaning_distinctive-words_{mean,max,last}.yaml: latent -> {certainty, common_semantic}, most certain first
Method  log-odds of a feature's share of sentences with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008,
        Political Analysis 16:4, eq. 22). A feature counts where the latent fires with at least half its highest
        activation in the sentence. A feature is a word; two or three words in a row; a token that is part of a word
        (“…ing”, “Tim…”); a sign (“(”); “number”; or “line break”. Certainty is the share of the top sentences that
        contain a feature of the name
Cost    a minute for 4,096 latents; half an hour on one core for 65,536

    python interpret_top_sentences_distinctive_words.py --model_path data/sae.pth
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from latents.meanings import Meaning, write_meanings
from latents.origin import source_of, tokenizer_of
from latents.tables import AGGREGATIONS, TOP, Aggregation, TopSentence, open_top, top_sentences
from latents.words import WORD, features
from llama_3.tokenizer import Tokenizer
from pipeline.files import require_writable
from pipeline.options import Count, Positive, parse_constants
from pipeline.progress import progress_bar
from pipeline.run import run
from pipeline.sae_files import SaeFiles
from pipeline.sentences import SentenceDataset

MODEL_PATH = "data/sae.pth"  # the SAE
LLAMA_MODEL_DIR: str | None = None  # Llama folder, for its tokenizer; the one the SAE was trained on when not given
SENTENCES_DIR: str | None = None  # folder of sentences; the one that was captured when not given
OUTPUT_DIR: str | None = None  # folder for the files; beside the SAE when not given
TOP_SENTENCES: Count = 50  # top sentences that a name is based on
MIN_SENTENCES: Count = 5  # a latent with fewer gets no name
N_WORDS: Count = 3  # most features in a name
CORPUS_SENTENCES: Count = 50_000  # sentences sampled from the corpus
PRIOR: Positive = 20.0  # sentences' worth of corpus that every latent is assumed to have seen

_STRONG = 0.5  # share of a sentence's highest activation at which the latent counts as firing on a token
# A plain word replaces a sequence or part of a word if it has this share of its score and is in this share of its
# sentences.
_WORD_SCORE, _WORD_SHARE = 0.5, 0.8


class Corpus(NamedTuple):
    """How often each feature occurs in ordinary sentences."""

    counts: Counter[str]  # feature -> sentences that contain it
    n: int  # sentences


def count_corpus(dataset: SentenceDataset, tokenizer: Tokenizer, max_tokens: int, n_sentences: int) -> Corpus:
    """Count the features of about n_sentences sentences, evenly spread."""
    token_bytes = functools.cache(tokenizer.token_bytes)
    counts: Counter[str] = Counter()
    sample = range(0, len(dataset), max(1, len(dataset) // n_sentences))
    for i in progress_bar(sample, unit="sentence", desc="corpus"):
        tokens = [token_bytes(token) for token in tokenizer.encode(dataset[i])[:max_tokens]]
        counts.update(features(tokens, [True] * len(tokens)))
    return Corpus(counts, len(sample))


def strong_features(sentence: TopSentence, token_bytes: Callable[[int], bytes]) -> set[str]:
    """The features where the latent fires strongly."""
    threshold = _STRONG * max(sentence.token_activations)
    strong = [activation >= threshold for activation in sentence.token_activations]
    return features([token_bytes(token) for token in sentence.token_ids], strong)


def z_scores(top: Counter[str], n_top: int, corpus: Corpus, prior: float) -> dict[str, float]:
    """How surprisingly often n_top sentences contain each feature. top: feature -> sentences that contain it."""
    scores = {}
    for word, count in top.items():
        seen = max(corpus.counts[word], 1)  # the corpus does contain it, even if the sample does not
        expected = prior * (seen + 0.5) / (corpus.n + 1)  # the prior's sentences that contain the word
        a, b = count + expected, n_top - count + prior - expected
        in_corpus = seen + expected
        not_in_corpus = max(corpus.n - seen, 0) + prior - expected
        delta = math.log(a / b) - math.log(in_corpus / not_in_corpus)
        scores[word] = delta / math.sqrt(1 / a + 1 / in_corpus)
    return scores


def name_latent(sentences: list[set[str]], corpus: Corpus, prior: float, n_words: int) -> tuple[list[str], float]:
    """(features, certainty): up to n_words features, best first; each but the first adds a tenth of the sentences.

    sentences: each top sentence's features.
    """
    counts = Counter(feature for held in sentences for feature in held)
    scores = z_scores(counts, len(sentences), corpus, prior)
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


def name_latents(
    top_path: Path,
    aggregation: Aggregation,
    n_sentences: int,
    min_sentences: int,
    corpus: Corpus,
    token_bytes: Callable[[int], bytes],
    prior: float,
    n_words: int,
) -> dict[int, Meaning]:
    """Name latents by their top sentences; a latent with too few sentences or no features gets no name."""
    meanings = {}
    latents = top_sentences(top_path, aggregation, n_sentences)
    for latent, sentences in progress_bar(latents, unit="latent", desc=f"names by {aggregation}"):
        if len(sentences) < min_sentences:
            continue
        held = [strong_features(sentence, token_bytes) for sentence in sentences]
        parts, certainty = name_latent(held, corpus, prior, n_words)
        if parts:
            meanings[latent] = Meaning(", ".join(parts), round(certainty, 4))
    return meanings


def main() -> None:
    config = parse_constants(globals())
    source = source_of(config.model_path)
    max_tokens = source.need("max_tokens")
    top_path = SaeFiles(config.model_path).beside(TOP.suffix)
    open_top(top_path).close()  # a bad table is reported before anything else
    dataset = source.sentences(config.sentences_dir)
    tokenizer = tokenizer_of(source, config.llama_model_dir, "--llama_model_dir")
    out = SaeFiles(Path(config.output_dir or top_path.parent, Path(config.model_path).name))
    require_writable(*(out.beside(f"meaning_distinctive-words_{aggregation}.yaml") for aggregation in AGGREGATIONS))
    print(f"Reading {top_path} and {dataset.folder}; writing {out.beside('meaning_*.yaml')}.")

    corpus = count_corpus(dataset, tokenizer, max_tokens, config.corpus_sentences)
    token_bytes = functools.cache(tokenizer.token_bytes)
    for aggregation in AGGREGATIONS:
        path = out.beside(f"meaning_distinctive-words_{aggregation}.yaml")
        meanings = name_latents(
            top_path,
            aggregation,
            config.top_sentences,
            config.min_sentences,
            corpus,
            token_bytes,
            config.prior,
            config.n_words,
        )
        write_meanings(path, meanings)
        print(f"{len(meanings):,} latents named: {path}")


if __name__ == "__main__":
    run(main)

"""The words of a latent's own name, counted in texts: demo.py and serving/dose_response.py."""

from collections.abc import Collection, Iterable

from latents.words import words_of


def count_hits(texts: Iterable[str], words: Collection[str]) -> int:
    """Number of texts that contain one of the words."""
    return sum(bool(words_of(text) & set(words)) for text in texts)

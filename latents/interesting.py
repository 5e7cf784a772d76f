"""Which latents are worth showing first."""

import re

from latents.index import LatentIndex

_CERTAIN = 0.9  # least certainty of an interesting latent's meaning
_FREQUENCIES = (2e-4, 5e-3)  # of an interesting latent: neither rare nor everywhere


def interesting_latents(index: LatentIndex) -> list[int]:
    """Latents worth showing, best score first: their meaning is certain and in plain words (no parts of words, signs or
    numbers), most of them new in the list; and they fire neither rarely nor everywhere."""
    certain = index.certainty >= _CERTAIN
    medium = (index.frequency >= _FREQUENCIES[0]) & (index.frequency <= _FREQUENCIES[1])
    chosen, used = [], set()
    for latent in best_first(index):
        meaning = index.meaning[latent]
        if not (certain[latent] and medium[latent] and is_plain(meaning)):
            continue
        stems = {word[:4].lower() for word in re.findall(r"\w+", meaning) if len(word) > 3}
        if 2 * len(stems & used) < len(stems):
            used |= stems
            chosen.append(latent)
    return chosen


def best_first(index: LatentIndex) -> list[int]:
    """All living latents by score, then certainty; those without a meaning last."""
    return [row["latent"] for row in index.search(sort="score", limit=index.n_latents)]


def is_plain(meaning: str | None) -> bool:
    """Whether a meaning has only whole words."""
    if meaning is None:
        return False
    words = meaning.split(", ")
    return len(words[0]) > 3 and "number" not in words and all(c.isalpha() or c in " ,.;:'\"()-/" for c in meaning)

"""Which latents are worth showing first: those whose meaning says what a text is about."""

from typing import Protocol

import numpy as np

from latents.words import WORD

_CERTAIN = 0.9  # least certainty of an interesting latent's meaning
_FREQUENCIES = (0.025, 0.65)  # of an interesting latent, in multiples of the mean: neither rare nor everywhere

# English words that say little about what a text is about.
_EMPTY_WORDS = """
a an the this that these those some any each every either neither both all half such no none another other others
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
ourselves they them their theirs themselves one ones who whom whose which what someone something anyone anything
everyone everything nobody nothing
about above across after against along amid among around as at before behind below beneath beside besides between
beyond by despite down during except for from in inside into like near of off on onto out outside over past per
since than through throughout to toward towards under unlike until unto up upon via with within without
and or but nor so yet if because although though while whereas whether unless once when where why how whenever
wherever however therefore thus hence moreover furthermore otherwise instead meanwhile
be am is are was were been being have has had having do does did done doing can could may might must shall should
will would ought cannot need dare let get gets got getting make makes made making
not never ever also too very quite rather just only even still already again almost enough else here there now then
always often sometimes usually perhaps maybe really actually simply well much many more most less least few several
own same later soon ago yes okay etc
said say says saying according known called named given based due able unable going
zero two three four five six seven eight nine ten first second third last next new number line break
add added adds ask asked asking become becomes became becoming begin began believe believes believed bring brings
brought call calls come comes came coming create created creating find finds found finding follow following followed
give gives gave giving go goes went gone help helps helped include includes included including keep keeps kept keeping
know knows knew known like likes leave leaves left look looks looked looking mean means meant put puts putting run runs
running see sees saw seen seem seems seemed set sets show shows showed shown start starts started stop stops stopped
take takes took taken taking tell tells told think thinks thought thinking try tries tried trying turn turns turned
turning use uses used using want wants wanted work works worked working feel feels felt
bad best better big change changes changing certain definitely different early entire far full good great high large
late likely little long low main major old possible real true yeah latter leaving ending united present pretty previous
probably quick right short similar single small special sure together unfortunately usual various whole wide wrong bit
case cases course day days end example fact kind lot part parts people person place rest role side sort thing things
time times today way ways year years
"""
_EMPTY = frozenset(_EMPTY_WORDS.split())
_NO_ADVERBS = frozenset(("family", "supply", "assembly", "monopoly", "anomaly", "butterfly", "elderly", "melancholy"))


class Described(Protocol):
    """What is known about latents: LatentIndex, of whose columns, arrays of n_latents, these are some."""

    meaning: np.ndarray
    certainty: np.ndarray
    score: np.ndarray
    frequency: np.ndarray
    output_score: np.ndarray


def latents_to_steer(latents: Described) -> list[int]:
    """The interesting latents, those that steer best first (`output_score`)."""
    score = np.nan_to_num(latents.output_score, nan=-np.inf)
    return sorted(interesting_latents(latents), key=lambda latent: -score[latent])


def interesting_latents(latents: Described) -> list[int]:
    """Latents worth showing, best score first: their meaning is certain and of content words (no parts of words, signs
    or numbers), most of them new in the list; and they fire neither rarely nor everywhere."""
    certain = latents.certainty >= _CERTAIN
    least, most = (bound * np.nan_to_num(latents.frequency).mean() for bound in _FREQUENCIES)
    medium = (latents.frequency >= least) & (latents.frequency <= most)
    best_first = np.lexsort([-np.nan_to_num(column, nan=-1.0) for column in (latents.certainty, latents.score)])
    chosen, used = [], set()
    for latent in best_first[(certain & medium)[best_first]].tolist():
        words = content_words(latents.meaning.item(latent))
        stems = {word[:4] for word in words}
        if 2 * len(stems & used) < len(stems):
            used |= stems
            chosen.append(latent)
    return chosen


def content_words(meaning: str | None) -> list[str]:
    """The words of a meaning that say what a text is about, in lower case; none if it is not in plain words, if its
    first part (a name's best feature) has none, or half of the parts have none."""
    if meaning is None or not all(c.isalpha() or c in " ,.;:'’\"“”()-/" for c in meaning):
        return []
    words = [WORD.findall(part.lower().replace("’", "'")) for part in meaning.split(", ")]
    content = [[word for word in part if not is_empty(word)] for part in words]
    says_something = all(words) and content[0] and 2 * sum(map(bool, content)) > len(content)
    return [word for part in content for word in part] if says_something else []


def is_empty(word: str) -> bool:
    """Whether a word in lower case says little: also contractions (it's, don't) and most adverbs in -ly."""
    stem = word.partition("'")[0]
    is_adverb = stem.endswith("ly") and len(stem) > 5 and stem not in _NO_ADVERBS
    return len(stem) < 3 or stem in _EMPTY or word.endswith("n't") or is_adverb

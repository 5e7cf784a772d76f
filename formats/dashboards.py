"""What is known of an SAE's latents, for other programs' pages: SAEDashboard's batches and Neuronpedia's uploads.

sae_dashboard  batch-N.json, as SAEDashboard 0.8 writes and reads them: {model_id, layer, sae_set, sae_id_suffix,
               features}, each feature with its strongest texts, promoted and suppressed tokens, frequency, direction
neuronpedia    upload-N.json, bodies of POST /api/feature/upload-batch: {modelId, source, features}, at most 128
               features of index, density, topLogits and bottomLogits (at most 20), explanations, activations of at most
               1,024 tokens; without the latents that have no text

Neuronpedia's SAEs are at TransformerLens' sites, which the outputs of norms are not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.common import hook_of_site
from latents.index import pieces
from latents.meanings import best_meanings
from latents.tables import LATENTS, PROMOTED, TOP, TopSentence, top_sentences
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.sae_files import SaeFiles
from sae import SparseAutoencoder

_AT_ONCE = 128  # features in a file
_TEXTS, _LOGITS = 20, 20  # of a feature
_MOST_TOKENS, _MOST_CHARACTERS = 1024, 512  # of an activation, of an explanation
_TOP = -1  # bin_min, bin_max, bin_contains of the strongest texts


class Known:
    """The files beside an SAE. Raises InputError where one is missing or of another SAE."""

    def __init__(self, sae_path: str, sae: SparseAutoencoder, tokenizer: Tokenizer):
        if not hook_of_site(sae.output_site).startswith("blocks."):
            raise InputError(
                f"Dashboards show SAEs at TransformerLens' sites, and {sae.output_site} is none; name an SAE of the "
                "residual stream, or of the output of attention or the MLP."
            )
        files = SaeFiles(sae_path)
        self.sae, self.tokenizer, self.top = sae, tokenizer, files.beside(TOP.suffix)
        self.latents = self._rows(files, LATENTS, ["frequency", "max", "sentences_by_tenth"])
        self.promoted = self._rows(files, PROMOTED, ["tokens", "scores", "suppressed_tokens", "suppressed_scores"])
        self.meanings = best_meanings(sae_path, sae.n_latents)

    def _rows(self, files: SaeFiles, table: Any, columns: list[str]) -> list[dict[str, Any]]:
        path = files.beside(table.suffix)
        rows = table.read(path, columns).to_pylist()
        if len(rows) != self.sae.n_latents:
            raise InputError(f"{path} is of {len(rows)} latents, not of these {self.sae.n_latents}; make it again.")
        return rows

    def sentences(self) -> Iterator[tuple[int, list[TopSentence]]]:
        return top_sentences(self.top, "max", _TEXTS)

    def shown(self, sentence: TopSentence) -> tuple[list[str], list[float]]:
        """Its tokens' texts and the latent's activations."""
        ids = sentence.token_ids[:_MOST_TOKENS]
        return pieces(self.tokenizer, ids), [round(float(value), 4) for value in sentence.token_activations[: len(ids)]]


def write_sae_dashboard(known: Known, folder: Path, model_id: str, sae_set: str, std: float) -> int:
    """std: what a direction is multiplied by, so that it is in the stream's own units. Returns the number of files."""
    _, layer, _ = known.sae.output_site.split(".")
    about = {"model_id": model_id, "layer": int(layer), "sae_set": sae_set, "sae_id_suffix": None}
    return _write(folder, "batch", about, (_dashboard_feature(known, *each, std) for each in known.sentences()))


def _dashboard_feature(known: Known, latent: int, sentences: Sequence[TopSentence], std: float) -> dict[str, Any]:
    row, promoted = known.latents[latent], known.promoted[latent]
    edges = np.linspace(0, row["max"], len(row["sentences_by_tenth"]) + 1)
    activations = []
    for sentence in sentences:
        tokens, values = known.shown(sentence)
        found = {"bin_min": _TOP, "bin_max": _TOP, "bin_contains": _TOP, "tokens": tokens, "values": values}
        activations.append(found | {"qualifying_token_index": int(np.argmax(values)) if values else 0})
    direction = known.sae.decoder.weight.detach().float()[:, latent]
    return {
        "feature_index": latent,
        "pos_str": promoted["tokens"],
        "pos_values": promoted["scores"],
        "neg_str": promoted["suppressed_tokens"],
        "neg_values": promoted["suppressed_scores"],
        "frac_nonzero": row["frequency"],
        "freq_hist_data_bar_values": ((edges[1:] + edges[:-1]) / 2).round(4).tolist(),
        "freq_hist_data_bar_heights": row["sentences_by_tenth"],
        "activations": activations,
        "vector": (std * direction).tolist(),
    }


def write_neuronpedia(known: Known, folder: Path, model_id: str, sae_set: str) -> int:
    """Returns the number of files."""
    _, layer, _ = known.sae.output_site.split(".")
    about = {"modelId": model_id, "source": f"{layer}-{sae_set}"}
    return _write(folder, "upload", about, (_neuronpedia_feature(known, *each) for each in known.sentences()))


def _neuronpedia_feature(known: Known, latent: int, sentences: Sequence[TopSentence]) -> dict[str, Any]:
    shown = [dict(zip(("tokens", "values"), known.shown(sentence), strict=True)) for sentence in sentences]
    meaning = known.meanings.get(latent)
    explanations = [{"text": meaning.text[:_MOST_CHARACTERS]}] if meaning else []
    density = min(1.0, max(0.0, known.latents[latent]["frequency"]))
    top, bottom = (
        [{"token": token, "value": value} for token, value in zip(row[tokens], row[scores], strict=True)][:_LOGITS]
        for row in [known.promoted[latent]]
        for tokens, scores in (("tokens", "scores"), ("suppressed_tokens", "suppressed_scores"))
    )
    found = {"index": latent, "density": density, "topLogits": top, "bottomLogits": bottom}
    return found | {"explanations": explanations, "activations": shown}


def _write(folder: Path, name: str, about: Mapping[str, Any], features: Iterator[dict[str, Any]]) -> int:
    """Files of _AT_ONCE features; each is read back and compared."""
    number, batch = 0, []

    def flush() -> None:
        nonlocal number, batch
        path, whole = folder / f"{name}-{number}.json", {**about, "features": batch}
        path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        assert json.loads(path.read_text(encoding="utf-8")) == whole, path
        number, batch = number + 1, []

    for feature in features:
        batch.append(feature)
        if len(batch) == _AT_ONCE:
            flush()
    if batch:
        flush()
    return number

"""The transcoders and SAEs of a suite, SUITE_DIR/NAME/sae.pth, by what the JSON beside each says."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from latents.origin import read_info
from llama_3.model import SITES
from pipeline.errors import InputError
from pipeline.sae_files import SaeFiles
from sae import kind_of

_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")


class Suite(NamedTuple):
    folder: str
    transcoders: dict[int, Path]  # layer -> transcoder from its ffn_norm to its mlp_out, the earliest first
    saes: dict[str, Path]  # site -> SAE of the residual stream there, the earliest first
    begin_of_text: bool | None  # whether they were trained on sentences after begin-of-text; None: not known

    def saes_at(self, patterns: Sequence[str]) -> dict[int, Path]:
        """Layer -> SAE at a site that one of the patterns, such as layers.*.resid_post, fits. Raises InputError if
        there is none, or two in a layer."""
        found: dict[int, Path] = {}
        for site, path in self.saes.items():
            layer = int(site.split(".")[1])
            if not any(fnmatchcase(site, pattern) for pattern in patterns):
                continue
            if layer in found:
                raise InputError(f"{found[layer]} and {path} are both of layer {layer}; name one with --sites.")
            found[layer] = path
        if not found:
            there = ", ".join(self.saes) or "none of the residual stream"
            raise InputError(f"{self.folder} has no SAE at {' or '.join(patterns)}; it has {there}. Name --sites.")
        return found


def find_suite(folder: str) -> Suite:
    """Raises InputError for a folder without SAEs, a broken JSON, or SAEs that do not belong together."""
    paths = sorted(Path(folder).glob("*/sae.pth"))
    if not paths:
        raise InputError(f"There is no SAE in {folder}/*/sae.pth; name the folder of a suite.")
    infos = {path: read_info(path) for path in paths}
    transcoders: dict[Any, Path] = {}
    saes: dict[Any, Path] = {}
    for path, info in infos.items():
        layer, kind = _place(info, path)
        target = kind_of(info, SaeFiles(path).json).target_site
        if target is None and kind in _RESIDUAL:
            group, key = saes, (layer, SITES.index(kind))
        elif (kind, target) == ("ffn_norm", f"layers.{layer}.mlp_out"):
            group, key = transcoders, layer
        else:
            continue
        if key in group:
            raise InputError(f"{group[key]} and {path} are both at {info['site']}; keep one of them in {folder}.")
        group[key] = path
    begins = {info["begin_of_text"]: path for path, info in infos.items() if "begin_of_text" in info}
    if len(begins) > 1:
        raise InputError(
            f"{begins[True]} was trained after begin-of-text, {begins[False]} without it; name a suite of one kind."
        )
    sites = {f"layers.{layer}.{SITES[kind]}": saes[layer, kind] for layer, kind in sorted(saes)}
    return Suite(folder, dict(sorted(transcoders.items())), sites, next(iter(begins), None))


def _place(info: dict[str, Any], path: Path) -> tuple[int, str]:
    """The layer and kind of site that a JSON names."""
    parts = str(info.get("site")).split(".")
    if len(parts) != 3 or not parts[1].isdecimal() or parts[2] not in SITES:
        raise InputError(
            f"{SaeFiles(path).json} is missing or names no site of a Llama (site: {info.get('site')}); train the SAE "
            "again."
        )
    return int(parts[1]), parts[2]

"""Where an SAE comes from, as the NAME.json beside it says: its activations, its model and that model's tokenizer."""

from pathlib import Path
from typing import Any

from latents.meanings import is_embedded
from llama_3 import load_tokenizer
from llama_3.checkpoint import TINY_LLAMA_DIR, check_files, find_checkpoint
from llama_3.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.files import read_json
from pipeline.sae_files import SaeFiles
from pipeline.source import Source


def read_info(sae_path: str | Path) -> dict[str, Any]:
    """NAME.json; empty if there is none. Raises InputError for a broken one."""
    path = Path(SaeFiles(sae_path).json)
    if not path.exists():
        return {}
    info = read_json(path, "train the SAE again.")
    if not isinstance(info, dict):
        raise InputError(f"{path} does not describe an SAE; train the SAE again.")
    return info


def source_of(sae_path: str | Path) -> Source:
    """Where the SAE's activations come from. The embedded SAE's model is the one in this project."""
    source = Source.read(read_info(sae_path), SaeFiles(sae_path).json)
    return source.with_folder("model_dir", TINY_LLAMA_DIR) if is_embedded(sae_path) else source


def tokenizer_of(source: Source, given: str | None, option: str) -> Tokenizer:
    """The model's tokenizer. Its folder may contain nothing else, but any weights in it must be the model's."""
    folder = source.folder("model_dir", given, option)
    tokenizer = load_tokenizer(folder)
    try:
        check_files(find_checkpoint(folder).weights)
    except InputError:
        return tokenizer
    source.check_model(folder, option)
    return tokenizer

"""A hand-written Llama 3: `load_model(model_dir)`, `load_tokenizer(model_dir)`. torch is imported on first use."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_3.loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str):
    if name in __all__:
        from llama_3 import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A hand-written Llama 3: `load_model(model_dir)`, `load_tokenizer(model_dir)`. torch is imported on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_3.loading import load_model
    from llama_3.tokenizer import load_tokenizer

__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from llama_3.loading import load_model

        return load_model
    if name == "load_tokenizer":
        from llama_3.tokenizer import load_tokenizer

        return load_tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

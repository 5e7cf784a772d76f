"""A tiny random model that can chat: a GGUF file with a chat template."""

from pathlib import Path
from typing import Any

from conftest import write_tiny_model

from llama_3.tokenizer import load_tokenizer, read_ranks
from support.gguf_files import write_gguf, written

# ChatML's form, with the tokens that the tiny tokenizer has.
TEMPLATE = (
    "{%- for message in messages %}{{ '<|start_header_id|>' + message.role + '\n' + message.content + '<|eot_id|>\n' }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)


def write_chat_model(folder: Path, template: str | None = TEMPLATE, chat_tokens: bool = True, **params: Any) -> Path:
    """A folder with the GGUF file of a tiny random model.

    chat_tokens: whether it has Llama 3's by their names. params: entries of its params.json.
    """
    meta = write_tiny_model(folder / "meta", **params)
    metadata: dict[str, Any] = {"tokenizer.chat_template": template}
    if not chat_tokens:
        tokenizer = load_tokenizer(str(meta))
        names = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
        ranks = read_ranks(str(meta / "tokenizer.model"))
        texts = [written(token) for token in sorted(ranks, key=ranks.__getitem__)]
        metadata["tokenizer.ggml.tokens"] = [*texts, *(f"<{i}>" for i in range(len(names)))]
    folder = folder / "chat"
    folder.mkdir()
    write_gguf(folder / "chat.gguf", meta, **metadata)
    return folder

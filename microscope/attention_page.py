"""Every attention pattern of a prompt as one HTML page, to click through; it loads nothing from elsewhere."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.files import atomic_path

_TEMPLATE = Path(__file__).with_name("attention_page.html")
MOST_BYTES = 50_000_000  # of a page; browsers become slow


def attention_html(patterns: Tensor, tokens: Sequence[str]) -> str:
    """patterns: (n_layers, n_heads, query, key) on the CPU. Raises InputError for a prompt whose page is too large."""
    n_layers, n_heads, n_tokens, _ = patterns.shape
    rows, columns = torch.tril_indices(n_tokens, n_tokens)
    n_bytes = n_layers * n_heads * len(rows) * 4 // 3
    if n_bytes > MOST_BYTES:
        raise InputError(
            f"A page with the patterns of {n_tokens:,} tokens would take {n_bytes / 1e6:.0f} MB, above the limit of "
            f"{MOST_BYTES / 1e6:.0f} MB; shorten the prompt."
        )
    seen = (patterns[:, :, rows, columns] * 255).round().to(torch.uint8)
    data = {
        "tokens": list(tokens),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "bytes": base64.b64encode(seen.numpy().tobytes()).decode(),
    }
    in_script = json.dumps(data).replace("<", "\\u003c")  # a token may be </script>
    return _TEMPLATE.read_text(encoding="utf-8").replace("DATA", in_script, 1)


def write_attention_html(path: Path | str, patterns: Tensor, tokens: Sequence[str]) -> None:
    """`attention_html` in a file, written atomically."""
    page = attention_html(patterns, tokens)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")

"""Pages of HTML that open anywhere, without server or network: what sae_report.py and sae_suite.py share."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from latents.cards import CARD_CSS
from pipeline.files import PROJECT_DIR, atomic_path


def page_html(title: str, parts: Sequence[str], script: str = "") -> str:
    style = CARD_CSS + read_part("report.css")
    return (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>\n<body><main>"
        + "\n".join(parts)
        + f"</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def read_part(name: str) -> str:
    return (PROJECT_DIR / "latents" / name).read_text(encoding="utf-8")


def picture(path: Path, about: str) -> str:
    """A PNG inside the page; nothing where there is none."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class=plot><img alt="{about}" src="data:image/png;base64,{data}"></div>'


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may not be UTF-8

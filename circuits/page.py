"""An attribution graph as one HTML page, to look through and to group by hand; it loads nothing from elsewhere."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latents.cards import CARD_CSS
from pipeline.errors import InputError
from pipeline.files import atomic_path

_TEMPLATE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
MOST_EDGES = 200_000  # of a page; browsers become slow


def page_html(graph: Mapping[str, Any], cards: Mapping[tuple[int, int], str]) -> str:
    """graph: metadata, qParams, nodes and links in circuit-tracer's schema. cards: (layer, latent) -> the HTML of
    `latents.cards.card_html`, shown where it is known. Raises InputError for a graph too large to be looked at.
    """
    if len(graph["links"]) > MOST_EDGES:
        raise InputError(
            f"A page with {len(graph['links']):,} edges would be too slow, {MOST_EDGES:,} are the limit; keep a "
            "smaller share of the influence."
        )
    (script,) = re.findall(r"<script>(.*?)</script>", _TEMPLATE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "script": f"'sha256-{digest}'",  # the browser runs this script and no other, whatever a model wrote
        "title": html.escape(f"Circuit: {graph['metadata']['prompt']}"),
        "style": CARD_CSS,
        "cards": "".join(f'<template id="card-{i}-{latent}">{card}</template>' for (i, latent), card in cards.items()),
        "data": json.dumps(graph).replace("<", "\\u003c"),  # a token may be </script>
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _TEMPLATE)


def write_page(path: Path | str, graph: Mapping[str, Any], cards: Mapping[tuple[int, int], str]) -> None:
    """`page_html` in a file, written atomically."""
    page = page_html(graph, cards)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")

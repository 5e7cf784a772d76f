"""What the tabs of the page share: clickable HTML, errors shown in a corner, how events run."""

import contextlib
import html
from collections.abc import Iterator
from typing import Any

from pipeline.errors import InputError
from serving.local_requests import past_proxies

with past_proxies():  # importing gradio makes an HTTP client, which fails with a SOCKS proxy
    import gradio as gr

# Options of events: queued, where an error becomes a sentence, or immediate, where there can be none.
QUEUED: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUICK: dict[str, Any] = {**QUEUED, "queue": False}

# A click on a link to #action-number becomes the component's select event, with that address as its value.
_CLICKS = """
element.addEventListener('click', (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link) return;
    event.preventDefault();
    trigger('select', {index: 0, value: link.getAttribute('href').slice(1)});
});
"""


def markup(value: str = "", **options: Any) -> gr.HTML:
    """HTML with clickable links (_CLICKS)."""
    return gr.HTML(value, js_on_load=_CLICKS, apply_default_css=False, **options)


@contextlib.contextmanager
def shown_in_the_page() -> Iterator[None]:
    """Bad input becomes a sentence in a corner of the page."""
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None

"""The HTML of the page's tab Microscope. Every link in it is "#action-number"."""

import html
from collections.abc import Sequence

from torch import Tensor

from llama_3.tokenizer import Tokenizer
from microscope.lens import LensLayer
from microscope.prompts import Prompt, token_text


def lens_html(tokenizer: Tokenizer, prompt: Prompt, layers: Sequence[LensLayer], chosen: int) -> str:
    """A row per layer, the last at the top, and a column per token: the likeliest next token, coloured by probability.
    Each links to #lens-number, the numbers counting through a layer's tokens, then the next layer's."""
    rows = []
    for number, layer in reversed(list(enumerate(layers))):
        cells = []
        for i, (ids, probabilities) in enumerate(zip(layer.token_ids.tolist(), layer.probabilities, strict=True)):
            share, at = float(probabilities[0]), number * len(prompt.ids) + i
            here = " class='here'" if at == chosen else ""
            text = html.escape(token_text(tokenizer, ids[0]))
            cells.append(f"<td{here} style='--a:{share:.2f}'><a href='#lens-{at}' title='{share:.2f}'>{text}</a></td>")
        rows.append(f"<tr><th>{number}</th>{''.join(cells)}</tr>")
    return _map(rows, prompt.tokens)


def lens_detail_html(tokenizer: Tokenizer, prompt: Prompt, layers: Sequence[LensLayer], chosen: int) -> str:
    """What the layer and token that are chosen would say."""
    layer, i = divmod(chosen, len(prompt.ids))
    found = layers[layer]
    said = likeliest_html(tokenizer, found.token_ids[i].tolist(), found.probabilities[i].tolist())
    about = f"entropy {found.entropy[i]:.2f}, KL to the end {found.kl[i]:.2f} nats"
    return f"<h4>After layer {layer}, on {html.escape(prompt.tokens[i])!r}</h4>{said}<p class='status'>{about}</p>"


def likeliest_html(tokenizer: Tokenizer, ids: Sequence[int], probabilities: Sequence[float]) -> str:
    items = "".join(
        f"<li style='--share:{p:.3f}'><span>{html.escape(token_text(tokenizer, i))}</span>"
        f"<span class='value'>{p:.3f}</span></li>"
        for i, p in zip(ids, probabilities, strict=True)
    )
    return f"<ul class='ranked'>{items}</ul>"


def heat_html(values: Tensor, columns: Sequence[str], action: str = "") -> str:
    """A row per layer, the last at the top: orange above zero, blue below; NaN is not computed yet.

    values: (n_layers, n_columns). action: cells link to #action-number, counted row by row from layer 0.
    """
    known = values[~values.isnan()]
    most = max(float(known.abs().max()), 1e-9) if len(known) else 1.0
    rows = []
    for layer in reversed(range(len(values))):
        cells = []
        for i, value in enumerate(values[layer].tolist()):
            if value != value:
                cells.append("<td></td>")
                continue
            link = f"<a href='#{action}-{layer * len(columns) + i}'>&nbsp;</a>" if action else "&nbsp;"
            sign = "less" if value < 0 else "more"
            depth = abs(value) / most
            cells.append(f"<td class='{sign}' style='--a:{depth:.2f}' title='{layer}, {i}: {value:.3f}'>{link}</td>")
        rows.append(f"<tr><th>{layer}</th>{''.join(cells)}</tr>")
    return _map(rows, columns)


def _map(rows: Sequence[str], columns: Sequence[str]) -> str:
    heads = "".join(f"<th>{html.escape(each)}</th>" for each in columns)
    return f"<div class='scrolled'><table class='map'>{''.join(rows)}<tr><th></th>{heads}</tr></table></div>"


def strongest_cells_html(values: Tensor, names: Sequence[str], what: str, n: int = 8) -> str:
    """The n cells of a map furthest from zero, by their names, row by row."""
    flat = values.flatten()
    order = flat.nan_to_num(0).abs().argsort(descending=True)[:n].tolist()
    items = "".join(
        f"<li><span>{html.escape(names[int(i)])}</span><span class='value'>{flat[i]:+.3f}</span></li>" for i in order
    )
    return f"<h4>{html.escape(what)}</h4><ul class='ranked'>{items}</ul>"


def frame_html(page: str, title: str) -> str:
    """A whole HTML page inside this one, with scripts but without access to it."""
    return (
        f"<iframe class='microscope' title='{title}' sandbox='allow-scripts' srcdoc=\"{html.escape(page)}\"></iframe>"
    )

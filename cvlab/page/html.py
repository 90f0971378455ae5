"""Figures, tables and texts as HTML, for every width of screen and for screen readers.

Every text is escaped here: names of classes, models and files come from strangers.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Scale:
    """What the colours of a heatmap mean: 0 at the left, `top` at the right."""

    top: float
    unit: str
    colormap: str


@dataclass(frozen=True)
class Figure:
    """A picture with its title, caption, text for screen readers, and, of a heatmap, its scale."""

    picture: Image.Image
    title: str
    caption: str
    alt_text: str = ""
    scale: Scale | None = None


def as_html(drawn: Sequence[Figure], size: str = "") -> str:
    """Figures in a grid that adapts to the width of the screen."""
    return f'<div class="figures {size}">{"".join(map(figure, drawn))}</div>'


def pairs(drawn: Sequence[tuple[str, str, Sequence[Figure]]]) -> str:
    """Pairs of figures side by side, given as (title above, text below, figures)."""
    parts = (
        f'<div class="pair"><p><strong>{html.escape(title)}</strong></p>{"".join(map(figure, two))}'
        f"<p>{html.escape(text)}</p></div>"
        for title, text, two in drawn
    )
    return f'<div class="figures pairs">{"".join(parts)}</div>'


def figure(each: Figure) -> str:
    """A figure as HTML."""
    title, caption, alt_text = (html.escape(text) for text in (each.title, each.caption, each.alt_text or each.title))
    return (
        f'<figure><img src="{source(each.picture)}" alt="{alt_text}">{scale_bar(each.scale) if each.scale else ""}'
        f"<figcaption><strong>{title}</strong><br>{caption}</figcaption></figure>"
    )


def source(picture: Image.Image) -> str:
    """A picture as the source of an <img>."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=92, subsampling=0)  # a PNG takes 70 times as long to encode
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def scale_bar(scale: Scale, stops: int = 9) -> str:
    """The colours of a heatmap from zero to its top."""
    levels = matplotlib.colormaps[scale.colormap](np.linspace(0, 1, stops))
    colors = ", ".join(matplotlib.colors.to_hex(color) for color in levels)
    bar = f'<span style="background: linear-gradient(90deg, {colors})"></span>'
    return f'<div class="scale">0 {bar} {number(scale.top)} {html.escape(scale.unit)}</div>'


def picker(picture: Image.Image, side: int, at: tuple[int, int]) -> str:
    """A picture of side x side pixels in which a place is chosen by pointer or keyboard, starting from `at`."""
    return (
        f'<div class="picker" tabindex="0" role="application" data-side="{side}" data-x="{at[0]}" data-y="{at[1]}" '
        'aria-label="Choose a place: click, drag a box, or move with the arrow keys and press Enter">'
        f'<img src="{source(picture)}" alt="The photo, grey outside the mask; an orange line around what is asked '
        'about" draggable="false"><i></i></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table. Beside a float stands a signed bar, in proportion to the largest value of its column."""
    largest = [max((abs(row[i]) for row in rows if isinstance(row[i], float)), default=0) for i in range(len(head))]

    def cell(value: object, most: float) -> str:
        if not isinstance(value, float):
            return f"<td>{html.escape(str(value))}</td>"
        width = 50 * abs(value) / most if most > 0 else 0
        left, name = (50, "for") if value >= 0 else (50 - width, "against")
        bar = f'<span class="bar"><b class="{name}" style="left: {left:.1f}%; width: {width:.1f}%"></b></span>'
        return f"<td>{value:+.3g}</td><td>{bar}</td>"

    spans = [' colspan="2"' if most else "" for most in largest]
    top = "".join(f"<th{span}>{html.escape(name)}</th>" for name, span in zip(head, spans, strict=True))
    top = f"<tr>{top}</tr>" if any(head) else ""
    lines = ("".join(cell(value, most) for value, most in zip(row, largest, strict=True)) for row in rows)
    return f'<table class="facts">{top}{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def sorted_by(orders: dict[str, Sequence[int]]) -> str:
    """A list of orders for the figures that follow: name to their indices. The first is the order they are drawn in."""
    options = "".join(
        f'<option value="{",".join(map(str, order))}">{html.escape(name)}</option>' for name, order in orders.items()
    )
    return f'<p class="sort"><label>Sorted by <select>{options}</select></label></p>'


def code_block(lines: str) -> str:
    """Lines of code with a button that copies them."""
    return f'<button class="copy">Copy</button><pre class="code" tabindex="0">{html.escape(lines)}</pre>'


def quoted(name: str) -> str:
    """A name in quotation marks, at most 99 characters of it; characters that cannot be printed are spelled out."""
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in name[:99])
    return f"\N{LEFT DOUBLE QUOTATION MARK}{shown}\N{RIGHT DOUBLE QUOTATION MARK}"


def number(value: float) -> str:
    """Three significant digits, and never fewer than stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def paragraph(text: str) -> str:
    """Plain text as HTML; an empty text gives nothing."""
    return f"<p>{html.escape(text)}</p>" if text else ""


def card_text(title: str, text: str) -> str:
    """A longer text under a title that unfolds it, shown as it was written: no Markdown or HTML in it is rendered."""
    return (
        f'<details><summary>{html.escape(title)}</summary><pre class="card" tabindex="0">{html.escape(text)}</pre>'
        "</details>"
    )

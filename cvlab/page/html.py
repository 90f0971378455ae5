"""Figures, tables and texts as HTML, for every width of screen and for screen readers.

Every text is escaped here: names of classes, models and files come from strangers.
"""

import html
from collections.abc import Sequence

from PIL import Image

from cvlab.models.model import MOST_NAMES
from cvlab.page.picture import color_bar
from cvlab.render import picture_url


def in_grid(figures: Sequence[str], size: str = "") -> str:
    """Figures in a grid that adapts to the width of the screen."""
    return f'<div class="figures {size}">{"".join(figures)}</div>'


def figure(picture: Image.Image, title: str, caption: str = "", alt_text: str = "") -> str:
    """A picture with its title, caption and text for screen readers."""
    title, caption, alt_text = (html.escape(text) for text in (title, caption, alt_text or title))
    return (
        f'<figure><img src="{picture_url(picture)}" alt="{alt_text}">'
        f"<figcaption><strong>{title}</strong><br>{caption}</figcaption></figure>"
    )


def scale_bar(top: float, unit: str, colormap: str) -> str:
    """The colours of a heatmap from zero to its top."""
    bar = f'<span style="background: {color_bar(colormap)}"></span>'
    return f'<div class="scale">0 {bar} {number(top)} {html.escape(unit)}</div>'


def bars(shares: dict[str, float], title: str, most: int = 5) -> str:
    """Shares as a table with bars, the largest first; those after the first `most` on demand."""
    ranked = [
        f'<tr><th scope="row">{html.escape(name)}</th><td><b style="width:{max(share, 0.004):.1%}"></b></td>'
        f"<td>{share:.0%}</td></tr>"
        for name, share in sorted(shares.items(), key=lambda item: -item[1])[:MOST_NAMES]
    ]
    first = f'<table class="bars"><caption>{html.escape(title)}</caption>{"".join(ranked[:most])}</table>'
    rest = f'<table class="bars">{"".join(ranked[most:])}</table>'
    return first + (folded(f"{len(shares) - most} more", rest, "more") if ranked[most:] else "")


def folded(title: str, content: str, name: str) -> str:
    """HTML under a title that unfolds it; by its name the page remembers what is open."""
    return f'<details data-name="{name}"><summary>{html.escape(title)}</summary>{content}</details>'


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
    lines = ("".join(cell(value, most) for value, most in zip(row, largest, strict=True)) for row in rows[:MOST_NAMES])
    return f'<table class="facts">{top}{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


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

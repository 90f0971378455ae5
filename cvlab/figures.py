"""Captioned pictures as HTML: what the page shows, for every width of screen and for those who cannot see them."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib
import numpy as np
from PIL import Image

from cvlab.render import COLORMAP

CSS = """
.figures {display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 12px}
.figures.large {grid-template-columns: repeat(auto-fill, minmax(220px, 1fr))}
.figures figure {margin: 0}
.figures img {width: 100%; max-height: 70vh; object-fit: contain; border-radius: 4px}
.figures figcaption {line-height: 1.35}
.scale {display: flex; gap: 6px; align-items: center}
.scale span {flex: 1; height: 10px; border-radius: 2px}
"""


@dataclass(frozen=True)
class Figure:
    """A picture with its title, caption, text for those who cannot see it, and, of a heatmap, the peak of its scale."""

    picture: Image.Image
    title: str
    caption: str
    alt_text: str = ""
    peak: float | None = None


def as_html(drawn: Sequence[Figure], size: str = "") -> str:
    """Figures as HTML that folds to the width of the screen. Every text is escaped: names come from strangers."""
    parts = []
    for each in drawn:
        buffer = BytesIO()
        each.picture.save(buffer, "JPEG", quality=90)  # PNG takes 70 times as long to encode
        source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        scale = ""
        if each.peak is not None:
            colors = ", ".join(_gradient())
            scale = f'<div class="scale">0 <span style="background: linear-gradient(90deg, {colors})"></span> '
            scale += f"peak {each.peak:.3g}</div>"
        title, caption, alt_text = (
            html.escape(text) for text in (each.title, each.caption, each.alt_text or each.title)
        )
        parts.append(
            f'<figure><img src="{source}" alt="{alt_text}">{scale}'
            f"<figcaption><strong>{title}</strong><br>{caption}</figcaption></figure>"
        )
    return f'<div class="figures {size}">{"".join(parts)}</div>'


def _gradient(stops: int = 9) -> list[str]:
    """The colours of a heatmap from zero to its peak, for a scale."""
    return [matplotlib.colors.to_hex(color) for color in matplotlib.colormaps[COLORMAP](np.linspace(0, 1, stops))]


def paragraph(text: str) -> str:
    """Plain text as HTML."""
    return f"<p>{html.escape(text)}</p>"

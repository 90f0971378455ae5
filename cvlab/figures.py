"""Captioned pictures, bars and tables as HTML: what the page shows, for every width of screen and without seeing.

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

CSS = """
.figures {display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 12px}
.figures.large {grid-template-columns: repeat(auto-fit, minmax(200px, 1fr))}
.figures.wide {grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); align-items: start}
.figures.pairs {grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 20px 16px}
.figures .pair {display: grid; grid-template-columns: 1fr 1fr; gap: 6px; align-content: start}
.figures .pair > p {grid-column: 1 / -1; margin: 0; line-height: 1.35}
.figures figure {margin: 0; min-width: 0}
.figures img {width: 100%; max-height: 70vh; object-fit: contain; border-radius: 4px}
.figures figcaption {line-height: 1.35}
.scale {display: flex; gap: 6px; align-items: center}
.scale span {flex: 1; height: 10px; border-radius: 2px; min-width: 24px}
.picker {display: block; position: relative; width: min(100%, 420px); cursor: crosshair; touch-action: pan-y;
  user-select: none; border-radius: 4px}
.picker img {width: 100%; display: block; border-radius: 4px; pointer-events: none}
.picker i {position: absolute; width: 16px; height: 16px; margin: -8px; border: 2px solid #fff; border-radius: 50%;
  outline: 2px solid #000; pointer-events: none; display: none}
.picker:focus-visible {outline: 3px solid var(--primary-500); outline-offset: 2px}
.picker:focus-visible i {display: block}
.facts.facts {border-collapse: collapse; margin: 8px 0 16px; border: 0}
.facts.facts :is(th, td) {text-align: left; padding: 4px 14px 4px 0; border: 0; overflow-wrap: break-word;
  border-bottom: 1px solid var(--border-color-primary); max-width: 60vw}
.facts .bar {position: relative; display: block; width: clamp(70px, 22vw, 220px); height: 12px}
.facts .bar b {position: absolute; top: 0; bottom: 0; background: #0072b2; border-radius: 2px}
.facts .bar b.against {background: #d55e00}
.card {white-space: pre-wrap; overflow-wrap: anywhere; max-height: 60vh; overflow-y: auto; font-size: 0.9em}
"""


@dataclass(frozen=True)
class Scale:
    """What the colours of a heatmap mean: 0 at the left, `top` at the right."""

    top: float
    unit: str
    colormap: str


@dataclass(frozen=True)
class Figure:
    """A picture with its title, caption, text for those who cannot see it, and, of a heatmap, its scale."""

    picture: Image.Image
    title: str
    caption: str
    alt_text: str = ""
    scale: Scale | None = None


def as_html(drawn: Sequence[Figure], size: str = "") -> str:
    """Figures as HTML that folds to the width of the screen."""
    return f'<div class="figures {size}">{"".join(map(figure, drawn))}</div>'


def pairs(drawn: Sequence[tuple[str, str, Sequence[Figure]]]) -> str:
    """Figures that belong together, two beside each other, under the title and above the text of the pair."""
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
    picture.save(buffer, "JPEG", quality=92, subsampling=0)  # PNG takes 70 times as long to encode
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def scale_bar(scale: Scale, stops: int = 9) -> str:
    """The colours of a heatmap from zero to its top."""
    levels = matplotlib.colormaps[scale.colormap](np.linspace(0, 1, stops))
    colors = ", ".join(matplotlib.colors.to_hex(color) for color in levels)
    bar = f'<span style="background: linear-gradient(90deg, {colors})"></span>'
    return f'<div class="scale">0 {bar} {number(scale.top)} {html.escape(scale.unit)}</div>'


def picker(picture: Image.Image, side: int, at: tuple[int, int]) -> str:
    """A picture of side x side pixels in which places are chosen by pointer or keyboard, from `at`."""
    return (
        f'<div class="picker" tabindex="0" role="application" data-side="{side}" data-x="{at[0]}" data-y="{at[1]}" '
        'aria-label="Choose a place: click, drag a box, or move with the arrow keys and press Enter">'
        f'<img src="{source(picture)}" alt="The photo, grey outside the mask; an orange line around what is asked '
        'about" draggable="false"><i></i></div>'
    )


# A click or a drag on a picker, or Enter at the cross that the arrow keys move, becomes the event "select".
PICKER_JS = """
let points = null;
const of = event => event.target.closest('.picker');
const place = (picker, event) => {
  const box = picker.getBoundingClientRect(), side = +picker.dataset.side;
  const within = share => Math.min(side - 1, Math.max(0, Math.floor(share * side)));
  return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
};
const mark = picker => {
  const cross = picker.querySelector('i'), side = +picker.dataset.side;
  cross.style.left = (+picker.dataset.x + 0.5) / side * 100 + '%';
  cross.style.top = (+picker.dataset.y + 0.5) / side * 100 + '%';
};
element.addEventListener('pointerdown', event => { if (of(event)) points = [place(of(event), event)]; });
element.addEventListener('pointermove', event => { if (of(event) && points) points.push(place(of(event), event)); });
element.addEventListener('pointercancel', () => { points = null; });
element.addEventListener('pointerup', event => {
  if (of(event) && points) trigger('select', {points: [...points, place(of(event), event)]});
  points = null;
});
element.addEventListener('focusin', event => { if (of(event)) mark(of(event)); });
element.addEventListener('keydown', event => {
  const picker = of(event), step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  if (!picker) return;
  const side = +picker.dataset.side, far = event.shiftKey ? 1 : Math.max(1, Math.round(side / 32));
  if (event.key in step) {
    const [x, y] = step[event.key];
    picker.dataset.x = Math.min(side - 1, Math.max(0, +picker.dataset.x + far * x));
    picker.dataset.y = Math.min(side - 1, Math.max(0, +picker.dataset.y + far * y));
    mark(picker);
  } else if (event.key == 'Enter' || event.key == ' ') {
    trigger('select', {points: [[+picker.dataset.x, +picker.dataset.y]]});
  } else return;
  event.preventDefault();
});
"""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; a float in it is shown as a signed bar beside its number, in proportion to the largest of its column."""
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


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def paragraph(text: str) -> str:
    """Plain text as HTML; nothing where there is none."""
    return f"<p>{html.escape(text)}</p>" if text else ""


def card_text(title: str, text: str) -> str:
    """A longer text that can be opened, as it stands: whoever wrote it, nothing of it is rendered."""
    return (
        f'<details><summary>{html.escape(title)}</summary><pre class="card" tabindex="0">{html.escape(text)}</pre>'
        "</details>"
    )

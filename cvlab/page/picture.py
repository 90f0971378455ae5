"""A photo with what a model found in it: heat, outlines and hidden parts as layers over the photo, for the browser.

The photo is sent once for all panels, up to `MAX_SIDE` pixels a side. A heatmap is a small picture that
the browser stretches over the part of the photo that the model saw. Outlines are vectors, sharp at any size. How a
layer looks stands in page.css; how strong it is, the visitor decides with a slider.
"""

import base64
import html
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO

import contourpy
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.explain import heatmap
from cvlab.models import Stage
from cvlab.render import relative_heat
from cvlab.transforms import Box
from cvlab.trust import hottest_part

MAX_SIDE = 1024  # pixels of a photo
HEAT_SIDE = 128  # pixels of a layer of heat
FINEST = 64  # positions of a map that are drawn apart; of finer ones each shows the largest of those that it covers
HOW = "Choose a place: click, drag, or move with the arrow keys and press Enter"
NO_HEAT = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="  # one pixel, see-through


def outline(levels: np.ndarray, level: float, box: Box) -> str:
    """The edge of what lies above a level, each part closed, as the path of an SVG in thousandths of the photo.

    Args:
        levels: (h, w) >= 0.
        level: over 0.
        box: where the levels lie in the photo.
    """
    rows, columns = levels.shape
    padded = np.pad(levels, 1)  # what reaches the border is closed along it
    parts, offsets = contourpy.contour_generator(z=padded, fill_type="OuterOffset").filled(level, np.inf)
    path = ""
    for points, ends in zip(parts, offsets, strict=True):
        shares = np.clip((points - 0.5) / (columns, rows), 0, 1) * box[2:] + box[:2]
        for line in np.split((1000 * shares).round(1), ends[1:-1].astype(int)):
            path += "M" + "L".join(f"{x:g} {y:g}" for x, y in line) + "Z"
    return path


def hottest_edge(attribution: Tensor, box: Box, stage: Stage | None = None) -> str:
    """The edge of the hottest tenth of a map, which sentence and check speak of; empty for a blank map."""
    side = max(HEAT_SIDE, *attribution.shape[-2:])
    heat = heatmap(attribution, (side, side), stage)
    if not (heat > 0).any():
        return ""
    heat = heat / heat.max()
    least = heat[0, 0][hottest_part(heat, 0.1)].min().item()
    return outline(heat[0, 0].numpy(), least * (1 - 1e-6), box)


def heat_layer(attribution: Tensor, colormap: str, stage: Stage | None = None, share: float = 1.0) -> str:
    """The positive part of a map, divided by its maximum: a PNG, see-through where there is none.

    `share` is what its maximum is of the maximum of several maps that have one scale.
    """
    side = max(HEAT_SIDE, *attribution.shape[-2:])
    heat = relative_heat(attribution, (side, side), stage)
    if max(attribution.shape[-2:]) > FINEST:
        heat = F.adaptive_max_pool2d(torch.from_numpy(heat)[None], FINEST)[0].numpy()
    levels = Image.fromarray(np.uint8(np.round(255 * share * heat)))
    palette = _palette(colormap)
    levels.putpalette(palette[:, :3].tobytes())
    return _source(levels, transparency=palette[:, 3].tobytes())


def difference_layer(difference: np.ndarray) -> str:
    """A difference (H, W) in [-1, 1] as a PNG: orange above zero, blue below, see-through at zero.

    Orange and blue differ for every kind of colour-blindness (Okabe and Ito, "Color Universal Design", 2002).
    """
    colours = np.where(difference[..., None] < 0, (0, 114, 178), (230, 159, 0))
    opacity = _palette("inferno")[np.uint8(255 * abs(difference)), 3]
    return _source(Image.fromarray(np.uint8(np.dstack([colours, opacity]))))


def _source(picture: Image.Image, **options: object) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=4, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@lru_cache
def _palette(colormap: str) -> np.ndarray:
    """Colours and opacities of 256 levels. Weak evidence is faint: in dark colours it were a fog over the photo."""
    colours = matplotlib.colormaps[colormap](np.linspace(0.3, 1, 256))
    ramp = np.clip(np.linspace(0, 1, 256) / 0.6, 0, 1)
    colours[:, 3] = ramp**2 * (3 - 2 * ramp)
    return np.uint8(np.round(255 * colours))


def color_bar(colormap: str) -> str:
    """The colours of a heatmap from zero to its top, as a background of CSS."""
    stops = (f"rgba({r} {g} {b} / {a / 255:.2f})" for r, g, b, a in _palette(colormap)[::32])
    return f"linear-gradient(90deg, {', '.join(stops)})"


def layers(
    label: str,
    box: Box = (0, 0, 1, 1),
    heat: str = NO_HEAT,
    lines: Sequence[tuple[str, str]] = (),
    picks: int = 0,
    at: tuple[int, int] = (0, 0),
) -> str:
    """Layers over the photo that `with_photo` gives.

    Args:
        label: what the picture shows, for a screen reader.
        box: the part of the photo that the model saw.
        heat: the source of the heatmap's layer.
        lines: (class of page.css, path) in the order they are drawn.
        picks: pixels of the view's side, where a place can be chosen in the picture by pointer or keys; else 0.
        at: the place to begin from.
    """
    label, keys, place = html.escape(label), "", ""
    if box[2] < 1 or box[3] < 1:
        place = 'style="left:{:.2%};top:{:.2%};width:{:.2%};height:{:.2%}"'.format(*box)
        x, y, width, height = (round(1000 * each, 1) for each in box)
        lines = (("unseen", around(f"M{x} {y}h{width}v{height}h-{width}Z")), *lines)
    if picks:
        keys = f' tabindex="0" role="application" aria-label="{label}. {HOW}" data-side="{picks}" '
        keys += f'data-x="{at[0]}" data-y="{at[1]}"'
    paths = "".join(f'<path class="{name}" d="{path}"/>' for name, path in lines if path)
    return (
        f'<div class="pic{" flat" if heat == NO_HEAT else ""}{" picker" if picks else ""}"{keys}>'
        f'<img class="heat" src="{heat}" alt="{label}" draggable="false" {place}>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>'
        f"{'<i></i>' if picks else ''}</div>"
    )


def cased(name: str, path: str) -> tuple[tuple[str, str], ...]:
    """A line on a wider black one, which is seen on any photo."""
    return (("case", path), (name, path))


def legend(classes: Sequence[tuple[str, str, str]]) -> str:
    """A list of outlines that the browser turns on and off: (class of page.css, name of the class, share) of each."""
    boxes = "".join(
        f'<label class="{line}"><input type="checkbox" checked name="{html.escape(name)}" value="{line}">'
        f"<i></i>{html.escape(name)} {share}</label>"
        for line, name, share in classes
    )
    return f'<div class="legend" role="group" aria-label="Outlines that are shown">{boxes}</div>'


def heated(attribution: Tensor, stage: Stage | None, box: Box, label: str, colormap: str, spot: bool) -> str:
    """A heatmap over the part of the photo that the model saw, and with `spot` the edge of its hottest tenth."""
    mark = hottest_edge(attribution, box, stage) if spot else ""
    return layers(label, box, heat_layer(attribution, colormap, stage), cased("edge", mark))


def around(edge: str) -> str:
    """All of the photo but what an edge encloses."""
    return "M0 0H1000V1000H0Z" + edge


def slider(right: str, strength: float) -> str:
    """A slider from the photo to its layers. It moves them in all tabs, without asking the server."""
    return (
        f'<label class="fade"><span>Photo</span><input type="range" min="0" max="100" value="{100 * strength:.0f}" '
        f'aria-label="From the photo to {right.lower()}"><span>{right}</span></label>'
    )


def captioned(picture: str, title: str, caption: str, bar: str = "") -> str:
    """A picture with its caption and a button that enlarges it; `bar` is HTML between picture and caption."""
    strong = f"<strong>{html.escape(title)}</strong> " if title else ""
    return (
        f"<figure>{picture}{bar}<figcaption>{strong}{html.escape(caption)} "
        f'<button class="enlarge" aria-label="Enlarge or save: {html.escape(title or caption)}">Enlarge</button>'
        "</figcaption></figure>"
    )


def with_photo(content: str, layout: str = "", style: str = "") -> str:
    """Pictures over the visitor's photo, or over another one: its `Prediction.photo` as the style."""
    return f'<div class="photos {layout}" style="{style}">{content}</div>'

"""Changes of a part of a photo: it is erased, darkened, turned, cut out and pasted elsewhere.

A part is a box, written like the points of a question: "x,y x,y", two corners in thousandths of the photo.
"""

import math
from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageFilter

from cvlab.page.question import parse_points
from cvlab.render import to_picture
from cvlab.transforms import Box, to_float, to_uint8
from cvlab.trust import hide

SIDE = 1000  # a part's corners are whole thousandths of the photo
FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "Darken": lambda part: ImageEnhance.Brightness(part).enhance(0.35),
    "Blur": lambda part: part.filter(ImageFilter.GaussianBlur(max(part.size) / 8)),
    "Turn": lambda part: part.transpose(Image.Transpose.ROTATE_180),
    "Recolour": lambda part: Image.merge("RGB", part.split()[1:] + part.split()[:1]),
}
DONE = {  # what each tool does, as the history says it
    "Erase": "erased",
    "Darken": "darkened",
    "Blur": "blurred",
    "Turn": "turned upside down",
    "Recolour": "recoloured",
    "Cut": "cut out",
    "Paste": "pasted over",
}
PAINTED = 256  # pixels a side at which an erased part is painted in: the colours around it are blurred anyway
FEWEST = 4  # pixels of a part's side


def box_of(part: str) -> Box:
    """Left, top, width and height of a part, in shares of the photo; ValueError if none was chosen."""
    if not part:
        raise ValueError("Choose a part of the photo first: click it, or drag from one corner to the other.")
    (x1, y1), (x2, y2) = parse_points(part)[-2:]
    left, top = min(x1, x2), min(y1, y2)
    return left / SIDE, top / SIDE, (max(x1, x2) - left) / SIDE, (max(y1, y2) - top) / SIDE


def chosen(points: list, size: float) -> str:
    """The part that a drag goes over; after a click the square around the place, `size` percent of the sides large."""
    first, last = ([min(max(int(value), 0), SIDE) for value in point] for point in (points[0], points[-1]))
    if math.dist(first, last) <= SIDE / 50:
        half = round(SIDE * size / 200)
        middle = [min(max(value, half), SIDE - half) for value in last]  # all of it is in the photo
        first, last = [value - half for value in middle], [value + half for value in middle]
    return "{},{} {},{}".format(*first, *last)


def frame_of(part: str) -> str:
    """The edge of a part, as the path of an SVG in thousandths of the photo."""
    left, top, width, height = (round(SIDE * share) for share in box_of(part))
    return f"M{left} {top}h{width}v{height}h-{width}Z"


def pixels_of(part: str, photo: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part in pixels of a photo."""
    left, top, width, height = (round(share * side) for share, side in zip(box_of(part), 2 * photo.size, strict=True))
    left, top = min(left, photo.width - FEWEST), min(top, photo.height - FEWEST)
    return left, top, left + max(width, FEWEST), top + max(height, FEWEST)


def changed(photo: Image.Image, tool: str, part: str, clipboard: Image.Image | None = None) -> Image.Image:
    """The photo with a part changed by a tool of `DONE`; what is pasted is made as large as the part."""
    left, top, right, bottom = pixels_of(part, photo)
    if tool == "Paste":
        if clipboard is None:
            raise ValueError("Copy or cut a part first, of this photo or of another one; then choose where it goes.")
        inside = clipboard.resize((right - left, bottom - top))
    elif tool in FILTERS:
        inside = FILTERS[tool](photo.crop((left, top, right, bottom)))
    else:
        inside = painted_in(photo, part)
    photo = photo.copy()
    photo.paste(inside, (left, top))
    return photo


def painted_in(photo: Image.Image, part: str) -> Image.Image:
    """What stands in a part when it is erased: the colours around it."""
    coarse = photo.copy()
    coarse.thumbnail((PAINTED, PAINTED))
    left, top, right, bottom = pixels_of(part, coarse)
    hidden = torch.zeros(1, 1, coarse.height, coarse.width, dtype=torch.bool)
    hidden[..., top:bottom, left:right] = True
    painted = to_picture(hide(to_float(to_uint8(coarse))[None], hidden)).crop((left, top, right, bottom))
    whole = pixels_of(part, photo)
    return painted.resize((whole[2] - whole[0], whole[3] - whole[1]))

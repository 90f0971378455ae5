"""Names of classes and files in pictures: shown as they are, in an installed font that has their characters."""

import warnings
from collections.abc import Iterable
from functools import lru_cache

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, fontManager, get_font
from matplotlib.text import Text
from PIL import ImageFont


def prepared(figure: Figure) -> Figure:
    """The figure itself, with every text plain, so that a dollar begins no formula, and in fonts for its characters.

    Warns where no installed font has a character: it becomes a box.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_majorticklabels()  # makes them, as they are else made while the figure is drawn
    texts = figure.findobj(Text)
    if missing := without_glyphs(text.get_text() for text in texts):
        warnings.warn(missing, stacklevel=2)
    for text in texts:
        text.set_parse_math(False)
        name = text.get_text()
        if not name.isascii():
            text.set_text(name.encode("utf-8", "backslashreplace").decode())  # bytes of a file's name
            others = {font.name for font in map(font_with, sorted(set(name))) if font}
            text.set_fontfamily([*matplotlib.rcParams["font.family"], *sorted(others)])
    return figure


def without_glyphs(names: Iterable[str]) -> str:
    """A sentence about characters of names that no installed font has, and what to do; empty if there are none."""
    characters = {c for name in names for c in name if c.isprintable() and not c.isascii()}
    missing = "".join(sorted(c for c in characters if not _usual_font_has(c) and font_with(c) is None))
    if not missing:
        return ""
    return (
        f"No installed font has the characters {missing[:20]}: they are boxes in pictures. Install one that has them, "
        "such as the package fonts-noto-cjk for Chinese, Japanese and Korean."
    )


def pillow_font(text: str) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """A small font for a text that Pillow draws."""
    foreign = [c for c in text if not c.isascii()]
    if not foreign:
        return ImageFont.load_default()
    other = next((font for font in map(font_with, foreign) if font), None)
    return ImageFont.truetype(other.fname if other else findfont(None), 10)


@lru_cache
def font_with(character: str) -> FontEntry | None:
    """An installed font that has a character which the usual one lacks; None where it does not, or there is none."""
    if _usual_font_has(character):
        return None
    for font in fontManager.ttflist:
        if "Last Resort" not in font.name and _has(font.fname, character):  # its glyphs are boxes
            return font
    return None


def _usual_font_has(character: str) -> bool:
    return not character.isprintable() or _has(findfont(None), character)


def _has(path: str, character: str) -> bool:
    try:
        return get_font(path).get_char_index(ord(character)) > 0
    except (OSError, RuntimeError):  # a font that cannot be opened
        return False

"""Names of classes and files in pictures: shown as they are, in an installed font that has their characters."""

import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, fontManager, get_font
from matplotlib.text import Text


def prepared(figure: Figure) -> Figure:
    """The figure itself, with every text plain, so that a dollar begins no formula, and in fonts for its characters.

    Warns where no installed font has a character: it becomes a box.
    """
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        axis.get_majorticklabels()  # makes them, as they are else made while the figure is drawn
    texts = figure.findobj(Text)
    if missing := without_glyphs(text.get_text() for text in texts):
        warnings.warn(missing, stacklevel=2)
    for text in texts:
        text.set_parse_math(False)
        if not text.get_text().isascii():
            text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())  # bytes of a file's name
            others = sorted({font.name for font in _fonts_of(text.get_text()) if font})
            text.set_fontfamily([*matplotlib.rcParams["font.family"], *others])
    return figure


def without_glyphs(names: Iterable[str]) -> str:
    """A sentence about characters of names that no installed font has, and what to do; empty if there are none."""
    missing = "".join(c for c in sorted(set("".join(names))) if _fonts_of(c) == [None])
    if not missing:
        return ""
    return (
        f"No installed font has the characters {missing[:20]}: they are boxes in pictures. Install one that has them, "
        "such as the package fonts-noto-cjk for Chinese, Japanese and Korean."
    )


def _fonts_of(text: str) -> list[FontEntry | None]:
    """The font of each character that is not plain ASCII; None where there is none."""
    return [font_with(c) for c in text if c.isprintable() and not c.isascii()]


@lru_cache
def font_with(character: str) -> FontEntry | None:
    """An installed font that has a character, the usual one where it can; None if there is none."""
    for font in sorted(fontManager.ttflist, key=lambda font: font.fname != findfont(None)):
        with suppress(OSError, RuntimeError):  # fonts that cannot be opened
            if "Last Resort" not in font.name and get_font(font.fname).get_char_index(ord(character)):  # it has boxes
                return font
    return None

"""Names of classes and files in pictures: shown as they are, in an installed font that has their characters."""

import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text


def prepared(figure: Figure) -> Figure:
    """The figure itself, with every text plain, so that a dollar begins no formula, and in fonts for its characters.

    Warns where no installed font has a character: it becomes a box.
    """
    for axis in figure.findobj(Axis):
        axis.get_majorticklabels()  # makes them, as they are else made while the figure is drawn
    texts = figure.findobj(Text)
    characters = set("".join(text.get_text() for text in texts))
    if missing := without_glyphs(characters):
        warnings.warn(missing, stacklevel=2)
    others = sorted({font for font in map(font_with, characters) if font})
    for text in texts:
        text.set(parse_math=False, fontfamily=[*matplotlib.rcParams["font.family"], *others])
        text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())  # bytes of a file's name
    return figure


def without_glyphs(names: Iterable[str]) -> str:
    """A sentence about characters of names that no installed font has, and what to do; empty if there are none."""
    missing = "".join(character for character in sorted(set("".join(names))) if font_with(character) is None)
    return missing and (
        f"No installed font has the characters {missing[:20]}: they are boxes in pictures. Install one that has them, "
        "such as the package fonts-noto-cjk for Chinese, Japanese and Korean."
    )


@cache
def font_with(character: str) -> str | None:
    """The name of an installed font that has a character, the usual one where it can; None if there is none."""
    usual = findfont(None)
    for font in sorted(fontManager.ttflist, key=lambda font: font.fname != usual):
        with suppress(OSError, RuntimeError):  # fonts that cannot be opened
            found = get_font(font.fname).get_char_index(ord(character)) or not character.isprintable()
            if found and "Last Resort" not in font.name:  # which has a box for every character
                return font.name
    return None

"""An answer as one HTML file that opens anywhere, without the page and without a network."""

import base64
import html
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

CSS = Path(__file__).with_name("page.css")
# What works only on the page is hidden, and all that is folded there is open.
ON_PAPER = """body {font: 16px/1.5 system-ui; background: var(--page); color: var(--ink); max-width: 60rem;
margin: auto; padding: 1rem} .enlarge, .copy, .fade, .ask {display: none} .main {--high: 30rem}
img {border-radius: 4px}"""
PACKAGES = "torch", "torchvision", "timm", "captum"


def document(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document of parts that are HTML, with the date and the versions that made them."""
    made = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
    content, title = "".join(parts).replace("<details", "<details open"), html.escape(title)
    note = f"{title}, by cvlab on {time.strftime('%Y-%m-%d')} with {made}."
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{CSS.read_text("utf-8")}{ON_PAPER}</style>
<main>{content}<p class="note">{note}</p></main></html>
"""


def download(text: str, name: str) -> str:
    """A link that saves a text as a file of this name."""
    content, name = base64.b64encode(text.encode()).decode(), html.escape(name)
    return f'<a class="download" download="{name}" href="data:text/html;base64,{content}">{name}</a>'

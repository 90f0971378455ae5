"""How the benchmarks print their tables into README.md beside them."""

import statistics
import time
from pathlib import Path

import torch

README = Path(__file__).resolve().parent / "README.md"


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the quartiles in brackets."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hardware() -> str:
    """Processor and threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    (model,) = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return f"{model}, {torch.get_num_threads()} threads"


def inserted(text: str, mark: str, page: str) -> str:
    """The README's text with a page, dated today, between <!-- mark --> and <!-- /mark -->."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
    before, rest = text.split(start)
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return before + start + f"\nMeasured on {day}.\n\n" + page.lstrip("\n") + "\n" + end + rest.split(end)[1]

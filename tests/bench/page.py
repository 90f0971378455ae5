"""How fast the page answers and how steady it stays, with 64 visitors in front of it.

python tests/bench/page.py                   print the tables; about ten minutes on two cores that do nothing else
python tests/bench/page.py --json FILE       the figures behind them too
python tests/bench/page.py --write           put the tables into tests/bench/README.md
python tests/bench/page.py --quick           one model, a few requests: whether it runs

The page is `python app.py` in a process of its own, asked over HTTP as a browser does: a photo is uploaded, the answer
to it is queued for, and read when it is there with all that the tabs Predict and Grad-CAM show. What takes more passes,
the verdict and the stages of a U-Net, comes later. Every photo is another one, a JPEG of 512 x 512 pixels, so nothing
is answered from memory.

One upload   against the round trip of an identity app (Gradio hands the same upload back as it is) plus the model's
             pass (one forward and one backward, in this process), all three timed in turn: over HTTP alone, and in a
             Chromium, from the choice of the file until the answer is drawn
A crowd      64 photos of as many visitors, sent in the same moment, against the ideal queue: one answered after the
             other without a gap, each as fast as for a visitor alone
First page   from the start of the process until the page arrives
Memory       resident memory of the process while it answers 500 photos, with 16 MiB for answers kept instead of the
             usual 512, so that these fill up at once
"""

import argparse
import asyncio
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path

import httpx
import torch
from playwright.sync_api import Page, expect, sync_playwright
from tables import README, hardware, inserted, spread, table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import METHODS, default_stage, explain, predicted_score
from cvlab.transforms import open_image, view

MODELS = ("flowers", "horses", "shapes-classifier", "shapes-segmenter")
SIDE = 512  # pixels of a photo
CLIENTS = 64
IDENTITY = """
import sys
import gradio as gr
with gr.Blocks(analytics_enabled=False) as page:
    photo, back = gr.Image(type="filepath"), gr.Image(type="filepath", elem_id="back")
    photo.change(lambda photo: photo, photo, back)
page.queue().launch(server_port=int(sys.argv[1]), quiet=True, ssr_mode=False)
"""
FEW_KEPT = """
import sys
import app
from cvlab.page import visit
visit.MAX_BYTES = 16 * 2**20
app.launch(app.build_page(app.Models(app.offered_models(app.ROOT, []))), server_port=int(sys.argv[1]), quiet=True)
"""
# In a browser: the milliseconds from the choice of a file until another picture than before is there.
ANSWERED = """
selector => {
  const found = () => [...document.querySelectorAll(selector)].find(each => each.offsetParent);
  const before = found()?.outerHTML;
  const shown = () => {
    const pictures = found() ? [found(), ...found().querySelectorAll('img')] : [];
    return pictures.length && found().outerHTML != before && pictures.every(each => each.complete ?? true);
  };
  document.addEventListener('change', () => { window.begun = performance.now(); }, {capture: true, once: true});
  window.answered = new Promise(resolve => {
    const look = () => shown() ? resolve(performance.now() - window.begun) : requestAnimationFrame(look);
    look();
  });
}
"""
CHROMIUM = shutil.which("chromium")
seeds = count(10_000)


class Visitor:
    """What a browser does with a page of Gradio: uploads a photo, and calls what is called when the photo changes.

    It is one session: what Gradio prepares for a new one happens when the page is opened, before the first photo.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = random.randbytes(8).hex()
        config = httpx.get(f"{url}/config", timeout=60).json()
        photo = min(each["id"] for each in config["components"] if each["type"] == "image")
        self.called = next(each for each in config["dependencies"] if [photo, "change"] in each["targets"])
        found = {each["id"]: each["props"] for each in config["components"]}
        self.values = {number: found[number].get("value") for number in self.called["inputs"]}
        self.photo = photo
        self.model = next((number for number in self.values if found[number].get("label") == "Model"), None)

    async def ask(self, client: httpx.AsyncClient, photo: bytes, model: str | None = None) -> dict:
        """Uploads and asks; the answer with all that is shown."""
        uploaded = await client.post(f"{self.url}/gradio_api/upload", files={"files": ("photo.jpg", photo)})
        values = self.values | {self.photo: {"path": uploaded.json()[0], "meta": {"_type": "gradio.FileData"}}}
        if model:
            values[self.model] = model
        asked = {"fn_index": self.called["id"], "data": list(values.values()), "session_hash": self.session}
        (await client.post(f"{self.url}/gradio_api/queue/join", json=asked)).raise_for_status()
        async with client.stream("GET", f"{self.url}/gradio_api/queue/data?session_hash={self.session}") as lines:
            async for line in lines.aiter_lines():
                if '"process_completed"' in line:
                    answer = json.loads(line.removeprefix("data:"))
                    assert answer["success"], answer
                    return answer["output"]
        raise RuntimeError(f"{self.url} closed the queue without an answer")

    async def time(self, client: httpx.AsyncClient, photo: bytes, model: str | None = None) -> float:
        """Seconds until the answer is there; pictures that it only names are fetched, as a browser does."""
        begun = time.perf_counter()
        answer = await self.ask(client, photo, model)
        if model is None:
            (await client.get(answer["data"][0]["url"])).raise_for_status()
        return time.perf_counter() - begun


@contextmanager
def served(*command: str) -> Iterator[tuple[str, subprocess.Popen, float]]:
    """A server in a process of its own: its address, the process, and the seconds until its first page arrived."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    begun = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen([sys.executable, *command, port], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/", timeout=60).raise_for_status()
                break
            except httpx.TransportError:
                if server.poll() is not None:
                    raise
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}", server, time.perf_counter() - begun
    finally:
        server.terminate()
        server.wait()


def photos(number: int) -> list[bytes]:
    """JPEGs that no one has sent before."""
    files = []
    for seed in (next(seeds) for _ in range(number)):
        buffer = io.BytesIO()
        shapes.scene(seed, SIDE).image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def pass_seconds(model: torch.nn.Module, photo: bytes) -> float:
    """One forward and one backward pass with the maps that the page needs."""
    images = view(open_image(io.BytesIO(photo)), model)
    stages = [default_stage(model)] if model.task == "classification" else None
    begun = time.perf_counter()
    with suppress(ValueError):  # nothing was found; the page predicts once more, without gradients
        explain(model, images, predicted_score(model), stages, tuple(METHODS))
    return time.perf_counter() - begun


async def measure_upload(page: Visitor, identity: Visitor, name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn."""
    model = checkpoint.load(ROOT / "checkpoints" / name)
    times: dict[str, list[float]] = {"page": [], "identity": [], "pass": []}
    async with httpx.AsyncClient(timeout=120) as client:
        for i, photo in enumerate(photos(rounds + 2)):
            each = {
                "page": await page.time(client, photo, name),
                "identity": await identity.time(client, photo),
                "pass": pass_seconds(model, photo),
            }
            if i >= 2:  # the first ones load and warm up
                for key, seconds in each.items():
                    times[key].append(seconds)
    return times


def choose(page: Page, file: Path, pictures: str) -> float:
    """Seconds from the choice of a photo, in place of the one that is there, until a picture of the answer is drawn.

    Args:
        pictures: a CSS selector of pictures, or of what holds them.
    """
    if page.get_by_label("Remove Image").first.is_visible():
        page.get_by_label("Remove Image").first.click()
        expect(page.locator(pictures).filter(visible=True)).to_have_count(0)
    page.evaluate(ANSWERED, pictures)
    page.locator("input[type=file]").first.set_input_files(file)
    return page.evaluate("window.answered") / 1000


def measure_in_browser(url: str, identity: str, name: str, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of the page, the identity app and the model's pass, in turn."""
    model = checkpoint.load(ROOT / "checkpoints" / name)
    times: dict[str, list[float]] = {"page": [], "identity": [], "pass": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        visited, handed_back = browser.new_page(), browser.new_page()
        visited.goto(f"{url}/?model={name}")
        expect(visited.locator(".photos").filter(visible=True).first).to_be_visible(timeout=30_000)
        handed_back.goto(identity)
        checked = visited.locator("#chip .chip svg, #chip .ask")  # the verdict, or the button that asks for it
        for i, photo in enumerate(photos(rounds + 2)):
            file = folder / f"{i}.jpg"
            file.write_bytes(photo)
            each = {"page": choose(visited, file, ".photos")}
            # What the page works out afterwards, such as the verdict, is not to slow down the others.
            checked.or_(visited.get_by_text("found.")).first.wait_for(timeout=60_000)
            each |= {
                "identity": choose(handed_back, file, "#back img"),
                "pass": pass_seconds(model, photo),
            }
            if i >= 2:  # the first ones load and warm up
                for key, seconds in each.items():
                    times[key].append(seconds)
        browser.close()
    return times


async def measure_crowd(crowd: list[Visitor], name: str, rounds: int) -> list[list[float]]:
    """Seconds of every visitor, for each round; all have had an answer before."""
    limits, times = httpx.Limits(max_connections=None), []
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        for _ in range(rounds + 1):
            sent = zip(crowd, photos(len(crowd)), strict=True)
            times.append(list(await asyncio.gather(*(each.time(client, photo, name) for each, photo in sent))))
    return times[1:]


async def measure_memory(
    crowd: list[Visitor], server: subprocess.Popen, names: list[str], requests: int
) -> dict[int, float]:
    """MiB of the server after so many requests, by all of the crowd at once."""
    found = {}
    async with httpx.AsyncClient(timeout=120) as client:
        while (done := max(found, default=0)) < requests:
            sent = enumerate(zip(crowd, photos(len(crowd)), strict=True))
            await asyncio.gather(*(each.time(client, photo, names[i % len(names)]) for i, (each, photo) in sent))
            found[done + len(crowd)] = resident(server.pid)
    return found


def resident(pid: int) -> float:
    """MiB in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def measure(quick: bool) -> dict:
    """All figures; see the docstring above."""
    names = list(MODELS[2:3] if quick else MODELS)
    rounds, crowds, clients, requests, starts = (3, 1, 4, 8, 1) if quick else (25, 3, CLIENTS, 504, 3)
    figures: dict = {
        "hardware": hardware(),
        "versions": {key: version(key) for key in ("gradio", "torch")},
        "clients": clients,
        "starts": [],
        "upload": {},
        "browser": {},
        "crowd": {},
    }
    page_command, few_kept = ("app.py", "--port"), ("-c", FEW_KEPT)
    for _ in range(starts - 1):
        with served(*page_command) as (_, _, seconds):
            figures["starts"].append(seconds)
    with (
        served(*(few_kept if quick else page_command)) as (url, server, seconds),
        served("-c", IDENTITY) as (identity, _, _),
        tempfile.TemporaryDirectory() as folder,
    ):
        figures["starts"].append(seconds)
        page, back, crowd = Visitor(url), Visitor(identity), [Visitor(url) for _ in range(clients)]
        for name in names:
            figures["upload"][name] = asyncio.run(measure_upload(page, back, name, rounds))
            if CHROMIUM:
                figures["browser"][name] = measure_in_browser(url, identity, name, rounds, Path(folder))
            figures["crowd"][name] = asyncio.run(measure_crowd(crowd, name, crowds))
        if quick:
            figures["memory"] = asyncio.run(measure_memory(crowd, server, names, requests))
    if not quick:
        with served(*few_kept) as (url, server, _):
            crowd = [Visitor(url) for _ in range(8)]
            figures["memory"] = asyncio.run(measure_memory(crowd, server, names, requests))
    return figures


def upload_ratios(times: dict[str, list[float]]) -> list[float]:
    """The page as a multiple of identity app plus pass, of each round."""
    return [page / (app + step) for page, app, step in zip(*times.values(), strict=True)]


def crowd_ratio(crowds: list[list[float]], alone: float) -> float:
    """The 95th percentile of the clients' times as a multiple of the ideal queue's."""
    ideal = [alone * (i + 1) for i in range(len(crowds[0]))]
    return percentile_95([seconds for crowd in crowds for seconds in crowd]) / percentile_95(ideal)


def percentile_95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def tables(figures: dict) -> str:
    """What stands between the marks in tests/bench/README.md."""
    rows, crowd_rows = [], []
    for name, times in figures["upload"].items():
        for way, each in (("in Chromium", figures["browser"].get(name)), ("over HTTP", times)):
            if each:
                medians = [f"{1000 * statistics.median(seconds):.0f}" for seconds in each.values()]
                rows.append([name, way, *medians, spread(upload_ratios(each))])
        crowds = figures["crowd"][name]
        together = [seconds for crowd in crowds for seconds in crowd]
        ratio = crowd_ratio(crowds, statistics.median(times["page"]))
        crowd_rows.append([name, f"{percentile_95(together):.2f}", f"{ratio:.2f}"])
    head = ["model", "", "upload to all answers, ms", "identity app, ms", "the model's pass, ms", "multiple of both"]
    crowd_head = ["model", f"95% of {figures['clients']} at once answered within s", "multiple of the ideal queue"]
    memory = list(figures["memory"].items())
    shown = [memory[round(i * (len(memory) - 1) / 4)] for i in range(5)]
    versions = ", ".join(f"{key} {number}" for key, number in figures["versions"].items())
    parts = [
        f"On {figures['hardware']}, {versions}; every photo is another one, 512 x 512 pixels. Medians of "
        f"{len(next(iter(figures['upload'].values()))['page'])} rounds, with quartiles.",
        table(head, rows),
        table(crowd_head, crowd_rows),
        f"The first page arrives {max(figures['starts']):.1f} s after the start (the slowest of "
        f"{len(figures['starts'])}). Resident memory while photos are answered, eight at a time:",
        table(["photos", *(str(done) for done, _ in shown)], [["MiB", *(f"{mib:.0f}" for _, mib in shown)]]),
        "`python tests/bench/page.py` measures this and says how.",
    ]
    return "\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, a few requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--write", action="store_true", help="put the tables into tests/bench/README.md")
    options = parser.parse_args()
    figures = measure(options.quick)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    if options.write:
        README.write_text(inserted(README.read_text(), "bench-page", tables(figures)))
    print(tables(figures))


if __name__ == "__main__":
    main()

"""Whatever is sent, the answer is a result or a sentence of the project: inputs made by hypothesis, from a seed.

python tests/bench/fuzz.py                           2,000 inputs of six kinds, as a Markdown table
python tests/bench/fuzz.py --examples 300 --seed 1 --json FILE

An input is a fault if it ends in another exception, in text that is no sentence, or beyond the limits below of time or
of memory. Memory is the growth of the process's peak (VmHWM), which is set back before each input: unlike tracemalloc
it sees what torch and the decoders take.
"""

import argparse
import io
import json
import math
import random
import re
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]  # the repository root: cvlab needs no installation

import gradio as gr
from tables import table

import app
from cvlab import checkpoint
from cvlab.data.masks import read_mask
from cvlab.data.parts import classification_parts, segmentation_parts
from cvlab.models import build
from cvlab.page.host import sentence_of
from cvlab.page.models import Models
from cvlab.page.panels import PANELS, draw
from cvlab.page.question import Question
from cvlab.page.upload import Sent, path_of
from cvlab.page.visit import Visits
from cvlab.transforms import open_image

INTERNALS = re.compile(r"Traceback|\b0x[0-9a-f]+|\.(cpp|h|py):\d|Exception raised from")  # no words of the project
SECONDS, MIB = 10.0, 1024  # of one input at most: processor time, and growth of the peak
NAMES = ["cat", "dog"]
NUMBERS = st.one_of(
    st.floats(),
    st.floats(0, 1),
    st.integers(),
    st.integers(1, 64),
    st.sampled_from([0, 1, -1, 5e-324, 1e-9, 0.003, 1e30, 1e308, 2**31, 10**30, 4096]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SMP = {"_model_class": "Unet", "encoder_name": "resnet18", "classes": 1, "decoder_channels": [8] * 5}
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "PPM")
ODD_NAMES = ("1.png", "2.jpg", "1_mask.png", "classes.txt", "x", "3.gif", "\n.png", "\udcff.png", "a" * 200 + ".png")
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "I", "F", "I;16", "CMYK")


class Bench:
    """A folder with two small models and a photo, and the page's endpoints."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.photo = folder, folder / "photo.png"
        made = {
            "pets": build("convnet", NAMES, 16, {"widths": [4, 8]}),
            "riders": build("unet", NAMES, 16, {"width": 4, "depth": 2}),
            "timm": build("timm", NAMES, 32, {"architecture": "test_resnet"}),
        }
        for name, model in made.items():
            checkpoint.save(model, folder / name)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(self.photo)
        self.visits = Visits(Models({name: str(folder / name) for name in made}))
        page = app.build_page(self.visits.models)
        self.endpoints = {each.api_name: each.fn for each in page.fns.values() if isinstance(each.api_name, str)}

    def model(self, name: str, config: dict | None = None, weights: bytes | None = None) -> Path:
        """A copy of a model with another config or other weights."""
        folder = self.folder / "changed"
        folder.mkdir(exist_ok=True)
        for file, content in (("config.json", config), ("model.safetensors", weights)):
            own = (self.folder / name / file).read_bytes()
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            (folder / file).write_bytes(own if content is None else content)
        return folder

    def answer(self, folder: Path) -> None:
        """Opens a model as the page does, and draws everything that it says about a photo."""
        visits = Visits(Models({"changed": str(folder)}))
        _ = visits.models["changed"]
        draw(visits.ask(str(self.photo), "changed", Question()), [name for name in PANELS if name != "compared"])


# --- the kinds of inputs: each takes the bench and what hypothesis draws ---------------------------------------------


def configs(bench: Bench, draw_: Callable) -> None:
    """config.json with a few entries of ours, of timm's or of smp's replaced."""
    name = draw_(st.sampled_from(["pets", "riders", "timm", "smp"]))
    config = json.loads((bench.folder / name / "config.json").read_text()) if name != "smp" else dict(SMP)
    block = config["cvlab"] if name in ("pets", "riders") else config
    if name == "timm":
        del config["cvlab"]
        block = draw_(st.sampled_from([config, config["pretrained_cfg"]]))
    keys = [*block, "limits", "temperature", "set_threshold", "core_threshold", "rim_threshold"]
    for key in draw_(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        own = block.get(key)
        likely = st.lists(NUMBERS, min_size=len(own), max_size=len(own)) if isinstance(own, list) else NUMBERS
        block[key] = draw_(st.one_of(likely, likely, JSON))
    if "cvlab" in config and isinstance(block.get("arguments"), dict) and draw_(st.booleans()):
        key = draw_(st.sampled_from(["widths", "depth", "dropout", "width", "batch_norm", "hidden", "pools"]))
        block["arguments"] = block["arguments"] | {key: draw_(st.one_of(NUMBERS, st.lists(NUMBERS, max_size=4), JSON))}
    bench.answer(bench.model("riders" if name == "smp" else name, config))


def weights(bench: Bench, draw_: Callable) -> None:
    """model.safetensors with a changed header, or with numbers of any size in it."""
    name = draw_(st.sampled_from(["pets", "riders"]))
    content = bytearray((bench.folder / name / "model.safetensors").read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    if draw_(st.booleans()):
        key = draw_(st.sampled_from(sorted(set(entries) - {"__metadata__"})))
        part = draw_(st.sampled_from(["dtype", "shape", "data_offsets"]))
        given_ = JSON | st.lists(st.integers(), max_size=4) | st.sampled_from(["F64", "F16", "BF16", "I64"])
        entries[key] = entries[key] | {part: draw_(given_)}
        header = json.dumps(entries).encode()
        changed = struct.pack("<Q", draw_(st.sampled_from([len(header), 0, 2**63, length]))) + header
        content = changed + content[8 + length :]
    else:
        numbers = np.frombuffer(bytes(content[8 + length :]), np.float32).copy()
        for _ in range(draw_(st.integers(1, 4))):
            at = draw_(st.integers(0, len(numbers) - 1))
            number = draw_(st.floats(width=32) | st.sampled_from([3e38, -3e38, 1e20, 1e-30]))
            numbers[at : at + draw_(st.sampled_from([1, 8, 10**6]))] = number
        content = content[: 8 + length] + numbers.tobytes()
    bench.answer(bench.model(name, weights=bytes(content)))


def picture(draw_: Callable, black_and_white: bool = False) -> bytes:
    """A picture of any mode and format, whole or damaged."""
    if black_and_white and draw_(st.integers(0, 4)):
        file = io.BytesIO()
        Image.new("1", (draw_(st.integers(2, 40)), 20), draw_(st.integers(0, 1))).save(file, "PNG")
        return file.getvalue()
    shape = st.integers(2, 40) | st.sampled_from([1, 2, 20, 3000])
    size = draw_(shape), draw_(st.sampled_from([20, 20, 1, 2, 33]))
    mode, form = draw_(st.sampled_from(MODES)), draw_(st.sampled_from(FORMATS))
    rng = np.random.default_rng(draw_(st.integers(0, 99)))
    file = io.BytesIO()
    if mode == "F":
        image = Image.fromarray((rng.normal(size=size[::-1]) * draw_(st.sampled_from([1, 1e30]))).astype(np.float32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(
            "L" if "I" in mode else "RGB"
        )
        image = image.convert(mode)
    try:
        image.save(file, form)
    except (OSError, ValueError, KeyError, SystemError, RuntimeError):  # the format has no such mode or size
        image.convert("RGB").save(file, "PNG")
    content = bytearray(file.getvalue())
    for _ in range(draw_(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw_(st.integers(0, len(content) - 1))
        content[at : at + draw_(st.integers(1, 4))] = draw_(st.binary(max_size=6))
    return bytes(content)


def images(bench: Bench, draw_: Callable) -> None:
    """A picture sent to an endpoint."""
    (bench.folder / "sent").write_bytes(picture(draw_))
    open_image(bench.folder / "sent")
    bench.endpoints["predict"](str(bench.folder / "sent"), draw_(st.sampled_from(["pets", "riders"])))


def masks(bench: Bench, draw_: Callable) -> None:
    """A picture as a mask of the trainers, and as the true mask of the page."""
    (bench.folder / "mask").write_bytes(picture(draw_))
    question = Question(region=draw_(st.sampled_from(["mask", "false positives", "false negatives"])))
    answer = bench.visits.ask(str(bench.photo), "riders", question, str(bench.folder / "mask"))
    answer.visits.cache = type(bench.visits.cache)(2**24, bench.visits.cache.size)  # the file has the same name
    draw(answer, ("sentence", "errors", "stages"))
    read_mask(bench.folder / "mask", draw_(st.integers(1, 5)), background=draw_(st.booleans()))


def requests(bench: Bench, draw_: Callable) -> None:
    """Questions with values of any type to the endpoints and to all panels."""
    text = st.one_of(st.text(max_size=20), st.sampled_from(["", "cat", "stage1", "decoder1", "1,1 9,9", "-1,3"]), JSON)
    name, photo = draw_(st.sampled_from(["pets", "riders"])), str(bench.photo)
    if draw_(st.booleans()):
        endpoint = draw_(st.sampled_from(["predict", "grad_cam", "judge", "stages"]))
        given_ = [draw_(text), draw_(text)] if endpoint in ("grad_cam", "judge") else []
        sent = draw_(st.sampled_from([photo, None]) | st.builds(lambda value: Sent({"url": value}), JSON))
        sent = path_of(sent) if isinstance(sent, Sent) else sent
        bench.endpoints[endpoint](sent, draw_(st.sampled_from([name, name, name]) | text), *given_)
        return
    known = {
        "class_name": text, "rather_than": text, "against": st.booleans(), "stage": text,
        "method": st.sampled_from(["grad_cam", "hires_cam"]) | JSON, "points": text, "threshold": NUMBERS | JSON,
        "region": st.sampled_from(["mask", "part", "pixel", "box"]), "opacity": NUMBERS,
    }  # fmt: skip
    chosen = draw_(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True))
    answer = bench.visits.ask(photo, name, Question(**{key: draw_(known[key]) for key in chosen}))
    draw(answer, [each for each in PANELS if each != "compared"])


def folders(bench: Bench, draw_: Callable) -> None:
    """A folder of data: any names of folders and files, with pictures, masks and text in them."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as root:
        read = draw_(st.sampled_from([classification_parts, segmentation_parts]))
        usual = (
            ["images", "masks"] if read is segmentation_parts else ["cat", "dog", "train/cat", "train/dog", "val/cat"]
        )
        place = st.sampled_from(usual) | st.sampled_from(
            ["", "Valid", "train/images", ".git", "cat/dog", "images/test"]
        )
        for number in range(draw_(st.integers(1, 14))):
            folder = Path(root, usual[number % 2] if draw_(st.integers(0, 3)) else draw_(place))
            name = f"{number // 2}.png" if draw_(st.integers(0, 5)) else draw_(st.sampled_from(ODD_NAMES))
            content = picture(draw_, number % 2 and read is segmentation_parts) if draw_(st.integers(0, 9)) else b"text"
            with suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        parts = read(Path(root), 0)
        for each in parts.samples:
            parts.read(each, lambda image: torch.zeros(3, *image.size[::-1], dtype=torch.uint8))


KINDS = {each.__name__: each for each in (configs, weights, images, masks, requests, folders)}


# --- measuring --------------------------------------------------------------------------------------------------------


def peak_mib(reset: bool = False) -> float:
    """The peak of resident memory; with `reset` it is set back to what is taken now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def fault_of(error: Exception) -> str:
    """Why an exception is no sentence of the project; empty if it is."""
    if not isinstance(error, ValueError | OSError | gr.Error):
        return f"{type(error).__name__}: {error}"
    said = str(error.message) if isinstance(error, gr.Error) else sentence_of(error)
    words = INTERNALS.search(said) or not said.isprintable() or not said.endswith(".") or not 10 < len(said) < 1000
    foreign = type(error) in (UnicodeDecodeError, UnicodeEncodeError, json.JSONDecodeError)
    return f"{type(error).__name__}: {said}" if words or foreign else ""


def fuzz(kind: str, bench: Bench, examples: int, number: int) -> dict:
    """What so many inputs of a kind cost, and the faults among them."""
    found = {
        "kind": kind,
        "inputs": 0,
        "refused": 0,
        "faults": [],
        "seconds": 0.0,
        "mib": 0.0,
        "slowest": 0,
        "largest": 0,
    }

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        drawn: list = []

        def draw_(strategy: st.SearchStrategy) -> object:
            drawn.append(data.draw(strategy))
            return drawn[-1]

        random.seed(0)
        peak_mib(reset=True)
        before, start, fault = peak_mib(), time.process_time(), ""
        try:
            KINDS[kind](bench, draw_)
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            found["refused"] += 1
            fault = fault_of(error)
        seconds, mib = time.process_time() - start, peak_mib() - before
        found["inputs"] += 1
        if seconds > found["seconds"]:
            found.update(seconds=seconds, slowest=str(drawn)[:200])
        if mib > found["mib"]:
            found.update(mib=mib, largest=str(drawn)[:200])
        if seconds > SECONDS or mib > MIB:
            fault = fault or f"took {seconds:.1f} s and {mib:.0f} MiB"
        if fault:
            found["faults"].append({"fault": fault[:300], "input": str(drawn)[:300]})

    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # no progress bars
        warnings.simplefilter("ignore")
        one()
    return found


def page_of(found: list[dict]) -> str:
    """The figures as Markdown."""
    head = ["inputs", "n", "refused in a sentence", "faults", "slowest, s", "largest, MiB"]
    rows = [
        [each["kind"], *map(str, (each["inputs"], each["refused"], len(each["faults"])))]
        + [f"{each['seconds']:.1f}", f"{each['mib']:.0f}"]
        for each in found
    ]
    faults = [
        f"- {each['kind']}: {fault['fault']} of {fault['input']}" for each in found for fault in each["faults"][:5]
    ]
    cost = [f"- {each['kind']}: slowest {each['slowest']}; largest {each['largest']}" for each in found]
    return "\n".join(
        [table(head, rows), "", "Slowest and largest:", "", *cost, *(["", "Faults:", "", *faults] if faults else [])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = args.kind or list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        found = [fuzz(kind, bench, math.ceil(args.examples / len(kinds)), args.seed) for kind in kinds]
    print(page_of(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(each["faults"] for each in found))


if __name__ == "__main__":
    main()

"""Whether a Space still opens: the tree that is published, in a new environment from its lock, gives an answer.

python tests/bench/space.py                print the tables; downloads 3 GB, three to ten minutes
python tests/bench/space.py --json FILE    the figures behind them too
python tests/bench/space.py --write        put the first two tables into tests/bench/README.md

The shipped checkpoints and the Space are published with train/publish.py to a stand-in for the Hub on this machine.
The files of the Space are taken from there. Their requirements.lock is installed with --require-hashes, and app.py is
started as a Space starts it. Every model is asked through /predict, and its answer compared with the one that the
environment of this script gives.

PyPI's torch brings CUDA along. A Space installs the same versions with torch for CPUs, from PyTorch's own index, and
none of what only CUDA needs. Those packages are installed here, and counted apart.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gradio_client import Client, handle_file
from tables import README, hardware, inserted, table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # cvlab needs no installation; the stand-in for the Hub

import hub_client
import hub_server

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.models import probabilities
from cvlab.transforms import open_image, view

# In the new environment: what is installed there.
INSTALLED = """
import json
from importlib.metadata import distributions
found = []
for each in distributions():
    about = each.metadata
    kinds = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License :: ")]
    text = (about.get("License") or "").strip()
    licence = about.get("License-Expression") or " AND ".join(kinds) or (text.splitlines() or [""])[0]
    sizes = [path.stat().st_size for path in map(each.locate_file, each.files or []) if path.is_file()]
    found.append({"name": about["Name"], "version": each.version, "licence": licence, "bytes": sum(sizes)})
print(json.dumps(sorted(found, key=lambda each: each["name"].lower())))
"""
# Names of licences that let anybody use, change and sell what is made with them, and only ask to be named.
PERMISSIVE = (
    r"(MIT|0?BSD|Apache|ISC|PSF|Python|Zlib|HPND|Historical Permission|Unlicense|CC0|BSL-1|Bzip2|CNRI|"
    r"The Unlicense|Blue ?Oak|NCSA|libpng|LLVM|WTFPL|Public Domain|Dual License)"
)
SECONDS_TO_START = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--write", action="store_true", help="put the tables into tests/bench/README.md")
    options = parser.parse_args()
    figures = measure()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    if options.write:
        README.write_text(inserted(README.read_text(), "bench-space", summary(figures)))
    print(summary(figures) + "\n" + licences(figures))


def measure() -> dict:
    """All figures; see the docstring above."""
    names = sorted(path.parent.name for path in ROOT.glob("checkpoints/*/config.json"))
    with (
        tempfile.TemporaryDirectory() as folder,
        hub_server.serve(Path(folder) / "hub", token=hub_client.TOKEN) as hub,
    ):
        space = publish(hub, names, Path(folder) / "owner")
        tree, home = Path(folder) / "tree", Path(folder) / "home"
        for name, file in hub.files(space, "main").items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub.blob(file["sha256"]), tree / name)
        python, seconds = install(tree / "requirements.lock", Path(folder) / "venv")
        installed = json.loads(subprocess.run([python, "-c", INSTALLED], check=True, capture_output=True).stdout)
        in_space = set(re.findall(r"^([\w-]+)==", (tree / "requirements.txt").read_text(), re.M))
        for each in installed:
            each["in_space"] = re.sub(r"[-_.]+", "-", each["name"]).lower() in in_space
        (home / "tmp").mkdir(parents=True)
        env = {key: entry["value"] for key, entry in space["variables"].items()}
        env |= hub.env(home / ".cache" / "huggingface") | {"HOME": str(home), "TMPDIR": str(home / "tmp")}
        with started(python, tree, env) as (url, process, start):
            answers = {name: ask(url, name, home / "scene.png") for name in names}
            (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return {
        "hardware": hardware(),
        "python": sys.version.split()[0],
        "install_seconds": seconds,
        "start_seconds": start,
        "peak_mb": int(peak) / 1024,
        "answers": answers,
        "installed": installed,
    }


def publish(hub: hub_server.Hub, names: list[str], home: Path) -> dict:
    """The repository of the Space that offers these checkpoints, on the stand-in for the Hub."""
    owner, ids = hub_client.Client(hub, home), [f"user/{name}" for name in names]
    for name, model_id in zip(names, ids, strict=True):
        owner.run("train/publish.py", ROOT / "checkpoints" / name, model_id).check_returncode()
    owner.run("train/publish.py", "--space", "user/page", "--models", *ids).check_returncode()
    return hub.repos["spaces", "user/page"]


def install(lock: Path, folder: Path) -> tuple[str, float]:
    """The Python of a new environment with what the lock says, and the seconds that it took."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-cache-dir", "--require-hashes", "-r", lock]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    return str(folder / "bin" / "python"), time.perf_counter() - begun


@contextmanager
def started(python: str, tree: Path, env: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen, float]]:
    """The page of the tree, with nothing of this script's environment: address, process, seconds until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env |= {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    env |= {"SPACE_ID": "user/page", "SYSTEM": "spaces", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    env |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    begun = time.perf_counter()
    with subprocess.Popen([python, "app.py"], cwd=tree, env=env, stdout=sys.stderr) as process:
        try:
            while True:
                with socket.socket() as door:
                    if door.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if process.poll() is not None or time.perf_counter() - begun > SECONDS_TO_START:
                    sys.exit("The page did not start: see what it printed above.")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", process, time.perf_counter() - begun
        finally:
            process.terminate()


def ask(url: str, name: str, photo: Path) -> dict:
    """The first answer of a model: its seconds, and whether it is the one that this environment gives."""
    shapes.scene(4003, 256).image.save(photo)
    client = Client(url, verbose=False)
    begun = time.perf_counter()
    answer = client.predict(image=handle_file(photo), model=f"user/{name}", api_name="/predict")
    seconds = time.perf_counter() - begun
    model = checkpoint.load(ROOT / "checkpoints" / name)
    if model.task != "classification":
        return {"seconds": seconds, "difference": None}
    with torch.no_grad():
        expected = probabilities(model, model(view(open_image(photo), model)))[0].tolist()
    found = {each["label"]: each["confidence"] for each in answer["confidences"]}
    pairs = zip(model.class_names, expected, strict=True)
    return {"seconds": seconds, "difference": max(abs(found[label] - value) for label, value in pairs)}


def permissive(licence: str) -> bool:
    """Whether every part of an expression is, or one of its alternatives."""
    parts = re.split(r" AND |;|, ", re.sub(r"[()]", "", licence))
    return all(any(re.match(PERMISSIVE, each.strip(), re.I) for each in part.split(" OR ")) for part in parts)


def summary(figures: dict) -> str:
    """What stands between the marks in tests/bench/README.md."""
    installed = figures["installed"]
    space = [each for each in installed if each["in_space"]]
    head = ["", "packages", "MB installed"]
    rows = [
        [what, str(len(found)), f"{sum(each['bytes'] for each in found) / 1e6:.0f}"]
        for what, found in (("the lock, and pip", installed), ("without CUDA, as in a Space", space))
    ]
    answers = [
        [name, f"{each['seconds']:.1f}", "a mask" if each["difference"] is None else f"{each['difference']:.0e}"]
        for name, each in figures["answers"].items()
    ]
    missing = [each["name"] for each in space if not each["licence"]]
    odd = [each for each in space if each["licence"] and not permissive(each["licence"])]
    named = ", ".join(f"{each['name']} ({each['licence']})" for each in odd)
    return "\n" + "\n\n".join(
        [
            f"On {figures['hardware']}, Python {figures['python']}: downloading and installing took "
            f"{figures['install_seconds']:.0f} s, the start of the page {figures['start_seconds']:.1f} s. "
            f"Peak memory {figures['peak_mb']:.0f} MB. The MB of torch are those with CUDA in both lines.",
            table(head, rows),
            table(["model", "first answer after s", "largest difference of a probability"], answers),
            f"Of a Space's packages these name no licence: {', '.join(missing) or 'none'}. Not permissive: "
            f"{named or 'none'}.\n",
        ]
    )


def licences(figures: dict) -> str:
    """Every package with its licence."""
    rows = []
    for each in figures["installed"]:
        verdict = (
            "missing" if not each["licence"] else "permissive" if permissive(each["licence"]) else "not permissive"
        )
        where = "" if each["in_space"] else "not in a Space"
        rows.append([each["name"], each["version"], f"{each['bytes'] / 1e6:.1f}", each["licence"], verdict, where])
    return table(["package", "version", "MB", "licence", "verdict", ""], rows)


if __name__ == "__main__":
    main()

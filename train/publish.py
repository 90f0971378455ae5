"""Publish a checkpoint as a model on the Hugging Face Hub, or the page with some models as a Space.

    python train/publish.py CHECKPOINT user/name [--private] [--revision BRANCH] [--with-photos]
    python train/publish.py --space user/space --models user/a user/b [--private]

Needs a token with write access (https://huggingface.co/settings/tokens) in `hf auth login` or HF_TOKEN.

A checkpoint is opened first: what cannot be opened is not published. Its card, where cvlab wrote it, is written anew
with the name on the Hub. Pictures that contain photographs (report/photos/) stay here unless --with-photos is given.

A Space is app.py with the modules of cvlab that it imports, in one commit. Which models it offers is in its variable
CVLAB_MODELS, and whose models a visitor may name besides in CVLAB_ALLOW (at first the owners of those offered): both
can be changed in the Space's settings.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab import checkpoint
from cvlab.checkpoint import card, hub

TORCH_FOR_CPU = "--extra-index-url https://download.pytorch.org/whl/cpu"  # PyPI's brings CUDA along, about 4 GB
IMPORTED_AS = {"scikit-learn": "sklearn"}  # else the name of a package is that of its module
ALWAYS = {"torchvision"}  # timm imports it


def main() -> None:
    """Checks, sends, and says where it is and how it is opened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder with config.json and model.safetensors")
    parser.add_argument("id", nargs="?", help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the new repository private")
    parser.add_argument("--revision", help="branch to publish on, created if it does not exist; default: main")
    parser.add_argument("--with-photos", action="store_true", help="send report/photos/ as well")
    parser.add_argument("--space", metavar="USER/SPACE", help="publish the page as a Space instead")
    parser.add_argument("--models", nargs="+", metavar="USER/NAME", help="what the Space offers, the first one first")
    args = parser.parse_args()
    if bool(args.space) != bool(args.models) or bool(args.space) == bool(args.id):
        parser.error("give CHECKPOINT and user/name, or --space and --models")
    try:
        if args.space:
            publish_space(args.space, args.models, args.private)
        else:
            publish_checkpoint(args.checkpoint, args.id, args.private, args.revision, args.with_photos)
    except (checkpoint.CheckpointError, hub.HubError) as error:
        sys.exit(str(error))


def publish_checkpoint(folder: Path, model_id: str, private: bool, revision: str | None, with_photos: bool) -> None:
    if not folder.is_dir():
        sys.exit(f"{folder} is not a folder: name the folder of a checkpoint.")
    checkpoint.load(folder)
    readme, is_ours = folder / "README.md", "cvlab" in json.loads((folder / "config.json").read_text("utf-8"))
    if is_ours and (not readme.is_file() or "library_name: cvlab" in readme.read_text("utf-8")):
        card.write(folder, model_id)
    address = hub.push(folder, model_id, private, revision, with_photos)
    at = f"{model_id}@{revision}" if revision else model_id
    print(f"Published: {address}")
    print(f"  python app.py {at}")
    print(f'  cvlab.checkpoint.load("{at}")')


def publish_space(space_id: str, models: list[str], private: bool) -> None:
    for model_id in models:
        if not hub.is_id(model_id):
            sys.exit(f"{model_id} is not a name on the Hub: publish the checkpoint first, then write user/name.")
    variables = {"CVLAB_MODELS": ",".join(models), "CVLAB_ALLOW": ",".join(sorted({m.split("/")[0] for m in models}))}
    address = hub.push_space(space_files(space_id, models), space_id, variables, private)
    print(f"Published: {address}\nThe Hub builds it in some minutes. It offers {', '.join(models)}.")


# --- what a Space is made of ------------------------------------------------------------------------------------------


def space_files(space_id: str, models: list[str]) -> dict[str, bytes]:
    """Path to content: the page, the modules that it imports, its requirements and its card."""
    networks = (ROOT / "cvlab" / "models").glob("*.py")  # imported by their names when a model asks for them
    sources = imported_sources(ROOT / "app.py", *networks)
    read = (ROOT / "cvlab" / "page").glob("*.[cj]s*")  # style sheet and script
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (*sources, *read)}
    packages = {name.split(".")[0] for path in sources for name in imports(path)}
    return files | {
        "requirements.txt": requirements(packages).encode(),
        "README.md": space_card(space_id, models).encode(),
    }


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a source file imports, those of `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_sources(*paths: Path) -> set[Path]:
    """Source files of this repository and, of those in cvlab/, all that they need."""
    sources, todo = set(), [*paths]
    while todo:
        path = todo.pop()
        sources.add(path)
        for name in imports(path):
            parts = name.split(".") if name.startswith("cvlab.") else []
            for i in range(1, len(parts) + 1):  # cvlab, cvlab.models, cvlab.models.unet
                module = ROOT.joinpath(*parts[:i])
                found = {module / "__init__.py", module.with_suffix(".py")}
                todo += [source for source in found - sources if source.is_file()]
    return sources


def requirements(packages: set[str]) -> str:
    """The lines of requirements.txt for these packages, with builds of torch for processors."""
    lines = [TORCH_FOR_CPU]
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        name = re.split(r"[=~<>\[# ]", line)[0]
        if name in ALWAYS or IMPORTED_AS.get(name, name.replace("-", "_")) in packages:
            lines.append(f"{line}+cpu" if name in ("torch", "torchvision") else line)
    return "\n".join(lines) + "\n"


def space_card(space_id: str, models: list[str]) -> str:
    """README.md of the Space: its settings as front matter, and links to the models that it offers."""
    (gradio,) = re.findall(r"^gradio~=([\d.]+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    title = space_id.split("/")[1]
    front = {
        "title": title,
        "emoji": "\N{LEFT-POINTING MAGNIFYING GLASS}",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": "3.11",
        "app_file": "app.py",
        "short_description": "What a vision model sees in a photo, and why",
        "license": "apache-2.0",
        "tags": ["computer-vision", "grad-cam", "u-net", "explainability"],
        "models": [model_id.partition("@")[0] for model_id in models],
    }
    links = "\n".join(f"- [{model_id}](https://huggingface.co/{model_id.partition('@')[0]})" for model_id in models)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\n"
        f"What does a vision model see in a photo, and why? This page offers\n\n{links}\n\n"
        "It was published with `train/publish.py --space` of cvlab.\n"
    )


if __name__ == "__main__":
    main()

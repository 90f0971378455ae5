"""Publish a checkpoint as a model on the Hugging Face Hub, or the page as a Space that offers such models.

    python train/publish.py CHECKPOINT user/name [--private] [--revision BRANCH] [--with-photos] [--onnx]
    python train/publish.py CHECKPOINT --onnx      nothing is sent
    python train/publish.py --space user/space --models user/a user/b [--private]

You need a token with write access (https://huggingface.co/settings/tokens). Give it to `hf auth login`, or put it in
HF_TOKEN.

The checkpoint is opened first: if that fails, it is not published. A card that cvlab wrote is written again with the
name on the Hub. Pictures that contain photographs (report/photos/) are sent only with --with-photos. --onnx writes
CHECKPOINT/model.onnx first (cvlab/checkpoint/onnx.py), which other programs and browsers can run.

A Space is app.py and cvlab/, sent in one commit, and installs the versions of .ci/requirements.lock. Its variable
CVLAB_MODELS names the models that it offers. Visitors may also type the name of any other model of the users in
CVLAB_ALLOW: at first the owners of the offered models. Both can be changed in the Space's settings.
"""

import argparse
import re
import sys
from pathlib import Path

import cli
from huggingface_hub import SpaceCardData

from cvlab import checkpoint
from cvlab.checkpoint import card, hub, onnx
from cvlab.files import read_json

SENT = (".py", ".css", ".js", ".html", ".txt")  # of the files in cvlab/
LOCK = cli.ROOT / ".ci" / "requirements.lock"  # sent too: pip install --require-hashes -r requirements.lock
TORCH_FOR_CPU = "--extra-index-url https://download.pytorch.org/whl/cpu"  # PyPI's brings CUDA along, about 4 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder with config.json and model.safetensors")
    parser.add_argument("id", nargs="?", type=hub.name_of, help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private when it is created")
    parser.add_argument("--revision", help="branch to publish on, created if it does not exist (default: main)")
    parser.add_argument("--with-photos", action="store_true", help="also send report/photos/")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx; without user/name nothing is sent")
    parser.add_argument("--space", metavar="USER/SPACE", help="publish the page as a Space instead")
    parser.add_argument("--models", nargs="+", metavar="USER/NAME", help="what the Space offers; it opens on the first")
    args = parser.parse_args()
    of_model = args.checkpoint and (args.id or args.onnx)
    if bool(args.space) != bool(args.models) or bool(args.space) == bool(of_model):
        parser.error("give CHECKPOINT and user/name or --onnx, or --space and --models")
    if args.space:
        publish_space(args.space, [hub.name_of(name) for name in args.models], args.private)
    else:
        publish_checkpoint(args.checkpoint, args.id, args.private, args.revision, args.with_photos, args.onnx)


def publish_checkpoint(
    folder: Path, model_id: str | None, private: bool, revision: str | None, with_photos: bool, with_onnx: bool
) -> None:
    if not folder.is_dir():
        sys.exit(f"{folder} is not a folder: give the folder of a checkpoint.")
    model = checkpoint.load(folder)
    if with_onnx:
        print(f"Written: {onnx.write(model, folder)}")
    if not model_id:
        return
    readme, is_ours = folder / "README.md", "cvlab" in read_json(folder / "config.json")
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
            sys.exit(f"{model_id} is not a name on the Hub: publish the checkpoint first, then give its user/name.")
    sources = [cli.ROOT / "app.py", *(path for path in sorted((cli.ROOT / "cvlab").rglob("*")) if path.suffix in SENT)]
    files = {path.relative_to(cli.ROOT).as_posix(): path for path in sources}
    files |= {"requirements.lock": LOCK, "requirements.txt": space_requirements().encode()}
    files |= {"README.md": space_card(space_id, models).encode()}
    owners = sorted({model_id.split("/")[0] for model_id in models})
    variables = {"CVLAB_MODELS": ",".join(models), "CVLAB_ALLOW": ",".join(owners)}
    address = hub.push_space(files, space_id, variables, private)
    print(f"Published: {address}\nThe Hub starts it in a few minutes. It offers {', '.join(models)}.")


def space_requirements() -> str:
    """The versions in the lock, with torch for CPUs and without what only CUDA needs.

    Without the hashes: a Space installs packages of its own in the same command, and pip would ask for theirs too.
    """
    lines = [TORCH_FOR_CPU]
    for name, version in re.findall(r"^([\w-]+)==(\S+)", LOCK.read_text("utf-8"), re.MULTILINE):
        if not re.match("nvidia|cuda|triton", name):
            lines.append(f"{name}=={version}" + "+cpu" * (name in ("torch", "torchvision")))
    return "\n".join(lines) + "\n"


def space_card(space_id: str, models: list[str]) -> str:
    """README.md of the Space: its settings for the Hub, and links to the models."""
    # Fetched when the Space is built, so that it begins at once; of a branch they would be those of another moment.
    fetched = [f"{model_id} {','.join(hub.NEEDED)}" for model_id in models if "@" not in model_id]
    title, names = space_id.split("/")[1], [model_id.partition("@")[0] for model_id in models]
    settings = SpaceCardData(
        title=title,
        emoji="🔍",
        colorFrom="blue",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=re.search(r"^gradio==([\d.]+)", LOCK.read_text("utf-8"), re.MULTILINE)[1],
        python_version="3.11",  # the Hub's default is older than torch needs
        app_file="app.py",
        short_description="See what a vision model predicts for a photo, and why",
        license="apache-2.0",
        tags=["computer-vision", "grad-cam", "u-net", "explainability"],
        models=names,
        **({"preload_from_hub": fetched} if fetched else {}),
    )
    links = "\n".join(f"- [{m}](https://huggingface.co/{name})" for m, name in zip(models, names, strict=True))
    return (
        f"---\n{settings.to_yaml()}\n---\n\n# {title}\n\nWhat does a vision model see in a photo, and why? This page "
        f"offers\n\n{links}\n\nIt says when a photo is unlike anything that a model was trained on, and names "
        "two or three classes\nwhere one would promise too much. How often it is wrong stands under Report.\n\n"
        "Published with `train/publish.py --space` of cvlab.\n"
    )


if __name__ == "__main__":
    cli.run(main)

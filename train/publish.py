"""Publish a checkpoint folder as a model on the Hugging Face Hub.

    python train/publish.py CHECKPOINT user/name [--private] [--revision BRANCH] [--with-photos]

Needs a token with write access (https://huggingface.co/settings/tokens) in `hf auth login` or HF_TOKEN. The folder is
opened first: what cannot be opened is not published. Pictures that contain photographs (report/photos/) stay here
unless --with-photos is given.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

from cvlab import checkpoint, hub


def main() -> None:
    """Checks, sends, and says where it is and how it is opened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("id", help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the new repository private")
    parser.add_argument("--revision", help="branch to publish on, created if it does not exist; default: main")
    parser.add_argument("--with-photos", action="store_true", help="send report/photos/ as well")
    args = parser.parse_args()

    if not args.checkpoint.is_dir():
        sys.exit(f"{args.checkpoint} is not a folder: name the folder of a checkpoint.")
    try:
        checkpoint.load(args.checkpoint)
        address = hub.push(args.checkpoint, args.id, args.private, args.revision, args.with_photos)
    except (checkpoint.CheckpointError, hub.HubError) as error:
        sys.exit(str(error))

    model_id = f"{args.id}@{args.revision}" if args.revision else args.id
    print(f"Published: {address}")
    print(f"  python app.py {model_id}")
    print(f'  cvlab.checkpoint.load("{model_id}")')


if __name__ == "__main__":
    main()

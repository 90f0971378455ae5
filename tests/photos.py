"""The photographs that some tests need: the folder that CVLAB_PHOTOS names, by default ../shared/data beside cvlab."""

import os
from pathlib import Path

import pytest

PHOTOS = Path(os.environ.get("CVLAB_PHOTOS", Path(__file__).resolve().parents[2] / "shared" / "data"))


def needs_photos(*names: str) -> pytest.MarkDecorator:
    """Skips a test, with the reason, where a data set (a folder in PHOTOS) is not there."""
    missing = [name for name in names if not (PHOTOS / name).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} in {PHOTOS}: set CVLAB_PHOTOS")

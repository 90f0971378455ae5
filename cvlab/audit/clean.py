"""A copy of a data folder in which marks are painted over."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from cvlab.audit.fixed import FixedMark
from cvlab.audit.patches import Patch
from cvlab.files import new_folder
from cvlab.models import Model
from cvlab.render import to_picture
from cvlab.transforms import ImageError, open_image, seen_part, square_view, to_float, to_uint8
from cvlab.trust import hide


def write_clean(folder: Path, data: Path, model: Model, marks: Sequence[FixedMark | Patch]) -> None:
    """Copies the data folder; files of pictures without a mark stay as they are. `model` saw the marks."""
    with new_folder(folder) as filling:
        for path in tqdm([path for path in data.rglob("*") if path.is_file()], "cleaning", leave=False):
            target, cleaned = filling / path.relative_to(data), None
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(ImageError):  # it stays as it is
                cleaned = without_marks(open_image(path), model, marks)
            if cleaned:
                cleaned.save(target.with_suffix(".png"))
            else:
                shutil.copyfile(path, target)


def without_marks(photo: Image.Image, model: Model, marks: Sequence[FixedMark | Patch]) -> Image.Image | None:
    """A photo at its own resolution with the marks that it has painted over; None if it has none."""
    view = to_uint8(square_view(photo, model))[None]
    marks = [mark for mark in marks if mark.has(view).item()]
    box = zip(seen_part(model, (photo.height, photo.width)), 2 * photo.size, strict=True)
    x, y, width, height = (round(share * side) for share, side in box)
    for mark in marks:
        seen = to_float(to_uint8(photo.crop((x, y, x + width, y + height))))[None]
        if isinstance(mark, FixedMark):
            seen, hidden = mark.removed(seen)
        else:
            _, square = mark.removed(to_float(view))
            hidden = F.interpolate(square.float(), seen.shape[-2:]).bool()
        photo.paste(to_picture(hide(seen, hidden)), (x, y))
    return photo if marks else None

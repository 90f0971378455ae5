"""Uploads: whatever a visitor or a program sends as a picture becomes a path in Gradio's cache.

The path is all that the page knows of a picture. Its folder is named by a hash of the content. The examples stay where
they are: Gradio serves them from there, and deletes no file that it did not write.
"""

import base64
import hashlib
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import GradioRootModel, ImageData

from cvlab.files import write_bytes
from cvlab.page.examples import example_files
from cvlab.page.host import MAX_UPLOAD_MB, own_folder

UPLOADS = own_folder() / "uploads"
gr.set_static_paths([*example_files()])


class Sent(GradioRootModel):
    """Anything that was sent as a picture: `path_of` judges it and answers in sentences. Documented as an image."""

    root: Any

    @classmethod
    def model_json_schema(cls, *arguments: object, **options: object) -> dict:
        """That of an image, for the page of the API and its clients."""
        return ImageData.model_json_schema(*arguments, **options)


class _NoStub(type(gr.Image)):
    """Gradio's metaclass without what it does at last: to write a .pyi file beside the source of every component."""

    def __new__(cls, name: str, bases: tuple, attributes: dict) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class PhotoInput(gr.Image, metaclass=_NoStub):
    """An image input that hands over the file as it came, for cvlab's own opener: Gradio's spoils several formats."""

    is_template = True  # the browser draws it as gr.Image
    data_model = Sent

    def preprocess(self, payload: object) -> str | None:
        """The path of what was sent, undecoded; None for an empty input."""
        path = path_of(payload)
        if path and path not in example_files():
            self.temp_files.add(path)  # deleted when Gradio clears its cache
        return path


def photo_input(**options: object) -> PhotoInput:
    """A `PhotoInput` with the settings that all of them share. A mirrored camera would send mirrored photos."""
    camera = gr.WebcamOptions(mirror=False)
    return PhotoInput(image_mode=None, type="filepath", buttons=[], webcam_options=camera, **options)


def path_of(payload: object) -> str | None:
    """The path of an example or an uploaded file, or of the content of a data: URL, which is written beside those.

    Raises:
        gr.Error: anything else, also another path of this machine.
    """
    payload = payload.root if isinstance(payload, Sent) else payload
    if payload is None:
        return None
    url, path = (payload.get("url"), payload.get("path")) if isinstance(payload, dict) else (None, None)
    if isinstance(url, str) and url.startswith("data:"):
        return _written(url)
    if isinstance(path, str) and path in example_files():
        return path
    if isinstance(path, str) and "\0" not in path and Path(path).resolve().is_relative_to(UPLOADS):
        return str(Path(path).resolve())
    raise gr.Error("That is not an uploaded picture.")


def _written(url: str) -> str:
    """The path of the content of a data: URL."""
    if len(url) > MAX_UPLOAD_MB * 2**20 * 4 / 3:
        raise gr.Error(f"The picture is too large: the limit is {MAX_UPLOAD_MB} MB.")
    try:
        content = base64.b64decode(url.partition(",")[2])
    except ValueError as error:
        raise gr.Error("The data: URL of the picture is damaged.") from error
    path = UPLOADS / hashlib.sha256(content).hexdigest() / "photo.png"  # the format is recognised by the content
    write_bytes(path, content)
    return str(path)

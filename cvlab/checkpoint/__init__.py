"""A model as a folder: saved, opened strictly, fetched from the Hub, published, described by a card."""

from cvlab.checkpoint.config import CheckpointError
from cvlab.checkpoint.folder import load, save

__all__ = ["CheckpointError", "load", "save"]

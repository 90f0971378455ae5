"""Models as folders: saving, loading with checks, the Hub, and the model card."""

from cvlab.checkpoint.config import CheckpointError
from cvlab.checkpoint.folder import annotate, load, load_own, save

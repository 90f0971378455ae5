"""Why a model made its prediction: maps of the evidence for a score, at any stage of a network."""

from cvlab.explain.maps import (
    METHODS,
    Explanation,
    channel_maps,
    check_stages,
    correlation,
    default_stage,
    explain,
    grad_cam,
    heatmap,
    peak,
    predict,
)
from cvlab.explain.scores import (
    Score,
    against,
    class_score,
    contrast_score,
    predicted_classes,
    predicted_masks,
    predicted_score,
    region_score,
)

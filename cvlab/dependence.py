"""How far a stage's map depends on the region that was asked about: a map that does not, does not explain the region.

Grad-CAM weighs whole channels. Near the end of a U-Net every channel stands for the class wherever it is, so another
region gets the same map; at the last decoder under a 1x1 head the region cancels out of the formula altogether.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from cvlab.explain import correlation, explain, region_score

HARDLY = 0.95  # correlation between the maps of two regions from which a map says little of either


def region_dependence(
    model: nn.Module,
    images: Tensor,
    region: Tensor,
    other: Tensor | None = None,
    class_idx: int = 0,
    stages: Sequence[str] | None = None,
    method: str = "grad_cam",
) -> dict[str, Tensor]:
    """For every stage Pearson's r between the maps of two regions, (N,) each; two forward and two backward passes.

    The second region is by default the complement of the first. Two halves of one object would be no test: they share
    their evidence, so their maps may rightly agree. An object and what surrounds it share the least, and a map that is
    the same for both depends on neither.

    Args:
        images: (N, 3, S, S) in [0, 1].
        region, other: bool, (S, S) for all images, or (N, S, S) or (N, 1, S, S).
        stages: keys of model.stages; by default all.

    Raises:
        ValueError: as `explain`; or a region that covers a whole image, where no other is given.
    """
    if other is None:
        other = ~region
        if not other.flatten(-2).any(-1).all():
            raise ValueError("the region covers the whole picture: give another one to compare its maps with")
    maps, others = (
        explain(model, images, region_score(each, class_idx), stages, [method]).maps[method] for each in (region, other)
    )
    return {stage: correlation(maps[stage], others[stage]) for stage in maps}


def dependence_sentence(r: float) -> str:
    """What to write beside a map whose `region_dependence` is r; empty where the region matters."""
    return f"This stage's map hardly depends on the region (r = {r:.2f})." if r > HARDLY else ""

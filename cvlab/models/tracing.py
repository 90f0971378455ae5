"""Finds where heatmaps can be read in any module, from a few passes of one image.

A place is a module that runs once and returns a map: (N, C, h, w), (N, h, w, C), or tokens (N, T, C), with or without
CLS and other tokens before the patches.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cvlab.models.timm_stages import ToMap, to_map_of

MOST_PREFIX = 16  # tokens before the patches: CLS, registers
# Their outputs are no features: another module's output as it is, one whose resolution was chosen, or attention.
NO_FEATURES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.Softmax)
ROUNDING = 1e-3  # of the largest gradient: as much as two ways of adding up may differ


class Map(NamedTuple):
    """What a module returns, as a map (N, C, h, w)."""

    view: Tensor  # the output
    gradient: Tensor | None  # of the logits there; None where they do not depend on it, or also on a copy past it
    to_map: ToMap

    @property
    def shape(self) -> torch.Size:
        """(N, C, h, w)."""
        return self.to_map(self.view).shape


@torch.enable_grad()
def maps_in(network: nn.Module, logits_of: Callable[[Tensor], Tensor], image: Tensor) -> dict[str, Map]:
    """The map of each module of a network that returns one, by its name, in the order of the forward pass.

    Where only the CLS token is read, the logits do not depend on the patches that leave the last block.

    Args:
        network: in eval mode, its parameters without gradients: what has one then depends on the image.
        logits_of: runs it.
        image: (1, 3, S, S), requires a gradient.
    """
    torch.autograd.grad(logits_of(image).sum(), image)  # some put hooks on their modules when they are first used
    logits, outputs = _trace(network, logits_of, image)
    outputs = {name: pair for name, pair in outputs.items() if pair[0].requires_grad and len(pair[0]) == 1}
    both = [tensor for pair in outputs.values() for tensor in pair]
    score = (logits - logits.mean()).abs().sum()  # the mean of probabilities would say nothing
    gradients = torch.autograd.grad(score, both, allow_unused=True, retain_graph=True)
    cubes = [name for name, (output, _) in outputs.items() if output.ndim == 4 and len(set(output.shape[1:])) == 1]
    channels_last = set()
    if cubes:  # as many channels as rows: what changes at the top of the image is felt at the top, in any channel
        changed = image.detach().clone()
        changed[:, :, : image.shape[2] // 4] = 0
        _, others = _trace(network, logits_of, changed)
        for name in cubes:
            felt = (others[name][0] - outputs[name][0]).detach().abs()[0]
            if felt[: len(felt) // 2].sum() > felt[:, : len(felt) // 2].sum():
                channels_last.add(name)
    sides: set[int] = set()  # that tokens may have: of a map, or of one merged from it
    found = {}
    for (name, (output, view)), whole, gradient in zip(outputs.items(), gradients[::2], gradients[1::2], strict=True):
        count = output.shape[1] if output.ndim == 3 else 0
        fitting = [side for side in sides or {math.isqrt(count)} if 0 <= count - side**2 <= MOST_PREFIX]
        to_map = to_map_of(output.shape, sorted(fitting, reverse=True), name in channels_last)
        if to_map is None:
            continue
        used = gradient is not None and gradient.equal(whole) and to_map(gradient).any()
        found[name] = Map(view, gradient if used else None, to_map)
        sides |= {found[name].shape[-1], math.ceil(found[name].shape[-1] / 2)}
    return found


def places_in(network: nn.Module, maps: dict[str, Map], image_size: int, classes: int, rises: bool) -> dict[str, str]:
    """By the name of each stage its module, chosen from all maps of a network.

    Maps of equal side that follow each other are a run, and its `_end` stands for it. Of a classifier those runs are
    stages whose side is larger than all that come after, so that side paths are left out. So it is with a segmenter
    (`rises`) down to its bottleneck; above it, those whose side none before it exceeds, each side once. The bottleneck
    is where this gives most stages, and of several the longest run.

    Args:
        image_size: side of the image.
        classes: a map of one channel for each is the answer, not what the answer comes from.
        rises: whether the resolution rises again after it fell.
    """
    out = _branches(network, maps) | {name for name in maps if isinstance(network.get_submodule(name), NO_FEATURES)}
    out |= {name for name, each in maps.items() if each.gradient is None or each.shape[-1] == 1}
    features = {name: each for name, each in maps.items() if name not in out and each.shape[1] != classes}
    runs: list[tuple[int, list[str]]] = []
    run = (image_size + 1, [])
    known = {math.ceil(image_size / 2**level) for level in range(6)}
    for name, each in features.items():
        side = each.shape[-1]
        before = [other for other in runs if other[0] == side]
        if side < run[0] or (rises and side > run[0] and (before or side in known)):
            runs.append(run := (side, []))
        elif side > run[0]:  # back from a side path; else it is attention, or a pyramid of pooled maps
            if rises or not before:
                continue
            run = before[-1]
        run[1].append(name)
    at = [side for side, _ in runs]

    def kept(bottom: int) -> list[int]:
        down = [i for i in range(bottom + 1) if at[i] > max(at[i + 1 : bottom + 1], default=0)]
        above = range(bottom + 1, len(at))
        return down + [i for i in above if at[i] == max(at[bottom : i + 1]) > at[bottom] and at[i] not in at[i + 1 :]]

    bottoms = range(len(at)) if rises else range(len(at))[-1:]
    bottom = max(bottoms, key=lambda i: (len(kept(i)), len(runs[i][1])), default=0)
    stages = {i: _end(runs[i][1], maps) for i in kept(bottom)} if runs else {}
    return {"bottleneck" if i == bottom < max(stages) else name: name for i, name in stages.items()}


def _trace(
    network: nn.Module, logits_of: Callable[[Tensor], Tensor], image: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The logits; and by name, in the order of the forward pass, what modules that run once return, and pass on.

    That is a view of the output, as when a map is explained. Other hooks may take the output itself, past the view.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str, module: nn.Module, inputs: tuple, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        view = output[...]
        calls.setdefault(name, []).append((output, view))
        return view.clone()  # an operation in place changes neither

    with ExitStack() as hooks:
        for name, each in network.named_modules():
            hooks.enter_context(each.register_forward_hook(partial(hook, name)))
        logits = logits_of(image)
    return logits, {name: found[0] for name, found in calls.items() if name and len(found) == 1}


def _branches(network: nn.Module, maps: dict[str, Map]) -> set[str]:
    """Names of maps inside a block that takes maps of their side and returns another: each may be one of several."""
    order, sides = list(maps), [each.shape[-1] for each in maps.values()]
    found: set[str] = set()
    for i, block in enumerate(order):
        first = i
        while first and order[first - 1].startswith(f"{block}."):
            first -= 1
        taken = sides[first - 1] if first else sides[i]
        # One of more resolutions is an encoder, and nn.Sequential has no branches.
        is_block = (
            set(sides[first:i]) <= {taken, sides[i], 1} and type(network.get_submodule(block)) is not nn.Sequential
        )
        if is_block and taken != sides[i]:
            found |= {order[j] for j in range(first, i) if sides[j] == taken}
    return found


def _end(run: Sequence[str], maps: dict[str, Map]) -> str:
    """The last map of a run through which all evidence goes: a residual block's output, but nothing inside of it."""

    def all_goes_through(later: str, earlier: str) -> bool:  # all of the gradient at the earlier one
        after, before = maps[later], maps[earlier]
        inputs = after.view, before.view, after.gradient
        (found,) = torch.autograd.grad(*inputs, allow_unused=True, retain_graph=True)
        whole = before.to_map(before.gradient)
        return found is not None and (before.to_map(found) - whole).abs().max() <= ROUNDING * whole.abs().max()

    end, *others = [name for name in run if not any(name.startswith(f"{block}.") for block in run)]
    for name in others:
        if all_goes_through(name, end):
            end = name
    return end

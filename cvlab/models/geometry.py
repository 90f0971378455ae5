"""Where the cells of a stage look: the centre of each cell's receptive field, in pixels of the view.

A stride-2 convolution with padding centres cell i over pixel 2i; 2x2 pooling centres it over 2i + 0.5. After five such
layers the two differ by 15 pixels, half a cell. So a map must not simply be stretched over the view (Araujo, Norris and
Sim, "Computing Receptive Fields of Convolutional Neural Networks", 2019).
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from cvlab.models.model import Grid, Model

LARGEST = 1024  # pixels
aten = torch.ops.aten
POOLINGS = (aten.max_pool2d_with_indices, aten.max_pool2d, aten.avg_pool2d)
PADDINGS = (aten.constant_pad_nd, aten.reflection_pad2d, aten.replication_pad2d)
RESIZINGS = (aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._adaptive_avg_pool2d)


def convolved(grid: Grid, kernel: int, stride: int, padding: float, dilation: int = 1) -> Grid:
    """Behind a convolution or a pooling."""
    shift = dilation * (kernel - 1) / 2 - padding
    return grid._replace(offset=grid.offset + grid.stride * shift, stride=grid.stride * stride)


def transposed(grid: Grid, kernel: int, stride: int, padding: int, dilation: int = 1) -> Grid:
    """Behind a transposed convolution."""
    shift = (padding - dilation * (kernel - 1) / 2) / stride
    return grid._replace(offset=grid.offset + grid.stride * shift, stride=grid.stride / stride)


def resized(grid: Grid, factor: float) -> Grid:
    """With `factor` times as many cells over the same pixels."""
    return grid._replace(offset=grid.offset + grid.stride * (1 / factor - 1) / 2, stride=grid.stride / factor)


class _Follow(TorchDispatchMode):
    """Follows the grid of every tensor that comes from the images, through all that a forward pass computes."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.grids: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.padded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cells put before the first one
        self.grids[images] = Grid(0.0, 1.0, images.shape[-1])

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        found = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        known = [each for each in tree_leaves((args, kwargs)) if self._is_known(each)]
        outputs = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        if not known or not outputs:
            return found
        # Of several inputs the largest decides: a map may be multiplied by pooled features.
        stride = self.grids[max(known, key=Tensor.numel)].stride
        grids = [self.grids[each] for each in known if self.grids[each].stride == stride]
        grid = grids[0]._replace(offset=sum(grid.offset for grid in grids) / len(grids))
        operation = func.overloadpacket
        if self._is_known(first) and first.ndim == 4:
            before = self.padded.get(first, 0)
            settled = self.settled(first, first.shape[-1] - before)
            if operation in PADDINGS:
                for output in outputs:
                    self.padded[output] = before + args[1][0]
            elif operation is aten.convolution:
                weight, _, stride, padding, dilation, is_transposed = args[1:7]
                behind = transposed if is_transposed else convolved
                grid = behind(settled, weight.shape[-1], stride[-1], padding[-1] + before, dilation[-1])
            elif operation in POOLINGS:
                strides, padding = args[2] if len(args) > 2 and args[2] else args[1], args[3] if len(args) > 3 else [0]
                grid = convolved(settled, args[1][-1], strides[-1], padding[-1] + before)
            elif operation in RESIZINGS:
                grid = resized(settled, outputs[0].shape[-1] / first.shape[-1])
        for output in outputs:
            self.grids[output] = grid
        return found

    def _is_known(self, value: object) -> bool:
        return isinstance(value, Tensor) and value in self.grids

    def settled(self, tensor: Tensor, cells: int) -> Grid:
        """The grid of a tensor with so many cells a row; neighbours may have been merged by reshaping."""
        grid = self.grids[tensor]
        factor = cells * grid.stride / grid.side
        return resized(grid, factor) if factor < 0.75 else grid


def locate(model: Model) -> None:
    """Gives the module of each stage its `grid`, from one forward pass of a model on the device of its weights.

    Without one are stages of models on the meta device, for larger views than LARGEST, or that cannot take their own
    size: running them is the business of who asked for them.
    """
    weights = next(model.parameters())
    if weights.device.type == "meta" or model.image_size > LARGEST:
        return
    images = torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=weights.device)
    follow = _Follow(images)

    def record(to_map: Callable, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        cells = to_map(output).shape[-1]
        grid = follow.settled(output, cells)
        centres_in_view = (cells - 1) * grid.stride < grid.side  # else it was lost on its way through an attention
        if centres_in_view and isinstance(getattr(module, "grid", None), Grid | None):  # somebody's own stays
            module.grid = grid

    with ExitStack() as afterwards, torch.no_grad():
        afterwards.callback(model.train, model.training)
        for stage in model.stages.values():
            afterwards.enter_context(stage.module.register_forward_hook(partial(record, stage.to_map)))
        with follow, suppress(Exception):  # networks fail in many ways
            model.eval()(images)

"""model.onnx: a model with its normalisation and the activations of its stages, for programs without torch.

Input    images      (N, 3, S, S) float32 in [0, 1]
Outputs  logits      (N, C), of a segmenter (N, C, S, S)
         each stage  its activation as a map, (N, channels, h, w), under the stage's name
         class_map   of a classifier whose logits are a linear layer on the mean of a map: that layer at every position,
                     (N, C, h, w), the class activation maps without gradients (Zhou et al., "Learning Deep Features for
                     Discriminative Localization", 2016). Their means plus the layer's bias are the logits.
"""

import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.checkpoint.hub import MAX_WEIGHTS_BYTES, ONNX
from cvlab.files import whole_file
from cvlab.models import Model

TOLERANCE = 1e-4  # of the largest value of an output, or of 1


class WithMaps(nn.Module):
    """A model that returns the outputs of model.onnx by their names."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.averaged = model, averaged_map(model)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, S, S) to the outputs."""
        stages = self.model.stages
        modules = {name: stage.module for name, stage in stages.items()}
        if self.averaged:
            modules["class_map"], layer = self.averaged
        logits, seen = outputs_of(self.model, images, modules)
        found = {"logits": logits} | {name: stage.to_map(seen[name]) for name, stage in stages.items()}
        return found | ({"class_map": at_every_position(layer, seen["class_map"])} if self.averaged else {})


def outputs_of(model: Model, images: Tensor, modules: dict[str, nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and what modules return in the same pass, by their names."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = partial(lambda name, module, inputs, output: seen.update({name: output}), name)
            hooks.enter_context(module.register_forward_hook(hook))
        return model(images), seen


def at_every_position(layer: nn.Module, maps: Tensor) -> Tensor:
    """A linear layer or 1x1 convolution without its bias, of maps (N, D, h, w): (N, C, h, w)."""
    return F.conv2d(maps, layer.weight.flatten(1)[..., None, None])


@torch.no_grad()
def averaged_map(model: Model) -> tuple[nn.Module, nn.Module] | None:
    """The module whose map a classifier averages, and the linear layer on that mean; None if it does not do so."""
    images = torch.rand(1, model.in_channels, *2 * [model.image_size], generator=torch.Generator().manual_seed(0))
    modules = dict(model.named_modules())
    logits, seen = outputs_of(model, images, modules)
    linear = [m for m in map(modules.get, seen) if isinstance(m, nn.Linear | nn.Conv2d) and m.weight[0, 0].numel() == 1]
    channels = linear[-1].weight.shape[1] if linear else None
    maps = {name: each for name, each in seen.items() if isinstance(each, Tensor) and each.ndim == 4}
    read = [name for name, each in maps.items() if each.shape[1] == channels and each.shape[2:].numel() > 1]
    if model.task != "classification" or not read:
        return None
    means = at_every_position(linear[-1], maps[read[-1]]).mean((2, 3))
    means = means if linear[-1].bias is None else means + linear[-1].bias
    same = means.shape == logits.shape and torch.allclose(means, logits, rtol=0, atol=TOLERANCE)
    return (modules[read[-1]], linear[-1]) if same else None


def write(model: Model, folder: Path) -> Path:
    """Writes model.onnx, whole or not at all, after onnxruntime has given the same outputs as torch, and returns it.

    Raises:
        ValueError: packages are missing, the network is too large or cannot be exported, or the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx.export needs it
    except ImportError as error:
        raise ValueError(f"The package {error.name} is missing: pip install onnx onnxscript onnxruntime") from error
    if (size := sum(each.nbytes for each in model.state_dict().values())) > MAX_WEIGHTS_BYTES:
        raise ValueError(f"The weights have {size:,} bytes; the limit of {ONNX} is {MAX_WEIGHTS_BYTES:,}.")
    generator, side, network = torch.Generator().manual_seed(1), model.image_size, WithMaps(model).eval()
    images, others = (torch.rand(n, model.in_channels, side, side, generator=generator) for n in (3, 2))
    with torch.no_grad():
        expected = network(others)
    with whole_file(folder / ONNX) as writing:
        try:
            with warnings.catch_warnings(action="ignore"):
                batch, names = ({0: torch.export.Dim("N")},), {"input_names": ["images"], "output_names": [*expected]}
                program = torch.onnx.export(network, (images,), dynamic_shapes=batch, verbose=False, **names)
            program.save(writing, external_data=False)
            session = onnxruntime.InferenceSession(writing, providers=["CPUExecutionProvider"])
            found = session.run([*expected], {"images": others.numpy()})
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the exporter meets a thousand networks
            cause = error
            while cause.__cause__:  # its own words tell what its developers could do
                cause = cause.__cause__
            reason = str(cause).strip().split("\n")[0][:300]
            raise ValueError(f"{ONNX} is not written, as this network cannot be exported: {reason}") from error
        for (name, ours), theirs in zip(expected.items(), map(torch.from_numpy, found), strict=True):
            limit = TOLERANCE * max(1.0, ours.abs().max().item())
            if theirs.shape != ours.shape or not (theirs - ours).abs().max() <= limit:  # NaN too
                raise ValueError(f"{ONNX} is not written: onnxruntime's {name} is not that of torch.")
    return folder / ONNX

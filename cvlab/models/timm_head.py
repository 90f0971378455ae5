"""A backbone of timm with a head of its own, for transfer learning on the features of a frozen network.

    images -> normalize -> backbone -> pooled vector (D)                                  -> head -> logits
    images -> normalize -> backbone -> map (C, h, w) -> narrow: 1x1 convolution, flatten  -> head -> logits

The head is a perceptron: Linear, ReLU, Dropout for each of `hidden`, then a Linear layer with one output per class.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import MLP

from cvlab.models.model import Model, Stage
from cvlab.models.timm import timm_network
from cvlab.models.timm_stages import maps_of


class BackboneWithHead(Model):
    """A backbone of timm with random weights and without timm's head, and a perceptron on its features.

    Args:
        architecture: one of `timm.list_models()`.
        pool: whether the perceptron reads the backbone's pooled vector, or else its flattened map.
        last_stage: without `pool`: a module of timm's feature_info at whose output the backbone ends, such as
            "features.35" of vgg19, its last convolution with ReLU; by default the last one.
        channels: without `pool`: of a 1x1 convolution before the perceptron; 0 leaves it out.
        hidden: lengths of the hidden layers.
        dropout: after each of them.

    Raises:
        ValueError: no such architecture or stage, or features that are not a map where one is needed.
    """

    task = "classification"

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        architecture: str,
        pool: bool = True,
        last_stage: str | None = None,
        channels: int = 0,
        hidden: Sequence[int] = (256,),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if pool and (channels or last_stage):
            raise ValueError("a 1x1 convolution and a last stage need features that are not pooled")

        def make() -> nn.Module:
            network = timm_network(architecture, image_size, num_classes=0)
            if not pool:
                modules = [feature["module"] for feature in network.feature_info]
                if last_stage and last_stage not in modules:
                    raise ValueError(f"{architecture} has no stage “{last_stage}”; it has {', '.join(modules)}")
                end = modules.index(last_stage) if last_stage else len(modules) - 1
                network.prune_intermediate_layers([end], prune_head=True)
                network.feature_info = network.feature_info[: end + 1]
            return network

        self.backbone = make()
        with torch.device("meta"):  # a twin without memory shows which shapes the modules return
            twin, images = make().eval(), torch.empty(1, 3, image_size, image_size)
            shape = twin(images).shape
            self._maps = maps_of(twin, images)
        if not pool and (len(shape) != 4 or getattr(twin, "output_fmt", "NCHW") != "NCHW"):
            raise ValueError(f"the features of {architecture} are not a map (C, h, w): use them pooled")
        self.narrow = nn.Conv2d(shape[1], channels, 1) if channels else nn.Identity()
        perceptron = MLP((channels or shape[1]) * shape[2:].numel(), [*hidden, num_classes], dropout=dropout)
        self.head = nn.Sequential(nn.Flatten(), *list(perceptron)[:-1])  # no dropout after the logits

    @property
    def stages(self) -> dict[str, Stage]:
        found = {name: Stage(self.backbone.get_submodule(name), to_map) for name, to_map in self._maps.items()}
        if isinstance(self.narrow, nn.Conv2d):
            found["narrow"] = Stage(self.narrow)
        return found

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(self.normalize(images))  # (N, D) or (N, C, h, w)
        return self.head(self.narrow(features))  # (N, num_classes)

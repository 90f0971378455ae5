"""A backbone of timm under a head of our own: what transfer learning trains first, on features of a frozen network.

    images -> normalize -> backbone -> pooled vector (D)                                  -> head -> logits
    images -> normalize -> backbone -> map (C, h, w) -> narrow: 1x1 convolution, flatten  -> head -> logits

The head is a perceptron: Linear, ReLU, Dropout for each of `hidden`, then a Linear layer with one output a class.
"""

from collections.abc import Sequence

import timm
import torch
from timm.models import is_model
from torch import Tensor, nn

from cvlab.models.model import Model, Normalize, Stage, identity
from cvlab.models.timm import maps_of


class BackboneWithHead(Model):
    """A backbone of timm, freshly initialised and without its own head, and a perceptron on its features.

    Args:
        num_classes: length of the logits.
        image_size: side of the square view.
        architecture: one of `timm.list_models()`.
        pool: the perceptron reads the backbone's pooled vector; else its map, flattened.
        last_stage: without `pool`: a module of timm's feature_info at whose output the backbone ends, such as
            "features.35" of vgg19, its last convolution with ReLU; by default the last one.
        channels: without `pool`: of a 1x1 convolution that narrows the map; 0 leaves it out.
        hidden: lengths of the layers before the last one.
        dropout: after each of them.
        mean, std: of the images in [0, 1].

    Raises:
        ValueError: no such architecture or stage, or features that are no map.
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
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if not is_model(architecture):
            raise ValueError(f"timm has no network {architecture!r}; see timm.list_models()")
        if pool and (channels or last_stage):
            raise ValueError("a 1x1 convolution and a last stage are for features that are not pooled")

        def make() -> nn.Module:
            size = {"input_size": (3, image_size, image_size)}
            network = timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=size)
            if not pool:
                modules = [feature["module"] for feature in network.feature_info]
                if last_stage and last_stage not in modules:
                    raise ValueError(f"{architecture} has no stage {last_stage!r}; it has {', '.join(modules)}")
                end = modules.index(last_stage) if last_stage else len(modules) - 1
                network.prune_intermediate_layers([end], prune_head=True)
                network.feature_info = network.feature_info[: end + 1]
            return network

        self.normalize = Normalize(mean, std)
        self.backbone = make()
        with torch.device("meta"):  # a twin without memory shows what comes out where
            twin, images = make().eval(), torch.empty(1, 3, image_size, image_size)
            shape = twin(images).shape
            self._maps = maps_of(twin, images)
        if not pool and (len(shape) != 4 or getattr(twin, "output_fmt", "NCHW") != "NCHW"):
            raise ValueError(f"the features of {architecture} are no map (C, h, w): take them pooled")
        self.narrow = nn.Conv2d(shape[1], channels, 1) if channels else nn.Identity()
        lengths = [(channels or shape[1]) * shape[2:].numel(), *hidden]
        layers = [nn.Flatten()]
        for i in range(len(hidden)):
            layers += [nn.Linear(lengths[i], lengths[i + 1]), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(lengths[-1], num_classes))

    @property
    def stages(self) -> dict[str, Stage]:
        found = {name: Stage(self.backbone.get_submodule(name), to_map) for name, to_map in self._maps.items()}
        if isinstance(self.narrow, nn.Conv2d):
            found["narrow"] = Stage(self.narrow, identity)
        return found

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(self.normalize(images))  # (N, D) or (N, C, h, w)
        return self.head(self.narrow(features))  # (N, num_classes)

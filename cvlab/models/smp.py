"""U-Nets of the library segmentation_models.pytorch (smp) on any of its encoders, under smp's tensor names.

    images -> normalize -> encoder -> features -> skips -> decoder -> segmentation_head -> logits

The encoder is a classifier's backbone, of smp itself ("resnet34", "efficientnet-b0") or of timm ("tu-" and timm's
name). It halves the resolution `depth` times. Each decoder block doubles it and adds the features of that resolution.
Stages of equal number have equal resolution: encoder2 and decoder2 are half as large as the image, decoder1 is as large
as the image, and the encoder's last features are the bottleneck.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from segmentation_models_pytorch import Unet
from segmentation_models_pytorch.encoders import encoders, get_encoder
from timm.models import FeatureHookNet, get_pretrained_cfg, is_model, is_model_pretrained
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cvlab.models.model import MAX_MASKS, Model, Stage
from cvlab.models.timm import load_backbone, read_weights, timm_network
from cvlab.models.timm_stages import module_outputs

DECODER_CHANNELS = (256, 128, 64, 32, 16)  # smp's default
DEPTHS = (3, 4, 5)


class SmpUNet(Model):
    """A segmenter: one channel per class.

    Args:
        encoder: a key of `segmentation_models_pytorch.encoders.encoders`, or "tu-" and the name of a network of timm.
        decoder_channels: one number per decoder block, the coarsest first; their count is the encoder's depth, 3 to 5.

    Raises:
        ValueError: there is no such encoder, smp cannot use it, or decoder_channels has another length.
    """

    task = "segmentation"

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        encoder: str = "resnet34",
        decoder_channels: Sequence[int] = DECODER_CHANNELS,
    ) -> None:
        super().__init__()
        if not is_encoder(encoder):
            raise ValueError(f"segmentation_models.pytorch has no encoder {_shown(encoder)}")
        if len(decoder_channels) not in DEPTHS:
            raise ValueError("decoder_channels must be a list of 3 to 5 numbers, one for each decoder block")

        def make() -> Unet:
            settings = {"encoder_weights": None, "decoder_channels": decoder_channels, "classes": num_classes}
            with _LinspaceOnCpu():
                return Unet(encoder, len(decoder_channels), **settings)

        unet = make()
        self.encoder, self.decoder, self.segmentation_head = unet.encoder, unet.decoder, unet.segmentation_head
        # Nothing is computed here: a place to read features that no module of the encoder returns as they are.
        self.skips = nn.ModuleList(nn.Identity() for _ in decoder_channels)
        with torch.device("meta"):  # a twin without memory shows which module returns which features
            self._sources = feature_sources(make().encoder.eval(), torch.empty(1, 3, image_size, image_size))

    @property
    def stages(self) -> dict[str, Stage]:
        """The encoder's stages are the modules that return its features; where none does, the skips to the decoder.

        The gradient at such a module has two parts, through the skip and through the deeper layers. At a skip, which is
        used for most networks of (N, h, w, C), of tokens, or with hooks of timm, it has the first part only. At the
        bottleneck both are one.
        """
        depth = len(self.skips)
        found = {}
        for level, source in self._sources.items():
            name = "bottleneck" if level == depth else f"encoder{level + 1}"
            found[name] = Stage(self.encoder.get_submodule(source) if source else self.skips[level - 1])
        for i, block in enumerate(self.decoder.blocks):
            found[f"decoder{depth - i}"] = Stage(block)
        return found

    @property
    def cuts(self) -> tuple[dict[str, nn.Module], Sequence[str]]:
        """What enters the decoder, the skips from the uppermost on and the bottleneck, and the modules after it."""
        *skips, bottleneck = self.skips
        edges = {f"skip{i}": skip for i, skip in enumerate(skips, start=2)}  # the first lies at half the resolution
        return {**edges, "bottleneck": bottleneck}, ("decoder", "segmentation_head")

    def library_config(self) -> dict:
        """What smp needs to build the same network: the top level of config.json."""
        arguments = self.config["arguments"]
        return {
            "_model_class": "Unet",
            "encoder_name": arguments.get("encoder", "resnet34"),
            "encoder_depth": len(self.skips),
            "encoder_weights": None,
            "decoder_channels": list(arguments.get("decoder_channels", DECODER_CHANNELS)),
            "classes": len(self.class_names),
            **({"in_channels": self.in_channels} if self.channels else {}),
        }

    def heights(self) -> dict[str, int]:
        """How many resolutions below the decoder each parameter is, by name: 0 in the decoder, 1 at the bottleneck."""
        depth, place = len(self.skips), {name: i for i, (name, _) in enumerate(self.named_modules())}  # in order of use
        last = {
            level: max(i for name, i in place.items() if f"{name}.".startswith(f"encoder.{source}."))
            for level, source in self._sources.items()
            if source
        }
        found = {}
        for name, _ in self.named_parameters():
            levels = [level for level, end in last.items() if place[name.rpartition(".")[0]] <= end]
            found[name] = depth + 1 - min(levels, default=depth) if name.startswith("encoder.") else 0
        return found

    def forward(self, images: Tensor) -> Tensor:
        first, *features = self.encoder(self.normalize(images))  # features[i]: (N, C_i, H / 2^(i+1), W / 2^(i+1))
        features = [skip(each) for skip, each in zip(self.skips, features, strict=True)]
        return self.segmentation_head(self.decoder([first, *features]))  # (N, num_classes, H, W)


def is_encoder(name: str) -> bool:
    """Whether smp knows an encoder of this name, its own or timm's."""
    of_timm = name.removeprefix("tu-") if name.startswith("tu-") else ""
    known_tag = "." not in of_timm or is_model_pretrained(of_timm)
    return name in encoders or (is_model(of_timm) and known_tag)


def feature_sources(encoder: nn.Module, images: Tensor) -> dict[int, str]:
    """Which module of an encoder returns the features of each level, found in one forward pass.

    Returns:
        By level, from 1 on, the module's name; "" where no module returns exactly these features. Levels that the
        encoder leaves out (smp fills them with features of 0 channels) are not in it.
    """
    features, outputs = module_outputs(encoder, images)
    # timm's own hooks took the features: what a later hook returns in a module's place would not reach the decoder.
    by_hooks = isinstance(getattr(encoder, "model", None), FeatureHookNet)
    found = {}
    for level, feature in enumerate(features[1:], start=1):
        # An output of an earlier version was changed in place afterwards, by a ReLU for example.
        same = [name for name, (output, old) in outputs.items() if output is feature and old == feature._version]
        # The first such module, or the block that it ends. Later ones are identities of deeper layers.
        ended = (name for name in same if f"{same[0]}.".startswith(f"{name}."))
        if feature.shape[1]:
            found[level] = "" if by_hooks else min(ended, key=len, default="")
    return found


class _LinspaceOnCpu(TorchFunctionMode):
    """torch.linspace makes numbers even on the meta device: smp's mit_* encoders read their dropout rates from it."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        return func(*args, **(kwargs or {}) | ({"device": "cpu"} if func is torch.linspace else {}))


# What config.json may say beside classes, encoder_name, encoder_depth and decoder_channels. All else is refused: smp
# would build another network from it.
ALLOWED = {
    "_model_class": ("Unet",),
    "in_channels": (3,),
    "decoder_use_norm": (True, "batchnorm"),
    "decoder_use_batchnorm": (True, None),
    "decoder_attention_type": (None,),
    "decoder_interpolation": ("nearest",),
    "activation": (None, "identity", "sigmoid"),  # cvlab's models return logits
    "aux_params": (None,),
}
READ = ("classes", "encoder_name", "encoder_depth", "decoder_channels", "encoder_weights")  # the last has no effect


def from_smp_config(config: dict) -> dict:
    """The entries of cvlab's config.json from smp's.

    smp's says nothing of class names, image size and normalisation. Classes are numbered. The view has 256 pixels, or
    the only size that the encoder takes. mean and std are ImageNet's, or those that timm states for its network.

    Raises:
        ValueError: the config asks for something other than a U-Net that cvlab can open.
    """
    for key, value in config.items():
        if key not in READ and (key not in ALLOWED or value not in ALLOWED[key]):
            raise ValueError(f"{_shown(key)} {_shown(value)} of segmentation_models.pytorch cannot be opened by cvlab")
    encoder, num_classes = config.get("encoder_name", "resnet34"), config.get("classes", 1)
    channels = config.get("decoder_channels", list(DECODER_CHANNELS))
    if not isinstance(encoder, str) or not is_encoder(encoder):
        raise ValueError(f"segmentation_models.pytorch has no encoder {_shown(encoder)}")
    if type(num_classes) is not int or not 1 <= num_classes <= MAX_MASKS:
        raise ValueError(f"classes is {_shown(num_classes)}: a segmenter has 1 to {MAX_MASKS:,}")
    if not isinstance(channels, list) or config.get("encoder_depth", 5) != len(channels):
        raise ValueError("encoder_depth is not the length of decoder_channels")
    return {
        "task": "segmentation",
        "network": "smp",
        "arguments": {"encoder": encoder, "decoder_channels": channels},
        "class_names": [f"class {i}" for i in range(num_classes)] if num_classes > 1 else ["foreground"],
        **default_view(encoder),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "threshold": 0.5,
    }


def default_view(encoder: str) -> dict:
    """What pretrained weights of an encoder expect: {image_size, mean, std}, arguments of `cvlab.models.build`."""
    image_size, mean, std = 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if encoder.startswith("tu-"):
        known = get_pretrained_cfg(encoder.removeprefix("tu-"))
        image_size = known.input_size[-1] if known.fixed_input_size else image_size
        mean, std = list(known.mean), list(known.std)
    return {"image_size": image_size, "mean": mean, "std": std}


# --- pretrained encoders ----------------------------------------------------------------------------------------------


def encoder_of(name: str) -> str:
    """The key of an encoder by the name that a user gives: smp's own, or a network of timm with or without "tu-".

    ValueError if there is none.
    """
    for encoder in (name, f"tu-{name}"):
        if is_encoder(encoder):
            return encoder
    raise ValueError(f"segmentation_models.pytorch has no encoder {_shown(name)}, and timm no network of this name")


def load_encoder(model: SmpUNet, file: Path | None = None) -> None:
    """Gives the encoder of a U-Net pretrained weights, from a file or without one from the Hub or its local cache.

    Args:
        file: with the tensor names of timm for one of timm's networks, else of smp; its classifier is left out.

    Raises:
        OSError: there are none on the Hub, or it cannot be reached.
        ValueError: the file cannot be read, or is of another network.
    """
    encoder, depth, channels = model.config["arguments"]["encoder"], len(model.skips), model.in_channels
    of_timm, weights = encoder.startswith("tu-"), read_weights(file) if file else None
    try:
        if file and of_timm:
            whole = timm_network(encoder.removeprefix("tu-"), model.image_size)
            load_backbone(whole, weights)
            known = {"pretrained_cfg_overlay": {"state_dict": whole.state_dict()}}
            source = get_encoder(encoder, channels, depth, weights=True, **known)
        elif file:
            source = get_encoder(encoder, depth=depth)
            source.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("fc.", "classifier."))})
            source.set_in_channels(channels)
        else:
            source = get_encoder(encoder, channels, depth, weights=True if of_timm else "imagenet")
    except Exception as error:  # of the Hub's client, of the network, of tensors of another network
        reason = str(error).split("\n")[0].rstrip(".")
        if file:
            raise ValueError(f"{file} does not fit {encoder}: {reason}.") from error
        raise OSError(
            f"The pretrained weights of {encoder} cannot be reached ({reason}). Give them as a file with --weights, or "
            "start with --no-pretrained."
        ) from error
    model.encoder.load_state_dict(source.state_dict())


def _shown(value: object) -> str:
    """At most 60 characters of an entry; a stranger's text may hold control characters."""
    return ascii(str(value)[:60])

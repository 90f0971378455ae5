"""Trains a U-Net to find the pixels of something.

    python train/segmenter.py                                   synthetic scenes, about two minutes on two cores
    python train/segmenter.py --data DIR --out runs/NAME        DIR/images/NAME.jpg with DIR/masks/NAME.png
    python train/segmenter.py --data DIR --backbone resnet18    on a pretrained encoder, first frozen, then tuned

Masks are black and white, or have numbers: 0 the background, 1, 2, 3 ... classes that exclude each other, 255 not
scored. The best model by validation iou, the mean over the classes, is kept in the run folder, which
`python app.py runs/NAME` opens.
"""

import argparse
from functools import partial
from pathlib import Path

import cli
import torch
from accelerate.utils import set_seed
from accelerator import accelerator_for, with_common_statistics
from calibration import object_counts
from resume import open_run, start_from
from run import Run

from cvlab import models, render
from cvlab.data import sets
from cvlab.data.cache import Cache
from cvlab.data.parts import segmentation_parts
from cvlab.learning import frozen, optim
from cvlab.learning.losses import EXCLUSIVE_LOSSES, SEGMENTATION_LOSSES, pixel_weights, segmentation_loss
from cvlab.metrics import mean_iou, segmentation_scores
from cvlab.models import smp
from cvlab.models.model import TILES
from cvlab.transforms import resize_logits

ALL_LEVELS = 5  # of an encoder


def parser() -> cli.Parser:
    """The options of this script."""
    options = cli.parser(
        "segmenter", __doc__, epochs=8, batch_size=32, lr=3e-3, optimizer="adamw", weight_decay=0.01, normalize=None
    )
    switch, add = argparse.BooleanOptionalAction, options.add_argument
    zoom = "training photos are scaled by a random factor in between, and mirrored beyond their edges"
    add("--class-names", nargs="+", help="names of the mask's classes, without the background")
    losses = (*SEGMENTATION_LOSSES, *EXCLUSIVE_LOSSES)
    add("--loss", choices=losses, help="ce: classes exclude each other; by default by the masks, with dice")
    weights = "balanced: rare classes count more in the cross-entropy, pixels / (classes * pixels of the class)"
    add("--class-weights", choices=("none", "balanced"), default="none", help=weights)
    add("--width", type=int, default=16, help="channels of the first encoder")
    add("--depth", type=int, default=3, help="levels above the bottleneck")
    add("--batch-norm", action=switch, default=True, help="after every convolution")
    add("--dropout", type=float, default=0.0)
    add("--resize", choices=("squash",), default="squash", help="a U-Net sees the whole photo, squashed; see --crop")
    crop = "train on random squares of the photos at their own resolution; photos are then predicted in tiles"
    add("--crop", action=switch, default=False, help=crop)
    add("--zoom", nargs=2, type=float, default=[0.714, 1.4], metavar=("LOW", "HIGH"), help=zoom)
    group = options.add_argument_group(
        "pretrained encoder", "In place of --width, --depth, --batch-norm and --dropout."
    )
    add = group.add_argument
    add("--backbone", help="of segmentation_models.pytorch or of timm; size, mean and std are its own if not given")
    add("--weights", type=Path, metavar="FILE", help=".safetensors or .pth with timm's tensor names")
    add("--pretrained", action=switch, default=True, help="start with its weights, from the Hub without --weights")
    add("--decoder-channels", type=int, nargs="+", default=smp.DECODER_CHANNELS, help="the coarsest level's first")
    add("--frozen-epochs", type=int, default=2, help="at first, while only the decoder learns")
    add("--layer-decay", type=float, default=0.7, help="a level's learning rate is that of the one above times this")
    return options


def network_of(args: argparse.Namespace) -> tuple[str, dict, dict]:
    """Name and arguments of the network in cvlab/models/, and what it sees: image_size, and mean and std if known."""
    if args.backbone is None:
        arguments = {name: vars(args)[name] for name in ("width", "depth", "batch_norm", "dropout")}
        return "unet", arguments, {"image_size": args.image_size or 64}
    encoder = smp.encoder_of(args.backbone)
    view = smp.default_view(encoder)
    arguments = {"encoder": encoder, "decoder_channels": list(args.decoder_channels)}
    return "smp", arguments, view | ({"image_size": args.image_size} if args.image_size else {})


def scores_of(part: str, counts: torch.Tensor) -> dict[str, float]:
    """What the history says of a part, from its `object_counts` (N, C, 4)."""
    found = segmentation_scores(counts.sum(1)) | {"iou": mean_iou(counts)}
    scores = {name: found[name] for name in ("iou", "accuracy", "precision", "recall")} | {"f1": found["dice"]}
    return {f"{part}_{name}": value for name, value in scores.items()}


def main() -> None:
    args = parser().parse_args()
    if not 0 < args.zoom[0] <= args.zoom[1]:
        raise ValueError("--zoom takes two factors above 0, the smaller one first: 1 1.4 only enlarges.")
    network, arguments, view = network_of(args)
    size, channels = view["image_size"], cli.channels_of(args)
    models.check_size(network, size, arguments, channels)
    state = open_run(args)
    set_seed(args.seed)

    # Data: photos are decoded once; each epoch augments them anew.
    names, exclusive = args.class_names, args.loss in EXCLUSIVE_LOSSES if args.loss else None
    parts = segmentation_parts(args.data, args.split_seed, names, size, exclusive=exclusive, channels=channels)
    cache = Cache(args.out)
    augmentation = {"augment": args.augment, "zoom": args.zoom, "jitter": args.color_jitter, "erase": args.erase}
    train_set, val_set, val_masks = sets.segmentation_sets(parts, size, cache, args.seed, args.crop, **augmentation)
    train_loader, val_loader = sets.loaders(train_set, val_set, args.batch_size)
    print(sets.summary(parts, cache))

    # Model, loss, optimizer, schedule.
    if args.normalize or channels or "mean" not in view:
        view["mean"], view["std"] = sets.normalization(args.normalize or "data", train_set.images)
    view |= {"crop_mode": TILES if args.crop else "center", "channels": channels}
    model = models.build(network, parts.class_names, arguments=arguments, exclusive=parts.exclusive, **view)
    start_from(args.start_from, model)
    if args.backbone and args.pretrained and not args.start_from:
        smp.load_encoder(model, args.weights)
    model = model.to(memory_format=torch.channels_last)
    weights = pixel_weights(train_set.labels) if args.class_weights == "balanced" else None
    criterion = segmentation_loss(args.loss, parts.exclusive, weights)
    accelerator = accelerator_for(model, next(iter(train_loader)), criterion, args, state)
    sets.onto_gpu(accelerator.device, train_set, val_set)
    model = with_common_statistics(accelerator, model)
    gpu, steps = accelerator.device.type == "cuda", len(train_loader)
    heights = frozen.heights(model) if args.backbone else {}
    factors = {name: args.layer_decay**height for name, height in heights.items()}
    settings = {"momentum": args.momentum, "decay": args.decay, "factors": factors, "fused": gpu}
    optimizer = optim.optimizer(args.optimizer, model, args.lr, args.weight_decay, **settings)
    scheduler = optim.schedule(args.schedule, optimizer, args.epochs * steps, steps, args.div_factor)
    model, optimizer, scheduler, train_loader, val_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, val_loader
    )
    kept = accelerator.unwrap_model(model)
    frame = partial(render.training_frame, kept, val_set.images.middles(2), masks=val_masks)
    run = Run(args, accelerator, state, parts, counts=4 * (len(parts.class_names) - parts.exclusive))

    for epoch in run.epochs(train_loader, args.epochs):
        train_set.epoch = epoch
        model.train()
        if args.backbone:
            frozen.freeze(kept, 0 if epoch <= args.frozen_epochs else ALL_LEVELS)
            frozen.train_mode(kept)
        for images, masks in run.batches():
            logits = model(images)
            loss = criterion(logits, masks)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.add(loss, len(images), *object_counts(kept, logits, masks).sum(0).flatten())
        train_loss, _, *train_counts = run.totals()

        model.eval()
        val_loss, val_counts = 0.0, []
        with torch.no_grad():
            tiles = (accelerator.gather_for_metrics(model(images).float()).cpu() for images, _ in val_loader)
            for logits, mask in zip(val_set.images.join(tiles), val_masks, strict=True):
                resized = resize_logits(logits, mask.shape[-2:])
                val_loss += criterion(resized, mask[None]).item()
                val_counts.append(object_counts(kept, resized, mask[None]))
        val_scores = scores_of("val", torch.cat(val_counts))
        if args.schedule == "plateau":
            scheduler.step(val_loss)
        run.end_epoch(
            kept,
            score=val_scores["val_iou"],
            frame=frame,
            lr=scheduler.get_last_lr()[0],
            train_loss=train_loss,
            val_loss=val_loss / len(val_masks),
            **scores_of("train", torch.tensor(train_counts).view(1, -1, 4)),
            **val_scores,
        )
    run.finish(kept)


if __name__ == "__main__":
    cli.run(main)

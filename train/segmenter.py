"""Trains a U-Net to find the pixels of something.

    python train/segmenter.py                                   synthetic scenes, about two minutes on two cores
    python train/segmenter.py --data DIR --out runs/NAME        DIR/images/NAME.jpg with DIR/masks/NAME.png

The best model by validation iou is kept in the run folder, which `python app.py runs/NAME` opens.
"""

import argparse
from functools import partial

import cli
import torch
from accelerate.utils import set_seed
from accelerator import accelerator_for, with_common_statistics
from resume import start_from
from run import Run, open_run

from cvlab import models, render
from cvlab.data import sets
from cvlab.data.cache import Cache
from cvlab.data.parts import segmentation_parts
from cvlab.learning import optim
from cvlab.learning.losses import SEGMENTATION_LOSSES
from cvlab.metrics import segmentation_counts, segmentation_scores
from cvlab.transforms import resize_logits


def parser() -> cli.Parser:
    """The options of this script."""
    options = cli.parser(
        "segmenter", __doc__, image_size=64, epochs=8, batch_size=32, lr=3e-3, optimizer="adamw", weight_decay=0.01
    )
    switch, add = argparse.BooleanOptionalAction, options.add_argument
    zoom = "training photos are scaled by a random factor in between, and mirrored beyond their edges"
    add("--class-names", nargs="+", help="names of the mask's classes, without the background")
    add("--width", type=int, default=16, help="channels of the first encoder")
    add("--depth", type=int, default=3, help="levels above the bottleneck")
    add("--batch-norm", action=switch, default=True, help="after every convolution")
    add("--dropout", type=float, default=0.0)
    add("--resize", choices=("squash",), default="squash", help="a U-Net always sees the whole photo, squashed")
    add("--zoom", nargs=2, type=float, default=[0.714, 1.4], metavar=("LOW", "HIGH"), help=zoom)
    add("--loss", choices=SEGMENTATION_LOSSES, default="bce+dice")
    return options


def scores_of(part: str, counts: torch.Tensor) -> dict[str, float]:
    """What the history says of a part, from its `segmentation_counts` (N, 4)."""
    found = segmentation_scores(counts)
    scores = {name: found[name] for name in ("iou", "accuracy", "precision", "recall")} | {"f1": found["dice"]}
    return {f"{part}_{name}": value for name, value in scores.items()}


def main() -> None:
    args = parser().parse_args()
    if not 0 < args.zoom[0] <= args.zoom[1]:
        raise ValueError("--zoom takes two factors above 0, the smaller one first: 1 1.4 only enlarges.")
    arguments = {name: vars(args)[name] for name in ("width", "depth", "batch_norm", "dropout")}
    models.check_size("unet", args.image_size, arguments)
    state = open_run(args)
    set_seed(args.seed)

    # Data: photos are decoded once; each epoch augments them anew.
    parts = segmentation_parts(args.data, args.split_seed, args.class_names, args.image_size)
    cache = Cache(args.out)
    augmentation = {"augment": args.augment, "zoom": args.zoom, "jitter": args.color_jitter, "erase": args.erase}
    train_set, val_set, val_masks = sets.segmentation_sets(parts, args.image_size, cache, args.seed, **augmentation)
    train_loader, val_loader = sets.loaders(train_set, val_set, args.batch_size)
    print(sets.summary(parts, cache))

    # Model, loss, optimizer, schedule.
    mean, std = sets.normalization(args.normalize, train_set.images)
    model = models.build("unet", parts.class_names, args.image_size, arguments, mean, std)
    start_from(args.start_from, model)
    model = model.to(memory_format=torch.channels_last)
    criterion = SEGMENTATION_LOSSES[args.loss]
    accelerator = accelerator_for(model, next(iter(train_loader)), criterion, args)
    sets.onto_gpu(accelerator.device, train_set, val_set)
    model = with_common_statistics(accelerator, model)
    gpu, steps = accelerator.device.type == "cuda", len(train_loader)
    settings = {"momentum": args.momentum, "decay": args.decay, "fused": gpu}
    optimizer = optim.optimizer(args.optimizer, model, args.lr, args.weight_decay, **settings)
    scheduler = optim.schedule(args.schedule, optimizer, args.epochs * steps, steps, args.div_factor)
    model, optimizer, scheduler, train_loader, val_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, val_loader
    )
    kept = accelerator.unwrap_model(model)
    frame = partial(render.training_frame, kept, torch.stack(val_set.images[:2]), masks=val_masks)
    run = Run(args, accelerator, state, parts, counts=4)

    for epoch in run.epochs(train_loader, args.epochs):
        train_set.epoch = epoch
        model.train()
        for images, masks in run.batches():
            logits = model(images)
            loss = criterion(logits, masks)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.add(loss, len(images), *segmentation_counts(logits > 0, masks).sum(0))
        train_loss, _, *train_counts = run.totals()

        model.eval()
        val_loss, val_counts = 0.0, []
        with torch.no_grad():
            for images, indices in val_loader:
                logits, indices = accelerator.gather_for_metrics((model(images).float(), indices))
                for square, index in zip(logits.cpu(), indices.tolist(), strict=True):
                    mask = val_masks[index][None]
                    resized = resize_logits(square[None], mask.shape[-2:])
                    val_loss += criterion(resized, mask).item()
                    val_counts.append(segmentation_counts(resized > 0, mask))
        val_scores = scores_of("val", torch.cat(val_counts))
        if args.schedule == "plateau":
            scheduler.step(val_loss)
        run.end_epoch(
            kept,
            score=val_scores["val_iou"],
            frame=frame,
            lr=scheduler.get_last_lr()[0],
            train_loss=train_loss,
            val_loss=val_loss / len(val_set),
            **scores_of("train", torch.tensor([train_counts])),
            **val_scores,
        )
    run.finish(kept)


if __name__ == "__main__":
    cli.run(main)

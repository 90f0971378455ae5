"""Trains a CNN from scratch to tell classes apart.

    python train/classifier.py                                  synthetic scenes, about two minutes on two cores
    python train/classifier.py --data DIR --out runs/NAME       DIR/<class>/* or DIR/{train,val,test}/<class>/*

The best model by validation score is kept in the run folder, which `python app.py runs/NAME` opens.
"""

import argparse
from functools import partial

import cli
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, set_seed
from accelerator import accelerator_for, with_common_statistics
from resume import open_run, start_from
from run import Run
from timm.utils import ModelEmaV3

from cvlab import models, render
from cvlab.data import sets
from cvlab.data.augment import mixing
from cvlab.data.cache import Cache
from cvlab.data.parts import classification_parts
from cvlab.learning import optim
from cvlab.learning.losses import cross_entropy


def parser() -> cli.Parser:
    """The options of this script."""
    options = cli.parser(
        "classifier", __doc__, image_size=64, epochs=36, batch_size=64, lr=0.1, optimizer="nesterov", weight_decay=5e-4
    )
    cli.add_classification(options, crop_pct=1.0, label_smoothing=0.1)
    switch, add = argparse.BooleanOptionalAction, options.add_argument
    add("--mixup", type=float, default=0.0, help="alpha of blending two images; 0: never")
    add("--cutmix", type=float, default=0.0, help="alpha of pasting a box of another image; 0: never")
    add("--ema", type=float, default=0.0, help="decay of a moving average of the weights, which is kept; 0: none")
    add("--clip-norm", type=float, default=0.0, help="clip the gradient norm; 0 disables")
    add = options.add_argument_group("network", "Options not given take the defaults of cvlab/models/.").add_argument
    add("--network", choices=("convnet", "plain", "residual"), default="convnet")
    add("--widths", type=int, nargs="+", help="channels of each stage or block")
    add("--depth", type=int, help="convnet: residual blocks per stage; plain: convolutions per block")
    add("--dropout", type=float)
    add("--dropout-at", type=int, nargs="+", help="plain: before which convolutions; residual: in which blocks")
    add("--hidden", type=int, nargs="*", help="plain: lengths of the linear layers before the last")
    add("--head-dropout", type=float, nargs="*", help="plain: before each linear layer")
    add("--pools", type=int, help="plain: blocks that end in max pooling")
    add("--pool-to", type=int, help="plain: side of the map that the linear layers read")
    add("--padding", action=switch, help="plain: convolutions keep height and width")
    add("--batch-norm", action=switch, help="plain: after every convolution")
    add("--first-relu", action=switch, help="plain: after the first convolution")
    add("--stem-bias", action=switch, help="residual: in the first convolution")
    return options


def main() -> None:
    args = parser().parse_args()
    names = ("widths", "depth", "dropout", "hidden", "head_dropout", "pools", "pool_to", "padding", "batch_norm")
    names += ("first_relu", "stem_bias", "dropout_at")
    arguments = {name: value for name in names if (value := vars(args)[name]) is not None}
    channels = cli.channels_of(args)
    models.check_size(args.network, args.image_size, arguments, channels)
    state = open_run(args)
    set_seed(args.seed)

    # Data: photos are decoded once; each epoch augments them anew.
    cut = args.data, args.split_seed, args.per_class
    parts = classification_parts(*cut, args.image_size, args.allow_leaks, classes=args.classes, channels=channels)
    cache, view = Cache(args.out), cli.view_of(args)
    how = {"augment": args.augment, "min_area": args.min_area, "jitter": args.color_jitter, "erase": args.erase}
    train_set, val_set = sets.classification_sets(parts, view, cache, args.seed, **how, fast=True)
    train_loader, val_loader = sets.loaders(train_set, val_set, args.batch_size)
    print(sets.summary(parts, cache))

    # Model, loss, optimizer, schedule.
    mean, std = sets.normalization(args.normalize, train_set.images)
    view |= {"arguments": arguments, "mean": mean, "std": std, "channels": channels}
    model = models.build(args.network, parts.class_names, **view)
    start_from(args.start_from, model)
    model = model.to(memory_format=torch.channels_last)
    mix = mixing(args.mixup, args.cutmix, len(parts.class_names))
    criterion = cross_entropy(args.label_smoothing, args.class_weights, train_set.labels, len(parts.class_names))
    accelerator = accelerator_for(model, next(iter(train_loader)), criterion, args, state)
    sets.onto_gpu(accelerator.device, train_set, val_set)
    model = with_common_statistics(accelerator, model)
    gpu, steps = accelerator.device.type == "cuda", len(train_loader)
    settings = {"momentum": args.momentum, "decay": args.decay, "fused": gpu}
    optimizer = optim.optimizer(args.optimizer, model, args.lr, args.weight_decay, **settings)
    scheduler = optim.schedule(args.schedule, optimizer, args.epochs * steps, steps, args.div_factor)
    model, optimizer, scheduler, train_loader, val_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, val_loader
    )
    bare = accelerator.unwrap_model(model)
    ema = ModelEmaV3(bare, args.ema, use_warmup=True) if args.ema else None
    if ema:
        accelerator.register_for_checkpointing(ema)
    kept = ema.module if ema else bare
    watched = torch.stack([val_set.images[i] for i in render.spread(val_set.labels)])
    frame = partial(render.training_frame, kept, watched)
    run = Run(args, accelerator, state, parts)

    for epoch in run.epochs(train_loader, args.epochs):
        train_set.epoch = epoch
        model.train()
        for images, labels in run.batches():
            images, targets = mix(images, labels)
            logits = model(images)
            loss = criterion(logits, targets)
            accelerator.backward(loss)
            if args.clip_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.clip_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if ema:
                ema.update(bare, run.total_steps)
            run.add(loss, len(images), (logits.argmax(1) == targets.argmax(1)).sum())
        train_loss, seen, right = run.totals()

        model.eval()
        broadcast(list(kept.buffers()))  # of several processes, the statistics of the first one count
        val_loss, val_right = 0.0, 0
        with torch.no_grad():
            for images, labels in val_loader:
                logits, labels = accelerator.gather_for_metrics((kept(images), labels))
                val_loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
                val_right += (logits.argmax(1) == labels).sum().item()
        val_accuracy = val_right / len(val_set)
        if args.schedule == "plateau":
            scheduler.step(val_loss)
        run.end_epoch(
            kept,
            score=-val_loss if args.best_by == "loss" else val_accuracy,
            frame=frame,
            lr=scheduler.get_last_lr()[0],
            train_loss=train_loss,
            val_loss=val_loss / len(val_set),
            train_accuracy=right / seen,
            val_accuracy=val_accuracy,
        )
    run.finish(bare)


if __name__ == "__main__":
    cli.run(main)

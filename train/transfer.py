"""Trains a network of timm to tell classes apart: first a new head, then the last layers of the backbone as well.

    python train/transfer.py --backbone resnet18 --data DIR --out runs/NAME       the head, on features computed once
    python train/transfer.py --backbone resnet18 --data DIR --unfreeze 2 --finetune-epochs 10        then two layers

Phase 1 trains the head on the frozen backbone; phase 2 trains the head and the backbone's last layers, which may have
lower learning rates. Unless every epoch augments anew, the part before the first layer that learns runs once per view.
The best model by validation score is kept in the run folder; timm can open it too if its head is linear.
"""

import argparse
import copy
from pathlib import Path

import cli
import timm
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from accelerator import accelerator_for
from resume import open_run, start_from
from run import Run

from cvlab import models
from cvlab.data import sets
from cvlab.data.cache import Cache
from cvlab.data.parts import classification_parts
from cvlab.learning import frozen, optim
from cvlab.learning.losses import cross_entropy
from cvlab.models import Model
from cvlab.models.timm import default_view, load_pretrained

# The options that are arguments of a head of our own.
HEADS = {"linear": (), "mlp": ("hidden", "dropout"), "map": ("hidden", "dropout", "channels", "last_stage")}


def parser() -> cli.Parser:
    """The options of this script."""
    options = cli.parser(
        "transfer", __doc__, epochs=20, batch_size=32, lr=1e-3, optimizer="adamw", weight_decay=0.01, schedule="cosine"
    )
    cli.add_classification(options, resize=None, normalize=None, augment=None)
    views = "1: photos as they are; N: N augmented views of each, computed once; 0: new augmentation every epoch"
    options.add_argument("--views", type=int, help=f"{views}; 1 unless --augment is given")
    group = options.add_argument_group("network", "Size, crop, mean and std are the backbone's own if not given.")
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--backbone", default="resnet18", help="a network of timm, with or without a tag")
    add("--weights", type=Path, metavar="FILE", help=".safetensors or .pth with timm's tensor names")
    add("--pretrained", action=switch, default=True, help="start with timm's weights, from the Hub without --weights")
    add("--head", choices=HEADS, default="linear", help="mlp: on the pooled features; map: on the unpooled ones")
    add("--hidden", type=int, nargs="*", default=[256], help="mlp, map: lengths of the layers before the last")
    add("--dropout", type=float, default=0.5, help="mlp, map: after each of these layers")
    add("--channels", type=int, default=0, help="map: channels of a 1x1 convolution before the layers; 0: none")
    add("--last-stage", help="map: the stage at which the backbone ends; by default its last one")
    add = options.add_argument_group("phase 2").add_argument
    add("--unfreeze", type=int, default=0, help="how many of the backbone's last layers learn, as timm counts them")
    add("--finetune-epochs", type=int, default=0)
    add("--finetune-lr", type=float, default=1e-4, help="of the head")
    add("--finetune-schedule", choices=optim.SCHEDULES, default="cosine")
    add("--layer-decay", type=float, default=1.0, help="a layer's learning rate is that of the one above times this")
    return options


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot be meant."""
    if args.backbone.split(".")[0] not in (known := timm.list_models()):
        raise ValueError(f"timm has no network “{args.backbone}”{cli.nearest(args.backbone, known)}")
    if args.unfreeze and not args.finetune_epochs:
        raise ValueError("--unfreeze is for phase 2: give it epochs with --finetune-epochs.")
    if not args.epochs and not args.finetune_epochs:
        raise ValueError("Nothing would be trained: give --epochs for the head, or --finetune-epochs for phase 2.")


def views_of(args: argparse.Namespace) -> tuple[int, str]:
    """--views and --augment, of which one follows from the other; ValueError if they contradict each other."""
    views = args.views if args.views is not None else 0 if args.augment in ("minimal", "full") else 1
    augment = args.augment or ("none" if views == 1 else "full")
    if views == 1 and augment != "none":
        raise ValueError(f"--views 1 are the photos as they are: for --augment {augment} give --views 0 or 2.")
    return views, augment


def main() -> None:
    args = parser().parse_args()
    check(args)
    views, augment = views_of(args)
    view = default_view(args.backbone) | cli.view_of(args)
    mean, std, size = view.pop("mean"), view.pop("std"), view["image_size"]
    name = "timm" if args.head == "linear" else "timm_head"  # in cvlab/models/
    arguments = {option: vars(args)[option] for option in HEADS[args.head] if vars(args)[option] is not None}
    arguments["architecture"] = args.backbone.split(".")[0]
    if args.head == "map":
        arguments["pool"] = False
    channels = cli.channels_of(args)
    models.check_size(name, size, arguments, channels)
    state = open_run(args)
    set_seed(args.seed)

    # Data: photos are decoded once.
    cut = args.data, args.split_seed, args.per_class
    parts = classification_parts(*cut, size, args.allow_leaks, classes=args.classes, channels=channels)
    cache = Cache(args.out)
    augmentation = {"augment": augment, "min_area": args.min_area, "jitter": args.color_jitter, "erase": args.erase}
    train_set, val_set = sets.classification_sets(parts, view, cache, args.seed, **augmentation)
    if args.normalize or channels:
        mean, std = sets.normalization(args.normalize or "data", train_set.images)
    batch_size = sets.whole_batches(args.batch_size, len(train_set))
    print(sets.summary(parts, cache))

    # Model.
    model = models.build(name, parts.class_names, arguments=arguments, mean=mean, std=std, channels=channels, **view)
    frozen.start_classifier(model)
    start_from(args.start_from, model)
    if args.pretrained and not args.start_from:
        load_pretrained(model.backbone, args.backbone, size, args.weights)
    model = model.to(memory_format=torch.channels_last)
    frozen.freeze(model)
    frozen.train_mode(model)
    accelerator = accelerator_for(model, train_set.__getitems__(list(range(batch_size))), F.cross_entropy, args, state)
    sets.onto_gpu(accelerator.device, train_set, val_set)
    model = model.to(accelerator.device)
    run = Run(args, accelerator, state, parts)

    # What learns in neither phase is computed once, then in each phase what does not learn in that one.
    frozen.freeze(model, args.unfreeze)
    with accelerator.autocast():
        trunk = frozen.computed_once(model, train_set, val_set, views, batch_size, accelerator.device)
    if args.epochs and run.phase == 1:  # --resume may continue in phase 2
        train_phase(1, args, run, model, trunk, views, batch_size)
    if args.finetune_epochs:
        train_phase(2, args, run, model, trunk, views, batch_size)
    run.finish(model)


def train_phase(
    phase: int, args: argparse.Namespace, run: Run, model: Model, trunk: tuple, views: int, batch_size: int
) -> None:
    """Trains what learns in this phase. `trunk` is the part of the model that learns in any, and its two data sets."""
    layers, epochs, lr, schedule = 0, args.epochs, args.lr, args.schedule
    if phase == 2:
        layers, epochs, lr, schedule = args.unfreeze, args.finetune_epochs, args.finetune_lr, args.finetune_schedule
    accelerator, num_classes = run.accelerator, len(model.class_names)
    frozen.freeze(model, layers)
    with accelerator.autocast():
        learner, train_set, val_set = frozen.computed_once(*trunk, views, batch_size, accelerator.device)
    train_loader, val_loader = sets.loaders(train_set, val_set, batch_size)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    source = train_set if isinstance(train_set, frozen.FeatureSet) else "the pictures"
    print(f"Phase {phase}: {learning:,} parameters learn from {source}.")

    # Loss, optimizer, schedule.
    criterion = cross_entropy(args.label_smoothing, args.class_weights, train_set.labels, num_classes)
    factors = {name: args.layer_decay**height for name, height in frozen.heights(model).items()}
    gpu, steps = accelerator.device.type == "cuda", len(train_loader)
    settings = {"momentum": args.momentum, "decay": args.decay, "factors": factors, "fused": gpu}
    optimizer = optim.optimizer(args.optimizer, model, lr, args.weight_decay, **settings)
    scheduler = optim.schedule(schedule, optimizer, epochs * steps, steps, args.div_factor)
    accelerator.free_memory()  # of the phase before
    learner = copy.copy(learner)  # accelerate writes on the module that it prepares, and the model is used again
    learner, optimizer, scheduler, train_loader, val_loader = accelerator.prepare(
        learner, optimizer, scheduler, train_loader, val_loader
    )

    for epoch in run.epochs(train_loader, epochs, phase):
        train_set.epoch = (epoch - 1) % views + 1 if views else epoch
        frozen.train_mode(learner)
        for images, labels in run.batches():
            logits = learner(images)
            loss = criterion(logits, labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.add(loss, len(images), (logits.argmax(1) == labels).sum())
        train_loss, seen, right = run.totals()

        learner.eval()
        val_loss, val_right = 0.0, 0
        with torch.no_grad():
            for images, labels in val_loader:
                logits, labels = accelerator.gather_for_metrics((learner(images), labels))
                val_loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
                val_right += (logits.argmax(1) == labels).sum().item()
        val_accuracy = val_right / len(val_set)
        if schedule == "plateau":
            scheduler.step(val_loss)
        run.end_epoch(
            model,
            score=-val_loss if args.best_by == "loss" else val_accuracy,
            lr=scheduler.get_last_lr()[0],
            train_loss=train_loss,
            val_loss=val_loss / len(val_set),
            train_accuracy=right / seen,
            val_accuracy=val_accuracy,
        )


if __name__ == "__main__":
    cli.run(main)

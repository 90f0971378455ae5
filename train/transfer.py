"""Trains a network of timm that has learned before to tell classes apart: first a new head, then its last layers too.

    python train/transfer.py --backbone resnet18 --data DIR --out runs/NAME       the head, on features computed once
    python train/transfer.py --backbone resnet18 --data DIR --unfreeze 2 --finetune-epochs 10        then two layers

Phase 1 trains the head on the frozen backbone, phase 2 the head and the backbone's last layers, the lower ones more
slowly. Where a picture has a fixed number of views, what lies before the first layer that learns is computed once.
The best model by val is kept in the run folder; with a linear head timm opens it too.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli
import run

from cvlab import checkpoint, models, render
from cvlab.checkpoint import card
from cvlab.data.cache import Cache
from cvlab.data.parts import classification_parts
from cvlab.data.sets import AugmentedImages, EvaluationSet, as_is
from cvlab.learning import frozen, optim
from cvlab.metrics import confusion_matrix
from cvlab.models.timm import default_view
from cvlab.transforms import centre_view, resize_shorter, to_uint8

CACHE_MARGIN = 1.25  # training photos are kept this much larger than a view, so that crops stay sharp
# The options that are arguments of a head of our own.
HEADS = {"linear": (), "mlp": ("hidden", "dropout"), "map": ("hidden", "dropout", "channels", "last_stage")}


class Phase(NamedTuple):
    """A part of the training: how many layers of the backbone learn, and how."""

    layers: int
    epochs: int
    lr: float
    schedule: str


def parser() -> cli.Parser:
    """The options of this script."""
    options = cli.parser(
        "transfer", __doc__, epochs=20, batch_size=32, lr=1e-3, optimizer="adamw", weight_decay=0.01, schedule="cosine"
    )
    cli.add_classification(options)
    views = "1: the photo as it is; more: so many crops, turned and coloured, the same ones again; 0: ever others"
    options.add_argument("--views", type=int, default=1, help=views)
    group = options.add_argument_group("network", "Image size and crop are the backbone's own where not given.")
    group.add_argument("--backbone", default="resnet18", help="a network of timm, with or without a tag")
    group.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors or .pth with timm's tensor names")
    pretrained = "begin with timm's weights, from the Hub where there is no --weights"
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True, help=pretrained)
    group.add_argument("--head", choices=HEADS, default="linear", help="mlp: on the pooled features; map: unpooled")
    group.add_argument("--hidden", type=int, nargs="*", default=[256], help="mlp, map: layers before the last")
    group.add_argument("--dropout", type=float, default=0.5, help="mlp, map: after each of these layers")
    group.add_argument("--channels", type=int, default=0, help="map: of a 1x1 convolution that narrows it, or 0")
    group.add_argument("--last-stage", help="map: the stage at which the backbone ends; by default its last one")
    group = options.add_argument_group("phase 2")
    group.add_argument("--unfreeze", type=int, default=0, help="layers of the backbone that learn, counted by timm")
    group.add_argument("--finetune-epochs", type=int, default=0)
    group.add_argument("--finetune-lr", type=float, default=1e-4, help="of the head")
    group.add_argument("--finetune-schedule", choices=optim.SCHEDULES, default="cosine")
    group.add_argument("--layer-decay", type=float, default=1.0, help="a layer's rate is this much of the one above it")
    return options


def main() -> None:
    args = parser().parse_args()
    if args.backbone.split(".")[0] not in (known := timm.list_models()):
        raise ValueError(f"timm has no network {args.backbone!r}{cli.nearest(args.backbone, known)}")
    if args.unfreeze and not args.finetune_epochs:
        raise ValueError("--unfreeze is for phase 2: give it epochs with --finetune-epochs.")
    if not args.epochs and not args.finetune_epochs:
        raise ValueError("Nothing learns: give --epochs to the head, or --finetune-epochs to phase 2.")
    backbone_view = default_view(args.backbone)
    args.image_size = args.image_size or backbone_view["image_size"]
    args.crop_pct = args.crop_pct or backbone_view["crop_pct"]
    state = run.open_run(args)
    set_seed(args.seed)

    # Data: photos for training a bit larger than a view, the others exactly as the model will see them.
    parts = classification_parts(
        args.data, args.split_seed, args.per_class, args.image_size, args.allow_leaks, classes=args.classes
    )
    cache_size = math.ceil(args.image_size / args.crop_pct * CACHE_MARGIN) if args.data else args.image_size
    cache, interpolation = Cache(args.cache_limit * 1e9, args.out), backbone_view["interpolation"]
    as_seen = partial(centre_view, image_size=args.image_size, crop_pct=args.crop_pct, interpolation=interpolation)
    resized = as_seen if args.views == 1 else partial(resize_shorter, size=cache_size, interpolation=interpolation)
    train_images, train_labels = parts.read("train", lambda image: to_uint8(resized(image)), cache=cache)
    val_views, val_labels = parts.read("val", lambda image: to_uint8(as_seen(image)), cache=cache)
    if args.views == 1:
        train_set = EvaluationSet(train_images, torch.tensor(train_labels))
    else:
        train_set = AugmentedImages(train_images, torch.tensor(train_labels), args.image_size, args.seed, args.min_area)
    pictures = train_set, EvaluationSet(val_views, torch.tensor(val_labels))
    args.batch_size = run.whole_batches(args.batch_size, len(train_set))
    cli.describe(parts, {"train": len(train_set), "val": len(val_views), "test": len(parts.samples["test"])}, cache)

    # Model and loss.
    network = "timm" if args.head == "linear" else "timm_head"
    own = {name: vars(args)[name] for name in HEADS[args.head] if vars(args)[name] is not None}
    arguments = {"architecture": args.backbone.split(".")[0], **own, **({"pool": False} if args.head == "map" else {})}
    view = {**backbone_view, "image_size": args.image_size, "crop_pct": args.crop_pct}
    model = models.build(network, parts.class_names, arguments=arguments, **view)
    frozen.start_classifier(model)
    if args.start_from:
        run.start_from(args.start_from, model)
    elif args.pretrained:
        run.start_from_pretrained(args, model.backbone)
    model = model.to(memory_format=torch.channels_last)
    criterion = partial(F.cross_entropy, label_smoothing=args.label_smoothing)
    frozen.freeze(model)
    frozen.train_mode(model)
    images, labels = train_set.__getitems__(list(range(args.batch_size)))
    accelerator = run.accelerator_for(args, model, images, lambda logits: criterion(logits, labels))
    run.onto_gpu(accelerator, *pictures)
    model = model.to(accelerator.device)
    num_classes, below = len(parts.class_names), frozen.heights(model)
    phases = (
        Phase(0, args.epochs, args.lr, args.schedule),
        Phase(args.unfreeze, args.finetune_epochs, args.finetune_lr, args.finetune_schedule),
    )
    # What learns in no phase is computed once, and from there on what does not learn in the phase under way.
    frozen.freeze(model, args.unfreeze)
    with accelerator.autocast():
        trunk, *from_trunk = frozen.computed_once(model, pictures, args.views, args.batch_size, accelerator.device)
    # Of the phase under way: its number and first epoch; of the epoch its steps, and its loss, right images and images.
    progress = {"phase": 0, "first": 1, "epoch": 0, "best": -math.inf, "best_epoch": 0, "step": 0, "sums": [0.0] * 3}
    progress |= cli.read_json(state / "progress.json") if state else {}
    history = run.read_history(args.out)[: progress["epoch"]]  # a killed run may have written one more
    stop = run.Stop(accelerator)

    for number in range(progress["phase"], 2):
        start = time.time()
        phase = phases[number]
        if number > progress["phase"]:
            progress |= {"phase": number, "first": progress["epoch"] + 1}
        if not phase.epochs:
            continue

        frozen.freeze(model, phase.layers)
        with accelerator.autocast():
            learner, train_set, val_set = frozen.computed_once(
                trunk, from_trunk, args.views, args.batch_size, accelerator.device
            )
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        source = train_set if isinstance(train_set, frozen.FeatureSet) else "the pictures"
        print(f"Phase {number + 1}: {learning:,} parameters learn from {source}.")
        # The loaders draw from generators of their own, so that the global one is the training step's alone.
        loading = {"batch_size": args.batch_size, "collate_fn": as_is}
        train_loader = DataLoader(train_set, shuffle=True, drop_last=True, generator=torch.Generator(), **loading)
        val_loader = DataLoader(val_set, generator=torch.Generator(), **loading)
        factors = {name: args.layer_decay ** below[name] for name in below}
        fused = accelerator.device.type == "cuda"
        optimizer = optim.optimizer(args.optimizer, model, phase.lr, args.weight_decay, args.momentum, factors, fused)
        steps = phase.epochs * len(train_loader)
        schedule = optim.schedule(phase.schedule, optimizer, steps, len(train_loader), args.div_factor)
        accelerator.free_memory()
        bare_learner = learner
        learner, optimizer, schedule, train_loader, val_loader = accelerator.prepare(
            learner, optimizer, schedule, train_loader, val_loader
        )
        if state:
            run.load_state(accelerator, state)
            state = None

        for epoch in range(progress["epoch"] + 1, progress["first"] + phase.epochs):
            if epoch - 1 - max(progress["best_epoch"], progress["first"] - 1) >= args.patience:
                print(f"No better val {args.best_by} for {args.patience} epochs: this phase ends early.")
                break
            train_set.epoch = (epoch - 1) % args.views + 1 if args.views else epoch
            train_loader.set_epoch(epoch)

            frozen.train_mode(learner)
            sums = torch.tensor(progress["sums"], dtype=torch.float64, device=accelerator.device)
            batches = accelerator.skip_first_batches(train_loader, progress["step"])
            name = f"epoch {epoch}/{progress['first'] - 1 + phase.epochs}"
            for inputs, labels in run.progress_bar(batches, name, args.batch_size, progress["step"]):
                logits = learner(inputs)
                loss = criterion(logits, labels)
                run.check_finite(loss.item(), epoch, args.out)
                accelerator.backward(loss)
                optimizer.step()
                if phase.schedule != "plateau":
                    schedule.step()
                optimizer.zero_grad()
                right = (logits.argmax(1) == labels).sum().item()
                sums += sums.new_tensor([loss.item() * len(inputs), right, len(inputs)])
                progress |= {"step": progress["step"] + 1, "sums": sums.tolist()}
                if stop.asked:
                    step = (epoch - 1) * len(train_loader) + progress["step"]
                    run.save_state(accelerator, args.out, step, progress)
                    raise KeyboardInterrupt
            train_loss, train_correct, train_seen = accelerator.reduce(sums).tolist()

            learner.eval()
            val_loss, counts = 0.0, torch.zeros(num_classes, num_classes, dtype=torch.long)
            with torch.no_grad():
                for inputs, labels in val_loader:
                    logits, labels = accelerator.gather_for_metrics((learner(inputs), labels))
                    val_loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
                    counts += confusion_matrix(labels, logits.argmax(1), num_classes).cpu()
            val_accuracy = counts.trace().item() / counts.sum().item()
            if phase.schedule == "plateau":
                schedule.step(val_loss)

            score = -val_loss if args.best_by == "loss" else val_accuracy
            best = score > progress["best"]
            if best:
                progress |= {"best": score, "best_epoch": epoch}
            progress |= {"epoch": epoch, "step": 0, "sums": [0.0] * 3}
            line = {
                "epoch": epoch,
                "lr": schedule.get_last_lr()[0],
                "train_loss": train_loss / train_seen,
                "val_loss": val_loss / len(val_set),
                "train_accuracy": train_correct / train_seen,
                "val_accuracy": val_accuracy,
                "seconds": round(time.time() - start, 2),
            }
            start = time.time()
            history.append(line)
            if accelerator.is_main_process:
                if best:
                    checkpoint.save(model, args.out, data=parts.facts, precision=args.precision)
                run.write_history(args.out, history)
                render.save_png(render.curves(history), args.out / "report" / "curves.png")
            run.save_state(accelerator, args.out, epoch * len(train_loader), progress)
            run.print_epoch(line, args.epochs + args.finetune_epochs, best)
        for wrapper in ("forward", "_original_forward"):  # accelerate's autocast stays on a module otherwise
            vars(bare_learner).pop(wrapper, None)

    if not accelerator.is_main_process:
        return
    cli.write_manifest(args, model, history, progress["best_epoch"])
    card.write(args.out)
    best = history[progress["best_epoch"] - 1]
    print(f"Best epoch {best['epoch']}, val accuracy {best['val_accuracy']:.4f}: {args.out}")
    cli.finish(args)


if __name__ == "__main__":
    cli.run(main)

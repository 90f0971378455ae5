"""Trains a CNN from scratch to tell classes apart.

    python train/classifier.py                                  synthetic scenes, about two minutes on two cores
    python train/classifier.py --data DIR --out runs/NAME       DIR/<class>/* or DIR/{train,val,test}/<class>/*

The best model by validation accuracy is kept in the run folder, which `python app.py runs/NAME` opens.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, set_seed
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli
import run

from cvlab import checkpoint, models, render
from cvlab.checkpoint import card
from cvlab.data.cache import Cache
from cvlab.data.parts import classification_parts
from cvlab.data.sets import AugmentedImages, EvaluationSet, as_is, channel_statistics
from cvlab.learning import optim
from cvlab.metrics import confusion_matrix
from cvlab.transforms import centre_view, resize_shorter, to_uint8

CACHE_MARGIN = 1.25  # training photos are kept this much larger than a view, so that crops stay sharp


def parser() -> cli.Parser:
    """The options of this script."""
    options = cli.parser(
        "classifier", __doc__, image_size=64, epochs=36, batch_size=64, lr=0.1, optimizer="nesterov", weight_decay=5e-4
    )
    cli.add_classification(options, crop_pct=1.0, label_smoothing=0.1)
    options.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True, help="vary training photos")
    options.add_argument("--mixup", type=float, default=0.0, help="alpha of blending two images; 0 is off")
    options.add_argument("--cutmix", type=float, default=0.0, help="alpha of pasting a box of another; 0 is off")
    options.add_argument("--ema", type=float, default=0.0, help="keep a moving average of the weights, of this decay")
    options.add_argument("--clip-norm", type=float, default=0.0, help="longest gradient; 0 is off")
    cli.add_cnn(options)
    return options


def main() -> None:
    args = parser().parse_args()
    state = run.open_run(args)
    set_seed(args.seed)

    # Data: photos for training a bit larger than a view, the others exactly as the model will see them.
    parts = classification_parts(
        args.data, args.split_seed, args.per_class, args.image_size, args.allow_leaks, classes=args.classes
    )
    cache_size = math.ceil(args.image_size / args.crop_pct * CACHE_MARGIN) if args.data else args.image_size
    cache = Cache(args.cache_limit * 1e9, args.out)
    as_seen = partial(centre_view, image_size=args.image_size, crop_pct=args.crop_pct)
    resized = partial(resize_shorter, size=cache_size) if args.augment else as_seen
    train_images, train_labels = parts.read(
        "train", lambda image: to_uint8(resized(image)), at_least=2 * cache_size, cache=cache
    )
    val_views, val_labels = parts.read("val", lambda image: to_uint8(as_seen(image)), cache=cache)
    if args.augment:
        train_set = AugmentedImages(train_images, torch.tensor(train_labels), args.image_size, args.seed, args.min_area)
    else:
        train_set = EvaluationSet(train_images, torch.tensor(train_labels))
    val_set = EvaluationSet(val_views, torch.tensor(val_labels))
    args.batch_size = run.whole_batches(args.batch_size, len(train_set))
    # The loaders draw from generators of their own, so that the global one is the training step's alone.
    loading = {"batch_size": args.batch_size, "collate_fn": as_is}
    train_loader = DataLoader(train_set, shuffle=True, drop_last=True, generator=torch.Generator(), **loading)
    val_loader = DataLoader(val_set, generator=torch.Generator(), **loading)
    cli.describe(parts, {"train": len(train_set), "val": len(val_set), "test": len(parts.samples["test"])}, cache)

    # Model, loss, optimizer, schedule.
    mean, std = channel_statistics(train_images)
    network = cli.cnn_arguments(args)
    model = models.build(args.network, parts.class_names, args.image_size, network, mean, std, args.crop_pct)
    if args.start_from:
        run.start_from(args.start_from, model)
    model = model.to(memory_format=torch.channels_last)
    criterion = partial(F.cross_entropy, label_smoothing=args.label_smoothing)
    images, labels = next(iter(train_loader))
    accelerator = run.accelerator_for(args, model, images, lambda logits: criterion(logits, labels))
    run.onto_gpu(accelerator, train_set, val_set)
    fused = accelerator.device.type == "cuda"
    optimizer = optim.optimizer(args.optimizer, model, args.lr, args.weight_decay, args.momentum, fused=fused)
    steps = args.epochs * len(train_loader)
    schedule = optim.schedule(args.schedule, optimizer, steps, len(train_loader), args.div_factor)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on CPUs each process normalises by its own share
    bare_model = model
    model, optimizer, schedule, train_loader, val_loader = accelerator.prepare(
        model, optimizer, schedule, train_loader, val_loader
    )
    # Val judges the average of the weights, where there is one, and it is what the run folder keeps.
    averaged = ModelEmaV3(bare_model, args.ema, use_warmup=True) if args.ema else None
    if averaged:
        accelerator.register_for_checkpointing(averaged)
    kept = averaged.module if averaged else bare_model
    num_classes = len(parts.class_names)
    # Images and labels of a batch are mixed in pairs (Zhang et al., "mixup", 2018; Yun et al., "CutMix", 2019).
    mixes = args.mixup or args.cutmix
    mix = Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=num_classes) if mixes else None
    # Of the epoch under way: its steps so far, and its loss, right images and images.
    progress = {"epoch": 0, "best": -math.inf, "best_epoch": 0, "step": 0, "sums": [0.0, 0.0, 0.0]}
    if state:
        progress = run.load_state(accelerator, state)
    history = run.read_history(args.out, progress["epoch"])
    stop = run.Stop(accelerator)
    watched = torch.stack([val_views[i] for i in render.spread(val_set.labels, per_class=False)])
    frames = args.out / "report" / ("photos" if args.data else "") / "epochs"

    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        if epoch - 1 - progress["best_epoch"] >= args.patience:
            print(f"No better val {args.best_by} for {args.patience} epochs: stopped early.")
            break
        start = time.time()
        train_set.epoch = epoch
        train_loader.set_epoch(epoch)

        model.train()
        sums = torch.tensor(progress["sums"], dtype=torch.float64, device=accelerator.device)
        batches = accelerator.skip_first_batches(train_loader, progress["step"])
        name = f"epoch {epoch}/{args.epochs}"
        for images, labels in run.progress_bar(batches, name, args.batch_size, progress["step"]):
            images, targets = mix(images, labels) if mix else (images, F.one_hot(labels, num_classes).float())
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = criterion(logits, targets)
            run.check_finite(loss.item(), epoch, args.out)
            accelerator.backward(loss)
            if args.clip_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.clip_norm)
            optimizer.step()
            if args.schedule != "plateau":
                schedule.step()
            optimizer.zero_grad()
            right = (logits.argmax(1) == targets.argmax(1)).sum().item()
            sums += sums.new_tensor([loss.item() * len(images), right, len(images)])
            progress |= {"step": progress["step"] + 1, "sums": sums.tolist()}
            step = (epoch - 1) * len(train_loader) + progress["step"]
            if averaged:
                averaged.update(bare_model, step)
            if stop.asked:
                run.save_state(accelerator, args.out, step, progress)
                raise KeyboardInterrupt
        train_loss, train_correct, train_seen = accelerator.reduce(sums).tolist()

        model.eval()
        broadcast(list(kept.buffers()))  # of several processes the first one's statistics of normalisation hold
        val_loss, counts = 0.0, torch.zeros(num_classes, num_classes, dtype=torch.long)
        with torch.no_grad():
            for images, labels in val_loader:
                logits, labels = accelerator.gather_for_metrics((kept(images), labels))
                val_loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
                counts += confusion_matrix(labels, logits.argmax(1), num_classes).cpu()
        val_accuracy = counts.trace().item() / counts.sum().item()

        if args.schedule == "plateau":
            schedule.step(val_loss)

        score = -val_loss if args.best_by == "loss" else val_accuracy
        best = score > progress["best"]
        if best:
            progress |= {"best": score, "best_epoch": epoch}
        progress |= {"epoch": epoch, "step": 0, "sums": [0.0, 0.0, 0.0]}
        line = {
            "epoch": epoch,
            "lr": schedule.get_last_lr()[0],
            "train_loss": train_loss / train_seen,
            "val_loss": val_loss / len(val_set),
            "train_accuracy": train_correct / train_seen,
            "val_accuracy": val_accuracy,
            "seconds": round(time.time() - start, 2),
        }
        history.append(line)
        if accelerator.is_main_process:
            if best:
                checkpoint.save(kept, args.out, data=parts.facts, precision=args.precision)
            run.write_history(args.out, history)
            render.save_png(render.curves(history), args.out / "report" / "curves.png")
            frame = render.training_frame(kept, watched, f"epoch {epoch}")
            render.save_png(frame, frames / f"epoch-{epoch:03}.png")
        run.save_state(accelerator, args.out, epoch * len(train_loader), progress)
        run.print_epoch(line, args.epochs, best)

    if not accelerator.is_main_process:
        return
    render.save_animation(sorted(frames.glob("*.png")), frames.with_name("attribution.webp"))
    cli.write_manifest(args, bare_model, history, progress["best_epoch"])
    card.write(args.out)
    best = history[progress["best_epoch"] - 1]
    print(f"Best epoch {best['epoch']}, val accuracy {best['val_accuracy']:.4f}: {args.out}")
    cli.finish(args)


if __name__ == "__main__":
    cli.run(main)

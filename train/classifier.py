"""Trains a CNN from scratch to tell classes apart.

    python train/classifier.py                                  synthetic scenes, about two minutes on two cores
    python train/classifier.py --data DIR --out runs/NAME       DIR/<class>/* or DIR/{train,val,test}/<class>/*

The best model by validation accuracy is kept in the run folder, which `python app.py runs/NAME` opens.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.data import Mixup
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import options

from cvlab import card, checkpoint, models, optim, render
from cvlab.batches import AugmentedImages, EvaluationSet, as_is, channel_statistics
from cvlab.data import classification_parts
from cvlab.metrics import confusion_matrix
from cvlab.transforms import centre_view, resize_shorter, to_uint8

CACHE_MARGIN = 1.25  # training photos are kept this much larger than a view, so that crops stay sharp


def main() -> None:
    parser = options.parser(
        __doc__.splitlines()[0], image_size=64, epochs=36, batch_size=64, lr=0.1, optimizer="sgd", weight_decay=5e-4
    )
    parser.add_argument("--per-class", type=int, nargs=2, metavar=("TRAIN", "VAL"), help="so many of each class")
    parser.add_argument("--allow-leaks", action="store_true", help="go on although val and test share files")
    parser.add_argument("--crop-pct", type=float, default=1.0, help="share of the shorter side that a view shows")
    parser.add_argument("--min-area", type=float, default=0.6, help="least share of a photo that a training crop shows")
    parser.add_argument("--widths", type=int, nargs="+", default=[24, 48, 96, 192], help="channels of each stage")
    parser.add_argument("--depth", type=int, default=1, help="residual blocks per stage")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of blending two images; 0 is off")
    parser.add_argument("--cutmix", type=float, default=0.0, help="alpha of pasting a box of another; 0 is off")
    args = parser.parse_args()
    state = options.open_run(args)
    set_seed(args.seed)

    # Data: photos for training a bit larger than a view, the others exactly as the model will see them.
    parts = classification_parts(args.data, args.split_seed, args.per_class, args.image_size, args.allow_leaks)
    cache_size = math.ceil(args.image_size / args.crop_pct * CACHE_MARGIN) if args.data else args.image_size
    train_images, train_labels = parts.read("train", lambda image: to_uint8(resize_shorter(image, cache_size)))
    as_seen = partial(centre_view, image_size=args.image_size, crop_pct=args.crop_pct)
    val_views, val_labels = parts.read("val", lambda image: to_uint8(as_seen(image)))
    train_set = AugmentedImages(train_images, torch.tensor(train_labels), args.image_size, args.seed, args.min_area)
    val_set = EvaluationSet(val_views, torch.tensor(val_labels))
    # drop_last would leave nothing of a small data set; images are mixed in pairs.
    args.batch_size = min(args.batch_size, len(train_set)) // 2 * 2
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, collate_fn=as_is)
    val_loader = DataLoader(val_set, args.batch_size, collate_fn=as_is)
    options.describe(parts, {"train": len(train_set), "val": len(val_set), "test": len(parts.samples["test"])})

    # Model, loss, optimizer, schedule.
    mean, std = channel_statistics(train_images)
    network = {"widths": args.widths, "depth": args.depth, "dropout": args.dropout}
    model = models.build("convnet", parts.class_names, args.image_size, network, mean, std, args.crop_pct)
    if args.start_from:
        options.start_from(args.start_from, model)
    model = model.to(memory_format=torch.channels_last)
    criterion = partial(F.cross_entropy, label_smoothing=args.label_smoothing)
    images, labels = next(iter(train_loader))
    accelerator = options.accelerator_for(args, model, images, lambda logits: criterion(logits, labels))
    optimizer = optim.optimizer(args.optimizer, model, args.lr, args.weight_decay)
    schedule = optim.schedule(args.schedule, optimizer, args.epochs * len(train_loader))
    bare_model = model
    model, optimizer, schedule, train_loader, val_loader = accelerator.prepare(
        model, optimizer, schedule, train_loader, val_loader
    )
    num_classes = len(parts.class_names)
    # Images and labels of a batch are mixed in pairs (Zhang et al., "mixup", 2018; Yun et al., "CutMix", 2019).
    mix = (
        Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=num_classes)
        if args.mixup or args.cutmix
        else None
    )
    progress = {"epoch": 0, "best_accuracy": -1.0, "best_epoch": 0}
    if state:
        progress = options.load_state(accelerator, state)
    history = options.read_history(args.out, progress["epoch"])

    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        if epoch - 1 - progress["best_epoch"] >= args.patience:
            print(f"No better val accuracy for {args.patience} epochs: stopped early.")
            break
        start = time.time()
        train_set.epoch = epoch
        train_loader.set_epoch(epoch)

        model.train()
        train_loss, train_correct, train_seen = 0.0, 0, 0
        for images, labels in tqdm(train_loader, f"epoch {epoch}/{args.epochs}", leave=False):
            images, targets = mix(images, labels) if mix else (images, F.one_hot(labels, num_classes).float())
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = criterion(logits, targets)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            train_loss += loss.item() * len(images)
            train_correct += (logits.argmax(1) == targets.argmax(1)).sum().item()
            train_seen += len(images)

        model.eval()
        val_loss, counts = 0.0, torch.zeros(num_classes, num_classes, dtype=torch.long)
        with torch.no_grad():
            for images, labels in val_loader:
                logits, labels = accelerator.gather_for_metrics((model(images), labels))
                val_loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
                counts += confusion_matrix(labels, logits.argmax(1), num_classes).cpu()
        val_accuracy = counts.trace().item() / counts.sum().item()

        best = val_accuracy > progress["best_accuracy"]
        if best:
            progress |= {"best_accuracy": val_accuracy, "best_epoch": epoch}
            checkpoint.save(bare_model, args.out, data=parts.facts, precision=args.precision)
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
        options.write_history(args.out, history)
        render.save_png(render.curves(history), args.out / "report" / "curves.png")
        progress["epoch"] = epoch
        options.save_state(accelerator, args.out, epoch * len(train_loader), **progress)
        options.print_epoch(line, args.epochs, best)

    options.write_manifest(args, bare_model, history)
    card.write(args.out)
    print(f"Best val accuracy {progress['best_accuracy']:.4f} (epoch {progress['best_epoch']}): {args.out}")
    options.finish(args)


if __name__ == "__main__":
    options.run(main)

"""Trains a U-Net to find the pixels of something.

    python train/segmenter.py                                   synthetic scenes, about two minutes on two cores
    python train/segmenter.py --data DIR --out runs/NAME        DIR/images/NAME.jpg with DIR/masks/NAME.png

The best model by validation iou is kept in the run folder, which `python app.py runs/NAME` opens.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli
import run

from cvlab import checkpoint, models, render
from cvlab.checkpoint import card
from cvlab.data.cache import Cache
from cvlab.data.parts import segmentation_parts
from cvlab.data.sets import AugmentedPairs, EvaluationSet, as_is, channel_statistics
from cvlab.learning import optim
from cvlab.learning.losses import SEGMENTATION_LOSSES
from cvlab.metrics import segmentation_counts, segmentation_scores
from cvlab.transforms import resize_logits, to_uint8, whole_mask, whole_view


def parser() -> cli.Parser:
    """The options of this script."""
    options = cli.parser(
        "segmenter", __doc__, image_size=64, epochs=8, batch_size=32, lr=3e-3, optimizer="adamw", weight_decay=0.01
    )
    options.add_argument("--class-names", nargs="+", help="names of the mask's classes, background left out")
    options.add_argument("--width", type=int, default=16, help="channels of the first encoder")
    options.add_argument("--depth", type=int, default=3, help="levels above the bottleneck")
    switch = argparse.BooleanOptionalAction
    options.add_argument("--batch-norm", action=switch, default=True, help="after every convolution")
    options.add_argument("--dropout", type=float, default=0.0)
    zoom = "photos are made smaller or larger by a factor in between; beyond their edges they are mirrored"
    options.add_argument("--zoom", nargs=2, type=float, default=[0.714, 1.4], metavar=("LOW", "HIGH"), help=zoom)
    options.add_argument("--loss", choices=SEGMENTATION_LOSSES, default="bce+dice")
    return options


def main() -> None:
    args = parser().parse_args()
    if not 0 < args.zoom[0] <= args.zoom[1]:
        raise ValueError("--zoom takes two factors above 0, the smaller one first: 1 1.4 only enlarges.")
    state = run.open_run(args)
    set_seed(args.seed)

    # Data: photos squashed to squares; the masks of val also at the photos' own resolution, at which they are scored.
    parts = segmentation_parts(args.data, args.split_seed, args.class_names, args.image_size)
    cache = Cache(args.cache_limit * 1e9, args.out)
    small = partial(whole_mask, image_size=args.image_size)
    train_images, train_masks = parts.read(
        "train", lambda image: to_uint8(whole_view(image, args.image_size)), small, cache=cache
    )
    val_images, val_masks = parts.read("val", lambda image: to_uint8(whole_view(image, args.image_size)), cache=cache)
    train_set = AugmentedPairs(train_images, train_masks, args.seed, args.zoom)
    val_set = EvaluationSet(val_images, torch.arange(len(val_images)))
    args.batch_size = run.whole_batches(args.batch_size, len(train_set))
    # The loaders draw from generators of their own, so that the global one is the training step's alone.
    loading = {"batch_size": args.batch_size, "collate_fn": as_is}
    train_loader = DataLoader(train_set, shuffle=True, drop_last=True, generator=torch.Generator(), **loading)
    val_loader = DataLoader(val_set, generator=torch.Generator(), **loading)
    cli.describe(parts, {"train": len(train_set), "val": len(val_set), "test": len(parts.samples["test"])}, cache)

    # Model, loss, optimizer, schedule.
    mean, std = channel_statistics(train_images)
    network = {"width": args.width, "depth": args.depth, "batch_norm": args.batch_norm, "dropout": args.dropout}
    model = models.build("unet", parts.class_names, args.image_size, network, mean, std)
    if args.start_from:
        run.start_from(args.start_from, model)
    model = model.to(memory_format=torch.channels_last)
    criterion = SEGMENTATION_LOSSES[args.loss]
    images, masks = next(iter(train_loader))
    accelerator = run.accelerator_for(args, model, images, lambda logits: criterion(logits, masks))
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
    # Of the epoch under way: its steps so far, and its loss, images and the four counts of their pixels.
    progress = {"epoch": 0, "best_iou": -1.0, "best_epoch": 0, "step": 0, "sums": [0.0] * 6}
    if state:
        progress = run.load_state(accelerator, state)
    history = run.read_history(args.out, progress["epoch"])
    stop = run.Stop(accelerator)
    frames = args.out / "report" / ("photos" if args.data else "") / "epochs"

    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        if epoch - 1 - progress["best_epoch"] >= args.patience:
            print(f"No better val iou for {args.patience} epochs: stopped early.")
            break
        start = time.time()
        train_set.epoch = epoch
        train_loader.set_epoch(epoch)

        model.train()
        sums = torch.tensor(progress["sums"], dtype=torch.float64, device=accelerator.device)
        batches = accelerator.skip_first_batches(train_loader, progress["step"])
        name = f"epoch {epoch}/{args.epochs}"
        for images, masks in run.progress_bar(batches, name, args.batch_size, progress["step"]):
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = criterion(logits, masks)
            run.check_finite(loss.item(), epoch, args.out)
            accelerator.backward(loss)
            optimizer.step()
            if args.schedule != "plateau":
                schedule.step()
            optimizer.zero_grad()
            counts = segmentation_counts(logits > 0, masks).sum(0).to(sums)
            sums += torch.cat([sums.new_tensor([loss.item() * len(images), len(images)]), counts])
            progress |= {"step": progress["step"] + 1, "sums": sums.tolist()}
            if stop.asked:
                step = (epoch - 1) * len(train_loader) + progress["step"]
                run.save_state(accelerator, args.out, step, progress)
                raise KeyboardInterrupt
        train_loss, train_seen, *train_counts = accelerator.reduce(sums).tolist()

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
        val_iou = segmentation_scores(torch.cat(val_counts)).iou
        if args.schedule == "plateau":
            schedule.step(val_loss)

        best = val_iou > progress["best_iou"]
        if best:
            progress |= {"best_iou": val_iou, "best_epoch": epoch}
        progress |= {"epoch": epoch, "step": 0, "sums": [0.0] * 6}
        line = {
            "epoch": epoch,
            "lr": schedule.get_last_lr()[0],
            "train_loss": train_loss / train_seen,
            "val_loss": val_loss / len(val_set),
            "train_iou": segmentation_scores(torch.tensor([train_counts])).iou,
            "val_iou": val_iou,
            "seconds": round(time.time() - start, 2),
        }
        history.append(line)
        if accelerator.is_main_process:
            if best:
                checkpoint.save(bare_model, args.out, data=parts.facts, precision=args.precision)
            run.write_history(args.out, history)
            render.save_png(render.curves(history), args.out / "report" / "curves.png")
            frame = render.training_frame(bare_model, torch.stack(val_images[:2]), f"epoch {epoch}", val_masks)
            render.save_png(frame, frames / f"epoch-{epoch:03}.png")
        run.save_state(accelerator, args.out, epoch * len(train_loader), progress)
        run.print_epoch(line, args.epochs, best)

    if not accelerator.is_main_process:
        return
    render.save_animation(sorted(frames.glob("*.png")), frames.with_name("attribution.webp"))
    cli.write_manifest(args, bare_model, history, progress["best_epoch"])
    card.write(args.out)
    print(f"Best val iou {progress['best_iou']:.4f} (epoch {progress['best_epoch']}): {args.out}")
    cli.finish(args)


if __name__ == "__main__":
    cli.run(main)

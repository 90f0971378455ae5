"""Trains a U-Net to find the pixels of something.

    python train/segmenter.py                                   synthetic scenes, about two minutes on two cores
    python train/segmenter.py --data DIR --out runs/NAME        DIR/images/NAME.jpg with DIR/masks/NAME.png

The best model by validation iou is kept in the run folder, which `python app.py runs/NAME` opens.
"""

import sys
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import options

from cvlab import card, checkpoint, models, optim, render
from cvlab.batches import AugmentedPairs, EvaluationSet, as_is, channel_statistics
from cvlab.data import segmentation_parts
from cvlab.explain import predict, predicted_masks
from cvlab.losses import SEGMENTATION_LOSSES
from cvlab.metrics import segmentation_counts, segmentation_scores
from cvlab.transforms import resize_logits, to_float, to_uint8, whole_mask, whole_view


def main() -> None:
    parser = options.parser(
        __doc__.splitlines()[0], image_size=64, epochs=8, batch_size=32, lr=3e-3, optimizer="adamw", weight_decay=0.01
    )
    parser.add_argument("--class-names", nargs="+", help="names of the mask's classes, background left out")
    parser.add_argument("--width", type=int, default=16, help="channels of the first encoder")
    parser.add_argument("--depth", type=int, default=3, help="levels above the bottleneck")
    parser.add_argument("--no-batch-norm", action="store_true", help="convolutions and ReLU alone")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--loss", choices=SEGMENTATION_LOSSES, default="bce+dice")
    args = parser.parse_args()
    state = options.open_run(args)
    set_seed(args.seed)

    # Data: photos squashed to squares; the masks of val also at the photos' own resolution, at which they are scored.
    parts = segmentation_parts(args.data, args.split_seed, args.class_names, args.image_size)
    train_images, train_masks = parts.read("train", lambda image: to_uint8(whole_view(image, args.image_size)))
    val_images, val_masks = parts.read("val", lambda image: to_uint8(whole_view(image, args.image_size)))
    small_masks = torch.stack([whole_mask(mask, args.image_size) for mask in train_masks])
    train_set = AugmentedPairs(torch.stack(train_images), small_masks, args.seed)
    val_set = EvaluationSet(val_images, torch.arange(len(val_images)))
    args.batch_size = min(args.batch_size, len(train_set))  # drop_last would leave nothing of a small data set
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, collate_fn=as_is)
    val_loader = DataLoader(val_set, args.batch_size, collate_fn=as_is)
    options.describe(parts, {"train": len(train_set), "val": len(val_set), "test": len(parts.samples["test"])})

    # Model, loss, optimizer, schedule.
    mean, std = channel_statistics(train_images)
    batch_norm = not args.no_batch_norm
    network = {"width": args.width, "depth": args.depth, "batch_norm": batch_norm, "dropout": args.dropout}
    model = models.build("unet", parts.class_names, args.image_size, network, mean, std)
    if args.start_from:
        options.start_from(args.start_from, model)
    model = model.to(memory_format=torch.channels_last)
    criterion = SEGMENTATION_LOSSES[args.loss]
    images, masks = next(iter(train_loader))
    accelerator = options.accelerator_for(args, model, images, lambda logits: criterion(logits, masks))
    optimizer = optim.optimizer(args.optimizer, model, args.lr, args.weight_decay)
    schedule = optim.schedule(args.schedule, optimizer, args.epochs * len(train_loader))
    bare_model = model
    model, optimizer, schedule, train_loader, val_loader = accelerator.prepare(
        model, optimizer, schedule, train_loader, val_loader
    )
    progress = {"epoch": 0, "best_iou": -1.0, "best_epoch": 0}
    if state:
        progress = options.load_state(accelerator, state)
    history = options.read_history(args.out, progress["epoch"])

    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        if epoch - 1 - progress["best_epoch"] >= args.patience:
            print(f"No better val iou for {args.patience} epochs: stopped early.")
            break
        start = time.time()
        train_set.epoch = epoch
        train_loader.set_epoch(epoch)

        model.train()
        train_loss, train_counts = 0.0, []
        for images, masks in tqdm(train_loader, f"epoch {epoch}/{args.epochs}", leave=False):
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = criterion(logits, masks)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            train_loss += loss.item() * len(images)
            train_counts.append(segmentation_counts(logits > 0, masks).cpu())

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

        best = val_iou > progress["best_iou"]
        if best:
            progress |= {"best_iou": val_iou, "best_epoch": epoch}
            checkpoint.save(bare_model, args.out, data=parts.facts, precision=args.precision)
        train_counts = torch.cat(train_counts)
        line = {
            "epoch": epoch,
            "lr": schedule.get_last_lr()[0],
            "train_loss": train_loss / len(train_counts),
            "val_loss": val_loss / len(val_set),
            "train_iou": segmentation_scores(train_counts).iou,
            "val_iou": val_iou,
            "seconds": round(time.time() - start, 2),
        }
        history.append(line)
        options.write_history(args.out, history)
        render.save_png(render.curves(history), args.out / "report" / "curves.png")
        example = args.out / "report" / "photos" / f"epoch-{epoch:03}.png"
        draw_example(bare_model, val_images[0], val_masks[0], example)
        progress["epoch"] = epoch
        options.save_state(accelerator, args.out, epoch * len(train_loader), **progress)
        options.print_epoch(line, args.epochs, best)

    options.write_manifest(args, bare_model, history)
    card.write(args.out)
    print(f"Best val iou {progress['best_iou']:.4f} (epoch {progress['best_epoch']}): {args.out}")
    options.finish(args)


def draw_example(model: torch.nn.Module, image: torch.Tensor, mask: torch.Tensor, path: Path) -> None:
    """One validation picture beside its true and its predicted mask, as the model sees it."""
    images = to_float(image)[None]
    logits, photo = predict(model, images), render.to_picture(images)
    shown = [whole_mask(mask, model.image_size), predicted_masks(model, logits)[0]]
    masks = [render.mask_overlay(photo, each.any(0).numpy()) for each in shown]
    render.save_png(render.row([photo, *masks], ["image", "true mask", "predicted mask"]), path)


if __name__ == "__main__":
    options.run(main)

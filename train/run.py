"""A training run: its folder, what is saved while a model learns, and how --resume continues.

runs/NAME/config.json, model.safetensors   the best model so far (cvlab/checkpoint/)
runs/NAME/history.jsonl                    one line per epoch
runs/NAME/manifest.json                    command, seed, versions, hardware, minutes, peak memory
runs/NAME/report/                          curves; pictures that show photographs are in report/photos/
runs/NAME/state/step-N/                    what --resume continues from (resume.py)
"""

import math
import shlex
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerator import goes_on, save_state, start_tracking, track
from calibration import calibrate
from PIL import Image
from resume import OF_A_MODEL, delete, record, release, saved_states
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cvlab import checkpoint, plots, render
from cvlab.checkpoint import card, hub, manifest
from cvlab.data.parts import Parts
from cvlab.files import read_json, to_json, write_text
from cvlab.models import Model


class Run:
    """A notebook of one training, not its engine: it never sees an input, a label or a loss function."""

    SAVED = ("epoch", "step", "best", "best_epoch", "phase", "first", "history", "made_with", "precision")

    def __init__(
        self, args: Namespace, accelerator: Accelerator, state: Path | None, parts: Parts, counts: int = 1
    ) -> None:
        self.args, self.out, self.accelerator, self.state, self.parts = args, args.out, accelerator, state, parts
        self.epoch, self.step = 0, 0  # epochs finished; batches of the one in progress, the current one included
        self.best, self.best_epoch = 0.0, 0  # the highest score, and its epoch, whose weights are kept; 0 before one
        self.phase, self.first = 1, 1  # a training may have phases: the number of the present one, its first epoch
        # Of the epoch in progress, on the device: loss times images, images, and the counts.
        self.sums = torch.zeros(2 + counts, dtype=torch.float64, device=accelerator.device)
        self.history, self.states = [], [state] if state else []  # one line an epoch; the newest saved states
        self.precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        if state:
            saved = read_json(state / "progress.json")
            vars(self).update({name: saved[name] for name in self.SAVED})
            self.sums += self.sums.new_tensor(saved["sums"])
        self.made_with = record(args, parts, state)
        self._show_history()  # a killed run may have written one line more
        self.frames = self.out / "report" / ("photos" if args.data else "") / "epochs"
        self.started, self.stopping = time.time(), False
        if vars(args).get("track"):
            start_tracking(accelerator, args, self.epoch)

    @property
    def total_steps(self) -> int:
        """Batches since the beginning, the current one included."""
        return self.epoch * len(self.loader) + self.step

    def epochs(self, loader: DataLoader, epochs: int, phase: int = 1) -> Iterator[int]:
        """The numbers of the epochs that are left; ends early after `patience` of them without a better score.

        On Ctrl-C or SIGTERM the current step is finished and saved; a second one ends at once. Of several processes
        none waits, as they would stop at different steps: --resume then continues from the last whole epoch.
        """
        if phase > self.phase:
            self.phase, self.first = phase, self.epoch + 1
        self.loader, self.last = loader, self.first - 1 + epochs
        if self.state:
            self.accelerator.load_state(str(self.state))
            self.state = None
        stoppable = (signal.SIGINT, signal.SIGTERM) if self.accelerator.num_processes == 1 else ()
        handlers = {number: signal.signal(number, self._stop) for number in stoppable}
        try:
            while self.epoch < self.last:
                if self.epoch - max(self.best_epoch, self.first - 1) >= self.args.patience:
                    print(f"No better val score for {self.args.patience} epochs: stopped early.")
                    break
                loader.set_epoch(self.epoch + 1)
                yield self.epoch + 1
                self.started = time.time()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are left of the epoch, behind a bar with images per second, time left and peak memory."""
        left, name = self.accelerator.skip_first_batches(self.loader, self.step), f"epoch {self.epoch + 1}/{self.last}"
        scale = {"unit": " images", "unit_scale": self.loader.total_batch_size}
        bar = tqdm(left, name, len(self.loader), leave=False, initial=self.step, **scale)
        for batch in bar:
            if self.step % 10 == 0:
                bar.set_postfix_str(f"{manifest.peak_memory_mb()} MB", refresh=False)
            self.step += 1
            yield batch
            if self.stopping:
                self.save()
                raise KeyboardInterrupt

    def add(self, loss: Tensor, images: int, *counts: Tensor) -> None:
        """Adds a batch to the totals of the epoch: its mean loss, its number of images, counts. Waits for no GPU."""
        for i, value in enumerate((loss.detach().double() * images, images, *counts)):
            self.sums[i] += value

    def totals(self) -> list[float]:
        """The mean loss, the number of images and the counts of the epoch, over all processes.

        Raises ValueError if the loss is not a number; nothing of this epoch is saved.
        """
        loss, images, *counts = self.accelerator.reduce(self.sums).tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss became {loss} in epoch {self.epoch + 1}. Use a smaller --lr (a tenth), or --precision fp32. "
                f"The best model so far is in {self.out}."
            )
        return [loss / images, images, *counts]

    def end_epoch(
        self, model: Model, score: float, frame: Callable[[str], Image.Image] | None = None, **line: float
    ) -> None:
        """Keeps the model if its score is the best so far; saves history, curves, and what --resume needs.

        An epoch in which any of its numbers is NaN or infinite is never the best. `frame` draws a picture of this
        epoch, given its title.
        """
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        line = {"epoch": self.epoch, **line, "seconds": round(time.time() - self.started, 2)}
        self.history.append(line)
        if better := (score > self.best or not self.best_epoch) and all(map(math.isfinite, line.values())):
            first, self.best, self.best_epoch = not self.best_epoch, score, self.epoch
        if self.accelerator.is_main_process:
            if better:
                checkpoint.save(model, self.out, precision=self.precision, **self.made_with)
            if better and first:  # what tells of a model that was there before
                delete(self.out / name for name in OF_A_MODEL if name not in hub.NEEDED)
                delete(set(saved_states(self.out)) - set(self.states))
            self._show_history()
            if picture := self.best_epoch and frame and frame(f"epoch {self.epoch}"):
                render.save_png(picture, self.frames / f"epoch-{self.epoch:03}.png")
            track(self.accelerator, self.epoch, line, picture)
        self.save()
        ending = f"lr {line['lr']:.1e}  {line['seconds']:>6.1f} s {'*' if better else ' '}"
        tqdm.write(f"epoch {self.epoch:>3}/{self.last}  {shown(line, 'train', 'val')}  {ending}")

    def _show_history(self) -> None:
        of_another = not self.best_epoch and (self.out / "model.safetensors").exists()  # a model that was there before
        if self.history and not of_another and self.accelerator.is_main_process:
            write_text(self.out / "history.jsonl", "".join(to_json(each) + "\n" for each in self.history))
            render.save_png(plots.curves(self.history, self.best_epoch), self.out / "report" / "curves.png")

    def save(self) -> None:
        """Saves what --resume continues from, and keeps the state before it; OSError if it cannot be written."""
        if self.step:
            self.totals()  # a loss that is not a number ends here
        saved = {name: vars(self)[name] for name in self.SAVED} | {"sums": self.sums.tolist()}
        path = self.out / "state" / f"step-{self.total_steps}"
        save_state(self.accelerator, path, saved)
        self.states = [*self.states, path][-2:]
        if self.accelerator.is_main_process:
            delete(set(saved_states(self.out)) - set(self.states))
            if self.args.push_state:
                try:
                    hub.push_state(self.out, path, self.args.push)
                except hub.HubError as error:
                    tqdm.write(f"This state is not on the Hub: {error}")

    def finish(self, model: Model) -> None:
        """Writes manifest and card, says what to do with the model, and publishes it if --push asks."""
        if not goes_on():
            return
        if not self.best_epoch:
            raise ValueError("The loss on val was not a number in any epoch, so no model was kept: use a smaller --lr.")
        calibrate(self.out, self.parts, vars(self.args).get("others"))
        manifest.write(self.out, vars(self.args), model, self.history, self.best_epoch, self.precision)
        card.write(self.out)
        data = f" --data {shlex.quote(str(self.args.data))}" if self.args.data else ""
        print(f"Best epoch {self.best_epoch}, {shown(self.history[self.best_epoch - 1], 'val')}: {self.out}")
        print(f"Look at it:  python app.py {self.out}")
        print(f"Measure it:  python train/evaluate.py {self.out}{data} --part test")
        if self.args.push:
            card.write(self.out, self.args.push)
            print(f"Published:   {hub.push(self.out, self.args.push)}")
        release()


def shown(line: dict, *parts: str) -> str:
    """The losses and scores of a line of history.jsonl whose names begin with one of `parts`."""
    printed = {key for key in line if key.startswith(parts) and key.endswith(("loss", "iou", "accuracy"))}
    return "  ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in line.items() if key in printed)

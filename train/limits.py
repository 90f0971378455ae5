"""What the values of options may be, for all scripts: their types in recipes, and the ranges of numbers."""

import argparse
import math

# The least and the greatest value of options that are numbers; of a list, of each of them.
AT_LEAST_1 = ("epochs", "batch_size", "image_size", "width", "widths", "depth", "decoder_channels", "hidden")
AT_LEAST_1 += ("patience", "div_factor")
AT_LEAST_0 = ("lr", "finetune_lr", "weight_decay", "clip_norm", "mixup", "cutmix", "views", "unfreeze")
AT_LEAST_0 += ("finetune_epochs", "frozen_epochs", "channels", "pools", "pool_to", "dropout_at", "seed", "split_seed")
SHARES = ("momentum", "dropout", "head_dropout", "label_smoothing", "ema", "min_area", "layer_decay")
SHARES += ("color_jitter", "erase")
RANGES = dict.fromkeys(AT_LEAST_1, (1, math.inf)) | dict.fromkeys(AT_LEAST_0, (0, math.inf))
RANGES |= dict.fromkeys(SHARES, (0, 1)) | {"per_class": (1, math.inf), "classes": (2, math.inf), "crop_pct": (0.1, 1)}
NOT_0 = ("min_area", "layer_decay")


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that is outside of its range."""
    for name, (least, most) in RANGES.items():
        given = vars(args).get(name)
        if name == "epochs" and "finetune_epochs" in args:
            least = 0  # the second phase alone
        for value in given if isinstance(given, list | tuple) else [] if given is None else [given]:
            if not least <= value <= most or value == math.inf or (value == 0 and name in NOT_0):
                limits = f"at least {least}" if most > 1 else f"{'above' if name in NOT_0 else 'from'} {least} to 1"
                raise ValueError(f"--{name.replace('_', '-')} is {value:g}: it must be {limits}.")


def converted(value: object, action: argparse.Action) -> object:
    """A recipe's value as the command line would give it (1 of a float option is 1.0); ValueError if it is not one."""
    if isinstance(value, list):
        return [converted(each, action) for each in value]
    if isinstance(value, bool) and action.nargs == 0:  # a switch
        return value
    value = (action.type or str)(str(value))
    if action.choices and value not in action.choices:
        raise ValueError(value)
    return value

"""Do interventions confirm a heatmap, or refute it? A verdict on one map from 42 forward passes.

The model is asked two questions, both by painting over parts of the picture (`hide`):

    shown and hidden   does its score stay high where only the hottest places are shown, and fall where they are hidden?
    hidden parts       is the map hot where hiding parts, chosen without knowing the map, lowers the score?

Logistic regression makes one number of both answers. It was fitted on maps of photographs that hundreds of other hidden
parts had confirmed or refuted; tests/bench/verdict.py does that, and prints how often the verdict is wrong.

The verdict is about the map, not about the answer: a wrong answer may have a right map. What it cannot tell:

- If a picture of one colour already is of the class, as it may be a dandelion to a model of flowers, something missing
  speaks for the class, and what is missing cannot be hidden: see the check "empty picture".
- A map that knows nothing of the model may be right by accident: the edges of the picture, or its centre. The checks
  "like the edges" and "like the centre" say so. The mean activation of the last stage nearly is the map, and passes.
- A map that is blank or the same everywhere marks no place. It is called doubtful.
- The cause of a segmenter's region nearly always is the region itself. A map that only repeats it passes; the check
  "outside" says what lies elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import class_score, correlation, heatmap, predict, predicted_masks, region_score
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model, Stage
from cvlab.trust.deletion import PIXELS_AT_ONCE, hide, probability_of

SHARES = (1 / 16, 0.15, 0.3, 0.5, 0.75)  # of the picture: the hottest, hidden or shown alone
CELLS = 8  # a side of the grid on which importance is estimated
SQUARES, PAIRS = 4, 7  # 4 x 4 squares, and 7 pairs of complementary halves
SHRINKAGE = 0.05  # of the importance of each cell to 0, as a multiple of that to its neighbours' importance
CURVE_WEIGHT, PARTS_WEIGHT, BIAS = 5.74, 8.83, -1.99
BELIEVABLE, NOT_BELIEVABLE = 0.62, 0.07
OF_REGION = 0.45, 0.2  # the same two limits for the correlation with hidden parts, which alone decides on a region
AGREES = 0.3  # correlation from which a map agrees with hidden parts
LIKE = 0.6  # correlation from which a map is like one that knows nothing of the model
SENTENCES = {
    "believable": "The marked spot mattered: hiding parts of the picture confirms it.",
    "doubtful": "The marked spot may or may not have mattered: hiding parts of the picture does not tell.",
    "not believable": "The marked spot hardly mattered: hiding parts of the picture refutes it.",
}


class Check(NamedTuple):
    """One finding about a map: a number, whether it speaks for believing the map, and what it means."""

    value: float
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Judgement:
    """The verdict on a map.

    Attributes:
        level: "believable", "doubtful" or "not believable".
        sentence: the verdict in words.
        checks: by name, what it rests on and what it cannot tell.
    """

    level: str
    sentence: str
    checks: dict[str, Check]


@takes_wrapped
def judge(
    model: Model,
    images: Tensor,
    attribution: Tensor | dict[str, Tensor],
    class_idx: int | None = None,
    region: Tensor | None = None,
    stage: str | None = None,
    seed: int = 0,
) -> Judgement | dict[str, Judgement]:
    """Whether the model's score depends on the places that a map marks, found by hiding them and others: 42 forwards.

    Args:
        images: one image, (1, 3, S, S) in [0, 1].
        attribution: any signed map of the score, (1, 1, h, w); or several by name, each further one for 10 forwards.
        class_idx: the class of the score; by default a classifier's predicted class, or a segmenter's class 0.
        region: pixels of a segmenter's output, (S, S) bool, whose mean logit is the score; by default its mask.
        stage: a key of model.stages, over whose receptive fields the map lies; by default the map's own name, if it is
            such a key. Any other map is stretched over the picture.
        seed: of the hidden parts that are chosen without knowing the map.

    Returns:
        A judgement, or for several maps a dict of them.

    Raises:
        ValueError: an empty region or mask, an unknown class, or images that do not fit the model.
    """
    maps = attribution if isinstance(attribution, dict) else {"": attribution}
    hiding = _Hiding(model, images, class_idx, region, seed)
    found = {name: hiding.judge(each, model.stages.get(stage or name)) for name, each in maps.items()}
    return found if isinstance(attribution, dict) else found[""]


class _Hiding:
    """A model before one picture of which parts are hidden, and what all maps of the picture are compared with."""

    def __init__(self, model: Model, images: Tensor, class_idx: int | None, region: Tensor | None, seed: int) -> None:
        self.model, self.images, self.region = model, images, region
        logits = predict(model, images)
        if model.task == "classification":
            chosen = int(logits.argmax()) if class_idx is None else class_idx
            self.score = class_score(chosen)
        else:
            chosen = class_idx or 0
            self.region = predicted_masks(model, logits)[0, chosen] if region is None else region
            self.score = region_score(self.region, chosen)
        self.whole = self.score(logits)
        self.probability = probability_of(model, logits, chosen, self.region)
        self.before = self.probability(logits).item()
        squares, halves = _squares(images.shape[-1]), _halves(images.shape[-1], seed)
        scores, probabilities = self.ask(torch.cat([torch.ones_like(squares[:1]), squares, halves]))
        self.empty, self.squares = probabilities[0].item(), probabilities[1 : len(squares) + 1]
        _, *falls = (-scores).split([1, len(squares), len(halves)])
        self.importance = importance([squares, halves], falls)

    def ask(self, hidden: Tensor) -> Tensor:
        """Scores and probabilities with parts of the picture hidden: (N, 1, S, S) bool -> (2, N)."""
        found = []
        for part in hidden.split(max(1, PIXELS_AT_ONCE // hidden[0].numel())):
            logits = predict(self.model, hide(self.images.expand(len(part), -1, -1, -1), part))
            found.append(torch.stack([self.score(logits), self.probability(logits)]))
        return torch.cat(found, 1)

    def judge(self, attribution: Tensor, stage: Stage | None) -> Judgement:
        """The verdict on one map (1, 1, h, w)."""
        size = self.images.shape[-2:]
        signed = heatmap(attribution, size, stage) - heatmap(-attribution, size, stage)
        if signed.max() <= 0 or signed.max() - signed.min() <= 1e-5 * signed.abs().max():
            sentence = "The map marks no place: it is blank or the same everywhere, so there is nothing to test."
            return Judgement("doubtful", sentence, {"marked spot": Check(0.0, False, sentence)})
        hottest = _hottest(signed)
        scores, probabilities = self.ask(torch.cat([hottest, ~hottest]))
        hidden, shown = scores.chunk(2)
        everything = torch.cat([scores, self.whole])
        curve = ((shown - hidden).mean() / (everything.max() - everything.min()).clamp_min(1e-9)).item()
        parts = correlation(F.adaptive_avg_pool2d(signed, CELLS), self.importance).item()
        checks = self.checks(signed, probabilities[0].item(), curve, parts)
        if self.region is None:
            value, limits = CURVE_WEIGHT * curve + PARTS_WEIGHT * parts + BIAS, (BELIEVABLE, NOT_BELIEVABLE)
        else:
            value, limits = parts, OF_REGION
        level = "believable" if value > limits[0] else "not believable" if value < limits[1] else "doubtful"
        empty = checks["empty picture"]
        return Judgement(level, SENTENCES[level] + ("" if empty.passed else f" {empty.sentence}"), checks)

    def checks(self, signed: Tensor, hidden: float, curve: float, parts: float) -> dict[str, Check]:
        """What a verdict rests on, and what it cannot tell.

        Args:
            signed: the map at the picture's size.
            hidden: the probability with the hottest part hidden.
            curve, parts: the answers to the two questions.
        """
        low, high = self.squares.aminmax()
        weaker = (self.squares > hidden).float().mean().item()
        spot = (
            f"With the hottest {SHARES[0]:.0%} of the picture hidden, the probability is {hidden:.0%} instead of "
            f"{self.before:.0%}; with squares of that size hidden, {low:.0%} to {high:.0%}."
        )
        shown = (
            f"With only the hottest places shown, the score is {'higher' if curve > 0 else 'lower'} than with them "
            f"hidden, by {abs(curve):.0%} of its range."
        )
        agrees = (
            f"The map is {'' if parts > AGREES else 'not '}hot where hiding parts lowers the score (r = {parts:.2f})."
        )
        empty = f"A picture of one colour gets {self.empty:.0%}."
        if self.empty > self.before / 2:
            empty += " So something missing may decide, which cannot be hidden."
        found = {
            "marked spot": Check(weaker, weaker > 0.75, spot),
            "shown and hidden": Check(curve, curve > AGREES, shown),
            "hidden parts": Check(parts, parts > AGREES, agrees),
            "empty picture": Check(self.empty, self.empty <= self.before / 2, empty),
        }
        for name, blind in (("edges", _edges(self.images)), ("centre", _centre())):
            like = correlation(F.adaptive_avg_pool2d(signed, 2 * CELLS), blind).item()
            accident = "; it may be right by accident" if like > LIKE else ""
            sentence = f"The map agrees with the {name} of the picture with r = {like:.2f}{accident}."
            found[f"like the {name}"] = Check(like, like <= LIKE, sentence)
        if self.region is not None:
            outside = 1 - F.adaptive_avg_pool2d(self.region[None, None].float(), CELLS)
            cells = F.adaptive_avg_pool2d(signed.relu(), CELLS)
            marked, caused = (((each * outside).sum() / each.sum()).item() for each in (cells, self.importance.relu()))
            sentence = f"{marked:.0%} of the heat lies outside the region, and {caused:.0%} of what hiding changes."
            found["outside"] = Check(marked, marked - caused < 0.2, sentence)
        return found


def importance(blocks: Sequence[Tensor], falls: Sequence[Tensor]) -> Tensor:
    """How far a score falls where each cell of a grid is hidden, (1, 1, 8, 8), by ridge regression.

    (X'X + v (0.05 I + L)) b = X'y, where v is the mean of the diagonal of X'X and L the Laplacian of the grid, by which
    neighbours are nearly alike. Each block is centred, so that how much was hidden does not count.

    Args:
        blocks: what was hidden, each (N, 1, S, S) bool.
        falls: how far the score fell, each (N,).
    """
    hidden = [F.adaptive_avg_pool2d(block.float(), CELLS).flatten(1) for block in blocks]
    x = torch.cat([block - block.mean(0) for block in hidden]).double()
    y = torch.cat([block - block.mean() for block in falls]).to(x)
    gram = x.T @ x
    penalty = SHRINKAGE * torch.eye(CELLS**2) + _laplacian(CELLS)
    return torch.linalg.solve(gram + gram.diagonal().mean() * penalty, x.T @ y).view(1, 1, CELLS, CELLS).float()


def _laplacian(side: int) -> Tensor:
    """(side^2, side^2): the number of a cell's neighbours on the diagonal, -1 for each of them."""
    line = torch.diag(torch.ones(side - 1), 1)
    line = line + line.T
    neighbours = torch.kron(line, torch.eye(side)) + torch.kron(torch.eye(side), line)
    return torch.diag(neighbours.sum(1)) - neighbours


def _squares(size: int) -> Tensor:
    """Each of 4 x 4 squares of a picture: (16, 1, size, size) bool."""
    each = torch.eye(SQUARES**2).view(-1, 1, SQUARES, SQUARES)
    return F.interpolate(each, (size, size)).bool()


def _halves(size: int, seed: int) -> Tensor:
    """Smooth random halves of a picture, and behind them what each left out: (14, 1, size, size) bool."""
    noise = torch.randn(PAIRS, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(seed))
    field = F.interpolate(noise, (size, size), mode="bicubic")
    half = field <= field.flatten(1).median(1).values.view(-1, 1, 1, 1)
    return torch.cat([half, ~half])


def _hottest(signed: Tensor) -> Tensor:
    """The hottest shares of a map (1, 1, H, W): (5, 1, H, W) bool."""
    order = signed.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(signed.shape)
    return torch.cat([rank < share * rank.numel() for share in SHARES])


def _edges(images: Tensor) -> Tensor:
    """How strongly the brightness of a picture changes, (1, 1, 16, 16)."""
    grey = images.mean(1, keepdim=True)
    down, right = grey.diff(dim=2).abs()[..., :-1], grey.diff(dim=3).abs()[..., :-1, :]
    return F.adaptive_avg_pool2d(down + right, 2 * CELLS)


def _centre() -> Tensor:
    """A round spot in the middle, (1, 1, 16, 16)."""
    side = torch.linspace(-1, 1, 2 * CELLS)
    return (-(side[:, None] ** 2 + side**2) / 0.35).exp()[None, None]

"""Do interventions confirm a heatmap, or refute it? A verdict on one map from 44 forward passes.

The model answers two questions, both about pictures of which parts are hidden:

    hidden squares     is the map hot where hiding a square lowers the score? 16 squares, chosen without knowing the map,
                       are painted over (`hide`), and then filled with what stands elsewhere in the picture
    shown and hidden   does the score stay high where only the hottest places are shown, and fall where they are hidden?

The verdict is Pearson's correlation of the first plus CURVE_WEIGHT times the second, against two limits. They were
chosen on photographs, by maps that hundreds of other hidden parts confirmed or refuted (`cvlab.trust.reliability`);
tests/bench/verdict.py prints how often the verdict is wrong.

The verdict is about the map, not about the answer: a wrong answer may have a right map. What it cannot tell:

- If a picture of one colour already is of the class, as it may be a dandelion to a model of flowers, something missing
  speaks for the class, and what is missing cannot be hidden: see the check "empty picture".
- A map that knows nothing of the model may be right by accident: the edges of the picture, or its centre. The checks
  "like the edges" and "like the centre" say so. The mean activation of the last stage nearly is the map, and passes.
- A map that is blank or the same everywhere marks no place. It is called doubtful.
- The cause of a segmenter's region nearly always is the region itself. A map that only repeats it passes; the check
  "outside" says what lies elsewhere. On regions hidden squares alone decide: the other question tells less there.
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

SQUARES = 4  # a side
SHARES = (1 / 16, 0.15, 0.3, 0.5, 0.75)  # of the picture: the hottest; the first is as large as a square
CELLS = 8  # a side of the grid on which importance is estimated
SHRINKAGE = 0.05  # of a cell's importance to 0, as a multiple of that to its neighbours' importance
CURVE_WEIGHT = 0.35
LIMITS = 0.45, 0.2  # above the first a map is believable, below the second it is not
REGION_LIMITS = 0.45, 0.2
AGREES = 0.3  # a check passes above it
LIKE = 0.6  # from this correlation on a map is like one that knows nothing of the model
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
    """Whether the model's score depends on the places that a map marks: 44 forwards, of a segmenter 35.

    Args:
        images: one image, (1, 3, S, S) in [0, 1].
        attribution: any signed map of the score, (1, 1, h, w); or several by name, each further one for 10 forwards, of
            a segmenter 1.
        class_idx: the class of the score; by default a classifier's predicted class, or a segmenter's class 0.
        region: pixels of a segmenter's output, (S, S) bool, whose mean logit is the score; by default its mask.
        stage: a key of model.stages, over whose receptive fields the map lies; by default the map's own name, if it is
            such a key. Any other map is stretched over the picture.
        seed: of the places in the picture with whose content squares are filled.

    Returns:
        A judgement, or for several maps a dict of them.

    Raises:
        ValueError: an empty region or mask, an unknown class, or images that do not fit the model.
    """
    maps = attribution if isinstance(attribution, dict) else {"": attribution}
    hiding = Hiding(model, images, class_idx, region)
    hiding.look(seed)
    found = {name: hiding.judge(hiding.placed(each, stage or name)) for name, each in maps.items()}
    return found if isinstance(attribution, dict) else found[""]


class Hiding:
    """A model before one picture of which parts are hidden.

    Attributes:
        score: from logits to (N,), what the maps explain.
        region: (S, S) bool of a segmenter, else None.
    """

    def __init__(self, model: Model, images: Tensor, class_idx: int | None, region: Tensor | None) -> None:
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

    def ask(self, hidden: Tensor, filling: Tensor | None = None) -> Tensor:
        """Scores and probabilities with parts of the picture hidden, (2, N).

        Args:
            hidden: (N, 1, S, S) bool.
            filling: what stands there instead, (N or 1, 3, S, S); by default the colours around (`hide`).
        """
        images = self.images.expand(len(hidden), -1, -1, -1)
        pictures = hide(images, hidden) if filling is None else torch.where(hidden, filling, images)
        found = []
        for some in pictures.split(max(1, PIXELS_AT_ONCE // hidden[0].numel())):
            logits = predict(self.model, some)
            found.append(torch.stack([self.score(logits), self.probability(logits)]))
        return torch.cat(found, 1)

    def look(self, seed: int) -> None:
        """Hides what does not depend on the map: everything, and each square in two ways."""
        side = self.images.shape[-1]
        squares = F.interpolate(torch.eye(SQUARES**2).view(-1, 1, SQUARES, SQUARES), (side, side)).bool()
        away = torch.randint(side // 4, side - side // 4, (2,), generator=torch.Generator().manual_seed(seed))
        (_, *painted), (self.empty, *self.squares) = self.ask(torch.cat([torch.ones_like(squares[:1]), squares]))
        filled, _ = self.ask(squares, self.images.roll(tuple(away.tolist()), (2, 3)))
        self.importance = importance(squares, [-torch.stack(painted), -filled])

    def placed(self, attribution: Tensor, stage: str) -> Tensor:
        """A signed map over the picture, (1, 1, S, S); with a stage's name by the geometry of that stage."""
        size, place = self.images.shape[-2:], self.model.stages.get(stage)
        return heatmap(attribution, size, place) - heatmap(-attribution, size, place)

    def judge(self, heat: Tensor) -> Judgement:
        """The verdict on a map (1, 1, S, S)."""
        if heat.max() <= 0 or heat.max() - heat.min() <= 1e-5 * heat.abs().max():
            sentence = "The map marks no place: it is blank or the same everywhere, so there is nothing to test."
            return Judgement("doubtful", sentence, {"marked spot": Check(0.0, False, sentence)})
        checks = self.checks(heat)
        limits = getattr(self.model, "config", {}).get("trust", {}).get("limits") or (
            LIMITS if self.region is None else REGION_LIMITS
        )
        value = evidence(checks)
        level = "believable" if value > limits[0] else "not believable" if value < limits[1] else "doubtful"
        empty = checks["empty picture"]
        return Judgement(level, SENTENCES[level] + ("" if empty.passed else f" {empty.sentence}"), checks)

    def checks(self, heat: Tensor) -> dict[str, Check]:
        """What a verdict rests on, and what it cannot tell."""
        order = heat.flatten().argsort(descending=True, stable=True)
        rank = (
            torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(heat.shape)
        )
        hottest = torch.cat([rank < share * rank.numel() for share in SHARES])
        hidden = torch.cat([hottest, ~hottest]) if self.region is None else hottest[:1]
        scores, (spot, *_) = self.ask(hidden)
        low, high, before = min(self.squares), max(self.squares), self.before
        weaker = sum(square > spot for square in self.squares) / len(self.squares)
        agrees = correlation(F.adaptive_avg_pool2d(heat, CELLS), self.importance).item()
        found = {
            "marked spot": (
                weaker,
                weaker >= 0.75,
                f"With the hottest {SHARES[0]:.0%} of the picture hidden, the probability is {spot:.0%} instead of "
                f"{before:.0%}; with squares of that size hidden, {low:.0%} to {high:.0%}.",
            ),
            "hidden squares": (
                agrees,
                agrees > AGREES,
                f"Hiding squares lowers the score {'' if agrees > AGREES else 'not '}where the map is hot "
                f"(r = {agrees:.2f}).",
            ),
            "empty picture": (
                self.empty.item(),
                bool(self.empty <= before / 2),
                f"A picture of one colour gets {self.empty:.0%}"
                + ("." if self.empty <= before / 2 else ": what is missing may decide, and cannot be hidden."),
            ),
        }
        if self.region is None:
            everything, (without, alone) = torch.cat([scores, self.whole]), scores.chunk(2)
            curve = ((alone - without).mean() / (everything.max() - everything.min()).clamp_min(1e-9)).item()
            words = (
                f"With only the hottest places shown the score is {'higher' if curve > 0 else 'lower'} than with them "
            )
            found["shown and hidden"] = curve, curve > AGREES, words + f"hidden, by {abs(curve):.0%} of its range."
        else:
            outside = 1 - F.adaptive_avg_pool2d(self.region[None, None].float(), CELLS)
            cells = F.adaptive_avg_pool2d(heat.relu(), CELLS)
            marked, caused = (((each * outside).sum() / each.sum()).item() for each in (cells, self.importance.relu()))
            words = (
                f"{marked:.0%} of the heat lies outside the region, and {caused:.0%} of what hiding squares changes."
            )
            found["outside"] = marked, marked < caused + 0.2, words
        for name, blind in (("edges", _edges(self.images)), ("centre", _centre())):
            like = correlation(F.adaptive_avg_pool2d(heat, 2 * CELLS), blind.to(heat)).item()
            words = f"The map is like the {name} of the picture with r = {like:.2f}."
            words += "" if like < LIKE else " So it may be right by accident."
            found[f"like the {name}"] = like, like < LIKE, words
        return {name: Check(*each) for name, each in found.items()}


def evidence(checks: dict[str, Check]) -> float:
    """The number that decides on a map: how far interventions confirm it."""
    curve = checks["shown and hidden"].value if "shown and hidden" in checks else 0.0
    return checks["hidden squares"].value + CURVE_WEIGHT * curve


def importance(hidden: Tensor, falls: Sequence[Tensor]) -> Tensor:
    """How far a score falls where each cell of a grid is hidden, (1, 1, 8, 8), by ridge regression.

    (X'X + v (0.05 I + L)) b = X'y, where v is the mean of the diagonal of X'X, and L the Laplacian of the grid, by which
    neighbours are alike. Each filling is centred, so that how much was hidden does not count.

    Args:
        hidden: (N, 1, S, S) bool.
        falls: for each filling how far the score fell, (N,).
    """
    x = F.adaptive_avg_pool2d(hidden.double(), CELLS).flatten(1)
    x = torch.cat([x - x.mean(0)] * len(falls))
    y = torch.cat([fall - fall.mean() for fall in falls]).to(x)
    line = torch.diag(torch.ones(CELLS - 1), 1) + torch.diag(torch.ones(CELLS - 1), -1)
    neighbours = torch.kron(line, torch.eye(CELLS)) + torch.kron(torch.eye(CELLS), line)
    penalty = SHRINKAGE * torch.eye(CELLS**2) + torch.diag(neighbours.sum(1)) - neighbours
    gram = x.T @ x
    return torch.linalg.solve(gram + gram.diagonal().mean() * penalty.to(x), x.T @ y).view(1, 1, CELLS, CELLS).float()


def _edges(images: Tensor) -> Tensor:
    """How strongly the brightness of a picture changes, (1, 1, 16, 16)."""
    grey = images.mean(1, keepdim=True)
    change = grey.diff(dim=2).abs()[..., :-1] + grey.diff(dim=3).abs()[..., :-1, :]
    return F.adaptive_avg_pool2d(change, 2 * CELLS)


def _centre() -> Tensor:
    """A round spot in the middle, (1, 1, 16, 16)."""
    side = torch.linspace(-1, 1, 2 * CELLS)
    return (-(side[:, None] ** 2 + side**2) / 0.35).exp()[None, None]

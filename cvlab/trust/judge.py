"""Do interventions confirm a heatmap, or refute it? A verdict on one map from 44 forward passes.

The model answers two questions, both about pictures of which parts are hidden:

    hidden parts       is the map hot where hiding parts that do not depend on it lowers the score? Each of 16 squares
                       is painted over (`hide`), and then filled with what stands elsewhere in the picture
    shown and hidden   does the score stay high where only the hottest places are shown, and fall where they are hidden?

The verdict is Pearson's correlation of the first plus CURVE_WEIGHT times the second, against two limits. They were
chosen on photographs, by maps that hundreds of other hidden parts confirmed or refuted (`cvlab.trust.reliability`);
tests/bench/verdict.py prints how often the verdict is wrong.

The verdict is about the map, not about the answer: a wrong answer may have a right map. What it cannot tell:

- If a picture of one colour already is of the class, as it may be a dandelion to a model of flowers, something missing
  speaks for the class, and what is missing cannot be hidden: see the check "empty picture".
- A map that knows nothing of the class may be right by accident, and is believable then: the edges of the picture, its
  centre, the mean activation of a stage. The checks "like the edges" and "like the centre" say so.
- A map that is blank or the same everywhere marks no place. It is called doubtful.
- The cause of a segmenter's region nearly always is the region itself. A map that only repeats it passes; the check
  "outside" says what lies elsewhere. On regions hidden squares alone decide: the other question tells less there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import correlation
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model
from cvlab.trust.hiding import Hiding

SQUARES = 4  # a side
SHARES = (1 / 16, 0.15, 0.3, 0.5, 0.75)  # of the picture: the hottest; the first is as large as a square
CELLS = 8  # a side of the grid on which importance is estimated
SHRINKAGE = 0.05  # of a cell's importance to 0, as a multiple of that to its neighbours' importance
CURVE_WEIGHT = 0.35
LIMITS = 0.33, 0.05  # above the first a map is believable, below the second it is not
REGION_LIMITS = 0.3, 0.15
AGREES = 0.3  # a check passes above it
LIKE = 0.6  # from this correlation on a map is like one that knows nothing of the model
SENTENCES = {
    "believable": "The marked spot mattered: hiding parts of the picture confirms it.",
    "doubtful": "The marked spot may or may not have mattered: hiding parts of the picture does not tell.",
    "not believable": "The marked spot hardly mattered: hiding parts of the picture refutes it.",
}
ON_THE_WHOLE = {  # where the hottest spot alone says otherwise
    ("believable", False): "The heat is right on the whole: hiding parts confirms it, if hardly at the hottest spot.",
    ("not believable", True): "The heat is wrong on the whole: hiding parts refutes it, if not at the hottest spot.",
}


class Check(NamedTuple):
    """One finding about a map: a number, whether it speaks for believing the map, and what it means."""

    value: float
    passed: bool
    sentence: str


class Judgement(NamedTuple):
    """A verdict: "believable", "doubtful" or "not believable", in words, and what it rests on and cannot tell."""

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

    Several maps by name give a dict of judgements; each further map takes 10 forwards, of a segmenter 1.

    Args:
        images: one image, (1, 3, S, S) in [0, 1].
        attribution: any signed map of the score, (1, 1, h, w), or several.
        class_idx: the class of the score; by default a classifier's predicted class, or a segmenter's class 0.
        region: pixels of a segmenter's output, (S, S) bool, whose mean logit is the score; by default its mask.
        stage: a key of model.stages, over whose receptive fields the map lies; by default the map's own name, if it is
            such a key. Any other map is stretched over the picture.
        seed: of the places in the picture with whose content squares are filled.

    Raises:
        ValueError: an empty region or mask, an unknown class, or images that do not fit the model.
    """
    maps = attribution if isinstance(attribution, dict) else {"": attribution}
    verdicts = Verdicts(model, images, class_idx, region, seed)
    found = {name: verdicts.judge(verdicts.placed(each, stage or name)) for name, each in maps.items()}
    return found if isinstance(attribution, dict) else found[""]


class Verdicts(Hiding):
    """Verdicts on maps of one picture."""

    def __init__(self, model: Model, images: Tensor, class_idx: int | None, region: Tensor | None, seed: int) -> None:
        super().__init__(model, images, class_idx, region)
        side = self.images.shape[-1]
        squares = F.interpolate(torch.eye(SQUARES**2).view(-1, 1, SQUARES, SQUARES), (side, side)).bool()
        away = torch.randint(side // 4, side - side // 4, (2,), generator=torch.Generator().manual_seed(seed))
        painted, probabilities = self.ask(torch.cat([torch.ones_like(squares[:1]), squares]))
        self.empty, *self.squares = probabilities.tolist()
        filled, _ = self.ask(squares, self.images.roll(tuple(away.tolist()), (2, 3)))
        self.importance = importance(squares, [-painted[1:], -filled])

    def judge(self, heat: Tensor) -> Judgement:
        """The verdict on a map (1, 1, S, S)."""
        if heat.max() <= 0 or heat.max() - heat.min() <= 1e-5 * heat.abs().max():
            sentence = "The map marks no place: it is blank or the same everywhere, so there is nothing to test."
            return Judgement("doubtful", sentence, {"marked spot": Check(0.0, False, sentence)})
        checks = self.checks(heat)
        limits = getattr(self.model, "config", {}).get("limits", LIMITS if self.region is None else REGION_LIMITS)
        value = evidence(checks)
        level = "believable" if value > limits[0] else "not believable" if value < limits[1] else "doubtful"
        empty, sentence = checks["empty picture"], SENTENCES[level]
        sentence = ON_THE_WHOLE.get((level, checks["marked spot"].passed), sentence)
        return Judgement(level, sentence + ("" if empty.passed else f" {empty.sentence}"), checks)

    def checks(self, heat: Tensor) -> dict[str, Check]:
        """What a verdict rests on, and what it cannot tell."""
        rank = heat.flatten().argsort(descending=True, stable=True).argsort().view(heat.shape)
        hottest = torch.cat([rank < share * rank.numel() for share in SHARES])
        scores, (spot, *_) = self.ask(torch.cat([hottest, ~hottest]) if self.region is None else hottest[:1])
        weaker = sum(square > spot for square in self.squares) / len(self.squares)
        without = f"With the hottest {SHARES[0]:.0%} of the picture hidden, the probability is {spot:.0%} instead of "
        without += f"{self.probability:.0%}; with squares as large hidden, {min(self.squares):.0%} to "
        found = {"marked spot": (weaker, weaker >= 0.75, without + f"{max(self.squares):.0%}.")}
        agrees = correlation(F.adaptive_avg_pool2d(heat, CELLS), self.importance).item()
        words = f"Where hiding squares lowers the score, the map is {'' if agrees > AGREES else 'not '}hot: r = "
        found["hidden parts"] = agrees, agrees > AGREES, words + f"{agrees:.2f}."
        if self.region is None:
            hidden, shown = scores.chunk(2)
            span = F.pad(scores, (0, 1), value=self.before).aminmax()
            curve = ((shown - hidden).mean() / (span.max - span.min).clamp_min(1e-9)).item()
            words = f"With only the hottest places shown, the score is {'higher' if curve > 0 else 'lower'} than with "
            words += f"only them hidden, by {abs(curve):.0%} of its range."
            found["shown and hidden"] = curve, curve > AGREES, words
        else:
            outside = 1 - F.adaptive_avg_pool2d(self.region[None, None].float(), CELLS)
            weights = F.adaptive_avg_pool2d(heat.relu(), CELLS), self.importance.relu()
            marked, moved = (((each * outside).sum() / each.sum().clamp_min(1e-9)).item() for each in weights)
            words = f"Outside the region lie {marked:.0%} of the heat, and {moved:.0%} of what hiding changes."
            found["outside"] = marked, marked < moved + 0.2, words
        is_empty = self.empty > self.probability / 2
        words = " So something missing may decide, which cannot be hidden." if is_empty else ""
        found["empty picture"] = self.empty, not is_empty, f"A picture of one colour gets {self.empty:.0%}.{words}"
        for name, blind in blind_maps(self.images).items():
            like = correlation(F.adaptive_avg_pool2d(heat, 2 * CELLS), blind).item()
            words = f"The map is like the picture's {name}: r = {like:.2f}."
            words += " So it may be right by accident." if like > LIKE else ""
            found[f"like the {name}"] = like, like <= LIKE, words
        return {name: Check(float(value), bool(passed), words) for name, (value, passed, words) in found.items()}


def evidence(checks: dict[str, Check]) -> float:
    """The number that decides on a map: how far interventions confirm it."""
    curve = checks["shown and hidden"].value if "shown and hidden" in checks else 0.0
    return checks["hidden parts"].value + CURVE_WEIGHT * curve


def importance(hidden: Tensor, falls: Sequence[Tensor]) -> Tensor:
    """How far a score falls where each cell of a grid is hidden, (1, 1, 8, 8), by ridge regression.

    (X'X + v (0.05 I + L)) b = X'y, where v is the mean of the diagonal of X'X, and L the Laplacian of the grid, which
    makes neighbours alike. Each filling is centred, so that how much was hidden does not count.

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


def blind_maps(images: Tensor) -> dict[str, Tensor]:
    """Maps that know nothing of the model, (1, 1, 16, 16): how much the brightness changes, and a round spot."""
    grey, side = images.mean(1, keepdim=True), torch.linspace(-1, 1, 2 * CELLS).to(images)
    change = grey.diff(dim=2).abs()[..., :-1] + grey.diff(dim=3).abs()[..., :-1, :]
    spot = (-(side[:, None] ** 2 + side**2) / 0.35).exp()
    return {"edges": F.adaptive_avg_pool2d(change, 2 * CELLS), "centre": spot[None, None]}

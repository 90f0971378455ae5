"""Can a heatmap be trusted? Tests that hide parts of the picture, and reasons why a map may mislead."""

from cvlab.trust.deletion import Deletion, deletion, deletion_curves, hide, hottest_part
from cvlab.trust.familiarity import familiarity
from cvlab.trust.judge import Check, Judgement, judge

"""Can a heatmap be trusted? A verdict from hiding parts of the picture, and reasons why a map may mislead."""

from cvlab.trust.familiarity import familiarity
from cvlab.trust.hiding import hide, hottest_part
from cvlab.trust.judge import Check, Judgement, judge

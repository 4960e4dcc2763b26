"""The main job: a network, its twins, and everything measured on them side by side."""

from skipscope.comparison._compare import compare as compare
from skipscope.comparison._results import Claim as Claim
from skipscope.comparison._results import Comparison as Comparison
from skipscope.comparison._results import Curves as Curves
from skipscope.comparison._results import Rung as Rung
from skipscope.comparison._results import StrengthSweep as StrengthSweep
from skipscope.comparison._results import Training as Training
from skipscope.comparison._results import Twin as Twin
from skipscope.comparison._results import smoothed as smoothed
from skipscope.comparison._train import train_twins as train_twins

"""Compare a network with its twins: every measurement side by side."""

from skipscope.comparison._compare import compare as compare
from skipscope.comparison._comparison_result import Claim as Claim
from skipscope.comparison._comparison_result import Comparison as Comparison
from skipscope.comparison._comparison_result import DepthResult as DepthResult
from skipscope.comparison._comparison_result import StrengthSweep as StrengthSweep
from skipscope.comparison._comparison_result import Twin as Twin
from skipscope.comparison.training import Curves as Curves
from skipscope.comparison.training import Training as Training
from skipscope.comparison.training import smoothed as smoothed
from skipscope.comparison.training import train_twins as train_twins

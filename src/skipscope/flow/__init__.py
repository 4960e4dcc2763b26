"""The gradient on its way back: flow, verdict, split, paths, importance, remedies."""

from skipscope.flow._correlation import gradient_correlation as gradient_correlation
from skipscope.flow._flow import gradient_flow as gradient_flow
from skipscope.flow._flow_results import BoundaryFlow as BoundaryFlow
from skipscope.flow._flow_results import GradientFlow as GradientFlow
from skipscope.flow._flow_results import LayerGradient as LayerGradient
from skipscope.flow._flow_results import Verdict as Verdict
from skipscope.flow._importance import importance as importance
from skipscope.flow._paths import path_spectrum as path_spectrum
from skipscope.flow._prescribe import prescribe as prescribe
from skipscope.flow._results import Cost as Cost
from skipscope.flow._results import GradientCorrelation as GradientCorrelation
from skipscope.flow._results import GradientSplit as GradientSplit
from skipscope.flow._results import Importance as Importance
from skipscope.flow._results import ImportanceOf as ImportanceOf
from skipscope.flow._results import PathSpectrum as PathSpectrum
from skipscope.flow._results import Prescription as Prescription
from skipscope.flow._results import Remedy as Remedy
from skipscope.flow._results import SplitAt as SplitAt
from skipscope.flow._split import gradient_split as gradient_split
from skipscope.flow._verdict import FALL as FALL
from skipscope.flow._verdict import GROWTH as GROWTH
from skipscope.flow._verdict import Point as Point
from skipscope.flow._verdict import judge as judge

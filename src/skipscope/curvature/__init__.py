"""Curvature: products with the Hessian, both ends of its spectrum with bounds, its density and trace."""

from skipscope.curvature._curvature_operator import CurvatureOperator as CurvatureOperator
from skipscope.curvature._curvature_operator import How as How
from skipscope.curvature._curvature_operator import curvature_operator as curvature_operator
from skipscope.curvature._curvature_operator import open_operator as open_operator
from skipscope.curvature._curvature_results import ExtremeEigenvalues as ExtremeEigenvalues
from skipscope.curvature._curvature_results import Layout as Layout
from skipscope.curvature._curvature_results import SpectralDensity as SpectralDensity
from skipscope.curvature._curvature_results import TraceEstimate as TraceEstimate
from skipscope.curvature._eigensolver import Ends as Ends
from skipscope.curvature._eigensolver import SolverOptions as SolverOptions
from skipscope.curvature._eigensolver import find_ends as find_ends
from skipscope.curvature._eigensolver import require_memory as require_memory
from skipscope.curvature._extreme_eigenvalues import ends_of as ends_of
from skipscope.curvature._extreme_eigenvalues import extreme_eigenvalues as extreme_eigenvalues
from skipscope.curvature._lanczos import gaussian_blocks as gaussian_blocks
from skipscope.curvature._product_modes import Matrix as Matrix
from skipscope.curvature._spectral_density import spectral_density as spectral_density
from skipscope.curvature._trace_estimate import curvature_trace as curvature_trace

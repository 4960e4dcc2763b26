"""Decomposition of the gradient by the number of branches that it crossed."""

from skipscope.flow.paths._path_spectrum import path_spectrum as path_spectrum
from skipscope.flow.paths._path_spectrum import paths_of as paths_of

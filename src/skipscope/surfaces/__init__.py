"""The loss on planes of weight space, one network at a time or twins side by side.

Meanings: a plane is w + a d1 + b d2; a Gaussian direction is normalised filter by filter to |w|, biases and norms
zero (Li, Xu, Taylor, Studer, Goldstein: Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913).
"""

from skipscope.surfaces._band_results import PairedBand as PairedBand
from skipscope.surfaces._band_results import SurfaceBand as SurfaceBand
from skipscope.surfaces._curvature_map import curvature_map as curvature_map
from skipscope.surfaces._directions import random_direction as random_direction
from skipscope.surfaces._forked import CAN_FORK as CAN_FORK
from skipscope.surfaces._forked import Forked as Forked
from skipscope.surfaces._forked import one_thread as one_thread
from skipscope.surfaces._landscape import landscape as landscape
from skipscope.surfaces._landscape import paired_landscapes as paired_landscapes
from skipscope.surfaces._map_result import CurvatureMap as CurvatureMap
from skipscope.surfaces._map_result import PairedMaps as PairedMaps
from skipscope.surfaces._planes import Plane as Plane
from skipscope.surfaces._planes import solutions_plane as solutions_plane
from skipscope.surfaces._planes import trajectory_plane as trajectory_plane
from skipscope.surfaces._results import Checks as Checks
from skipscope.surfaces._results import Difference as Difference
from skipscope.surfaces._results import KnownPoints as KnownPoints
from skipscope.surfaces._results import PairedSurfaces as PairedSurfaces
from skipscope.surfaces._results import Provenance as Provenance
from skipscope.surfaces._results import Surface as Surface
from skipscope.surfaces._score_result import Scores as Scores
from skipscope.surfaces._store import read_store as read_store

"""The loss on planes of weight space, one network at a time or twins side by side.

Meanings: a plane is w + a d1 + b d2; a Gaussian direction is normalised filter by filter to |w|, biases and
    norms
zero (Li, Xu, Taylor, Studer, Goldstein: Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv
1712.09913).
"""

from skipscope.surfaces._landscape import landscape as landscape
from skipscope.surfaces._landscape import paired_landscapes as paired_landscapes
from skipscope.surfaces.evaluation._process_pool import CAN_FORK as CAN_FORK
from skipscope.surfaces.evaluation._process_pool import Forked as Forked
from skipscope.surfaces.evaluation._process_pool import one_thread as one_thread
from skipscope.surfaces.grids._surface_store import read_store as read_store
from skipscope.surfaces.maps._curvature_map import curvature_map as curvature_map
from skipscope.surfaces.maps._map_result import CurvatureMap as CurvatureMap
from skipscope.surfaces.maps._map_result import PairedMaps as PairedMaps
from skipscope.surfaces.planes._directions import random_direction as random_direction
from skipscope.surfaces.planes._plane import Plane as Plane
from skipscope.surfaces.planes._plane import solutions_plane as solutions_plane
from skipscope.surfaces.planes._plane import trajectory_plane as trajectory_plane
from skipscope.surfaces.results._band_result import PairedBand as PairedBand
from skipscope.surfaces.results._band_result import SurfaceBand as SurfaceBand
from skipscope.surfaces.results._score_result import Scores as Scores
from skipscope.surfaces.results._surface_result import Checks as Checks
from skipscope.surfaces.results._surface_result import Difference as Difference
from skipscope.surfaces.results._surface_result import KnownPoints as KnownPoints
from skipscope.surfaces.results._surface_result import PairedSurfaces as PairedSurfaces
from skipscope.surfaces.results._surface_result import Provenance as Provenance
from skipscope.surfaces.results._surface_result import Surface as Surface

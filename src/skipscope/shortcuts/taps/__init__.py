"""Read and replace activations while a forward pass runs."""

from skipscope.shortcuts.taps._activation_taps import Merge as Merge
from skipscope.shortcuts.taps._activation_taps import tap_boundaries as tap_boundaries
from skipscope.shortcuts.taps._activation_taps import tap_merges as tap_merges

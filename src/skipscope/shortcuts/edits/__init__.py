"""Edits of a model: shortcuts added, and batch-norm statistics recalibrated."""

from skipscope.shortcuts.edits._added_shortcuts import add_shortcuts as add_shortcuts
from skipscope.shortcuts.edits._recalibration import average_statistics as average_statistics
from skipscope.shortcuts.edits._recalibration import recalibrate as recalibrate

"""The dataflow of one forward pass: find, name, edit and add shortcuts, and tap activations.

Words (definitions.md): where activations join is a *merge*; the *branch* is its side with weights, the
*shortcut* the side that skips it, and they part at the *fork*.
"""

from skipscope.shortcuts._edit import ablate as ablate
from skipscope.shortcuts._edit import boundaries as boundaries
from skipscope.shortcuts._edit import meaning as meaning
from skipscope.shortcuts._edit import one_edit as one_edit
from skipscope.shortcuts._edit import refuse_another_architecture as refuse_another_architecture
from skipscope.shortcuts._model_wrappers import unwrapped as unwrapped
from skipscope.shortcuts._rewire import rewirable as rewirable
from skipscope.shortcuts._rewire import rewire as rewire
from skipscope.shortcuts._shortcut_result import Boundary as Boundary
from skipscope.shortcuts._shortcut_result import OperandSide as OperandSide
from skipscope.shortcuts._shortcut_result import Shortcut as Shortcut
from skipscope.shortcuts._shortcut_result import Shortcuts as Shortcuts
from skipscope.shortcuts.edits._added_shortcuts import add_shortcuts as add_shortcuts
from skipscope.shortcuts.edits._recalibration import average_statistics as average_statistics
from skipscope.shortcuts.edits._recalibration import norms_with_statistics as norms_with_statistics
from skipscope.shortcuts.edits._recalibration import recalibrate as recalibrate
from skipscope.shortcuts.finding._shortcut_finder import find_shortcuts as find_shortcuts
from skipscope.shortcuts.taps import Merge as Merge
from skipscope.shortcuts.taps import tap_boundaries as tap_boundaries
from skipscope.shortcuts.taps import tap_merges as tap_merges
from skipscope.shortcuts.trace import Trace as Trace
from skipscope.shortcuts.trace import TracedCall as TracedCall
from skipscope.shortcuts.trace import Value as Value
from skipscope.shortcuts.trace import record as record
from skipscope.shortcuts.trace._marked_functions import mark_shortcut as mark_shortcut
from skipscope.shortcuts.twin import refuse_shared as refuse_shared

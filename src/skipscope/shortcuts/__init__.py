"""The dataflow of one forward pass: find, name, edit and add shortcuts, and tap activations.

Words (definitions.md): where activations join is a *merge*; the *branch* is its side with weights, the *shortcut*
the side that skips it, and they part at the *fork*.
"""

from skipscope.shortcuts._find import find_shortcuts as find_shortcuts
from skipscope.shortcuts._results import Boundary as Boundary
from skipscope.shortcuts._results import Shortcut as Shortcut
from skipscope.shortcuts._results import Shortcuts as Shortcuts

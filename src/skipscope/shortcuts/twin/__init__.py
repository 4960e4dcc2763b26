"""Edited twins: modules that run their class's own code with some operands of some calls rewritten.

``_plan`` defines the edits, ``_eager_pass`` and ``_compiled_pass`` rewrite the calls of one pass, and
``_edited_class`` creates the classes whose methods begin such a pass.
"""

from skipscope.shortcuts.twin._edited_class import follow as follow
from skipscope.shortcuts.twin._edited_class import follow_callers as follow_callers
from skipscope.shortcuts.twin._join import ChainJoin as ChainJoin
from skipscope.shortcuts.twin._join import Join as Join
from skipscope.shortcuts.twin._plan import REWIRED as REWIRED
from skipscope.shortcuts.twin._plan import Group as Group
from skipscope.shortcuts.twin._plan import Rule as Rule
from skipscope.shortcuts.twin._plan import edits_of as edits_of
from skipscope.shortcuts.twin._plan import refuse_shared as refuse_shared
from skipscope.shortcuts.twin._plan import remembered_boundaries as remembered_boundaries

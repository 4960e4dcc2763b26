"""Record a forward pass: every torch call in order, as plain data. See :class:`Trace`."""

from skipscope.shortcuts.trace._argument_order import in_order as in_order
from skipscope.shortcuts.trace._function_names import function_of as function_of
from skipscope.shortcuts.trace._lent_inputs import LentInputs as LentInputs
from skipscope.shortcuts.trace._recorded_trace import Hidden as Hidden
from skipscope.shortcuts.trace._recorded_trace import ModuleRun as ModuleRun
from skipscope.shortcuts.trace._recorded_trace import Operand as Operand
from skipscope.shortcuts.trace._recorded_trace import Origin as Origin
from skipscope.shortcuts.trace._recorded_trace import Trace as Trace
from skipscope.shortcuts.trace._recorded_trace import TracedCall as TracedCall
from skipscope.shortcuts.trace._recorded_trace import Value as Value
from skipscope.shortcuts.trace._recorder import NeedsGradients as NeedsGradients
from skipscope.shortcuts.trace._recorder import Recorder as Recorder
from skipscope.shortcuts.trace._recorder import record as record
from skipscope.shortcuts.trace._recorder import recording as recording

"""Live recording of the gradients an optimizer receives, and of the flow behind them.

``watch`` listens where the optimizer steps (``_stepper``), reads the gradients in one pass (``_norms``,
``_gradients``), keeps them in columns (``_columns``, ``_store``) and judges them by the flow room's rule (``_judge``).
"""

from skipscope.monitor._read import read_history as read_history
from skipscope.monitor._results import STATES as STATES
from skipscope.monitor._results import History as History
from skipscope.monitor._results import LiveVerdict as LiveVerdict
from skipscope.monitor._results import VerdictEvent as VerdictEvent
from skipscope.monitor._sinks import JsonLines as JsonLines
from skipscope.monitor._sinks import Record as Record
from skipscope.monitor._sinks import Sink as Sink
from skipscope.monitor._sinks import Terminal as Terminal
from skipscope.monitor._watch import Monitor as Monitor
from skipscope.monitor._watch import watch as watch

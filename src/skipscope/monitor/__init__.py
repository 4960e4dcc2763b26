"""Live recording of the gradients that an optimizer receives, and of the gradient flow behind them.

``watch`` hooks the optimizer's step (``_step_recorder``), reads the gradients in one pass
(``_gradient_norms``, ``_step_row``), stores them in columns (``_row_files``, ``_run_store``) and judges them
by the rules of ``skipscope.flow`` (``_live_verdict``).
"""

from skipscope.monitor._record import Record as Record
from skipscope.monitor._sinks import Csv as Csv
from skipscope.monitor._sinks import JsonLines as JsonLines
from skipscope.monitor._sinks import Sink as Sink
from skipscope.monitor._sinks import Terminal as Terminal
from skipscope.monitor._watch import Monitor as Monitor
from skipscope.monitor._watch import watch as watch
from skipscope.monitor.history import STATES as STATES
from skipscope.monitor.history import History as History
from skipscope.monitor.history import LiveVerdict as LiveVerdict
from skipscope.monitor.history import VerdictEvent as VerdictEvent
from skipscope.monitor.history import read_history as read_history

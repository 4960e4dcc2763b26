"""History of a run: storage on disk, reading and the live verdict."""

from skipscope.monitor.history._history import STATES as STATES
from skipscope.monitor.history._history import History as History
from skipscope.monitor.history._history import LiveVerdict as LiveVerdict
from skipscope.monitor.history._history import VerdictEvent as VerdictEvent
from skipscope.monitor.history._history_reader import read_history as read_history

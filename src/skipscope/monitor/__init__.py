"""Live recording of the gradients an optimizer receives, and of the flow behind them."""

from skipscope.monitor._results import FLOW, GRADIENTS, STATES, History, LiveVerdict, VerdictEvent

__all__ = ["FLOW", "GRADIENTS", "STATES", "History", "LiveVerdict", "VerdictEvent"]

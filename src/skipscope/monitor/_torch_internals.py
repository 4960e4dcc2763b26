"""Private names of torch that the monitor uses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def graph_task() -> int:
    """The number of the backward pass that this thread runs; -1 outside of one."""
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Whether the backward pass under way keeps its graph, so that a second one can follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


def accumulator(parameter: Tensor) -> Any:
    """The node that adds to ``parameter.grad``."""
    with torch.enable_grad():
        return torch.autograd.graph.get_gradient_edge(parameter).node


def will_run(node: Any) -> bool | None:
    """Whether the pass under way fills the parameter's gradient.

    Returns:
        True or False; None where ``torch.autograd.grad`` returns that gradient instead of adding it up.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return None


def runs_whole_graph() -> bool:
    """Whether the pass under way computes every gradient, and not only those of ``inputs=``."""
    return will_run(accumulator(torch.zeros((), requires_grad=True))) is True


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward pass under way is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def keywords_of_call() -> dict[str, Any]:
    """The keyword arguments of the module call whose global forward pre-hook asks, two frames up.

    Global hooks are not handed keywords. The dict belongs to this one call, so an entry that is replaced
    reaches the forward pass and nobody else.
    """
    found = sys._getframe(2).f_locals.get("kwargs")
    return found if isinstance(found, dict) else {}


def count_backward_passes() -> int:
    """How many backward passes this process has begun, this call's own included: torch numbers them."""
    numbers: list[int] = []
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True) * 1.0
        probe.register_hook(lambda _: numbers.append(graph_task()))
        torch.autograd.grad(probe, [probe], torch.ones(()))
    return numbers[0]


class _Quiet:
    """Handle of :func:`quiet_about_global_hooks`."""

    def __init__(self):
        self._filter = None
        if "torch._dynamo" in sys.modules:
            warnings.filterwarnings(
                "ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks"
            )
            self._filter = warnings.filters[0]

    def remove(self) -> None:
        """Warn again."""
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        self._filter = None


def quiet_about_global_hooks() -> _Quiet:
    """Silence the warning of compiled modules about global hooks, until ``remove``."""
    return _Quiet()


class _Eager:
    """Compiled code runs as written while anyone asks for it: torch's stance is one for the whole process."""

    def __init__(self):
        self._users, self._stance = 0, None

    def begin(self) -> bool:
        """Begin to run compiled modules eagerly; False where nothing was compiled."""
        if "torch._dynamo" not in sys.modules:
            return False
        self._users += 1
        if self._users == 1:
            self._stance = torch.compiler.set_stance("force_eager")
        return True

    def end(self) -> None:
        """The last one to end it restores the stance."""
        self._users -= 1
        if not self._users and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


eager = _Eager()

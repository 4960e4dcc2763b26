"""From a result to its story: a title, the answer, and a panel for each claim. One function, told by class.

The views (`_view_*.py`) register themselves here, one file for each room; a result that has no view of its own still
has its table.
"""

from __future__ import annotations

import functools

from skipscope._result import Result
from skipscope.report._charts import Panel, Story


@functools.singledispatch
def story(result: Result) -> Story:
    """What a page says about a result, the answer first."""
    table = result.table()
    return Story(
        title=table.title, lead=type(result).__name__, panels=[Panel(heading="The numbers", tables=[table])]
    )

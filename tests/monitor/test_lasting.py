"""What counts over the last few steps, column by column, against the words of the rule in plain Python."""

import math
import statistics

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from skipscope.monitor import STATES
from skipscope.monitor.history import _live_verdict


def plainly(column):
    words = [STATES[int(code)] for code in column if math.isfinite(code)]
    if not words:
        return "absent"
    if words[-1] == "nonfinite":
        return "nonfinite"
    return words[-1].replace("underflow", "ok") if len(set(words)) == 1 else "ok"


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(float, (4, 3), elements=st.sampled_from([*map(float, range(len(STATES))), math.nan])))
def test_a_state_lasts(codes):
    assert _live_verdict._lasting(codes) == [plainly(column) for column in codes.T]


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(float, st.tuples(st.integers(1, 6), st.integers(1, 4)),
               elements=st.sampled_from([-3.0, -1.5, 0.0, 2.0, 7.25, math.nan, math.inf, -math.inf]))
)  # fmt: skip
def test_medians_of_what_is_finite(values):
    kept = [[v for v in column if math.isfinite(v)] for column in values.T]
    right = [statistics.median(column) if column else math.nan for column in kept]
    np.testing.assert_array_equal(_live_verdict._medians(values), right)

"""The gradient at each fork, split into what the branch and what the shortcut brings."""

from skipscope.flow.split._gradient_split import gradient_split as gradient_split
from skipscope.flow.split._gradient_split import split_of as split_of

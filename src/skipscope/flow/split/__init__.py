"""Split of the gradient at each fork into the parts from branch and shortcut."""

from skipscope.flow.split._gradient_split import gradient_split as gradient_split
from skipscope.flow.split._gradient_split import split_of as split_of

"""Training of twins side by side on the same batches, spread over processes."""

from skipscope.comparison.training._optimizers import RATES as RATES
from skipscope.comparison.training._processes import workers as workers
from skipscope.comparison.training._row_batches import can_be_cut as can_be_cut
from skipscope.comparison.training._threads import fitting_threads as fitting_threads
from skipscope.comparison.training._train import train_and_keep as train_and_keep
from skipscope.comparison.training._train import train_twins as train_twins
from skipscope.comparison.training._training_arguments import require_size as require_size
from skipscope.comparison.training._training_arguments import require_whole as require_whole
from skipscope.comparison.training._training_result import Curves as Curves
from skipscope.comparison.training._training_result import Training as Training
from skipscope.comparison.training._training_result import smoothed as smoothed

# The public names of skipscope, each once; read at run time too (lazily) and by type checkers.
from . import book as book
from . import nn as nn
from . import reference as reference
from . import testing as testing
from ._data import batches as batches
from ._data import objective as objective
from ._errors import SkipscopeError as SkipscopeError
from ._progress import progress as progress
from ._result import load as load
from .comparison import compare as compare
from .comparison import train_twins as train_twins
from .surfaces import landscape as landscape
from .surfaces import paired_landscapes as paired_landscapes
from .curvature import curvature_operator as curvature_operator
from .curvature import extreme_eigenvalues as extreme_eigenvalues

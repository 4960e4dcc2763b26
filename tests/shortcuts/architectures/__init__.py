"""Compact versions of the families in the literature, each with the shortcuts it is known to have.

``CASES`` maps a name to ``(make, inputs, kinds)``: a factory, inputs for the model, and how many shortcuts of each kind
it has. Widths are tiny; what matters is how the merges are written.
"""

from . import literature as literature
from . import sweep as sweep
from ._cases import CASES as CASES
from ._cases import features as features
from ._cases import images as images
from ._cases import seq as seq
from ._cases import sequences as sequences
from .convolutional import Basic as Basic
from .convolutional import DenseNet as DenseNet
from .convolutional import ResNet as ResNet
from .convolutional import UNet as UNet
from .convolutional import double as double
from .gates import COLUMNS as COLUMNS
from .gates import HIGHWAYS as HIGHWAYS
from .gates import ROWS as ROWS
from .gates import SCALED as SCALED
from .gates import WRITINGS as WRITINGS
from .gates import Highway as Highway
from .gates import ResidualMLP as ResidualMLP
from .gates import SharedLoop as SharedLoop
from .gates import on_parts as on_parts
from .lecture import Lecture as Lecture
from .transformers import Layer as Layer

"""Reference networks of known size, and real data that needs no download.

``digits`` and ``english`` return a batch ``(inputs, target)`` that every function of skipscope takes as data.
``networks()`` lists the networks by their names on the command line.

Example:
    >>> model = deep_mlp(depth=12, shortcut="identity")
    >>> inputs, target = digits(32)
    >>> model(inputs).shape
    torch.Size([32, 10])
"""

from skipscope.reference._catalogue import data_for as data_for
from skipscope.reference._catalogue import networks as networks
from skipscope.reference._digits import digits as digits
from skipscope.reference._english import English as English
from skipscope.reference._english import english as english
from skipscope.reference._english import english_text as english_text
from skipscope.reference._gpt import GPT as GPT
from skipscope.reference._gpt import gpt as gpt
from skipscope.reference._mlp import DeepMLP as DeepMLP
from skipscope.reference._mlp import deep_mlp as deep_mlp
from skipscope.reference._resnet import ResNet as ResNet
from skipscope.reference._resnet import resnet18 as resnet18
from skipscope.reference._resnet import resnet20 as resnet20
from skipscope.reference._resnet import resnet32 as resnet32
from skipscope.reference._resnet import resnet56 as resnet56
from skipscope.reference._resnet import resnet110 as resnet110

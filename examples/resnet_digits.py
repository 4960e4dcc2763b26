"""A ResNet-20 on the digits, as anyone would hand their own model over.

Run it, or name its functions on the command line:

    skipscope compare examples/resnet_digits.py:make_model --data examples/resnet_digits.py:make_data
"""

import torch.nn.functional as F

import skipscope as ss
from skipscope import reference


def make_model():
    """The CIFAR-style ResNet-20 for 8 x 8 images of one channel."""
    return reference.resnet20(in_channels=1)


def make_data():
    """512 digits as images, and their labels."""
    return reference.digits(512, image=True)


if __name__ == "__main__":
    model, data = make_model(), make_data()
    print(ss.find_shortcuts(model, data[0]))
    print(ss.gradient_flow(model, data, F.cross_entropy).verdict)

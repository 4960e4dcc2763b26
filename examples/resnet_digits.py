"""A ResNet-20 on the digits, as anyone would hand their own model over.

skipscope compare examples.resnet_digits:make_model --data examples.resnet_digits:make_data
"""

from skipscope import reference


def make_model():
    """The CIFAR-style ResNet-20 for 8 x 8 images of one channel."""
    return reference.resnet20(in_channels=1)


def make_data():
    """512 digits as images, and their labels."""
    return reference.digits(512, image=True)

"""What the reproductions on images share: the data, the networks, the papers' recipe of training, trained networks.

The digits are 8 x 8 pixels; with `--cifar FOLDER` the same scripts train on CIFAR-10, with the paper's augmentation
(each image shifted by up to 4 pixels and mirrored at random). A trained network is kept in `KEPT` under the hash of
its specification, so that scripts that need the same one train it once.
"""

import hashlib
import json
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipscope as ss
from reproductions._report import RESULTS, cifar10

KEPT = RESULTS / "units" / "networks"
SMALL, PAPER = [8, 16, 32], [16, 32, 64]  # channels of the three stages

# The papers' recipes: SGD with momentum; factors on the rate from these shares of the steps on.
LI = {"rate": 0.1, "decay": 5e-4, "nesterov": True, "schedule": [[0.5, 0.1], [0.75, 0.01], [11 / 12, 0.001]]}
HE = {"rate": 0.1, "decay": 1e-4, "nesterov": False, "schedule": [[0.5, 0.1], [0.75, 0.01]]}


def images(cifar: str | None, split: str) -> tuple[Tensor, Tensor]:
    """The digits, or CIFAR-10 normalised by its training images' mean and deviation; on the GPU, if there is one."""
    if cifar is None:
        return ss.reference.digits(split=split, image=True)
    train, target = cifar10(cifar)
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    inputs, target = (train, target) if split == "train" else cifar10(cifar, "test")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ((inputs - mean) / deviation).to(device), target.to(device)


def channels(cifar: str | None) -> int:
    """Colour channels of an image."""
    return 1 if cifar is None else 3


def resnet(depth: int, widths: list[int], cifar: str | None = None) -> nn.Module:
    """The residual network of He et al. 2015 for small images, ReLU after the sum, shortcuts without weights."""
    blocks = (depth - 2) // 6
    return ss.reference.ResNet(
        (blocks,) * 3, tuple(widths), classes=10, in_channels=channels(cifar), option="A"
    )


class PreResNet(nn.Module):
    """The same with pre-activation (He et al. 2016): x + conv(relu(bn(conv(relu(bn(x)))))), nothing after the sum."""

    def __init__(self, depth: int, widths: list[int], cifar: str | None = None):
        super().__init__()
        self.stem = nn.Conv2d(channels(cifar), widths[0], 3, 1, 1, bias=False)
        self.blocks = nn.Sequential()
        width = widths[0]
        for stage, out in enumerate(widths):
            for i in range((depth - 2) // 6):
                stride = 2 if stage and not i else 1
                branch = nn.Sequential(
                    nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1, bias=False),
                )  # fmt: skip
                self.blocks.append(ss.nn.PadShortcut(branch, width, out, stride=stride, dim=1))
                width = out
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, h, w]`` -> ``[n, 10]``."""
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def blank(cifar: str | None) -> Tensor:
    """Two empty images: what networks are traced with."""
    side = 8 if cifar is None else 32
    return torch.zeros(2, channels(cifar), side, side)


def plain(model: nn.Module, cifar: str | None = None) -> nn.Module:
    """The same network with all of its shortcuts removed, and the same weights."""
    return ss.ablate(model, inputs=blank(cifar))


def trained(make: Callable[[], nn.Module], spec: dict) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The network that ``make`` builds, trained as ``spec`` says, in evaluation mode; and its weights by epoch.

    Args:
        make: called after seeding.
        spec: "seed", "epochs", "batch", "rate", "decay", "nesterov", "schedule" (pairs of share and factor), "cifar";
            "trajectory": whether the weights before each epoch are kept; besides, whatever tells one network from another: the
            trained network is kept under this dict.
    """
    torch.manual_seed(spec["seed"])
    model = make()
    device = "cuda" if spec["cifar"] and torch.cuda.is_available() else "cpu"
    path = KEPT / f"{hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]}.pt"
    if path.exists():
        weights, trajectory = torch.load(path, map_location=device)
        model.to(device).load_state_dict(weights)
        return model.eval(), trajectory
    trajectory = train(model.to(device), spec)
    KEPT.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save((model.state_dict(), trajectory), temporary)
    os.replace(temporary, path)
    return model.eval(), trajectory


def train(model: nn.Module, spec: dict) -> list[dict[str, Tensor]]:
    """SGD with momentum 0.9 and the step schedule; returns the weights before each epoch, if they are asked for."""
    inputs, target = images(spec["cifar"], "train")
    if "samples" in spec:
        inputs, target = inputs[: spec["samples"]], target[: spec["samples"]]
    optimizer = torch.optim.SGD(
        model.parameters(), spec["rate"], momentum=0.9, weight_decay=spec["decay"], nesterov=spec["nesterov"]
    )
    order = torch.Generator().manual_seed(spec["seed"])
    steps = spec["epochs"] * (len(inputs) // spec["batch"])
    step, trajectory = 0, []
    model.train()
    for _ in range(spec["epochs"]):
        if spec.get("trajectory"):
            trajectory.append({name: p.detach().clone() for name, p in model.named_parameters()})
        shuffled = torch.randperm(len(inputs), generator=order)
        for rows in shuffled[: steps // spec["epochs"] * spec["batch"]].split(spec["batch"]):
            factor = next((f for share, f in reversed(spec["schedule"]) if step >= share * steps), 1.0)
            optimizer.param_groups[0]["lr"] = spec["rate"] * factor
            batch = inputs[rows] if spec["cifar"] is None else augmented(inputs[rows], order)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), target[rows]).backward()
            optimizer.step()
            step += 1
    return trajectory


def augmented(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Each image padded by 4 pixels, cropped at random to its size, and mirrored at random."""
    count, _, height, width = batch.shape
    rows, columns = (torch.randint(0, 9, (count, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width)) + columns
    down = torch.arange(height) + rows
    padded = F.pad(batch, (4, 4, 4, 4)).movedim(1, -1)
    picked = padded[torch.arange(count)[:, None, None], down[:, :, None], across[:, None, :]]
    return picked.movedim(-1, 1)


def accuracy(model: nn.Module, cifar: str | None) -> dict[str, float]:
    """Loss and error (percent) on the training and the test images, in evaluation mode."""
    found = {}
    for split in ("train", "test"):
        inputs, target = images(cifar, split)
        with torch.no_grad():
            output = torch.cat([model(part) for part in inputs.split(512)])
        found[f"{split}_loss"] = float(F.cross_entropy(output, target))
        found[f"{split}_error"] = 100 * float((output.argmax(1) != target).float().mean())
    return found


def test_error(model: nn.Module, cifar: str | None) -> float:
    """Percent of the test images whose class is not named."""
    inputs, target = images(cifar, "test")
    with torch.no_grad():
        output = torch.cat([model(part) for part in inputs.split(512)])
    return 100 * float((output.argmax(1) != target).float().mean())

"""The loss surfaces of a ResNet-56 with and without shortcuts: the pair that every page shows as precomputed.

Run it from the repository: ``python docs/make_resnet56.py`` (about 15 minutes on one core). It resumes where it was
stopped, and writes ``src/skipscope/report/resnet56_surfaces.npz``. The recipe is that of Li et al. 2018 (arXiv
1712.09913), on the embedded digits instead of CIFAR-10 and with fewer epochs.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference

EPOCHS, BATCH, RATE, MOMENTUM, DECAY, SEED = 60, 128, 0.1, 0.9, 5e-4, 0
GRID, SPAN, SAMPLES = 25, 0.5, 256
NAMES = {"with": "ResNet-56", "without": "ResNet-56 without shortcuts"}


def build(name: str) -> nn.Module:
    """One of the two networks, both from the same draw of weights."""
    torch.manual_seed(SEED)
    model = reference.resnet56()
    return model if name == "with" else ss.ablate(model, inputs=reference.digits(16)[0], how="remove")


def train(name: str, folder: Path) -> tuple[nn.Module, str]:
    """The trained network, in evaluation mode, and its losses and accuracy in words."""
    file, model = folder / f"{name}.pt", build(name)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    done = 0
    if file.exists():
        state = torch.load(file)
        done = state["done"]
        for part, saved in zip((model, optimizer, schedule), state["parts"], strict=True):
            part.load_state_dict(saved)
    inputs, target = reference.digits(split="train")
    for epoch in range(done, EPOCHS):
        model.train()
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[rows]), target[rows])
            loss.backward()
            optimizer.step()
        schedule.step()
        parts = [part.state_dict() for part in (model, optimizer, schedule)]
        torch.save({"done": epoch + 1, "parts": parts}, file)
        print(f"{name}: epoch {epoch + 1} of {EPOCHS}, loss {loss.item():.4f}", flush=True)
    model.eval()
    test_inputs, test_target = reference.digits(split="test")
    with torch.no_grad():
        final = float(F.cross_entropy(model(inputs), target))
        right = float((model(test_inputs).argmax(1) == test_target).float().mean())
    return model, f"{NAMES[name]}: training loss {final:.3g}, test accuracy {right:.1%}"


def main() -> None:
    """Train both, compute both surfaces, and save them."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "resnet56")
    folder.mkdir(exist_ok=True)
    trained = {name: train(name, folder) for name in NAMES}
    for _, words in trained.values():
        print(words, flush=True)
    pair = ss.paired_landscapes(
        {NAMES[name]: model for name, (model, _) in trained.items()},
        reference.digits(SAMPLES, split="train"), F.cross_entropy, grid=GRID, span=SPAN, seed=SEED, store=folder / "pair.zarr",
    )  # fmt: skip
    print(pair)
    pair.save(folder / "pair.json")
    write(pair, [words for _, words in trained.values()])


def write(pair: ss.PairedSurfaces, words: list[str]) -> None:
    """Keep what the page draws, and where it comes from: float32 is more than a picture shows."""
    first = next(iter(pair.surfaces.values()))
    source = (
        f"Trained {EPOCHS} epochs on the 1,437 training digits of 8 x 8 pixels: SGD, rate {RATE}, momentum {MOMENTUM}, decay {DECAY}, "
        f"batches of {BATCH}, cosine schedule, seed {SEED}. Surfaces: {GRID} x {GRID} points within {SPAN} of the weights' own "
        f"length, filter-normalised, on {SAMPLES} training digits, batch norm as trained. torch {torch.__version__}; docs/make_resnet56.py."
    )
    np.savez_compressed(
        Path(__file__).parents[1] / "src/skipscope/report/resnet56_surfaces.npz",
        values=np.stack([s.values for s in pair.surfaces.values()]).astype(np.float32), alphas=first.alphas, betas=first.betas,
        names=list(pair.surfaces), words=words, source=source,
    )  # fmt: skip


if __name__ == "__main__":
    with ss.progress():
        main()

"""Other libraries' training loops give the losses of `train_twins`, step for step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope._data import read
from skipscope.comparison.training._stream import Stream

STEPS, SIZE = 12, 16


def make():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(80, 8, generator=generator)
    return x, x[:, :3].argmax(1)


def batches(seed):
    """The batches of one seed, in the order in which `train_twins` draws them."""
    read_data, objective = read(make(), data(), F.cross_entropy, "test")
    stream = Stream(read_data, make(), objective, SIZE).batches(seed)
    return [next(stream) for _ in range(STEPS)]


def ours(optimizers, seed, **options):
    runs = ss.train_twins(
        {"net": make}, data(), F.cross_entropy, seeds=[seed], steps=STEPS, batch_size=SIZE, optimizers=optimizers, **options
    )  # fmt: skip
    return next(iter(runs.curves["net"].values())).losses[0]


@pytest.mark.heavy
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("seed", [0, 5])
def test_lightnings_trainer(seed, clip):
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = make(), []

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    torch.manual_seed(seed)
    net = Net()
    trainer = lightning.Trainer(
        max_steps=STEPS, max_epochs=1, accelerator="cpu", devices=1, logger=False, gradient_clip_val=clip,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, torch.utils.data.DataLoader(batches(seed), batch_size=None))
    assert len(net.losses) == STEPS
    np.testing.assert_allclose(ours({"SGD": [0.1]}, seed, clip_norm=clip), net.losses, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [0, 5])
def test_hugging_faces_trainer(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.losses = make(), []

        def forward(self, x, labels):
            logits = self.model(x)
            loss = F.cross_entropy(logits, labels)
            self.losses.append(loss.item())
            return {"loss": loss, "logits": logits}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                [{"x": x, "labels": y} for x, y in batches(seed)], batch_size=None
            )

    torch.manual_seed(seed)
    net = Net()
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=STEPS, use_cpu=True, report_to=[], save_strategy="no", max_grad_norm=0.2,
        disable_tqdm=True, learning_rate=0.01, weight_decay=0.01, lr_scheduler_type="linear", warmup_steps=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    linear = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    Trainer(net, settings, train_dataset=[0] * len(batches(seed)), optimizers=(optimizer, linear)).train()
    assert len(net.losses) == STEPS
    expected = ours({"AdamW": [0.01]}, seed, clip_norm=0.2, schedule=lambda step: 1 - step / STEPS)
    np.testing.assert_allclose(expected, net.losses, rtol=1e-5)

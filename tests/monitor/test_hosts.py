"""Loggers and trainers, each with the real package (``make test-all``); and what is said when one is missing."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skipscope as ss
from skipscope.monitor import watch

from ._loops import Spy, agrees, loss_of, network, spying

AdamSpy = spying(torch.optim.AdamW)


def train(model, optimizer, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


PROGRAM = """
import sys, torch
from skipscope.monitor import watch
m = torch.nn.Linear(1, 1)
o = torch.optim.SGD(m.parameters(), lr=0.1)
with watch(m, o, sinks=["terminal"]):
    pass
packages = ["tensorboard", "wandb", "lightning", "transformers", "accelerate"]
found = {*packages, "matplotlib"} & set(sys.modules)
print("imported:", found or "none")
for package in [*packages, "torch.utils.tensorboard"]:
    sys.modules[package] = None
for use in (
    "watch(m, o, sinks=['tensorboard:x'])", "watch(m, o, sinks=['wandb'])", "import skipscope.monitor.lightning",
    "import skipscope.monitor.transformers", "import skipscope.monitor.accelerate",
):
    try:
        exec(use)
    except ImportError as error:
        print(error)
"""


def test_no_logger_is_imported_unasked_and_a_missing_one_prints_the_command_that_installs_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "imported: none" in done.stdout
    for package in ("tensorboard", "wandb", "lightning", "transformers", "accelerate"):
        assert f"python -m pip install {package}" in done.stdout


@pytest.mark.heavy
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, sinks=[f"tensorboard:{tmp_path}"]) as monitor:
        train(model, optimizer)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    values = [event.value for event in log.Scalars("gradients/total_norm")]
    np.testing.assert_allclose(values, monitor.history.total_norm, rtol=1e-6)
    assert log.Scalars("gradient_rms/0.weight")[0].value == pytest.approx(monitor.history.rms[0, 0])
    assert "skipscope/verdict/text_summary" in log.Tags()["tensors"]


@pytest.mark.heavy
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = network()
    optimizer = Spy(model.parameters())
    with wandb.init(project="test", dir=tmp_path) as run:
        with watch(model, optimizer, sinks=["wandb"]):
            for i in range(4):
                train(model, optimizer, 1)
                run.log({"loss": 1.0}, step=i)
            assert run.step == 3
        state = run.summary["skipscope/state"]
    assert state == "healthy"
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    with watch(model, optimizer, sinks=["wandb"]):
        train(model, optimizer)
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2


class Regression(TensorDataset):
    def __init__(self, n=32):
        generator = torch.Generator().manual_seed(0)
        super().__init__(torch.randn(n, 6, generator=generator), torch.randn(n, 1, generator=generator))


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning(tmp_path, precision, accumulate):
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    from skipscope.monitor.lightning import WatchCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            self.spy = Spy(self.parameters())
            return self.spy

    module, callback = Module(), WatchCallback(folder=tmp_path / "run")
    trainer = Trainer(
        max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=0.05, precision=precision,
        callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Regression(), batch_size=8))
    agrees(callback.monitor.history, module.spy.received)
    assert np.isfinite(callback.monitor.history.norm_before_clip).all()
    assert callback.monitor.history.total_norm.max() <= 0.0501
    assert ss.load(tmp_path / "run").complete


@pytest.mark.heavy
def test_lightning_finds_the_callback_by_its_entry_point_only_when_asked(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }

    def found():
        return [c for c in Trainer(**quiet).callbacks if type(c).__module__.startswith("skipscope")]

    monkeypatch.delenv("SKIPSCOPE_WATCH", raising=False)
    assert not found()
    monkeypatch.setenv("SKIPSCOPE_WATCH", str(tmp_path / "run"))
    assert [type(c).__name__ for c in found()] == ["WatchCallback"]


@pytest.mark.heavy
@pytest.mark.parametrize("accumulate", [1, 3])
def test_transformers(tmp_path, accumulate):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from skipscope.monitor.transformers import WatchCallback

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            return {"loss": F.mse_loss(self.net(x), labels)}

    data = [{"x": x, "labels": y} for x, y in Regression()]
    model, callback = Net(), WatchCallback()
    spy = AdamSpy(model.parameters(), lr=1e-3)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
        max_grad_norm=0.05, max_steps=4, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback], optimizers=(spy, None))
    trainer.train()
    agrees(callback.monitor.history, spy.received)
    assert np.isfinite(callback.monitor.history.norm_before_clip).all()


@pytest.mark.heavy
def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    from skipscope.monitor.accelerate import AccelerateLog, WatchTracker

    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, log_with=[WatchTracker(folder=tmp_path / "run")]
    )
    model = network()
    optimizer = Spy(model.parameters())
    model, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(Regression(), batch_size=4))
    accelerator.init_trackers("test", config={"lr": 0.05})
    tracker = accelerator.get_tracker("skipscope")
    tracker.options["sinks"] = [AccelerateLog(accelerator)]
    monitor = tracker.watch(model, prepared)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            prepared.step()
            prepared.zero_grad()
    accelerator.end_training()
    agrees(monitor.history, optimizer.received)
    assert len(monitor.history) == 4
    assert np.isfinite(monitor.history.norm_before_clip).all()
    assert ss.load(tmp_path / "run").complete
    assert any("gradients/total_norm" in values for _, values in tracker.logged)

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

from ._loops import Spy, agrees, loss_of, network, oracle, spying

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
packages = ["tensorboard", "wandb", "lightning", "transformers", "accelerate", "mlflow", "trackio"]
found = {*packages, "matplotlib"} & set(sys.modules)
print("imported:", found or "none")
for package in [*packages, "torch.utils.tensorboard"]:
    sys.modules[package] = None
for use in (
    "watch(m, o, sinks=['tensorboard:x'])", "watch(m, o, sinks=['wandb'])", "watch(m, o, sinks=['mlflow'])",
    "watch(m, o, sinks=['trackio'])", "import skipscope.monitor.lightning",
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


class Regressor(nn.Module):
    """As Hugging Face's Trainer calls a model."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        return {"loss": F.mse_loss(self.net(x), labels)}


@pytest.mark.heavy
def test_lightning_logs_resumes_and_begins_runs_of_its_own(tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    from skipscope.monitor.lightning import WatchCallback

    class Module(LightningModule):
        def __init__(self, fails=False):
            super().__init__()
            self.net, self.fails = network(), fails

        def training_step(self, batch, index):
            if self.fails and index == 2:
                raise ZeroDivisionError
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    def fit(epochs, module, checkpoint=None, **options):
        callback = WatchCallback(**options)
        trainer = Trainer(
            max_epochs=epochs, callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Regression(), batch_size=8), ckpt_path=checkpoint)
        return trainer, callback.monitor

    trainer, monitor = fit(2, Module(), folder=tmp_path / "run", flow_every=2)
    assert float(trainer.callback_metrics["gradients/total_norm"]) == pytest.approx(
        monitor.history.total_norm[-1], rel=1e-6
    )
    assert list(monitor.history.flow_steps) == [
        3,
        5,
        7,
    ]  # the forward is never called: read in the part that is
    assert any("read in net" in note for note in monitor.history.notes)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(3, Module(), tmp_path / "half.ckpt", folder=tmp_path / "run")
    np.testing.assert_array_equal(ss.load(tmp_path / "run").steps, range(1, 13))
    fit(1, Module(), folder=tmp_path / "run")
    np.testing.assert_array_equal(ss.load(tmp_path / "run" / "2").steps, range(1, 5))
    with pytest.raises(ZeroDivisionError):
        fit(1, Module(fails=True), flow_every=1)
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.heavy
def test_transformers_logs_resumes_and_begins_runs_of_its_own(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from skipscope.monitor.transformers import WatchCallback

    data = [{"x": x, "labels": y} for x, y in Regression()]

    def train(steps, resume=False):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=steps, report_to=[], use_cpu=True,
            save_strategy="steps", save_steps=4, disable_tqdm=True, logging_steps=2,
        )  # fmt: skip
        with WatchCallback(folder=tmp_path / "run", flow_every=2) as callback:
            trainer = Trainer(Regressor(), arguments, train_dataset=data, callbacks=[callback])
            trainer.train(resume_from_checkpoint=resume)
        return trainer, callback.monitor

    trainer, monitor = train(4)
    logged = [entry["gradients/total_norm"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(logged, monitor.history.total_norm[1::2], rtol=1e-6)
    assert list(monitor.history.flow_steps) == [1, 3]
    train(7, resume=True)
    np.testing.assert_array_equal(ss.load(tmp_path / "run").steps, range(1, 8))
    train(3)
    np.testing.assert_array_equal(ss.load(tmp_path / "run" / "2").steps, range(1, 4))


@pytest.mark.heavy
def test_the_layer_wise_optimizers_of_transformers():
    pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    model = network()
    each = {p: AdamSpy([p], lr=1e-3) for p in model.parameters()}

    def step(p):
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    optimizer = LayerWiseDummyOptimizer(optimizer_dict=each)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
    assert monitor.history.steps.tolist() == [s for s in (1, 2, 3) for _ in each]
    assert list(monitor.history.flow_steps) == [1, 2, 3] and monitor.verdict.state == "healthy"


@pytest.mark.heavy
def test_the_pair_that_fabric_sets_up():
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    inner = network()
    spy = Spy(inner.parameters())
    model, optimizer = fabric.setup(inner, spy)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            fabric.backward(model(torch.randn(8, 6)).float().square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.01)
            optimizer.step()
    agrees(monitor.history, spy.received)
    assert np.isfinite(monitor.history.norm_before_clip).all() and len(monitor.history.flow) == 3


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["lamb", "lion", "muon", "lookahead_adamw", "lookahead_sgd"])
def test_optimizers_of_timm(name):
    optim = pytest.importorskip("timm.optim")
    model = network()
    optimizer = optim.create_optimizer_v2(model, opt=name, lr=1e-3)
    with watch(model, optimizer, flow_every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            expected = oracle(model.parameters())[0]
            optimizer.step()
            np.testing.assert_allclose(monitor.history.norm[-1], expected, rtol=1e-6)
    assert len(monitor.history.flow) == 3 and set(monitor.history.kinds) <= {"SGD", "Adam"}


@pytest.mark.heavy
def test_schedule_free_optimizers():
    free = pytest.importorskip("schedulefree")
    for make in (free.AdamWScheduleFree, free.SGDScheduleFree, lambda p: free.ScheduleFreeWrapper(Spy(p))):
        model = network()
        optimizer = make(model.parameters())
        optimizer.train()
        with watch(model, optimizer, flow_every=1) as monitor:
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model).backward()
                expected = oracle(model.parameters())[0]
                optimizer.step()
                np.testing.assert_allclose(monitor.history.norm[-1], expected, rtol=1e-6)
        assert len(monitor.history.flow) == 3 and monitor.verdict.state == "healthy"


@pytest.mark.heavy
def test_stable_baselines3():
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("gymnasium")
    from stable_baselines3 import DQN, PPO, SAC

    ppo = PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32)
    with watch(ppo.policy, ppo.policy.optimizer, flow_every=1) as monitor:
        ppo.learn(64)
    assert len(monitor.history) == 20 and np.isfinite(monitor.history.total_before_clip).all()
    assert any("never calls the model's forward" in note for note in monitor.history.notes)
    sac = SAC("MlpPolicy", "Pendulum-v1", learning_starts=20)
    pair = {"actor": sac.actor, "critic": sac.critic}, [sac.actor.optimizer, sac.critic.optimizer]
    with watch(*pair) as monitor:
        sac.learn(40)
    assert [v.chain for v in monitor.verdict.chains] == ["actor", "critic"]
    dqn = DQN("MlpPolicy", "CartPole-v1", learning_starts=20)
    with watch(dqn.policy, dqn.policy.optimizer, flow_every=1) as monitor:
        dqn.learn(64)
    assert len(monitor.history.flow) and any("read in q_net" in note for note in monitor.history.notes)


@pytest.mark.heavy
def test_low_rank_updates_of_peft_are_never_called_dead():
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4
    }  # fmt: skip
    model = peft.get_peft_model(
        hf.LlamaForCausalLM(hf.LlamaConfig(**size)),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    ids, heard = torch.randint(0, 64, (4, 16)), []
    with watch(model, optimizer, flow_every=1, on_verdict=heard.append) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert {event.verdict.state for event in heard} == {"healthy"} and len(monitor.history.flow) == 4


@pytest.mark.heavy
def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file:{tmp_path}/runs")
    experiment = mlflow.set_experiment("test").experiment_id
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, sinks=["mlflow"]) as monitor:
        train(model, optimizer)
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment])
    found = client.get_metric_history(run.info.run_id, "gradients/total_norm")
    np.testing.assert_allclose([metric.value for metric in found], monitor.history.total_norm, rtol=1e-6)
    assert run.data.tags["skipscope/state"] == "healthy"


@pytest.mark.heavy
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, sinks=["trackio"]) as monitor:
        train(model, optimizer)
    agrees(monitor.history, optimizer.received)

"""A training that is resumed goes on in its folder at its own step; a second one begins a run of its own."""

import numpy as np
import pytest

import skipscope as ss
from skipscope.monitor import watch
from skipscope.monitor._trainer_runs import options_of_run

from ._loops import Spy, loss_of, network


def train(model, optimizer, n):
    for _ in range(n):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def test_a_resumed_run_goes_on_where_the_folder_ends(tmp_path):
    model = network()
    optimizer = Spy(model.parameters())
    for _ in range(3):
        with watch(model, optimizer, folder=tmp_path / "run", resume=True, flow_every=2) as monitor:
            train(model, optimizer, 4)
    history = ss.load(tmp_path / "run")
    np.testing.assert_array_equal(history.steps, range(1, 13))
    np.testing.assert_allclose(history.norm, np.array(optimizer.received)[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(history.flow_steps, [1, 3, 5, 7, 9, 11])
    assert (np.diff(history.seconds) > 0).all()
    assert history.complete and history.verdict == monitor.verdict
    np.testing.assert_array_equal(monitor.history.steps, range(9, 13))


def test_steps_after_the_checkpoint_are_made_again_and_the_old_ones_are_left_out(tmp_path):
    model = network()
    optimizer = Spy(model.parameters())
    watch_ = watch(model, optimizer, folder=tmp_path / "run")
    train(model, optimizer, 10)  # killed here: nobody closes it
    assert not ss.load(tmp_path / "run").complete
    del watch_
    with watch(model, optimizer, folder=tmp_path / "run", resume=True, first_step=6):
        train(model, optimizer, 5)
    history = ss.load(tmp_path / "run")
    np.testing.assert_array_equal(history.steps, range(1, 12))
    right = [*optimizer.received[:6], *optimizer.received[10:]]
    np.testing.assert_allclose(history.norm, np.array(right)[:, 0], rtol=1e-6)


def test_a_folder_that_holds_a_history_is_refused_with_the_cure(tmp_path):
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer, folder=tmp_path / "run"):
        pass
    with pytest.raises(ss.SkipscopeError, match="already holds") as refusal:
        watch(model, optimizer, folder=tmp_path / "run")
    assert "resume=True" in refusal.value.cure
    with pytest.raises(ss.SkipscopeError, match="first_step"):
        watch(model, optimizer, first_step=-1)
    assert not optimizer._optimizer_step_pre_hooks


def test_what_a_trainers_callback_does_with_its_folder(tmp_path):
    folder = tmp_path / "run"
    model = network()
    optimizer = Spy(model.parameters())

    def run(step, **options):
        chosen = options_of_run({"folder": folder, **options}, step)
        with watch(model, optimizer, **chosen):
            train(model, optimizer, 2)
        return chosen["folder"].relative_to(tmp_path).as_posix(), chosen["resume"]

    assert run(0) == ("run", False)
    assert run(2) == ("run", True)  # the trainer resumed
    assert run(0) == ("run/2", False)  # a training from the start
    assert run(0, resume=True) == ("run/2", True)
    assert run(4, resume=False) == ("run/3", False)
    np.testing.assert_array_equal(ss.load(folder).steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(ss.load(folder / "3").steps, [5, 6])
    assert options_of_run({"every": 3}, 7) == {"every": 3, "first_step": 7}

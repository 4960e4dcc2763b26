"""Awkward training loops, each with its right answer: what the optimizer received, step by step."""

import contextlib
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import skipscope as ss
from skipscope.monitor import STATES, watch

from ._loops import Spy, agrees, loss_of, network, oracle, spying


def train(model, optimizer, steps=4, before_step=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        before_step()
        optimizer.step()


# --- accumulation ---


def test_accumulation_with_an_uneven_tail_records_sums_at_steps_only():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        for micro in (4, 4, 3, 1):
            for _ in range(micro):
                (loss_of(model) / micro).backward()
            optimizer.step()
            optimizer.zero_grad()
    agrees(monitor.history, optimizer.received)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("place", ["before forward", "between", "after step", "never", "twice"])
def test_zero_grad_in_odd_places(place, to_none):
    model = network()
    optimizer = Spy(model.parameters(), lr=0.01)
    with watch(model, optimizer) as monitor:
        for _ in range(4):
            if place in {"before forward", "twice"}:
                optimizer.zero_grad(set_to_none=to_none)
            loss = loss_of(model)
            if place in {"between", "twice"}:
                model.zero_grad(set_to_none=to_none)
            loss.backward()
            optimizer.step()
            if place == "after step":
                optimizer.zero_grad(set_to_none=to_none)
    agrees(monitor.history, optimizer.received)


def test_a_step_without_gradients_is_recorded_as_such():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as monitor:
        optimizer.step()
    assert {STATES[int(code)] for code in monitor.history.states.flat} == {"not_connected"}
    assert monitor.verdict.state == "unconnected"


# --- clipping ---


@pytest.mark.parametrize("most", [0.01, 1e6])
def test_before_and_after_clip_grad_norm(most):
    model = network()
    optimizer = Spy(model.parameters())
    before = []

    def clip():
        before.append((oracle(model.parameters()), float(clip_grad_norm_(model.parameters(), most))))

    with watch(model, optimizer) as monitor:
        train(model, optimizer, before_step=clip)
    agrees(monitor.history, optimizer.received)
    np.testing.assert_allclose(monitor.history.norm_before_clip, [b[0][0] for b in before], rtol=2e-6)
    np.testing.assert_allclose(monitor.history.total_before_clip, [b[1] for b in before], rtol=1e-6)


def test_clipping_by_group_and_of_one_group_only():
    model = network()
    first, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizer = Spy([{"params": first}, {"params": rest}])
    before = []

    def clip():
        before.append(oracle(model.parameters()))
        clip_grad_norm_(first, 1e-3)
        if len(before) % 2:
            clip_grad_norm_(rest, 1e-2)

    with watch(model, optimizer) as monitor:
        train(model, optimizer, before_step=clip)
    history = monitor.history
    agrees(history, optimizer.received)
    assert history.groups == (0,) * 2 + (1,) * 6
    np.testing.assert_allclose(history.norm_before_clip[:, :2], [b[0][:2] for b in before], rtol=2e-6)
    np.testing.assert_allclose(history.norm_before_clip[::2, 2:], [b[0][2:] for b in before[::2]], rtol=2e-6)
    assert np.isnan(history.norm_before_clip[1::2, 2:]).all()


def test_before_is_unknown_where_it_cannot_be_known():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        train(model, optimizer, 1)
        train(model, optimizer, 1, lambda: clip_grad_value_(model.parameters(), 1e-3))
        train(model, optimizer, 1, lambda: [p.grad.mul_(0.5) for p in model.parameters()])

        def clip_and_change():
            clip_grad_norm_(model.parameters(), 1e-3)
            for p in model.parameters():
                p.grad.mul_(0.5)

        train(model, optimizer, 1, clip_and_change)
    agrees(monitor.history, optimizer.received)
    assert np.isnan(monitor.history.norm_before_clip).all()
    assert np.isnan(monitor.history.total_before_clip).all()


def test_a_clipped_gradient_that_was_thrown_away_is_not_spoken_of():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        loss_of(model).backward()
        clip_grad_norm_(model.parameters(), 1e-3)
        train(model, optimizer, 1)
    agrees(monitor.history, optimizer.received)
    assert np.isnan(monitor.history.norm_before_clip).all()


def test_clipping_another_model_is_not_ours():
    model, other = network(), network(seed=1)
    optimizer = Spy(model.parameters())
    loss_of(other).backward()
    with watch(model, optimizer) as monitor:
        train(model, optimizer, 2, lambda: clip_grad_norm_(other.parameters(), 1e-3))
    assert np.isnan(monitor.history.norm_before_clip).all()


# --- mixed precision ---


@pytest.mark.parametrize("unscaled_by_user", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused, unscaled_by_user):
    """The same run without a scaler is the oracle: nothing of the scale may be left in the numbers."""
    scaled, bare = network(), network()
    plain = spying(torch.optim.Adam)(bare.parameters(), lr=1e-3)
    optimizer = torch.optim.Adam(scaled.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batches = [torch.randn(8, 6) for _ in range(4)]
    with watch(scaled, optimizer) as monitor:
        for batch in batches:
            optimizer.zero_grad()
            scaler.scale(loss_of(scaled, batch)).backward()
            if unscaled_by_user:
                scaler.unscale_(optimizer)
                clip_grad_norm_(scaled.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
    for batch in batches:
        plain.zero_grad()
        loss_of(bare, batch).backward()
        if unscaled_by_user:
            clip_grad_norm_(bare.parameters(), 0.05)
        plain.step()
    agrees(monitor.history, plain.received, 2e-5)  # Adam amplifies the rounding of the scale
    np.testing.assert_array_equal(monitor.history.loss_scale, [1024.0] * 4)
    assert not monitor.history.skipped.any()
    assert np.isfinite(monitor.history.norm_before_clip).all() == unscaled_by_user


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_said_to_be_skipped_and_change_no_verdict(fused):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with watch(model, optimizer) as monitor:
        for i in range(5):
            optimizer.zero_grad()
            batch = torch.full((8, 6), math.inf) if i in {1, 2} else torch.randn(8, 6)
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
    history = monitor.history
    np.testing.assert_array_equal(history.skipped, [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(history.steps, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(history.loss_scale, [1024, 1024, 512, 256, 256])
    assert np.isfinite(history.norm[[0, 3, 4]]).all()
    assert not np.isfinite(history.norm[[1, 2]]).all()
    assert [event.verdict.state for event in monitor.history.events] == ["healthy"]


def test_a_disabled_scaler_is_no_scaler():
    model = network()
    optimizer = Spy(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)
            scaler.update()
    agrees(monitor.history, optimizer.received)
    assert np.isnan(monitor.history.loss_scale).all()


def test_autocast():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model)
            loss.backward()
            optimizer.step()
    agrees(monitor.history, optimizer.received)


# --- closures ---


def test_lbfgs_records_the_gradient_at_the_point_where_each_step_begins():
    model = network(torch.float64)
    optimizer = spying(torch.optim.LBFGS)(model.parameters(), lr=0.1, max_iter=5)
    batch = torch.randn(8, 6, dtype=torch.float64)
    calls = [0]

    def closure():
        calls[0] += 1
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    with watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.step(closure)
    agrees(monitor.history, optimizer.received, 1e-12)
    assert monitor.history.evaluations.sum() == calls[0] > 3


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_of_sgd(keyword):
    model = network()
    optimizer = Spy(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with watch(model, optimizer) as monitor:
        for _ in range(3):
            result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert result.requires_grad
    agrees(monitor.history, optimizer.received)
    np.testing.assert_array_equal(monitor.history.evaluations, [1, 1, 1])


def test_a_closure_that_raises_leaves_no_row():
    model = network()
    optimizer = Spy(model.parameters())

    def closure():
        raise ZeroDivisionError

    with watch(model, optimizer) as monitor:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
        train(model, optimizer, 2)
    agrees(monitor.history, optimizer.received)
    np.testing.assert_array_equal(monitor.history.steps, [2, 3])


def test_sharpness_aware_two_passes_and_one_step():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            with torch.no_grad():
                moved = [0.01 * p.grad for p in model.parameters()]
                for p, m in zip(model.parameters(), moved):
                    p.add_(m)
            optimizer.zero_grad()
            loss_of(model).backward()
            with torch.no_grad():
                for p, m in zip(model.parameters(), moved):
                    p.sub_(m)
            optimizer.step()
    agrees(monitor.history, optimizer.received)


# --- optimizers, groups, parameters ---


def test_two_optimizers_that_take_turns():
    model = network()
    first = Spy(list(model.parameters())[:4])
    second = Spy(list(model.parameters())[4:], lr=0.01)
    with watch(model, [first, second]) as monitor:
        for i in range(5):
            model.zero_grad()
            loss_of(model).backward()
            (second if i % 2 else first).step()
    history = monitor.history
    assert history.owners == (0,) * 4 + (1,) * 4
    np.testing.assert_array_equal(history.optimizers, [0, 1, 0, 1, 0])
    for k, optimizer in enumerate((first, second)):
        own, columns = history.optimizers == k, [i for i, owner in enumerate(history.owners) if owner == k]
        np.testing.assert_allclose(
            history.norm[own][:, columns], np.array(optimizer.received)[:, 0], rtol=1e-6
        )
    assert {STATES[int(code)] for code in history.states[0, 4:]} == {"absent"}


def test_two_models_and_one_optimizer():
    encoder, decoder = network(), network(seed=1)
    optimizer = Spy([*encoder.parameters(), *decoder.parameters()])
    with watch({"encoder": encoder, "decoder": decoder}, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            (loss_of(encoder) + loss_of(decoder)).backward()
            optimizer.step()
    agrees(monitor.history, optimizer.received)
    assert monitor.history.parameters[0] == "encoder.0.weight"
    assert monitor.history.parameters[-1] == "decoder.6.bias"


def test_one_model_of_two_leaves_the_other_nameless():
    encoder, decoder = network(), network(seed=1)
    optimizer = Spy([*encoder.parameters(), *decoder.parameters()])
    with watch(encoder, optimizer) as monitor:
        optimizer.zero_grad()
        (loss_of(encoder) + loss_of(decoder)).backward()
        optimizer.step()
    agrees(monitor.history, optimizer.received)
    assert monitor.history.parameters[8] == "optimizer0.group0.8"
    assert any("belong to none of the watched models" in note for note in monitor.history.notes)


def test_an_optimizer_made_before_to():
    model = network()
    optimizer = Spy(model.parameters())
    model.to(torch.float64)
    with watch(model, optimizer) as monitor:
        train(model, optimizer)
    agrees(monitor.history, optimizer.received, 1e-12)


def test_an_optimizer_whose_parameters_were_replaced_is_refused():
    model = network()
    optimizer = Spy(model.parameters())
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(2)))
    with pytest.raises(ss.SkipscopeError, match="none of the model's parameters"):
        watch(model, optimizer)


def test_a_module_added_later():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        train(model, optimizer, 2)
        model.append(nn.Linear(1, 1))
        optimizer.add_param_group({"params": model[-1].parameters(), "lr": 0.01})
        train(model, optimizer, 3)
    history = monitor.history
    assert history.parameters[-2:] == ("7.weight", "7.bias")
    assert history.groups[-2:] == (1, 1)
    assert [STATES[int(code)] for code in history.states[:, -1]] == ["absent"] * 2 + ["ok"] * 3
    np.testing.assert_allclose(history.norm[2:], [r[0] for r in optimizer.received[2:]], rtol=1e-6)
    np.testing.assert_allclose(history.norm[:2, :-2], [r[0] for r in optimizer.received[:2]], rtol=1e-6)


def test_freezing_and_thawing_as_in_lora():
    model = network()
    for layer in model[:4]:
        layer.requires_grad_(False)
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        train(model, optimizer, 2)
        model.requires_grad_(True)
        train(model, optimizer, 2)
    agrees(monitor.history, optimizer.received)
    first = [[STATES[int(code)] for code in row] for row in monitor.history.states]
    assert first[0] == ["frozen"] * 4 + ["ok"] * 4
    assert first[3] == ["ok"] * 8
    assert monitor.verdict.state == "healthy"


def test_shared_weights_have_one_column():
    model = network()
    model[2].weight = model[0].weight
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        train(model, optimizer)
    agrees(monitor.history, optimizer.received)
    assert monitor.history.parameters.count("0.weight") == 1


def test_sparse_gradients():
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 1, 3])).square().sum().backward()
            optimizer.step()
    agrees(monitor.history, optimizer.received)


def test_channels_last_and_strided_gradients():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        for strided in (False, True):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().mean().backward()
            if strided:
                model.weight.grad = torch.randn(16, 3, 3, 3)[::2]
            optimizer.step()
    agrees(monitor.history, optimizer.received)


def test_an_empty_parameter_and_a_large_one():
    model = nn.ParameterDict(
        {"empty": nn.Parameter(torch.zeros(0, 3)), "large": nn.Parameter(torch.zeros(300, 999))}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model["empty"].grad = torch.zeros(0, 3)
    model["large"].grad = torch.randn(300, 999)
    with watch(model, optimizer) as monitor:
        optimizer.step()
    expected = model["large"].grad.double()
    np.testing.assert_allclose(monitor.history.norm[0, 1], float(expected.norm()), rtol=1e-6)
    np.testing.assert_allclose(monitor.history.mean_abs[0, 1], float(expected.abs().mean()), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_numbers_that_float32_squares_cannot_hold(size):
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.weight.grad = torch.full((4, 4), size)
    with watch(model, optimizer) as monitor:
        optimizer.step()
    exact = float(torch.tensor(size).double())
    np.testing.assert_allclose(monitor.history.norm, [[4 * exact]], rtol=1e-6)
    assert STATES[int(monitor.history.states[0, 0])] == ("underflow" if size < 1e-38 else "ok")


def test_a_scheduler_that_wraps_the_step():
    model = network()
    optimizer = Spy(model.parameters())
    with watch(model, optimizer) as monitor:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(3):
            train(model, optimizer, 1)
            schedule.step()
    agrees(monitor.history, optimizer.received)


def test_a_later_watch_of_the_same_optimizer_takes_over():
    """As when a notebook cell is run twice."""
    model = network()
    optimizer = Spy(model.parameters())
    first = watch(model, optimizer, flow_every=1)
    train(model, optimizer, 2)
    second = watch(model, optimizer, every=2, flow_every=1)
    train(model, optimizer, 3, lambda: clip_grad_norm_(model.parameters(), 1e-3))
    second.close()
    train(model, optimizer, 1)
    agrees(first.history, optimizer.received[:2])
    agrees(second.history, optimizer.received[2:5:2])
    assert np.isfinite(second.history.norm_before_clip).all()
    assert any("took over" in note for note in first.history.notes) and not second.history.notes
    assert list(first.history.flow_steps) == [1, 2] and list(second.history.flow_steps) == [1, 2, 3]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_monitors_of_two_optimizers_stand_side_by_side():
    one, two = network(), network(seed=1)
    first, second = Spy(one.parameters()), Spy(two.parameters())
    with watch(one, first, flow_every=1) as a, watch(two, second, flow_every=1) as b:
        train(one, first, 3)
        train(two, second, 2)
    agrees(a.history, first.received)
    agrees(b.history, second.received)
    assert len(a.history.flow_steps) == 3 and len(b.history.flow_steps) == 2


# --- torch.compile ---


@pytest.mark.parametrize("order", ["watch first", "compile first", "in place"])
def test_compile_adds_no_graph_break(order):
    from torch._dynamo.testing import CompileCounter

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            return self.layers(x)

    torch._dynamo.reset()
    model = Net()
    optimizer = Spy(model.parameters())
    counter = CompileCounter()
    run = model
    with contextlib.ExitStack() as stack:
        if order == "watch first":
            monitor = stack.enter_context(watch(model, optimizer))
        if order == "in place":
            model.compile(backend=counter, fullgraph=True)
        else:
            run = torch.compile(model, backend=counter, fullgraph=True)
        if order != "watch first":
            monitor = stack.enter_context(watch(run, optimizer))
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(run).backward()
            optimizer.step()
    assert counter.frame_count == 1
    agrees(monitor.history, optimizer.received)
    assert monitor.history.parameters[0] == "layers.0.weight"


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_optimizer_step(compiled_first):
    torch._dynamo.reset()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    received = []

    def run(step, n):
        for _ in range(n):
            optimizer.zero_grad()
            loss_of(model).backward()
            received.append(oracle(model.parameters()))
            step()

    if compiled_first:
        step = torch.compile(optimizer.step, backend="eager")
        run(step, 1)
        received.clear()
    with watch(model, optimizer) as monitor:
        if not compiled_first:
            step = torch.compile(optimizer.step, backend="eager")
        run(step, 3)
    agrees(monitor.history, received)


# --- lifetime ---


def test_nothing_is_kept_alive():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer)
    batch = torch.randn(8, 6, requires_grad=True)
    saved = batch * 1.0  # the graph holds it, and nothing else will
    loss = loss_of(model, saved)
    graph = weakref.ref(saved)
    del saved
    loss.backward(retain_graph=True)
    assert graph() is not None
    clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    grad = weakref.ref(model[0].weight.grad)
    del loss
    optimizer.zero_grad()
    gc.collect()
    assert graph() is None
    assert grad() is None
    monitor.close()
    watched = weakref.ref(model)
    del model, optimizer, monitor
    gc.collect()
    assert watched() is None


def test_a_monitor_that_is_forgotten_goes_with_its_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forgotten = weakref.ref(watch(model, optimizer))
    train(model, optimizer, 2)
    del model, optimizer
    gc.collect()
    assert forgotten() is None


def test_a_thousand_steps_without_growth():
    import tracemalloc

    model = network(depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watch(model, optimizer, keep=100):
        train(model, optimizer, 300)
        tracemalloc.start()  # counts what Python and NumPy hold; the process's peak would miss what fits below it
        try:
            train(model, optimizer, 100)
            gc.collect()
            alive, before = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
            train(model, optimizer, 1000)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before < 8 * 1000  # bytes; a number is 24
            assert abs(len(gc.get_objects()) - alive) < 500
        finally:
            tracemalloc.stop()


def test_training_is_bit_for_bit_what_it_is_without():
    results = []
    for watched in (False, True):
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        with watch(model, optimizer) if watched else contextlib.nullcontext():
            train(model, optimizer, 5, lambda: clip_grad_norm_(model.parameters(), 0.1))
        results.append([p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results))

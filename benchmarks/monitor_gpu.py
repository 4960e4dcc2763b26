"""The monitor on a GPU: right values, no synchronisation, and what every step costs. Stand-alone.

    PYTHONPATH=src OUT=. python benchmarks/monitor_gpu.py

Prints one JSON object and writes it to ``$OUT/monitor_gpu.json``. Each check that fails says so in ``failures``.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope.flow import gradient_flow
from skipscope.monitor import STATES


def sizes() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int]]:
    """Name: (model, batch x tokens, vocabulary)."""
    return {
        "GPT 10 M, 4 x 64": (lambda: reference.gpt(12, 256, 8, vocab=1024, context=64), (4, 64), 1024),
        "GPT 10 M, 64 x 64": (lambda: reference.gpt(12, 256, 8, vocab=1024, context=64), (64, 64), 1024),
        "GPT-2 124 M, 16 x 512": (
            lambda: reference.gpt(12, 768, 12, vocab=50257, context=512),
            (16, 512),
            50257,
        ),
    }


class Training:
    """A model, an optimizer, one batch on the GPU, and one step."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        shape: tuple[int, int],
        vocab: int,
        dtype=torch.float32,
        **options,
    ):
        torch.manual_seed(0)
        self.model = make().cuda().to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **options)
        self.inputs, self.target = (torch.randint(0, vocab, shape, device="cuda") for _ in range(2))
        self.scaler: torch.amp.GradScaler | None = None

    def step(self, clip: float | None = None) -> None:
        """Forward, backward, update; everything is only launched."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.inputs).float(), self.target)
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


def exact(model: nn.Module, scale: float = 1.0) -> np.ndarray:
    """[2, P] in float64: L2 norm and mean |g| of each gradient as it lies in memory."""
    grads = [p.grad.detach().double() / scale for p in model.parameters() if p.grad is not None]
    return np.array([[float(g.norm()) for g in grads], [float(g.abs().mean()) for g in grads]])


def small(**options) -> Training:
    return Training(lambda: reference.gpt(4, 64, 4, context=64), (4, 64), 256, **options)


def check_values() -> dict[str, float]:
    """The greatest relative error over all parameters and steps, by case."""
    errors: dict[str, float] = {}
    cases = {
        "float32, foreach": small(foreach=True), "float32, fused": small(fused=True),
        "bfloat16": small(dtype=torch.bfloat16), "GradScaler, fused": small(fused=True),
        "GradScaler, foreach": small(foreach=True),
    }  # fmt: skip
    for name, run in cases.items():
        scaled = name.startswith("GradScaler")
        if scaled:
            run.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        still = 1024.0 if scaled and "fused" in name else 1.0  # a fused optimizer unscales in its own kernel
        rows = []
        hook = run.optimizer.register_step_pre_hook(
            lambda *_, run=run, still=still, rows=rows: rows.append(exact(run.model, still))
        )
        with ss.watch(run.model, run.optimizer) as monitor:
            for _ in range(4):
                run.step()
        hook.remove()
        history = monitor.history
        right = np.array(rows)
        found = np.stack([history.norm, history.mean_abs], axis=1)
        errors[name] = float(np.max(np.abs(found - right) / np.maximum(np.abs(right), 1e-30)))
        if scaled:
            assert (history.loss_scale == 1024.0).all(), history.loss_scale
    return errors


def check_clipping() -> float:
    """The greatest relative error of the norm before clipping."""
    run = small(foreach=True)
    before: list[np.ndarray] = []
    inner = torch.nn.utils.clip_grad._get_total_norm

    def noting(*args, **kwargs):
        before.append(exact(run.model)[0])
        return inner(*args, **kwargs)

    torch.nn.utils.clip_grad._get_total_norm = noting
    try:
        with ss.watch(run.model, run.optimizer) as monitor:
            for _ in range(3):
                run.step(clip=1e-3)
    finally:
        torch.nn.utils.clip_grad._get_total_norm = inner
    return float(np.max(np.abs(monitor.history.norm_before_clip / np.array(before) - 1)))


def check_underflow() -> dict[str, str]:
    """What is said of gradients whose squares float32 cannot hold."""
    model = nn.Linear(4, 4, bias=False).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    said = {}
    for size in (0.0, 1e-30, 1e-10, 1e25):
        with ss.watch(model, optimizer) as monitor:
            model.weight.grad = torch.full_like(model.weight, size)
            optimizer.step()
        history = monitor.history
        state = STATES[int(history.states[0, 0])]
        said[str(size)] = f"{state}, norm {history.norm[0, 0]:.3g}, mean |g| {history.mean_abs[0, 0]:.3g}"
    return said


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_synchronisation() -> dict[str, str]:
    """For each kind of step: "none", or where it synchronised. The bare step must not either, or nothing is shown."""
    found = {}
    kinds = {
        "fused AdamW": (small(fused=True), None), "foreach AdamW": (small(foreach=True), None),
        "clipping": (small(fused=True), 1.0),
    }  # fmt: skip
    scaled = small(fused=True)
    scaled.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    kinds["GradScaler, fused"] = (scaled, None)
    for name, (run, clip) in kinds.items():
        for _ in range(3):
            run.step(clip)
        try:
            with no_synchronisation():
                run.step(clip)
        except RuntimeError as error:
            found[name] = f"the bare step synchronises: {str(error)[:200]}"
            continue
        try:
            with ss.watch(run.model, run.optimizer) as monitor:
                for _ in range(3):
                    run.step(clip)
                with no_synchronisation():
                    for _ in range(20):
                        run.step(clip)
                torch.cuda.synchronize()
            found[name] = "none" if len(monitor.history) == 23 else f"{len(monitor.history)} rows of 23"
        except RuntimeError:
            found[name] = traceback.format_exc()[-1500:]
    return found


def check_flow() -> dict[str, float]:
    """The flow during training against ``gradient_flow``: the greatest relative difference."""
    run = small(foreach=True)
    for group in run.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    flow = gradient_flow(run.model, (run.inputs, run.target), F.cross_entropy)
    right = np.array([b.gradient_rms for b in flow.boundaries]) * flow.output_gradient_norm
    with ss.watch(run.model, run.optimizer, flow_every=2) as monitor:
        for _ in range(4):
            run.step()
    return {"relative difference": float(np.max(np.abs(monitor.history.flow / right - 1)))}


def overhead(run: Training, every: int, steps: int, rounds: int) -> dict[str, float]:
    """Steps with and without the monitor, in turns; times by wall clock between two synchronisations."""

    def block() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            run.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    block()
    with ss.watch(run.model, run.optimizer, every=every):
        block()
    bare, watched = [], []
    for i in range(rounds):
        for kind in ("bare", "watched") if i % 2 else ("watched", "bare"):
            if kind == "bare":
                bare.append(block())
            else:
                monitor = ss.watch(run.model, run.optimizer, every=every)
                block()  # its first steps: verdicts at rows 1, 2, 4, ...
                watched.append(block())
                monitor.close()
    ratios = [w / b for w, b in zip(watched, bare)]
    return {
        "bare_ms": 1e3 * statistics.median(bare), "watched_ms": 1e3 * statistics.median(watched),
        "overhead": statistics.median(ratios) - 1, "overhead_of_medians": statistics.median(watched) / statistics.median(bare) - 1,
        "least": min(ratios) - 1, "most": max(ratios) - 1,
    }  # fmt: skip


def hook_time(run: Training) -> dict[str, float]:
    """Microseconds that the hook takes on the host, and its kernels on the device."""
    monitor = ss.watch(run.model, run.optimizer)
    for _ in range(40):
        run.step()
    recorder = monitor._recorders[0]
    host, device = [], []
    for _ in range(30):
        run.step()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        recorder._measure()
        host.append(time.perf_counter() - start)
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    monitor.close()
    return {"host_us": 1e6 * statistics.median(host), "device_us": 1e3 * statistics.median(device)}


def main() -> None:
    result: dict = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": sys.version.split()[0],
        "checks": {}, "overhead": {}, "failures": {},
    }  # fmt: skip

    def attempt(name: str, what: Callable[[], object], into: dict) -> None:
        begin = time.perf_counter()
        try:
            into[name] = what()
        except Exception:
            result["failures"][name] = traceback.format_exc()[-3000:]
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        keep(result)  # what is measured is kept, whatever comes next

    attempt("values: relative error", check_values, result["checks"])
    attempt("before clipping: relative error", check_clipping, result["checks"])
    attempt("zeros", check_underflow, result["checks"])
    attempt("synchronisations", check_no_synchronisation, result["checks"])
    attempt("flow", check_flow, result["checks"])
    for name, (make, shape, vocab) in sizes().items():
        run = Training(make, shape, vocab, fused=True)
        steps = 40 if "10 M" in name else 20
        attempt(f"{name}: hook", lambda run=run: hook_time(run), result["overhead"])
        for every in (1, 10):
            attempt(
                f"{name}: every={every}",
                lambda run=run, every=every, n=steps: overhead(run, every, n, 7),
                result["overhead"],
            )
        del run
        torch.cuda.empty_cache()
    if "--bf16" in sys.argv:
        make, shape, vocab = sizes()["GPT-2 124 M, 16 x 512"]
        run = Training(make, shape, vocab, dtype=torch.bfloat16, fused=True)
        attempt("GPT-2 124 M bfloat16: every=1", lambda: overhead(run, 1, 20, 11), result["overhead"])
    print(json.dumps(result, indent=1))


def keep(result: dict) -> None:
    (Path(os.environ.get("OUT", ".")) / "monitor_gpu.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

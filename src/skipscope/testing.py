"""The contract suite for shortcut modules: skipscope's own and user-defined ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._batches import map_tensors, rows, tensors_in
from skipscope._errors import SkipscopeError
from skipscope._model_calls import call_model
from skipscope._public_call import public_call
from skipscope._untouched import private_copy, random_state_kept, require_module
from skipscope.shortcuts import Merge, Shortcuts, ablate, find_shortcuts, tap_merges


class BrokenContract(SkipscopeError, AssertionError):
    """Raised by :func:`check_shortcut` for a shortcut module that fails a check.

    Example:
        >>> try:
        ...     check_shortcut(nn.Linear(4, 4), compile=False)  # x is not added
        ... except BrokenContract as error:
        ...     print(str(error).splitlines()[0])
        check_shortcut: found: find_shortcuts does not find it
    """


@dataclass(frozen=True)
class _Case:
    """A block, its inputs and its claims; ``stream``, the first float input, is what the shortcut carries."""

    module: nn.Module
    inputs: Any
    kind: str | None
    identity_at_start: bool
    same_shape: bool

    @property
    def stream(self) -> Tensor:
        return next(t for t in tensors_in(self.inputs) if t.is_floating_point())

    def fresh(self) -> nn.Module:
        return private_copy(self.module, "check_shortcut")

    def call(self, module: nn.Module, stream: Tensor) -> Any:
        """Call the block on a copy of the inputs, with ``stream`` as their first float tensor."""
        return call_model(
            module, map_tensors(self.inputs, lambda t: stream if t is self.stream else t.clone())
        )

    def output(self, module: nn.Module | None = None) -> Tensor:
        """The output in evaluation mode, with the same random numbers each time."""
        module = (self.fresh() if module is None else module).eval()
        # With gradients enabled, since without them torch's encoder layers run other kernels, which round
        # differently.
        with torch.enable_grad(), random_state_kept(0):
            return self.call(module, self.stream.clone().requires_grad_().clone()).detach()

    def gradient(self, module: nn.Module) -> Tensor | None:
        """Gradient of a randomly weighted sum of the output with respect to the stream.

        A plain sum would not do: its gradient through a norm is zero.
        """
        x = self.stream.clone().requires_grad_()
        with torch.enable_grad(), random_state_kept(0):
            output = self.call(module, x.clone())
            seed = torch.randn_like(output)
            return (
                None if output.grad_fn is None else torch.autograd.grad(output, x, seed, allow_unused=True)[0]
            )


@public_call("check_shortcut")
def check_shortcut(
    module: nn.Module,
    inputs: Tensor | None = None,
    *,
    kind: str | None = None,
    identity_at_start: bool | None = None,
    same_shape: bool | None = None,
    compile: bool = True,
) -> tuple[str, ...]:
    """Check that a module is a shortcut that works with training, editing, compiling and saving.

    The checks, in order: the output has the right shape, and the input is not modified; the module is the
    identity at the start, if claimed; in evaluation mode it draws no noise and keeps no state between passes;
    samples (of vectors and images) are independent, and the output does not depend on the input's strides; a
    gradient reaches the input, and in float64 equals a finite difference; each weight gets a gradient in
    training mode; ``find_shortcuts`` finds it, with the right kind, as wide as the sum, equally in training
    and evaluation mode; it can be ablated, and each edit has the expected effect; its ``state_dict`` holds
    all its state; it compiles to one graph; it runs under autocast. The module itself stays unchanged. Local.

    Args:
        module: a newly initialised block that returns one tensor.
        inputs: its inputs: a float tensor, or a tuple or Mapping whose first float tensor the shortcut
            carries. None draws a batch that fits its first linear layer or convolution.
        kind: the kind as which it should be found; by default ``module.kind`` if set, else any.
        identity_at_start: whether it claims to return its input at the start; by default
            ``module.identity_at_start`` if set, else False.
        same_shape: whether the output has the input's shape; by default True unless the kind is projection or
            concat.
        compile: whether to check compiling, which is the slowest part.

    Returns:
        The names of the checks that were run.

    Raises:
        BrokenContract: a check fails; it is an AssertionError too.
        SkipscopeError: there is no float tensor in the inputs, or no inputs were given and none can be
            guessed.

    Example:
        >>> from skipscope.nn import Highway
        >>> check_shortcut(Highway(nn.Linear(8, 8), 8), kind="gated", compile=False)
        ('shape', 'repeatable', 'samples', 'strides', 'gradient', 'weights', 'found', 'ablatable',
        'state_dict', 'autocast')
    """
    require_module(module, "check_shortcut")
    kind = kind or getattr(module, "kind", None)
    if identity_at_start is None:
        identity_at_start = bool(getattr(module, "identity_at_start", False))
    if same_shape is None:
        same_shape = kind not in {"projection", "concat"}
    clauses: dict[str, Callable[[_Case], None]] = {
        "shape": _shape,
        "identity_at_start": _identity_at_start,
        "repeatable": _repeatable,
        "samples": _samples,
        "strides": _strides,
        "gradient": _gradient,
        "weights": _weights,
        "found": _found,
        "ablatable": _ablatable,
        "state_dict": _state_dict,
        "compile": _compile,
        "autocast": _autocast,
    }
    if not identity_at_start:
        del clauses["identity_at_start"]
    if not compile:
        del clauses["compile"]
    with random_state_kept(0):
        case = _Case(module, _read_inputs(module, inputs), kind, identity_at_start, same_shape)
        for name, clause in clauses.items():
            try:
                clause(case)
            except BrokenContract:
                raise
            except Exception as error:
                cure = "if it wants more: inputs=(x, ...) or inputs={...}, as its forward takes them"
                raise _broken(
                    case,
                    f"{name}: it raises {type(error).__name__}: {_first_line(error)}",
                    cure=cure if name == "shape" else None,
                ) from error
    return tuple(clauses)


# --- the clauses ---


def _shape(case: _Case) -> None:
    with torch.no_grad(), random_state_kept(0):
        given = case.stream.clone()
        output = case.call(case.fresh().eval(), given)
    if not isinstance(output, Tensor):
        raise _broken(
            case,
            "shape: the output is not one tensor",
            expected="a tensor",
            got=type(output).__name__,
            cure="wrap the block in a module that returns the tensor alone",
        )
    if case.same_shape and output.shape != given.shape:
        raise _broken(
            case,
            "shape: the output has another shape than the input",
            expected=tuple(given.shape),
            got=tuple(output.shape),
            cure='if it is meant to: kind="projection", kind="concat" or same_shape=False',
        )
    if not torch.equal(given, case.stream):
        raise _broken(
            case,
            "shape: the block changes its input in place, which others may hold too",
            expected="an input left as it was",
            cure="x = x + f(x) in place of x += f(x); no inplace=True on what came in",
        )
    if not output.isfinite().all():
        raise _broken(case, "shape: the output is not finite")


def _identity_at_start(case: _Case) -> None:
    output = case.output()
    if not _close(output, case.stream):
        off = float((output - case.stream).abs().max()) if output.shape == case.stream.shape else float("inf")
        raise _broken(
            case,
            "identity_at_start: a fresh module does not return its input",
            expected="output = input",
            got=f"a difference of {off:.3g}",
            cure="start the branch's last factor at zero",
        )


def _repeatable(case: _Case) -> None:
    """Check that passes in evaluation mode depend on neither the random state nor earlier inputs."""
    module = case.fresh().eval()
    before = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    outputs, attributes = [], []
    for seed in (0, 1):
        with torch.enable_grad(), random_state_kept(seed):
            outputs.append(case.call(module, case.stream.clone().requires_grad_().clone()).detach())
        attributes.append(_plain_attributes(module))
    if not torch.equal(*outputs):
        raise _broken(
            case,
            "repeatable: two passes in evaluation mode differ",
            expected="the same output from the same input",
            got=f"a difference of {float((outputs[0] - outputs[1]).abs().max()):.3g}",
            cure="draw noise only if self.training; keep no counter and no cache that changes the output",
        )
    after = module.state_dict()
    changed = [key for key, tensor in before.items() if not torch.equal(after[key], tensor)]
    if changed:
        raise _broken(
            case,
            "repeatable: a pass in evaluation mode changes the state",
            expected="a state_dict left as it was",
            got=", ".join(changed)[:200],
            cure="update buffers only if self.training",
        )
    # An attribute that only the first pass sets (a table of positions) does not depend on the input.
    left = [name for name, value in attributes[1].items() if not _same(value, attributes[0].get(name))]
    if left:
        raise _broken(
            case,
            "repeatable: a pass in evaluation mode leaves something behind",
            expected="plain attributes as they were",
            got=", ".join(left)[:200],
            cure="keep no activation and count no calls on the module",
        )
    other = case.fresh().eval()
    with torch.no_grad(), random_state_kept(0):
        # A new random input could equal the old one, since a guessed input is drawn from the same seed.
        case.call(other, 1 - 2 * case.stream)
    if not _close(case.output(other), outputs[0]):
        raise _broken(
            case,
            "repeatable: the output depends on what the module was called with before",
            expected="a function of the input and the state_dict",
            got="another output after another input",
            cure="keep no input or activation from one pass to the next",
        )


def _samples(case: _Case) -> None:
    """Check that single samples, and three in reverse order, have the same outputs as in the batch.

    Only for vectors and images: the first dimension of other inputs may be time, or streams, which may
    interact by design.
    """
    count = case.stream.shape[0] if case.stream.ndim else 0
    if case.stream.ndim not in {2, 4} or count < 2:
        return
    module = case.fresh().eval()
    whole = case.output(module)
    for index in ([0], [count - 1], list(range(min(count, 3)))[::-1]):
        picked = torch.tensor(index)
        some = rows(case.inputs, picked)
        try:
            with torch.enable_grad(), random_state_kept(0):
                output = call_model(module, some).detach()
        except Exception as error:
            raise _broken(
                case,
                f"samples: {len(index)} of them raise {type(error).__name__}: {_first_line(error)}",
                expected="any batch size",
                got=f"a batch of {len(index)}",
                cure="take sizes from the input: x.shape[0], -1",
            ) from error
        if not _close(output, whole[picked.to(whole.device)]):
            raise _broken(
                case,
                "samples: a sample's output depends on its place or its neighbours",
                expected="each sample by itself",
                got=f"another output for sample {index[0]} among {len(index)}",
                cure="index no fixed sample; mix along features only",
            )


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """All modules' attributes except parameters, buffers and modules; for a container its length."""
    return {
        f"{path}.{name}".lstrip("."): len(value) if isinstance(value, list | dict | set) else value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_")
    }


def _tensors_outside(module: nn.Module) -> list[str]:
    """Names of the plain attributes that are or hold tensors other than parameters and buffers."""
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return [
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_") and any(id(tensor) not in known for tensor in _held(value, module))
    ]


def _held(value: Any, module: nn.Module) -> list[Tensor]:
    """The tensors in a plain attribute: itself, or those in containers and modules, also nested.

    A module that contains ``module`` is its owner, and does not count.
    """
    if isinstance(value, nn.Module):
        owns = any(part is module for part in value.modules())
        return [] if owns else [*value.parameters(), *value.buffers()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _held(part, module)]
    return [value] if isinstance(value, Tensor) else []


def _same(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, int | float | str) else a is b


def _strides(case: _Case) -> None:
    """Check that another memory layout of the input gives the same output, or that the block refuses it."""
    x = case.stream
    if x.ndim < 2:
        return
    module, expected = case.fresh().eval(), case.output()
    try:
        with torch.enable_grad(), random_state_kept(0):
            output = case.call(module, x.transpose(0, -1).contiguous().transpose(0, -1)).detach()
    except (RuntimeError, ValueError):
        return
    if not _close(output, expected):
        raise _broken(
            case,
            "strides: another memory layout of the same numbers gives another output",
            expected="an output that depends on the numbers alone",
            got="another one for a transposed input",
            cure="reshape and transpose; no as_strided, no view of the storage",
        )


def _weights(case: _Case) -> None:
    """Check that in training mode each trainable weight gets a gradient (it may be zero)."""
    module = case.fresh().train()
    with torch.enable_grad(), random_state_kept(0):
        output = case.call(module, case.stream.clone().requires_grad_().clone())
        output.backward(torch.randn_like(output))
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise _broken(
            case,
            "weights: no gradient reaches some trainable weights",
            expected="one for each",
            got=", ".join(without)[:200],
            cure="use them in the forward pass, without .detach() or .data; drop those that are not needed",
        )


def _refuse_wrong_gradient(case: _Case) -> None:
    """Compare the gradient along a random direction with finite differences, in float64 and eval mode."""
    module = case.fresh().eval().double()
    inputs = map_tensors(case.inputs, lambda t: t.double() if t.is_floating_point() else t.clone())
    stream = next(t for t in tensors_in(inputs) if t.is_floating_point())

    def at(x: Tensor) -> Tensor:
        with random_state_kept(0):
            return call_model(module, map_tensors(inputs, lambda t: x if t is stream else t.clone()))

    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(stream.shape, generator=generator, dtype=torch.float64).to(stream.device)
    with torch.enable_grad():
        x = stream.clone().requires_grad_()
        output = at(x.clone())
        if output.dtype != torch.float64:
            raise _broken(
                case,
                "gradient: float64 goes in and another dtype comes out",
                expected="torch.float64",
                got=output.dtype,
                cure="no .float() and no dtype of your own: take the input's",
            )
        seed = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        slope = float((torch.autograd.grad(output, x, seed)[0] * direction).sum())
    slopes = []
    for step in (1e-5, 1e-6):
        with torch.no_grad():
            difference = at(stream + step * direction) - at(stream - step * direction)
        slopes.append(float((difference * seed).sum()) / (2 * step))
    size = max(abs(slope), abs(slopes[0]), 1e-9)
    # If the two finite differences disagree, there is a kink between the points, and the check says nothing.
    if abs(slopes[0] - slopes[1]) < 1e-3 * size < abs(slope - slopes[0]) / 10:
        raise _broken(
            case,
            "gradient: it is not that of the output",
            expected=f"{slopes[0]:.6g} along a random direction, by finite differences",
            got=f"{slope:.6g} by autograd",
            cure="look for .detach(), .data or torch.no_grad() on a part of the path",
        )


def _gradient(case: _Case) -> None:
    for training in (False, True):
        gradient = case.gradient(case.fresh().train(training))
        mode = "training" if training else "evaluation"
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            got = "no gradient" if gradient is None else "zero" if not gradient.any() else "not finite"
            raise _broken(
                case,
                f"gradient: none reaches the input in {mode} mode",
                expected="not zero",
                got=got,
                cure="look for .detach(), .data, torch.no_grad() or a factor of 0 between input and output",
            )
    _refuse_wrong_gradient(case)


def _found(case: _Case) -> None:
    found = find_shortcuts(case.fresh().eval(), case.inputs)
    kinds = [shortcut.kind for shortcut in found]
    if not kinds or (case.kind is not None and case.kind not in kinds):
        reasons = "; ".join(f"{merge.name}: {merge.reason}" for merge in found.rejected)
        raise _broken(
            case,
            "found: find_shortcuts does not find it" if not kinds else "found: as another kind",
            expected=case.kind or "any kind",
            got=", ".join(kinds) or f"no shortcut ({reasons or 'no merges'})",
            cure="in evaluation mode, one operand of the merge must come past the branch",
        )
    broadcast = _broadcast_shortcuts(case, found)
    if broadcast:
        raise _broken(
            case,
            "found: the shortcut has another shape than the merge",
            expected="one number for each of the output's",
            got=broadcast[0],
            cure="carry all of x past the branch: no mean and no slice of it",
        )
    with random_state_kept(0):
        training = find_shortcuts(case.fresh().train(), case.inputs)
    if len(training) != len(found):
        raise _broken(
            case,
            "found: another number of shortcuts in training mode",
            expected=f"{len(found)}, as in evaluation mode",
            got=len(training),
            cure="let the shortcut stand in both modes",
        )


def _broadcast_shortcuts(case: _Case, found: Shortcuts) -> list[str]:
    """The shapes of shortcut operands that were broadcast in a sum."""
    sums = [shortcut for shortcut in found if shortcut.kind in {"identity", "scaled", "projection"}]
    shapes: list[str] = []

    def note(_: int, merge: Merge) -> Tensor:
        shapes.extend(
            f"{tuple(operand.shape)} in a sum of {tuple(merge.output.shape)}"
            for operand, side in zip(merge.operands, merge.sides, strict=True)
            if side == "shortcut" and operand.shape != merge.output.shape
        )
        return merge.output

    module = case.fresh().eval()
    with torch.no_grad(), random_state_kept(0), tap_merges(module, replace(found, entries=tuple(sums)), note):
        case.call(module, case.stream.clone())
    return shapes


def _ablatable(case: _Case) -> None:
    module = case.fresh().eval()
    found, built = find_shortcuts(module, case.inputs), case.output()
    keys = module.state_dict().keys()
    twins = {how: ablate(module, found, how=how) for how in ("remove", "detach", "lesion")}
    twins |= {f"strength={s:g}": ablate(module, found, strength=s) for s in (0.0, 1.0)}
    for name, twin in twins.items():
        if twin.state_dict().keys() != keys:
            raise _broken(case, f"ablatable: {name} changes the keys of the state_dict")
    output = {name: case.output(twin) for name, twin in twins.items()}
    if not torch.equal(output["detach"], built):
        raise _broken(case, "ablatable: detach changes the output")
    if not _close(output["strength=1"], built) or not _close(output["strength=0"], output["remove"]):
        raise _broken(case, "ablatable: strength 1 is not as built, or strength 0 is not remove")
    if _close(output["remove"], built):
        raise _broken(case, "ablatable: removing the shortcut changes nothing")
    whole, rest = case.gradient(module), case.gradient(twins["detach"].eval())
    if whole is not None and rest is not None and torch.equal(whole, rest):
        raise _broken(
            case,
            "ablatable: detaching the shortcut changes no gradient",
            expected="a gradient that comes by the shortcut",
            got="all of it by the branch",
            cure="look for .detach(), .data or torch.no_grad() on the shortcut",
        )


def _state_dict(case: _Case) -> None:
    module = case.fresh()
    outside = _tensors_outside(module)
    if outside:
        raise _broken(
            case,
            "state_dict: a tensor is kept outside it",
            expected="parameters and buffers",
            got=", ".join(outside)[:200],
            cure="self.register_buffer(name, tensor); persistent=False for what can be computed again",
        )
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 8)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = case.fresh()
    other.load_state_dict(torch.load(file, weights_only=True))
    if not torch.equal(case.output(module), case.output(other)):
        raise _broken(
            case,
            "state_dict: a copy that loads it gives another output",
            cure="keep all state in parameters and buffers, and draw nothing in evaluation mode",
        )


def _compile(case: _Case) -> None:
    torch.compiler.reset()
    compiled: Any = torch.compile(case.fresh().eval(), fullgraph=True, backend="aot_eager")
    if not _close(case.output(compiled), case.output()):
        raise _broken(case, "compile: the compiled module gives another output")


def _autocast(case: _Case) -> None:
    with torch.autocast(case.stream.device.type, torch.bfloat16):
        output = case.output()
    plain = case.output()
    off = (output.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-12)
    if not off < 0.05:
        raise _broken(
            case,
            "autocast: the output is far from that in full precision",
            expected="< 5 %",
            got=f"{off:.1%}",
        )


# --- helpers ---


def _broken(case: _Case, problem: str, **details: object) -> BrokenContract:
    return BrokenContract("check_shortcut", problem, layer=type(case.module).__name__, **details)  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _read_inputs(module: nn.Module, inputs: Any) -> Any:
    if inputs is None:
        return _guess_inputs(module)
    if not any(t.is_floating_point() for t in tensors_in(inputs)):
        raise SkipscopeError(
            "check_shortcut",
            "nothing that a shortcut could carry is among the inputs",
            expected="a float tensor, or a tuple or Mapping with one",
            got=str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__,
            cure="pass what comes out of the embedding, not the integers",
        )
    return map_tensors(inputs, Tensor.detach)


def _guess_inputs(module: nn.Module) -> Tensor:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            return torch.randn(4, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shape = [4, layer.in_channels] + [8] * len(layer.kernel_size)
            return torch.randn(shape, dtype=layer.weight.dtype, device=layer.weight.device)
    raise SkipscopeError(
        "check_shortcut",
        "no inputs were given, and none can be guessed",
        expected="a linear layer or a convolution",
        got=type(module).__name__,
        cure="pass inputs=, a float tensor that the module takes",
    )

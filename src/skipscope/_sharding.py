"""Handling of FSDP2 units: which modules are units, and restoring their sharded or unsharded state.

After a forward pass without a backward pass the root's weights stay unsharded, and the modules hold other
Parameter objects than before. Restoring the objects alone would leave FSDP's own state inconsistent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._batches import hash_of
from skipscope._errors import SkipscopeError
from skipscope._ranks import RankGroup, is_lost_rank, is_spread, meet, ranks_of, whole, world
from skipscope._torch_private import begin_fsdp, fsdp_dtype, fsdp_groups, gathered_by_fsdp, step_fsdp


def units(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on, outermost first.

    Example:
        >>> units(nn.Linear(2, 2))
        []
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(loaded, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def gathered_weights(model: nn.Module) -> dict[int, Tensor]:
    """Map ids of sharded weights to the unsharded weights of FSDP2, the leaves of a backward pass."""
    return {id(mine): whole for unit in units(model) for mine, whole in gathered_by_fsdp(unit)}


def computed_in(model: nn.Module) -> set[torch.dtype]:
    """Compute dtypes of the mixed-precision policies of ``fully_shard`` in a model."""
    return {dtype for unit in units(model) if (dtype := fsdp_dtype(unit)) is not None}


@contextmanager
def as_found(models: Iterable[nn.Module]) -> Iterator[None]:
    """Restore on exit which FSDP units are sharded and which unsharded.

    Collective if a unit must be unsharded.
    """
    held = [(unit, _identities(unit)) for model in models for unit in reversed(units(model))]
    try:
        yield
    finally:
        # Inner units first, so that any remaining difference belongs to the outer unit itself.
        for unit, before in held:
            if _identities(unit) != before:
                unit.reshard()
            if _identities(unit) != before:
                unit.unshard()


@contextmanager
def sharded_call(
    models: Iterable[nn.Module], operation: str, lost: Callable[[], SkipscopeError]
) -> Iterator[RankGroup | None]:
    """Surround a public call that all ranks of a sharded model make together.

    Args:
        models: models to reshard inside and to restore on exit. If none is sharded, None is yielded.
        operation: public call, named in errors.
        lost: function that makes the error if another rank ends or does not answer.

    Raises:
        SkipscopeError: a rank does not make the call or is lost, or the models or the ranks disagree.
    """
    models = list(models)
    sharded = [model for model in models if units(model)]
    if not sharded:
        yield None
        return
    # A model that a forward pass left unsharded has no parameter with a mesh.
    ranks = [ranks_of(model) or tuple(range(world()[1])) for model in sharded]
    if len(sharded) < len(models):
        raise SkipscopeError(
            operation,
            "some of the twins are sharded, and some are not",
            expected="all of them, or none",
            got=f"{len(sharded)} of {len(models)}",
            cure="fully_shard the others on the same mesh",
        )
    if len(set(ranks)) > 1:
        raise SkipscopeError(
            operation,
            "the twins are spread over different ranks",
            expected="one mesh for all twins",
            got=f"ranks {sorted(set(ranks))}",
        )
    meet(operation, ranks[0])
    try:
        with as_found(sharded):
            for unit in (unit for model in sharded for unit in units(model)):
                unit.reshard()
            group = RankGroup.of(sharded[0])
            assert group is not None
            for model in models:
                refuse_disagreement(model, group, operation)
            yield group
    except (RuntimeError, OSError) as error:
        if not is_lost_rank(error):
            raise
        # Once a rank is lost, restoring the model fails too; the first error says more.
        first = error.__context__
        raise first if isinstance(first, SkipscopeError) else lost() from error


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Keep all weights unsharded inside, for a backward pass that begins in the middle of an FSDP unit.

    FSDP would not notice such a pass. Collective; use it inside :func:`as_found`, which reshards the weights.
    """
    every = units(model)
    for unit in every:
        # The first forward pass would otherwise do this later and overwrite the settings below.
        begin_fsdp(unit)
    groups = [group for unit in every for group in fsdp_groups(unit)]
    before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        for unit in every:
            unit.unshard()
        yield
    finally:
        for group, after_forward, after_backward in before:
            group.post_forward_mesh_info, group.reshard_after_backward = after_forward, after_backward


@contextmanager
def taken_apart(model: nn.Module) -> Iterator[None]:
    """Undo ``fully_shard`` inside the block (collective).

    Inside, the model has full weights as parameters; they are removed from it on exit.
    """
    modules = list(model.modules())
    kinds = [type(module) for module in modules]
    held = [(vars(module), dict(vars(module))) for module in modules]
    held += [(own, dict(own)) for module in modules for own in vars(module).values() if isinstance(own, dict)]
    weights = {id(p): nn.Parameter(whole(p.detach()).clone(), p.requires_grad) for p in model.parameters()}
    try:
        for module in modules:
            _take_apart(module, weights)
        yield
    finally:
        for module, kind in zip(modules, kinds):
            module.__class__ = kind
        for own, before in held:
            own.clear()
            own.update(before)


def _take_apart(module: nn.Module, weights: dict[int, nn.Parameter]) -> None:
    loaded = sys.modules["torch.distributed.fsdp"]
    if isinstance(module, loaded.FSDPModule):
        module.__class__ = type(module).__mro__[2]
    for name, own in list(vars(module).items()):
        if "composable_api" in name:
            del vars(module)[name]
        elif name.endswith("_hooks"):
            for key in [key for key, hook in own.items() if _is_of_fsdp(hook)]:
                del own[key]
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = weights[id(parameter)]


def _is_of_fsdp(hook: Any) -> bool:
    # Torch wraps some hooks.
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")


class ForwardSteps:
    """Sequence of FSDP units entered and left in a forward pass.

    Each unit gathers its weights from all ranks. If a pass fails on one rank, the others wait for it in the
    remaining gathers; so that rank goes through the remaining steps without computing anything.

    Args:
        model: the sharded model.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.order: list[tuple[Any, bool]] | None = None
        self._seen: list[tuple[Any, bool]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the steps of forward passes inside."""
        handles = []
        for unit in units(self.model):
            handles.append(unit.register_forward_pre_hook(lambda m, _: self._seen.append((m, True))))
            handles.append(unit.register_forward_hook(lambda m, *_: self._seen.append((m, False))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Run a forward pass inside; if it fails, take the remaining steps so that no other rank waits."""
        self._seen = []
        try:
            yield
        except Exception as error:
            if not is_lost_rank(error):
                for unit, entering in self._left():
                    step_fsdp(unit, entering)
            raise
        self.order = self.order or self._seen

    def _left(self) -> list[tuple[Any, bool]]:
        """The remaining steps of a pass; before any complete pass, the ends of the units entered so far."""
        if self.order is not None:
            return self.order[len(self._seen) :]
        begun = []
        for unit, entering in self._seen:
            begun.append(unit) if entering else begun.remove(unit)
        return [(unit, False) for unit in reversed(begun)]


def _identities(unit: nn.Module) -> list[int]:
    return [id(parameter) for parameter in unit.parameters()]


def refuse_flattened(model: nn.Module, operation: str) -> None:
    """Refuse FSDP1: its flat parameters do not show which module holds which weight.

    Raises:
        SkipscopeError: a module is sharded by FSDP1.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise SkipscopeError(
                operation,
                "FSDP1 flattens parameters: which module holds which weight cannot be seen",
                expected="DDP, FSDP2 (fully_shard), or no sharding",
                got="FullyShardedDataParallel",
                cure="shard with torch.distributed.fsdp.fully_shard",
            )


def refuse_unmovable(model: nn.Module, operation: str) -> None:
    """Refuse weights sharded by anything but FSDP2, for calls that change each shard in place.

    Raises:
        SkipscopeError: FSDP1; tensor parallelism, with or without FSDP2; several meshes.
    """
    refuse_flattened(model, operation)
    meshes = {p.device_mesh for p in model.parameters() if is_spread(p)}  # pyright: ignore[reportAttributeAccessIssue]
    sharded = bool(units(model)) and len(meshes) == 1
    for parameter in model.parameters():
        if is_spread(parameter):
            *copies, shard = parameter.placements  # pyright: ignore[reportAttributeAccessIssue]
            sharded = sharded and shard.is_shard() and all(place.is_replicate() for place in copies)
    if meshes and not sharded:
        refuse_spread(model, operation)


def refuse_disagreement(model: nn.Module, group: RankGroup, operation: str) -> None:
    """Refuse tensors that are not sharded but differ between the ranks (collective).

    Raises:
        SkipscopeError: a tensor differs; most likely batch-norm statistics of training without SyncBatchNorm.
    """
    held = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor) and not is_spread(t)}
    every = group.gathered({name: hash_of([tensor]) for name, tensor in held.items()})
    name = next((n for n in every[0] if any(other.get(n) != every[0][n] for other in every)), None)
    if name is not None:
        raise SkipscopeError(
            operation,
            "the ranks hold different values of a tensor that is not sharded",
            layer=name,
            expected="one model: the same buffers on every rank",
            got="values that differ",
            cure="torch.distributed.broadcast(buffer, 0) for each of model.buffers(), or nn.SyncBatchNorm",
        )


def refuse_spread(model: nn.Module, operation: str) -> None:
    """Refuse sharded parameters (FSDP2, tensor parallel), for calls that change full weights.

    Raises:
        SkipscopeError: FSDP1, or a sharded parameter; nothing else, so that all ranks refuse alike.
    """
    refuse_flattened(model, operation)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise SkipscopeError(
                operation,
                "it moves whole weights, and these are spread over ranks",
                layer=name,
                got=f"a DTensor, {parameter.placements}",  # pyright: ignore[reportAttributeAccessIssue]
                cure=(
                    "give it the model as it was built, with the whole weights:"
                    " torch.distributed.checkpoint.state_dict.get_model_state_dict(model,"
                    " options=StateDictOptions(full_state_dict=True))"
                ),
            )


def class_name(module: nn.Module) -> str:
    """Name of a module's original class: ``fully_shard`` inserts a class of its own before it."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return names[2] if names[1] == "FSDPModule" else names[0]

"""FSDP2: which modules are sharded units, and leaving them sharded, or whole, as they were found.

After a forward pass without a backward the root's weights stay whole, and the modules hold other Parameter
objects than before: putting those back alone would leave FSDP believing that they are whole.
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
    """Id of a sharded weight -> what FSDP2 gathers in its place: the leaf of a backward pass."""
    return {id(mine): whole for unit in units(model) for mine, whole in gathered_by_fsdp(unit)}


def computed_in(model: nn.Module) -> set[torch.dtype]:
    """The dtypes that a mixed-precision policy of ``fully_shard`` has the model compute in."""
    return {dtype for unit in units(model) if (dtype := fsdp_dtype(unit)) is not None}


@contextmanager
def as_found(models: Iterable[nn.Module]) -> Iterator[None]:
    """Restore, after the block, which FSDP units were sharded and which whole.

    Collective where a unit must be made whole.
    """
    held = [(unit, _identities(unit)) for model in models for unit in reversed(units(model))]
    try:
        yield
    finally:
        for unit, before in held:  # inner units first: then what still differs is the outer one's own
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
        models: each is sharded inside, and as it was found outside; None is yielded where none is sharded.
        operation: named in errors.
        lost: what is raised where another rank ends, or does not answer.

    Raises:
        SkipscopeError: a rank does not come or is lost, or the ranks have no model in common.
    """
    models = list(models)
    sharded = [model for model in models if units(model)]
    if not sharded:
        yield None
        return
    # A model that a forward pass left whole shows no mesh.
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
        # Leaving the model as found fails too once a rank is lost; the first error says more.
        first = error.__context__
        raise first if isinstance(first, SkipscopeError) else lost() from error


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Keep all weights whole on every rank, for a backward pass that begins in the middle of an FSDP unit.

    FSDP would not know of it. Collective; call it inside :func:`as_found`, which shards them again.
    """
    every = units(model)
    for unit in every:
        # the first forward pass does it, which sets what is changed below
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

    The model has whole weights there, which are no part of it afterwards.
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
    function = getattr(hook, "hook", hook)  # torch wraps some
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")


class ForwardSteps:
    """What the units of a model do in a forward pass, one after the other.

    Each gathers its weights from all ranks. Where a pass fails on one rank the others wait for its part in
    the gathering that is left: it goes through the rest of the steps without computing anything.

    Args:
        model: sharded.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.order: list[tuple[Any, bool]] | None = None
        self._seen: list[tuple[Any, bool]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the steps are seen."""
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
        """Run the model inside as every other rank does; where that fails, the other ranks can continue."""
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
        """The steps that have not been made; while no pass was whole, the ends of those that have begun."""
        if self.order is not None:
            return self.order[len(self._seen) :]
        begun = []
        for unit, entering in self._seen:
            begun.append(unit) if entering else begun.remove(unit)
        return [(unit, False) for unit in reversed(begun)]


def _identities(unit: nn.Module) -> list[int]:
    return [id(parameter) for parameter in unit.parameters()]


def refuse_flattened(model: nn.Module, operation: str) -> None:
    """Refuse FSDP1, whose flat parameters do not tell which module holds which weight.

    Raises:
        SkipscopeError: as said.
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
    """Refuse weights that something else than FSDP2 spreads over ranks, for what moves each shard.

    Raises:
        SkipscopeError: FSDP1, or tensor parallelism, alone or beside FSDP2; several meshes.
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
        SkipscopeError: naming the first; most likely batch-norm statistics of training without SyncBatchNorm.
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
    """Refuse parameters that are spread over ranks (FSDP2, tensor parallel), for what moves whole weights.

    Raises:
        SkipscopeError: as said; nothing else is looked at, so that every rank refuses alike.
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
    """Of the class that its author wrote: ``fully_shard`` puts one of its own before it."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return names[2] if names[1] == "FSDPModule" else names[0]

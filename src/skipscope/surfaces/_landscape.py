"""Public calls for one loss surface, or for twins' surfaces on the same plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack, overload

from torch import nn

from skipscope._errors import SkipscopeError
from skipscope._public_call import public_call
from skipscope._sharding import class_name
from skipscope.shortcuts import unwrapped
from skipscope.surfaces._bands import by_seed, paired_band, read_seed, surface_band
from skipscope.surfaces._landscape_settings import OneModelOptions, Options, Settings, with_signature
from skipscope.surfaces._surface_run import surfaces
from skipscope.surfaces.results._band_result import PairedBand, SurfaceBand
from skipscope.surfaces.results._surface_result import PairedSurfaces, Surface


@overload
def landscape(
    model: nn.Module, data: Any, loss: Any = None, *, seed: int = 0, **options: Unpack[OneModelOptions]
) -> Surface: ...
@overload
def landscape(
    model: nn.Module, data: Any, loss: Any = None, *, seed: Sequence[int], **options: Unpack[OneModelOptions]
) -> SurfaceBand: ...
@with_signature(OneModelOptions)
@public_call("landscape")
def landscape(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    seed: int | Sequence[int] = 0,
    **options: Unpack[OneModelOptions],
) -> Surface | SurfaceBand:
    """The loss on a plane w + a d1 + b d2 around the model's weights (Li et al., arXiv 1712.09913).

    Local: does not wait for other processes. The model is only read: a copy moves.

    Collective under FSDP2 (``fully_shard``): the ranks evaluate each point together, by the plain loop. Each
    rank moves its own shards in place and restores them at the end, also after an error; only rank 0 prints
    and writes the store. The values equal those of the whole model to rounding. ``strategy`` and ``engine``
    have no effect; ``strength``, a plane in ``directions``, and "ray" are refused.

    Args:
        model: evaluated in evaluation mode.
        data: one batch or re-iterable batches; read once and kept, so that every point sees the same samples.
            Under FSDP2 the batches of all ranks together; identical batches on every rank, in the same order,
            count once.
        loss: ``loss(output, target)``; left out if the output carries ``.loss``; or ``@ss.objective``.
        seed: random seed of the directions, and of the subset if ``samples`` is given. Several seeds give a
            band: a surface along each seed's directions.
        **options: keyword options, as follows.

    Options:
        grid: points per axis, as one number or one per axis; ``(51,)`` is a line.
        span: half width in units of the direction (|d_f| = |w_f| by default); or one per axis; or (low, high)
            per axis.
        store: folder to keep finished points in. A second call with the same weights, data and settings
            resumes, also after ``kill -9``, and gives the same result bit for bit; a call with others is
            refused.
        directions: your own directions: one or two dicts from parameter names to tensors, used as they are;
            or a plane from :func:`solutions_plane` or :func:`trajectory_plane`, whose points are marked with
            their own losses.
        strength: the shortcuts (``ss.find_shortcuts(...)``) whose strength is the first axis, from 0
            (removed) to 1 (as built); the other axis, if any, is a direction.
        normalize: "filter", "layer", "tensor" or "none".
        zero: kinds of parameters that do not move: any of "biases", "norms", "embeddings".
        parameters: names or patterns (``"layer1.*"``, an adapter's ``"*lora_*"``) of the parameters that
            move; default: all.
        orthogonal: make the second direction orthogonal to the first, filter by filter.
        batch_norm: "frozen" (running statistics as they are), "recalibrate" (measured again at each point) or
            "batch" (each batch's own statistics); also applies to instance norms with running statistics.
        samples: use a random subset of the data of this size; ``stderr`` shows the added error.
        metrics: name -> ``f(output, target) -> number``, computed in the same pass.
        l2: weight of a regulariser to add: l2/2 |w|^2 over all parameters.
        tolerance: compute a coarse grid first and refine where interpolation is off by more than this share
            of the surface's range (and by more than the standard error); ``computed`` marks the points that
            the model was run for. None computes every point. With a store, ``ss.load`` gives the surface
            after each level, also during the run or after it was stopped.
        strategy: "auto" times strategies on the first points; "plain" is the reference, whose values are the
            same on every run; or a name from an earlier result's provenance. On Linux one strategy evaluates
            a point per core, in forked copies of this process, like a DataLoader's workers.
        precision: None keeps the model's own; "bf16" or "fp16" run it under autocast; "tf32" or "fp32" choose
            a GPU's arithmetic for float32.
        engine: "local"; "torchrun": each rank computes its share of the units of work and shares it through
            the store; "ray": a Ray cluster computes them; "auto": torchrun if there are several ranks and a
            store, else local.
        weight: weight of a batch in the mean over batches.
        sample_loss: ``f(output, target) -> [samples]``, for standard errors of a loss that torch does not
            define.

    Returns:
        The :class:`Surface`; ``values[a, b]`` is the loss at ``alphas[a]``, ``betas[b]``. For several seeds a
        :class:`SurfaceBand`.

    Raises:
        SkipscopeError: model, data, loss or settings cannot be used.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import skipscope as ss
        >>> batch = torch.randn(20, 4), torch.randn(20, 1)
        >>> surface = ss.landscape(nn.Linear(4, 1), batch, nn.functional.mse_loss, grid=5)
        >>> surface.values.shape, surface.checks.passed
        ((5, 5), True)
    """
    settings = Settings.of("landscape", OneModelOptions, read_seed(seed), options)
    # The random draw of a parameter depends on its name, which a wrapper changes.
    model = unwrapped(model)
    name = class_name(model)
    if isinstance(settings.seed, list):
        return surface_band(by_seed({name: model}, data, loss, settings), name)
    return surfaces({name: model}, data, loss, settings).surfaces[name]


_Twins = Mapping[str, nn.Module]


@overload
def paired_landscapes(
    models: _Twins, data: Any, loss: Any = None, *, seed: int = 0, **options: Unpack[Options]
) -> PairedSurfaces: ...
@overload
def paired_landscapes(
    models: _Twins, data: Any, loss: Any = None, *, seed: Sequence[int], **options: Unpack[Options]
) -> PairedBand: ...
@with_signature(Options)
@public_call("paired_landscapes")
def paired_landscapes(
    models: Mapping[str, nn.Module],
    data: Any,
    loss: Any = None,
    *,
    seed: int | Sequence[int] = 0,
    **options: Unpack[Options],
) -> PairedSurfaces | PairedBand:
    """Surfaces of twins that can be compared: same data, same seed, same plane.

    Twins that share the first twin's weights (removed, detached, another strength) get identical direction
    tensors, and a pointwise difference with a 95 % interval from the paired per-sample losses. Twins trained
    separately get the same Gaussian draw for the parameters that match by name and shape, each normalised to
    its own filters: they have no pointwise difference, only scores side by side. Local, or shared between
    torchrun's ranks through the store; under FSDP2 collective, as :func:`landscape`.

    Args:
        models: name -> model; the others are compared with the first.
        data: as in :func:`landscape`; every twin sees the same samples.
        loss: as in :func:`landscape`.
        seed: as in :func:`landscape`.
        **options: those of :func:`landscape` except ``strength``. ``directions`` requires twins that share
            weights; ``tolerance`` holds for every twin; all twins use one ``strategy``. ``batch_norm``: if a
            twin has the first twin's running statistics but computes something else (shortcuts removed),
            they are measured again once; "as found" prevents that.

    Returns:
        :class:`PairedSurfaces`; for several seeds a :class:`PairedBand`, which also says how far they agree.

    Raises:
        SkipscopeError: as :func:`landscape`; or there is no model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import skipscope as ss
        >>> batch = torch.randn(40, 4), torch.randn(40, 1)
        >>> twins = {"one": nn.Linear(4, 1), "other": nn.Linear(4, 1)}
        >>> pair = ss.paired_landscapes(twins, batch, nn.functional.mse_loss, grid=5)
        >>> pair.difference is None, list(pair.scores)
        (True, ['one', 'other'])
    """
    if not isinstance(models, Mapping) or not models:
        raise SkipscopeError(
            "paired_landscapes",
            "no twins were given",
            expected='{"with": model, "without": plain}',
            got=f"{type(models).__name__}",
        )
    settings = Settings.of("paired_landscapes", Options, read_seed(seed), options)
    models = {name: unwrapped(model) for name, model in models.items()}
    if isinstance(settings.seed, list):
        return paired_band(by_seed(models, data, loss, settings))
    return surfaces(models, data, loss, settings)

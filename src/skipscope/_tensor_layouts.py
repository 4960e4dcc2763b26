"""Storage of tensors that are not strided: sparse, nested and oneDNN tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has strided storage; ``copy.deepcopy`` refuses most other layouts."""
    return tensor.layout == torch.strided and not tensor.is_nested


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors with a tensor's contents: itself, or the indices and values of a sparse tensor."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return [whole.indices(), whole.values()]
    if tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in {torch.sparse_csc, torch.sparse_bsc}:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    # The remaining layout is that of oneDNN.
    return [tensor.to_dense()]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Shape of a tensor; for a nested tensor without a common shape ``(samples, elements per sample)``."""
    if tensor.is_nested and tensor.layout == torch.strided:
        samples = tensor.size(0)
        return samples, tensor.numel() // max(1, samples)
    return tuple(tensor.shape)

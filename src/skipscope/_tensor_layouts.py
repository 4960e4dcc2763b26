"""What tensors that are not strided (sparse, nested, oneDNN's) are made of, and how they are copied."""

from __future__ import annotations

import torch
from torch import Tensor


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor is plain memory with strides; ``copy.deepcopy`` refuses most others."""
    return tensor.layout == torch.strided and not tensor.is_nested


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that hold what a tensor holds: itself, or indices and values of a sparse one."""
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
    return [tensor.to_dense()]  # oneDNN's own layout


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor; of a nested one without a common shape ``(samples, numbers a sample)``."""
    if tensor.is_nested and tensor.layout == torch.strided:
        samples = tensor.size(0)
        return samples, tensor.numel() // max(1, samples)
    return tuple(tensor.shape)

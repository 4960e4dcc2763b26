"""Canonical names of torch functions: one name for all spellings of an operation.

``x + y``, ``torch.add``, ``Tensor.add_`` and ``torch.ops.aten.add.Tensor`` are all ``"add"``. The getter of a
property that returns a tensor (``x.T``) has the property's name.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Function(NamedTuple):
    """A torch function's name, whether it writes into its first argument, and whether it may write at all."""

    name: str
    in_place: bool
    may_write: bool = False


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


# These functions read no values, and are called too often to be recorded.
QUERIES = words(
    """shape size dim ndim dtype device layout is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_nested
    is_quantized is_leaf requires_grad grad_fn numel nelement stride storage_offset is_contiguous
    is_floating_point is_complex is_signed element_size data_ptr untyped_storage storage _version _is_view
    _base is_inference is_conj is_neg len __len__ names itemsize nbytes get_device is_shared output_nr
    retains_grad __repr__ __format__ __hash__ is_coalesced __deepcopy__ __reduce_ex__ register_hook is_tensor
    is_same_size result_type can_cast promote_types is_grad_enabled _set_grad_enabled finfo iinfo
    set_default_dtype get_default_dtype is_set_to .grad dim_order _backward_hooks _is_zerotensor has_names
    is_mkldnn is_sparse_csr is_maia is_ipu is_xla is_vulkan is_mtia is_hpu"""
)
# These functions give access to a tensor's memory, through which any code may write.
_EXPOSING = words(
    """
    data_ptr untyped_storage storage numpy __array__ __dlpack__ __cuda_array_interface__ share_memory_ apply_
    map_ set_
    """
)
# The result of these functions depends on a tensor's shape only, not on its values.
SHAPE_ONLY = words(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_full
    new_empty new_tensor"""
)
# The result of these functions is uninitialised memory.
UNINITIALISED = words("empty empty_like new_empty empty_strided new_empty_strided empty_permuted")
# These functions use only the shape or the dtype of their second tensor.
LIKE_ANOTHER = words("view_as reshape_as expand_as to resize_as")
# These functions may return a view of their first argument; the recorder compares the memory to know.
VIEWS = words(
    """view reshape view_as reshape_as transpose t permute getitem select narrow slice unbind split
    split_with_sizes chunk tensor_split hsplit vsplit dsplit expand expand_as squeeze unsqueeze flatten
    unflatten ravel detach alias diagonal unfold movedim as_strided view_as_real view_as_complex real imag
    conj T mT H mH data contiguous to type_as float double half bfloat16 adjoint broadcast_to take_along_dim
    atleast_1d atleast_2d atleast_3d cpu cuda positive resolve_conj resolve_neg unsafe_split unsafe_chunk
    broadcast_tensors result"""
)
# These functions compute an activation from token ids and a weight.
LOOKUPS = words("embedding embedding_bag index_select getitem gather take take_along_dim index")
# Linear maps. Applied to one-hot ids they are lookups too.
LINEAR = words(
    """linear matmul mm bmm addmm baddbmm addbmm mv einsum tensordot inner bilinear convolution conv1d conv2d
    conv3d conv_transpose1d conv_transpose2d conv_transpose3d"""
)
# The in-place forms of these functions overwrite all values of the tensor.
OVERWRITES = words(
    "copy fill zero normal uniform bernoulli random exponential cauchy log_normal geometric set"
)
# Python functions of torch that are not recorded as one call; the calls inside them are.
COMPOSITES = words("multi_head_attention_forward")

_SAME = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "concat": "cat",
    "concatenate": "cat",
    "negative": "neg",
    "absolute": "abs",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "clip": "clamp",
    "rmul": "mul",
    "radd": "add",
    "rtruediv": "rdiv",
    "_unsafe_view": "view",
    "_to_copy": "to",
    "arctan": "atan",
    "arcsinh": "asinh",
    "special_expit": "sigmoid",
    "special_softmax": "softmax",
    "_softmax": "softmax",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "native_dropout": "dropout",
    "log_softmax": "log_softmax",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "ger": "outer",
    "unsafe_split": "split",
    "unsafe_chunk": "chunk",
    "float": "to",
    "double": "to",
    "half": "to",
    "bfloat16": "to",
    "type_as": "to",
    "type": "to",
    "cpu": "to",
    "cuda": "to",
    "split_with_sizes": "split",
    "_transformer_encoder_layer_fwd": "transformer_encoder_layer",
}
_known: dict[str, Function] = {}


def function_of(func: Any) -> Function:
    """The canonical name of a function that a ``TorchFunctionMode`` receives."""
    name = getattr(func, "__name__", "")
    if name in {"__get__", "__set__", "__delete__"}:
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        return Function(".grad" if name == "grad" else name, False)
    known = _known.get(name)
    if known is None:
        known = _named(name)
        # The name of another library's operator does not show whether it writes.
        is_foreign = type(func).__module__ == "torch._ops" and not str(func).startswith("aten.")
        is_marked = name.startswith("marked ")
        known = known._replace(may_write=known.in_place or is_foreign or is_marked or name in _EXPOSING)
        # The number of foreign and marked names is unbounded, so they are not cached.
        if not is_foreign and not is_marked:
            _known[name] = known
    return known


def _named(name: str) -> Function:
    if name.startswith("marked "):
        return Function(name, False)
    plain = name.partition(".")[0]  # an overload: add.Tensor
    in_place = plain.endswith("_") and not plain.endswith("__")
    if plain.startswith("__") and plain.endswith("__"):
        plain = plain[2:-2]
        in_place = plain == "setitem" or (plain.startswith("i") and plain[1:] in _AUGMENTED)
        plain = plain[1:] if plain != "setitem" and in_place else plain
        plain = "matmul" if plain == "rmatmul" else plain
    elif in_place:
        plain = plain[:-1]
    return Function(_SAME.get(plain, plain), in_place)


_AUGMENTED = words("add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift")

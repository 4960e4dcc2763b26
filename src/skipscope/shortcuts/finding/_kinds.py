"""Groups of operations that the finding rules distinguish."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


# Operations that cut a tensor into several along one axis.
SPLITS = words("unbind split chunk tensor_split hsplit vsplit dsplit")
# Operations that keep every value exactly once, possibly in another shape.
WHOLE = words(
    """
    view reshape view_as reshape_as transpose t T mT H mH adjoint permute movedim clone contiguous squeeze
    unsqueeze flatten unflatten ravel to detach data alias copy write_all atleast_1d atleast_2d atleast_3d
    positive lift_fresh quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel dequantize
    """
)
_POOLS = words(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean"
)
# Operations that pass only the largest values.
MAX_POOLS = words(
    """max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"""
)
# Operations that move the shards of a tensor between processes; the whole tensor keeps its values.
COLLECTIVES = words(
    """
    all_reduce all_gather_into_tensor reduce_scatter_tensor all_to_all_single broadcast shard_dim_alltoall
    wait_tensor _wrap_tensor_autograd
    """
)
# Operations that move, resize, pool or copy values: y is linear in x, with constant coefficients.
SHAPE = (
    WHOLE
    | COLLECTIVES
    | SPLITS
    | _POOLS
    | MAX_POOLS
    | words(
        """
        select slice narrow getitem index expand expand_as broadcast_to broadcast_tensors cat concat stack
        hstack vstack dstack column_stack repeat tile repeat_interleave gather index_select take_along_dim
        write setitem pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d roll rot90 flip
        unfold fold im2col col2im as_strided diagonal interpolate upsample upsample_nearest2d
        upsample_bilinear2d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle add sub rsub
        neg sum max min amax amin slice_scatter select_scatter diagonal_scatter masked_fill tril triu where
        index_put index_add index_copy scatter scatter_add scatter_reduce masked_scatter max_unpool2d
        view_as_real view_as_complex real imag conj complex cumsum
        """
    )
)
# Linear transforms with constant coefficients. With a filter of weights between them they are a branch.
TRANSFORMS = words(
    """
    fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn
    fft_irfftn fft_hfft fft_ihfft fft_fftshift fft_ifftshift stft istft
    """
)
PRODUCT = words(
    """
    mul div lerp addcmul addcdiv dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout linear
    matmul bmm mm addmm addbmm baddbmm mv dot einsum tensordot inner
    """
)
# Operations that enlarge images in a decoder.
ENLARGING = words(
    """interpolate upsample upsample_nearest2d upsample_bilinear2d pixel_shuffle max_unpool2d conv_transpose1d
    conv_transpose2d conv_transpose3d"""
)
REPEATING = words("expand expand_as broadcast_to broadcast_tensors repeat tile repeat_interleave")
DROPOUT = words("dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout")
ELEMENTWISE = words("mul div addcmul lerp")
# Elementwise operations, as in an activation function. Those of the first group are not nonlinearities.
STRAIGHT_POINTWISE = WHOLE | ELEMENTWISE | words("add sub rsub neg addcdiv")
POINTWISE = STRAIGHT_POINTWISE | words(
    """
    pow rpow float_power square exp exp2 expm1 log log1p log2 log10 sqrt rsqrt reciprocal rdiv abs sign sgn
    sin cos sinh cosh tanh atan asinh erf erfc sigmoid logsigmoid softplus softsign relu relu6 gelu silu
    leaky_relu elu hardswish mish prelu rrelu hardtanh hardsigmoid celu threshold selu where minimum maximum
    clamp clamp_min clamp_max masked_fill tanhshrink softshrink hardshrink
    """
)
NORM = words("batch_norm layer_norm group_norm instance_norm rms_norm _fused_rms_norm normalize")
# Operations that compute a norm, or a step of one.
LENGTHS = words("norm linalg_norm linalg_vector_norm std var square pow abs")
# Reciprocals: a product with one of these is a division.
INVERSES = words("rsqrt reciprocal rdiv pow float_power")
CONVOLUTION = words(
    """
    convolution _convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc
    """
)
LINEAR = CONVOLUTION | words("linear addmm mm matmul bmm baddbmm einsum mv tensordot inner bilinear")
# Operations that compute factors between 0 and 1.
GATES = words("sigmoid hardsigmoid softmax")
# Nonlinearities that make a side with a single matrix a branch, and not only another linear map.
BENT = words(
    """
    relu relu6 gelu silu leaky_relu elu tanh hardswish mish prelu hardtanh celu threshold selu rrelu softmax
    scaled_dot_product_attention
    """
)
COMPARISONS = words("gt lt ge le greater less greater_equal less_equal")
MATRIX_SUMS = words("addmm baddbmm addbmm addmv addr")
MATRIX_PRODUCTS = words("linear matmul bmm mm einsum tensordot inner")

"""What the operands of one merge are: who bypasses whom, from which fork, and through what.

For operand i, what the other operands also depend on is common; the rest of its ancestors is *its own region*. A
bypassing operand reaches the common part through its own region without weights, or with a single linear one. The
fork is where its path enters the common part: the nearest ancestor on which the branch depends.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipscope.shortcuts._trace import Call, Graph, bits


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What moves, resizes, pools or copies values: y is linear in x, with constant coefficients.
SHAPE = _words(
    """View UnsafeView ReshapeAlias Transpose T Permute Slice Select Index Expand Clone Alias Squeeze Unsqueeze ToCopy
    ConstantPadNd Roll Flip Unfold AsStrided Split SplitWithSizes Unbind Cat Stack Repeat Gather IndexSelect CopySlices
    Copy CopyBackwards ReflectionPad1D ReflectionPad2D ReplicationPad2D AvgPool1D AvgPool2D AvgPool3D MeanBackward1 Mean
    AdaptiveAvgPool1D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D MaxPool2DWithIndices
    MaxPool3DWithIndices MkldnnMaxPool2D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleBilinear2D
    UpsampleBicubic2D UpsampleLinear1D UpsampleTrilinear3D PixelShuffle PixelUnshuffle Add Sub Rsub Neg Sum Swapaxes Movedim
    Contiguous Narrow NestedTensorFromPadded SliceScatter SelectScatter Detach LiftFresh
    MaskedFill Tril Triu Where Moveaxis Col2Im Im2Col IndexPut SplitBackwardAutogradNested"""
)
PRODUCT = _words("Mul Div Lerp Addcmul Addcdiv NativeDropout FusedDropout Bmm Mm Addmm Addbmm Baddbmm Mv Dot")
NORM = _words(
    """NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeLayerNorm NativeGroupNorm FusedRmsNorm RmsNorm
    InstanceNorm"""
)
LINEAR = _words(
    """Addmm Mm Linear Convolution MkldnnConvolution Bmm ThnnConv2D SlowConvDilated2D CudnnConvolution
    ConvolutionOverrideable Baddbmm MkldnnLinear Einsum"""
)
BENT = _words(
    """Relu Gelu Silu LeakyRelu Elu Tanh Hardswish Mish PreluKernel Hardtanh Celu Threshold Relu6 Softmax Selu
    HardtanhBackward Hardsigmoid Sigmoid Rrelu RreluWithNoise ScaledDotProductFlashAttentionForCpu
    ScaledDotProductFlashAttention ScaledDotProductEfficientAttention"""
)


@dataclass(frozen=True)
class Side:
    """One operand as seen from its merge.

    Attributes:
        fork: index of the fork's node, or None where no common ancestor is bypassed.
        how: ``identity``, ``scaled``, ``projection``, ``gated`` or ``branch``.
        region: bit set of the operand's own nodes.
        through: for scaled and gated, the product's node.
    """

    fork: int | None
    how: str
    region: int
    through: int | None = None


class Sides:
    """Reads the operands of one merge in a graph."""

    def __init__(self, graph: Graph, call: Call):
        self.graph, self.call = graph, call
        self.at = [None if node is None else graph.position[node] for node in call.operands]
        self.active = [i for i, at in enumerate(self.at) if at is not None and graph.active >> at & 1]

    def read(self) -> dict[int, Side]:
        """Each activation operand's side."""
        return {i: self._side(i) for i in self.active}

    def _common(self, i: int) -> int:
        common = 0
        for j in self.active:
            if j != i:
                common |= self.graph.ancestors[self.position(j)]
        return common

    def position(self, i: int) -> int:
        """Index of an activation operand's node."""
        at = self.at[i]
        assert at is not None
        return at

    def _side(self, i: int) -> Side:
        graph, at = self.graph, self.position(i)
        common = self._common(i)
        own = graph.ancestors[at] & ~common
        if own == graph.ancestors[at]:
            return Side(None, "branch", own)
        if not own:
            return Side(at, "identity", own)
        walk = _Walk(graph, own, common)
        entered = walk.weightless(at)
        fork = walk.nearest(entered)
        if fork is not None:
            through = walk.product
            if walk.bent or (through is None and graph.matrices_in(own)):
                return Side(fork, "bent", own)
            return Side(
                fork,
                "gated" if walk.gate else "scaled" if through is not None or walk.scaled else "identity",
                own,
                through,
            )
        fork = walk.nearest({p for v in bits(own) for p in graph.parents[v] if common >> p & 1})
        if fork is not None and self._is_linear(own & graph.descendants[fork], own):
            return Side(fork, "projection" if graph.matrices_in(own) else "scaled", own)
        return Side(fork, "branch", own)

    def _is_linear(self, path: int, own: int) -> bool:
        matrices = self.graph.matrices_in(own)
        kinds = {self.graph.kind(v) for v in bits(path)}
        return (
            matrices.bit_count() <= 1
            and kinds <= (SHAPE | PRODUCT | NORM | LINEAR)
            and not (self._gated(path))
        )

    def _gated(self, path: int) -> bool:
        graph = self.graph
        return any(
            graph.kind(v) in PRODUCT | LINEAR and sum(graph.active >> p & 1 for p in graph.parents[v]) > 1
            for v in bits(path)
        )


class _Walk:
    """Back from an operand to the common part, without passing a weight."""

    def __init__(self, graph: Graph, own: int, common: int):
        self.graph, self.own, self.common = graph, own, common
        self.product: int | None = None
        self.gate = self.scaled = self.bent = False
        self._seen: dict[int, frozenset[int]] = {}

    def weightless(self, v: int) -> frozenset[int]:
        """The common nodes that ``v`` reaches without weights; empty where a weight or a weighted addend is met."""
        if self.common >> v & 1:
            return frozenset([v])
        if v not in self._seen:
            self._seen[v] = frozenset()
            self._seen[v] = self._step(v)
        return self._seen[v]

    def _step(self, v: int) -> frozenset[int]:
        graph = self.graph
        kind = graph.kind(v)
        parents = [p for p in graph.parents[v] if graph.active >> p & 1]
        if kind in PRODUCT:
            return self._through_product(v, parents)
        if graph.weights[v] or not parents:
            return frozenset()
        reached = [self.weightless(p) for p in parents]
        if not all(reached):
            return frozenset()
        if kind not in SHAPE:
            self.bent = True
        return frozenset().union(*reached)

    def _through_product(self, v: int, parents: list[int]) -> frozenset[int]:
        graph = self.graph
        if graph.matrices[v] and graph.kind(v) not in {"Mul", "Div"}:
            return frozenset()
        before = self.bent
        reached = {p: self.weightless(p) for p in parents}
        carrying = [p for p in parents if reached[p]]
        if not carrying:
            return frozenset()
        if len(parents) == 1:
            if self.product is None or not graph.weights[self.product]:
                self.product = v
            self.scaled = True
            return reached[parents[0]]
        # One factor carries, the other is a gate; where both reach the common part, the gate is the later one.
        every = frozenset().union(*(reached[p] for p in carrying))
        nearest = self.nearest(every)
        self.gate, self.product = True, v
        self.bent = before
        return frozenset() if nearest is None else frozenset([nearest])

    def nearest(self, candidates: frozenset[int] | set[int]) -> int | None:
        """Of several common nodes the one that the others depend on; the last in order if they are unrelated."""
        first = [
            c for c in candidates if not any(d != c and self.graph.ancestors[c] >> d & 1 for d in candidates)
        ]
        return max(first) if first else None

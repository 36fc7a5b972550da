"""``nn.Linear`` on sparse weights, for inference: all that is stored are buffers, detached from their origin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.kernels.ops.block_sparse_linear import block_sparse_linear
from archfront.kernels.ops.serving import refusal
from archfront.kernels.ops.shared_pattern_linear import shared_pattern_linear
from archfront.kernels.reference import sparse_linear as reference
from archfront.kernels.reference.sparse_linear import LAYOUT_VERSION, Blocks, Shared

SEMI_STRUCTURED_DTYPES = (torch.float16, torch.bfloat16)
SEMI_STRUCTURED_SIDES = (32, 64)
"""Of what rows and columns of a 2:4 weight are multiples: the more demanding of torch's two libraries."""
BACKENDS = ("auto", "sparse", "dense")


class _SparseLinear(nn.Module):
    """Sizes, a bias and a layout that is checked when a state is loaded; a base for the layers below."""

    bias: Tensor | None
    layout: Tensor
    # Whose shapes a state may change: how many blocks are kept is not known before.
    _sized_by_state: tuple[str, ...] = ()

    def __init__(
        self, in_features: int, out_features: int, kind: list[int], bias: Tensor | None, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._layout = [LAYOUT_VERSION, *kind]
        self.register_buffer("layout", torch.tensor(self._layout, dtype=torch.int32, device=device))
        # Not a buffer that is None: torch.export takes the next one's place for its.
        if bias is None:
            self.bias = None
        else:
            self.register_buffer("bias", bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "layout")
        if found is not None:
            version, *kind = found.tolist()
            reference.check_version(version)
            if kind != self._layout[1:]:
                problem = f"is not served; {self._layout[1:]}, sizes and pattern of this layer, is"
                raise ValueError(f"{prefix}layout: {kind} {problem}")
            for name in self._sized_by_state:
                buffer, stored = getattr(self, name), state_dict.get(prefix + name)
                if stored is not None and stored.shape[1:] == buffer.shape[1:]:
                    setattr(self, name, buffer.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _rows(self, x: Tensor) -> Tensor:
        # The operators see kept columns alone, and could not tell.
        if x.shape[-1] != self.in_features:
            raise refusal("x.shape", tuple(x.shape), f"(..., {self.in_features})")
        return x.reshape(-1, self.in_features).contiguous()


class BlockSparseLinear(_SparseLinear):
    """A weight of which only blocks are stored, those that are not all zeros.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        block: side of a block, 32 or 64.
        bias: whether there is one.
        dtype: of weight and bias.
        device: of the buffers.
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor
    _sized_by_state = ("values", "columns")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: int = 64,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        weight = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        super().__init__(in_features, out_features, [in_features, out_features, block], zeros, weight.device)
        self.block = block
        for name, tensor in reference.pack_blocks(weight, block=block)._asdict().items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, *, block: int = 64
    ) -> BlockSparseLinear:
        """A layer of a weight ``(n, k)`` in its dtype.

        Args:
            weight: ``(n, k)``.
            mask: ``(n, k)`` bool; what it does not have is taken as zero.
            bias: ``(n,)``.
            block: side of a block; those that are not all zeros are kept.

        Raises:
            ValueError: a side, shape or mask that is not served.
        """
        packed = reference.pack_blocks(weight, mask, block=block)
        channels, columns = weight.shape
        kind: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        made = cls(columns, channels, block, bias=bias is not None, **kind)
        made.values, made.columns, made.offsets = packed
        _keep_bias(made, bias, weight.dtype)
        return made

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None, *, block: int = 64) -> BlockSparseLinear:
        """As ``from_dense``, with the layer's weight and bias."""
        return cls.from_dense(linear.weight, mask, linear.bias, block=block).train(linear.training)

    @property
    def density(self) -> float:
        """Share of blocks that are kept."""
        down, across = reference.block_counts((self.out_features, self.in_features), self.block)
        return len(self.values) / (down * across)

    def dense(self) -> Tensor:
        """The weight ``(n, k)`` that the layer works with, zeros included."""
        packed = Blocks(self.values, self.columns, self.offsets)
        return reference.unpack_blocks(packed, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)`` of x's dtype, which is that of the weight.

        Raises:
            ValueError: x with other than ``in_features``, or what ``block_sparse_linear`` does not serve.
        """
        weight = (self.values, self.columns, self.offsets)
        y = block_sparse_linear(self._rows(x), *weight, self.bias, channels=self.out_features)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, block={self.block}, density={self.density:.3g}"


class SharedPatternLinear(_SparseLinear):
    """N of every M columns stored, the same ones for each tile of output channels.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        n, m: of the pattern.
        tile: channels that share one, 64 or 128.
        bias: whether there is one.
        dtype: of weight and bias.
        device: of the buffers.
    """

    values: Tensor
    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        m: int,
        tile: int = 128,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        weight = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        super().__init__(in_features, out_features, [in_features, out_features, n, m, tile], zeros, weight.device)
        self.n, self.m, self.tile = n, m, tile
        for name, tensor in reference.pack_shared(weight, n=n, m=m, tile=tile)._asdict().items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        n: int,
        m: int,
        tile: int = 128,
    ) -> SharedPatternLinear:
        """A layer of a weight ``(n, k)`` in its dtype.

        Args:
            weight: ``(n, k)``.
            mask: ``(n, k)`` bool, as ``shared_mask`` gives one; what it does not have is taken as zero.
            bias: ``(n,)``.
            n, m, tile: as of the constructor.

        Raises:
            ValueError: a pattern, shape or mask that is not served, or a weight that does not hold the pattern.
        """
        packed = reference.pack_shared(weight, mask, n=n, m=m, tile=tile)
        channels, columns = weight.shape
        kind: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        made = cls(columns, channels, n, m, tile, bias=bias is not None, **kind)
        made.values, made.indices = packed
        _keep_bias(made, bias, weight.dtype)
        return made

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | None = None, *, n: int, m: int, tile: int = 128
    ) -> SharedPatternLinear:
        """As ``from_dense``, with the layer's weight and bias."""
        return cls.from_dense(linear.weight, mask, linear.bias, n=n, m=m, tile=tile).train(linear.training)

    def dense(self) -> Tensor:
        """The weight ``(n, k)`` that the layer works with, zeros included."""
        return reference.unpack_shared(Shared(self.values, self.indices), self.in_features, tile=self.tile)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)`` of x's dtype, which is that of the weight.

        Raises:
            ValueError: x with other than ``in_features``, or what ``shared_pattern_linear`` does not serve.
        """
        y = shared_pattern_linear(self._rows(x), self.values, self.indices, self.bias, tile=self.tile)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.n}:{self.m}, tile={self.tile}"


class SemiStructuredLinear(_SparseLinear):
    """2:4 on torch's own kernels for sparse tensor cores, which Triton does not reach.

    The dense weight stays beside the compressed one: it is the state, and what a CPU computes with.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        bias: whether there is one.
        backend: ``sparse``, refused where torch has no kernel; ``dense``, a product with the masked weight; ``auto``,
            dense on a CPU and sparse elsewhere.
        dtype: of weight and bias.
        device: of the buffers.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        backend: str = "auto",
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise refusal("backend", backend, " or ".join(BACKENDS))
        weight = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        super().__init__(in_features, out_features, [in_features, out_features, 2, 4], zeros, weight.device)
        self.backend = backend
        self.register_buffer("weight", weight)
        self._compressed: Tensor | None = None

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, *, backend: str = "auto"
    ) -> SemiStructuredLinear:
        """A layer of a weight ``(n, k)`` in its dtype.

        Args:
            weight: ``(n, k)``.
            mask: ``(n, k)`` bool; what it does not have is taken as zero.
            bias: ``(n,)``.
            backend: as of the constructor.

        Raises:
            ValueError: a shape or mask that is not served, a weight that does not hold the pattern, or a backend that
                has no kernel for it.
        """
        weight = reference.masked(weight, mask)
        if not reference.holds_pattern(weight, 2, 4):
            raise ValueError("weight: more than 2 of 4 neighbouring columns of a row is not served; 2 of 4 is")
        channels, columns = weight.shape
        kind: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        made = cls(columns, channels, bias=bias is not None, backend=backend, **kind)
        made.weight = weight.clone()
        if made.runs == "sparse":
            check_semi_structured(made.weight)
        _keep_bias(made, bias, weight.dtype)
        return made

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | None = None, *, backend: str = "auto"
    ) -> SemiStructuredLinear:
        """As ``from_dense``, with the layer's weight and bias."""
        return cls.from_dense(linear.weight, mask, linear.bias, backend=backend).train(linear.training)

    @property
    def runs(self) -> str:
        """``sparse`` or ``dense``: what a call does where the weight is now."""
        if self.backend == "auto":
            return "dense" if self.weight.device.type == "cpu" else "sparse"
        return self.backend

    def dense(self) -> Tensor:
        """The weight ``(n, k)`` that the layer works with, zeros included."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)`` of x's dtype, which is that of the weight.

        Raises:
            ValueError: x with other than ``in_features``, or a weight for which torch has no sparse kernel.
        """
        rows, weight = self._rows(x), self.weight
        if self.runs == "sparse":
            weight = self._compress()
        return functional.linear(rows, weight, self.bias).reshape(*x.shape[:-1], self.out_features)

    def _compress(self) -> Tensor:
        if self._compressed is None:
            check_semi_structured(self.weight)
            self._compressed = torch.sparse.to_sparse_semi_structured(self.weight)
        return self._compressed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SemiStructuredLinear:
        self._compressed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._compressed = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, backend={self.backend}"


def check_semi_structured(weight: Tensor) -> None:
    """Raises ValueError where torch has no kernel for a 2:4 weight ``(n, k)``; names why."""
    if weight.dtype not in SEMI_STRUCTURED_DTYPES:
        raise refusal("weight.dtype", weight.dtype, " or ".join(map(str, SEMI_STRUCTURED_DTYPES)))
    down, across = SEMI_STRUCTURED_SIDES
    if weight.shape[0] % down or weight.shape[1] % across:
        raise refusal("weight.shape", tuple(weight.shape), f"(n, k), multiples of {down} and {across},")
    if weight.device.type != "cuda":
        raise refusal("weight.device", weight.device, "cuda (backend='dense' runs anywhere)")
    if not torch.backends.cusparselt.is_available():
        raise refusal("torch", torch.__version__, "a build with cuSPARSELt")
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise refusal("weight.device", torch.cuda.get_device_name(weight.device), "compute capability 8.0 or higher")


def _keep_bias(made: _SparseLinear, bias: Tensor | None, dtype: torch.dtype) -> None:
    if bias is None:
        return
    if bias.shape != (made.out_features,):
        raise refusal("bias.shape", tuple(bias.shape), f"(n,) with n = {made.out_features} of weight")
    made.bias = bias.detach().to(dtype).clone()

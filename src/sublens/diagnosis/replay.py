"""Recomputing tensors of a finished forward pass from what its graph kept for the backward pass.

An autograd graph does not hold the results of its operations, only what their derivatives need. For the usual losses
and gates that is enough to compute the result again; where it is not, the answer is ``None`` and nobody guesses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from sublens.diagnosis.graph import RESHAPES, Edge, dtype_of, edges, kind, saved, shape_of

_DEPTH = 40
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}
_RESULT_IS_KEPT = frozenset(
    {"Sigmoid", "Tanh", "Exp", "Sqrt", "Rsqrt", "Reciprocal", "Relu", "Softmax", "LogSoftmax", "LinalgVectorNorm"}
)
_FUNCTION_OF_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Log": torch.log,
    "Log1P": torch.log1p,
    "LogSigmoid": F.logsigmoid,
    "Softplus": F.softplus,
}
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "MseLoss": F.mse_loss,
    "BinaryCrossEntropy": F.binary_cross_entropy,
    "BinaryCrossEntropyWithLogits": F.binary_cross_entropy_with_logits,
    "SmoothL1Loss": F.smooth_l1_loss,
    "HuberLoss": F.huber_loss,
}


class Replay:
    """Values of edges, as float64 tensors.

    Attributes:
        resolution: the coarsest relative rounding step among all values that were needed.
    """

    def __init__(self) -> None:
        self.resolution = 0.0
        self._values: dict[Edge, Tensor | None] = {}

    def value(self, edge: Edge | None, depth: int = 0) -> Tensor | None:
        """The edge's tensor, or ``None`` where the graph does not hold enough."""
        if edge is None or depth > _DEPTH:
            return None
        if edge not in self._values:
            try:
                with torch.no_grad():
                    self._values[edge] = self._compute(edge, depth)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                self._values[edge] = None  # an operation that keeps other things than expected: not known, then
            dtype = dtype_of(edge)
            if dtype is not None and dtype.is_floating_point:
                self.resolution = max(self.resolution, torch.finfo(dtype).eps)
        return self._values[edge]

    def _compute(self, edge: Edge, depth: int) -> Tensor | None:
        node, name = edge[0], kind(edge[0])
        if name == "Accumulate":
            return _double(node.variable)  # type: ignore[attr-defined]
        if name in _RESULT_IS_KEPT:
            return _double(saved(node, "result"))
        if name in _FUNCTION_OF_INPUT:
            kept = _double(saved(node, "self"))
            return None if kept is None else _FUNCTION_OF_INPUT[name](kept)
        if name in _LOSSES:
            return self._loss(node, name)
        if name == "NllLoss" or name == "NllLoss2D":
            weight = _double(saved(node, "weight"))
            ignored = int(_signed(saved(node, "ignore_index")))
            kept, target = _double(saved(node, "self")), saved(node, "target")
            if kept is None:
                return None
            return F.nll_loss(kept, target, weight, ignore_index=ignored, reduction=_reduction(node))
        operands = edges(node)
        if name in ("Add", "Sub"):
            first, second = (self.value(operand, depth + 1) for operand in operands)
            if first is None or second is None:
                return None
            return first + second * (saved(node, "alpha") or 1) * (1 if name == "Add" else -1)
        if name in ("Mul", "Div"):
            return self._product(node, name, operands, depth)
        return self._unary(edge, name, self.value(operands[0], depth + 1) if operands else None)

    def _loss(self, node: Node, name: str) -> Tensor | None:
        kept, target = _double(saved(node, "self")), _double(saved(node, "target"))
        if kept is None or target is None:
            return None
        extra = {key: _double(saved(node, key)) for key in ("weight", "pos_weight") if hasattr(node, f"_saved_{key}")}
        extra = {key: value for key, value in extra.items() if value is not None}
        numbers = {key: saved(node, key) for key in ("beta", "delta") if hasattr(node, f"_saved_{key}")}
        return _LOSSES[name](kept, target, reduction=_reduction(node), **extra, **numbers)

    def _product(self, node: Node, name: str, operands: list[Edge | None], depth: int) -> Tensor | None:
        factors = []
        for operand, key in zip([*operands, None][:2], ("self", "other"), strict=True):
            kept = saved(node, key)
            factors.append(_double(kept) if kept is not None else self.value(operand, depth + 1))
        first, second = factors
        if first is None or second is None:
            return None
        return first * second if name == "Mul" else first / second

    def _unary(self, edge: Edge, name: str, below: Tensor | None) -> Tensor | None:
        node = edge[0]
        if name == "Pow":
            kept = _double(saved(node, "self"))
            return None if kept is None else kept ** saved(node, "exponent")
        if below is None:
            return None
        if name == "Neg":
            return -below
        if name in ("Sum", "Mean"):
            dims = saved(node, "dim")
            if dims is None:
                return below.sum() if name == "Sum" else below.mean()
            dims = [_signed(dim) for dim in dims]
            reduce = torch.sum if name == "Sum" else torch.mean
            return reduce(below, dims, keepdim=saved(node, "keepdim"))
        if name == "MaskedFill":  # the filling is not kept: known only where nothing was filled
            return None if bool(saved(node, "mask").any()) else below
        if name == "Select":
            return below.select(_signed(saved(node, "dim")), _signed(saved(node, "index")))
        if name == "Gather":
            return below.gather(_signed(saved(node, "dim")), saved(node, "index"))
        if name == "Index":
            return below[tuple(slice(None) if index is None else index for index in saved(node, "indices"))]
        if name == "T":
            return below.t()
        if name in ("Transpose", "Permute", "Expand"):
            return None
        shape = shape_of(edge)
        return below.reshape(shape) if name in RESHAPES and shape is not None else None


def _double(value: Any) -> Tensor | None:
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float64)
    return value.detach().double() if isinstance(value, Tensor) and not value.is_complex() else None


def _reduction(node: Node) -> str:
    return _REDUCTIONS[int(saved(node, "reduction"))]


def _signed(value: int) -> int:
    """Negative dimensions come back from the graph as huge unsigned numbers."""
    return value - 2**64 if value >= 2**63 else value

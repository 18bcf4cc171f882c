"""Reading an autograd graph: which leaves a loss reaches, and the additive terms that it is made of.

Nothing here runs a backward pass except :func:`gradient_at`, which leaves no trace in any ``.grad``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Edge = tuple[Node, int]

# Operations that only change form. They neither mix elements nor change their values.
# fmt: off
RESHAPES = frozenset({
    "View", "ReshapeAlias", "UnsafeView", "Alias", "Clone", "ToCopy", "Squeeze", "Unsqueeze", "T", "Transpose",
    "Permute", "Contiguous", "Expand",
})
LINEAR = RESHAPES | {
    "Accumulate", "Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Sum", "Mean", "Stack", "Cat", "Select", "Slice", "Split",
    "Unbind",
}
_HINGES = frozenset({"Clamp", "ClampMin", "ClampMax", "Hardtanh", "Relu", "Softplus"})
_MONOTONE = _HINGES | {"Sigmoid", "LogSigmoid", "Exp", "Tanh", "Hardsigmoid"}
_OTHER_PENALTIES = frozenset({
    "Pow", "Abs", "Log", "Log1P", "Sqrt", "Reciprocal", "Norm", "LinalgVectorNorm", "Maximum", "Xlogy",
})
# fmt: on


def kind(node: Node) -> str:
    """The operation's name without ``Backward`` and version: ``"Add"``, ``"Sigmoid"``, ``"Accumulate"`` for a leaf."""
    if hasattr(node, "variable"):
        return "Accumulate"
    return str(node.name()).partition("Backward")[0]


def saved(node: Node, name: str) -> Any:
    """A value that the operation kept for its backward pass; ``None`` if it has none, or if the graph was freed."""
    try:
        return getattr(node, f"_saved_{name}", None)
    except RuntimeError:
        return None


def edges(node: Node) -> list[Edge | None]:
    """The operation's operands in order; ``None`` where an operand takes no gradient."""
    return [None if below is None else (below, number) for below, number in node.next_functions]


def shape_of(edge: Edge) -> torch.Size | None:
    """Shape of the tensor that the edge stands for, if it can be known."""
    meta = _metadata(edge)
    return None if meta is None else torch.Size(meta.shape)


def dtype_of(edge: Edge) -> torch.dtype | None:
    """Number type of the tensor that the edge stands for, if it can be known."""
    meta = _metadata(edge)
    return None if meta is None else meta.dtype


def _metadata(edge: Edge) -> Any:
    node, number = edge
    if hasattr(node, "variable"):
        return node.variable
    try:
        return node._input_metadata[number]
    except (AttributeError, IndexError):
        return None


class Graph:
    """Everything between a loss and the leaves that its gradient would reach.

    Attributes:
        names: the logits' names. A set of logits is an integer with bit i for ``names[i]``.
        nodes: the operations, the loss's own first, and none before an operation that uses its result.
        leaves: every leaf that would get a gradient, logits included.
    """

    def __init__(self, loss: Tensor, logits: Mapping[str, Tensor]) -> None:
        self.names = list(logits)
        self._leaf_bits = {id(t): 1 << i for i, t in enumerate(logits.values()) if t.grad_fn is None}
        self._node_bits = {t.grad_fn: 1 << i for i, t in enumerate(logits.values()) if t.grad_fn is not None}
        self.nodes: list[Node] = []
        self.leaves: list[Tensor] = []
        self._reach: dict[Node, int] = {}
        self.root: Edge | None = None if loss.grad_fn is None else (loss.grad_fn, loss.output_nr)
        self._walk()

    def _walk(self) -> None:
        if self.root is None:
            return
        seen: set[Node] = set()
        pending: list[tuple[Node, bool]] = [(self.root[0], False)]
        while pending:  # depth first without recursion: a recurrent network's graph is thousands of operations deep
            node, finished = pending.pop()
            if finished:
                self._finish(node)
            elif node not in seen:
                seen.add(node)
                pending.append((node, True))
                if node not in self._node_bits:  # what lies below a logit that is no leaf is the logit's own affair
                    pending += [(edge[0], False) for edge in edges(node) if edge is not None]
        self.nodes.reverse()

    def _finish(self, node: Node) -> None:
        reach = self._node_bits.get(node, 0)
        if hasattr(node, "variable"):
            self.leaves.append(node.variable)
            reach |= self._leaf_bits.get(id(node.variable), 0)
        elif not reach:
            for edge in edges(node):
                if edge is not None:
                    reach |= self._reach.get(edge[0], 0)
        self._reach[node] = reach
        self.nodes.append(node)

    def reach(self, edge: Edge | None) -> int:
        """The set of logits that the edge's tensor depends on."""
        return 0 if edge is None else self._reach.get(edge[0], 0)

    @property
    def reached(self) -> int:
        """The set of logits that the loss depends on."""
        return self.reach(self.root)

    def below(self, edge: Edge) -> Iterator[Node]:
        """The operations that the edge's tensor was made by, the last one first."""
        seen, pending = set(), [edge[0]]
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                yield node
                if node not in self._node_bits:
                    pending += [next_edge[0] for next_edge in edges(node) if next_edge is not None]

    def bits(self, logits: int) -> list[str]:
        """Names in a set of logits."""
        return [name for i, name in enumerate(self.names) if logits >> i & 1]


@dataclass(frozen=True)
class Term:
    """One additive term of the loss: ``coefficient * value(edge)``.

    Attributes:
        edge: where the term's gradient starts.
        coefficient: the number that the loss multiplies it by.
        penalty: whether it is made of logits alone, by sums and elementwise functions, with no data and no weights.
        linear: a penalty that is linear in the logits, and so has no lower bound.
        monotone: a penalty that only ever pushes in one direction, wherever the logits are.
        logarithms: the operations that take logarithms of keep probabilities, unless something curved or a product of
            two things that are learned comes after them.
    """

    edge: Edge
    coefficient: float
    penalty: bool
    linear: bool
    monotone: bool
    logarithms: tuple[Node, ...] = ()


def terms_of(graph: Graph) -> tuple[list[Term], int, bool]:
    """The loss taken apart at its additions.

    Returns:
        the terms that take gradient; how many operands of these additions take none (numbers, or detached tensors);
        and whether one of these is certainly a number that was written down, as in ``1 - similarity``.
    """
    if graph.root is None:
        return [], 0, False
    terms: list[Term] = []
    constants, written = 0, False
    pending: list[tuple[Edge | None, float]] = [(graph.root, 1.0)]
    while pending:
        edge, coefficient = pending.pop()
        if edge is None:
            constants += 1
            continue
        parts = _parts(edge)
        if parts is None:
            terms.append(_classify(graph, edge, coefficient))
            continue
        if kind(edge[0]) == "Rsub":  # number - tensor: the number is no operand in the graph
            constants, written = constants + 1, True
        pending += [(below, coefficient * factor) for below, factor in parts]
    return terms, constants, written


def _parts(edge: Edge) -> list[tuple[Edge | None, float]] | None:
    """Operands and their factors if this is a sum, difference or multiple of scalars; otherwise ``None``."""
    node, operands, name = edge[0], edges(edge[0]), kind(edge[0])
    shape = shape_of(edge)
    if shape is None or shape.numel() != 1:
        return None
    if name in ("Add", "Sub", "Rsub"):
        alpha = _number(saved(node, "alpha"))
        alpha = 1.0 if alpha is None else alpha
        if name == "Rsub":
            return [(operands[0], -alpha)]
        signed = alpha if name == "Add" else -alpha
        return [(operand, factor) for operand, factor in zip(operands, (1.0, signed), strict=False)]
    if name == "Neg":
        return [(operands[0], -1.0)]
    if name in ("Mul", "Div"):
        return _multiple(node, operands, name)
    if name in ("Sum", "Mean") and operands[0] is not None and kind(operands[0][0]) == "Stack":
        stacked = edges(operands[0][0])
        return [(operand, 1.0 if name == "Sum" else 1.0 / len(stacked)) for operand in stacked]
    if name in RESHAPES and operands[0] is not None:
        inner = shape_of(operands[0])
        if inner is not None and inner.numel() == 1:
            return [(operands[0], 1.0)]
    return None


def _multiple(node: Node, operands: list[Edge | None], name: str) -> list[tuple[Edge | None, float]] | None:
    live = [operand for operand in operands if operand is not None]
    if len(live) != 1:
        return None
    other_first = operands[0] is None
    if other_first and name == "Div":  # number / tensor is no multiple
        return None
    factor = _number(saved(node, "self" if other_first else "other"))
    if factor is None or (name == "Div" and factor == 0):
        return None
    return [(live[0], factor if name == "Mul" else 1.0 / factor)]


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, int | float) else None


def _classify(graph: Graph, edge: Edge, coefficient: float) -> Term:
    penalty, linear, monotone, of_logarithms = graph.reach(edge) != 0, True, True, True
    logarithms: list[Node] = []
    for node in graph.below(edge):
        name = kind(node)
        if name == "Accumulate":
            # A single number beside the logits may be a multiplier that is learned with them.
            penalty = penalty and (graph.reach((node, 0)) != 0 or node.variable.numel() == 1)  # type: ignore[attr-defined]
        elif name in ("Mul", "Div"):
            lone, other = _multiplied(node)
            penalty = penalty and other <= 1
            linear, monotone, of_logarithms = linear and lone, monotone and lone, of_logarithms and lone
        elif name not in LINEAR:
            shape = shape_of((node, 0))
            hinge = name in _HINGES and shape is not None and shape.numel() == 1  # a target for the whole: no direction
            penalty = penalty and (name in _MONOTONE or name in _OTHER_PENALTIES)
            linear, monotone = False, monotone and name in _MONOTONE and not hinge
            if name in ("LogSigmoid", "Log"):
                logarithms.append(node)
                of_logarithms = of_logarithms and _is_of_probabilities(graph, node)
            else:
                above = any(kind(below) in ("LogSigmoid", "Log") for below in graph.below((node, 0)))
                of_logarithms = of_logarithms and name == "Sigmoid" and not above
        if not penalty:
            return Term(edge, coefficient, False, False, False)
    found = [node for node in logarithms if of_logarithms and graph.reach((node, 0))]
    return Term(edge, coefficient, penalty, linear, monotone, tuple(found))


def _is_of_probabilities(graph: Graph, logarithm: Node) -> bool:
    """Whether it is that of a sigmoid of something linear in its leaves."""
    (operand, *_) = edges(logarithm)
    if operand is not None and kind(logarithm) == "Log":
        if kind(operand[0]) != "Sigmoid":
            return False
        (operand, *_) = edges(operand[0])
    return operand is not None and all(kind(node) in LINEAR for node in graph.below(operand))


def _multiplied(node: Node) -> tuple[bool, int]:
    """Whether just one operand of a product takes gradient, and how many elements the constant operand has."""
    operands = edges(node)
    if len(operands) == 1:  # times a Python number
        return True, 1
    if all(operand is not None for operand in operands):
        return False, 1
    other = saved(node, "self" if operands[0] is None else "other")
    return operands[0] is not None or kind(node) == "Mul", other.numel() if isinstance(other, Tensor) else 1


def gradient_at(
    starts: Sequence[tuple[Edge, Tensor | float]], targets: Sequence[Tensor | GradientEdge], *, device: torch.device
) -> list[Tensor | None]:
    """Gradient of the sum of ``(factor * edge).sum()`` with respect to the targets. Leaves every ``.grad`` as it is."""
    outputs, factors = [], []
    for edge, factor in starts:
        meta = _metadata(edge)
        outputs.append(GradientEdge(*edge))
        device_of = getattr(meta, "device", device)
        if isinstance(factor, Tensor):
            factors.append(factor.to(device_of, meta.dtype))
        else:
            factors.append(torch.full(tuple(meta.shape), factor, dtype=meta.dtype, device=device_of))
    wanted: Any = list(targets)  # torch takes tensors and edges together, and does not say so
    return list(torch.autograd.grad(outputs, wanted, factors, retain_graph=True, allow_unused=True))

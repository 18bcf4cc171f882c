"""What the gates do: which way they open, whether they can still move, and whether each has noise of its own.

Gates are found as the products of something that depends on one logit tensor with a constant of as many elements: the
frozen weights. Relaxed samples are found as results in (0, 1) with the logits' shape (see :mod:`.shared_noise`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from sublens.diagnosis.findings import Finding
from sublens.diagnosis.graph import LINEAR, RESHAPES, Edge, Graph, edges, gradient_at, kind, saved, shape_of
from sublens.diagnosis.inputs import listed

_SATURATED = 15.0  # sigmoid(15) * (1 - sigmoid(15)) is 3e-7: below float32 rounding of anything it is added to
_CERTAIN = 4.6  # a keep probability of 0.99; or, below zero, of 0.01
_SPREAD = 0.05  # standard deviation of logits that begin at one value, with some noise
_SCORE_SLOPE = 0.3  # a mean slope that no sigmoid of temperature 1 has: the scores are no log-odds


@dataclass(frozen=True)
class Use:
    """A place where gates meet weights: ``product`` multiplies ``gate`` by a constant, ``weight``."""

    name: str
    product: Node
    gate: Edge
    weight: Tensor


def uses_of(graph: Graph, logits: Mapping[str, Tensor]) -> list[Use]:
    """Where each logit tensor's gates meet weights. The outermost product, so that noise is not taken for weights."""
    found: list[Use] = []
    inside: set[Node] = set()
    for node in graph.nodes:  # the loss's side first
        if node in inside or kind(node) != "Mul":
            continue
        operands = edges(node)
        if len(operands) != 2:
            continue
        live = [operand for operand in operands if operand is not None and graph.reach(operand)]
        names = graph.bits(graph.reach((node, 0)))
        if len(live) != 1 or len(names) != 1:
            continue
        logit = logits[names[0]]
        constant = saved(node, "self" if operands[1] == live[0] else "other")
        if shape_of(live[0]) == logit.shape and isinstance(constant, Tensor) and constant.numel() >= logit.numel():
            found.append(Use(names[0], node, live[0], constant.detach()))
            inside.update(graph.below(live[0]))
    return found


def slopes_of(uses: list[Use], logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d gate / d logit of every element, added up over the uses of each logit tensor. Only what torch can compute."""
    slopes: dict[str, Tensor] = {}
    for use in uses:
        target = logits[use.name]
        try:
            (slope,) = gradient_at([(use.gate, 1.0)], [target], device=target.device)
        except (RuntimeError, TypeError, AttributeError):
            continue
        if slope is not None:
            slopes[use.name] = slopes[use.name] + slope if use.name in slopes else slope
    return slopes


def orientation_of(slopes: Mapping[str, Tensor]) -> int:
    """-1 if gates are seen to shut as their logits grow (a loop with the opposite convention), otherwise 1."""
    return -1 if sum(float(slope.double().sum()) for slope in slopes.values()) < 0 else 1


def scores_of(slopes: Mapping[str, Tensor]) -> set[str]:
    """Names of what is learned but is no log-odds of a keep probability, by its slopes."""
    return {name for name, slope in slopes.items() if float(slope.abs().mean()) >= _SCORE_SLOPE}


def gate_checks(
    graph: Graph, logits: Mapping[str, Tensor], uses: list[Use], slopes: Mapping[str, Tensor]
) -> tuple[list[Finding], list[Finding]]:
    """Findings and notes on saturated logits, gates that cannot shut, and gates that are all open or all shut."""
    findings: list[Finding] = []
    notes: list[Finding] = []
    scores = scores_of(slopes)
    logits = {name: logit for name, logit in logits.items() if name not in scores}
    _saturation(logits, findings, notes)
    findings += _sigmoid_twice(graph, uses)
    values = [logit.detach().flatten() for logit in logits.values()]
    size = sum(value.numel() for value in values)
    if size == 0:
        return findings, notes
    lowest = min(float(value.min()) for value in values if value.numel())
    highest = max(float(value.max()) for value in values if value.numel())
    flip = orientation_of(slopes)
    all_high, all_low = lowest >= _CERTAIN, highest <= -_CERTAIN
    if all_high or all_low:
        opened = all_high == (flip > 0)
        findings.append(_all_gates(opened, f"All {size} logits lie between {lowest:.4g} and {highest:.4g}"))
    elif (shut := _seen_shut(graph, uses)) and set(shut) == {use.name for use in uses}:
        findings.append(_all_gates(False, f"All masked weights of {listed(shut)} are exactly 0 in this forward pass"))
    elif shut:
        notes.append(
            Finding(
                "layer-shut",
                f"All masked weights of {listed(shut)} are exactly 0 in this forward pass.",
                "Nothing passes through that layer, so little or no gradient reaches the layers around it.",
                "Start with a higher keep probability, or lower alpha, unless the layer is meant to go.",
            )
        )
    middle = sum(float(value.sum(dtype=torch.float64)) for value in values) / size
    spread = math.sqrt(sum(float((value - middle).square().sum(dtype=torch.float64)) for value in values) / size)
    if 0.5 < middle < 1.0 and spread <= _SPREAD:
        all_are = f"are {lowest:.4g}" if lowest == highest else f"lie around {middle:.3g}, within {spread:.2g} or so"
        notes.append(
            Finding(
                "probability-as-logit",
                f"All logits {all_are}, which is a keep probability of {_sigmoid(middle):.3f}.",
                f"If {middle:.3g} was meant as the keep probability, gates are shut far more often than intended.",
                "The logit of p is log(p / (1 - p)):\n    start = torch.full(shape, math.log(p / (1 - p)))",
            )
        )
    return findings, notes


def _saturation(logits: Mapping[str, Tensor], findings: list[Finding], notes: list[Finding]) -> None:
    stuck: dict[str, int] = {}
    for name, logit in logits.items():
        far = logit.detach().abs() > _SATURATED
        if count := int(far.sum()):
            stuck[name] = count
    if not stuck:
        return
    total, size = sum(stuck.values()), sum(logit.numel() for logit in logits.values())
    whole = [name for name, count in stuck.items() if count == logits[name].numel() and count > 1]
    saturated = Finding(
        "logits-saturated",
        f"{total} of {size} logits are beyond {_SATURATED:g} in size ({listed(list(stuck))}).",
        f"At {_SATURATED:g} the sigmoid's slope is 3e-7, and in float32 it soon rounds to 0: these gates get no "
        "gradient from the task and stay as they are, open or shut. An unbounded penalty does that, or a high start.",
        "Start near the logit of the keep probability (2.197 for 0.9), and bound the logits after each step:\n"
        "    with torch.no_grad(): logit.clamp_(-10, 10)",
    )
    (findings if 2 * total > size or whole else notes).append(saturated)


def _sigmoid_twice(graph: Graph, uses: list[Use]) -> list[Finding]:
    """Gates whose logits went through a sigmoid before: those lie above 0, so that no gate can shut."""
    floors: list[Tensor] = []
    names: list[str] = []
    for use in uses:
        for node in graph.below(use.gate):
            floor = _floor(graph, node) if kind(node) == "Sigmoid" else None
            if floor is not None and floor.numel():
                floors.append(floor)
                names.append(use.name)
    if not floors:
        return []
    # Where the inner sigmoid is 0 the outer one's log-odds are noise around 0. If a number is taken off the inner one,
    # as to squash logits into an interval or to put a threshold, they lie elsewhere, and that is sound. Medians, since
    # samples of low temperatures are rounded to 0 and 1.
    everything = torch.cat(floors)
    middle = float(everything.median())
    spread = float((everything - middle).abs().median()) * 1.4826  # a standard deviation, were they normal
    error = 2 * 1.2533 * spread / math.sqrt(everything.numel())
    if error > 0.3 or abs(middle) > max(error, 1e-3):
        return []
    return [
        Finding(
            "sigmoid-twice",
            f"The gates of {listed(list(dict.fromkeys(names)))} are sigmoids of sigmoids.",
            "A probability is taken for a logit: what comes out of the first sigmoid lies between 0 and 1, so the "
            "second never gives a keep probability below 0.5, and no penalty can shut a gate.",
            "Give the logit itself to the gate:\n    soft = torch.sigmoid((logit + noise) / temperature)",
        )
    ]


def _floor(graph: Graph, outer: Node) -> Tensor | None:
    """Log-odds of the outer sigmoid's result were the inner one 0, in multiples of the inner one's factor, flat."""
    (operand, *_) = edges(outer)
    inner = None if operand is None else _sigmoid_within(graph, operand)
    if operand is None or inner is None:
        return None
    above, below = saved(outer, "result"), saved(inner, "result")
    if not isinstance(above, Tensor) or not isinstance(below, Tensor) or above.shape != below.shape:
        return None
    try:
        (factor,) = gradient_at([(operand, 1.0)], [GradientEdge(inner, 0)], device=above.device)
    except (RuntimeError, TypeError, AttributeError):
        return None
    if factor is None or factor.shape != below.shape or not bool((factor > 0).all()):
        return None
    return (torch.logit(above.detach().double(), eps=1e-7) / factor.double() - below.detach().double()).flatten().cpu()


def _sigmoid_within(graph: Graph, operand: Edge) -> Node | None:
    """The sigmoid of logits that the operand is made of by sums and factors alone."""
    pending: list[Edge | None] = [operand]
    while pending:
        edge = pending.pop()
        if edge is None or not graph.reach(edge):
            continue
        if kind(edge[0]) == "Sigmoid":
            return edge[0]
        if kind(edge[0]) in LINEAR and not hasattr(edge[0], "variable"):
            pending += edges(edge[0])
    return None


def _all_gates(opened: bool, seen: str) -> Finding:
    return Finding(
        "gates-open" if opened else "gates-shut",
        f"{seen}: every gate is {'open' if opened else 'shut'}.",
        "Samples that are all alike say nothing about which weights matter, and at such logits the relaxed gate has "
        "almost no slope. "
        + ("The mask is the whole network." if opened else "Nothing passes through the network, forward or backward."),
        "Start the logits at the keep probability's logit, for example 2.197 for 0.9, and draw noise for each gate:\n"
        "    logits = torch.full_like(weight, math.log(0.9 / 0.1)).requires_grad_()",
    )


def _seen_shut(graph: Graph, uses: list[Use]) -> list[str]:
    """Names whose masked weights an operation kept, all of them zero (and the weights themselves are not)."""
    shut = {use.name for use, masked in _masked_weights(graph, uses) if not bool(masked.any())}
    return sorted(shut, key=graph.names.index)


def _masked_weights(graph: Graph, uses: list[Use]) -> Iterator[tuple[Use, Tensor]]:
    """What operations behind the uses kept of their products, as it lies there: the weights' shape, or transposed."""
    parents: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        for edge in edges(node):
            if edge is not None:
                parents.setdefault(edge[0], []).append(node)
    for use in uses:
        shape, pending = shape_of((use.product, 0)), list(parents.get(use.product, []))
        while pending:
            node = pending.pop()
            if kind(node) in RESHAPES:
                pending += parents.get(node, [])
                continue
            for key in ("mat2", "self", "weight", "other"):
                kept = saved(node, key)
                if isinstance(kept, Tensor) and shape in (kept.shape, kept.shape[::-1]):
                    yield use, kept.detach()


def reversed_gates(
    graph: Graph, uses: list[Use], slopes: Mapping[str, Tensor], logits: Mapping[str, Tensor]
) -> list[Finding]:
    """Gates that open with their samples, and whose gradient says that they shut; or the other way round."""
    found: list[str] = []
    for use, masked in _masked_weights(graph, uses):
        shape = logits[use.name].shape
        nodes = (node for node in graph.below(use.gate) if kind(node) == "Sigmoid" and shape_of((node, 0)) == shape)
        sample, slope = next(nodes, None), slopes.get(use.name)
        soft = None if sample is None else saved(sample, "result")
        if sample is None or slope is None or not isinstance(soft, Tensor) or use.weight.shape != shape:
            continue
        masked = masked if masked.shape == shape else masked.t()
        soft, known = soft.detach().double(), (use.weight != 0) & masked.isfinite()
        try:
            (of_sample,) = gradient_at([((sample, 0), 1.0)], [logits[use.name]], device=masked.device)
        except (RuntimeError, TypeError, AttributeError):
            continue
        gate, soft = (masked.double() / use.weight.double())[known], soft[known]
        if of_sample is None or gate.numel() < 16 or float(gate.std()) < 0.05 or float(soft.std()) < 1e-3:
            continue
        along = float(torch.corrcoef(torch.stack([gate, soft]))[0, 1])
        told = float(slope.double().sum()) * float(of_sample.double().sum())
        if abs(along) > 0.5 and along * told < 0:
            found.append(use.name)
    if not found:
        return []
    return [
        Finding(
            "gradient-reversed",
            f"The gates of {listed(list(dict.fromkeys(found)))} grow with their soft samples, and their gradient says "
            "that they fall.",
            "Every step moves the logits against the task and the penalty: needed gates shut, and the penalty opens "
            "gates. Usually the sign in the straight-through term is turned around.",
            "The soft sample is added with its gradient, and taken off without:\n"
            "    gate = hard + soft - soft.detach()",
        )
    ]


def _sigmoid(logit: float) -> float:
    return float(torch.sigmoid(torch.tensor(logit)))

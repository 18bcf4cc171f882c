"""Does the loss reach the logits, through the task and not only through the penalty, and nothing else besides?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from sublens.diagnosis.findings import Finding
from sublens.diagnosis.graph import LINEAR, RESHAPES, Graph, Term, edges, gradient_at, kind, saved, terms_of
from sublens.diagnosis.inputs import listed, shapes
from sublens.diagnosis.replay import Replay

_STRAIGHT_THROUGH = "    gate = hard + soft - soft.detach()        # forward: hard, backward: soft"
_FUNCTIONAL = "    output = torch.func.functional_call(network, {name: weight.detach() * gate}, (x,))"
_BEHIND = "What lies behind this cannot be seen in the graph: mend it, then diagnose again."


def detached(seen: str) -> Finding:
    """The loss has no graph at all."""
    return Finding(
        "loss-detached",
        seen,
        "No gradient can flow from it, so no logit ever changes. The graph was cut somewhere: by torch.no_grad() or "
        "inference_mode() around the forward pass; by .detach(), .data, .item() or numpy; by writing masked weights "
        "into a frozen parameter through .data or copy_(); or by a hard threshold (logits > 0) that has no gradient. "
        "Or the loss calls the plain network, in which no gate is, in place of the masked one.",
        "Run the forward pass with gradients on, put the masked weights in per call, and let the gradient pass "
        f"the threshold:\n{_STRAIGHT_THROUGH}\n{_FUNCTIONAL}\n{_BEHIND}",
    )


def flagged(seen: str) -> Finding:
    """Someone called ``requires_grad_()`` on a result."""
    return Finding(
        "loss-flagged-by-hand",
        seen,
        "requires_grad_() silences the error that backward() would raise, and repairs nothing: the gradient ends in "
        "that very number, and no logit gets any of it.",
        "Take requires_grad_() away, and mend what cut the graph: no_grad() around the forward pass, .detach(), .data, "
        f"nn.Parameter(weight * gate), or a hard threshold without a gradient:\n{_STRAIGHT_THROUGH}\n{_FUNCTIONAL}\n"
        f"{_BEHIND}",
    )


@dataclass
class LossReading:
    """What was read off the loss: terms, the logits that the task reaches, and what there is to say about it.

    Attributes:
        task: terms that go through network and data. ``penalties``: those made of logits alone.
        constant: value of all that is added to the loss without gradient; ``None`` if it could not be worked out.
        trained: set of logits that the task reaches (or the whole loss, where the two cannot be told apart).
    """

    graph: Graph
    task: list[Term] = field(default_factory=list)
    penalties: list[Term] = field(default_factory=list)
    constant: float | None = 0.0
    constants: int = 0
    trained: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)


def read_loss(loss: Tensor, graph: Graph, logits: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> LossReading:
    """Everything that the graph alone tells (no backward pass)."""
    reading = LossReading(graph)
    terms, reading.constants, written = terms_of(graph)
    held = {id(tensor) for group in groups for tensor in group["params"]}
    by_hand = [leaf for leaf in (_lone_leaf(term) for term in terms) if leaf is not None and id(leaf) not in held]
    by_hand = [leaf for leaf in by_hand if all(leaf is not tensor for tensor in logits.values())]
    reading.penalties = [term for term in terms if term.penalty]
    reading.task = [term for term in terms if not term.penalty]
    reading.constant = _constant(loss, terms, reading.constants)
    if written and reading.constant and abs(reading.constant - round(reading.constant, 2)) < 1e-5:
        reading.constant = 0.0  # a loss such as 1 - similarity: that number is its own
    if by_hand:
        value = ", ".join(f"{float(leaf.detach()):.4g}" for leaf in by_hand[:3])
        reading.findings.append(
            flagged(f"The loss adds a number ({value}) that has no history and yet requires gradient by itself.")
        )
    for term in reading.task:
        reading.trained |= graph.reach(term.edge)
    if not reading.task and not reading.constant:
        reading.trained = graph.reached
    _unreached(reading, logits, held, by_hand)
    return reading


def _lone_leaf(term: Term) -> Tensor | None:
    leaf = getattr(term.edge[0], "variable", None)
    return leaf if isinstance(leaf, Tensor) and leaf.numel() == 1 else None


def _constant(loss: Tensor, terms: list[Term], constants: int) -> float | None:
    if constants == 0:
        return 0.0
    replay, total, size = Replay(), 0.0, abs(float(loss.detach()))
    for term in terms:
        value = replay.value(term.edge)
        if value is None or value.numel() != 1:
            return None
        total += term.coefficient * float(value)
        size += abs(term.coefficient * float(value))
    rest = float(loss.detach()) - total
    step = max(replay.resolution, torch.finfo(loss.dtype).eps)
    return rest if math.isfinite(rest) and abs(rest) > 32 * step * size else 0.0


def _unreached(reading: LossReading, logits: Mapping[str, Tensor], held: set[int], by_hand: list[Tensor]) -> None:
    graph = reading.graph
    ready = sum(1 << i for i, tensor in enumerate(logits.values()) if tensor.requires_grad)
    cut = ready & ~graph.reached  # no gradient at all
    penalised = ready & graph.reached & ~reading.trained  # only the penalty's
    known = {id(tensor) for tensor in [*logits.values(), *by_hand]}
    others = [leaf for leaf in graph.leaves if id(leaf) not in known]
    missing = graph.bits(cut | penalised)
    wanted = {tuple(logits[name].shape) for name in missing}
    twins = [leaf for leaf in others if tuple(leaf.shape) in wanted]
    if twins:
        reading.findings.append(_other_leaf(logits, missing, twins, penalised != 0))
    elif cut and not (by_hand and not reading.trained):
        reading.findings.append(_no_path(graph.bits(cut), len(logits), others))
    if penalised and not twins and not reading.trained:
        reading.findings.append(_penalty_alone(reading, graph.bits(penalised)))
    elif penalised and not twins:
        reading.notes.append(
            Finding(
                "penalty-alone-here",
                f"{listed(graph.bits(penalised))} get gradient from the penalty, and none from the task.",
                "The penalty alone shuts these gates. That is right for a layer that the forward pass does not use.",
                "If the forward pass does use it, look for what cuts its gate off: .detach(), .data, a threshold.",
            )
        )
    # A single number is a temperature or a multiplier that is learned beside the mask, and no network.
    rest = [leaf for leaf in others if leaf.numel() > 1 and all(leaf is not twin for twin in twins)]
    if rest and reading.trained:
        reading.findings += _others_train(rest, held)


def _other_leaf(logits: Mapping[str, Tensor], missing: list[str], twins: list[Tensor], penalised: bool) -> Finding:
    zeros = sum(int((leaf.detach() == 0).sum()) for leaf in twins)
    size = sum(leaf.numel() for leaf in twins)
    seen = (
        f"The {'task loss' if penalised else 'loss'} does not reach {listed(missing)}. Its gradient ends in "
        f"{len(twins)} other tensor(s) of the same shape: {shapes(twins)}"
    )
    seen += f", in which {zeros} of {size} elements are exactly 0, as after a mask." if zeros else "."
    return Finding(
        "gradient-in-other-leaf",
        seen,
        "nn.Parameter(weight * gate), .data = ... and .data.copy_(...) keep the values and drop their history: a new "
        "leaf begins there, and takes the gradient that is meant for the logits. The same is seen when the network is "
        "not frozen and the gate is a threshold without gradient, or the loss calls the plain network in place of the "
        "masked one.",
        "Never make a Parameter of masked weights. Put them in per call, from frozen weights:\n"
        f"{_STRAIGHT_THROUGH}\n{_FUNCTIONAL}",
    )


def _no_path(names: list[str], count: int, others: list[Tensor]) -> Finding:
    where = f" Its gradient ends in {len(others)} other leaves: {shapes(others)}." if others else ""
    partly = "" if len(names) == count else f", {len(names)} of {count} logit tensors"
    return Finding(
        "logits-unreached",
        f"The loss does not depend on {listed(names)}{partly}, as autograd sees it.{where}",
        "These logits get no gradient and stay as they are. Usual causes: a threshold (logits > 0), round() or argmax "
        "without a straight-through gradient; .detach() or .data; no_grad() around the gate; logits that were made "
        "again after the gate was; or a layer that the forward pass does not use.",
        f"Let the gradient pass:\n{_STRAIGHT_THROUGH}\nIf the layer is not used for this task, leave it out.",
    )


def _penalty_alone(reading: LossReading, names: list[str]) -> Finding:
    constant = f" The loss also holds a constant {reading.constant:.4g}." if reading.constant else ""
    return Finding(
        "task-unreached",
        f"Only the penalty reaches the logits ({listed(names)}); the task's part of the loss does not.{constant}",
        "The penalty alone moves the gates, all in one direction, whatever the task needs. The forward pass ran under "
        "no_grad(), its output was detached, the gate is a threshold without a gradient, or a MaskedNetwork is in "
        "evaluation mode.",
        "Call masked.train() if it is a MaskedNetwork. Run the forward pass with gradients on, and let them pass the "
        f"threshold:\n{_STRAIGHT_THROUGH}\n{_FUNCTIONAL}",
    )


def _others_train(others: list[Tensor], held: set[int]) -> list[Finding]:
    found = []
    training = [leaf for leaf in others if id(leaf) in held]
    collecting = [leaf for leaf in others if id(leaf) not in held]
    freeze = "Freeze all of it, by walking the parameters and not by name:\n    network.requires_grad_(False)"
    if training:
        found.append(
            Finding(
                "weights-training",
                f"The optimizer also holds {len(training)} tensor(s) that are no logits and get gradient: "
                f"{shapes(training)}.",
                "The network itself goes on training, so the mask is not a mask of the network that was trained.",
                f"{freeze}\n    optimizer = torch.optim.Adam(logits, lr=1e-2)      # the logits, and only they",
            )
        )
    if collecting:
        found.append(
            Finding(
                "weights-not-frozen",
                f"{len(collecting)} tensor(s) that are no logits require gradient and get it: {shapes(collecting)}.",
                "If some optimizer holds them, the network goes on training. If none does, nobody clears their "
                "gradients either: these pile up, enter clip_grad_norm_ over all parameters, and change the mask.",
                freeze,
            )
        )
    return found


def penalty_checks(reading: LossReading, logits: Mapping[str, Tensor], orientation: int, log_odds: bool) -> None:
    """Penalty detached, of the wrong sign, unbounded, or of the logits' size. Adds to the reading's findings and notes.

    Args:
        orientation: 1 if a gate opens as its logit grows, -1 if it shuts.
        log_odds: whether gates were seen, and have the slopes of sigmoids: 0 then is a keep probability of one half.
    """
    if reading.constant and reading.task and not reading.penalties:
        reading.findings.append(_penalty_detached(reading.constant))
    elif reading.constants and reading.constant is None and not reading.penalties:
        reading.notes.append(
            Finding(
                "constant-term",
                "Something without gradient is added to the loss, and no penalty that reaches the logits was seen.",
                "If that is the penalty, it is detached and shuts no gate. (It may be a harmless number: sum() of a "
                "list of losses begins with 0. This loss does not keep enough to work out which.)",
                "Check that penalty.requires_grad is True.",
            )
        )
    if reading.penalties and (reading.task or reading.constant):
        _penalty_direction(reading, logits, orientation)
    sizes = [term for term in reading.penalties if _is_size(term, reading.graph, logits)]
    if log_odds and sizes and len(sizes) == len(reading.penalties):  # beside a count it bounds the logits
        reading.notes.append(
            Finding(
                "penalty-of-size",
                "The penalty is of the logits' size (an L1 or L2 norm, or squares).",
                "It pulls every logit towards 0, which is a keep probability of one half, from above and from below: "
                "shut gates are opened, and the mask does not become sparse.",
                "Penalise open gates: alpha * sum(torch.sigmoid(logit).sum() for logit in logits)",
            )
        )


def _is_size(term: Term, graph: Graph, logits: Mapping[str, Tensor]) -> bool:
    """Whether the term is made of even functions of the logits and nothing else, and pulls them towards 0."""
    nodes = list(graph.below(term.edge))
    if not any(_is_even(node) and _is_logits(graph, node) for node in nodes):
        return False
    if not all(_is_even(node) or kind(node) in LINEAR | {"Sqrt"} for node in nodes):
        return False
    targets = [tensor for tensor in logits.values() if tensor.requires_grad]
    try:
        found = gradient_at([(term.edge, term.coefficient)], targets, device=targets[0].device)
    except (RuntimeError, TypeError, AttributeError):
        return False
    pulls = zip(found, targets, strict=True)
    return sum(float((g * x.detach()).double().sum()) for g, x in pulls if g is not None) > 0


def _is_even(node: Node) -> bool:
    name, operands = kind(node), edges(node)
    if name == "Pow":
        return saved(node, "exponent") in (2, 4)
    if name == "Mul":
        return len(operands) == 2 and operands[0] is not None and operands[0] == operands[1]
    return name in ("Abs", "Norm", "LinalgVectorNorm")


def _is_logits(graph: Graph, node: Node) -> bool:
    (operand, *_) = edges(node)
    plain = RESHAPES | {"Cat", "Stack", "Accumulate"}
    return operand is not None and graph.reach(operand) != 0 and all(kind(n) in plain for n in graph.below(operand))


def _penalty_direction(reading: LossReading, logits: Mapping[str, Tensor], orientation: int) -> None:
    shutting = [_shuts(term, logits, orientation) for term in reading.penalties]
    if not all(math.isfinite(force) for force in shutting):
        return
    opening = [term for term, force in zip(reading.penalties, shutting, strict=True) if force < 0]
    if sum(shutting) < 0 and all(term.monotone for term in opening):
        reading.findings.append(
            Finding(
                "penalty-sign",
                "The penalty pushes gates open: its gradient, added up over all logits, opens them, and it does so "
                "wherever the logits are.",
                "A penalty is there to shut what the task does not need. This one rewards open gates, and the mask "
                "ends with everything kept.",
                "Add the number of kept weights, do not subtract it, with alpha above 0:\n"
                "    loss = task + alpha * sum(torch.sigmoid(logit).sum() for logit in logits)",
            )
        )
    elif sum(shutting) < 0:
        reading.notes.append(
            Finding(
                "penalty-opens-now",
                "At these logits the penalty pushes gates open on the whole.",
                "That is right for a penalty with a target that is overshot, and wrong for any other.",
                "Check the penalty's sign.",
            )
        )
    elif any(term.linear for term in reading.penalties):
        reading.notes.append(_unbounded("is linear in the logits"))
    elif any(
        _falls_without_end(term, node, logits, orientation) for term in reading.penalties for node in term.logarithms
    ):
        reading.notes.append(_unbounded("takes logarithms of keep probabilities, which fall without end"))


def _falls_without_end(term: Term, logarithm: Node, logits: Mapping[str, Tensor], orientation: int) -> bool:
    """Whether the penalty falls with a logarithm, and that as gates shut."""
    targets = [tensor for tensor in logits.values() if tensor.requires_grad]
    device = targets[0].device
    try:
        (slope,) = gradient_at([(term.edge, term.coefficient)], [GradientEdge(logarithm, 0)], device=device)
        if slope is None:
            return False
        found = gradient_at([((logarithm, 0), (slope > 0).to(slope.dtype))], targets, device=device)
    except (RuntimeError, TypeError, AttributeError):
        return False
    return orientation * sum(float(gradient.double().sum()) for gradient in found if gradient is not None) > 0


def _unbounded(how: str) -> Finding:
    return Finding(
        "penalty-unbounded",
        f"The penalty {how}, so it has no lower bound.",
        "It goes on pushing gates that are shut already. Beyond about -15 a float32 gate gets no gradient "
        "from the task and cannot come back, and the loss runs to minus infinity. (Where something bounds "
        "the logits, as in sublens.MaskedNetwork, that cannot happen.)",
        "Bound the logits after each step, or count kept weights instead:\n"
        "    with torch.no_grad(): logit.clamp_(-10, 10)\n"
        "    penalty = alpha * sum(torch.sigmoid(logit).sum() for logit in logits)",
    )


def _penalty_detached(constant: float) -> Finding:
    return Finding(
        "penalty-detached",
        f"The loss holds a constant {constant:.4g} that depends on no logit, and no penalty that does.",
        "Most likely it is the penalty, and it is detached (.detach(), .data, .item(), no_grad(), or counted from "
        "the hard mask). It makes the loss larger and shuts no gate: nothing makes the mask sparse.",
        "Make the penalty from the logits themselves:\n"
        "    loss = task + alpha * sum(torch.sigmoid(logit).sum() for logit in logits)",
    )


def _shuts(term: Term, logits: Mapping[str, Tensor], orientation: int) -> float:
    """How strongly a penalty shuts gates, added up over all logits; below zero if it opens them; NaN if not known."""
    targets = [tensor for tensor in logits.values() if tensor.requires_grad]
    try:
        found = gradient_at([(term.edge, term.coefficient)], targets, device=targets[0].device)
    except (RuntimeError, TypeError, AttributeError):
        return math.nan  # torch says no for this graph: then nothing is known, and nothing is said
    return orientation * sum(float(gradient.double().sum()) for gradient in found if gradient is not None)

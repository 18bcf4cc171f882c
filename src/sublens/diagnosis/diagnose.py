"""The two questions one can put: a whole diagnosis, and a cheap one for a loop's first step."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sublens.diagnosis import loss_checks
from sublens.diagnosis.findings import Diagnosis, Finding
from sublens.diagnosis.gate_checks import gate_checks, orientation_of, reversed_gates, scores_of, slopes_of, uses_of
from sublens.diagnosis.graph import Graph, gradient_at
from sublens.diagnosis.inputs import listed, named_logits, param_groups
from sublens.diagnosis.optimizer_checks import optimizer_checks
from sublens.diagnosis.shared_noise import noise_checks
from sublens.errors import CutGraphError

# torch's words for a graph that is sound and merely cannot be walked backwards now, or in this way.
_NOT_THE_LOSS = ("second time", "donated buffers", "checkpoint", "Checkpoint")


def diagnose(
    loss: Tensor | float,
    logits: Tensor | Mapping[str, Tensor] | Iterable[Tensor] | torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> Diagnosis:
    """Say why a mask does not train, or that nothing stops it. For any training loop, sublens's or one's own.

    Call it in the loop, after the loss is made and before ``loss.backward()``. It reads the loss's autograd graph and
    the numbers of one step, and changes nothing: no ``.grad``, no weight, no random state; ``backward()`` works
    afterwards. It costs about one to three backward passes. Hooks of your own on tensors run as in any backward pass.

    Args:
        loss: the scalar loss of one step, with the penalty if there is one.
        logits: the learned scores: a tensor, a dict of names and tensors, or tensors such as ``module.parameters()``.
        optimizer: what steps the logits. Without it nothing is said about it.

    Returns:
        the diagnosis. ``findings`` is empty when all is well.

    Raises:
        SettingError: ``logits`` holds no tensors, or ``optimizer`` is no optimizer.
    """
    named, groups = named_logits(logits), param_groups(optimizer)
    findings: list[Finding] = []
    notes: list[Finding] = []
    _logit_checks(named, groups, findings, notes)
    if optimizer is not None:
        _extend(findings, notes, optimizer_checks(named, groups))
    cut = _cut(loss)
    graph = Graph(loss if isinstance(loss, Tensor) else torch.zeros(()), named)
    if cut is not None or not isinstance(loss, Tensor):
        findings.extend([] if cut is None else [cut])
        _extend(findings, notes, gate_checks(graph, named, [], {}))
    else:
        with _random_state_kept(named), _gradients_kept(named):
            _read_graph(loss, graph, named, groups, findings, notes)
    return Diagnosis(tuple(findings), tuple(notes), _summary(graph, named, optimizer))


def check_first_step(loss: Tensor, logits: Mapping[str, Tensor]) -> None:
    """Refuse a loss from which no mask can be learned. Walks the graph once; no backward pass.

    A loss that reaches some logits passes: a layer that the forward pass does not use has none to reach.

    Raises:
        CutGraphError: the loss reaches none of the logits. The message is the finding's text.
    """
    cut = _cut(loss)
    if cut is None:
        graph = Graph(loss, logits)
        if graph.reached:
            return
        found = loss_checks.read_loss(loss, graph, logits, []).findings
        cut = found[0] if found else loss_checks.detached("The loss reaches none of the logits.")
    raise CutGraphError(f"{cut.seen} {cut.why}\n{cut.cure}")


def _cut(loss: object) -> Finding | None:
    if not isinstance(loss, Tensor):
        return loss_checks.detached(f"The loss is a {type(loss).__name__}, a plain value without any history.")
    if not loss.requires_grad:
        return loss_checks.detached("The loss does not require gradient: it has no history.")
    if loss.grad_fn is None:
        return loss_checks.flagged("The loss requires gradient and yet has no history: it is a leaf.")
    return None


def _logit_checks(
    named: Mapping[str, Tensor], groups: list[dict[str, Any]], findings: list[Finding], notes: list[Finding]
) -> None:
    frozen = [name for name, tensor in named.items() if not tensor.requires_grad]
    if frozen:
        findings.append(
            Finding(
                "logits-without-gradient",
                f"{listed(frozen)} do not require gradient.",
                "backward() passes them by, so they stay as they are.",
                "Make them parameters, and do not freeze them with the network:\n    logits = nn.Parameter(start)",
            )
        )
    derived = [name for name, tensor in named.items() if tensor.grad_fn is not None]
    if not derived:
        return
    held = {id(tensor) for group in groups for tensor in group["params"]}
    sources = {name: Graph(named[name], {}).leaves for name in derived}
    unheld = [name for name in derived if not any(id(leaf) in held for leaf in sources[name])]
    if unheld:
        findings.append(
            Finding(
                "logits-not-leaf",
                f"{listed(unheld)} are results of an operation ({_operation(named[unheld[0]])}) and no leaves.",
                "Gradients are kept in leaves only, and an optimizer steps only leaves. Usually .to(device), a product "
                "or a reshape came after requires_grad.",
                "Compute first, then ask for gradient:\n    logits = start.to(device).requires_grad_()",
            )
        )
    elif derived:
        notes.append(
            Finding(
                "logits-derived",
                f"{listed(derived)} are computed from tensors that the optimizer holds.",
                "Those are what is learned. Reading them gives a fuller diagnosis.",
                "Give diagnose() the tensors that the optimizer holds.",
            )
        )


def _operation(tensor: Tensor) -> str:
    return "" if tensor.grad_fn is None else tensor.grad_fn.name()


def _read_graph(
    loss: Tensor,
    graph: Graph,
    named: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    findings: list[Finding],
    notes: list[Finding],
) -> None:
    if loss.numel() != 1:
        findings.append(
            Finding(
                "loss-not-scalar",
                f"The loss has shape {tuple(loss.shape)}.",
                "backward() needs one number.",
                "Reduce it: loss.mean().",
            )
        )
        return
    if not bool(torch.isfinite(loss.detach()).all()):
        findings.append(_not_finite("loss-not-finite", f"The loss is {float(loss.detach())}."))
    reading = loss_checks.read_loss(loss, graph, named, groups)
    uses = uses_of(graph, named)
    slopes = slopes_of(uses, named)
    turned = reversed_gates(graph, uses, slopes, named)
    findings += turned
    # What a gradient that is turned around says of a penalty's direction is turned around as well.
    orientation = 1 if turned else orientation_of(slopes)
    loss_checks.penalty_checks(reading, named, orientation, bool(slopes) and not scores_of(slopes))
    findings += reading.findings
    notes += reading.notes
    weights: dict[str, set[int]] = {}
    for use in uses:
        weights.setdefault(use.name, set()).add(use.weight.data_ptr())
    edges_of = [use.gate for use in uses], [term.edge for term in reading.task]
    _extend(findings, notes, noise_checks(graph, named, *edges_of, weights))
    _extend(findings, notes, gate_checks(graph, named, uses, slopes))
    _gradient_checks(loss, reading, named, findings, notes)


def _gradient_checks(
    loss: Tensor,
    reading: loss_checks.LossReading,
    named: Mapping[str, Tensor],
    findings: list[Finding],
    notes: list[Finding],
) -> None:
    names = [name for name in reading.graph.bits(reading.trained) if named[name].requires_grad]
    if not names:
        return
    targets = [named[name] for name in names]
    starts = [(term.edge, term.coefficient) for term in reading.task]
    try:
        if reading.task and reading.penalties:
            task = gradient_at(starts, targets, device=loss.device)
            gradient_at([(t.edge, t.coefficient) for t in reading.penalties], targets, device=loss.device)
        else:
            task = list(torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        _extend(findings, notes, _no_backward(error))
        return
    found = {name: gradient.detach() for name, gradient in zip(names, task, strict=True) if gradient is not None}
    broken = [name for name, gradient in found.items() if not bool(torch.isfinite(gradient).all())]
    if broken:
        findings.append(_not_finite("gradient-not-finite", f"The gradient of {listed(broken)} holds NaN or infinity."))
    zero = [name for name, gradient in found.items() if not bool(gradient.any())]
    if zero and len(zero) == len(found):
        findings.append(
            Finding(
                "gradient-zero",
                f"The gradient of the task's loss is exactly 0 for every logit ({listed(zero)}).",
                "The graph is whole, but nothing comes through it: all gates shut, a saturated or dead network, "
                "a relaxed gate clipped everywhere, or a factor 0.",
                "Look for the layer at which the gradient vanishes, beginning at the loss. Start with more gates open.",
            )
        )
    elif zero:
        notes.append(
            Finding(
                "gradient-zero-here",
                f"The task's gradient is exactly 0 for {listed(zero)} in this step.",
                "In a single step that can be chance. Over many steps these logits feel only the penalty.",
                "Diagnose another step. If it stays, look at the layer's input and at the layers behind it.",
            )
        )


def _no_backward(error: RuntimeError) -> tuple[list[Finding], list[Finding]]:
    text = str(error).split("\n", 1)[0][:200]
    if "second time" in text:
        note = Finding(
            "graph-freed",
            "The graph was freed, as backward() does, so gradients and samples could not be read.",
            "Only what the graph's form tells was looked at.",
            "Call diagnose() before loss.backward().",
        )
        return [], [note]
    if any(words in text for words in _NOT_THE_LOSS):
        return [], [Finding("gradient-not-read", text, "Only what the graph's form tells was looked at.", "-")]
    finding = Finding(
        "backward-fails",
        f"A backward pass from this loss fails: {text}",
        "loss.backward() will fail likewise.",
        "Mend what the message names; most often a tensor is changed in place after it was used.",
    )
    return [finding], []


def _not_finite(code: str, seen: str) -> Finding:
    return Finding(
        code,
        seen,
        "One step with it makes the logits NaN, and they stay so. (Optimizers with momentum keep it for ever.)",
        "Common causes: log(u) of a uniform number that is exactly 0 (clamp it to 1e-6 and above), exp of a large "
        "logit (bound the logits), a learning rate too high. torch.autograd.set_detect_anomaly(True) names the place.",
    )


def _extend(findings: list[Finding], notes: list[Finding], more: tuple[list[Finding], list[Finding]]) -> None:
    findings += more[0]
    notes += more[1]


def _summary(graph: Graph, named: Mapping[str, Tensor], optimizer: object) -> str:
    size = sum(tensor.numel() for tensor in named.values())
    reached = len(graph.bits(graph.reached))
    held = "no optimizer was given" if optimizer is None else f"with {type(optimizer).__name__}"
    return f"{size:,} logits in {len(named)} tensor(s), of which the loss reaches {reached}; {held}."


@contextlib.contextmanager
def _random_state_kept(named: Mapping[str, Tensor]) -> Iterator[None]:
    """A backward pass may draw noise again; afterwards the generators stand where they stood."""
    devices = sorted({tensor.device.index or 0 for tensor in named.values() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _gradients_kept(named: Mapping[str, Tensor]) -> Iterator[None]:
    """``retain_grad()`` fills ``.grad`` of results in any backward pass; logits that are results get theirs back."""
    before = {name: tensor.grad for name, tensor in named.items() if tensor.retains_grad}
    copies = {name: None if grad is None else grad.clone() for name, grad in before.items()}
    try:
        yield
    finally:
        for name, grad in copies.items():
            named[name].grad = grad

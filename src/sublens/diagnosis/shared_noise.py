"""Is one noise value shared by all gates of a layer, or one layer's noise by another layer?

A relaxed sample is sigmoid((logit + noise) / temperature). Where the graph kept samples, their log-odds give the noise
back, up to a factor: if they are one line in the logits, then noise is one number. A gate without noise gives a line as
well, but one through zero, so a line alone proves nothing: its offset must be a number that nobody would write.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sublens.diagnosis.findings import Finding
from sublens.diagnosis.graph import LINEAR, Edge, Graph, edges, gradient_at, kind, shape_of
from sublens.diagnosis.inputs import listed
from sublens.diagnosis.replay import Replay

_BLOCK = 16  # a corner of 16 x 16 elements tells as much as the whole layer
_FEWEST = 4
_PREFIX = 256  # as many elements of a layer are compared with another's
_FEWEST_ALIKE = 16  # with noise of one byte's resolution, as many equal ones by chance are impossible
_EDGE = 1e-5  # log-odds of samples nearer to 0 or 1 than this are mostly rounding


@dataclass(frozen=True)
class _Offset:
    """The noise of one draw, if it is one number: log-odds = slope * logit + offset."""

    name: str
    offset: float
    error: float


def noise_checks(
    graph: Graph,
    logits: Mapping[str, Tensor],
    gates: Sequence[Edge],
    task: Sequence[Edge],
    weights: Mapping[str, set[int]],
) -> tuple[list[Finding], list[Finding]]:
    """Findings and notes on noise that gates share.

    Args:
        gates: where gates meet weights, as far as that was found.
        task: the task's terms of the loss. (A penalty may shift its sigmoids as it likes: hard concrete's does.)
        weights: addresses of what the gates of each logit tensor are multiplied with, as far as that was found.
    """
    relevant = {node for edge in gates for node in graph.below(edge)}
    gated = {name for edge in gates for name in graph.bits(graph.reach(edge))}
    everything = {node for edge in task for node in graph.below(edge)}
    offsets: list[_Offset] = []
    rows: list[str] = []
    drawn_noise: dict[str, _Noise] = {}
    for index, (name, logit) in enumerate(logits.items()):
        if logit.numel() < _FEWEST or not logit.is_floating_point():
            continue
        nodes = relevant if name in gated else everything
        for sample in _samples(graph, nodes, 1 << index, logit):
            if (noise := _noise_of(sample, logit)) is not None:
                drawn_noise.setdefault(name, noise)
            shared = _read(name, sample, logit)
            if isinstance(shared, _Offset):
                offsets.append(shared)
            elif shared:
                rows.append(name)
    shifted = [offset for offset in offsets if abs(offset.offset) > max(10 * offset.error, 1e-3)]
    drawn = [offset for offset in shifted if not _written(offset)]
    if not drawn and len({round(offset.offset, 2) for offset in shifted}) > 1:
        drawn = shifted  # another number in each layer or sample: drawn, and not written down
    findings = [_shared(drawn)] if drawn else []
    if twins := _repeated(drawn_noise, weights):
        findings.append(
            Finding(
                "noise-repeated",
                f"The gates of {listed(twins)} were drawn with the same noise, element by element.",
                "Their gates open and shut together: when one layer's gate is shut, so is its like in the others, and "
                "the gradient cannot say which of them mattered. Usually the generator is seeded anew before each "
                "layer, or one noise tensor serves them all.",
                "Seed once, before training, and draw in turn for every layer: torch.rand_like(logit).",
            )
        )
    notes = []
    if shifted and not drawn:
        notes.append(
            Finding(
                "gates-shifted",
                f"To all logits of {listed(_names(shifted))} the same number is added: {shifted[0].offset:.4g}.",
                "As a fixed offset it is harmless. As noise it would be one number for the whole layer.",
                "If it is noise, draw it for every gate: torch.rand_like(logit).",
            )
        )
    if rows:
        notes.append(
            Finding(
                "noise-shared-in-part",
                f"Many gates of {listed(sorted(set(rows)))} share their noise, it seems by rows or columns.",
                "Gates that open and shut together get credit together, so the mask cannot tell them apart well.",
                "Unless it is meant, draw noise for every gate: torch.rand_like(logit).",
            )
        )
    return findings, notes


@dataclass(frozen=True)
class _Noise:
    """The noise of a draw's first elements, in log-odds over temperature. ``inner``: where it could be read."""

    values: Tensor
    inner: Tensor
    error: float


def _noise_of(sample: "_Sample", logit: Tensor) -> _Noise | None:
    """What a draw added to its logits, element by element; ``None`` where that is not known, or is one number."""
    if sample.slope is None:
        return None
    values, slope, at = (
        tensor.flatten()[:_PREFIX] for tensor in (sample.values, sample.slope, logit.detach().double())
    )
    inner = (values > _EDGE) & (values < 1 - _EDGE)
    if int(inner.sum()) < _FEWEST_ALIKE:
        return None
    noise = torch.logit(values.clamp(_EDGE, 1 - _EDGE)) - slope * at
    error = float((2e-7 / (values[inner] * (1 - values[inner]))).max()) + 1e-5
    found = noise[inner]
    # A prior that is the same in several layers is no noise: it comes by rows, or in steps.
    alike = len(torch.unique(torch.round(found / 1e-3))) < 0.9 * len(found)
    if alike or float(found.std()) < max(0.05, 8 * error):
        return None
    return _Noise(noise, inner, error)


def _repeated(drawn: Mapping[str, _Noise], weights: Mapping[str, set[int]]) -> list[str]:
    """Layers whose noise is that of another layer. Masks of the same weights, for two tasks, may well share theirs."""
    names = list(drawn)
    found: set[str] = set()
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            if weights.get(first, set()) & weights.get(second, set()):
                continue
            one, other = drawn[first], drawn[second]
            size = min(len(one.values), len(other.values))
            both = one.inner[:size] & other.inner[:size]
            apart = (one.values[:size] - other.values[:size])[both].abs()
            if len(apart) >= _FEWEST_ALIKE and float(apart.max()) <= 4 * (one.error + other.error):
                found |= {first, second}
    return [name for name in names if name in found]


def _shared(offsets: list[_Offset]) -> Finding:
    values = ", ".join(f"{offset.offset:.3g}" for offset in offsets[:4])
    return Finding(
        "noise-shared",
        f"All gates of {listed(_names(offsets))} were drawn with one and the same noise value (in log-odds: {values}).",
        "With one number for a whole layer its gates open and shut together: every sample is a threshold on the "
        "logits, never a subset of the weights, and the gradient cannot say which weight mattered.",
        "Draw noise anew for every gate, and not torch.rand(1):\n"
        "    u = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)\n"
        "    soft = torch.sigmoid((logit + u.log() - (1 - u).log()) / temperature)",
    )


def _names(offsets: list[_Offset]) -> list[str]:
    return list(dict.fromkeys(offset.name for offset in offsets))


@dataclass(frozen=True)
class _Sample:
    """A result in (0, 1) with the logits' shape. ``slope``: d log-odds / d logit of every element, if it is known."""

    values: Tensor
    slope: Tensor | None = None


def _samples(graph: Graph, nodes: set[Node], bit: int, logit: Tensor) -> Iterator[_Sample]:
    """Relaxed samples made from these logits alone, and not by a function that certainly has no noise."""
    for node in graph.nodes:
        if node not in nodes or graph.reach((node, 0)) != bit:
            continue
        name, shape = kind(node), shape_of((node, 0))
        replay = Replay()  # one for each: it holds on to all that it computes, and layers are large
        found: list[_Sample] = []
        if name == "Softmax" and shape == (*logit.shape, 2):
            found = _of_two(node, logit, replay)
        elif shape != logit.shape:
            continue
        elif name in ("Sigmoid", "Tanh"):
            found = _of_sigmoid(graph, node, logit, replay)
        elif name == "Reciprocal" or (name == "Div" and _shape_of_divisor(node) == logit.shape):
            value = replay.value((node, 0))
            found = [] if value is None else [_Sample(value)]
        else:
            found = [_Sample(value) for value in _own_samples(node, logit)]
        yield from (sample for sample in found if bool(((sample.values >= 0) & (sample.values <= 1)).all()))


def _shape_of_divisor(node: Node) -> torch.Size | None:
    """Of one that depends on something learned: logits divided by a number are no samples."""
    (_, divisor) = edges(node)
    return None if divisor is None else shape_of(divisor)


def _of_sigmoid(graph: Graph, node: Node, logit: Tensor, replay: Replay) -> list[_Sample]:
    operand, result = edges(node)[0], replay.value((node, 0))
    if operand is None or result is None or replay.value(operand) is not None:
        return []  # an operand that follows from logits and factors: nothing unknown was added to it
    if any(kind(below) not in LINEAR for below in graph.below(operand)):
        return []
    slope = _slope(operand, logit)
    if slope is None:
        return []
    return [_Sample(result, slope) if kind(node) == "Sigmoid" else _Sample((result + 1) / 2, 2 * slope)]


def _of_two(node: Node, logit: Tensor, replay: Replay) -> list[_Sample]:
    """The softmax of a pair is the sigmoid of its difference, in one direction or the other."""
    result = replay.value((node, 0))
    if result is None:
        return []
    first = torch.zeros(result.shape)
    first[..., 0] = 1.0
    rising = _slope((node, 0), logit, first)
    if rising is None:
        return []
    return [_Sample(result.select(-1, 0 if float(rising.double().sum()) >= 0 else 1))]


def _slope(edge: Edge, logit: Tensor, factor: Tensor | float = 1.0) -> Tensor | None:
    try:
        (slope,) = gradient_at([(edge, factor)], [logit], device=logit.device)
    except (RuntimeError, TypeError, AttributeError):
        return None
    return None if slope is None else slope.detach().double()


def _own_samples(node: Node, logit: Tensor) -> Iterator[Tensor]:
    """Samples that a user's own autograd.Function kept.

    It may keep weights and other things as well, so a sample s must fit the derivative: that is s * (1 - s) up to a
    number, or up to another tensor that was kept (the weights, where the function multiplies them in).
    """
    kept = [tensor.detach().double() for tensor in _kept(node) if tensor.shape == logit.shape]
    inside = [tensor for tensor in kept if bool(((tensor > 0) & (tensor < 1)).all())]
    for number in (float(tensor) for tensor in _kept(node) if tensor.numel() == 1):  # or what it would draw again
        inside.append(torch.sigmoid(logit.detach().double() + number))
        if 0 < number < 1:
            inside.append(torch.sigmoid(logit.detach().double() + math.log(number / (1 - number))))
    if not inside:
        return
    slope = _slope((node, 0), logit)
    if slope is None:
        return
    for sample in inside:
        factor = slope / (sample * (1 - sample))
        others = [tensor for tensor in kept if tensor is not sample and bool((tensor != 0).all())]
        if any(_constant(ratio) for ratio in (factor, *(factor / other for other in others))):
            yield sample


def _constant(tensor: Tensor) -> bool:
    return bool((tensor.max() - tensor.min()) <= 1e-3 * tensor.abs().max()) and bool(tensor.any())


def _kept(node: object) -> list[Tensor]:
    try:
        kept = getattr(node, "saved_tensors", ())
    except RuntimeError:
        return []
    return [tensor for tensor in kept if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64)]


def _read(name: str, sample: _Sample, logit: Tensor) -> _Offset | bool:
    """The one noise value of this draw; or ``True`` if gates share noise in part; or ``False``."""
    block = _corner(sample.values)
    inner = (block > _EDGE) & (block < 1 - _EDGE)
    odds, values = torch.logit(block[inner]), _corner(logit.detach().double())[inner]
    if odds.numel() < _FEWEST:
        return False
    # Rounding of a float32 sample near 0 or 1 is magnified by the log-odds; the worst element sets the tolerance.
    error = float((2e-7 / (block[inner] * (1 - block[inner]))).max()) + 1e-5
    spread = float(values.max() - values.min())
    if spread > 1e-3:
        centred = values - values.mean()
        slope = float((centred * odds).sum() / (centred * centred).sum())
        offset = float(odds.mean() - slope * values.mean())
        if float((odds - slope * values - offset).abs().max()) > 4 * error:
            return False
        return _Offset(name, offset, error * (1 + abs(float(values.mean())) / spread))
    if float(odds.max() - odds.min()) <= 4 * error:
        where, level = float(odds.mean()), float(values.mean())
        if sample.slope is None:
            return _Offset(name, _offset_at(where, level), error)
        return _Offset(name, where - float(_corner(sample.slope)[inner].mean()) * level, error)
    exact = logit.dtype in (torch.float32, torch.float64)  # half precision has too few values to call equal ones shared
    return exact and 2 * len(torch.unique(torch.round(odds / error))) <= odds.numel()


def _offset_at(odds: float, logit: float) -> float:
    """Offset when all logits are equal: none if a temperature that one would write explains the log-odds."""
    if abs(logit) > 1e-6:
        ratio = odds / logit
        for number in (ratio, 1 / ratio if ratio else math.inf):
            if math.isfinite(number) and 0.01 <= number <= 100 and abs(number - round(number, 2)) < 1e-4 * number:
                return 0.0
    return odds - logit


def _written(offset: _Offset) -> bool:
    """Whether a person would write this offset: a short decimal, or the log-odds of one."""
    value = offset.offset
    probability = 1 / (1 + math.exp(-max(-30.0, min(30.0, value))))
    slack = max(2 * offset.error, 2e-5)
    steepness = probability * (1 - probability)
    return abs(value - round(value, 2)) < slack or abs(probability - round(probability, 2)) < slack * steepness


def _corner(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return tensor.reshape(-1)[: _BLOCK * _BLOCK]
    return tensor.flatten(1)[:_BLOCK, :_BLOCK].reshape(-1)

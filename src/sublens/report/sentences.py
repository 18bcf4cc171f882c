"""One plain sentence under each figure and table: what it shows, computed from the numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence

from sublens.answers import percent as percent  # for who writes sentences
from sublens.report.run_folder import Overlap, OverlapValues, Record, RunFolder

MOST_PAIRS = 6
"""Pairs of masks that are told of one by one."""


def number(value: float) -> str:
    """Write a number for people: whole ones in full with commas, others with four digits."""
    text = f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    return text.replace("-", "\u2212")


def capitalised(text: str) -> str:
    """Write the first letter large and leave the others as they are."""
    return text[:1].upper() + text[1:]


def listed(parts: Iterable[str]) -> str:
    """Join parts as a sentence does: "a", "a and b", "a, b and c"."""
    *front, last = parts
    return f"{', '.join(front)} and {last}" if front else last


def accuracy(run: RunFolder) -> str:
    """Say how each mask does on its own task, and what is left of the others."""
    if not run.network or not run.masks:
        return "No accuracy was measured."
    parts = []
    for name, mask in run.masks.items():
        if name in run.network and name in mask.accuracy:
            others = [
                f"{percent(mask.accuracy[task])} on {task}" for task in run.network if _other(task, name, mask.accuracy)
            ]
            beside = f", and {listed(others)}" if others else ""
            parts.append(
                f"the {name} mask has {percent(mask.accuracy[name])} on its own task "
                f"({_against(mask.accuracy[name], run.network[name])}){beside}"
            )
        elif mask.accuracy:
            worst = min(mask.accuracy, key=lambda task: mask.accuracy[task])
            least = "at least " if len(mask.accuracy) > 1 else ""
            parts.append(f"the {name} mask has {least}{percent(mask.accuracy[worst])} on {_each(mask.accuracy)}")
    if not parts:
        return "No accuracy was measured under a mask."
    return _sentence("; ".join(parts))


def inverse(run: RunFolder) -> str:
    """Say what is left of a task without the weights that its mask keeps."""
    parts = []
    for name, mask in run.masks.items():
        if name in mask.inverse_accuracy:
            others = [
                f"{percent(mask.inverse_accuracy[task])} of {task}"
                for task in run.network
                if _other(task, name, mask.inverse_accuracy)
            ]
            beside = f" and {listed(others)}" if others else ""
            parts.append(
                f"without the weights that the {name} mask keeps, {percent(mask.inverse_accuracy[name])} of {name} "
                f"is answered correctly{beside}"
            )
    return _sentence("; ".join(parts)) if parts else ""


def confusion(told_answered: Mapping[str, Mapping[str, float]], who: str) -> str:
    """Say what one network answers most often when told each thing.

    Args:
        told_answered: told -> answered -> share in 0..1.
        who: the mask's name, or "network".
    """
    subject = "the whole network" if who == "network" else f"the network under the {who} mask"
    parts = []
    for told, answers in told_answered.items():
        if answers:
            most = max(answers, key=lambda answered: answers[answered])
            parts.append(f"told {told}, it answers {most} in {percent(answers[most])} of cases")
    if not parts:
        return _sentence(f"nothing was asked of {subject}")
    return _sentence(f"{subject}: {'; '.join(parts)}")


def kept(run: RunFolder) -> str:
    """Say how much each mask keeps, and where it keeps most and least."""
    parts = []
    for name, mask in run.masks.items():
        text = f"the {name} mask keeps {percent(mask.kept)} of the masked weights"
        layers = mask.kept_per_layer
        if len(layers) > 1:
            most, least = max(layers, key=lambda k: layers[k]), min(layers, key=lambda k: layers[k])
            if layers[most] > layers[least]:
                text += f", from {percent(layers[least])} in {least} to {percent(layers[most])} in {most}"
            else:
                text += ", the same share in every layer"
        parts.append(text)
    return _sentence("; ".join(parts)) if parts else "There are no masks."


def overlaps(pairs: Sequence[Overlap]) -> list[str]:
    """Say of each pair what :func:`overlap` says; of more than ``MOST_PAIRS`` how far they spread, in one sentence."""
    if len(pairs) <= MOST_PAIRS:
        return [overlap(pair, {}) for pair in pairs]
    measured = [pair for pair in pairs if "iou" in pair.total.measures]
    if not measured:
        return ["No overlap was measured."]
    least, *_, most = sorted(measured, key=lambda pair: pair.total.measures["iou"])
    chances = [pair.total.chance["iou"].mean for pair in measured if "iou" in pair.total.chance]
    beside = f"; random masks of their layer sizes have {min(chances):.3f} to {max(chances):.3f}" if chances else ""
    return [
        f"The {len(measured)} pairs of masks have an IoU from {least.total.measures['iou']:.3f} ({least.first} and"
        f" {least.second}) to {most.total.measures['iou']:.3f} ({most.first} and {most.second}){beside}."
    ]


def overlap(pair: Overlap, repeats: Mapping[str, Overlap]) -> str:
    """Say whether two masks share more or fewer weights than random masks of the same sizes, in all and by layer.

    Args:
        pair: the overlap.
        repeats: task of the pair -> overlap of its mask with one of another seed; may be empty.
    """
    seen, chance = pair.total.measures.get("iou"), pair.total.chance.get("iou")
    if seen is None:
        return "No overlap was measured."
    if chance is None:
        return f"The masks {pair.first} and {pair.second} have an IoU of {seen:.3f}; no random masks stand beside it."
    sides = {layer: _side(values) for layer, values in pair.layers.items()}
    where = []
    for side, words in (("above", "above the band"), ("below", "below it"), ("within", "within it")):
        layers = [layer for layer, found in sides.items() if found == side]
        if layers:
            where.append(f"{words} in {_some(layers, len(sides))}")
    text = (
        f"Over all layers, {pair.first} and {pair.second} have an IoU of {seen:.3f}, "
        f"{_side(pair.total)} the 95\u00a0% band of random masks of the same layer sizes "
        f"({chance.low:.3f} to {chance.high:.3f})"
    )
    if where:
        text += f"; layer by layer it lies {listed(where)}"
    same = [
        f"{again.total.measures['iou']:.3f} for {task}"
        for task, again in repeats.items()
        if "iou" in again.total.measures
    ]
    return (
        f"{text}. Two masks of the same task, trained with different seeds, have {listed(same)}."
        if same
        else f"{text}."
    )


def curves(history: Mapping[str, Sequence[Record]]) -> str:
    """Say what each mask kept when it was first measured, and when its training ended."""
    parts = []
    for name, records in history.items():
        with_kept = [record for record in records if "kept" in record]
        if with_kept:
            first, last = with_kept[0], with_kept[-1]
            began = "" if first is last else f"{percent(first['kept'])} after {first['step']:,.0f} steps and "
            parts.append(
                f"the {name} mask kept {began}{percent(last['kept'])} after {last['step']:,.0f}"
                f"{' steps' if first is last else ''}{_still(with_kept)}"
            )
    return _sentence("; ".join(parts)) if parts else "No kept share was recorded."


def _still(records: Sequence[Record]) -> str:
    """Say how fast the kept share still moves, judged by the last tenth of the steps."""
    last = records[-1]
    before = [record for record in records if record["step"] <= 0.9 * last["step"]]
    if not before:
        return ""
    moved = 100 * (last["kept"] - before[-1]["kept"])
    return f" ({moved:+.1f} points over the last tenth)".replace("-", "\u2212")


def _other(task: str, name: str, accuracies: Mapping[str, float]) -> bool:
    return task != name and task in accuracies


def _each(tasks: Mapping[str, float]) -> str:
    return "every task" if len(tasks) > 1 else next(iter(tasks))


def _against(value: float, network: float) -> str:
    points = round(100 * (value - network), 1)
    if not math.isfinite(points):
        return "the network: n/a"
    if points == 0:
        return "as the network"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} the network"


def _side(values: OverlapValues) -> str:
    """Return where the IoU lies: "above", "below" or "within" the band; "" if one of them is not known."""
    seen, chance = values.measures.get("iou"), values.chance.get("iou")
    if seen is None or chance is None or not math.isfinite(seen):
        return ""
    return "above" if seen > chance.high else "below" if seen < chance.low else "within"


def _some(layers: Sequence[str], of: int) -> str:
    if len(layers) == of:
        return "every layer"
    return listed(layers) if len(layers) <= 3 else f"{len(layers)} of {of} layers"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."

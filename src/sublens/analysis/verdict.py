"""The verdict on the paper's two properties (section 1), from a run's numbers by a stated rule.

*P_specialize*: different functions use different weights. *P_reuse*: the same function uses the same weights.

**Sharing.** Two masks keep a and b weights, and share c. Random masks of the same layer sizes share e on average. Then
(c - e) / (min(a, b) - e) is 0 for masks that share as random ones do, and 1 where one mask lies in the other, whatever
their sizes. (IoU cannot be compared between pairs of different sizes: masks of 20 % and 30 % have an IoU of 0.67 at
most.) Masks of the *same* task, trained twice, do not reach 1 either. So the **sharing index** of two tasks is their
sharing divided by that of the same task trained again: 0 is chance, 1 is "the same weights, as far as masks can tell".

**Uncertainty.** The index has a 95 % percentile bootstrap interval over the units (rows) of every layer, drawn anew
within the layer; the rows of both pairs are drawn together. It is the uncertainty within this network and these masks.
That of other seeds takes several runs (``sublens sweep --seeds``). Of an accuracy only the value is known, so between
"kept" and "lost" lies a range in which nothing is decided.

**Rule.** With retention r = (accuracy under the mask - random masks' accuracy) / (the network's - random masks'):

- A function is *kept* under a mask if r >= 0.75, and *lost* if r <= 0.25.
- A mask is *evidence* if it keeps its own function, solves it, and is settled. Solves: its accuracy lies at least
  half-way from random masks' to 1. Of what a network never learned, a mask of anything has a retention of 1. Settled:
  at most two fifths of its gates ended with a keep probability between 0.1 and 0.9. One that is not still keeps what no
  task needs, and shares that with every other.
- Two tasks use *different weights* if the interval of their sharing index lies below 0.75, and *the same weights* if it
  lies above. Three quarters is a convention; the index stands beside the verdict.
- P_specialize **holds** if, for every two tasks of different functions, both masks are evidence, each function is lost
  under the other's mask, and they use different weights. It **fails** if, for some two, both masks are evidence and one
  function is kept under the other's mask too. Otherwise it is **undecided**: also where two functions share most of
  their weights, though each is lost without the few of its own.
- P_reuse **holds** if, for every two tasks of the same function, both masks are evidence and they use the same weights.
  It **fails** if, for some two, both are evidence and they use different weights. Otherwise it is **undecided**, also
  where a study has no two tasks of one function.
- Some studies ask by what a task *excludes* (sections 3.3 to 3.5 of the paper): the whole network can do it, and the
  task's mask is trained without it. What is left of it under that mask is (accuracy under it - random masks' accuracy)
  / (the control mask's - random masks'). It is evidence if the task's mask is, and if the control mask keeps
  and solves it. Inputs *held back* ask the same function: P_reuse **holds** if three quarters are left, and **fails**
  if less than half is. What is *left out* is another function: P_specialize **holds** if at most a quarter is left, and
  **fails** if three quarters are; here accuracies count from 0, since random masks that leave most of a redundant
  network's answers right would make any loss look total. Between, both are **undecided**.
- Where weights and masks train together (permuted digits), a task finds the weights that earlier masks keep, frozen,
  and may use them or others. Of a mask that keeps a weights, c of which were used before, and e if it were random, the
  *reused share* is (c - e) / (a - e). Asked is the last task of every function that had its like before: P_reuse
  **holds** if the interval of its reused share lies above three quarters, and **fails** if it lies below a half. And
  the first task of every further function: P_specialize **holds** if the interval lies below a quarter, and **fails**
  if it lies above three quarters. Between, both are **undecided**. (There is a gap, since nothing here measures how
  much the very same task would reuse.) The mask must solve its task and be settled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from sublens.analysis.sharing import sharing_index
from sublens.answers import percent
from sublens.mask import Mask

KEPT, LOST = 0.75, 0.25
HALF = 0.5
SAME = 0.75
UNSURE = 0.4
ABLE = 0.5  # a convention too: half of what can be learned


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of two tasks.

    Attributes:
        tasks: their names.
        same_function: whether they ask the same function of the network.
        own: retention of each task under its own mask; ``None`` if it cannot be had.
        other: retention of the second task under the first's mask, and of the first under the second's.
        unsure: share of each mask's gates that ended between keep probabilities of 0.1 and 0.9; ``None`` if not known,
            as for masks that were not trained by gates.
        able: how far each task's accuracy under its own mask is from random masks' (0) to 1; ``None`` if not known.
        index: sharing index: value, and lower and upper edge; ``None`` if no task of the two was trained twice.
        layers: names of the layers that the index compares; ``None``: all.
    """

    tasks: tuple[str, str]
    same_function: bool
    own: tuple[float | None, float | None]
    other: tuple[float | None, float | None]
    index: tuple[float, float, float] | None
    unsure: tuple[float | None, float | None] = (None, None)
    able: tuple[float | None, float | None] = (None, None)
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """What is known of inputs that a task's training excludes.

    Attributes:
        task: its name.
        same_function: whether they ask the task's function (they are held back) or another one (it is left out).
        own: retention of what the task's mask was trained on, under that mask; ``None`` if it cannot be had.
        control: retention of what is excluded, under the control mask.
        left: what is left of it under the task's mask, measured by the control mask.
        unsure: share of the task's gates that ended between keep probabilities of 0.1 and 0.9; ``None`` if not known.
        able: how far the accuracy is from random masks' (0) to 1, of what the task's mask was trained on under that
            mask, and of what is excluded under the control mask; ``None`` if not known.
    """

    task: str
    same_function: bool
    own: float | None
    control: float | None
    left: float | None
    unsure: float | None = None
    able: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, kw_only=True)
class Reused:
    """What is known of a task that was trained beside frozen weights of earlier ones.

    Attributes:
        task: its name.
        same_function: whether the earlier tasks whose weights are meant ask its function, or others.
        share: reused share of its mask: value, and lower and upper edge; ``None`` if it cannot be had.
        unsure: share of the mask's gates that ended between keep probabilities of 0.1 and 0.9; ``None`` if not known.
        able: how far the task's accuracy under its mask is from random masks' (0) to 1; ``None`` if not known.
    """

    task: str
    same_function: bool
    share: tuple[float, float, float] | None
    unsure: float | None = None
    able: float | None = None


def retention(accuracy: float, whole: float, chance: float) -> float | None:
    """Return how much of a function is left: 0 as under random masks, 1 as in the network; ``None`` without a scale."""
    return (accuracy - chance) / (whole - chance) if whole - chance > 1e-9 else None


def ability(accuracy: float, chance: float) -> float:
    """Return how far an accuracy is from that of random masks (0) to 1; 1 if random masks have 1 too."""
    return (accuracy - chance) / (1 - chance) if chance < 1 else 1.0


def gather(
    functions: Mapping[str, str],
    masks: Mapping[str, Mask],
    repeats: Mapping[str, Mask],
    accuracy: Mapping[str, Mapping[str, float]],
    whole: Mapping[str, float],
    chance: Mapping[str, Mapping[str, float]],
    *,
    unsure: Mapping[str, float] | None = None,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Evidence]:
    """Collect what is known of every two tasks.

    Args:
        functions: task -> name of its function; the tasks that take part.
        masks: task -> mask.
        repeats: task -> its mask trained again, with another seed. If neither task of a pair was, the mean of all is
            taken, and without any there is no index.
        accuracy: mask -> task -> value under the mask.
        whole: task -> the network's value.
        chance: mask -> task -> mean value under random masks of the mask's layer sizes; 0 where there is none.
        unsure: mask -> share of its gates that ended between keep probabilities of 0.1 and 0.9, where it is known.
        layers: names of the layers that are compared; ``None``: all.
        seed: of the bootstrap.
    """

    def by_chance(mask: str, task: str) -> float:
        return chance.get(mask, {}).get(task, 0.0)

    def left(mask: str, task: str) -> float | None:
        return retention(accuracy[mask][task], whole[task], by_chance(mask, task))

    def able(task: str) -> float:
        return ability(accuracy[task][task], by_chance(task, task))

    found = []
    for first, second in combinations(functions, 2):
        again = [task for task in (first, second) if task in repeats] or list(repeats)
        same = [(masks[task], repeats[task]) for task in again]
        found.append(
            Evidence(
                tasks=(first, second),
                same_function=functions[first] == functions[second],
                own=(left(first, first), left(second, second)),
                other=(left(first, second), left(second, first)),
                unsure=((unsure or {}).get(first), (unsure or {}).get(second)),
                able=(able(first), able(second)),
                index=sharing_index(masks[first], masks[second], same, layers=layers, seed=seed),
                layers=None if layers is None else tuple(layers),
            )
        )
    return found


def judge(
    evidence: Sequence[Evidence], excluded: Sequence[Excluded] = (), reused: Sequence[Reused] = ()
) -> dict[str, Any]:
    """Return the verdict on both properties by the rule of this module.

    Args:
        evidence: of every two tasks.
        excluded: of every task whose training excludes something that the network can do.
        reused: of tasks that were trained beside frozen weights of earlier ones.

    Returns:
        ``specialize`` and ``reuse``: ``verdict`` (``"holds"``, ``"fails"`` or ``"undecided"``) and ``because``, a
        sentence; ``pairs``, ``excluded`` and ``reused``: the evidence.
    """
    different = [pair for pair in evidence if not pair.same_function]
    alike = [pair for pair in evidence if pair.same_function]
    return {
        "specialize": _property(
            [
                *(_specializes(pair) for pair in different),
                *(_loses_left_out(one) for one in excluded if not one.same_function),
                *(_leaves_alone(one) for one in reused if not one.same_function),
            ],
            "no two tasks of different functions were compared",
        ),
        "reuse": _property(
            [
                *(_reuses(pair) for pair in alike),
                *(_keeps_held_back(one) for one in excluded if one.same_function),
                *(_takes_up(one) for one in reused if one.same_function),
            ],
            "the study has no two tasks of the same function",
        ),
        "pairs": [
            {
                "tasks": list(pair.tasks),
                "same_function": pair.same_function,
                "own": list(pair.own),
                "other": list(pair.other),
                "unsure": list(pair.unsure),
                "able": list(pair.able),
                "index": _as_json(pair.index),
            }
            for pair in evidence
        ],
        "excluded": [{**asdict(one), "able": list(one.able)} for one in excluded],
        "reused": [{**asdict(one), "share": _as_json(one.share)} for one in reused],
    }


def _as_json(interval: tuple[float, float, float] | None) -> dict[str, float] | None:
    return None if interval is None else dict(zip(("mean", "low", "high"), interval, strict=True))


def _property(found: Sequence[tuple[str, str]], nothing: str) -> dict[str, str]:
    if not found:
        return {"verdict": "undecided", "because": f"{nothing}."}
    for verdict in ("fails", "undecided", "holds"):  # one pair that fails decides; then one that is undecided
        reasons = [reason for outcome, reason in found if outcome == verdict]
        if reasons:
            more = f" (and so for {len(reasons) - 1} more of {len(found)})" if len(reasons) > 1 else ""
            return {"verdict": verdict, "because": f"{reasons[0]}{more}."}
    raise AssertionError(found)


def _specializes(pair: Evidence) -> tuple[str, str]:
    doubt = _doubt(pair.tasks, pair.own, pair.unsure, pair.able)
    if doubt:
        return doubt
    weights, sharing = _weights(pair)
    first, second = pair.tasks
    for mask, task, left in ((first, second, pair.other[0]), (second, first, pair.other[1])):
        if left is not None and left >= KEPT:
            return "fails", f"under the {mask} mask {_percent(left)} of {task} is left too"
    for mask, task, left in ((first, second, pair.other[0]), (second, first, pair.other[1])):
        if left is None or left > LOST:
            what = "cannot be measured" if left is None else f"is neither kept nor lost ({_percent(left)} is left)"
            return "undecided", f"under the {mask} mask {task} {what}"
    if weights == "same":
        return "undecided", f"each function is lost under the other's mask, but {sharing}"
    if weights != "different":
        return "undecided", sharing
    lost = " and ".join(_percent(left) for left in pair.other if left is not None)
    return "holds", f"under their own masks {first} and {second} are kept, under each other's {lost} is left; {sharing}"


def _reuses(pair: Evidence) -> tuple[str, str]:
    doubt = _doubt(pair.tasks, pair.own, pair.unsure, pair.able)
    if doubt:
        return doubt
    weights, sharing = _weights(pair)
    return {"same": "holds", "different": "fails"}.get(weights, "undecided"), sharing


def _keeps_held_back(one: Excluded) -> tuple[str, str]:
    doubt, left, text = _left_of(one, "holds back")
    if doubt:
        return doubt
    if left >= KEPT:
        return "holds", f"{text}, at least {100 * KEPT:.0f} %"
    if left < HALF:
        return "fails", f"{text}, less than half"
    return "undecided", f"{text}: neither three quarters nor less than half"


def _loses_left_out(one: Excluded) -> tuple[str, str]:
    doubt, left, text = _left_of(one, "leaves out")
    if doubt:
        return doubt
    if left <= LOST:
        return "holds", f"{text}, at most {100 * LOST:.0f} %"
    if left >= KEPT:
        return "fails", f"{text}, at least {100 * KEPT:.0f} %"
    return "undecided", f"{text}: it is neither kept nor lost"


def _takes_up(one: Reused) -> tuple[str, str]:
    doubt, low, high, text = _reused_by(one)
    if doubt:
        return doubt
    if low >= KEPT:
        return "holds", f"{text}, above {100 * KEPT:.0f} %"
    if high < HALF:
        return "fails", f"{text}, less than half"
    return "undecided", f"{text}: neither above three quarters nor less than half"


def _leaves_alone(one: Reused) -> tuple[str, str]:
    doubt, low, high, text = _reused_by(one)
    if doubt:
        return doubt
    if high <= LOST:
        return "holds", f"{text}, below {100 * LOST:.0f} %"
    if low >= KEPT:
        return "fails", f"{text}, above {100 * KEPT:.0f} %"
    return "undecided", f"{text}: neither below a quarter nor above three quarters"


def _reused_by(one: Reused) -> tuple[tuple[str, str] | None, float, float, str]:
    """Return why it is no evidence, if it is none; else the edges of the reused share, and that in words."""
    doubt = _doubt((one.task,), None, (one.unsure,), (one.able,))
    if doubt is None and one.share is None:
        doubt = "undecided", f"which weights the {one.task} mask uses again cannot be measured"
    share, low, high = one.share or (0.0, 0.0, 0.0)
    whose = "tasks of its function" if one.same_function else "tasks of other functions"
    text = (
        f"of the {one.task} mask {_percent(share)} beyond chance (95 % interval {_percent(low)} to {_percent(high)})"
        f" are weights that {whose} used before"
    )
    return doubt, low, high, text


def _left_of(one: Excluded, does: str) -> tuple[tuple[str, str] | None, float, str]:
    """Return why it is no evidence, if it is none; else what is left, and that in words."""
    doubt = _doubt((one.task,), (one.own,), (one.unsure,), one.able[:1])
    if doubt is None and (one.control is None or one.left is None or one.control < KEPT):
        known = one.control is not None and one.left is not None
        what = f"is only {_percent(one.control or 0.0)}" if known else "cannot be measured"
        doubt = "undecided", f"what is left under the control mask of what {one.task} {does} {what}"
    if doubt is None and one.able[1] is not None and one.able[1] < ABLE:
        doubt = "undecided", _unable(f"what {one.task} {does}", "the control mask", one.able[1])
    left = one.left or 0.0
    return doubt, left, f"of what {one.task} {does}, its mask has {_percent(left)} of what the control mask has"


def _unable(what: str, mask: str, able: float) -> str:
    return (
        f"{what} is answered under {mask} only {_percent(able)} of the way from random masks to all right, where"
        f" {100 * ABLE:.0f} % are asked for. Either the network has not learned it, and has no weights to be found, or"
        " the mask keeps so many weights, or so few, that random masks of its layer sizes do as well"
    )


def _doubt(
    tasks: Sequence[str],
    own: Sequence[float | None] | None,
    unsure_of: Sequence[float | None],
    able_of: Sequence[float | None],
) -> tuple[str, str] | None:
    for task, unsure in zip(tasks, unsure_of, strict=True):
        if unsure is not None and unsure > UNSURE:
            return "undecided", (
                f"the {task} mask is not settled: {_percent(unsure)} of its gates ended between keep probabilities of"
                " 0.1 and 0.9, so it still keeps weights that no task needs. Train masks longer"
            )
    for task, able in zip(tasks, able_of, strict=True):
        if able is not None and able < ABLE:
            return "undecided", _unable(task, "its own mask", able)
    # Of a network that trained along with its mask nothing was there before that could be retained.
    for task, left in zip(tasks, own, strict=True) if own is not None else ():
        if left is None or left < KEPT:
            what = "cannot be measured" if left is None else f"only {_percent(left)} is left"
            return "undecided", f"the {task} mask does not have its own function ({what}), so it is no evidence"
    return None


def _weights(pair: Evidence) -> tuple[str, str]:
    names = " and ".join(pair.tasks)
    if pair.index is None:
        return "unknown", f"how much {names} share has nothing to be measured by: no task's mask was trained twice"
    index, low, high = pair.index
    where = ""
    if pair.layers is not None:
        where = f" in {' and '.join(pair.layers) if len(pair.layers) <= 3 else f'{len(pair.layers)} of the layers'}"
    text = (
        f"{names} share{where} {index:.2f} (95 % interval {low:.2f} to {high:.2f}) of what a task shares with itself,"
        " trained again"
    )
    weights = "same" if low > SAME else "different" if high < SAME else "unknown"
    side = {"same": "above", "different": "below"}.get(weights, "on both sides of")
    return weights, f"{text}, {side} {SAME:g}"


def _percent(left: float) -> str:
    return percent(max(left, 0.0))

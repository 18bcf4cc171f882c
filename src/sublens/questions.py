"""What every run asks of its masks: the paper's figures, and the checks without which they mean little.

Each question returns an ``Answer`` (``sublens.answers``), or ``None`` where the run has nothing to ask it of. A study's
own questions stand beside these, in the same form.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from sublens.analysis import ablate, ablate_layers, bands, blocks_of, completeness, minimality, stability
from sublens.answers import (
    LARGEST_MATRIX,
    MOST_PICTURED,
    Answer,
    Bars,
    Figure,
    Histogram,
    Lines,
    Matrix,
    Picture,
    Series,
    Spread,
    Table,
    Value,
    percent,
    span,
)
from sublens.errors import SettingError, StudyError
from sublens.fit import fit
from sublens.mask import Mask
from sublens.study import Asked, repeat_of, seed_from

Band = Mapping[str, float]

BINS = 20  # of a histogram of keep probabilities
_DRAWS = 3  # of what each question draws; the study's random_masks if they are fewer
_MANY_TASKS = 4  # from so many on, other tasks are put together
_LARGEST = 160  # rows and columns of a mask's picture
_MOST_PICTURES = 4
_MOST_SHOWN = 3  # masks that have a figure of their own, where each needs one
_BLOCKS = 6
_FRACTIONS = (0.05, 0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the run has measured already, as in ``result.json``.

    Attributes:
        network: task -> accuracy of the network.
        masks: the control and the tasks -> what :func:`sublens.analysis.interrogate` says.
        repeats: task -> accuracies of its second mask.
        confusion: who was asked ("network" or a mask) -> told -> answered -> share; empty if nobody was.
        keep_probabilities: mask -> number of gates in each of :data:`BINS` equal bins of 0..1.
    """

    network: Mapping[str, float]
    masks: Mapping[str, Mapping[str, Any]]
    repeats: Mapping[str, Mapping[str, float]]
    confusion: Mapping[str, Mapping[str, Mapping[str, float]]]
    keep_probabilities: Mapping[str, Sequence[int]]


def ask(asked: Asked, found: Found) -> dict[str, Answer]:
    """Ask every question that the run can answer; return name -> answer."""
    answers = {name: question(asked, found) for name, question in _QUESTIONS.items()}
    return {name: answer for name, answer in answers.items() if answer is not None}


def keep_histogram(logits: Mapping[str, Tensor]) -> list[int]:
    """Return how many gates have their keep probability in each of :data:`BINS` equal bins of 0..1."""
    counts = torch.zeros(BINS, dtype=torch.float64)
    for logit in logits.values():
        counts += torch.histc(logit.detach().float().sigmoid().cpu(), BINS, 0, 1).double()
    return [int(count) for count in counts]


def unsure_share(counts: Sequence[int]) -> float:
    """Return the share of gates between keep probabilities of 0.1 and 0.9, of a histogram of :data:`BINS` bins."""
    near = BINS // 10
    return sum(counts[near:-near]) / max(sum(counts), 1)


def _accuracy(asked: Asked, found: Found) -> Answer | None:
    tasks, masks = list(found.network), list(found.masks)
    if not tasks:
        return None
    groups = ["whole network", *(f"{name} mask" for name in masks)]
    if len(tasks) < _MANY_TASKS:
        series = [
            Series(
                name=f"on {task}",
                values=[found.network[task], *(found.masks[name]["accuracy"][task] for name in masks)],
                chance=[None, *(_random(found, name, task) for name in masks)],
            )
            for task in tasks
        ]
    else:
        seen = {"": found.network, **{name: found.masks[name]["accuracy"] for name in masks}}
        random = {name: {task: band["mean"] for task, band in _randoms(found, name).items()} for name in masks}
        series = [
            Series(
                name=label,
                values=[mean(accuracy, name) for name, accuracy in seen.items()],
                chance=[None, *(mean(random[name], name) if random[name] else None for name in masks)],
            )
            for label, mean in (("own task, or mean of all", _own_mean), ("other tasks, mean", _others_mean))
        ]
    own = [name for name in masks if name in found.network]
    others = [found.masks[name]["accuracy"][task] for name in own for task in tasks if task != name]
    kept = {name: found.masks[name]["accuracy"][name] for name in own}
    sentence = f"Under its own mask, {_told(kept, '{} has {}', 'a task has {}')}"
    if others:
        sentence += f"; under the mask of another task, a task has {span(others)}"
    return Answer(
        title="Does each mask have its own task, and only that?",
        sentence=f"{sentence}.",
        figures=[
            Bars(
                title="Accuracy under each mask. By chance: random masks that keep as many weights in each layer, mean "
                "and range.",
                label="accuracy",
                groups=groups,
                series=series,
            ),
            *([_transfer(found)] if 2 * len(masks) + 2 <= LARGEST_MATRIX else []),
        ],
    )


def _own_mean(accuracy: Mapping[str, float], name: str) -> Value:
    return accuracy[name] if name in accuracy else _mean(list(accuracy.values()))


def _others_mean(accuracy: Mapping[str, float], name: str) -> Value:
    return _mean([value for task, value in accuracy.items() if task != name]) if name in accuracy else None


def _transfer(found: Found) -> Matrix:
    tasks = list(found.network)
    rows: dict[str, list[float | None]] = {"whole network": [found.network[task] for task in tasks]}
    for name, mask in found.masks.items():
        rows[f"{name} mask"] = [mask["accuracy"][task] for task in tasks]
        if name in found.repeats:
            rows[f"{name} mask, another seed"] = [found.repeats[name][task] for task in tasks]
    # The control's random masks are larger than the tasks', so they do not belong in this mean.
    random = [_randoms(found, name) for name in found.masks if name in found.network]
    if random and all(random):
        rows["random masks of the tasks' sizes"] = [_mean([one[task]["mean"] for one in random]) for task in tasks]
    return Matrix(
        title="Transfer: the mask of each row on the task of each column.",
        row_label="weights used",
        column_label="task",
        rows=list(rows),
        columns=tasks,
        values=list(rows.values()),
    )


def _confusion(asked: Asked, found: Found) -> Answer | None:
    control = found.confusion.get(asked.study.control.name)
    masks = [name for name in found.confusion if name not in ("network", asked.study.control.name)]
    if not control or not masks:
        return None
    told = list(control)
    answered = list(dict.fromkeys(key for answers in control.values() for key in answers))
    figures: list[Figure] = []
    if len(answered) > _MANY_TASKS:
        figures.append(_matrix("What the network answers under the control mask.", told, answered, control, False))
    if max(len(told), len(answered)) > LARGEST_MATRIX:
        return None
    largest: tuple[float, str] = (0.0, "no answer changes")
    for name in masks:
        change = {
            row: {
                column: found.confusion[name].get(row, {}).get(column, 0.0) - control[row].get(column, 0.0)
                for column in answered
            }
            for row in told
        }
        if len(figures) < _MOST_SHOWN + 1:
            figures.append(_matrix(f"The {name} mask less the control mask, in points.", told, answered, change, True))
        for row, column in product(told, answered):
            value = change[row][column]
            if abs(value) > abs(largest[0]):
                way = "less" if value < 0 else "more"
                largest = (
                    value,
                    f"the largest change is under the {name} mask: told {row}, the network answers {column}"
                    f" {100 * abs(value):.1f} points {way} often than under the control mask",
                )
    return Answer(
        title="What changes in the answers, compared with the control mask?",
        sentence=f"{largest[1][:1].upper()}{largest[1][1:]}.",
        figures=figures,
        numbers={"largest_change": largest[0]},
    )


def _matrix(
    title: str, told: list[str], answered: list[str], table: Mapping[str, Mapping[str, float]], diverging: bool
) -> Matrix:
    return Matrix(
        title=title,
        row_label="told",
        column_label="answered",
        rows=told,
        columns=answered,
        values=[[table[row].get(column) for column in answered] for row in told],
        diverging=diverging,
    )


def _pictures(asked: Asked, found: Found) -> Answer | None:
    """Show which task's mask keeps which weight."""
    tasks = [task.name for task in asked.study.tasks][: 2 if len(asked.study.tasks) < 3 else MOST_PICTURED]
    masks = [asked.masks[name] for name in tasks]
    layers = [name for name in masks[0] if masks[0][name].ndim >= 2]
    figures: list[Figure] = []
    if len(tasks) == 2:
        figures.append(_proportions(tasks[0], tasks[1], masks[0], masks[1]))
    shown = [layers[round(index)] for index in _spaced(len(layers), _MOST_PICTURES)]
    figures += [_picture(layer, tasks, masks) for layer in shown]
    if not figures:
        return None
    everywhere, anywhere = masks[0], masks[0]
    for mask in masks[1:]:
        everywhere, anywhere = everywhere & mask, anywhere | mask
    by_chance = math.fsum(
        size * math.prod(mask.kept_counts()[name] / size for mask in masks) for name, size in masks[0].sizes().items()
    ) / max(masks[0].size, 1)  # fmt: skip
    only = {name: (mask - _rest(masks, mask)).kept for name, mask in zip(tasks, masks, strict=True)}
    together = "both" if len(tasks) == 2 else f"all {len(tasks)}"
    parts = [f"{percent(value)} are kept by {name} alone" for name, value in only.items()]
    if len(tasks) > 1:
        parts.append(f"{percent(everywhere.kept)} by {together} (random masks {percent(by_chance)})")
    parts.append(f"{percent(1 - anywhere.kept)} by none")
    return Answer(
        title="Which weights does each task keep?",
        sentence=f"Of the masked weights, {_listed(parts)}{_of_which(asked, tasks)}.",
        figures=figures,
        numbers={
            **{f"only_{name}": value for name, value in only.items()},
            "all": everywhere.kept,
            "all_by_chance": by_chance,
            "none": 1 - anywhere.kept,
        },
    )


def _of_which(asked: Asked, tasks: Sequence[str]) -> str:
    return f" of the first {len(tasks)} tasks" if len(tasks) < len(asked.study.tasks) else ""


def _rest(masks: Sequence[Mask], mask: Mask) -> Mask:
    others = [other for other in masks if other is not mask]
    rest = mask & ~mask
    for other in others:
        rest = rest | other
    return rest


def _proportions(first: str, second: str, mine: Mask, others: Mask) -> Bars:
    a, b, both = mine.kept_per_layer(), others.kept_per_layer(), (mine & others).kept_per_layer()
    layers = list(mine)
    return Bars(
        title="Share of each layer's weights. By chance: random masks of the same layer sizes.",
        label="share of the layer",
        groups=layers,
        series=[
            Series(
                name=f"{first} only",
                values=[a[name] - both[name] for name in layers],
                chance=[a[name] * (1 - b[name]) for name in layers],
            ),
            Series(
                name=f"{second} only",
                values=[b[name] - both[name] for name in layers],
                chance=[b[name] * (1 - a[name]) for name in layers],
            ),
            Series(
                name="both",
                values=[both[name] for name in layers],
                chance=[a[name] * b[name] for name in layers],
            ),
        ],
    )


def _picture(layer: str, tasks: Sequence[str], masks: Sequence[Mask]) -> Picture:
    code = torch.zeros(0)
    for bit, mask in enumerate(masks):
        kept = mask[layer].flatten(1).int() << bit
        code = kept if bit == 0 else code | kept
    tall, wide = code.shape
    rows, columns = (-(-length // _LARGEST) for length in (tall, wide))
    code = code[::rows, ::columns]
    sampled = [f"every {_ordinal(step)} {what}" for step, what in ((rows, "row"), (columns, "column")) if step > 1]
    part = f" Shown: {' and '.join(sampled)}." if sampled else ""
    return Picture(
        title=f"{layer}: the colour says which masks keep a weight.{part}",
        row_label="outputs",
        column_label="inputs",
        masks=list(tasks),
        cells=["".join("0123456789abcdef"[digit] for digit in row) for row in code.tolist()],
    )


def _gates(asked: Asked, found: Found) -> Answer | None:
    shares = {
        name: [count / sum(counts) for count in counts]
        for name, counts in found.keep_probabilities.items()
        if sum(counts)
    }
    if not shares:
        return None
    unsure = {name: unsure_share(found.keep_probabilities[name]) for name in shares}
    sentence = _told(unsure, "{1} of {0}'s", "{} of each mask's")
    return Answer(
        title="How sure are the gates?",
        sentence=f"Between a keep probability of 0.1 and 0.9 lie {sentence} gates: the fewer, the less the mask"
        " depends on where it is cut.",
        figures=[
            Histogram(
                title="Keep probabilities of all gates when training ended. A mask keeps what lies above 0.5.",
                label="share of the gates",
                x_label="keep probability",
                edges=[index / BINS for index in range(BINS + 1)],
                series=[Series(name=name, values=share) for name, share in shares.items()],
            )
        ],
        numbers={f"unsure_{name}": value for name, value in unsure.items()},
    )


def _faithfulness(asked: Asked, found: Found) -> Answer | None:
    control = asked.study.control.name
    masked = found.masks[control]["accuracy"]
    if not masked:
        return None
    differences = {task: masked[task] - found.network[task] for task in found.network}
    worst = min(differences, key=lambda task: differences[task])
    random = _randoms(found, control)
    return Answer(
        title="Does the control mask have what the network has?",
        sentence=f"The mask of the whole problem keeps {percent(found.masks[control]['kept'])} of the weights;"
        f" at worst, on {worst}, its accuracy is {_points(differences[worst])}.",
        tables=[
            Table(
                title="Faithfulness: the control mask against the network",
                columns=["task", "network", "control mask", "difference", "random masks, mean"],
                rows=[
                    [task, found.network[task], masked[task], differences[task],
                     random[task]["mean"] if task in random else None]
                    for task in found.network
                ],
                percent=["network", "control mask", "difference", "random masks, mean"],
            )
        ],
        numbers={f"difference_{task}": value for task, value in differences.items()},
    )  # fmt: skip


def _minimality(asked: Asked, found: Found) -> Answer | None:
    draws = min(_DRAWS, asked.study.random_masks)
    if not draws or not found.network:
        return None
    series = []
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    numbers: dict[str, float | None] = {}
    for name in found.masks:
        metrics = _own_metrics(asked, name)
        measured = minimality(
            asked.network,
            asked.masks[name],
            metrics,
            fractions=_FRACTIONS,
            draws=draws,
            seed=seed_from(asked.seed, "minimality", name),
        )
        before = _mean([found.masks[name]["accuracy"][task] for task in metrics])
        after = [_together(list(measured[fraction].values())) for fraction in _FRACTIONS]
        random = [band["mean"] for task, band in _randoms(found, name).items() if task in metrics]
        chance = _mean(random) if random else None
        series.append(Series(name=name, values=[before, *after], chance=[chance] * (1 + len(_FRACTIONS))))
        numbers |= {f"{name}_{fraction:g}": spread.mean for fraction, spread in zip(_FRACTIONS, after, strict=True)}
        first[name], second[name] = before, after[0].mean
    return Answer(
        title="Does a mask keep more than it needs?",
        sentence="Accuracy on its own task is "
        f"{_told(first, '{1} under the {0} mask', '{} under each mask')}; without a random"
        f" {100 * _FRACTIONS[0]:g}\u00a0% of what the mask keeps in each layer it is"
        f" {_told(second, '{1} for {0}', '{}')}.",
        figures=[
            Lines(
                title=f"Minimality: accuracy on the mask's own task (the control's: mean of all), mean and range of"
                f" {draws} draws. By chance: random masks of the whole mask's layer sizes.",
                label="accuracy",
                x_label="share of the kept weights that is removed at random",
                x=[0.0, *_FRACTIONS],
                series=series,
            )
        ],
        numbers=numbers,
    )


def _completeness(asked: Asked, found: Found) -> Answer | None:
    draws = min(_DRAWS, asked.study.random_masks)
    if not draws or not found.network:
        return None
    values: dict[str, float] = {}
    chances: list[Value] = []
    numbers: dict[str, float | None] = {}
    above = []
    for name in found.masks:
        metrics = _own_metrics(asked, name)
        left, random = completeness(
            asked.network, asked.masks[name], metrics, draws=draws, seed=seed_from(asked.seed, "completeness", name)
        )
        value, chance = _mean(list(left.values())), _together(list(random.values()))
        values[name] = value
        chances.append(chance)
        numbers |= {f"{name}_inverse": value, f"{name}_inverse_by_chance": chance.mean}
        if value > chance.high:
            above.append(name)
    beyond = f"for {_listed(above)} that is more than" if above else "none of them is more than"
    return Answer(
        title="Does what a mask removes still know the task?",
        sentence="With only the weights that a mask removes, accuracy is "
        f"{_told(values, '{1} for {0}', '{}')};"
        f" {beyond} all of {draws} random masks of that size have.",
        figures=[
            Bars(
                title="Completeness: accuracy of the inverse masks on their own task (the control's: mean of all). By"
                f" chance: random masks of the inverse's layer sizes, mean and range of {draws}.",
                label="accuracy",
                groups=[f"{name}, inverse" for name in found.masks],
                series=[Series(name="inverse mask", values=list(values.values()), chance=chances)],
            )
        ],
        numbers=numbers,
    )


def _layers(asked: Asked, found: Found) -> Answer | None:
    draws = min(2, asked.study.random_masks)
    tasks = [task.name for task in asked.study.tasks][:2]
    if not draws or not found.network:
        return None
    figures: list[Figure] = []
    numbers: dict[str, float | None] = {}
    parts = []
    for name in tasks:
        mask, metrics = asked.masks[name], _own_metrics(asked, name)
        blocks = blocks_of(mask.names, _BLOCKS)
        seed = seed_from(asked.seed, "layers", name)
        measured = ablate_layers(asked.network, mask, metrics, blocks, draws=draws, seed=seed)
        random = {
            block: bands([
                {task: band["mean"] for task, band in ablate(
                    asked.network, (~Mask.random_like(mask, seed_from(seed, draw))).only(layers), metrics).items()}
                for draw in range(draws)
            ])
            for block, layers in blocks.items()
        }  # fmt: skip
        figures.append(
            Lines(
                title=f"Accuracy on {name} when the weights that its mask keeps in one part of the network are"
                " replaced: by zero, by their layer's mean, by other weights of their layer. By chance: as many random"
                " weights set to zero.",
                label="accuracy",
                x_label="part of the network",
                x=list(blocks),
                series=[
                    Series(
                        name=label,
                        values=[_spread(measured[block][fill][name]) for block in blocks],
                        chance=[_spread(random[block][name]) for block in blocks] if fill == "zero" else (),
                    )
                    for fill, label in (("zero", "zero"), ("mean", "mean"), ("resample", "resampled"))
                ],
            )
        )
        for block, fills in measured.items():
            numbers |= {f"{name}_{block}_{fill}": band[name]["mean"] for fill, band in fills.items()}
        left = [band[name]["mean"] for fills in measured.values() for band in fills.values()]
        beside = [band[name]["mean"] for band in random.values()]
        parts.append(f"{name} has {span(left)} left (without as many random weights {span(beside)})")
    return Answer(
        title="Where in the network is each function?",
        sentence="Without the weights that its mask keeps in one part of the network, whichever part and whatever"
        f" replaces them, {_listed(parts)}.",
        figures=figures,
        numbers=numbers,
    )


def stability_of(name: str, masks: int = 3) -> Callable[[Asked], Answer]:
    """Return a question for ``Study(questions=...)``: how much of a task's mask is the luck of a seed?

    ``masks`` - 1 more masks of the task are trained with the same batches and other noise, and as many with the same
    noise and other batches. They keep no checkpoints: a run that is killed meanwhile trains them again. What another
    network would give takes other runs, since masks of different networks cannot be laid over each other:
    ``sublens sweep --seeds``.

    Args:
        name: of the task, or of the control.
        masks: masks to compare in each way, at least 2. An interval takes 3, and is rough below about 8.

    Raises:
        SettingError: fewer than two masks.
        StudyError: when asked, if the study has no such task.
    """
    if not isinstance(masks, int) or masks < 2:
        raise SettingError(f"masks={masks!r} must be a whole number of at least 2, to have two masks to compare.")

    def question(asked: Asked) -> Answer:
        study = asked.study
        task = next((task for task in (study.control, *study.tasks) if task.name == name), None)
        if task is None:
            raise StudyError(f"Study {study.name!r} has no task {name!r} whose stability could be asked.")
        first = seed_from(asked.seed, name)  # that of the run's own mask
        others = [seed_from(asked.seed, name, "stability", index) for index in range(1, masks)]
        ways = {
            "other noise": [(first, other) for other in others],
            "other batches": [(other, first) for other in others],
        }
        found = {}
        for way, seeds in ways.items():
            trained = [
                fit(
                    asked.network,
                    task.batches_for(batches),
                    task.loss,
                    **study.fit_settings(),
                    seed=noise,
                    progress=False,
                ).mask
                for batches, noise in seeds
            ]
            found[way] = stability([asked.masks[name], *trained], seed=seed_from(asked.seed, way) % 2**32)
        if repeat_of(name) in asked.masks:
            found["both"] = stability([asked.masks[name], asked.masks[repeat_of(name)]])
        return _stable(name, found, masks)

    return question


def _stable(name: str, found: Mapping[str, Any], masks: int) -> Answer:
    values: list[Value] = []
    for entry in found.values():
        mean, low, high = (entry["iou"][part] for part in ("mean", "low", "high"))
        values.append(mean if low is None else Spread(mean, low, high))
    parts = [f"{entry['iou']['mean']:.3f} with {way}" for way, entry in found.items()]
    chance = _mean([entry["chance"] for entry in found.values()])
    layers = list(next(iter(found.values()))["per_layer"])
    return Answer(
        title=f"How much of the {name} mask is the luck of a seed?",
        sentence=f"Two masks of {name} on this network have an IoU of {_listed(parts)}, where random masks have"
        f" {chance:.3f}.",
        figures=[
            Bars(
                title=f"Mean IoU of {masks} masks of the same task, with a 95 % bootstrap interval over the masks from"
                " three masks on (both: the run's second mask, so two masks). By chance: random masks of the same"
                " layer sizes.",
                label="IoU",
                unit="number",
                groups=list(found),
                series=[Series(name=name, values=values, chance=[entry["chance"] for entry in found.values()])],
            )
        ],
        tables=[
            Table(
                title="Mean IoU in each layer",
                columns=["layer", *found],
                rows=[[layer, *(entry["per_layer"][layer] for entry in found.values())] for layer in layers],
            )
        ],
        numbers={way: entry["iou"]["mean"] for way, entry in found.items()},
    )


_QUESTIONS: dict[str, Callable[[Asked, Found], Answer | None]] = {
    "accuracy": _accuracy,
    "confusion-change": _confusion,
    "weights": _pictures,
    "gates": _gates,
    "faithfulness": _faithfulness,
    "minimality": _minimality,
    "completeness": _completeness,
    "layers": _layers,
}


def _own_metrics(asked: Asked, name: str) -> Mapping[str, Callable[..., float]]:
    return {name: asked.metrics[name]} if name in asked.metrics else asked.metrics


def _randoms(found: Found, name: str) -> Mapping[str, Band]:
    return cast(Mapping[str, Band], found.masks[name].get("random_accuracy", {}))


def _random(found: Found, name: str, task: str) -> Value:
    band = _randoms(found, name).get(task)
    return None if band is None else _spread(band)


def _spread(band: Band) -> Spread:
    return Spread(band["mean"], band["low"], band["high"])


def _together(found: Sequence[Band]) -> Spread:
    """Return the mean over several metrics of what each draw's band says."""
    return Spread(*(_mean([band[part] for band in found]) for part in ("mean", "low", "high")))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spaced(count: int, most: int) -> list[float]:
    shown = min(count, most)
    return [index * (count - 1) / max(shown - 1, 1) for index in range(shown)]


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _told(values: Mapping[str, float], each: str, together: str) -> str:
    """Write each name with its value, or, where there are many, only how far the values reach."""
    if len(values) > _MANY_TASKS:
        return together.format(span(list(values.values())))
    return _listed(each.format(name, percent(value)) for name, value in values.items())


def _points(difference: float) -> str:
    points = 100 * difference
    if abs(points) < 0.05:
        return "the network's"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} the network's"


def _listed(parts: Any) -> str:
    *front, last = parts
    return f"{', '.join(front)} and {last}" if front else last

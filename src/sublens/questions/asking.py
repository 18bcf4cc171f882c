"""Every question of a run, and those about its accuracy, its answers and its gates."""

from collections.abc import Callable, Mapping
from itertools import product

from sublens.answers import LARGEST_MATRIX, Answer, Bars, Figure, Histogram, Matrix, Series, Value, span
from sublens.questions.checks import MOST_SHOWN, ask_completeness, ask_faithfulness, ask_layers, ask_minimality
from sublens.questions.found import (
    BINS,
    MANY_TASKS,
    Found,
    by_chance,
    each_by_chance,
    mean_of,
    told_of_each,
    unsure_share,
)
from sublens.questions.weights import ask_weights
from sublens.study import Asked


def _accuracy(asked: Asked, found: Found) -> Answer | None:
    tasks, masks = list(found.network), list(found.masks)
    if not tasks:
        return None
    groups = ["whole network", *(f"{name} mask" for name in masks)]
    if len(tasks) < MANY_TASKS:
        series = [
            Series(
                name=f"on {task}",
                values=[found.network[task], *(found.masks[name]["accuracy"][task] for name in masks)],
                chance=[None, *(by_chance(found, name, task) for name in masks)],
            )
            for task in tasks
        ]
    else:
        seen = {"": found.network, **{name: found.masks[name]["accuracy"] for name in masks}}
        random = {name: {task: band["mean"] for task, band in each_by_chance(found, name).items()} for name in masks}
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
    sentence = f"Under its own mask, {told_of_each(kept, '{} has {}', 'a task has {}')}"
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
    return accuracy[name] if name in accuracy else mean_of(list(accuracy.values()))


def _others_mean(accuracy: Mapping[str, float], name: str) -> Value:
    return mean_of([value for task, value in accuracy.items() if task != name]) if name in accuracy else None


def _transfer(found: Found) -> Matrix:
    tasks = list(found.network)
    rows: dict[str, list[float | None]] = {"whole network": [found.network[task] for task in tasks]}
    for name, mask in found.masks.items():
        rows[f"{name} mask"] = [mask["accuracy"][task] for task in tasks]
        if name in found.repeats:
            rows[f"{name} mask, another seed"] = [found.repeats[name][task] for task in tasks]
    # The control's random masks are larger than the tasks', so they do not belong in this mean.
    random = [each_by_chance(found, name) for name in found.masks if name in found.network]
    if random and all(random):
        rows["random masks of the tasks' sizes"] = [mean_of([one[task]["mean"] for one in random]) for task in tasks]
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
    if len(answered) > MANY_TASKS:
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
        if len(figures) < MOST_SHOWN + 1:
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


def _gates(asked: Asked, found: Found) -> Answer | None:
    shares = {
        name: [count / sum(counts) for count in counts]
        for name, counts in found.keep_probabilities.items()
        if sum(counts)
    }
    if not shares:
        return None
    unsure = {name: unsure_share(found.keep_probabilities[name]) for name in shares}
    sentence = told_of_each(unsure, "{1} of {0}'s", "{} of each mask's")
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


_QUESTIONS: dict[str, Callable[[Asked, Found], Answer | None]] = {
    "accuracy": _accuracy,
    "confusion-change": _confusion,
    "weights": ask_weights,
    "gates": _gates,
    "faithfulness": ask_faithfulness,
    "minimality": ask_minimality,
    "completeness": ask_completeness,
    "layers": ask_layers,
}


def ask(asked: Asked, found: Found) -> dict[str, Answer]:
    """Ask every question that the run can answer; return name -> answer."""
    answers = {name: question(asked, found) for name, question in _QUESTIONS.items()}
    return {name: answer for name, answer in answers.items() if answer is not None}

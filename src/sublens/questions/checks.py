"""Whether a mask is what it is taken for: faithfulness, minimality, completeness, and its layers one by one."""

from sublens.analysis import ablate, ablate_layers, bands, blocks_of, completeness, minimality
from sublens.answers import Answer, Bars, Figure, Lines, Series, Table, Value, percent, span
from sublens.mask import Mask
from sublens.questions.found import (
    Found,
    as_spread,
    each_by_chance,
    in_points,
    listed,
    mean_of,
    mean_spread,
    own_metrics,
    told_of_each,
)
from sublens.study import Asked, seed_from

_DRAWS = 3  # of what each question draws; the study's random_masks if they are fewer
MOST_SHOWN = 3  # masks that have a figure of their own, where each needs one
_BLOCKS = 6
_FRACTIONS = (0.05, 0.2, 0.5)


def ask_faithfulness(asked: Asked, found: Found) -> Answer | None:
    """Does the control mask have what the network has?"""
    control = asked.study.control.name
    masked = found.masks[control]["accuracy"]
    if not masked:
        return None
    differences = {task: masked[task] - found.network[task] for task in found.network}
    worst = min(differences, key=lambda task: differences[task])
    random = each_by_chance(found, control)
    return Answer(
        title="Does the control mask have what the network has?",
        sentence=f"The mask of the whole problem keeps {percent(found.masks[control]['kept'])} of the weights;"
        f" at worst, on {worst}, its accuracy is {in_points(differences[worst])}.",
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


def ask_minimality(asked: Asked, found: Found) -> Answer | None:
    """Does a mask keep more than it needs?"""
    draws = min(_DRAWS, asked.study.random_masks)
    if not draws or not found.network:
        return None
    series = []
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    numbers: dict[str, float | None] = {}
    for name in found.masks:
        metrics = own_metrics(asked, name)
        measured = minimality(
            asked.network,
            asked.masks[name],
            metrics,
            fractions=_FRACTIONS,
            draws=draws,
            seed=seed_from(asked.seed, "minimality", name),
        )
        before = mean_of([found.masks[name]["accuracy"][task] for task in metrics])
        after = [mean_spread(list(measured[fraction].values())) for fraction in _FRACTIONS]
        random = [band["mean"] for task, band in each_by_chance(found, name).items() if task in metrics]
        chance = mean_of(random) if random else None
        series.append(Series(name=name, values=[before, *after], chance=[chance] * (1 + len(_FRACTIONS))))
        numbers |= {f"{name}_{fraction:g}": spread.mean for fraction, spread in zip(_FRACTIONS, after, strict=True)}
        first[name], second[name] = before, after[0].mean
    return Answer(
        title="Does a mask keep more than it needs?",
        sentence="Accuracy on its own task is "
        f"{told_of_each(first, '{1} under the {0} mask', '{} under each mask')}; without a random"
        f" {100 * _FRACTIONS[0]:g}\u00a0% of what the mask keeps in each layer it is"
        f" {told_of_each(second, '{1} for {0}', '{}')}.",
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


def ask_completeness(asked: Asked, found: Found) -> Answer | None:
    """Does what a mask removes still know the task?"""
    draws = min(_DRAWS, asked.study.random_masks)
    if not draws or not found.network:
        return None
    values: dict[str, float] = {}
    chances: list[Value] = []
    numbers: dict[str, float | None] = {}
    above = []
    for name in found.masks:
        metrics = own_metrics(asked, name)
        left, random = completeness(
            asked.network, asked.masks[name], metrics, draws=draws, seed=seed_from(asked.seed, "completeness", name)
        )
        value, chance = mean_of(list(left.values())), mean_spread(list(random.values()))
        values[name] = value
        chances.append(chance)
        numbers |= {f"{name}_inverse": value, f"{name}_inverse_by_chance": chance.mean}
        if value > chance.high:
            above.append(name)
    beyond = f"for {listed(above)} that is more than" if above else "none of them is more than"
    return Answer(
        title="Does what a mask removes still know the task?",
        sentence="With only the weights that a mask removes, accuracy is "
        f"{told_of_each(values, '{1} for {0}', '{}')};"
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


def ask_layers(asked: Asked, found: Found) -> Answer | None:
    """Where in the network is each function?"""
    draws = min(2, asked.study.random_masks)
    tasks = [task.name for task in asked.study.tasks][:2]
    if not draws or not found.network:
        return None
    figures: list[Figure] = []
    numbers: dict[str, float | None] = {}
    parts = []
    for name in tasks:
        mask, metrics = asked.masks[name], own_metrics(asked, name)
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
                        values=[as_spread(measured[block][fill][name]) for block in blocks],
                        chance=[as_spread(random[block][name]) for block in blocks] if fill == "zero" else (),
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
        f" replaces them, {listed(parts)}.",
        figures=figures,
        numbers=numbers,
    )

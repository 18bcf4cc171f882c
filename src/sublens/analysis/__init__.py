"""What masks say: accuracy under them, and overlap between them, always beside what chance gives."""

from sublens.analysis.accuracy import accuracies, first_half, interrogate, measuring
from sublens.analysis.chance import Distribution, shared_by_chance, total
from sublens.analysis.overlap import overlap

__all__ = [
    "Distribution",
    "accuracies",
    "first_half",
    "interrogate",
    "measuring",
    "overlap",
    "shared_by_chance",
    "total",
]

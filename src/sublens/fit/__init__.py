"""Training a mask: one call from a frozen network to a run with its mask, logits and history."""

from sublens.fit.run import Run, fit
from sublens.fit.settings import Settled
from sublens.fit.strength import AlphaPath
from sublens.fit.tasks import fit_tasks

__all__ = ["AlphaPath", "Run", "Settled", "fit", "fit_tasks"]

"""What every run asks of its masks: the paper's figures, and the checks without which they mean little.

Each question returns an ``Answer`` (``sublens.answers``), or ``None`` where the run has nothing to ask it of. A study's
own questions stand beside these, in the same form.
"""

from sublens.questions.asking import ask
from sublens.questions.found import BINS, Found, keep_histogram, unsure_share
from sublens.questions.luck import stability_of

__all__ = ["BINS", "Found", "ask", "keep_histogram", "stability_of", "unsure_share"]

"""What masks say: accuracy under them, and overlap between them, always beside what chance gives."""

from sublens.analysis.ablation import (
    FILLS,
    ablate,
    ablate_layers,
    ablated,
    blocks_of,
    completeness,
    faithfulness,
    minimality,
    thinned,
    transfer,
)
from sublens.analysis.accuracy import accuracies, bands, first_half, interrogate, measuring
from sublens.analysis.chance import Distribution, shared_by_chance, total
from sublens.analysis.overlap import overlap
from sublens.analysis.sharing import reused_share, sharing_index
from sublens.analysis.stability import stability
from sublens.analysis.verdict import Evidence, Excluded, Reused, ability, gather, judge, retention
from sublens.intervals import t_interval

__all__ = [
    "FILLS",
    "Distribution",
    "Evidence",
    "Excluded",
    "Reused",
    "ability",
    "ablate",
    "ablate_layers",
    "ablated",
    "accuracies",
    "bands",
    "blocks_of",
    "completeness",
    "faithfulness",
    "first_half",
    "gather",
    "interrogate",
    "judge",
    "measuring",
    "minimality",
    "overlap",
    "retention",
    "reused_share",
    "shared_by_chance",
    "sharing_index",
    "stability",
    "t_interval",
    "thinned",
    "total",
    "transfer",
]

"""Why does this mask not train? The answer, read from a loss's autograd graph and from its numbers."""

from sublens.diagnosis.diagnose import check_first_step as check_first_step
from sublens.diagnosis.diagnose import diagnose as diagnose
from sublens.diagnosis.findings import Diagnosis as Diagnosis
from sublens.diagnosis.findings import Finding as Finding

__all__ = ["Diagnosis", "Finding", "check_first_step", "diagnose"]

"""Granularity: which elements of a parameter share one logit. An axis of its own beside gate and selection."""

from sublens.groups.factored import FactoredWeight, factors
from sublens.groups.grouping import GroupedGate, Grouping
from sublens.groups.naming import Groups, check_groups, group

__all__ = ["FactoredWeight", "GroupedGate", "Grouping", "Groups", "check_groups", "factors", "group"]

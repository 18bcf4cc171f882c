"""Inspecting a study from beginning to end: the network, its masks, what they say, and the run folder."""

from sublens.inspection.folder import default_folder
from sublens.inspection.inspecting import inspect, progress_of
from sublens.inspection.together import used_before

__all__ = ["default_folder", "inspect", "progress_of", "used_before"]

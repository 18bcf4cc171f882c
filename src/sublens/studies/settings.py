"""Checks of the settings that several built-in studies have."""

from collections.abc import Mapping
from typing import Any

from sublens.errors import StudyError


def chosen_preset(presets: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return a copy of a preset's settings.

    Raises:
        StudyError: there is no such preset.
    """
    if name not in presets:
        raise StudyError(f"No preset {name!r}; the presets are {', '.join(presets)}.")
    return dict(presets[name])


def whole(name: str, value: object, least: int, most: int) -> int:
    """Return ``value`` if it is a whole number in ``least..most``.

    Raises:
        StudyError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise StudyError(f"{name}={value!r} must be a whole number from {least:,} to {most:,}.")
    return value


def truth(name: str, value: object) -> bool:
    """Return ``value`` if it is a truth value.

    Raises:
        StudyError: it is not.
    """
    if not isinstance(value, bool):
        raise StudyError(f"{name}={value!r} must be true or false.")
    return value

"""How a training call of a masked network is computed, and by which route."""

from sublens.routes.choosing import Routes, Sampling

__all__ = ["Routes", "Sampling"]

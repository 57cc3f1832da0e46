"""Serves many adapters with one model: which adapters are in memory, and which row of a batch uses which."""

from .store import AdapterStore

__all__ = ["AdapterStore"]

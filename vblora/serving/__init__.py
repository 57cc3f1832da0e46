"""Thousands of adapters for one model: which of them are in memory, and which row of a batch uses which."""

from .store import AdapterStore

__all__ = ["AdapterStore"]

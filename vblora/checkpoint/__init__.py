"""Adapters on disk."""

from .native import load, save

__all__ = ["load", "save"]

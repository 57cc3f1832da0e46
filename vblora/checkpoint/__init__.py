"""Adapters as files."""

from .folder import load, save
from .optimizer import pack_optimizer, unpack_optimizer

__all__ = ["load", "pack_optimizer", "save", "unpack_optimizer"]

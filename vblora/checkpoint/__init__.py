"""Adapters as files."""

from .optimizer import pack_optimizer, unpack_optimizer
from .save_load import load, save

__all__ = ["load", "pack_optimizer", "save", "unpack_optimizer"]

"""Adapted layers: frozen layers that add low-rank updates to their output."""

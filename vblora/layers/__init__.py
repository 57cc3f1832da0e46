"""Adapted layers: where the factors of an update meet a frozen layer."""

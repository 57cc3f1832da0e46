"""Adapters in a whole model: inject, switch, merge and train them."""

"""A whole model with adapters: put them in, switch them, merge them, train them."""

"""PEFT's file formats, one module per method."""

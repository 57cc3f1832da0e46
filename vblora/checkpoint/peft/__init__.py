"""PEFT's file formats, one module a method."""

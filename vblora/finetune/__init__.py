"""The program behind ``vblora finetune``."""

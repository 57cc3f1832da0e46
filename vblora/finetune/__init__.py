"""The programs behind `vblora finetune`."""

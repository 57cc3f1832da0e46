"""``python -m vblora.finetune`` is ``vblora finetune``, for ``accelerate launch -m`` and ``torchrun -m``."""

import sys

from ..cli import main

sys.exit(main(["finetune", *sys.argv[1:]]))

"""``python -m vblora`` is the command ``vblora``."""

import sys

from .cli import main

sys.exit(main())

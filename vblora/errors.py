"""The error that ends a command, the category of all warnings, and what messages share."""

import re
from collections.abc import Callable, Iterable
from typing import Any


class CommandError(Exception):
    """A one-line message for the user, and an exit code: 2 for invalid input, 1 for a later failure, 130 after Ctrl-C."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


def in_options(error: Exception, *names: str) -> str:
    """The message of an error of the Python API, in the words of the command line.

    Args:
        names: arguments of Python that are options of the command.
    """
    message = str(error).replace("pad=True", "--pad")
    message = re.sub(r'form="([a-z-]+)"', r"--form \1", message)
    message = re.sub(rf"`({'|'.join(names)})`", lambda name: f"--{name[1].replace('_', '-')}", message)
    return message.replace(
        "Pass that as --bank.", "Give its file, or the folder of the adapter that holds it, as --bank."
    )


def listed(names: Iterable[Any], form: Callable[[Any], str] = "`{}`".format, most: int = 4) -> str:
    """Names for a message: the first ``most``, each as ``form`` writes it, and how many more there are; "none" of none."""
    names = list(names)
    first = ", ".join(map(form, names[:most])) or "none"
    return f"{first} and {len(names) - most} more" if len(names) > most else first


class VBLoRAWarning(UserWarning):
    """The category of every warning of this package.

    ``warnings.filterwarnings("error", category=vblora.VBLoRAWarning)`` makes them errors, ``"ignore"`` hides them.
    """

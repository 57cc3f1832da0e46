"""The error that ends a command, and the category of all warnings."""


class CommandError(Exception):
    """A one-line message for the user, and an exit code: 2 for invalid input, 1 for a later failure, 130 after Ctrl-C."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


class VBLoRAWarning(UserWarning):
    """The category of every warning of this package.

    ``warnings.filterwarnings("error", category=vblora.VBLoRAWarning)`` makes them errors, ``"ignore"`` hides them.
    """

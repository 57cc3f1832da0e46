"""The error of the command line."""


class CommandError(Exception):
    """A message of one line, and the exit code: 2 for a wrong argument or file, 1 for a later failure, 130 after Ctrl-C."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code

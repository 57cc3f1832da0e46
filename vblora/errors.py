"""What a command says when it cannot go on."""


class CommandError(Exception):
    """One line for the user, and the exit code: 2 for a fault in what was asked for, 1 for a later one, 130 after Ctrl-C."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code

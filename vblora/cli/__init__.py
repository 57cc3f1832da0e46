"""The ``vblora`` command."""

import argparse
import difflib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import CommandError
from ..files import is_failed_file
from . import convert, finetune, generate, info, merge, plot, predict, train_bank

# Each has add_parser(subparsers) and run(arguments) -> exit code.
_COMMANDS = (finetune, predict, generate, train_bank, info, plot, convert, merge)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)  # or a typo may be another option's abbreviation
        self.commands: dict[str, _Parser] = {}

    def error(self, message: str) -> NoReturn:
        """Prints one line, without the usage that argparse prints."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Ends with the error that arguments are unknown, and the option that the first is like."""
        option = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))


def make_parser() -> _Parser:
    parser = _Parser(prog="vblora", description="Trains, runs, inspects and converts VB-LoRA adapters.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    parser.commands = commands.choices
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` names, by default the arguments of this process.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a wrong argument or a wrong file, 130 after Ctrl-C or SIGTERM, 141 if nobody
        reads the standard output any more.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The console may lack a character of a path or a label. That must not fail a command whose work is done.
        sys.stdout.reconfigure(errors="backslashreplace")
    name = "vblora"
    try:
        try:
            arguments = _parse(argv)
        except SystemExit as exit:  # after --help, or an error
            code = int(exit.code or 0)
        else:
            name = f"vblora {arguments.command}"
            with _sigterm_as_ctrl_c():
                code = arguments.run(arguments)
        _flush()
    except CommandError as error:
        print(f"{name}: {'' if error.code == 130 else 'error: '}{error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # such as of `| head`
        _forget_output()
        return 141
    except Exception as error:
        if not is_failed_file(error):
            raise
        print(f"{name}: error: {CommandError(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; no file was written.", file=sys.stderr)
        return 130
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.commands[arguments.command].refuse(unknown)
    return arguments


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Within it, SIGTERM, which `kill` and schedulers send, removes what is half written, too."""
    here = threading.current_thread() is threading.main_thread()  # where alone Python allows it
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _flush() -> None:
    """Writes what is left of the standard output while an error of that can still be told."""
    try:
        if sys.stdout is not None:  # it is None if the shell closed it
            sys.stdout.flush()
    except OSError:
        _forget_output()
        raise


def _forget_output() -> None:
    """Keeps Python from writing the rest of the standard output, which would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

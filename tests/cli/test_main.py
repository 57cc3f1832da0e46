"""How a command ends that is interrupted, or whose output nobody reads."""

import os
import signal
import threading

import pytest

from vblora.cli import main


def write_half(path) -> int:
    """A command that is ended while it writes a file."""
    from vblora.files import atomic_replacement

    with atomic_replacement(path) as temporary:
        temporary.write_text("half")
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "it would end the tests"
        signal.raise_signal(signal.SIGTERM)
    return 0


def test_sigterm_removes_what_is_half_written(tmp_path, capsys, monkeypatch):
    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr("vblora.cli.info.run", lambda arguments: write_half(arguments.folder / "file"))
    assert main(["info", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "vblora info: interrupted; no file was written.\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("arguments", [["--help"], ["info", "folder"]])
def test_an_output_that_nobody_reads_ends_the_command_quietly(arguments, capsys, monkeypatch):
    monkeypatch.setattr("vblora.cli.info.run", lambda _: print("all that it holds") or 0)
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as context, open(writer, "w") as closed:
        context.setattr("sys.stdout", closed)
        assert main(arguments) == 141
    assert capsys.readouterr().err == ""


def test_an_output_that_cannot_be_written_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("vblora.cli.info.run", lambda _: print("all that it holds") or 0)
    with monkeypatch.context() as context, open("/dev/full", "w") as full:
        context.setattr("sys.stdout", full)
        assert main(["info", "folder"]) == 1
    assert capsys.readouterr().err == "vblora info: error: [Errno 28] No space left on device\n"

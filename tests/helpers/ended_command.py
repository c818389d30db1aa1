"""A command that the command line runs in this process, and the exit code that it ends with."""

import sys

import pytest

from pageferry.cli import outcome


class WrongCommandLine(Exception):
    def format_message(self):
        return "no such option"


def ending(command, *arguments):
    """The exit code of a command that is run with these arguments."""
    argv, sys.argv = sys.argv, ["pageferry", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            outcome.run(command, WrongCommandLine)
    finally:
        sys.argv = argv
    return ended.value.code


def failing(error):
    def command():
        raise error

    return command

"""The ``pageferry`` command, also as ``python -m pageferry``."""

import importlib
import signal


def run() -> None:
    """Run the command, and end the process; a Ctrl-C while it is still being loaded ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    importlib.import_module("pageferry.cli.main").run()


if __name__ == "__main__":
    run()

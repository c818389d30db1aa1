"""``python -m pageferry`` is the ``pageferry`` command."""

from pageferry.cli.main import run

run()

"""What status prints of a guest process."""

from pageferry.cli.commands.control import status
from pageferry.vmm.qmp import QmpServer


def test_a_name_that_a_terminal_would_obey_is_shown(tmp_path, capsys):
    """A guest is named after a file, whose name may hold anything."""
    waiting = {"name": "a\x1b[2J\nb", "accel": "soft", "accel_reason": "\x9b", "listening": None, "silent_s": None}
    answers = {"query-status": {"status": "inmigrate"}, "x-query-guest": waiting, "query-migrate": {}}
    commands = {name: lambda _, answer=answer: answer for name, answer in answers.items()}
    server = QmpServer(tmp_path / "qmp.sock", commands)
    server.start()
    try:
        status(tmp_path / "qmp.sock")
    finally:
        server.close()
    assert capsys.readouterr().out == "a\\x1b[2J\\nb: inmigrate on soft (\\x9b)\n"

"""What status prints of a guest process."""

import pytest

from pageferry.cli.commands.control import status
from pageferry.cli.status import print_status
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
    assert capsys.readouterr().out == "a\\x1b[2J\\nb: waiting for a guest on soft (\\x9b)\n"


@pytest.mark.parametrize(
    ("word", "guest_at", "said"),
    [
        ("running", "source", "running"),
        ("inmigrate", None, "waiting for a guest"),
        ("postmigrate", "destination", "the guest is not here any more; it ran"),
        ("postmigrate", "unknown", "not known whether the guest has left; it ran"),
        ("guest-panicked", "source", "crashed"),
    ],
)
def test_a_person_is_told_in_words_what_qmp_says_by_its_own(word, guest_at, said):
    state = {"name": "kv", "status": word, "guest_at": guest_at, "accel": "soft", "accel_reason": "asked for"}
    lines = []
    print_status(state | {"listening": None, "silent_s": None, "migration": None}, lines.append)
    assert lines == [f"kv: {said} on soft (asked for)"]


def test_the_outlook_has_one_unit_for_all_its_times():
    ram = {"remaining": 1 << 20, "mbps": 8.388608, "dirty-pages-rate": 256}
    migration = {"status": "active", "ram": ram, "expected-downtime": 21847, "x-eta-s": 21.6, "x-eta-reason": ""}
    state = {"name": "kv", "status": "running", "accel": "soft", "accel_reason": "asked for", "listening": None}
    lines = []
    print_status(state | {"silent_s": None, "migration": migration}, lines.append)
    assert lines[1].endswith("1 MiB/s sent, 1 MiB/s dirtied, a pause now would take 21.85 s, over in 21.60 s")

"""Certificates for tests: of any authority, name, time and purpose, in directories as `--tls-dir` wants them."""

import datetime
from pathlib import Path

from pageferry.engine.wire.certificates import Authority
from pageferry.engine.wire.credentials import CA_CERT, FILES
from pageferry.stream.ferry_order import Side

NOW = datetime.datetime.now(datetime.UTC)
YEAR = datetime.timedelta(days=365)


def authority(name="the tests' CA", *, now=NOW):
    """A CA that is valid for 30 days from ``now`` on, as is what it issues."""
    return Authority(name, days=30, now=now)


def tls_dir(path: Path, side, ca, *names, trusted=None, server=None):
    """Make what ``side`` needs in ``path``: issued by ``ca``, trusting ``trusted``; return the path."""
    path.mkdir()
    issued = ca.issue(names[0], names=names[1:], server=side is Side.DESTINATION if server is None else server)
    certificate, key = FILES[side]
    for name, content in (
        (CA_CERT, (trusted or ca).issued.certificate),
        (certificate, issued.certificate),
        (key, issued.key),
    ):
        (path / name).write_bytes(content)
        (path / name).chmod(0o600)
    return path

"""Xen's own tools for tests: ``verify-stream-v2``, which reads a stream by Xen's specification."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from debian_root import unpack

from pageferry.guests.linux.debian import downloaded

_BUILD = Path(__file__).parents[2] / "build"
_PACKAGES = _BUILD / "linux" / "packages"
_PACKAGE = "xen-utils-4.17"
_PROGRAM = "bin/verify-stream-v2"
#: Where Debian's package puts it, here or where ``make test-xen`` unpacks it.
_PLACES = (Path("/usr/lib"), _BUILD / "xen" / "root" / "usr" / "lib")


def find_xen_tools(folder):
    """The directory of Xen's tools; where they are not installed Debian's package is unpacked into a folder.

    Raises:
        UnsupportedError: the package cannot be had.
    """
    for place in _PLACES:
        if found := sorted(place.glob(f"xen-*/{_PROGRAM}")):
            return found[-1].parents[1]
    _PACKAGES.mkdir(parents=True, exist_ok=True)
    with (_PACKAGES / "lock").open("w") as lock:  # tests run at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        unpack(downloaded(_PACKAGE, _PACKAGES), folder)
    return next(folder.glob(f"usr/lib/xen-*/{_PROGRAM}")).parents[1]


def verify_stream(tools, path, kind):
    """Have Xen's tool verify a file; return what it objects to.

    Args:
        tools: the directory of Xen's tools.
        path: of the file.
        kind: ``xl``, ``libxl`` or ``libxc``.
    """
    environment = os.environ | {"PYTHONPATH": str(tools / "lib/python")}
    command = [sys.executable, tools / _PROGRAM, "-i", path, "-f", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stderr.strip() or (f"exit code {done.returncode}" if done.returncode else "")

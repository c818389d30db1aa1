"""Files that a process writes and that have no name yet."""

import os
from pathlib import Path


def unnamed_in(folder, pid="self"):
    """Return where the unnamed files can be opened that a process has in a folder."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith(f"{folder}/#") and target.endswith(" (deleted)"):
            found.append(link)
    return found

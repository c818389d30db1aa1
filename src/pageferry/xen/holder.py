"""Who else moves a domain: Xen's tools, found among the processes of this dom0.

libxl has a process of its own do the work, ``libxl-save-helper``, and names it the domain by number.

Source: Xen 4.17, the command lines of ``xl save`` and ``xl migrate`` under way.
"""

from pathlib import Path

PROC = Path("/proc")
_HELPER, _SAVES = "libxl-save-helper", "--save-domain"
#: Its arguments: its own name, what it does, where it writes, where it reads, the domain.
_DOMID_AT = 4


def holder_of(domid: int, proc: Path = PROC) -> str:
    """Return the process of this dom0 that saves or moves a domain by Xen's tools, in words; empty: there is none."""
    for entry in proc.iterdir():
        words = _words(entry)
        helps = len(words) > _DOMID_AT and Path(words[0]).name == _HELPER and words[1] == _SAVES
        if helps and words[_DOMID_AT] == str(domid):
            pid = _parent(entry)
            by = _in_words(_words(proc / pid)) if pid else ""
            return f"process {pid}, {by}" if by else f"process {entry.name}, {_HELPER}"
    return ""


def _in_words(command: list[str]) -> str:
    """Return a program's name and what it is to do, however it was found: Debian's ``xl`` runs one of another place."""
    return " ".join([*(Path(word).name for word in command[:1]), *command[1:2]])


def _words(entry: Path) -> list[str]:
    if not entry.name.isdecimal():
        return []
    try:
        return (entry / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:  # it has just ended
        return []


def _parent(entry: Path) -> str:
    try:
        lines = (entry / "status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[1] for line in lines if line.startswith("PPid:")), "")

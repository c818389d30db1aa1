"""What `pageferry --help` and `pageferry status` cost, against `python -c pass`.

CPU time, user and system, of the whole process: the least of some runs, since whatever else the machine does only adds
to it. `status` asks an idle guest's process on the software hypervisor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pageferry.cli.guest_child import GuestChild

PASS = (sys.executable, "-c", "pass")
PAGEFERRY = (sys.executable, "-m", "pageferry")
GUEST = ("run", "idle", "--memory", "8M", "--accel", "soft")


def cpu_s(command: Sequence[str], runs: int) -> float:
    """Return the least CPU time that a command took."""
    taken_s = []
    for _ in range(runs):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        taken_s.append(usage.ru_utime + usage.ru_stime)
    return min(taken_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15, help="of each command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pageferry-") as folder, GuestChild("guest", Path(folder), *GUEST) as guest:
        guest.connect().close()
        control = str(Path(folder, "guest.sock"))
        commands = {
            "python -c pass": PASS,
            "pageferry --help": (*PAGEFERRY, "--help"),
            "pageferry status": (*PAGEFERRY, "status", "--control", control),
        }
        found_s = {name: cpu_s(command, options.runs) for name, command in commands.items()}
    base_s = found_s["python -c pass"]
    if options.json:
        print(json.dumps({name: {"cpu_s": each, "ratio": each / base_s} for name, each in found_s.items()}, indent=2))
        return
    for name, each in found_s.items():
        print(f"{name:<18} {each:6.3f} s of CPU  {each / base_s:5.1f} times python -c pass")


if __name__ == "__main__":
    main()

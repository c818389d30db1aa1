"""Saving and moving a domain of Xen: pageferry against ``xl``, the same PVH guest at work in the same dom0, in turn.

* save: ``pageferry save xen:NAME FILE`` against ``xl save -c NAME FILE``, to memory;
* move: ``pageferry migrate xen:NAME`` against ``xl migrate``, to the same host, both through ``xl migrate-receive``.

*Total* is the time of the whole command, the start of its interpreter included; *by itself* is that of the attempt as
its report has it. The *pause* is how long the domain was seen to stand still, asked of Xen every 5 ms. Ratios are ours
to xl's, each of two that ran one after the other. Needs a dom0 with Xen's tools and root. A host without one can
emulate it, in a few minutes::

    run="$PWD/.venv/bin/python benchmarks/xen_domains.py --memory-mib 64 --repeats 1 --no-move"
    PYTHONPATH=tests/helpers .venv/bin/python tests/vm/xen.py --processors 1 --shell "$run"

The domain has a quarter of a processor at most.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from xen_guests import create, destroy, domid_of, load_program, low_memory, wait_for_work, xl

from pageferry.core.errors import PageferryError, UnsupportedError
from pageferry.guests.boot import GuestParams
from pageferry.xen.domctl import Control
from pageferry.xen.store import XenStore

_NAME = "bench"
_LACKING = 5
_LOOK_S = 0.005
#: Percent of a processor that the domain has: where all of it is emulated, what it computes is taken from dom0.
_CAP = 25
_MIB = 1 << 20


class Watch:
    """Looks at a domain all the time: how long it stands still; and suspends it when Xen's tools ask it to.

    The guest program has no drivers of Xen, so this stands in for one.
    """

    def __init__(self, control: Control, store: XenStore, domid: int) -> None:
        self._control, self._store, self._domid = control, store, domid
        self._over = threading.Event()
        self._still_s: list[float] = []
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        path, since_s = f"/local/domain/{self._domid}/control/shutdown", None
        while not self._over.wait(_LOOK_S):
            with contextlib.suppress(PageferryError):
                if self._store.read(path) == "suspend":
                    self._store.write(path, "")
                    self._control.suspend(self._domid)
                info = self._control.info(self._domid)
                now_s = time.monotonic()
                if info.paused or info.shutdown_reason is not None:
                    since_s = since_s or now_s
                elif since_s is not None:
                    self._still_s.append(now_s - since_s)
                    since_s = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look for the length of a ``with`` block."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    @property
    def pause_s(self) -> float:
        """The longest that the domain stood still and went on."""
        return max(self._still_s, default=0.0)


def run(command: Sequence[str]) -> tuple[float, str]:
    """Run a command; return how long it took and what it printed."""
    began_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took_s = time.monotonic() - began_s
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}")
    return took_s, done.stdout


def save(control: Control, store: XenStore, command: Sequence[str]) -> dict[str, float]:
    """Have a command save the domain, which goes on; return what it took."""
    watch = Watch(control, store, domid_of(_NAME))
    with watch.watching():
        took_s, printed = run(command)
    return {"total_s": took_s, "pause_s": watch.pause_s, **_of_report(printed)}


def move(control: Control, store: XenStore, command: Sequence[str], memory_bytes: int) -> dict[str, float]:
    """Have a command move the domain to this very host; return what it took."""
    watch = Watch(control, store, domid_of(_NAME))
    with watch.watching():
        took_s, printed = run(command)
    destroy(f"{_NAME}--migratedaway")
    memory = low_memory(control, domid_of(_NAME), memory_bytes)
    wait_for_work(memory)
    memory.close()
    return {"total_s": took_s, **_of_report(printed)}


def _of_report(printed: str) -> dict[str, float]:
    try:
        report = json.loads(printed)
    except ValueError:
        return {}
    parts = {f"pause: {name}": seconds for name, seconds in report["downtime_parts_s"].items()}
    return {"by_itself_s": report["total_s"], "reported_pause_s": report["downtime_s"], **parts}


def measure(options: argparse.Namespace, control: Control, store: XenStore, folder: Path) -> dict[str, Any]:
    """Measure all of it; return what each run took, by what was done and by whom."""
    memory_bytes = options.memory_mib * _MIB
    domid = create(folder, _NAME, memory_mib=options.memory_mib, more=f"cap = {_CAP}")
    params = GuestParams(working_set_bytes=options.working_set_mib * _MIB)
    memory, _ = load_program(control, domid, "kv", memory_bytes - _MIB, params=params)
    control.unpause(domid)
    wait_for_work(memory, 100)
    memory.close()
    ours, policy = [sys.executable, "-m", "pageferry"], ["--policy", options.policy, "--json"]
    file = str(folder / "file")
    found: dict[str, Any] = {"save": {"xl": [], "pageferry": []}, "move": {"xl": [], "pageferry": []}}
    for _ in range(options.repeats):
        found["save"]["xl"].append(save(control, store, ["xl", "save", "-c", _NAME, file]))
        Path(file).unlink()
        found["save"]["pageferry"].append(save(control, store, [*ours, "save", f"xen:{_NAME}", file, *policy]))
        Path(file).unlink()
        print(".", end="", file=sys.stderr, flush=True)
    for _ in range(0 if options.no_move else options.repeats):
        theirs = ["xl", "migrate", "-s", "", _NAME, "xl migrate-receive"]
        found["move"]["xl"].append(move(control, store, theirs, memory_bytes - _MIB))
        mine = [*ours, "migrate", f"xen:{_NAME}", "--through", "xl migrate-receive", *policy]
        found["move"]["pageferry"].append(move(control, store, mine, memory_bytes - _MIB))
        print(".", end="", file=sys.stderr, flush=True)
    return found


def print_table(found: dict[str, Any]) -> None:
    """Print medians, with the smallest and the largest, and ratios."""
    for what, by in found.items():
        for name in dict.fromkeys(key for runs in by.values() for each in runs for key in each):
            row = [f"{what:5} {name:22}"]
            for whom, runs in by.items():
                values = [each[name] for each in runs if name in each]
                row.append(f"{whom} {_spread(values)} s" if values else f"{whom} -")
            both = zip(by["pageferry"], by["xl"], strict=True)
            same = "total_s" if name == "by_itself_s" else name
            ratios = [a[name] / b[same] for a, b in both if name in a and b.get(same)]
            print("  ".join([*row, f"ratio {_spread(ratios)}" if ratios else ""]))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--working-set-mib", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policy", default="xen")
    parser.add_argument("--no-move", action="store_true", help="only save")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        try:
            control = stack.enter_context(Control())
            store = stack.enter_context(XenStore())
        except UnsupportedError as error:
            print(f"xen_domains: {error}", file=sys.stderr)
            return _LACKING
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(destroy, _NAME)
        xl("list")
        found = measure(options, control, store, folder)
    if options.json:
        print(json.dumps(found))
    else:
        print()
        print_table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

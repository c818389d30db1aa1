"""Every kind of machine that this project has, by name, for tests that run on all of them.

A name is ``accel/tracker``. Trackers come from the registries, so a new one joins by itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.machine import Machine
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.paging import PAGING_MODES
from pageferry.kvm.probe import probe
from pageferry.kvm.trackers import TRACKERS
from pageferry.kvm.vm import KvmVm

_TRIAL = VmConfig(memory_bytes=4 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of machine; ``accel`` is ``kvm`` or ``soft``."""

    accel: str
    tracker: str
    make_vm: Callable[[VmConfig], Machine]

    @property
    def name(self) -> str:
        """``accel/tracker``."""
        return f"{self.accel}/{self.tracker}"

    def __str__(self) -> str:
        return self.name


KINDS: tuple[Kind, ...] = (
    *(Kind(accel="kvm", tracker=name, make_vm=partial(KvmVm, tracker=name)) for name in TRACKERS),
    *(Kind(accel="soft", tracker=mode, make_vm=partial(Domain, paging_mode=mode)) for mode in PAGING_MODES),
)


def expect_works(kind: Kind) -> None:
    """Make a machine of the kind, to see that this host can.

    Raises:
        UnsupportedError: it cannot; says what is missing.
        VmError: the machine failed.
    """
    if kind.accel == "kvm":
        probe()
    kind.make_vm(_TRIAL).close()


def working(kinds: Iterable[Kind], say: Callable[[str], None]) -> tuple[Kind, ...]:
    """Return those of the kinds that work on this host; ``say`` is told one line about each that does not."""
    found = []
    for kind in kinds:
        try:
            expect_works(kind)
        except (UnsupportedError, VmError) as error:
            say(f"{kind.name} is left out: {error}")
        else:
            found.append(kind)
    return tuple(found)

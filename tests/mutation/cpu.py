"""Faults of the software machine as an operating system's CPU: cpu.py, tlb_memory.py, shadow.py, table_window.py."""

from typing import Any

from altered import alter

from mutation.fault import Faults, Room
from pageferry.hypervisor.domain import Domain

fault = Faults(Room.HYPERVISOR)


@fault(
    "no bug on record: what a TLB keeps must go when the guest invalidates it, and the guest tells only the emulator",
    law=None,
    found_by=("translations-follow-the-guest",),
)
def stale_translation(domain: Domain) -> None:
    """A translation is told again although the guest has changed the entries that it rests on."""

    def wrap(sound: Any) -> Any:
        def remember(key: Any, cr3: int, rests_on: tuple[int, ...], maddr: int, permissions: int) -> None:
            sound(key, cr3, (0, domain.machine.words[0]) * 4, maddr, permissions)

        return remember

    for vcpu in domain.vcpus:
        alter(vcpu._tlb_memory, "remember", wrap)


@fault(
    "no bug on record: the guest's tables are its own memory, which it writes in many ways",
    law=None,
    found_by=("translations-follow-the-guest",),
)
def table_write_unseen(domain: Domain) -> None:
    """A write to a guest table leaves the shadow entries that were made from it."""
    alter(domain.shadow.tables, "drop_words", lambda _: lambda gfn, first, last: None)


@fault(
    "no bug on record: the short way of a write to a guest table is right only where no shadow entry was made from it",
    law=None,
    found_by=("translations-follow-the-guest",),
)
def short_way_blind(domain: Domain) -> None:
    """The machine code that writes guest tables looks for shadow entries where there are none."""
    empty = domain.machine.allocate_foreign()
    alter(
        domain.shadow.window,
        "shadowed",
        lambda sound: lambda gfn, mfns: sound(gfn, [empty] if mfns else []),
    )

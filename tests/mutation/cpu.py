"""Faults of the software machine as an operating system's CPU.

They are in cpu.py, tlb_memory.py, shadow.py, table_window.py and translated_code.py.
"""

from functools import partial
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


@fault(
    "seen here: a kernel compiled a filter over one that it had freed, and ran into the old one",
    law=None,
    found_by=("what-is-written-is-what-runs",),
)
def code_writable_through_the_tlb(domain: Domain) -> None:
    """A vCPU may fetch from a page that it may write through its TLB, where the emulator sees only the first store."""

    def wrap(sound: Any, code: Any) -> Any:
        def permit(maddr: int, permissions: int, *, write: bool, fetch: bool) -> Any:
            if fetch:
                code._code.add(maddr)
            return sound(maddr, permissions, write=write, fetch=fetch)

        return permit

    for vcpu in domain.vcpus:
        alter(vcpu._code, "permit", partial(wrap, code=vcpu._code))


@fault(
    "seen here: what a store into its own block hits cannot be given up while the block runs, and the store be made",
    law=None,
    found_by=("what-is-written-is-what-runs",),
)
def store_into_its_own_block_not_stepped(domain: Domain) -> None:
    """A store into the page that it is in itself is refused, undone and made again for ever."""
    for vcpu in domain.vcpus:
        alter(vcpu, "_runs_from", lambda _: lambda maddr: False)


@fault(
    "no bug on record: each emulator has translations of its own, and knows nothing of what another one writes",
    law=None,
    found_by=("what-is-written-is-what-runs",),
)
def code_of_other_vcpus_overwritten_unseen(domain: Domain) -> None:
    """A vCPU may write to a page that another vCPU has translated code of, which keeps it."""

    def wrap(sound: Any, code: Any) -> Any:
        return lambda maddr, *, fetch: [each for each in sound(maddr, fetch=fetch) if each is code]

    for vcpu in domain.vcpus:
        alter(vcpu._code, "_in_the_way", partial(wrap, code=vcpu._code))


@fault(
    "no bug on record: an emulator sees no store but its own",
    law=None,
    found_by=("what-is-written-is-what-runs",),
)
def code_overwritten_by_a_device_unseen(domain: Domain) -> None:
    """A vCPU keeps the code that it has translated of a page that a device writes."""
    for vcpu in domain.vcpus:
        alter(vcpu._code, "_written_by_others", lambda _: list)

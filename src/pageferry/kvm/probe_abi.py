"""Finding out by doing whether KVM ends a guest of the guest ABI at each instruction that the ABI forbids.

The processor does that by itself, since such a guest is confined to ring 3 (:mod:`pageferry.core.confined`). But not
each KVM runs guests as the processor would: ``kvm_pvm`` runs them in the host's own ring 3.
"""

from pageferry.core.confined import FORBIDDEN, UNDEFINED
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.kvm.trial import crash_of_trial, trial_guest, trial_state

_WENT_ON = None


def expect_forbidden() -> str:
    """Run one guest for each instruction; return what was seen.

    That includes which instructions pass of those that the ABI leaves undefined, and whether KVM still knows at a
    guest's end which instruction it was: on AMD the processor loses the registers.

    Raises:
        UnsupportedError: a guest goes on after a forbidden instruction; names them.
    """
    ends = {name: _end(code) for name, code in FORBIDDEN.items()}
    if unnoticed := [name for name, end in ends.items() if end is _WENT_ON]:
        raise UnsupportedError(
            "kvm-guest-abi", f"a guest goes on here after instructions that its ABI forbids: {', '.join(unnoticed)}"
        )
    seen = f"each of {len(ends)} forbidden instructions ends a guest"
    if not all((end or "").startswith(f"{name},") for name, end in ends.items()):
        seen += ", and which one it was is not known"
    if undefined := [name for name, code in UNDEFINED.items() if _end(code) is _WENT_ON]:
        seen += f"; undefined, and passing here: {', '.join(undefined)}"
    return seen


def _end(code: bytes) -> str | None:
    with trial_guest(trial_state()) as vm:
        try:
            return crash_of_trial(vm, code)
        except VmError:  # it went on, and to somewhere else
            return _WENT_ON

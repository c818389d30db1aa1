"""What a pause will cost besides page data, measured while there is none."""

from collections.abc import Callable

from pageferry.core.memory import GuestMemory
from pageferry.core.vm import Vm
from pageferry.engine import verify

_SAMPLES = 3


def state_s(vm: Vm, now_s: Callable[[], float]) -> float:
    """Return what the state will cost: saving it here, and as long again for loading it there.

    The guest stands still meanwhile, for about half of the result.
    """
    began_s = now_s()
    vm.freeze()
    try:
        vm.save_state()
    finally:
        vm.thaw()
    return 2 * (now_s() - began_s)


def verify_s(memory: GuestMemory, now_s: Callable[[], float]) -> float:
    """Return what verification will cost: finding what has storage, and digesting it.

    The digests are estimated from the best of a few samples: the guest, which runs now, only disturbs them.
    """
    began_s = now_s()
    starts, lengths = verify.populated_runs(memory)
    found_s = now_s() - began_s
    sample = verify.sample_runs(starts, lengths)
    times_s = []
    for _ in range(_SAMPLES):
        began_s = now_s()
        verify.digest_runs(memory, *sample)
        times_s.append(now_s() - began_s)
    sample_pages = int(sample[1].sum())
    return found_s + (min(times_s) * int(lengths.sum()) / sample_pages if sample_pages else 0.0)

"""What a pause will cost besides page data, measured while there is none."""

from collections.abc import Callable

from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import Vm
from pageferry.engine.verify import digests as verify

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


def digest_pages_per_s(
    memory: GuestMemory, starts: GfnArray, lengths: GfnArray, now_s: Callable[[], float]
) -> float | None:
    """Return how fast this host digests these runs of guest memory; None when there are none.

    The best of a few samples: the guest, which runs now, only disturbs them.
    """
    if not starts.size:
        return None
    times_s = []
    for _ in range(_SAMPLES):
        began_s = now_s()
        verify.digest_runs(memory, starts, lengths)
        times_s.append(now_s() - began_s)
    return int(lengths.sum()) / min(times_s)

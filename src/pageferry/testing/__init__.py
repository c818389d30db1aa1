"""For authors of trackers and machines: does yours keep its promises?

A machine of your own implements :class:`pageferry.core.machine.Machine`, its tracker
:class:`pageferry.core.vm.LogDirty`; both are protocols, so nothing is inherited. The kit boots the built-in guests on
it, and needs no more of pageferry than a maker of machines::

    from pageferry.testing import CHECKS, check_log_dirty

    @pytest.mark.parametrize("check", [check.name for check in CHECKS])
    def test_my_tracker(check):
        check_log_dirty(MyMachine, checks=[check])  # MyMachine(config: VmConfig) -> Machine, paused, all zeros

A broken promise raises :class:`ConformanceError`: the check, what was expected and what was found, and the law
(docs/internals/laws.md) that it defends; so does a check that hangs. ``cpus`` and ``memory_bytes`` try other guests,
and ``failures`` goes on after the first. For tests of your own, :class:`StampOracle` knows what the guest ``stamp``
writes in each round. docs/guide/trackers.md has two whole trackers to begin with.
"""

from pageferry.testing.conformance import CHECKS, Check, ConformanceError, check_log_dirty, failures
from pageferry.testing.oracle import StampOracle

__all__ = ["CHECKS", "Check", "ConformanceError", "StampOracle", "check_log_dirty", "failures"]

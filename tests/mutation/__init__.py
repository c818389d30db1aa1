"""The mutation suite: faults in the implementation itself, and the proof that each of them is found.

Not part of the published kit, which knows no implementation. To add a fault: one function, decorated, in
:mod:`.tracking` or :mod:`.tables` (the software hypervisor's log-dirty, and its P2M), :mod:`.writers` (its writers that
are no vCPU's own), :mod:`.kvm_log`, :mod:`.kvm_ring`, :mod:`.uffd`, :mod:`.pagemap`, or of the engine
:mod:`.moving`, :mod:`.proving` (the proof, and the report) or :mod:`.travelling` (encoders, connections, files).
"""

from mutation.fault import Fault, Room
from mutation.suite import DECLARED, FAULTS, WRAPPED, checks_of, lab_of, sound_benches

__all__ = ["DECLARED", "FAULTS", "WRAPPED", "Fault", "Room", "checks_of", "lab_of", "sound_benches"]

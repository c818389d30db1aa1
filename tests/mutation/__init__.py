"""The mutation suite: faults in the implementation itself, and the proof that each of them is found.

Not part of the published kit, which knows no implementation. A fault is declared by a decorator (:mod:`.fault`):

- in the software hypervisor, a function that replaces one step of a machine: :mod:`.tracking` (log-dirty),
  :mod:`.hypervisor_ranges` (its CLEAN of a range), :mod:`.tables` (the P2M), :mod:`.writers` (writers that are no
  vCPU's own), :mod:`.devices`, :mod:`.cpu`, :mod:`.virtio`;
- in the trackers of KVM machines, such a function too: :mod:`.kvm_log`, :mod:`.kvm_ring`, :mod:`.ring_ranges`,
  :mod:`.uffd`, :mod:`.pagemap`, with the steps that they share in :mod:`.held_bits`;
- in the engine, a source, destination, save or lazy restore with a wrong part (:mod:`altered`): :mod:`.moving` (rounds
  and the pause), :mod:`.proving` (the proof, and the report), :mod:`.travelling` (encoders, connections, files,
  post-copy);
- in front of any tracker, a class that wraps it (:mod:`.tracker_wrapper`): :mod:`.tracker_faults`,
  :mod:`.tracker_marks`, :mod:`.tracker_races`, :mod:`.tracker_ranges`.

What finds them: the kit; for the hypervisor :mod:`.checks`, :mod:`.device_checks`, :mod:`.cpu_checks` and
:mod:`.virtio_checks` as well; for the engine :mod:`.migrations` with :mod:`.audit_checks`, :mod:`.wire_checks`,
:mod:`.file_checks`, :mod:`.report_checks`, :mod:`.postcopy_checks` and :mod:`.disk_checks`, which disturb
:mod:`.trips`. :mod:`.suite` brings the two together, :mod:`.mutants` is the command.
"""

from mutation.fault import Fault, Room
from mutation.suite import DECLARED, FAULTS, WRAPPED, checks_of, lab_of, sound_benches

__all__ = ["DECLARED", "FAULTS", "WRAPPED", "Fault", "Room", "checks_of", "lab_of", "sound_benches"]

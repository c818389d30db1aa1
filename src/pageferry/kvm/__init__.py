"""A guest on the real CPU, through ``/dev/kvm``: the same narrow waist as the software hypervisor.

``KvmVm`` is the machine, ``probe`` finds out by doing whether this host has one, ``KvmBitmapLog`` is the tracker over
KVM's dirty bitmap.
"""

from pageferry.kvm.bitmap_log import KvmBitmapLog
from pageferry.kvm.probe import KvmSupport, probe
from pageferry.kvm.vm import KvmVm

__all__ = ["KvmBitmapLog", "KvmSupport", "KvmVm", "probe"]

"""The devices of a guest, the same on every machine, and the bus they hang on.

Devices are pure: they see port and MMIO accesses and guest memory, and answer with data and effects. They know
nothing of vCPUs, threads or trackers. The addresses are part of the guest ABI (docs/reference/guest-abi.md).
"""

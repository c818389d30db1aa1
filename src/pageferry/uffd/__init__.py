"""Uses the host's page tables for KVM guests: log-dirty, and pages that come when touched.

KVM follows the host's page tables: a vCPU writes a page only while the host's entry for it is writable. So protecting
the *host's* mapping is log-dirty without KVM's help. What is protected is a mapping of RAM that only the vCPUs use.
Devices, the engine and boot write through :class:`~pageferry.core.memory.GuestMemory`'s own mapping, never fault, and
mark as usual.
"""

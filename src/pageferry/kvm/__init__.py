"""A guest on the real CPU, through ``/dev/kvm``: the same narrow waist as the software hypervisor.

``vm`` has the machine, ``probe`` finds out by doing whether this host has one, ``trackers`` names the ways to find
dirty pages; ``bitmap_log`` and ``ring_log`` are KVM's own.
"""

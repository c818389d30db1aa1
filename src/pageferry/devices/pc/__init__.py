"""The devices that a PC has besides those of every guest: what an operating system expects to find.

On ``soft`` all of them are here. On ``kvm`` the kernel has interrupt controllers and timer of its own, whose states
these share.
"""

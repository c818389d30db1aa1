"""Linux as a guest: its kernel's file, how it is booted, and an image of Debian's packages to try it with.

``image`` reads a kernel, ``boot`` puts it into a machine, ``debian`` and ``initramfs`` make an image.
"""

"""Guests: the ABI they are written to, the ELF loader, the boot, and the built-in programs with their images.

``workloads`` finds a program, ``boot`` puts it into a machine. Knows the devices' addresses and the narrow waist,
and no machine in particular.
"""

"""Bytes <-> records: Xen's libxc migration stream, and the conversation around it. No sockets, no Vm.

``docs/reference/stream.md`` is the normative text. ``encoder`` and ``decoder`` have the libxc stream, ``hvm_context``
the machine state inside it, ``ferry`` what the format lacks: hello, digests, handoff.
"""

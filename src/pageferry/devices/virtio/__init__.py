"""Virtio devices, version 1.2, over PCI: rings, transport, and one module for each kind of device."""

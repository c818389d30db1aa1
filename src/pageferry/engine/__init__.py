"""The migration engine: source and destination as named phases, over any Vm and any LogDirty.

It is handed a ``Vm`` and a socket; it knows no machine, no tracker and no command line.
"""

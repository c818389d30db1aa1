"""What Xen's tools write around a libxc stream."""

import json
import struct

DOMAIN = {"c_info": {"type": "pvh", "name": "idle", "uuid": "8f0e6f0a-0000-4000-8000-0123456789ab"}, "b_info": {}}


def record(number, body=b""):
    return struct.pack("<II", number, len(body)) + body + bytes(-len(body) % 8)


#: What comes after the libxc stream of an HVM guest; of a PVH guest only the last.
AFTER = (record(2, b"data"), record(3, b"model"), record(0))


def libxl_stream(libxc, *, version=2, options=0, before=(), after=AFTER):
    """A libxl stream."""
    header = b"LibxlFmt" + struct.pack(">II", version, options)
    return b"".join([header, *before, record(1), libxc, *after])


def xl_file(libxl, *, order=0x01020304, mandatory=3, config=None, length=None):
    """A file of ``xl save``."""
    text = json.dumps(DOMAIN).encode() if config is None else config
    optional = struct.pack("<I", len(text)) + text
    size = len(optional) if length is None else length
    return b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", order, mandatory, 0, size) + optional + libxl

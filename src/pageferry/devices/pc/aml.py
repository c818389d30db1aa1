"""Writes ACPI Machine Language: just what describes the devices of a small PC. Functions return bytes.

Source: ACPI specification 6.5, chapters 20 (AML), 6.4 (resource data types) and 19.3.4 (EISA identifiers).
"""

_EXTENDED, _DEVICE, _SCOPE, _NAME, _BUFFER, _PACKAGE = 0x5B, 0x82, 0x10, 0x08, 0x11, 0x12
_ZERO, _ONE, _BYTE, _WORD, _DWORD, _STRING = 0x00, 0x01, 0x0A, 0x0B, 0x0C, 0x0D
_ROOT = b"\\"

# Resource descriptors: small items have their length in the tag, large ones behind it.
_IRQ, _IO, _END = 0x23, 0x47, b"\x79\x00"
_ADDRESS_WORD, _ADDRESS_DWORD, _FIXED_MEMORY = 0x88, 0x87, 0x86
_MEMORY_RANGE, _IO_RANGE, _BUS_RANGE = 0, 1, 2
#: Of an address range: produced for children, decoded positively, both ends fixed.
_FIXED_ENDS = 0x0C
_WHOLE_IO, _READ_WRITE = 0x03, 0x01


def scope(path: str, *terms: bytes) -> bytes:
    """Return Scope (path) { terms }."""
    return bytes((_SCOPE,)) + _with_length(_path(path) + b"".join(terms))


def device(name: str, *terms: bytes) -> bytes:
    """Return Device (name) { terms }."""
    return bytes((_EXTENDED, _DEVICE)) + _with_length(_path(name) + b"".join(terms))


def name(name_: str, value: bytes) -> bytes:
    """Return Name (name_, value)."""
    return bytes((_NAME,)) + _path(name_) + value


def integer(value: int) -> bytes:
    """Return the shortest form of an integer of up to 32 bits."""
    if value in (0, 1):
        return bytes((_ONE if value else _ZERO,))
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 32 bits")


def package(*elements: bytes) -> bytes:
    """Return Package () { elements }."""
    return bytes((_PACKAGE,)) + _with_length(bytes((len(elements),)) + b"".join(elements))


def eisa_id(text: str) -> bytes:
    """Return EisaId (text): three capital letters and four hexadecimal digits, compressed to a DWord."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return bytes((_DWORD,)) + (letters << 16 | int(text[3:], 16)).to_bytes(4, "big")


# -- resources ---------------------------------------------------------------------------------------------------------


def resources(*descriptors: bytes) -> bytes:
    """Return ResourceTemplate () { descriptors }."""
    data = b"".join(descriptors) + _END
    return bytes((_BUFFER,)) + _with_length(integer(len(data)) + data)


def io(first: int, count: int) -> bytes:
    """Return IO (Decode16): ports that a device has at just this place."""
    return bytes((_IO, 1)) + first.to_bytes(2, "little") * 2 + bytes((1, count))


def irq(number: int) -> bytes:
    """Return IRQ (Edge, ActiveHigh, Exclusive)."""
    return bytes((_IRQ,)) + (1 << number).to_bytes(2, "little") + b"\x01"


def memory(first: int, count: int) -> bytes:
    """Return Memory32Fixed (ReadWrite): addresses that a device has."""
    return _large(_FIXED_MEMORY, b"\x01" + first.to_bytes(4, "little") + count.to_bytes(4, "little"))


def bus_range(first: int, last: int) -> bytes:
    """Return WordBusNumber: the buses below a bridge."""
    return _range(_ADDRESS_WORD, _BUS_RANGE, 0, 2, range(first, last + 1))


def io_range(ports: range) -> bytes:
    """Return WordIO: the ports behind a bridge."""
    return _range(_ADDRESS_WORD, _IO_RANGE, _WHOLE_IO, 2, ports)


def memory_range(gpas: range) -> bytes:
    """Return DWordMemory: the addresses behind a bridge."""
    return _range(_ADDRESS_DWORD, _MEMORY_RANGE, _READ_WRITE, 4, gpas)


def _range(tag: int, kind: int, kind_flags: int, size: int, span: range) -> bytes:
    granularity = translation = 0
    numbers = (granularity, span.start, span.stop - 1, translation, len(span))
    body = b"".join(number.to_bytes(size, "little") for number in numbers)
    return _large(tag, bytes((kind, _FIXED_ENDS, kind_flags)) + body)


def _large(tag: int, body: bytes) -> bytes:
    return bytes((tag,)) + len(body).to_bytes(2, "little") + body


def _path(path: str) -> bytes:
    """Return a path of at most one segment, from the root if it begins with a backslash."""
    root, segment = (_ROOT, path[1:]) if path.startswith("\\") else (b"", path)
    return root + segment.ljust(4, "_").encode()


def _with_length(body: bytes) -> bytes:
    """Return ``body`` behind its PkgLength, which counts itself."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,)) + body
    more = 1 if len(body) + 2 < 1 << 12 else 2
    length = len(body) + 1 + more
    return bytes((more << 6 | length & 0xF,)) + (length >> 4).to_bytes(more, "little") + body

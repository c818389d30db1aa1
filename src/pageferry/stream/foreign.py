"""Recognises files that are not libxc streams, by their first bytes.

Source: xl, ``xl save`` (32 bytes, "Xen saved domain, xl format"); Xen, ``docs/specs/libxl-migration-stream.pandoc``;
libvirt, ``qemu_saveimage.h`` and ``libxl_conf.h`` (magic of a saved image); QEMU, ``docs/devel/migration`` ("QEVM", a
u32 version, big-endian); RFC 1952, RFC 8878 and the other packers' own.
"""

from dataclasses import dataclass

from pageferry.stream.format import IMAGE_HEADER

_INSPECT = "pageferry inspect shows the libxc stream in it, Xen's own tools restore it"
_UNPACK = "unpack it first"


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A kind of file: what to call it, and what to do with it."""

    name: str
    hint: str = ""


XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
LIBXL_MAGIC = b"LibxlFmt"

_BY_MAGIC: tuple[tuple[bytes, Foreign], ...] = (
    (XL_MAGIC, Foreign(name="a domain that Xen's xl saved", hint=_INSPECT)),
    (LIBXL_MAGIC, Foreign(name="a libxl migration stream of Xen", hint=_INSPECT)),
    (
        b"LinuxGuestRecord",
        Foreign(name="a domain that Xen's xm saved, before xl", hint="Xen of that time reads it"),
    ),
    (b"LibvirtQemudSave", Foreign(name="a QEMU guest that libvirt saved", hint="virsh restore reads it")),
    (b"LibvirtQemudPart", Foreign(name="a QEMU guest that libvirt did not finish to save")),
    (b"libvirt-xml\n \0 \r", Foreign(name="a Xen domain that libvirt saved", hint="virsh restore reads it")),
    (b"QEVM", Foreign(name="a QEMU migration stream", hint="QEMU reads it, by -incoming")),
    (b"\xfd7zXZ\0", Foreign(name="a file packed by xz", hint=_UNPACK)),
    (b"\x1f\x8b", Foreign(name="a file packed by gzip", hint=_UNPACK)),
    (b"\x28\xb5\x2f\xfd", Foreign(name="a file packed by zstd", hint=_UNPACK)),
    (b"\x04\x22\x4d\x18", Foreign(name="a file packed by lz4", hint=_UNPACK)),
    (b"BZh", Foreign(name="a file packed by bzip2", hint=_UNPACK)),
    (b"\x89LZO\0\r\n\x1a\n", Foreign(name="a file packed by lzop", hint=_UNPACK)),
    (b"QFI\xfb", Foreign(name="a disk image of QEMU (qcow2)")),
    (b"\x7fELF", Foreign(name="an ELF file", hint="pageferry run runs one that is a guest")),
)


def recognised(begin: bytes) -> Foreign | None:
    """Return what a file is that begins like this, or None: it is not known.

    Args:
        begin: its first bytes, as many as a libxc stream's first header has, or more; all of a shorter file.
    """
    for magic, foreign in _BY_MAGIC:
        if begin.startswith(magic[: IMAGE_HEADER.size]):
            return foreign
    return None

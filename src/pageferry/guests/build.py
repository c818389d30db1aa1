"""Build the images of the guest programs from their source: ``python -m pageferry.guests.build``.

The images are kept with the source so that running a guest needs no compiler. ``images/manifest.json`` says what
they were made from: a digest of each program's source and flags, the compiler, and a digest of each image.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pageferry.core.errors import UsageError

SOURCES = Path(__file__).with_name("programs")
IMAGES = Path(__file__).with_name("images")
MANIFEST = IMAGES / "manifest.json"

FLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-march=x86-64", "-mtune=generic"),
    *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fno-stack-protector", "-fcf-protection=none"),
    *("-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns", "-fno-ident"),
    *("-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096", "-Wl,-T,guest.ld"),
)
_SHARED_SOURCES = ("guest.h", "guest.ld")


def programs() -> tuple[str, ...]:
    """Return the names of all programs, ascending."""
    return tuple(sorted(path.stem for path in SOURCES.glob("*.c")))


def compiler() -> str | None:
    """Return the C compiler that builds guests (``$CC``, else gcc), or None when there is none."""
    return shutil.which(os.environ.get("CC", "gcc"))


def compiler_version(cc: str) -> str:
    """Return what the compiler and its linker call themselves, one line."""
    lines = [
        subprocess.run([cc, option], check=True, capture_output=True, text=True).stdout.splitlines()[0]
        for option in ("--version", "-Wl,--version")
    ]
    return "; ".join(lines)


def source_digest(name: str, sources: Path = SOURCES, flags: Sequence[str] = FLAGS) -> str:
    """Return a digest of everything of ours that an image depends on: its source, the shared files, the flags."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in (*_SHARED_SOURCES, f"{name}.c"):
        digest.update(b"\0" + file.encode() + b"\0" + (sources / file).read_bytes())
    return digest.hexdigest()


def build(name: str, target: Path, cc: str, sources: Path = SOURCES) -> None:
    """Compile one program of the folder ``sources`` into the file ``target``.

    Raises:
        UsageError: the compiler refuses.
    """
    command = [cc, *FLAGS, "-o", str(target.absolute()), f"{name}.c"]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{cc} cannot build guest {name}", hint=done.stderr.strip())


def build_all(target: Path, cc: str) -> None:
    """Compile every program into the directory ``target`` and write its manifest."""
    target.mkdir(parents=True, exist_ok=True)
    images = {}
    for name in programs():
        image = target / f"{name}.elf"
        build(name, image, cc)
        image.chmod(0o644)
        images[name] = {
            "source_sha256": source_digest(name),
            "image_sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
        }
    manifest = {"compiler": compiler_version(cc), "images": images}
    (target / MANIFEST.name).write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> int:
    """Rebuild the images in place."""
    cc = compiler()
    if cc is None:
        print("a C compiler is needed to rebuild the guests: install gcc, or set CC", file=sys.stderr)
        return 1
    try:
        build_all(IMAGES, cc)
    except UsageError as error:
        print(f"{error}\n{error.hint}", file=sys.stderr)
        return 1
    for name in programs():
        print(f"{name}: {(IMAGES / f'{name}.elf').stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

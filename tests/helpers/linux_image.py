"""The Linux that tests boot: what ``make linux-image`` made, or the directory that ``PAGEFERRY_LINUX_IMAGE`` names."""

import os
from pathlib import Path

import pytest

from pageferry.guests.linux.debian import KERNELS, LinuxImage

VARIABLE = "PAGEFERRY_LINUX_IMAGE"
#: Set to 1 where the image ``cloud`` must be there.
REQUIRED = "PAGEFERRY_REQUIRE_LINUX"
#: The image's first process says this on the console as soon as a shell is there, or its work begins.
READY = b"pageferry: ready"
_MADE = Path(__file__).resolve().parents[2] / "build" / "linux"


def linux_image(name: str = "cloud") -> LinuxImage:
    """Return an image by its name in ``KERNELS``, or whichever the variable names; skip the test if it is missing."""
    assert name in KERNELS
    folder = Path(os.environ.get(VARIABLE) or _MADE / name)
    image = LinuxImage.of(folder)
    if not (image.kernel.is_file() and image.initramfs.is_file()):
        lacking = f"no kernel and initramfs in {folder}: make linux-image, or set {VARIABLE}"
        if os.environ.get(REQUIRED) == "1" and name == "cloud":
            pytest.fail(lacking)
        pytest.skip(lacking)
    return image

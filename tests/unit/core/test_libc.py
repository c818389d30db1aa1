"""Fd: one descriptor, closed once, whose ioctls fail by the name of the call."""

import errno
import gc
import os

import pytest

from pageferry.core.errors import KvmError
from pageferry.core.libc import Fd

NAMES = {0x1234: "A_CALL"}


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def opened():
    return Fd(os.open("/dev/null", os.O_RDWR), KvmError, NAMES)


def test_an_ioctl_that_fails_raises_the_error_of_its_owner():
    with opened() as fd:
        for request, name in ((0x1234, "A_CALL"), (0x1235, "ioctl 0x1235")):
            with pytest.raises(KvmError, match=name) as refused:
                fd.ioctl(request)
            assert (refused.value.call, refused.value.errno) == (name, errno.ENOTTY)


def test_it_is_closed_once_by_whatever_comes_first():
    with opened() as fd:
        number = fd.fileno()
        assert is_open(number)
    assert not is_open(number)
    assert fd.fileno() == -1
    reused = os.open("/dev/null", os.O_RDWR)
    fd.close()
    assert is_open(reused)
    os.close(reused)
    with pytest.raises(KvmError) as refused:
        fd.ioctl(0x1234)
    assert refused.value.errno == errno.EBADF


def test_it_is_closed_when_it_is_collected():
    number = opened().fileno()
    gc.collect()
    assert not is_open(number)

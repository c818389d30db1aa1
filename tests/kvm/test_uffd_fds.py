"""What a userfaultfd must offer, and what a user is told when it does not."""

import errno

import pytest

from pageferry.core.errors import UffdError, UnsupportedError
from pageferry.uffd import fds, uapi

pytestmark = pytest.mark.kvm


@pytest.fixture
def userfaultfd():
    try:
        fds.check_userfaultfd()
    except UnsupportedError as error:
        pytest.skip(f"{error} ({error.hint})")


def refuse_syscall(monkeypatch, code):
    class Libc:
        ioctl = fds.libc.ioctl

        @staticmethod
        def syscall(*arguments):
            fds.ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(fds, "libc", Libc)


def test_a_feature_that_is_missing_is_named(userfaultfd, monkeypatch):
    monkeypatch.setitem(uapi.FEATURE_NAMES, 1 << 60, "UFFD_FEATURE_OF_TOMORROW")
    with pytest.raises(UnsupportedError, match=r"lacks UFFD_FEATURE_OF_TOMORROW$") as missing:
        fds.check_userfaultfd(1 << 60)  # and those that are always asked for, which are there
    assert missing.value.capability == "UFFD_FEATURE_OF_TOMORROW"
    assert "Linux 6.7" in missing.value.hint


def test_a_kernel_without_userfaultfd(monkeypatch):
    refuse_syscall(monkeypatch, errno.ENOSYS)
    with pytest.raises(UnsupportedError, match="has no userfaultfd") as missing:
        fds.check_userfaultfd()
    assert missing.value.capability == "userfaultfd"


def test_a_user_who_may_not(monkeypatch, tmp_path):
    refuse_syscall(monkeypatch, errno.EPERM)
    monkeypatch.setattr(fds, "DEV_USERFAULTFD", tmp_path / "userfaultfd")
    with pytest.raises(UnsupportedError, match="refused to this user") as missing:
        fds.check_userfaultfd()
    assert missing.value.capability == "userfaultfd-permission"
    assert "vm.unprivileged_userfaultfd" in missing.value.hint
    assert "CAP_SYS_PTRACE" in missing.value.hint


def test_the_device_serves_who_may_open_it(userfaultfd, monkeypatch, open_descriptors):
    try:
        with open(fds.DEV_USERFAULTFD, "rb"):
            pass
    except OSError as error:
        pytest.skip(f"{fds.DEV_USERFAULTFD}: {error}")
    refuse_syscall(monkeypatch, errno.EPERM)
    before = open_descriptors()
    fds.check_userfaultfd()
    assert open_descriptors() == before


def test_any_other_refusal_is_told_as_it_is(monkeypatch):
    refuse_syscall(monkeypatch, errno.EMFILE)
    with pytest.raises(UffdError, match="userfaultfd: EMFILE"):
        fds.check_userfaultfd()


def test_a_protection_that_meets_a_change_of_the_address_space_is_repeated(userfaultfd, monkeypatch):
    uffd = fds.UffdFd()
    answers = [UffdError("UFFDIO_WRITEPROTECT", errno.EAGAIN)] * 2
    asked = []

    def ioctl(request, argument):
        asked.append((request, argument.mode))
        if answers:
            raise answers.pop()
        return 0

    monkeypatch.setattr(uffd, "ioctl", ioctl)
    uffd.protect(0x1000, 0x1000)
    assert asked == [(uapi.UFFDIO_WRITEPROTECT, uapi.UFFDIO_WRITEPROTECT_MODE_WP)] * 3
    monkeypatch.undo()
    with pytest.raises(UffdError, match=r"UFFDIO_WRITEPROTECT: ENOENT") as gone:
        uffd.unprotect(0x1000, 0x1000)
    assert gone.value.errno == errno.ENOENT
    uffd.close()
    uffd.close()
    with pytest.raises(UffdError, match="EBADF"):
        uffd.protect(0x1000, 0x1000)

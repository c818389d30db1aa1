"""Finds the guest that a user names, by name or file, and starts a machine with it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pageferry.core.errors import UsageError
from pageferry.core.vm import AnyVm, MachineModel, Vm, VmConfig
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.elf import Program, parse_elf
from pageferry.guests.elf_file import MAGIC as ELF_MAGIC
from pageferry.guests.elf_file import read_elf
from pageferry.guests.files import read_file
from pageferry.guests.firmware import Kernel
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.image import LinuxKernel, is_bzimage, load_kernel, parse_kernel
from pageferry.guests.multiboot import boot_multiboot, find_multiboot
from pageferry.guests.pvh import boot_pvh, find_pvh
from pageferry.guests.workloads import load_workload, names_file

#: More than any initrd has.
_MAX_INITRD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """The options of a kernel: a file for its initrd or module, and a command line."""

    initrd: Path | None = None
    command_line: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Something that a machine can be started with.

    ``machine`` is the model that it needs; None: any will do. ``load`` puts it into a machine of that model that has
    not run; where it does not fit a UsageError says so, and nothing was written.
    """

    name: str
    machine: MachineModel | None
    load: Callable[[Vm], object]

    def make(self, make_vm: Callable[[VmConfig], AnyVm], config: VmConfig) -> AnyVm:
        """Make a machine and load this into it; return it, paused.

        Raises:
            PageferryError: the machine, the memory or the guest are not possible; nothing is left behind.
        """
        vm = make_vm(config)
        try:
            self.load(vm)
        except BaseException:
            vm.close()
            raise
        return vm


def linux(kernel: Path, options: KernelOptions) -> Loader:
    """Return the loader of a Linux kernel, a bzImage or a vmlinux.

    Raises:
        UsageError: a file cannot be read, or is not such a kernel.
    """
    return _kernel(boot_linux, load_kernel(kernel), options)


def named(name_or_path: str, params: GuestParams | None, options: KernelOptions | None) -> Loader:
    """Return the loader of a built-in workload, or of what a file is: a kernel of any kind, or a program.

    Args:
        name_or_path: which.
        params: what a workload or program is told; None: nothing was asked for.
        options: what a kernel is given; None: nothing was asked for.

    Raises:
        UsageError: no such workload or file, a file that cannot be a guest, or params or options that are not for it.
    """
    loader = _file(name_or_path, params, options) if names_file(name_or_path) else None
    loader = loader or _program(load_workload(name_or_path), params)
    if loader.machine is None and options is not None:
        raise UsageError(f"--initrd and --append are for a kernel, and {name_or_path} is not one")
    if loader.machine is not None and params is not None:
        raise UsageError(
            f"--working-set, --rate, --seed and --argument are for a workload, and {name_or_path} is a kernel",
            hint="--append tells a kernel what to do",
        )
    return loader


def _file(path: str, params: GuestParams | None, options: KernelOptions | None) -> Loader:
    data, options = read_file(path), options or KernelOptions()
    if is_bzimage(data):
        return _kernel(boot_linux, parse_kernel(data, name=path), options)
    if (multiboot := find_multiboot(data, name=path)) is not None:
        return _kernel(boot_multiboot, multiboot, options)
    if data[:4] != ELF_MAGIC:
        raise UsageError(
            f"{path} is nothing that a guest can be",
            hint="a Linux kernel, an ELF file with a PVH note, a file with a multiboot header, or a program (ELF)",
        )
    if (pvh := find_pvh(read_elf(data, name=path))) is not None:
        return _kernel(boot_pvh, pvh, options)
    return _program(parse_elf(data, name=path), params)


def _program(program: Program, params: GuestParams | None) -> Loader:
    return Loader(name=program.name, machine=None, load=lambda vm: boot(vm, program, params=params))


def _kernel(boot: Callable[..., None], kernel: LinuxKernel | Kernel, options: KernelOptions) -> Loader:
    initrd = b"" if options.initrd is None else read_file(options.initrd, limit_bytes=_MAX_INITRD_BYTES)
    if options.initrd is not None and not initrd:
        raise UsageError(f"the initrd {options.initrd} is empty")
    load = partial(boot, kernel=kernel, initrd=initrd, command_line=options.command_line)
    return Loader(name=kernel.name, machine=MachineModel.PC, load=load)

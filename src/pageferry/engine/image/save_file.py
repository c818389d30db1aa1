"""What saves have in common, of a guest here and of a domain of Xen: how their file is opened, named, and told of."""

from pathlib import Path

from pageferry.core.errors import GuestAt, MigrationError, PageferryError, UsageError
from pageferry.core.events import Phase
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.os_hints import file_hint
from pageferry.core.policy import Policy, may_switch
from pageferry.core.units import format_size
from pageferry.engine.attempt import Attempt
from pageferry.engine.image.outlet import FileOutlet


def expect_all_pages(policy: Policy) -> None:
    """Check that a policy never goes on before all pages are saved.

    Raises:
        UsageError: it may.
    """
    if may_switch(policy):
        hint = "a guest in a file cannot ask for its pages; choose another policy"
        raise UsageError(f"a save cannot follow the {policy.name} policy", hint=hint)


def open_file(attempt: Attempt, path: Path, *, what: str, pages: int) -> FileOutlet:
    """Return the file of an attempt, without a name still.

    Args:
        attempt: whose it is; told how much comes first.
        path: what it will be called.
        what: is saved: ``guest`` or ``domain``.
        pages: that it holds.

    Raises:
        UsageError: something else has that name, or there is no room.
        OSError: the folder refuses.
    """
    file = FileOutlet(path)
    file.pacer = attempt.job.pacer
    attempt.job.opened(file)
    attempt.rounds.expect(pages)
    needed_bytes, free_bytes = pages * PAGE_SIZE, file.free_bytes()
    if needed_bytes > free_bytes:
        needed, free = format_size(needed_bytes), format_size(free_bytes)
        raise UsageError(
            f"the {what} holds {needed}, and {path.parent} has {free} free", hint="make room there, or save elsewhere"
        )
    return file


def commit(attempt: Attempt, file: FileOutlet, *, stop: bool) -> None:
    """Give the file its name; from then on a guest that was to stop is in the file and not here.

    Raises:
        MigrationError: it was cancelled.
        OSError, UsageError: it could not be named.
    """
    handoff = attempt.job.handoff
    if not (handoff.commit() if stop else handoff.keep()):
        raise attempt.job.stays()
    try:
        file.commit()
    except (OSError, UsageError):
        if stop:
            handoff.refused()
        raise
    file.close()
    if stop:
        handoff.running()


def as_save_error(error: Exception, path: Path, *, phase: Phase, guest_at: GuestAt) -> MigrationError:
    """Return the MigrationError that a save of that name raises from ``error``."""
    if isinstance(error, PageferryError):  # before OSError: a KvmError is both, and no fault of the disk
        reason, hint = str(error), error.hint
    elif isinstance(error, OSError):
        reason = f"cannot write {path}: {error.strerror or error}"
        hint = f"nothing is left of it; {file_hint(error) or 'choose another place'}"
    else:
        reason, hint = f"internal error: {error!r}", ""
    return MigrationError(reason, phase=str(phase), guest_at=guest_at, hint=hint)

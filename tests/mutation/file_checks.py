"""Checks of saving and restoring: what is written at the last moment, what the disk spoils, what is touched early."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unnamed import unnamed_in

from mutation.trips import PAGES, Engine, Rounds, different, ignore, write
from pageferry.core.errors import MigrationError, PageferryError
from pageferry.core.events import Event, Phase, PhaseBegan, RoundEnded
from pageferry.core.frames import gpa_of
from pageferry.engine.image.restore import restore
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.testing.lab import Guest, Lab, Violation, listed, require

_PATTERN = b"what the disk will spoil"


@contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "guest.bin"


def _save(engine: Engine, guest: Guest, path: Path, on_event: Callable[[Event], None] = ignore) -> None:
    engine.save(guest.vm, path, Rounds(4), on_event=on_event).run()


def _require_restored(lab: Lab, guest: Guest, path: Path) -> None:
    with SavedGuest(path) as saved:
        vm = restore(saved, lab.make_vm)
    try:
        wrong = different(guest.memory, vm.memory)
        require(not wrong.size, f"the guest that was restored has other memory: {listed(wrong)}")
    finally:
        vm.close()


def saved_after_the_last_count(lab: Lab, engine: Engine) -> None:
    """A page that changes after the last round was counted, and found to leave nothing, is in the file."""
    with lab.stamping() as guest, _file() as path:
        guest.play(3)

        def disturb(event: Event) -> None:
            if isinstance(event, RoundEnded) and not event.stats.final and event.stats.index == 3:
                require(event.stats.remaining_pages == 0, "a guest that stands still dirties pages")
                write(guest, 2, 7)

        try:
            _save(engine, guest, path, disturb)
        except MigrationError as error:
            raise Violation(f"it was not saved: {error.reason}") from error
        _require_restored(lab, guest, path)


def a_spoiled_file_is_no_file(lab: Lab, engine: Engine) -> None:
    """One wrong byte on the disk, and the file never gets its name."""
    with lab.stamping() as guest, _file() as path:
        guest.play(3)
        guest.memory.write(gpa_of(int(PAGES[3])), _PATTERN)

        def spoil(event: Event) -> None:
            if isinstance(event, PhaseBegan) and event.phase is Phase.HANDOFF:
                (part,) = unnamed_in(path.parent)
                at = part.read_bytes().index(_PATTERN)
                with part.open("r+b") as file:
                    file.seek(at)
                    file.write(b"W")

        try:
            _save(engine, guest, path, spoil)
        except MigrationError:
            require(not path.exists(), "a spoiled file has its name")
            return
        _require_restored(lab, guest, path)


def touched_before_it_is_read(lab: Lab, engine: Engine) -> None:
    """What is written to a page before a lazy restore has read the rest of the file stays written."""
    with lab.stamping() as guest, _file() as path:
        guest.play(3)
        write(guest, 3, 1)
        _save(engine, guest, path)
        vm = lab.make_vm(guest.vm.config)
        lazy = engine.lazy(SavedGuest(path), vm, on_failure=_fail)
        try:
            vm.load_state(guest.vm.save_state())
            where = gpa_of(int(PAGES[3]))
            vm.memory.write(where, b"new")
            lazy.read_ahead()
            lazy._thread.join()
            found = vm.memory.read(where, 3)
            require(found == b"new", f"a write was lost to what the file had: {found!r}")
        finally:
            lazy.close()
            vm.close()


def _fail(error: PageferryError) -> None:
    raise error


FUNCTIONS: Sequence[tuple[int | None, Callable[..., None]]] = (
    (2, saved_after_the_last_count),
    (7, a_spoiled_file_is_no_file),
    (2, touched_before_it_is_read),
)

"""Announcer: tells clients of the control socket, and a person, what happens in this process."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pageferry.core.events import Event, Phase, PhaseBegan, PostcopyPaused, PostcopyRecovered
from pageferry.vmm.qmp import QmpServer

#: The event that carries the engine's own events, for progress; ``type`` is the event's class name.
ENGINE_EVENT = "X_PAGEFERRY_MIGRATION"


class Announcer:
    """Sends what was not asked for; from any thread.

    Args:
        say: sees one line for a person when something happens.
        known_warning: what the person was warned of when the process began: of the CPU under its guests; None: nothing.
    """

    def __init__(self, say: Callable[[str], None], known_warning: str | None = None) -> None:
        self.say = say
        """Tell a person, in one line."""
        self._known = None if known_warning is None else f"{known_warning}; "
        self._server: QmpServer | None = None

    def warn(self, text: str) -> None:
        """Warn a person; of a warning that begins with the known one, say only what is new."""
        if self._known is not None and text.startswith(self._known):
            text = text.removeprefix(self._known)
        self.say(f"warning: {text}")

    def tell_clients_of(self, server: QmpServer) -> None:
        """Send events to the clients of ``server`` from now on; before that they are dropped."""
        self._server = server

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Tell the clients, by an event of QMP."""
        if self._server is not None:
            self._server.event(name, data)

    def migration(self, status: str) -> None:
        """Tell the clients what state a migration, out or in, has come to; QEMU's words."""
        self.event("MIGRATION", {"status": status})

    def postcopy(self, event: Event) -> None:
        """Tell the clients of post-copy's states, the same at both ends, if ``event`` is the begin of one."""
        if isinstance(event, PostcopyRecovered) or (isinstance(event, PhaseBegan) and event.phase is Phase.POSTCOPY):
            self.migration("postcopy-active")
        elif isinstance(event, PostcopyPaused):
            self.migration("postcopy-paused")

    def engine_event(self, event: Event, more: dict[str, Any] | None = None) -> None:
        """Hand one of the engine's own events to the clients, with ``more`` beside its fields."""
        self.event(ENGINE_EVENT, {"type": type(event).__name__, **asdict(event), **(more or {})})

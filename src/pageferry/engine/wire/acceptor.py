"""Acceptor: a place where guests arrive, and where their sources come back to after a cut."""

import logging
import time

from pageferry.core.errors import UsageError
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, Channel, Endpoint, accept_within
from pageferry.engine.wire.listener import Listener

_log = logging.getLogger(__name__)
_RETRY_S = 0.05


class Acceptor:
    """Listens at an address until it is closed. A context manager.

    Args:
        endpoint: where, or its URI (``tcp://HOST:PORT``, port 0 for a free one; ``unix:PATH``).
        timeout_s: how long a connection that came here may stand still.

    Raises:
        UsageError: it is no address, or the address is in use or not ours.
    """

    def __init__(self, endpoint: Endpoint | str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        asked = Endpoint.parse(endpoint) if isinstance(endpoint, str) else endpoint
        try:
            listener = asked.listen()
        except OSError as error:
            hint = "choose another port, or end what listens there"
            raise UsageError(f"cannot listen at {asked}: {error.strerror or error}", hint=hint) from error
        self._listener: Listener | None = listener
        self._timeout_s = timeout_s
        self.endpoint = asked.bound(listener)
        """The address, with the port that it really has."""
        self.dropped: set[str] = set()
        """The tokens of guests that were to switch to this place, and never ran here."""

    def __enter__(self) -> "Acceptor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._listener is None

    def wait(self) -> Channel:
        """Wait for a connection.

        Raises:
            ConnectionAbortedError: it was closed.
        """
        while True:
            listener = self._open()
            try:
                return Channel(listener.accept(), self._timeout_s)
            except OSError as error:
                if self._listener is None:
                    raise ConnectionAbortedError("no longer listening") from error
                _log.debug("a connection was not accepted: %s", error)
                time.sleep(_RETRY_S)  # out of descriptors, or a source that left at once

    def accept(self, wait_s: float) -> Channel | None:
        """Return the next connection, or None when none came within ``wait_s``.

        Raises:
            OSError: it was closed.
        """
        return accept_within(self._open(), wait_s, self._timeout_s)

    def close(self) -> None:
        """Listen no more, and wake the thread that waits; from any thread. May be called twice."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.shutdown()
        listener.close()
        self.endpoint.remove()

    def _open(self) -> Listener:
        if self._listener is None:
            raise ConnectionAbortedError("no longer listening")
        return self._listener

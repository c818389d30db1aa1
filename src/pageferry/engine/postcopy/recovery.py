"""How post-copy goes on at the source after its connection was cut: when it is told where the destination is."""

from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.wire.channel import Endpoint


class Recovery:
    """A migration that was cut after the switch waits here until it is told where to connect.

    Args:
        host: on which it waits.
    """

    def __init__(self, host: Host = THIS_HOST) -> None:
        self._changed = host.condition()
        self._endpoint: Endpoint | None = None
        self._abandoned = False
        self._waiting = False

    @property
    def waiting(self) -> bool:
        """Whether it waits now."""
        return self._waiting

    @property
    def abandoned(self) -> bool:
        """Whether :meth:`abandon` was called."""
        return self._abandoned

    def ask(self, endpoint: Endpoint) -> bool:
        """Say where to connect; from any thread. Return whether the migration waited for it."""
        with self._changed:
            if not self._waiting:
                return False
            self._waiting = False
            self._endpoint = endpoint
            self._changed.notify_all()
            return True

    def abandon(self) -> None:
        """Give up: no address will be told."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def end(self) -> bool:
        """End the wait as :meth:`abandon` does, if it waits now. Return whether it did."""
        with self._changed:
            if self._waiting:
                self._waiting = False
                self.abandon()
                return True
            return False

    def begin(self) -> None:
        """Begin to wait: from here on :meth:`ask` is heard."""
        with self._changed:
            self._endpoint, self._waiting = None, True

    def wait(self) -> Endpoint | None:
        """Return what :meth:`ask` was told, when it is; None when the migration was abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._endpoint is not None or self._abandoned)
            self._waiting = False
            return None if self._abandoned else self._endpoint

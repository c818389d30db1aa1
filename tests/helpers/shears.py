"""Connections of post-copy that are cut at either end, after so many bytes, in the middle of whatever is being said."""

from dataclasses import dataclass

from proxy import marker

from pageferry.engine.wire.channel import Endpoint
from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.ferry_order import Side

#: The side that sent one of these is in post-copy.
_BEGINS = {marker(each) for each in (FrameType.SWITCH, FrameType.RUNNING, FrameType.RECOVER, FrameType.RECOVERED)}


@dataclass
class Cut:
    """What happens to one connection: cut when so many bytes have gone on it in one direction.

    ``quiet``: the destination asks there only for pages that a thread waits for.
    """

    by: Side
    after_bytes: int
    quiet: bool = False


class Shears:
    """Cuts connections: the first of post-copy as the first of ``cuts`` says, and so on; the rest are left alone.

    ``quiet``: the destination is on a connection that is so.
    """

    def __init__(self):
        self.cuts = []
        self.quiet = False
        self._turns = dict.fromkeys(Side, 0)

    def _begun(self, side):
        number, self._turns[side] = self._turns[side], self._turns[side] + 1
        cut = self.cuts[number] if number < len(self.cuts) else None
        if side is Side.DESTINATION:
            self.quiet = cut is not None and cut.quiet
        return cut.after_bytes if cut is not None and cut.by is side else None

    def watch(self, channel, side):
        """Return a channel, of which ``side`` is ours, that is cut when its turn has come."""
        send, left_bytes = channel.send, None

        def send_some(buffers, fd=None):
            nonlocal left_bytes
            size_bytes = sum(map(len, buffers))
            if left_bytes is not None and size_bytes > left_bytes:
                send([b"".join(buffers)[:left_bytes]])
                channel.abort()
                raise ConnectionResetError("cut by the test")
            send(buffers, fd)
            if left_bytes is not None:
                left_bytes -= size_bytes
            elif bytes(buffers[0][:4]) in _BEGINS:
                left_bytes = self._begun(side)

        channel.send = send_some
        return channel


@dataclass
class Way:
    """Where a source connects; its connections may be cut."""

    endpoint: Endpoint
    shears: Shears

    def __getattr__(self, name):
        return getattr(self.endpoint, name)

    def __str__(self):
        return str(self.endpoint)

    def connect(self, timeout_s, **options):
        """Connect."""
        return self.shears.watch(self.endpoint.connect(timeout_s, **options), Side.SOURCE)

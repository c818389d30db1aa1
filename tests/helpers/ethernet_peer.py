"""A station behind a guest's network: a Unix stream socket with frames, as passt has, that answers pings."""

import contextlib
import socket
import struct
import threading

_LENGTH = struct.Struct(">I")
_MAC = bytes.fromhex("525400000001")
_ARP, _IPV4, _RARP, _ICMP = 0x0806, 0x0800, 0x8035, 1
_REQUEST, _REPLY = 1, 2
_ECHO_REQUEST, _ECHO_REPLY = 8, 0


def checksum(data):
    """Return the Internet checksum of bytes (RFC 1071); 0 for data that has its own in it."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class EthernetPeer:
    """The station; it has every address that it is asked for. A context manager.

    ``connections``: how many it has had, one after another. ``pings``: how many it has answered, all of them sound.
    ``announced``: how often it was told where the guest is now.
    """

    def __init__(self, path):
        self.connections = self.pings = self.announced = 0
        self.faults = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)  # a guest has closed its connection before
        self._thread.join()
        self._listener.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with connection, connection.makefile("rb") as stream:
                    while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                        if answer := self._answer(stream.read(*_LENGTH.unpack(head))):
                            connection.sendall(_LENGTH.pack(len(answer)) + answer)

    def _answer(self, frame):
        guest, kind, body = frame[6:12], int.from_bytes(frame[12:14], "big"), frame[14:]
        if kind == _RARP:
            self.announced += 1
        elif kind == _ARP and int.from_bytes(body[6:8], "big") == _REQUEST:
            sender, asked = body[8:18], body[24:28]
            reply = body[:6] + struct.pack(">H", _REPLY) + _MAC + asked + sender
            return guest + _MAC + frame[12:14] + reply
        elif kind == _IPV4 and body[9] == _ICMP:
            return self._answer_ping(guest, body)
        return b""

    def _answer_ping(self, guest, packet):
        header_bytes = 4 * (packet[0] & 15)
        header, echo = packet[:header_bytes], packet[header_bytes : int.from_bytes(packet[2:4], "big")]
        if checksum(header) or checksum(echo) or echo[0] != _ECHO_REQUEST:
            self.faults.append(packet)
            return b""
        self.pings += 1
        reply = bytes((_ECHO_REPLY, 0, 0, 0)) + echo[4:]
        reply = reply[:2] + struct.pack(">H", checksum(reply)) + reply[4:]
        # The addresses change places, which leaves the header's checksum as it is.
        header = header[:12] + header[16:20] + header[12:16] + header[20:]
        return guest + _MAC + struct.pack(">H", _IPV4) + header + reply

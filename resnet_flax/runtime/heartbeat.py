"""Notices within seconds that another process of a run is lost, and ends this one in a sentence.

Process 0 is connected with every other one. Both ends send an empty line every second, from threads
of their own, so that a process that compiles, saves or reads for minutes is still heard. A process
that is killed closes its connection; nothing is heard from one that is frozen or whose host failed.
Process 0 tells the others of it. One that ends says so first.

A line is empty, `goodbye` (it ended well), `failed` (it ended with an error, which may be one that
all have), or `lost NUMBER REASON`.
"""

import contextlib
import hmac
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from resnet_flax.runtime.terminal import Unfailing, say

# Seconds between two lines.
BEAT = 1.0
# Seconds to connect, and to wait for one address or one answer.
CONNECT, ANSWER = 10.0, 3.0
# Seconds after one process has failed until the others end too: they may have the same error, and
# still be saving.
GRACE = 120.0
_REASONS = {
    "closed": "its connection was closed, as it is when a process is killed",
    "silent": "nothing was heard from it for {limit:g} s, so it is frozen or its host failed",
    "failed": "it ended without the others, and printed why",
}


def _end(sentence: str, status: int) -> None:
    """Ends the process at once, as its main thread may hang in a collective."""
    if sentence:
        if Unfailing(sys.stdout).isatty():
            say("\r\x1b[J\x1b[?25h")  # a progress bar has hidden the cursor
        say(sentence, sys.stderr)
    os._exit(status)


class _Peer:
    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.silent = 0.0  # seconds since it was heard, or since it failed
        self.left = ""  # `goodbye` or `failed`, if it said so
        self.text = b""  # a line that has not arrived whole


class Heartbeat:
    """A thread that exchanges lines with other processes, until this one ends.

    Args:
      me: number of this process.
      hosts: name of each process's host.
      connections: by number of the process; process 0 has one with each other, they with it.
      limit: seconds after which a process from which nothing was heard is lost.
      end: called with a sentence, or nothing if all was said, and the exit status.

    Attributes:
      limit: as given.
      again: what to do when a process is lost.
    """

    again = (
        "the same command, with any number of processes, continues from the newest checkpoint, if "
        "there is one"
    )

    def __init__(
        self,
        me: int,
        hosts: Sequence[str],
        connections: Mapping[int, socket.socket],
        limit: float,
        end: Callable[[str, int], None] = _end,
    ) -> None:
        self._me, self._hosts, self.limit, self._end = me, hosts, limit, end
        self._beat = min(BEAT, limit / 5)
        self._peers = {number: _Peer(connection) for number, connection in connections.items()}
        self._selector = selectors.DefaultSelector()
        self._any_lost = self._stopped = False
        self._status: int | None = None
        for number, peer in self._peers.items():
            self._selector.register(peer.connection, selectors.EVENT_READ, number)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self, word: str, status: int, pause: float = 0.0) -> None:
        """Says to the others that this process ends.

        Args:
          word: `goodbye` or `failed`; or `abandon` to end the others at once.
          status: the exit status. If another process is lost from here on, this one ends with it
            soon; JAX would wait for the other one for minutes.
          pause: seconds in which a loss is still reported, before this returns.
        """
        self._send(f"lost {self._me} failed" if word == "abandon" else word)
        time.sleep(pause)
        self._status = status

    def close(self) -> None:
        """Ends the thread and the connections."""
        self._stopped = True
        self._thread.join()
        self._selector.close()
        for peer in self._peers.values():
            peer.connection.close()

    def _run(self) -> None:
        before = due = time.monotonic()
        while not self._stopped:
            if time.monotonic() >= due:
                self._send("")
                due = time.monotonic() + self._beat
            ready = self._selector.select(max(0.0, due - time.monotonic()))
            # A longer time is one in which this process was suspended itself, and perhaps all were.
            passed, before = min(time.monotonic() - before, 2 * self._beat), time.monotonic()
            for peer in self._peers.values():
                peer.silent += passed
            for key, _ in ready:
                self._read(key.data)
            for number, peer in self._peers.items():
                limit = GRACE if peer.left else self.limit
                if peer.left != "goodbye" and peer.silent > limit:
                    self._lost(number, peer.left or "silent")
            if self._any_lost and self._status is not None:
                time.sleep(3 * self._beat)  # the last words may still be printed
                self._finish("", self._status)

    def _read(self, number: int) -> None:
        peer = self._peers[number]
        try:
            received = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not peer.left:
            peer.silent = 0.0
        *lines, peer.text = (peer.text + received).split(b"\n")
        for line in lines:
            word, *more = line.decode(errors="replace").split() or [""]
            if word == "lost":
                self._lost(int(more[0]), more[1])
            elif word:
                peer.left, peer.silent = word, 0.0
        if not received:
            self._selector.unregister(peer.connection)
            if not peer.left:
                self._lost(number, "closed")

    def _send(self, line: str) -> None:
        for peer in self._peers.values():
            # What cannot be sent is noticed when reading.
            with contextlib.suppress(OSError):
                peer.connection.send(f"{line}\n".encode())

    def _lost(self, number: int, reason: str) -> None:
        self._any_lost = True
        if self._status is not None or self._stopped:
            return
        self._send(f"lost {number} {reason}")
        why = _REASONS[reason].format(limit=self.limit)
        if number == self._me:
            lost = (
                f"this process ({number} of {len(self._hosts)}) was suspended: the others heard "
                f"nothing from it for {self.limit:g} s, and have ended"
            )
        else:
            host = self._hosts[number]
            lost = f"process {number} of {len(self._hosts)} on {host} is lost: {why}"
        self._finish(f"error: {lost}; {self.again}", 1)

    def _finish(self, sentence: str, status: int) -> None:
        self._stopped = True
        self._end(sentence, status)


def listen() -> socket.socket:
    """A socket of process 0 to which the others connect, on a free port of every interface."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def addresses() -> list[str]:
    """Names and numbers under which other hosts may reach this one."""
    found = [socket.gethostname(), socket.getfqdn()]
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a UDP socket sends nothing, but chooses the interface that leads outside.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as outside:
            outside.connect((far, 9))
            found.append(outside.getsockname()[0])
    return found


def accept(
    listener: socket.socket, token: str, number: int, seconds: float = CONNECT
) -> dict[int, socket.socket]:
    """The connections of other processes.

    Args:
      listener: from `listen`.
      token: which they must know.
      number: of processes that are expected.
      seconds: to wait for them; the result may lack some.
    """
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + seconds
    while len(found) < number and time.monotonic() < deadline:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(OSError, ValueError):
            connection, _ = listener.accept()
            with contextlib.ExitStack() as stack:
                stack.callback(connection.close)
                connection.settimeout(ANSWER)
                said, _, process = _line(connection).partition(" ")
                if hmac.compare_digest(said.encode(), token.encode()):
                    connection.sendall(b"heard\n")
                    found[int(process)] = connection
                    stack.pop_all()
    return found


def connect(candidates: Sequence[str], port: int, token: str, me: int) -> dict[int, socket.socket]:
    """The connection with process 0, by its number; nothing if there is none.

    Args:
      candidates: names and numbers of its host.
      port: of its listener.
      token: which shows that the two belong together.
      me: number of this process.
    """
    for candidate in dict.fromkeys(candidates):
        with contextlib.suppress(OSError):
            connection = socket.create_connection((candidate, port), ANSWER)
            with contextlib.ExitStack() as stack:
                stack.callback(connection.close)
                connection.sendall(f"{token} {me}\n".encode())
                if _line(connection) == "heard":
                    stack.pop_all()
                    return {0: connection}
    return {}


def _line(connection: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n") and len(text) < 200:
        received = connection.recv(1)  # no more than the line
        if not received:
            break
        text += received
    return text.decode(errors="replace").strip()

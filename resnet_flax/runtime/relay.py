"""JAX's connection with its coordinator, which is in process 0, through a relay in this process.

As soon as that connection is closed, JAX's client ends the process with a C++ stack trace. Through
a relay it does not see that, and `heartbeat` says in one sentence what happened.
"""

import contextlib
import importlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

NO_PROXY = "no_grpc_proxy"
# Seconds to connect with the coordinator; JAX tries again.
CONNECT = 10.0


class Relay:
    """What is sent on a local port is passed on to a coordinator, and its answers back.

    Attributes:
      coordinator: HOST:PORT; empty before `open`.
      hold: whether connections stay open on this side when the coordinator closes them.
    """

    def __init__(self) -> None:
        self.coordinator, self.hold = "", False

    def open(self, coordinator: str) -> str:
        """Starts passing on; returns the relay's own HOST:PORT."""
        self.coordinator = coordinator
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, args=(listener,), name="relay", daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _accept(self, listener: socket.socket) -> None:
        host, _, port = self.coordinator.rpartition(":")
        while True:
            here, _ = listener.accept()
            try:
                there = socket.create_connection((host.strip("[]"), int(port)), CONNECT)
            except OSError:
                here.close()
                continue
            there.settimeout(None)
            for way in ((here, there, False), (there, here, True)):
                threading.Thread(target=self._pass_on, args=way, name="relay", daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                target.sendall(received)
        if not (back and self.hold):
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relayed() -> Iterator[Relay]:
    """A context in which JAX's client is connected through a relay, except that of process 0.

    JAX has no setting for this, so a function of JAX is replaced; nothing is in a version of JAX
    that lacks it.
    """
    relay = Relay()
    try:
        jaxlib = importlib.import_module("jax._src.lib")._jax
        connect = jaxlib.get_distributed_runtime_client
    except (ImportError, AttributeError):
        yield relay
        return

    def through_relay(address: str, process: int, *more: Any, **settings: Any) -> Any:
        if process == 0:
            return connect(address, process, *more, **settings)
        # Not through a proxy for HTTP, which cannot reach a port of this host.
        without = os.environ.get(NO_PROXY, os.environ.get("no_proxy", ""))
        os.environ[NO_PROXY] = f"{without},127.0.0.1".lstrip(",")
        return connect(relay.open(address), process, *more, **settings)

    jaxlib.get_distributed_runtime_client = through_relay
    try:
        yield relay
    finally:
        jaxlib.get_distributed_runtime_client = connect

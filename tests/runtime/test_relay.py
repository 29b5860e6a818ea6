"""The relay between JAX's client and its coordinator."""

import contextlib
import importlib
import socket

import pytest

from resnet_flax.runtime.relay import Relay, relayed


@pytest.fixture
def ends():
    """A relay, and both ends of a connection through it."""
    with contextlib.ExitStack() as stack:
        coordinator = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        coordinator.settimeout(20)
        relay = Relay()
        own = relay.open(f"127.0.0.1:{coordinator.getsockname()[1]}")
        client = stack.enter_context(_connected(own))
        server = stack.enter_context(coordinator.accept()[0])
        server.settimeout(20)
        yield relay, client, server


def _connected(address):
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 20)


def test_what_is_sent_arrives_both_ways(ends):
    _, client, server = ends
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"


def test_a_coordinator_that_closes_is_seen_unless_held(ends):
    relay, client, server = ends
    server.close()
    assert client.recv(1) == b""
    assert not relay.hold


def test_a_coordinator_that_closes_is_not_seen_if_held(ends):
    relay, client, server = ends
    relay.hold = True
    server.close()
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.sendall(b"more")  # and the client can go on for a while


def test_a_client_that_closes_is_always_seen(ends):
    relay, client, server = ends
    relay.hold = True
    client.close()
    assert server.recv(1) == b""


def test_without_a_coordinator_the_client_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    relay = Relay()
    with _connected(relay.open(f"127.0.0.1:{port}")) as client:
        assert client.recv(1) == b""


def test_only_clients_of_other_processes_than_the_first_are_relayed(monkeypatch):
    jaxlib = importlib.import_module("jax._src.lib")._jax
    addresses = []

    def create(address, process, **settings):
        addresses.append(address)

    monkeypatch.setattr(jaxlib, "get_distributed_runtime_client", create)
    monkeypatch.setenv("no_grpc_proxy", "elsewhere")
    with relayed() as relay:
        jaxlib.get_distributed_runtime_client("host:9", 0, init_timeout=1)
        jaxlib.get_distributed_runtime_client("host:9", 1, init_timeout=1)
    assert jaxlib.get_distributed_runtime_client is create
    assert addresses[0] == "host:9"
    assert addresses[1].startswith("127.0.0.1:")
    assert relay.coordinator == "host:9"


def test_a_version_of_jax_without_the_function_is_left_alone(monkeypatch):
    jaxlib = importlib.import_module("jax._src.lib")._jax
    monkeypatch.delattr(jaxlib, "get_distributed_runtime_client")
    with relayed() as relay:
        assert not relay.coordinator

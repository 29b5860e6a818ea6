"""Heartbeats over sockets of one process, with limits of a fraction of a second."""

import contextlib
import queue
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from resnet_flax.runtime import heartbeat
from resnet_flax.runtime.heartbeat import Heartbeat

HOSTS = ("alpha", "beta", "gamma")
AGAIN = "; the same command, with any number of processes, continues from the newest checkpoint"


class Watched:
    """A heartbeat that notes how it would end the process."""

    def __init__(self, me, connections, limit):
        self.ended = queue.Queue()
        end = lambda sentence, status: self.ended.put((sentence, status))  # noqa: E731
        self.heartbeat = Heartbeat(me, HOSTS, connections, float(limit), end)

    def end(self, timeout=20):
        return self.ended.get(timeout=timeout)

    def lives(self, seconds):
        with pytest.raises(queue.Empty):
            print(self.ended.get(timeout=seconds))
        return True


@pytest.fixture
def watch():
    """Makes heartbeats that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(me, connections, limit):
            watched = Watched(me, connections, limit)
            stack.callback(watched.heartbeat.close)
            return watched

        yield make


@pytest.fixture
def star(watch):
    """Process 0's heartbeat, and the other ends of its connections."""
    with contextlib.ExitStack() as stack:

        def make(limit, processes=1):
            pairs = [socket.socketpair() for _ in range(processes)]
            connections = {i + 1: pair[0] for i, pair in enumerate(pairs)}
            return watch(0, connections, limit), [stack.enter_context(pair[1]) for pair in pairs]

        yield make


def _until(connection, line):
    """Reads lines until this one."""
    connection.settimeout(20)
    text = b""
    while f"{line}\n".encode() not in text:
        received = connection.recv(100)
        assert received, text
        text += received


def test_a_silent_process_is_lost_after_the_limit(star):
    watched, (other,) = star(limit=0.6)
    start = time.monotonic()
    sentence, status = watched.end()
    assert time.monotonic() - start > 0.6
    assert status == 1
    assert sentence.startswith("error: process 1 of 3 on beta is lost: nothing was heard from it")
    assert "for 0.6 s" in sentence
    assert AGAIN in sentence
    _until(other, "lost 1 silent")  # in case that it was only frozen


def test_a_closed_connection_is_noticed_at_once(star):
    watched, (other,) = star(limit=600)
    other.close()
    sentence, status = watched.end()  # waits for 20 s at most
    assert status == 1
    assert "process 1 of 3 on beta is lost: its connection was closed" in sentence
    assert AGAIN in sentence


def test_the_others_hear_which_process_is_lost(star, watch):
    watched, (one, two) = star(limit=60, processes=2)
    second = watch(2, {0: two}, 60)
    one.close()
    for end in (watched.end(), second.end()):
        assert end[1] == 1
        assert "process 1 of 3 on beta is lost: its connection was closed" in end[0]


def test_who_was_suspended_alone_hears_that_the_others_have_ended(star):
    watched, (other,) = star(limit=60)
    other.sendall(b"\nlost 0 silent\n")
    other.close()
    sentence, status = watched.end()
    assert status == 1
    assert sentence.startswith("error: this process (0 of 3) was suspended: the others heard")
    assert AGAIN in sentence


def test_a_busy_process_is_heard(star, watch):
    watched, (other,) = star(limit=2)
    second = watch(1, {0: other}, 2)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:  # the main thread computes in Python all the time
        sum(range(100_000))
    assert watched.ended.empty()
    assert second.ended.empty()


def test_the_time_in_which_a_process_was_suspended_itself_does_not_count(star, monkeypatch):
    late = threading.Event()
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + 1000 * late.is_set(), sleep=time.sleep
    )
    monkeypatch.setattr(heartbeat, "time", clock)
    monkeypatch.setattr(heartbeat, "BEAT", 0.1)
    watched, _ = star(limit=10)
    time.sleep(0.3)
    late.set()
    assert watched.lives(0.4)  # of 10 s, 0.3 + 2 * 0.1 + 0.4 are over if the machine is fast
    watched.heartbeat.limit = 0.1
    assert "nothing was heard" in watched.end()[0]


def test_a_goodbye_is_no_loss(star, monkeypatch):
    monkeypatch.setattr(heartbeat, "GRACE", 0.4)
    watched, (other,) = star(limit=0.4)
    other.sendall(b"goodbye\n")
    assert watched.lives(0.8)
    other.close()
    assert watched.lives(0.8)


def test_who_does_not_end_after_another_one_s_error_is_ended(star, monkeypatch):
    monkeypatch.setattr(heartbeat, "GRACE", 1.0)
    watched, (other,) = star(limit=0.4)
    other.sendall(b"failed\n")
    other.close()
    assert watched.lives(0.7)  # it may have the same error, and be saving
    sentence, status = watched.end()
    assert status == 1
    assert "process 1 of 3 on beta is lost: it ended without the others" in sentence


def test_who_ends_without_the_others_ends_them(star, watch):
    watched, (other,) = star(limit=3)
    second = watch(1, {0: other}, 3)
    second.heartbeat.leave("abandon", 1)
    assert "process 1 of 3 on beta is lost: it ended without the others" in watched.end()[0]


@pytest.mark.parametrize(("word", "status"), [("goodbye", 0), ("failed", 2)])
def test_after_the_last_words_a_loss_only_ends_the_process(star, word, status):
    watched, (other,) = star(limit=0.5)
    watched.heartbeat.leave(word, status)
    _until(other, word)
    other.close()
    assert watched.end() == ("", status)


def test_a_loss_is_reported_instead_of_the_error_that_it_caused(star):
    watched, (other,) = star(limit=60)
    threading.Timer(0.3, other.close).start()
    watched.heartbeat.leave("failed", 2, pause=1.0)
    assert "process 1 of 3 on beta is lost" in watched.end()[0]


def test_only_who_knows_the_token_is_connected():
    with heartbeat.listen() as listener:
        port = listener.getsockname()[1]
        found = {}
        accepting = threading.Thread(
            target=lambda: found.update(heartbeat.accept(listener, "secret", 2, 20.0))
        )
        accepting.start()
        assert heartbeat.connect(["127.0.0.1"], port, "guess", 1) == {}
        nowhere = "name.invalid"
        first = heartbeat.connect([nowhere, "127.0.0.1"], port, "secret", 1)
        assert first.keys() == {0}
        second = heartbeat.connect(heartbeat.addresses(), port, "secret", 2)
        accepting.join(20)
        assert found.keys() == {1, 2}
        found[2].sendall(b"\n")
        assert second[0].recv(1) == b"\n"
        for connection in (*found.values(), *first.values(), *second.values()):
            connection.close()


def test_who_does_not_connect_is_not_waited_for_long():
    with heartbeat.listen() as listener:
        start = time.monotonic()
        assert heartbeat.accept(listener, "secret", 1, 0.3) == {}
        assert 0.3 <= time.monotonic() - start < 20
        port = listener.getsockname()[1]
    assert heartbeat.connect(["127.0.0.1"], port, "secret", 1) == {}

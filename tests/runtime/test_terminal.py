"""Output that cannot be written."""

import io
import os
import subprocess
import sys
import time

from resnet_flax.runtime import terminal
from resnet_flax.runtime.terminal import Unfailing, say


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_what_cannot_be_written_is_lost_and_noted_once(tmp_path):
    file = Unfailing(Broken(), tmp_path / "terminal.log")
    for _ in range(3):
        print("text", file=file, flush=True)
    (line,) = (tmp_path / "terminal.log").read_text().splitlines()
    assert line.endswith("the terminal cannot be written (Broken pipe); the run continues")


def test_a_closed_file_and_an_unwritable_log_are_nothing(tmp_path):
    closed = io.StringIO()
    closed.close()
    print("text", file=Unfailing(closed, tmp_path / "none" / "terminal.log"))
    say("text", closed)


def test_what_is_no_whole_file_will_do():
    class WriteOnly:
        text = ""

        def write(self, text):
            self.text += text

    file = WriteOnly()
    assert not Unfailing(file).isatty()
    say("words", file)
    assert file.text == "words\n"
    assert not Unfailing(None).isatty()
    say("words", Unfailing(None))


def test_letters_that_a_file_lacks_are_written_otherwise():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    say("1 ± 2", file)
    assert raw.getvalue() == rb"1 \xb1 2" + b"\n"


def test_what_nobody_reads_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "PATIENCE", 0.2)
    ours, theirs = os.pipe()
    pipe = os.fdopen(theirs, "w")
    file = Unfailing(pipe, tmp_path / "terminal.log")
    began = time.monotonic()
    for _ in range(1000):
        print("x" * 1000, file=file, flush=True)
    assert time.monotonic() - began < 50  # not 0.2 s for each
    assert terminal.stuck()
    assert "nobody reads what was written" in (tmp_path / "terminal.log").read_text()
    while terminal.stuck():
        os.read(ours, 100_000)
    pipe.close()
    os.close(ours)


def test_all_else_is_the_file_s():
    text = io.StringIO()
    say("words", text)
    assert text.getvalue() == "words\n"
    assert not Unfailing(text).isatty()


def test_a_program_whose_output_is_lost_ends_well():
    code = "from resnet_flax.runtime.terminal import *\nsay('x'); say('y'); leave_quietly()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full)
        assert done.returncode == 0
        bad = subprocess.run([sys.executable, "-c", "print('y')"], stdout=full, stderr=full)
    assert bad.returncode != 0


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.escape_unknown()
    print("caf\u00e9 \U0001f98a d\udcff", flush=True)
    assert stream.buffer.getvalue() == b"caf\\xe9 \\U0001f98a d\\udcff\n"

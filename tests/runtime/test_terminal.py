"""Output that cannot be written."""

import io
import subprocess
import sys

from resnet_flax.runtime.terminal import Unfailing, say


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_what_cannot_be_written_is_lost_and_noted_once(tmp_path):
    file = Unfailing(Broken(), tmp_path / "terminal.log")
    for _ in range(3):
        print("text", file=file, flush=True)
    (line,) = (tmp_path / "terminal.log").read_text().splitlines()
    assert line.endswith("the terminal cannot be written (Broken pipe); the run goes on")


def test_a_closed_file_and_an_unwritable_log_are_nothing(tmp_path):
    closed = io.StringIO()
    closed.close()
    print("text", file=Unfailing(closed, tmp_path / "none" / "terminal.log"))
    say("text", closed)


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

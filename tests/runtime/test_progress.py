"""Progress bars, on terminals and elsewhere."""

import io

import pytest

from resnet_flax.runtime.progress import Progress


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def test_bars_are_drawn_below_what_is_said():
    file = Tty()
    with Progress(file) as progress:
        train = progress.add("train", 100, 20, "compiling")
        other = progress.add("eval")
        progress._bars.refresh()
        assert "20/100 compiling" in file.getvalue()
        assert "eval" not in file.getvalue()  # its total is not known
        train.update(30, text="loss 1.0")
        train.update(31)
        other.update(3, 7)
        progress._bars.refresh()
        assert "31/100 loss 1.0" in file.getvalue()
        assert "3/7" in file.getvalue()
        other.hide()
        drawn = len(file.getvalue())
        progress._bars.refresh()
        assert "3/7" not in file.getvalue()[drawn:]
        progress.say("step 31 [of] 100")
        assert "step 31 [of] 100" in file.getvalue()
    assert progress.shown
    assert file.getvalue().endswith("\x1b[2K")  # the bars are erased


@pytest.mark.parametrize(("file", "wanted"), [(io.StringIO(), True), (Tty(), False)])
def test_elsewhere_and_unwanted_there_are_lines_only(file, wanted):
    with Progress(file, wanted=wanted) as progress:
        bar = progress.add("train", 100)
        bar.update(3, 7, "text")
        bar.hide()
        progress.say("words")
    assert not progress.shown
    assert file.getvalue() == "words\n"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    file = Tty()
    with Progress(file) as progress:
        progress.add("train", 100).update(3, text="loss 1.0")
        progress.say("words")
    assert not progress.shown  # so that a run says its records in lines
    assert file.getvalue() == "words\n"


def test_a_terminal_that_cannot_be_written_is_noted_once(tmp_path):
    class Broken(Tty):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with Progress(Broken(), log=tmp_path / "terminal.log") as progress:
        progress.add("train", 100).update(3)
        progress.say("words")
    (line,) = (tmp_path / "terminal.log").read_text().splitlines()
    assert "the terminal cannot be written (Broken pipe)" in line

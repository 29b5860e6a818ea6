"""Progress bars on a terminal."""

import sys
from pathlib import Path
from typing import Any, TextIO

from resnet_flax.runtime.terminal import Unfailing


class Progress:
    """Progress bars below printed lines; none if the output is not a terminal that can move up.

    A context that restores the terminal.

    Args:
      file: output, by default standard output; failed writes are dropped.
      wanted: whether to show bars on a terminal.
      log: a file that notes the first failure to write; None for none.

    Attributes:
      shown: whether there are bars.
    """

    def __init__(self, file: Any = None, *, wanted: bool = True, log: Path | None = None) -> None:
        output: Any = Unfailing(sys.stdout if file is None else file, log)
        self._file: TextIO = output
        self.shown = wanted and self._file.isatty()
        self._bars: Any = None
        if not self.shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=self._file)
        # Where TERM=dumb, rich would not draw bars, and what they show would appear nowhere.
        self.shown = console.is_interactive
        if not self.shown:
            return
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._bars.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, total: int | None = None, done: int = 0, text: str = "") -> "Bar":
        """Adds a bar, which is hidden until its total is known.

        Args:
          name: shown before it.
          total: of the count.
          done: initial count.
          text: shown after it.
        """
        if self._bars is None:
            return Bar(None, None)
        visible = total is not None
        task = self._bars.add_task(name, total=total, completed=done, text=text, visible=visible)
        return Bar(self._bars, task)

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        if self._bars is None:
            print(text, file=self._file, flush=True)
        else:
            self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bars."""
        if self._bars is not None:
            self._bars.stop()


class Bar:
    """One bar; see `Progress.add`."""

    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def update(self, done: int, total: int | None = None, text: str | None = None) -> None:
        """Updates and shows the bar; `total` and `text` are kept if None."""
        if self._bars is None:
            return
        fields: dict[str, Any] = {"completed": done, "visible": True}
        fields |= {} if total is None else {"total": total}
        fields |= {} if text is None else {"text": text}
        self._bars.update(self._task, **fields)

    def hide(self) -> None:
        """Hides the bar until it is updated."""
        if self._bars is not None:
            self._bars.update(self._task, visible=False)

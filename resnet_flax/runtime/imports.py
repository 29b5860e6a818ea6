"""Imports of a user's own files, such as those beside a config file."""

import contextlib
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# The modules that were imported from each directory, by name.
_imported: dict[Path, dict[str, ModuleType]] = {}


@contextlib.contextmanager
def importing_from(directory: Path) -> Iterator[None]:
    """A context in which the files of a directory can be imported, as those beside a program can.

    What was imported can be imported afterwards too, such as in a function that is called later or
    by pickle. If another directory has a file of the same name, that name is the file of the
    directory whose context was entered last. A file is executed once, however often its directory's
    context is entered.

    Args:
      directory: an absolute path.
    """
    place = str(directory)
    usual = place in sys.path  # the program finds its modules there anyway
    _exchange(directory)
    known = set(sys.modules)
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # what was imported may have changed it
            sys.path.remove(place)
        added = {} if usual else {n: m for n, m in sys.modules.items() if n not in known}
        own = {n for n, m in added.items() if "." not in n and _where(m).parent == directory}
        for name, module in added.items():
            if name.partition(".")[0] in own:
                _imported.setdefault(directory, {})[name] = module


def _exchange(directory: Path) -> None:
    """Makes the names of a directory's files those of its own modules, not of another one's."""
    finder = importlib.machinery.PathFinder
    finder.invalidate_caches()
    for other, modules in _imported.items():
        for top in {name.partition(".")[0] for name in modules} if other != directory else ():
            if sys.modules.get(top) is modules[top] and finder.find_spec(top, [str(directory)]):
                for name in [n for n in sys.modules if n.partition(".")[0] == top]:
                    modules[name] = sys.modules.pop(name)  # some may have been imported later
    sys.modules.update(_imported.get(directory, {}))


def _where(module: ModuleType) -> Path:
    """The file of a module, or the directory of a package."""
    inside = list(getattr(module, "__path__", ()))
    return Path(inside[0] if inside else getattr(module, "__file__", None) or "")

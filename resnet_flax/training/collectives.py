"""The collective operations of a compiled program, read from its HLO."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "bf16": 2}
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_COMPUTATION = re.compile(r"\s*(?:ENTRY )?%?([\w.-]+) \(.*\) -> (.*) \{")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"(pred|bf16|[sufc]\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation between devices.

    Attributes:
      kind: one of `KINDS`.
      shapes: of the arrays that a device receives.
      bytes: of these arrays.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int

    @property
    def largest(self) -> int:
        """Elements of the largest array."""
        return max((math.prod(shape) for shape in self.shapes), default=0)


def collectives(hlo: str) -> list[Collective]:
    """All collectives in the text of a compiled program (`compiled.as_text()`).

    One in a loop's body is listed once, however many iterations there are.
    """
    found = []
    known = set()  # one that starts in one fusion and ends in another is listed in both
    scattered = ""  # TPU's compiler represents a reduce-scatter as a fusion of that name
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            scattered = header[2] if "all-reduce-scatter" in header[1] else ""
        match = _OPERATION.search(line)
        if match is None:
            continue
        result, kind = match.groups()
        if scattered and kind == "all-reduce":
            result, kind = scattered, "reduce-scatter"
        if f"{kind}-start(" in line and kind != "all-reduce":
            result = _last_of_pair(result)  # (operands, results, ...)
        arrays = [
            (name, tuple(int(n) for n in dims.split(",") if n))
            for name, dims in _SHAPE.findall(result)
        ]
        size = sum(math.prod(shape) * _itemsize(name) for name, shape in arrays)
        channel = _CHANNEL.search(line)
        if channel is not None:
            # Merged ones may share a channel, but not the arrays.
            if (channel[1], *arrays) in known:
                continue
            known.add((channel[1], *arrays))
        found.append(Collective(kind, tuple(shape for _, shape in arrays), size))
    return found


def _itemsize(name: str) -> int:
    return _BYTES.get(name) or int(name[1:]) // 8


def _last_of_pair(result: str) -> str:
    """The result's type, from the type `(operand, result, ...)` of an operation's start."""
    depth, parts, part = 0, [], ""
    for letter in result.strip().removeprefix("(").removesuffix(")"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    parts.append(part)
    return parts[1] if len(parts) > 1 else parts[0]


def totals(found: Iterable[Collective]) -> dict[str, dict[str, Any]]:
    """For each kind: the number, their bytes, and the elements of the largest array."""
    table: dict[str, dict[str, Any]] = {}
    for one in found:
        row = table.setdefault(one.kind, {"count": 0, "bytes": 0, "largest": 0})
        row["count"] += 1
        row["bytes"] += one.bytes
        row["largest"] = max(row["largest"], one.largest)
    return table

"""A target's results next to the paper's, as text."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from resnet_flax.paper.targets import Row, Target

Runs = Sequence[dict[str, Any]]


def of_row(runs: Runs, row: Row) -> list[dict[str, Any]]:
    """The runs of a row, by seed."""
    found = [run for run in runs if (run["experiment"], run["row"]) == _experiment(row)]
    return sorted(found, key=lambda run: run["seed"])


def _experiment(row: Row) -> tuple[str, str]:
    return row.config or row.weights or row.name, row.name


def as_the_paper(target: Target, runs: Runs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A target's runs with its own configs, and those with changed ones."""
    experiments = [_experiment(row) for row in target.rows]
    fit = [
        run
        for run in runs
        if (run["experiment"], run["row"]) in experiments
        and run["protocol"] == target.protocol
        and set(target.columns) <= set(run["error"])
    ]
    return [run for run in fit if not run["changed"]], [run for run in fit if run["changed"]]


def summary(errors: Sequence[float], paper: float | None) -> dict[str, Any]:
    """Mean, standard deviation (n - 1), difference from the paper's, and whether that is close.

    Args:
      errors: of the seeds, in percent.
      paper: the paper's number, if it has one.

    Returns:
      `n`, `mean`, `std` (None for one run), `difference`, and `inside`: whether the paper's number
      is within our mean ± 2 standard deviations (None if either is unknown).
    """
    mean = statistics.mean(errors)
    std = statistics.stdev(errors) if len(errors) > 1 else None
    difference = None if paper is None else mean - paper
    inside = None if difference is None or std is None else abs(difference) <= 2 * std
    return {
        "n": len(errors),
        "mean": mean,
        "std": std,
        "difference": difference,
        "inside": inside,
    }


def table(target: Target, runs: Runs) -> str:
    """The table as text of 80 columns, followed by the provenance of its numbers.

    Rehearsals, whose configs were changed, follow in separate tables.
    """
    own, changed = as_the_paper(target, runs)
    texts = [_table(target, own)] if own or not changed else []
    for settings in dict.fromkeys(tuple(run["changed"]) for run in changed):
        texts.append(_table(target, [run for run in changed if tuple(run["changed"]) == settings]))
    return "\n\n".join(texts)


def _table(target: Target, runs: Runs) -> str:
    sources = list(dict.fromkeys(_source(run) for run in runs))
    lines = [target.title]
    changed = ", ".join(dict.fromkeys(setting for run in runs for setting in run["changed"]))
    if changed:
        lines += textwrap.wrap(f"CHANGED: {changed}", 80, subsequent_indent="    ")
    lines.append("")
    head = f"{'':22}{'':6} {'paper':>6}  {'ours, mean ± std (n)':20} {'diff.':>6}"
    lines += [f"{head}  {'within':7} source", f"{'':65}2 std"]
    for row in target.rows:
        found = of_row(runs, row)
        for column in target.columns:
            name = row.name if column == target.columns[0] else ""
            lines.append(f"{name:22}{column:6} {_cells(row, found, column, sources)}".rstrip())
    below = [f"[{number}] {source}" for number, source in enumerate(sources, start=1)]
    below += [f"{row.name}, paper: {row.said}" for row in target.rows if row.said and row.config]
    for text in [*below, target.note]:
        lines += textwrap.wrap(text, 80, subsequent_indent="    " * text.startswith("["))
    return "\n".join(lines)


def _cells(row: Row, runs: Runs, column: str, sources: list[str]) -> str:
    paper = row.paper.get(column)
    printed = "-" if paper is None else f"{paper:.2f}"
    if not (row.config or row.members or row.weights):
        return f"{printed:>6}  {row.said}"
    if not runs:
        return f"{printed:>6}  {'not run':20} {'':6}  {'':7}"
    found = summary([run["error"][column] for run in runs], paper)
    spread = "" if found["std"] is None else f" ± {found['std']:.2f}"
    ours = f"{found['mean']:.2f}{spread} ({found['n']})"
    difference = "" if found["difference"] is None else f"{found['difference']:+.2f}"
    inside = {None: "", True: "yes", False: "no"}[found["inside"]]
    marks = sorted({sources.index(_source(run)) + 1 for run in runs})
    where = "".join(f"[{mark}]" for mark in marks)
    return f"{printed:>6}  {ours:20} {difference:>6}  {inside:7} {where}"


def _source(run: dict[str, Any]) -> str:
    versions = run["versions"]
    commit = run["commit"][:7] + "+" * run["commit"].endswith("+") or "no commit"
    return f"commit {commit}, {run['device']}, JAX {versions['jax']}, Flax {versions['flax']}"

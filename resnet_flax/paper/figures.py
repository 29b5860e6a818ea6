"""A target's figures, drawn from its results."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_flax.paper.table import Runs, as_the_paper, of_row
from resnet_flax.paper.targets import Target
from resnet_flax.runtime import storage


def draw(target: Target, runs: Runs, path: Path) -> bool:
    """Draws a target's figure from its results; returns False if there are none yet.

    Curves as in the paper's figures 1, 4 and 6, training dashed and test bold, one panel each for
    plain and residual networks; responses as in figure 7, in the order of the layers and sorted.

    Args:
      target: a table or figure.
      runs: of its rows; the first seed of each is drawn.
      path: of the PNG.
    """
    own, changed = as_the_paper(target, runs)
    wanted = {"curves": "curve", "responses": "responses"}.get(target.draws, "")
    some = own or [run for run in changed if run["changed"] == changed[-1]["changed"]]
    some = [run for run in some if run.get(wanted) and (wanted != "curve" or run[wanted]["test"])]
    found = [(row.name, seeds[0]) for row in target.rows if (seeds := of_row(some, row))]
    if not found or not target.draws:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    (_curves if target.draws == "curves" else _responses)(figure, found)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage.write(path, png.getvalue())
    return True


def _curves(figure: Any, found: Sequence[tuple[str, dict[str, Any]]]) -> None:
    kinds = {
        "plain networks": [one for one in found if one[0].startswith("plain")],
        "residual networks": [one for one in found if not one[0].startswith("plain")],
    }
    kinds = {title: ones for title, ones in kinds.items() if ones}
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    tests = [error for _, run in found for _, error in run["curve"]["test"]]
    for axes, (title, ones) in zip(panels, kinds.items(), strict=True):
        for number, (name, run) in enumerate(ones):
            color, curve = f"C{number}", run["curve"]
            axes.plot(*_xy(curve["train"]), "--", color=color, linewidth=1)
            label = f"{name}, {curve['test'][-1][1]:.2f} %"
            axes.plot(*_xy(curve["test"]), color=color, linewidth=2.2, label=label)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_xlim(0)
        axes.set_ylim(0, min(100, 1.05 * max(tests)))
    panels[0].set_ylabel("error (%), training dashed, test bold")


def _xy(points: Any) -> Any:
    return zip(*points, strict=True) if points else ([], [])


def _responses(figure: Any, found: Sequence[tuple[str, dict[str, Any]]]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, run) in enumerate(found):
        values = run["responses"]
        style = {"color": f"C{number}", "label": name, "linewidth": 1.5}
        style["linestyle"] = "--" if name.startswith("plain") else "-"
        # Networks of all depths span the same width.
        places = [i / max(1, len(values) - 1) for i in range(len(values))]
        left.plot(places, values, **style)
        right.plot(places, sorted(values, reverse=True), **style)
    left.set_title("in the order of the layers")
    right.set_title("sorted")
    left.set_ylabel("standard deviation of the response")
    for axes in (left, right):
        axes.set_xlabel("3x3 layers, first to last")
        axes.set_ylim(0)

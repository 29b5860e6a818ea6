"""A plot of a run's learning curves."""

import io
from pathlib import Path
from typing import Any

from resnet_flax.runtime import storage
from resnet_flax.training.writers import read_metrics


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Draws error over steps: training thin and dashed, evaluation bold, as in the paper.

    The loss is drawn in place of the error where a task has none.

    Args:
      metrics: a metrics.jsonl file.
      target: the PNG to write.
      title: of the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    has_error = all("error" in record for record in records)
    name, factor, unit = ("error", 100, " %") if has_error else ("loss", 1, "")
    # Not pyplot, which has global state and may choose a backend that needs a display.
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for split in dict.fromkeys(record["split"] for record in records):
        points = [record for record in records if record["split"] == split]
        steps = [point["step"] for point in points]
        values = [factor * point[name] for point in points]
        if split == "train":
            axes.plot(steps, values, "--", color="tab:blue", linewidth=1, label="train")
        else:
            label = f"{split}, {values[-1]:.2f}{unit} at the end"
            (line,) = axes.plot(steps, values, color="tab:red", linewidth=2, label=label)
            line.set(marker="o" if len(points) < 30 else "", markersize=4, clip_on=False)
    if has_error:
        _percent_axis(axes, max((100 * r["error"] for r in records), default=100.0))
    axes.set_xlim(0, max((r["step"] for r in records), default=1))
    axes.set_xlabel("step")
    axes.set_ylabel("error (%)" if has_error else "loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    storage.write(target, png.getvalue())


def _percent_axis(axes: Any, top: float) -> None:
    from matplotlib.ticker import FuncFormatter

    # Logarithmic down to 1 %, as late differences are much smaller than early errors; then linear.
    axes.set_yscale("symlog", linthresh=1, linscale=0.5)
    ticks = [t for t in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if t <= _next_tick(top)]
    axes.set_yticks(ticks, minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, ticks[-1])


def _next_tick(value: float) -> float:
    return next((tick for tick in (1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if tick >= value), 100.0)

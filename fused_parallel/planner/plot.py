"""The plots of a plan; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from pathlib import Path

from .result import Plan


def draw(plan: Plan, path: str | Path) -> None:
    """Write a figure: TPOT against throughput of the ranked plans with the frontier labelled, and the step by
    tensor-parallel degree as stacked bars. Raises ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting a plan needs matplotlib: pip install 'fused-parallel[plot]'") from error
    batches = sorted({row.batch for row in plan.wall})
    figure = Figure(figsize=(7 + 4 * len(batches), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(batches), width_ratios=[2] + [1] * len(batches))
    _frontier(axes[0], plan)
    for axis, batch in zip(axes[1:], batches, strict=True):
        _bars(axis, [row for row in plan.wall if row.batch == batch])
    figure.suptitle(f"{plan.model} on {plan.cluster} (predicted)")
    figure.savefig(path, dpi=120)


def _frontier(axis, plan: Plan) -> None:
    axis.scatter([c.tpot_ms for c in plan.entries], [c.tokens_per_s for c in plan.entries], s=12, color="#b0b0b0")
    front = sorted(plan.frontier, key=lambda c: c.tpot_ms)
    axis.plot([c.tpot_ms for c in front], [c.tokens_per_s for c in front], "o-", color="#1f77b4", markersize=4)
    labelled: list[float] = []
    for c in front:  # labels closer than this overlap
        if all(abs(math.log(c.tokens_per_s / at)) > 0.15 for at in labelled):
            labelled.append(c.tokens_per_s)
            axis.annotate(c.label, (c.tpot_ms, c.tokens_per_s), xytext=(4, -9), textcoords="offset points", fontsize=7)
    axis.set(yscale="log", xlabel="ms a token (TPOT)", ylabel="output tokens a second, all replicas")
    axis.margins(x=0.2)
    axis.set_title("frontier")
    axis.grid(True, which="both", alpha=0.2)


def _bars(axis, rows) -> None:
    names = [f"TP{row.tp}" + ("" if row.fits else "*") for row in rows]
    bottom = [0.0] * len(rows)
    for part, colour in (("compute", "#1f77b4"), ("communication", "#d62728"), ("host", "#7f7f7f")):
        values = [getattr(row, f"{part}_ms") for row in rows]
        axis.bar(names, values, bottom=bottom, label="compute and memory" if part == "compute" else part, color=colour)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(f"batch {rows[0].batch}")
    axis.set_ylabel("ms a step")
    axis.legend(fontsize=7)
    if not all(row.fits for row in rows):
        axis.set_xlabel("* does not fit without offload")

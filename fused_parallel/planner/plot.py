"""The pictures of plans and walls; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from pathlib import Path

from .layer_wall import LayerWall
from .result import Candidate, Plan
from .schedule import simulate

# What a step's time is made of, as it is coloured everywhere, and the shares of a Candidate in it.
PARTS = {
    "compute and memory": ("#4c78a8", ("weights", "compute", "kv")),
    "communication": ("#e45756", ("communication",)),
    "bubble": ("#f2cf5b", ("bubble",)),
    "host": ("#9d9da1", ("host",)),
    "drafting": ("#72b7b2", ("draft",)),
    "streaming": ("#b279a2", ("stream",)),
}
_APART = 0.055  # of the axes' lengths: points of the frontier that are closer than this share a number
_ROUNDS = 3  # of a timeline
_STAGES = 16  # more are no picture


def require_matplotlib() -> tuple[type, type]:
    """(Figure, the canvas that writes files). Raises ImportError that says what to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fused-parallel[plot]'") from error
    return Figure, FigureCanvasAgg


def _figure(size: tuple[float, float], title: str):
    figure_class, canvas = require_matplotlib()
    figure = figure_class(figsize=size, layout="constrained")
    canvas(figure)
    figure.suptitle(title, fontsize=12)
    return figure


def draw(plan: Plan, path: str | Path) -> None:
    """Write a figure of a plan: throughput against TPOT with the frontier labelled; the step of the best plan of each
    tensor-parallel degree by what it is spent on; the same without pipelines at the smallest and the largest batch (the
    wall); and the timeline of the best plan that has a pipeline, where there is one. Raises ImportError without
    matplotlib."""
    figure = _figure((14, 9), f"{plan.model} on {plan.cluster}, predicted, by {plan.rank}")
    piped = next((c for c in (*plan.entries, *plan.by_tp) if 1 < c.pp <= _STAGES), None)
    batches = sorted({row.batch for row in plan.wall})
    grid = figure.add_gridspec(2, 12, height_ratios=[1.15, 1])
    _frontier(figure.add_subplot(grid[0, :7]), plan)
    _by_tp(figure.add_subplot(grid[0, 7:]), plan)
    width = (6 if piped else 12) // len(batches)
    for i, batch in enumerate(batches):
        axis = figure.add_subplot(grid[1, i * width : (i + 1) * width])
        _wall(axis, [row for row in plan.wall if row.batch == batch])
    if piped:
        _timeline(figure.add_subplot(grid[1, 6:]), piped)
    figure.savefig(path, dpi=120)


def _frontier(axis, plan: Plan) -> None:
    front = sorted(plan.frontier, key=lambda c: c.tpot_ms)
    others = [c for c in plan.entries if c not in front]
    if others:
        points = [c.tpot_ms for c in others], [c.tokens_per_s for c in others]
        axis.scatter(*points, s=12, color="#c8c8c8", label="other ranked plans")
    axis.plot([c.tpot_ms for c in front], [c.tokens_per_s for c in front], "-", color="#4c78a8", linewidth=1)
    numbered = _apart([(c.tpot_ms, math.log(c.tokens_per_s)) for c in (*front, *others)], len(front))
    number = 0
    for i, c in enumerate(front):
        text = None
        if i in numbered:
            number += 1
            text = f"{number}  {c.label}"
            axis.annotate(
                str(number), (c.tpot_ms, c.tokens_per_s), ha="center", va="center", fontsize=7, color="white", zorder=5
            )
        size = 110 if i in numbered else 14
        axis.scatter([c.tpot_ms], [c.tokens_per_s], s=size, color="#4c78a8", zorder=4, label=text)
    axis.scatter(
        [plan.best.tpot_ms],
        [plan.best.tokens_per_s],
        s=230,
        facecolors="none",
        edgecolors="#e45756",
        linewidths=1.6,
        zorder=6,
        label=f"best by {plan.rank}: {plan.best.label}",
    )
    axis.set(yscale="log", xlabel="ms a token of each request (TPOT)", ylabel="output tokens/s, all replicas")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.set_title("frontier: no plan is better in both", fontsize=10)
    axis.margins(x=0.06, y=0.08)
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=7, loc="lower right", markerscale=0.5, framealpha=0.9)


def _apart(points: list[tuple[float, float]], count: int) -> set[int]:
    """Of the first `count` points those to number: the last one, the first, and what is not too close to them and to
    those before, in shares of the extent of all points."""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))

    def distance(a: tuple[float, float], b: tuple[float, float]) -> float:
        return math.hypot((a[0] - b[0]) / ((x1 - x0) or 1), (a[1] - b[1]) / ((y1 - y0) or 1))

    chosen = [count - 1]
    for i in range(count - 1):
        if all(distance(points[i], points[j]) >= _APART for j in chosen):
            chosen.append(i)
    return set(chosen)


def _stack(axis, names: list[str], heights: dict[str, list[float]]) -> None:
    """Stacked bars; parts that are nowhere more than nothing are left out of the legend."""
    bottom = [0.0] * len(names)
    places = range(len(names))
    for part, values in heights.items():
        if max(values, default=0.0) <= 0:
            continue
        axis.bar(places, values, bottom=bottom, label=part, color=PARTS[part][0], width=0.7)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    for x, top in zip(places, bottom, strict=True):
        axis.annotate(f"{top:.0f}" if top >= 100 else f"{top:.3g}", (x, top), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(list(places), names, fontsize=8 if len(names) <= 6 else 7)
    axis.set_xlim(min(-0.5, len(names) / 2 - 2), max(len(names) - 0.5, len(names) / 2 + 1))  # few bars stay bars
    axis.set_ylim(0, 1.25 * max(bottom))  # room for the figures; margins are none above a bar of nothing
    axis.grid(True, axis="y", alpha=0.2)


def _by_tp(axis, plan: Plan) -> None:
    rows = sorted(plan.by_tp, key=lambda c: c.tp)
    heights = {part: [c.tpot_ms * sum(c.shares[s] for s in of) for c in rows] for part, (_, of) in PARTS.items()}
    names = []
    for c in rows:
        extra = f"\nk={c.drafted}" if c.drafted else f"\n{c.resident:.0%} res." if c.resident < 1 else ""
        names.append(f"TP{c.tp}\nPP{c.pp}\nx{c.dp}\nb{c.batch}{extra}")
    _stack(axis, names, heights)
    axis.set_ylabel("ms a token")
    axis.set_title(f"best plan of each TP degree, by {plan.rank}", fontsize=10)
    axis.legend(fontsize=7)


def _wall(axis, rows) -> None:
    heights = {
        "compute and memory": [r.compute_ms for r in rows],
        "communication": [r.communication_ms for r in rows],
        "host": [r.host_ms for r in rows],
    }
    _stack(axis, [f"TP{r.tp}" + ("" if r.fits else "*") for r in rows], heights)
    axis.set_title(f"TP alone, batch {rows[0].batch}", fontsize=10)
    axis.set_ylabel("ms a step")
    axis.legend(fontsize=7)
    if not all(r.fits for r in rows):
        axis.set_xlabel("* does not fit without offload", fontsize=8)


def _timeline(axis, c: Candidate) -> None:
    """Micro-batches of a few decoding rounds passing the stages; the first round fills the pipeline."""
    schedule = simulate(c.stage_ms, c.hop_ms, c.microbatches, rounds=_ROUNDS, depends=True, record=True)
    colours = ["#4c78a8", "#f58518", "#54a24b", "#b279a2", "#72b7b2", "#9c755f", "#eeca3b", "#e45756"]
    for stage, micro, turn, start, end in schedule.events:
        colour = colours[micro % len(colours)]
        shade = 1.0 if turn % 2 == 0 else 0.6  # rounds are told apart
        axis.barh(stage, end - start, left=start, height=0.8, color=colour, alpha=shade, edgecolor="white")
        if c.microbatches * c.pp <= 32 and end - start > schedule.last / 40:
            axis.annotate(str(micro), ((start + end) / 2, stage), ha="center", va="center", fontsize=7, color="white")
    axis.set_yticks(range(c.pp), [f"stage {s} ({n} layers)" for s, n in enumerate(c.stages)], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, schedule.last)
    axis.set_xlabel(f"ms; numbers: micro-batches; shades: {_ROUNDS} rounds of a token each")
    axis.set_title(f"decoding in {c.label}: {c.shares['bubble']:.0%} bubble once it is full", fontsize=10)


def draw_wall(wall: LayerWall, path: str | Path) -> None:
    """Write a figure of a wall: a panel a batch, bars by degree, one of each backend side by side."""
    batches, backends = wall.batches, wall.backends
    columns = min(len(batches), 4)
    lines = math.ceil(len(batches) / columns)
    figure = _figure((max(6.0, 1.5 + 3.6 * columns), 0.8 + 3.6 * lines), f"{wall.title}: one layer")
    for i, batch in enumerate(batches):
        axis = figure.add_subplot(lines, columns, i + 1)
        rows = {b: wall.of(b, batch) for b in backends}
        degrees = [r.tp for r in rows[backends[0]]]
        width = 0.8 / len(backends)
        for j, (backend, found) in enumerate(rows.items()):
            at = [x + (j - (len(backends) - 1) / 2) * width for x in range(len(degrees))]
            hatch = "" if len(backends) == 1 or j else "//"
            style = dict(width=width * 0.95, hatch=hatch, edgecolor="white", linewidth=0.5)
            compute = [r.compute_us for r in found]
            axis.bar(at, compute, color=PARTS["compute and memory"][0], label=f"{backend}: compute and memory", **style)
            # What is measured as slightly less than nothing is nothing.
            talk = [max(0.0, r.communication_us) for r in found]
            colour = PARTS["communication"][0]
            axis.bar(at, talk, bottom=compute, color=colour, label=f"{backend}: communication", **style)
            for x, low, high in zip(at, compute, talk, strict=True):
                axis.annotate(f"{low + high:.0f}", (x, low + high), ha="center", va="bottom", fontsize=7)
        axis.set_xticks(range(len(degrees)), [f"TP{n}" for n in degrees])
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_ylim(0, 1.1 * max(max(r.us, r.compute_us) for found in rows.values() for r in found))
        axis.grid(True, axis="y", alpha=0.2)
        if i % columns == 0:
            axis.set_ylabel("µs a layer")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    figure.savefig(path, dpi=120)

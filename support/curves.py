"""runs/NAME/curves.png: what metrics.jsonl holds, drawn; and the same of several runs, one over the
other."""
import re
from pathlib import Path

from support.mistakes import Mistake
from support.runs import read_log

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = {   # title → names of metrics.jsonl (EVAL: of its evaluations), with the label of each
    "rewards": {"r(o)": "r(o)", "r(y)": "r(y)", "o/accuracy": "accuracy of o",
                "o/answer_format": "format of o", "o/thinks": "thinking of o"},
    "advantage of y, shares of groups": {"advantage_y": "Â_y", "smoothed": "smoothed", "tied": "tied"},
    "the two terms of Eq. 9": {"rlvr_weight": "RLVR", "sft_weight": "SFT (y)"},
    "entropy": {"entropy": "entropy, nats"},
    "log π(y), y trained on": {"logp_y": "log π(y)"},
    "tokens of a rollout": {"length": "tokens"},
    "evaluations": {"EVAL N-acc": "N-acc", "EVAL T-acc": "T-acc", "EVAL boxes": "boxes, present",
                    "EVAL thinks, present": "thinks, present", "EVAL thinks, absent": "thinks, absent",
                    "EVAL answers": "short answers"},
}

# What metrics.jsonl holds besides and is not drawn. Any other name is new, of an edit, and gets a
# panel of its own.
UNDRAWN = re.compile("step|loss|lr|grad_norm|skipped|seconds.*|.*_per_s|peak_memory_gb|unreadable|truncated|left_out|"
                     "logp_gap|clipped_(rollouts|y)|errors/.*|y/.*|EVAL .*|"
                     "(rollouts|y)/(thinking|answer_format|accuracy|non_repeat)")


def read_metrics(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Returns name → (steps, values) of a run's metrics.jsonl; those of evaluations as "EVAL name".
    Raises Mistake if it is no run."""
    if not (Path(run) / "metrics.jsonl").exists():
        raise Mistake(f"{run} is no run of train.py: it has no metrics.jsonl")
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in read_log(Path(run))[0]:
        values = {f"EVAL {k}": v for k, v in line["eval"].items()} if "eval" in line else line
        for name, value in values.items():
            if isinstance(value, (int, float)):
                steps, seen = series.setdefault(name, ([], []))
                steps.append(line["step"])
                seen.append(value)
    return series


def smooth_line(values: list[float], width: int = 8) -> list[float]:
    """Returns each value's mean with up to `width` on either side, as many before as after it, so
    that nothing lags behind."""
    means = []
    for i in range(len(values)):
        half = min(width, i, len(values) - 1 - i)
        means.append(sum(values[i - half:i + half + 1]) / (2 * half + 1))
    return means


def draw_curves(runs: list[Path], path: Path) -> None:
    """Draws one run: a colour and a marker a quantity. Several: a colour a run, named once above
    all; a line style and a marker a quantity, named beside its panel. Panels without numbers are
    left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    series = {Path(run).name: read_metrics(run) for run in runs}
    panels = {title: names for title, names in PANELS.items() if any(n in s for s in series.values() for n in names)}
    drawn = {name for names in PANELS.values() for name in names}
    panels |= {name: {name: name} for s in series.values() for name in s
               if name not in drawn and not UNDRAWN.fullmatch(name)}
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(6.4 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    several = len(runs) > 1
    for at, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, at + 1, title=title, xlabel="step")
        shown = [name for name in names if any(name in metrics for metrics in series.values())]
        looks = {name: {"linestyle": ("-", "--", ":", "-.")[k % 4] if several else "-", "marker": "osD^vX"[k % 6]}
                 for k, name in enumerate(shown)}
        for r, metrics in enumerate(series.values()):
            for k, name in enumerate(name for name in shown if name in metrics):
                steps, values = metrics[name]
                colour = COLOURS[(r if several else k) % len(COLOURS)]
                if name.startswith("EVAL"):     # a little beside each other: points of the same value stay visible
                    aside = (r if several else k) * 0.006 * max(1, steps[-1])
                    axes.plot([step + aside for step in steps], values, color=colour, markersize=5, **looks[name])
                else:                   # few markers, not at the same steps: lines at one height stay visible
                    every = max(1, len(steps) // 6)
                    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
                    axes.plot(steps, smooth_line(values), color=colour, markersize=4,
                              markevery=(k * every // max(1, len(shown)), every), **looks[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        entries = [Line2D([], [], color="black" if several else COLOURS[k % len(COLOURS)], label=names[name],
                          **looks[name]) for k, name in enumerate(shown)]
        axes.legend(handles=entries, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    if several:
        figure.legend(handles=[Line2D([], [], color=COLOURS[r % len(COLOURS)], linewidth=3, label=run)
                               for r, run in enumerate(series)], loc="outside upper center", ncols=min(4, len(runs)))
    figure.savefig(path, dpi=100)

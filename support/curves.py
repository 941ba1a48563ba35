"""runs/NAME/curves.png: what metrics.jsonl holds, drawn; and the same of several runs, one over the
other."""
import contextlib
import re
from pathlib import Path

from support.files import read_record
from support.mistakes import Mistake
from support.runs import comparable, read_log
from support.screen import one_line

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Title → names of metrics.jsonl (EVAL: of its evaluations), with the label of each. The first one
# is drawn over the whole width.
PANELS = {
    "evaluations": {"EVAL N-acc": "N-acc: absent things answered by []",
                    "EVAL T-acc": "T-acc: present things not rejected",
                    "EVAL boxes": "boxes: present things found, IoU > 0.5",
                    "EVAL thinks, present": "thinks, present: reasons before it answers",
                    "EVAL thinks, absent": "thinks, absent: the same, of absent things",
                    "EVAL answers": "answers: score of questions without boxes"},
    "rewards": {"r(o)": "r(o): a rollout", "r(y)": "r(y): the label",
                "o/accuracy": "o/accuracy: its points", "o/answer_format": "o/answer_format",
                "o/thinks": "o/thinks"},
    "advantage of y, shares of groups": {
        "advantage_y": "advantage_y",
        "smoothed": "smoothed: groups in which\na rollout is as good as y",
        "tied": "tied: groups in which\nall answers earn the same"},
    "the two terms of Eq. 9": {"rlvr_weight": "RLVR (o)", "sft_weight": "SFT (y)"},
    "entropy, nats": {"entropy": "entropy: rollouts", "entropy_y": "entropy_y: y, with sft"},
    "log π(y), y trained on": {"logp_y": "log π(y)"},
    "tokens of a rollout": {"length": "tokens"},
}

# What metrics.jsonl holds besides and is not drawn. Any other name is new, of an edit, and gets a
# panel of its own.
UNDRAWN = re.compile("step|loss|lr|grad_norm|skipped|seconds.*|.*_per_s|peak_memory_gb|unreadable|truncated|left_out|"
                     "accuracy|logp_gap(_max)?|kl_sampler|clipped_(rollouts|y)|errors/.*|EVAL .*|"
                     "[oy]/(thinks|answer_format|accuracy|non_repeat)")


def title(run: Path) -> str:
    """Returns a run's name and, as far as its config.json says, its method and commit."""
    with contextlib.suppress(Mistake):
        record = read_record(Path(run) / "config.json", config=dict, versions=dict)
        method, commit = record["config"].get("method"), record["versions"].get("commit")
        return one_line(f"{Path(run).name}: {method}, commit {commit}")
    return one_line(Path(run).name)


def read_metrics(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Returns name → (steps, values) of a run's metrics.jsonl; those of evaluations as "EVAL name".
    Raises Mistake if it is no run."""
    if not (Path(run) / "metrics.jsonl").exists():
        raise Mistake(f"{run} is no run of train.py: it has no metrics.jsonl")
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in comparable(read_log(Path(run))[0]):
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
    """Draws `figure_of` the runs."""
    figure_of(runs).savefig(path, dpi=100)


def figure_of(runs: list[Path]):
    """Returns the curves. One run: a colour and a marker a quantity. Several: a colour a run, named
    once above all; a line style and a marker a quantity, named beside its panel. Panels without
    numbers are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    series = {Path(run): read_metrics(run) for run in runs}
    panels = {name: names for name, names in PANELS.items()
              if any(n in metrics for metrics in series.values() for n in names)}
    drawn = {name for names in PANELS.values() for name in names}
    panels |= {name: {name: name} for s in series.values() for name in s
               if name not in drawn and not UNDRAWN.fullmatch(name)}
    wide = "evaluations" in panels or len(panels) == 1
    rows = max(1, -(-(len(panels) + wide) // 2))
    figure = Figure(figsize=(12.8, 0.6 + 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, 2)
    several = len(runs) > 1
    last = max([1, *(steps[-1] for metrics in series.values() for steps, _ in metrics.values())])
    for at, (name, names) in enumerate(panels.items()):
        cell = grid[0, :] if wide and not at else grid[divmod(at + wide, 2)]
        axes = figure.add_subplot(cell, title=name, xlabel="step")
        shown = [name for name in names if any(name in metrics for metrics in series.values())]
        looks = {name: {"linestyle": ("-", "--", ":", "-.")[k % 4] if several else "-", "marker": "osD^vX"[k % 6]}
                 for k, name in enumerate(shown)}
        for r, metrics in enumerate(series.values()):
            for k, name in enumerate(name for name in shown if name in metrics):
                steps, values = metrics[name]
                colour = COLOURS[(r if several else k) % len(COLOURS)]
                if name.startswith("EVAL"):     # a little beside each other: points of the same value stay visible
                    place, places = (r, len(runs)) if several else (k, len(shown))
                    aside = (place - (places - 1) / 2) * 0.003 * last
                    axes.plot([step + aside for step in steps], values, color=colour, markersize=5, **looks[name])
                else:                   # few markers, not at the same steps: lines at one height stay visible
                    every = max(1, len(steps) // 6)
                    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
                    axes.plot(steps, smooth_line(values), color=colour, markersize=4,
                              markevery=(k * every // max(1, len(shown)), every), **looks[name])
        axes.set_xlim(-0.03 * last, 1.03 * last)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        low, high = axes.dataLim.intervaly
        if low >= 0:                    # none of it can be negative: no axis that could
            high = 1 if name == "evaluations" or not high else high
            axes.set_ylim(-0.03 * high if low < 0.5 * high else None, 1.03 * high)
        axes.grid(alpha=0.3)
        entries = [Line2D([], [], color="black" if several else COLOURS[k % len(COLOURS)], label=names[name],
                          **looks[name]) for k, name in enumerate(shown)]
        axes.legend(handles=entries, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    titles = [title(run).replace("$", r"\$") for run in series]       # no formulas
    if several:
        entries = [Line2D([], [], color=COLOURS[r % len(COLOURS)], linewidth=3, label=text)
                   for r, text in enumerate(titles)]
        figure.legend(handles=entries, loc="outside upper center", ncols=2)
    else:
        figure.suptitle(titles[0])
    figure.supxlabel("Pale lines: every step. Bold lines: the mean with up to 8 steps on each side.",
                     fontsize=9)
    return figure

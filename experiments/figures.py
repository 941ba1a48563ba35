"""The figures of the PAGES and of docs/rivals.md, from results alone:
`python experiments/reproduce.py tables`. All are at most 10 inches wide, so that a page that shows
them in 900 pixels leaves their text large enough to read."""
import statistics
import types
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import objective
from support.curves import COLOURS

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))


def blank(width: float, height: float, columns: int, rows: int = 1,
          **options) -> tuple[Figure, list]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def finish(figure: Figure, panel, path: Path, x: str, y: str = "") -> None:
    """Labels, grid and legend of a figure of one panel; writes it."""
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path)


def look(number: int) -> dict:
    """Colour and marker of the number-th line: no two alike among the first 49."""
    return {"color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]}


def draw_points(rows: dict[str, dict[int, dict]], columns: dict, bar, path: Path) -> None:
    """A panel a column: of every method each seed's value as a dot, and mean and 95 % interval as a
    bar. bar(values): the two, or None where the seeds stand for themselves."""
    deep = -(-len(columns) // 5)                                   # panels below each other
    wide = -(-len(columns) // deep)
    figure, panels = blank(10, deep * (0.7 + 0.24 * len(rows)), wide, deep, sharey=True)
    names = list(rows)
    for panel, (title, column) in zip(panels, columns.items()):
        for height, name in enumerate(names):
            values = [value for seed in rows[name].values() if (value := column(seed)) is not None]
            colour = COLOURS[1] if name.startswith("visurf") else COLOURS[0]
            panel.plot(values, [height] * len(values), "o", color=colour, alpha=0.45, markersize=4,
                       markeredgewidth=0)
            if values and (mean_and_half := bar(values)):
                mean, half = mean_and_half
                panel.errorbar([mean], [height], xerr=[half] if half == half else None, fmt="|",
                               color=colour, capsize=3, markersize=9)
        panel.set_title(title, fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(labelsize=8)
    for spare in panels[len(columns):]:
        spare.set_axis_off()
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path)


def draw_course(rows: dict[str, dict[int, dict]], names: dict[str, str], path: Path) -> None:
    """A panel a quantity: the mean over the seeds, in steps, a line a method. names: of the course
    → title."""
    figure, panels = blank(10, 4.6, 4, rows=-(-len(names) // 4))
    for spare in panels[len(names):]:
        spare.set_axis_off()
    for number, (method, seeds) in enumerate(rows.items()):
        style = look(number) | {"linestyle": STYLES[number % len(STYLES)], "markersize": 3.5,
                                "markevery": (number % 5, 5), "linewidth": 1.2}
        for panel, name in zip(panels, names):
            points = list(zip(*(seed["course"].get(name, []) for seed in seeds.values())))
            means = [statistics.fmean(p) if None not in p else float("nan") for p in points]
            panel.plot([20 * i + 10 for i in range(len(means))], means, label=method, **style)
    for panel, title in zip(panels, names.values()):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower right", fontsize=8)
    figure.savefig(path)


def draw_lengths(rows: dict[str, dict[int, dict]], interval, columns: dict, path: Path) -> None:
    """SFT for n of 400 steps, then RLVR: the metrics over n, and ViSurf's mean as a line of the
    same colour."""
    figure, [panel] = blank(4.6, 3.0, 1)
    ends = {"rlvr": 0, "sft": 400}
    lengths = {name: ends[name] if name in ends else int(name.split("-")[0].removeprefix("sft"))
               for name in rows if name != "visurf"}
    for number, (title, column) in enumerate(columns.items()):
        points = sorted((n, *interval([column(seed) for seed in rows[name].values()]))
                        for name, n in lengths.items())
        steps, means, halves = zip(*points)
        panel.errorbar(range(len(steps)), means, [h if h == h else 0 for h in halves], label=title,
                       capsize=3, linestyle=STYLES[number], **look(number))
        if "visurf" in rows:
            panel.axhline(statistics.fmean(map(column, rows["visurf"].values())),
                          color=COLOURS[number], linestyle=STYLES[number], linewidth=0.8, alpha=0.6)
    panel.set_xticks(range(len(steps)), [f"{n}" for n in steps])
    finish(figure, panel, path, "steps of SFT, of 400; the rest is RLVR. Thin lines: ViSurf")


def draw_cost(times: dict[str, float], rows: dict[str, dict[int, dict]], interval, score,
              path: Path) -> None:
    """The score of each method on the test split over the time of its training, in trainings of
    RLVR."""
    figure, [panel] = blank(8, 3.6, 1)
    for number, name in enumerate(name for name in rows if name in times):
        mean, half = interval([score(seed) for seed in rows[name].values()])
        panel.errorbar([times[name]], [mean], [half] if half == half else None, label=name,
                       capsize=3, linestyle="", markersize=6, **look(number))
    finish(figure, panel, path, "time of a training; RLVR = 1", "(N-acc + boxes) / 2")


def draw_boundary(rows: dict[str, dict[int, dict]], bases: tuple[str, ...], columns: dict,
                  path: Path) -> None:
    """A panel a column: of each method every seed's value as a dot, the methods side by side, over
    the bases in the order of the rows: `BASE-METHOD`, and METHOD from assets/tiny. The bases have
    no order in between, so no line joins them."""
    figure, panels = blank(10, 3.4, len(columns), sharey=True)
    places: list[str] = []
    points: dict[str, list[tuple[int, dict]]] = {}
    for name, seeds in rows.items():
        base, _, method = name.partition("-")
        if base not in bases:
            base, method = "tiny", name
        if base not in places:
            places.append(base)
        points.setdefault(method, []).append((places.index(base), seeds))
    for panel, (title, column) in zip(panels, columns.items()):
        for number, (method, of_method) in enumerate(points.items()):
            aside = (number - (len(points) - 1) / 2) * 0.18
            dots = [(at + aside, column(seed)) for at, seeds in of_method
                    for seed in seeds.values()]
            panel.plot(*zip(*dots), label=method, linestyle="", alpha=0.7, markersize=5,
                       markeredgewidth=0, **look(number))
        panel.set_title(title, fontsize=9)
        panel.grid(axis="y", alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.set_xticks(range(len(places)), places, rotation=40)
        for between in range(1, len(places)):
            panel.axvline(between - 0.5, color="black", linewidth=0.4, alpha=0.2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(points), fontsize=8)
    figure.savefig(path)


def draw_weights(path: Path) -> None:
    """The weight of ∇log π of a token of y, over its probability p, in the failed group of
    `python objective.py`."""
    figure, [panel] = blank(5.2, 3.2, 1)
    logit = torch.linspace(-7, 7, 141, dtype=torch.float64)
    r = torch.tensor([6.0, 4.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    for number, (method, label) in enumerate({
            "visurf": "ViSurf, S-GRPO", "sft": "SFT, HPT", "luffy": "LUFFY",
            "sum": "SFT + RLVR, λ = 0.1", "chord": "CHORD-φ, μ = 0.1"}.items()):
        record = objective.METHODS[method]
        cfg = types.SimpleNamespace(std="sample")
        weight = record.advantages(cfg, r)[:1]
        if record.token_of_y:
            _, weight = record.token_of_y(torch.nn.functional.logsigmoid(logit), weight)
        panel.plot(logit, weight.expand_as(logit), label=label, linestyle=STYLES[number],
                   markevery=(5 * number, 28), markersize=5, **look(number))
    panel.set_yscale("log")
    panel.set_ylim(1e-4, 5)
    shown = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    panel.set_xticks(torch.logit(shown).tolist(), [f"{p:g}" for p in shown.tolist()])
    finish(figure, panel, path, "p, probability of a token of y", "weight of its ∇log π")

"""Several runs beside each other: their curves in one picture, their last evaluations in one table.

    python experiments/compare.py runs/A runs/B … [--out compare.png]
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.curves import draw_curves, read_metrics  # noqa: E402
from support.log import metric_text  # noqa: E402
from support.mistakes import Mistake, run_main  # noqa: E402


def evaluated_on(run: Path) -> str:
    """Names the examples of a run's evaluations; runs of others are not to be compared."""
    config = json.loads((run / "config.json").read_text())["config"] if (run / "config.json").exists() else {}
    return f"the first {config.get('eval_examples')} of {config.get('eval_data')}"


def names_of(runs: list[Path]) -> dict[Path, str]:
    """Names each run by its folder's name, or by the whole path where several have the same."""
    names = [run.name for run in runs]
    return {run: run.name if names.count(run.name) == 1 else str(run) for run in runs}


def compare(runs: list[Path]) -> str:
    """Returns a table with one column a run: steps, seconds of all steps, and every metric of the
    last evaluation that a run has."""
    series = {name: read_metrics(run) for run, name in names_of(runs).items()}
    rows: dict[str, dict[str, str]] = {}
    for name, metrics in series.items():
        if "step" in metrics:
            rows.setdefault("steps", {})[name] = str(metrics["step"][0][-1])
        if "seconds" in metrics:
            rows.setdefault("seconds", {})[name] = f"{sum(metrics['seconds'][1]):.0f}"
    for name, metrics in series.items():
        last = max((steps[-1] for metric, (steps, _) in metrics.items() if metric.startswith("EVAL ")), default=0)
        for metric, (steps, values) in metrics.items():
            if metric.startswith("EVAL ") and steps[-1] == last:
                metric = metric.removeprefix("EVAL ")
                rows.setdefault(metric, {})[name] = metric_text(metric, values[-1])
    widths = {name: max(len(name), 8) for name in series}
    lines = [" " * 24 + "  ".join(f"{name:>{w}}" for name, w in widths.items())]
    lines += [f"{metric:<24}" + "  ".join(f"{row.get(name, '–'):>{w}}" for name, w in widths.items())
              for metric, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", default="compare.png", help="the picture")
    args = parser.parse_args()
    if Path(args.out).suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise Mistake(f"--out {args.out}: give a picture's file, such as compare.png")
    print(compare(args.runs))
    examples = {name: evaluated_on(run) for run, name in names_of(args.runs).items()}
    if len(set(examples.values())) > 1:
        print("not the same examples were evaluated: " + "; ".join(f"{run}: {what}" for run, what in examples.items()))
    draw_curves(args.runs, Path(args.out))
    print(f"curves: {args.out}")


if __name__ == "__main__":
    run_main(main)

"""Writes report.html: what came of a run or of an evaluation, on one page that needs nothing else.
Its pictures are inside it, it has no script, and all text of data and models is escaped."""
import base64
import dataclasses
from html import escape
from pathlib import Path

from support.curves import PANELS, title
from support.files import replace_file
from support.log import metric_text
from support.runs import comparable, read_log
from support.screen import clean

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{heading}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 1280px; margin: 1em auto; padding: 0 1em }}
h1 {{ font-size: 1.4em; overflow-wrap: anywhere }} h2 {{ font-size: 1.15em; margin-top: 1.6em }}
figure:has(:checked) {{ flex-basis: 100% }} .scroll {{ overflow-x: auto }}
th, td {{ padding: .15em .8em .15em 0; border-bottom: 1px solid #ddd; text-align: left }}
.numbers * {{ white-space: nowrap }} .numbers :is(th, td) + * {{ text-align: right }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 1em }} figcaption {{ color: #666 }}
figure {{ flex: 1 1 440px; margin: 0; overflow-x: auto }} input {{ position: absolute; opacity: 0 }}
img {{ max-width: 100% }} :checked + img {{ max-width: none }} table {{ border-collapse: collapse }}
</style><h1>{heading}</h1>
{parts}
"""


def of_others(value) -> str:
    """Returns text of data, models or options, of which HTML makes nothing but text."""
    return escape(clean(str(value)))


def table(head: tuple, lines: list, kind: str = "", folded: str = "") -> str:
    """Returns a table, if it has lines; with a name to unfold it by, if it is folded away."""
    rows = [[f"<{mark}>{of_others(cell)}</{mark}>" for cell in line]
            for mark, line in (("th", head), *(("td", line) for line in lines))]
    text = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    text = f'<div class="scroll"><table class="{kind}">{text}</table></div>' * bool(lines)
    if folded and lines:
        text = f"<details><summary>{folded} ({len(lines)})</summary>{text}</details>"
    return text


def options(cfg) -> str:
    """Returns the options, a dataclass, as tables: those that differ from the defaults first."""
    lines = [(f.name, getattr(cfg, f.name), f.default) for f in dataclasses.fields(cfg)]
    same = [(name, value) for name, value, default in lines if value == default]
    changed = table(("option", "value", "default"), [line for line in lines if line[1] != line[2]])
    return f"<h2>Options</h2>{changed}{table(('option', 'value'), same, folded='as by default')}"


def pictures(name: str, files: dict[str, Path]) -> str:
    """Returns the pictures of {caption: file}, side by side where there is room."""
    figures = [f'<figure><label><input type="checkbox"><img alt="{caption}" src="data:image/png;'
               f'base64,{base64.b64encode(file.read_bytes()).decode()}"></label><figcaption>'
               f"{caption}; a click shows it in full size</figcaption></figure>"
               for caption, file in files.items() if file.exists()]
    return f'<h2>{name}</h2><div class="pictures">{"".join(figures)}</div>' * bool(figures)


def evaluations(columns: dict[str, dict], first: list[str]) -> str:
    """Returns {title: metrics} as tables, a metric a line: those named first, and the others."""
    lines = {name: [name, *(metric_text(name, m.get(name)) for m in columns.values())]
             for known in columns.values() for name, value in known.items() if value is not None}
    chosen = [lines.pop(name) for name in first if name in lines]
    return ("<h2>Evaluations</h2>" * bool(columns) + table(("", *columns), chosen, "numbers")
            + table(("", *columns), [*lines.values()], "numbers", "other metrics"))


def write(path: Path, heading: str, *parts: str) -> None:
    page = PAGE.format(heading=of_others(heading), parts="\n".join(parts))
    replace_file(path, page.encode("ascii", "xmlcharrefreplace").decode())


def write_run(run: Path, cfg) -> None:
    """Writes runs/NAME/report.html. cfg: the options of train.py."""
    lines = comparable(read_log(run)[0])
    evaluated = {line["step"]: line["eval"] for line in lines if "eval" in line}
    sheets = {f"answers at step {step}": run / f"samples/step_{step}.png"
              for step in [*evaluated][:1] + [*evaluated][-1:]}
    step = max((line["step"] for line in lines), default=0)
    write(run / "report.html", f"{title(run)}, step {step} of {cfg.steps}", options(cfg),
          pictures("Curves", {"curves.png": run / "curves.png"}),
          pictures("Answers, before and after", sheets),
          evaluations({f"step {step}": metrics for step, metrics in evaluated.items()},
                      [name.removeprefix("EVAL ") for name in PANELS["evaluations"]]))

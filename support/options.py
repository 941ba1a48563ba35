"""Command lines of a dataclass: one flag a field, grouped, with the defaults of a preset or of a run that goes on."""
import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from support.mistakes import Mistake


def option(default, group: str, text: str, choices: tuple = (), least=None, most=None, above=None):
    """A field of the options: its default, the group and line of --help that it stands in, what it may be. Numbers must
    be finite."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "choices": choices or None,
                                                        "least": least, "most": most, "above": above})


def check_numbers(options) -> None:
    """Mistake: a number that is not finite or not within the limits of its option, by its flag."""
    for f in dataclasses.fields(options):
        value, limits = getattr(options, f.name), f.metadata
        if f.type not in (int, float):
            continue
        rules = ((math.isfinite(value), "a finite number"),
                 (limits["least"] is None or value >= limits["least"], f"at least {limits['least']}"),
                 (limits["most"] is None or value <= limits["most"], f"at most {limits['most']}"),
                 (limits["above"] is None or value > limits["above"], f"above {limits['above']}"))
        for kept, rule in rules:
            if not kept:
                raise Mistake(f"--{f.name.replace('_', '-')} {value}: must be {rule}")


def parse(kind: type, presets: dict[str, dict], resumable: tuple[str, ...], renamed, description: str,
          arguments: list[str] | None = None):
    """Flags → a `kind`. Defaults are those of --preset or, with --resume RUN, the options saved there, which
    `renamed(saved)` brings to today's names; then only the `resumable` ones can be given another value. Unknown flags
    are errors. --help shows the defaults that then hold."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--resume")
    try:
        chosen, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError:       # a flag without its value: said below, with all others known
        chosen = argparse.Namespace(preset=None, resume=None)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)} | presets.get(chosen.preset, {})
    if chosen.resume:
        path = Path(chosen.resume) / "config.json"
        if not path.exists():
            raise Mistake(f"--resume {chosen.resume}: there is no {path}")
        defaults |= renamed(json.loads(path.read_text())["config"])
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     usage="torchrun train.py [--OPTION VALUE …]", add_help=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda text: refuse(text, parser, arguments)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in dataclasses.fields(kind):
        group = f.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group) if group not in groups else groups[group])
        default = defaults[f.name]
        shown = ("yes" if default else "no") if f.type is bool else repr(default) if default == "" else default
        settings = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"], "metavar": None if f.metadata["choices"] else "VALUE"}
        groups[group].add_argument("--" + f.name.replace("_", "-"),
                                   help=f"{f.metadata['help']} (default: {shown})".replace("%", "%%"), **settings)
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    given = vars(parser.parse_args(arguments))
    changed = [name for name in given if chosen.resume and name not in resumable and given[name] != defaults[name]]
    if changed:
        flags = " ".join(f"--{name.replace('_', '-')} {given[name]}" for name in changed)
        raise Mistake(f"--resume goes on with the run as it was; {flags} would make another run of it. To start that "
                      f"one from its weights: torchrun train.py --model {chosen.resume} {flags}")
    options = kind(**{**defaults, **given})
    check_numbers(options)
    return options


def refuse(text: str, parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """argparse's sentence, and for an unknown flag the nearest known one."""
    import difflib
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = [f"{flag}: did you mean {match}?" for flag in arguments if flag.startswith("--") and flag.split("=")[0]
            not in known for match in difflib.get_close_matches(flag.split("=")[0], known, 1)]
    raise Mistake(" ".join([text, *near, "(--help lists all options)"]))

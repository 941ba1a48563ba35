"""Command lines of a dataclass: one flag a field, grouped, with the defaults of a preset or of a run that goes on."""
import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import NoReturn

from support.mistakes import Mistake


def option(default, group: str, text: str, choices: tuple = (), least=None, most=None, above=None):
    """A field of the options: its default, the group and line of --help that it stands in, what it may be. Numbers must
    be finite. A default of "" or None, or of a switch, is not shown: the text says what happens without the
    option."""
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


def parse(kind: type, script: str, description: str, arguments: list[str] | None = None,
          presets: dict[str, dict] | None = None, resumable: tuple[str, ...] = (), saved_options=None):
    """Flags → a `kind`. Unknown flags are errors. --help shows the defaults that hold with the flags beside it.

    presets: where `kind` has --preset and --resume. Defaults are then those of --preset or, with --resume RUN,
    saved_options(RUN); then only the `resumable` ones can be given another value."""
    arguments = sys.argv[1:] if arguments is None else arguments
    defaults, resume = {f.name: f.default for f in dataclasses.fields(kind)}, None
    if presets is not None:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--preset")
        first.add_argument("--resume")
        try:
            chosen, _ = first.parse_known_args(arguments)
        except argparse.ArgumentError:       # a flag without its value: reported below, with all others known
            chosen = argparse.Namespace(preset=None, resume=None)
        resume, defaults = chosen.resume, defaults | presets.get(chosen.preset, {})
        if resume:
            defaults |= saved_options(Path(resume))
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    usage=f"torchrun {script} [--OPTION VALUE …]", add_help=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.arguments = arguments
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(
        f.metadata["group"] for f in dataclasses.fields(kind))}
    for f in dataclasses.fields(kind):
        add_flag(groups[f.metadata["group"]], f, defaults[f.name])
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    given = vars(parser.parse_args(arguments))
    changed = [name for name in given if resume and name not in resumable and given[name] != defaults[name]]
    if changed:
        flags = " ".join(f"--{name.replace('_', '-')} {given[name]}" for name in changed)
        raise Mistake(f"--resume goes on with the run as it was; {flags} would make another run of it. To start that "
                      f"one from its weights: torchrun {script} --model {resume} {flags}")
    options = kind(**{**defaults, **given})
    check_numbers(options)
    return options


def add_flag(group, f: dataclasses.Field, default) -> None:
    """A flag with its line of --help. Of --X and --no-X that line names the one that changes something."""
    flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
    if f.type is bool:
        for name, value in ((flag, True), (flag.replace("--", "--no-", 1), False)):
            shown = text if value else f"switches off what is on by default: {text}"
            group.add_argument(name, dest=f.name, action="store_const", const=value,
                               help=shown if value != default else argparse.SUPPRESS)
        return
    choices = f.metadata["choices"]
    shown = "" if default in ("", None) else f" (default: {default})"
    metavar = "{" + ",".join(filter(None, choices)) + "}" if choices else "VALUE"
    group.add_argument(flag, type=f.type, choices=choices, metavar=metavar, help=text + shown)


class Parser(argparse.ArgumentParser):
    """Its errors are Mistakes: argparse's sentence, and for an unknown flag the one that is meant, of a name like it or
    explained by its words (--learning-rate: --lr, the learning rate)."""
    arguments: list[str]

    def error(self, message: str) -> NoReturn:
        import difflib
        known = {flag: action.help or "" for action in self._actions for flag in action.option_strings}
        near = []
        for flag in (argument.split("=")[0] for argument in self.arguments if argument.startswith("--")):
            if flag not in known:
                words = flag[2:].replace("-", " ")
                meant = [f for f, line in known.items() if words in line]
                meant = meant or difflib.get_close_matches(flag, known, 1, 0.7)
                near += [f"{flag}: did you mean {meant[0]}?"] if meant else []
        raise Mistake(" ".join([message, *near, "(--help lists all options)"]))

"""Command lines of a dataclass: one flag a field, grouped, with the defaults of a preset or of a
run that goes on."""
import argparse
import dataclasses
import difflib
import math
import sys
from pathlib import Path
from typing import NoReturn

from support.mistakes import Mistake

MOST = 2 ** 63 - 1      # of a whole number; PyTorch takes no larger seed
# What other trainers, or torchrun, call a choice or a flag → what it is here.
CHOICES = {"grpo": "rlvr (GRPO)", "fp16": "bfloat16", "bf16": "bfloat16"}
TORCHRUNS = "an option of torchrun stands before the script, as in torchrun --nproc-per-node 8 train.py"
FLAGS = {"--batch-size": "--prompts-per-step is the batch, --micro-rows and --sampling-batch what is computed at once",
         "--epochs": "--steps counts what is trained; an epoch is the rows of the data / --prompts-per-step",
         "--num-generations": "--rollouts is G", "--beta": "--kl is its weight", "--output-dir": "runs/NAME, by --name",
         "--bf16": "--precision bfloat16", "--nproc-per-node": TORCHRUNS, "--nnodes": TORCHRUNS,
         "--device": "a GPU is taken where there is one; CUDA_VISIBLE_DEVICES chooses, and empty it means the CPU",
         "--wandb": "metrics.jsonl holds every number, and curves.png shows them",
         "--tensorboard": "metrics.jsonl holds every number, and curves.png shows them"}


def option(default, group: str, text: str, choices: tuple = (), least=None, most=None, above=None,
           resumable: bool = False):
    """Returns a field of the options: its default, the group and line of --help that it stands in,
    what it may be, and whether a run that goes on may have another value. Numbers must be finite. A
    default of "" or None, or of a switch, is not shown: the text says what happens without the
    option."""
    return dataclasses.field(default=default, metadata={
        "group": group, "help": text, "choices": choices or None, "least": least, "most": most, "above": above,
        "resumable": resumable})


def fixed(options) -> dict:
    """Returns the options of a run, by name, that stay what they are when it goes on."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if not f.metadata["resumable"]}


def check_numbers(options) -> None:
    """Raises Mistake if a number is not finite or not within the limits of its option, by its
    flag."""
    for f in dataclasses.fields(options):
        value, limits = getattr(options, f.name), f.metadata
        if f.type not in (int, float):
            continue
        most = MOST if limits["most"] is None and f.type is int else limits["most"]
        rules = ((f.type is int or math.isfinite(value), "a finite number"),
                 (limits["least"] is None or value >= limits["least"], f"at least {limits['least']}"),
                 (most is None or value <= most, f"at most {most}"),
                 (limits["above"] is None or value > limits["above"], f"above {limits['above']}"))
        for kept, rule in rules:
            if not kept:
                raise Mistake(f"--{f.name.replace('_', '-')} {value}: must be {rule}")


def parse(kind: type, script: str, description: str, arguments: list[str] | None = None,
          presets: dict[str, dict] | None = None, saved_options=None):
    """Flags → a `kind`. Unknown flags are errors. --help shows the defaults that hold with the
    flags beside it.

    presets: where `kind` has --preset and --resume. Defaults are then those of --preset or, with
    --resume RUN, saved_options(RUN); then only options that are `resumable` can be given another
    value."""
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
            defaults |= (saved := saved_options(Path(resume)))
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    usage=f"torchrun {script} [--OPTION VALUE …]", add_help=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(
        f.metadata["group"] for f in dataclasses.fields(kind))}
    for f in dataclasses.fields(kind):
        add_flag(groups[f.metadata["group"]], f, defaults[f.name])
    parser.add_argument("-h", "--help", action="help", help="show this and leave")
    if resume:      # what a run was started with is read as if it stood on the command line
        types = {f.name: f.type for f in dataclasses.fields(kind)}
        parser.arguments = [as_flag(name, value) if types.get(name) is not bool or isinstance(value, bool)
                            else f"--{name}={value}" for name, value in saved.items()]
        try:
            defaults |= vars(parser.parse_args(parser.arguments))
            check_numbers(kind(**defaults))
        except Mistake as mistake:
            raise Mistake(f"{resume}: its config.json holds what is no option here: {mistake}") from None
    parser.arguments = arguments
    given = vars(parser.parse_args(arguments))
    may_change = {f.name for f in dataclasses.fields(kind) if f.metadata["resumable"]}
    changed = [name for name in given if resume and name not in may_change and given[name] != defaults[name]]
    if changed:
        flags = " ".join(as_flag(name, given[name]).replace("=", " ", 1) for name in changed)
        raise Mistake(f"--resume goes on with the run as it was; {flags} would make another run of it. To start that "
                      f"one from its weights: torchrun {script} --model {resume} {flags}")
    options = kind(**{**defaults, **given})
    check_numbers(options)
    return options


def as_flag(name: str, value) -> str:
    flag = "--" + "no-" * (value is False) + name.replace("_", "-")
    return flag if isinstance(value, bool) else f"{flag}={value}"


def add_flag(group, f: dataclasses.Field, default) -> None:
    """Adds a flag with its line of --help. Of --X and --no-X that line names the one that changes
    something."""
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
    """Its errors are Mistakes: argparse's sentence, and what was probably meant."""
    arguments: list[str]

    def error(self, message: str) -> NoReturn:
        actions = {flag: action for action in self._actions for flag in action.option_strings}
        hints = []
        for argument, following in zip(self.arguments, [*self.arguments[1:], "-"]):
            flag, _, value = argument.partition("=")
            action = actions.get(flag)
            if action is None:
                hints += self.unknown(flag, actions) if flag.startswith("--") else []
            elif action.nargs == 0 and (value or not following.startswith("-")):
                hints.append(f"{flag} takes no value; its opposite is "
                             + (flag.replace("--no-", "--") if flag.startswith("--no-") else f"--no-{flag[2:]}"))
            elif action.choices and (value or following) not in action.choices:
                known = CHOICES.get((value or following).lower())
                near = [known] if known else difflib.get_close_matches(value or following, action.choices, 1)
                hints += [f"did you mean {meant}?" for meant in near]
        raise Mistake(". ".join([message, *hints]) + " (--help lists all options)")

    def unknown(self, flag: str, actions: dict) -> list[str]:
        """Returns what to say of an unknown flag: what stands for it here, or else a flag with a
        similar name or explained by its words (--learning-rate: --lr, the learning rate)."""
        plain = flag.lower().replace("_", "-")
        for other in difflib.get_close_matches(plain, FLAGS, 1, 0.75) + [o for o in FLAGS if plain.endswith(o[1:])]:
            if not (here := FLAGS[other]).startswith("--") or here.split()[0] in actions:
                return [f"{flag}: {here}"]
        words = plain[2:].replace("-", " ")
        meant = [known for known, action in actions.items() if known == plain or words in (action.help or "")]
        meant = meant or difflib.get_close_matches(plain, actions, 1, 0.7)
        return [f"{flag}: did you mean {meant[0]}?"] if meant else []

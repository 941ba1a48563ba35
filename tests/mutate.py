"""Breaks the code in one place at a time and looks whether the tests notice. Not a part of the suite: it takes hours.

    python tests/mutate.py objective.py rollout.py --count 30 [--seed 1] [--jobs 2]
    python tests/mutate.py train.py --within pack update train_step

Mutants: an operator or a comparison becomes its neighbour, a condition its opposite, a number another, True False; a
statement is left out. Printed: each with its line, and how many died. A survivor is to be judged: equivalent, or a
test that is missing. Nothing in the repository is changed: each mutant is a copy in a temporary folder.
"""
import argparse
import ast
import copy
import itertools
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("test_train.py -k 'not (rank or resume or leaves_all or decoding or alone or slow_one or signal or edit"
         " or dry_run or sigterm or one_question)'")
TESTS = {        # file → the tests that look at it, as pytest is told, the quickest first
    "objective.py": ("test_objective.py",), "rewards.py": ("test_rewards.py",), "rollout.py": ("test_rollout.py",),
    "data.py": ("test_data.py", "test_sources.py"), "model.py": ("test_model.py", "test_rollout.py"),
    "eval.py": ("test_metrics.py", "test_eval.py"),
    "train.py": (QUICK, "test_train.py", "test_checkpoints.py", "test_mistakes.py"),
    "support/checkpoints.py": ("test_checkpoints.py", "test_train.py -k 'resume or leaves_all'"),
    "support/runs.py": ("test_mistakes.py", "test_checkpoints.py", "test_train.py -k 'resume or leaves_all'"),
    "support/sources.py": ("test_sources.py", "test_data.py"), "support/tables.py": ("test_sources.py",),
    "support/images.py": ("test_sources.py", "test_data.py"),
    "support/ranks.py": ("test_train.py",), "support/log.py": ("test_train.py", "test_pictures.py"),
    "support/optimizers.py": ("test_optimizers.py",), "support/boxes.py": ("test_metrics.py", "test_rewards.py", "test_data.py", "test_sources.py"),
    "support/cells.py": ("test_rewards.py", "test_sources.py"),
    **{f"support/{name}.py": ("test_rewards.py",) for name in ("answers", "math_answers", "verify_math")},
    **{f"support/{name}.py": ("test_rollout.py",) for name in ("draw", "graphs", "penalty")},
    "support/joined.py": ("test_joined.py",),
    "support/run.py": ("test_train.py", "test_checkpoints.py"), "support/probe.py": ("test_objective.py",), "support/scenes.py": ("test_data.py",),
    "support/folders.py": ("test_data.py",),
}
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
           ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
           ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def changes(node: ast.AST) -> list[tuple[ast.AST, str]]:
    """(part of the node, the text to put in its place) for each mutant of the node."""
    found = []

    def other(**fields) -> None:
        mutant = copy.copy(node)
        for name, value in fields.items():
            setattr(mutant, name, value)
        found.append((node, ast.unparse(mutant)))
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPPED:
        other(op=SWAPPED[type(node.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        other(ops=[SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        found.append((node.test, f"not ({ast.unparse(node.test)})"))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        other(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        other(value=node.value + 1)
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        found.append((node, "pass"))
    return found


def mutants(source: str, within: list[str]) -> list[tuple[int, str, str]]:
    """(line, what was there → what is, the mutant's source), in the order of the file, in the functions named `within`
    or, if none is named, everywhere. Text and types stay."""
    tree, lines = ast.parse(source), source.encode().splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]          # ast counts columns in bytes
    kept = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    kept += [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    skipped = {id(part) for root in kept if root for part in ast.walk(root)}
    roots = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in within]
    if len(roots) < len(within):
        raise SystemExit(f"of {', '.join(within)} there are only {', '.join(node.name for node in roots) or 'none'}")
    made = []
    for node in (node for root in roots or [tree] for node in ast.walk(root) if id(node) not in skipped):
        for part, text in changes(node):
            first = starts[part.lineno - 1] + part.col_offset
            last = starts[part.end_lineno - 1] + part.end_col_offset
            was = source.encode()[first:last].decode()
            mutant = source.encode()[:first].decode() + text + source.encode()[last:].decode()
            made.append((part.lineno, f"{was.splitlines()[0]}  →  {text.splitlines()[0]}", mutant))
    return sorted(made)


def survives(file: str, source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", "runs", "evaluations", "__pycache__"))
        (place / file).write_text(source)
        for tests in TESTS[file]:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                       *shlex.split(f"tests/{tests}")]
            try:
                # The longest file takes six minutes on a busy machine; a mutant that never ends is a dead one.
                done = subprocess.run(command, cwd=place, capture_output=True, timeout=900, check=False)
            except subprocess.TimeoutExpired:
                return False
            if done.returncode:
                return False
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", choices=tuple(TESTS), metavar="FILE")
    parser.add_argument("--within", nargs="+", default=[], metavar="FUNCTION", help="only there")
    parser.add_argument("--count", type=int, default=30, help="mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for file in args.files:
        possible = mutants((ROOT / file).read_text(), args.within)
        drawn = sorted(random.Random(args.seed).sample(possible, min(args.count, len(possible))))
        alive = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            for (line, what, _), lives in zip(drawn, pool.map(lambda mutant: survives(file, mutant[2]), drawn)):
                alive += lives
                print(f"{file}, line {line}: {'lives' if lives else 'died'}: {what}", flush=True)
        print(f"{file}: {len(drawn) - alive} of {len(drawn)} died, of {len(possible)} possible", flush=True)


if __name__ == "__main__":
    main()

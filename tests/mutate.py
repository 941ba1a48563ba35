"""Breaks the code in one place at a time and looks whether the tests notice. Not a part of the suite: it takes hours.

    python tests/mutate.py objective.py rollout.py --count 30 [--seed 1] [--jobs 2]

Mutants: an operator or a comparison becomes its neighbour, a condition its opposite, a number another, True False; a
statement is left out. Printed: how many died, and each survivor with its line, to be judged: equivalent, or a test that
is missing. Nothing in the repository is changed: each mutant is a copy in a temporary folder.
"""
import argparse
import ast
import copy
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {        # file → the tests that look at it, the quickest first
    "objective.py": ("test_objective.py",), "rewards.py": ("test_rewards.py",), "rollout.py": ("test_rollout.py",),
    "data.py": ("test_data.py", "test_sources.py"), "model.py": ("test_model.py", "test_rollout.py"),
    "eval.py": ("test_metrics.py", "test_eval.py"), "train.py": ("test_train.py", "test_checkpoints.py"),
    "support/checkpoints.py": ("test_checkpoints.py", "test_train.py"),
    "support/runs.py": ("test_checkpoints.py", "test_mistakes.py", "test_train.py"),
    "support/sources.py": ("test_sources.py", "test_data.py"), "support/images.py": ("test_sources.py",),
    "support/ranks.py": ("test_train.py",), "support/log.py": ("test_train.py", "test_pictures.py"),
    "support/optimizers.py": ("test_optimizers.py",), "support/verify_math.py": ("test_rewards.py",),
    "support/scenes.py": ("test_data.py",),
}
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
           ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
           ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def changes(node: ast.AST) -> list[ast.AST]:
    """The mutants of one node."""
    found: list[ast.AST] = []

    def other(**fields) -> None:
        mutant = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(mutant, name, value)
        found.append(mutant)
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPPED:
        other(op=SWAPPED[type(node.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        other(ops=[SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        other(test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        other(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        other(value=node.value + 1)
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        found.append(ast.copy_location(ast.Pass(), node))
    return found


def mutants(source: str) -> list[tuple[int, str, str]]:
    """(line, what was there → what is, the mutant's source), in the order of the file. Text and types stay."""
    tree = ast.parse(source)
    types = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    skipped = {id(part) for kind in types if kind for part in ast.walk(kind)}
    made = []
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            places = value if isinstance(value, list) else [value]
            for at, node in enumerate(places):
                if not isinstance(node, ast.AST) or id(node) in skipped or isinstance(parent, ast.JoinedStr):
                    continue
                for mutant in changes(node):
                    if isinstance(value, list):
                        value[at] = mutant
                    else:
                        setattr(parent, field, mutant)
                    was, now = (ast.unparse(ast.fix_missing_locations(n)).splitlines()[0] for n in (node, mutant))
                    made.append((node.lineno, f"{was}  →  {now}", ast.unparse(ast.fix_missing_locations(tree))))
                    if isinstance(value, list):
                        value[at] = node
                    else:
                        setattr(parent, field, node)
    return sorted(made)


def survives(file: str, source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", "runs", "evaluations", "__pycache__"))
        (place / file).write_text(source)
        for tests in TESTS[file]:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]
            try:
                done = subprocess.run(command, cwd=place, capture_output=True, timeout=400, check=False)
            except subprocess.TimeoutExpired:
                return False
            if done.returncode:
                return False
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", choices=tuple(TESTS), metavar="FILE")
    parser.add_argument("--count", type=int, default=30, help="mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for file in args.files:
        possible = mutants((ROOT / file).read_text())
        drawn = sorted(random.Random(args.seed).sample(possible, min(args.count, len(possible))))
        with ThreadPoolExecutor(args.jobs) as pool:
            alive = list(pool.map(lambda mutant: survives(file, mutant[2]), drawn))
        print(f"{file}: {len(drawn) - sum(alive)} of {len(drawn)} died, of {len(possible)} possible", flush=True)
        for (line, what, _), lives in zip(drawn, alive):
            if lives:
                print(f"  line {line}: {what}", flush=True)


if __name__ == "__main__":
    main()

"""What design and README promise of the layout, read off the files."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEVEN = ("train", "eval", "rollout", "data", "model", "objective", "rewards")   # the card's, in the order of the arrows


def imported(path: Path) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it: "data", "support.ranks", …"""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {n for n in names if n in SEVEN or (ROOT / (n.replace(".", "/") + ".py")).exists() and "support." in n}


def test_the_top_level_holds_the_seven_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SEVEN)


def test_support_imports_none_of_the_seven():
    for path in (ROOT / "support").glob("*.py"):
        assert not imported(path) & set(SEVEN), path.name


def test_imports_run_down_only():
    for above, name in enumerate(SEVEN):
        assert not imported(ROOT / f"{name}.py") & set(SEVEN[:above + 1]), name
    below = {f"support.{path.stem}": imported(path) for path in (ROOT / "support").glob("*.py")}
    while free := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in free:
            del below[name]
    assert not below, f"these import each other: {below}"


def test_the_model_knows_nothing_of_faster_products():
    assert "onednn" not in (ROOT / "model.py").read_text().lower()


def test_links_of_the_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*.md"), *ROOT.glob("experiments/*.md")]
    links = [(page, *link) for page in pages for link in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text())]
    assert len(links) > 10
    for page, link, heading in links:
        there = page.parent / link if link else page
        assert link.startswith("https://") or there.exists(), f"{page.name}: {link}"
        if heading and not link.startswith("https://"):
            of_page = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                       for title in re.findall("^#+ (.+)$", there.read_text(), re.M)]
            assert heading in of_page, f"{page.name}: {link} has no heading #{heading}"


def test_the_tests_that_the_pages_name_exist():
    tests = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in ROOT.glob("tests/test_*.py")), re.M))
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md")]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 10 and named <= tests, named - tests

"""Parsing, verifiable rewards per task, and the three reward controls of ViSurf (section 3.4 of the paper).

Glossary
    response   text: y or a rollout. `parse_boxes` turns it into boxes or a *named* error
    reward     a record of named terms; r is their sum
    truth      what a response is held to: the label's answer, boxes in the frame the model sees (Qwen3-VL: 0 … 1000)
    task       prompt template, text of y, reward and metric (`TASKS`)
    control    1 align the text of y, 2 no thinking reward for y, 3 smooth r(y): `label_text`, `label_reward`, `smooth`
Model output is never evaluated: `json.loads`, a schema, bounds on length, depth and magnitude.

Grounding totals are those of the authors' released scorer (docs/paper.md, section 4):
    r = thinking (0, 1) + answer_format (0 … 2) + accuracy (0 … 3) + non_repeat (0, 1)  ≤ 7
Departure 1: with truth `[]` the released code gives a correct `[]` 2 points and a hallucinated box 4. Here an empty
    prediction of an empty truth earns full format and accuracy, and exactly one of the two being empty has accuracy 0.
Departure 2: the released limits of 10 and 30 px belong to 840×840 pictures. In the built-in world's, of 112×112, they
    would pass nearly any box on the right thing; there they are 1.33 and 4 px, the same share of a side.
Departure 3: the released code splits sentences at every '.', and so takes the decimals of "10.5, 20.5, 30.5" for
    sentences that repeat each other. Here a '.' between two digits ends no sentence.
Departure 4, with --label-thought rollout only: the paper's y has no thought. There y is the thought of one rollout of
    its own group and the label's answer, and is rewarded as the complete response that it then is (`borrowed_thought`).
"""
import ast
import functools
import json
import math
import random
import re
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from support import scenes
from support.files import nesting_depth
from support.mistakes import Mistake
from support.screen import say
from support.verify_math import same_value

MAX_CHARACTERS, MAX_DEPTH, MAX_OBJECTS, MAX_COORDINATE = 20_000, 8, 120, 1e6
FULL_ACCURACY = 3.0     # of boxes
LABEL_STYLES = {"spaced": (", ", ": "), "compact": (",", ":")}  # what stands after an item and after a key


@dataclass(frozen=True)
class Reward:
    """terms: name → points; error: why the answer could not be read, or None."""
    terms: dict[str, float]
    error: str | None = None

    @property
    def total(self) -> float:
        return sum(self.terms.values())


# ---------------------------------------------------------------------------------------------------------------------
# Parsing

def answer_text(response: str) -> str | None:
    """The text between the first <answer> and the </answer> after it, or None."""
    start = response.find("<answer>")
    end = response.find("</answer>", start)
    return None if start < 0 or end < 0 else response[start + len("<answer>"):end].strip()


def trailing_text(response: str) -> str:
    """What follows the answer that answer_text reads. Accuracy and metrics look at the answer alone, as the authors'
    scripts do; only the thinking format asks for the end. So text behind an answer without a thought costs nothing."""
    return response[response.find("<answer>"):].partition("</answer>")[2].strip()


SPECIAL = re.compile(r"<\|\w+\|>")     # <|im_start|> and its like must never come out of data; <tool_call> is text


def has_thinking_format(response: str) -> bool:
    """Whether the whole response is <think>…</think>, blanks, <answer>…</answer>."""
    body = response.removeprefix("<think>").removesuffix("</answer>")
    return (response.startswith("<think>") and response.endswith("</answer>")
            and re.search(r"</think>\s*<answer>", body) is not None)


def parse_json(text: str, list_only: bool = True) -> tuple[list, str | None]:
    """JSON list → (items, None), or ([], the name of the error). list_only=False: any JSON value → (value, None)."""
    if len(text) > MAX_CHARACTERS:
        return [], "too_long"
    if nesting_depth(text) > MAX_DEPTH:
        return [], "too_deep"
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, an integer of too many digits, brackets hidden in strings
        return [], "bad_json"
    return (items, None) if isinstance(items, list) or not list_only else ([], "not_a_list")


def numbers(value, count: int) -> bool:
    """Whether value is a list of `count` finite numbers of bounded size. True and False are no numbers."""
    return isinstance(value, list) and len(value) == count and all(
        type(x) in (int, float) and abs(x) <= MAX_COORDINATE for x in value)


def item_error(item) -> str | None:
    if not isinstance(item, dict):
        return "not_an_object"
    for key, count in (("bbox_2d", 4), ("point_2d", 2)):
        if key not in item:
            return f"no_{key}"
        if not numbers(item[key], count):
            return f"bad_{key}"
    return None


def parse_boxes(response: str) -> tuple[list[dict], str | None]:
    """Boxes and points of a response: ([{"bbox_2d": [4 numbers], "point_2d": [2 numbers]}, …], None), or ([], error).

    >>> parse_boxes('<answer>[]</answer>'), parse_boxes('nothing here')
    (([], None), ([], 'no_answer'))
    """
    text = answer_text(response)
    if text is None:
        return [], "no_answer"
    items, error = parse_json(text)
    error = error or next(filter(None, map(item_error, items)), None)
    return ([], error) if error else (items[:MAX_OBJECTS], None)


def parse_points(response: str) -> list[list[float]]:
    """The points of a response, as OmniACT counts them: of an item without a point, the centre of its box; of one
    without either, none."""
    text = answer_text(response)
    points: list = []
    for item in parse_json(text)[0][:MAX_OBJECTS] if text is not None else []:
        point, box = (item.get("point_2d"), item.get("bbox_2d")) if isinstance(item, dict) else (None, None)
        if numbers(point, 2):
            points.append(point)
        elif numbers(box, 4):
            points.append([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    return points


# ---------------------------------------------------------------------------------------------------------------------
# Grounding

def answer_format(response: str, truth: list[dict]) -> float:
    """Mean over the items of 1[bbox_2d is a list of 4] + 1[point_2d is a list of 2]; an item that is no object counts
    and has neither. `[]` has no items: 0, as released, but 2 where the truth is empty too (departure 1)."""
    text = answer_text(response)
    items, error = parse_json(text) if text is not None else ([], "no_answer")
    if not items:
        return 2.0 if error is None and not truth else 0.0

    def is_list(item, key: str, count: int) -> bool:
        return isinstance(item, dict) and isinstance(item.get(key), list) and len(item[key]) == count
    return sum(is_list(i, "bbox_2d", 4) + is_list(i, "point_2d", 2) for i in items) / len(items)


def non_repeat(response: str) -> float:
    """0 if at least two sentences (split at '.', but not within a number: departure 3) repeat earlier ones, else 1."""
    sentences = [s.strip() for s in re.split(r"(?<![0-9])\.|\.(?![0-9])", response) if s.strip()]
    return 0.0 if len(sentences) - len(set(sentences)) >= 2 else 1.0


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes a [n, 4] and b [m, 4] → [n, m]. x1, y1, x2, y2 are inclusive pixels: width = x2 − x1 + 1."""
    a, b = a[:, None], b[None]
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1, 0, None).prod(-1)
    area_a, area_b = ((each[..., 2:] - each[..., :2] + 1).prod(-1) for each in (a, b))
    union = area_a + area_b - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def accuracy(predicted: list[dict], truth: list[dict], side: int = 840) -> float:
    """0 … 3. Each (prediction, truth) pair scores 1[IoU > 0.5] + 1[mean |Δ corner| < 10 px] + 1[points closer than
    30 px and the predicted point in its own box]; best one-to-one matching, divided by the larger of the counts. The
    pixels are those of an 840×840 picture; in one of another side the limits shrink with it."""
    predicted, truth = predicted[:MAX_OBJECTS], truth[:MAX_OBJECTS]
    if not predicted or not truth:
        return 3.0 if not predicted and not truth else 0.0
    boxes, points = (np.array([i[key] for i in predicted], float) for key in ("bbox_2d", "point_2d"))
    true_boxes, true_points = (np.array([i[key] for i in truth], float) for key in ("bbox_2d", "point_2d"))
    inside = ((boxes[:, :2] <= points) & (points <= boxes[:, 2:])).all(1)
    near = np.linalg.norm(points[:, None] - true_points[None], axis=-1) < 30 * side / 840
    cells = ((iou_matrix(boxes, true_boxes) > 0.5).astype(float)
             + (np.abs(boxes[:, None] - true_boxes[None]).mean(-1) < 10 * side / 840)
             + (near & inside[:, None]))
    rows, columns = linear_sum_assignment(cells, maximize=True)
    return float(cells[rows, columns].sum()) / max(len(predicted), len(truth))


def grounding_reward(response: str, truth: str, side: int = 840) -> Reward:
    """truth: JSON text of the boxes, in the frame the model sees; side: of that frame, pixels."""
    if len(response) > MAX_CHARACTERS:
        return Reward(dict.fromkeys(("thinking", "answer_format", "accuracy", "non_repeat"), 0.0), "too_long")
    (predicted, error), true_items = parse_boxes(response), json.loads(truth)
    return Reward({
        "thinking": float(has_thinking_format(response)),
        "answer_format": 2.0 if predicted else answer_format(response, true_items),   # what can be read has full format
        "accuracy": 0.0 if error else accuracy(predicted, true_items, side),
        "non_repeat": non_repeat(response),
    }, error)


def render_grounding(truth: str, style: str) -> str:
    """The label's text: <answer>[…]</answer>, its JSON in the given style. Reward control 1 chooses the style.

    >>> render_grounding('[{"bbox_2d":[1,2,3,4],"point_2d":[2,3]}]', "spaced")
    '<answer>[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}]</answer>'
    """
    return f"<answer>{json.dumps(json.loads(truth), separators=LABEL_STYLES[style])}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# Short answers

def boxed(response: str) -> str | None:
    r"""The text in the last \boxed{…}, braces balanced, or None: as in the authors' evaluation, what was boxed while
    thinking is no answer. A last one that is cut off, or whose braces do not match, is none either."""
    start = response.rfind("\\boxed{")
    depth = 0
    for at in range(start + 6, len(response)) if start >= 0 else ():
        depth += (response[at] == "{") - (response[at] == "}")
        if depth == 0:
            return response[start + 7:at].strip()
    return None


def final_text(response: str) -> str:
    """What a response answers, of short tasks: without the thought, the text in the last <answer> … </answer>, else all
    of it. A thought, or a sentence before the answer, may mention the tags."""
    text = response[:MAX_CHARACTERS].rpartition("</think>")[2]
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    return text.strip() if start < 0 else answer_text(text[start:])    # type: ignore[return-value]


WRAPPED = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|sf)|boldsymbol|mbox|ce)\s*\{([^{}]*)\}"
RAISED, LOWERED, PARTS = "[⁰¹²³⁴-⁹⁺⁻]+", "[₀-₉]+", "[¼-¾⅐-⅞]"


def plain_value(text: str) -> str:
    r"""A math answer without what says nothing of its value: blanks, a final full stop, a leading \approx, a degree
    sign at the end, \text{…} around it. Raised, full-width and other alphabets' digits become 0 … 9.

    >>> plain_value("41.2."), plain_value("8.4°"), plain_value(r"\approx 4.81"), plain_value(r"\text{ Yes }")
    ('41.2', '8.4', '4.81', 'Yes')
    >>> plain_value("x²"), plain_value("1½"), plain_value("٣٤")
    ('x^{2}', '1\\frac{1}{2}', '34')
    """
    usual = functools.partial(unicodedata.normalize, "NFKC")
    text = re.sub(PARTS, lambda part: r"\frac{%s}{%s}" % tuple(usual(part[0]).split("⁄")), text)
    for form, mark in ((RAISED, "^"), (LOWERED, "_")):
        text = re.sub(form, lambda digits: f"{mark}{{{usual(digits[0])}}}", text)
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), usual(text))
    text = re.sub(r"^(\\approx|≈)", "", text.strip().replace("−", "-")).strip()
    text = re.sub(r"(°|\^\{?\\circ\}?)$", "", text.removesuffix(".").strip()).strip()
    words = re.fullmatch(WRAPPED, text)
    return words[1].strip() if words else text


def letter_of(text: str) -> int | None:
    r"""The number, from 0, of the choice whose letter a text names, or None: B, (B), B., B: or "B. 4 cm", in LaTeX too
    (\text{B}, \textbf{(B)}, $B$).

    >>> letter_of("B"), letter_of(r"\textbf{(c)} 4 cm"), letter_of("Bees")
    (1, 2, None)
    """
    inner, text = None, text.replace("$", "").replace("**", "")
    while inner != text:                # a wrapping may hold another
        inner, text = text, re.sub(WRAPPED, r"\1", text)
    letter = re.match(r"\s*\(?\s*([A-Za-z])\s*(?:[):]|\.(?![A-Za-z]\.?$)|$)", text)    # not a.m.
    return ord(letter[1].upper()) - ord("A") if letter else None


LETTER, FOREIGN = r"[^\W\d_]", r"[^\W\d_A-Za-zͰ-Ͽ]"    # any; neither a … z nor Greek
# The first of each stands for the others. math-verify drops a unit behind a number, whatever it is.
UNITS = {name: names.split()[0] for names in (
    "s sec second", "min minute", "h hr hour", "d day", "wk week", "mo month", "y yr year", "am",
    "pm", "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre",
    "km kilometer kilometre", "in inche", "ft foot feet", "yd yard", "mi mile", "mg milligram",
    "g gram gm", "kg kilogram kilo", "lb pound", "oz ounce", "ml milliliter millilitre",
    "L l liter litre", "deg degree", "sq square", "cu cubic", "/ per", "mi/h mph",
    "km/h kmh kmph kph", "st", "nd", "rd", "th") for name in names.split()}


def unit_name(word: str) -> str:
    """One name for all spellings of a unit. A single letter keeps its case, as a variable does."""
    name = word.casefold() if len(word) > 2 or word.casefold() in UNITS and len(word) == 2 else word
    one = name.removesuffix("s") if len(name) > 2 else name
    return UNITS.get(name) or UNITS.get(one, one)


def quantity(text: str) -> tuple[str, str] | None:
    """The value and the unit of a number with letters behind it, or None. The letters of one that
    may be a product of variables are sorted.

    >>> quantity("7:30 p.m."), quantity("2 cm^2"), quantity("3yx"), quantity("2+3i")
    (('7:30', 'pm'), ('2', 'sqcm'), ('3', 'xy'), None)
    """
    found = re.fullmatch(rf"(.*(?:[\d)}}\]%]|\\pi))(°?\s*)({LETTER}(?:{LETTER}|[\s./'])*?)"
                         r"(?:\^\{?([23])\}?)?", text)
    if not found or is_words(found[1]):
        return None
    value, blank, letters, power = found.groups()
    words = re.findall(f"{LETTER}+", letters := letters.replace(".", ""))
    unit = re.sub(rf"({LETTER}+)|\s", lambda word: unit_name(word[1] or ""), letters)
    # One number, no sum: what follows belongs to all of it.
    alone = not re.search(rf"{LETTER}|[\d)}}\]]\s*[+-]", re.sub(r"\\[a-z]+", "", value))
    if not (re.search(FOREIGN, letters) or (blank or alone) and any(len(word) > 2 for word in words)
            or any(len(word) > 1 and unit_name(word) in UNITS for word in words)):
        if not alone:
            return None
        unit = "".join(sorted(unit)) if letters.islower() and "/" not in unit else unit
    return value, {"2": "sq", "3": "cu"}.get(power, "") + unit


def is_words(text: str) -> bool:
    """Whether a text is to be compared as words. It is, if it has no mark of a formula and holds a
    word: three letters, a letter or bracket with a digit right behind it (H2O), a letter that is
    neither a … z nor Greek, or, where all else is blanks, hyphens and digits, two letters. A minus
    between blanks or single letters (a-b) is no hyphen. A date (2020-03-04) is words too."""
    if re.fullmatch(r"\d+([-/.:]\d+){2,}", text):
        return True
    marks = r"[\\^_=<>*|{}]|\d\s*/|/\s*\d" + r"|\+" * (not re.search(r"[A-Z][a-z]?\d", text))
    if re.search(marks, text):
        return False
    known = r"\s(?:and|or)\s|sqrt|inf(inity)?|percent|(?<![a-z])[a-z]+(?=\()"       # to math-verify
    rest = re.sub(known, " ", text).strip()
    word = rf"{LETTER}{{3}}|({LETTER}|[)\]])\d|{LETTER}\.{LETTER}|{FOREIGN}"
    return re.search(word, rest) is not None or (
        re.fullmatch(r"[\w\s'.:-]+", rest) is not None
        and re.search(rf"{LETTER}{{2}}|^{LETTER}[^\d.:]+$", rest) is not None
        and not re.search(r"^-|\s-|-\s|\b\w-\w\b|\b[a-z]{1,2}-\d|\d-[a-z]{1,2}\b", rest))


def in_line(text: str) -> str:
    r"""A text without LaTeX's wrappings, the digits of chemistry in line: \text{H}_2O is H2O."""
    text = re.sub(r"\\([$&%#])", r"\1", re.sub(r"\^\{?\\circ\}?", "°", text))
    text = re.sub(r"([A-Z][a-z]?\}?)_(?:(\d+)|\{(\d+)\})", r"\1\2\3", text)
    text = re.sub(r"\\[ ,;:!]|\\q?quad|~", " ", re.sub(WRAPPED, r"\1", text))
    return " ".join(text.replace(r"\angle", "∠").replace(r"\triangle", "△").split())


def math_equal(answer: str, truth: str, choices: Sequence[str] = ()) -> bool:
    """Whether two answers are the same text or the same value. With choices, a letter stands for
    its text (`letter_of`). Words are compared as words (`is_words`), up to case; numbers with
    something behind them by the number and by what that is (`quantity`; if only one answer has a
    unit, it does not count); all else by value, as LaTeX. To LaTeX words are products of their
    letters, which commute, so that "seY" would be "Yes" (and for that "ba" is not "ab" here). Lists
    have no order."""
    if answer.strip() not in choices and (at := letter_of(answer)) is not None and at < len(choices):
        answer = choices[at]
    if answer.strip() == truth.strip():
        return True
    if answer.strip() in choices:
        return False
    a, b = plain_value(answer), plain_value(truth)
    lines = in_line(a), in_line(b)
    one, other = map(quantity, lines)
    if is_words(lines[0]) and not one or is_words(lines[1]) and not other:
        blank = r"\s*([-/:,+∠△])\s*|\.(?!\d)|(?<=[-/])0+(?=\d)|^0+(?=\d)"  # Dec. 05, 03/04
        a, b = (re.sub(blank, r"\1", line).casefold() for line in lines)
        return sorted(a.split(",")) == sorted(b.split(","))
    if one and other:
        return one[1] == other[1] and (one[0] == other[0] or same_value(one[0], other[0]))
    return a == b or same_value(a, b)


def read_choices(answer: str) -> tuple[str, list[str]]:
    """A math label: text, or JSON {"answer": text, "choices": [text, …]} → answer, choices."""
    if not answer.startswith("{\"answer\""):
        return answer.strip(), []
    label = json.loads(answer)
    return label["answer"].strip(), label["choices"]


def math_reward(response: str, truth: str) -> Reward:
    r"""1.0 correct, 0.1 wrong but boxed, 0 without \boxed{}."""
    answer = boxed(response[:MAX_CHARACTERS])
    if answer is None:
        return Reward({"accuracy": 0.0}, "no_boxed")
    return Reward({"accuracy": 1.0 if math_equal(answer, *read_choices(truth)) else 0.1})


def accepted(truth: str) -> list[str]:
    """A label of short text: the text, or a JSON list of all accepted texts."""
    return json.loads(truth) if truth.startswith("[\"") else [truth]


def vqa_reward(response: str, truth: str) -> Reward:
    """1 if the response is an accepted answer, up to case, blanks around it and a final full stop; else 0."""
    def plain(text: str) -> str:
        return text.strip().removesuffix(".").strip().lower()
    return Reward({"accuracy": float(plain(final_text(response)) in map(plain, accepted(truth)))})


def relaxed_match(answer: str, truth: str) -> bool:
    """ChartQA's relaxed accuracy: numbers (a final % divides by 100) may be 5 % off a true number other than 0; all
    else must be equal up to case."""
    def number(text: str) -> float | None:
        found = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,2})?)(%?)", text.strip().lower())
        return float(found[1]) / (100 if found[2] else 1) if found else None
    a, b = number(answer[:100]), number(truth)
    if a is not None and b:
        return abs(a - b) <= 0.05 * abs(b)
    return answer.strip().lower() == truth.strip().lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: insertions, deletions and substitutions of one character."""
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, line[0] = line[0], i
        for j, y in enumerate(b, 1):
            corner, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, corner + (x != y))
    return line[-1]


def anls(answer: str, truths: list[str]) -> float:
    """DocVQA's average normalised Levenshtein similarity of one question: best over the accepted answers of
    1 − distance / longer length, 0 where that is not above 0.5: at exactly 0.5 the formula (arXiv 1907.00490) gives 0,
    while lmms-eval gives 0.5. Case and runs of blanks do not count."""
    def similarity(truth: str) -> float:
        a, b = (" ".join(text.lower().split())[:1000] for text in (answer, truth))
        s = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
        return s if s > 0.5 else 0.0
    return max(map(similarity, truths))


def chart_reward(response: str, truth: str) -> Reward:
    return Reward({"accuracy": float(any(relaxed_match(final_text(response), t) for t in accepted(truth)))})


def document_reward(response: str, truth: str) -> Reward:
    return Reward({"accuracy": anls(final_text(response), accepted(truth))})


# ---------------------------------------------------------------------------------------------------------------------
# Labels: a cell of a data set → the answer, as text that the functions above take. ValueError: why it cannot be one.

def scalar_text(value, what: str = "answer") -> str:
    """Text or a number, as text."""
    if isinstance(value, list) and len(value) == 1:
        return scalar_text(value[0], what)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        kind = "null" if value is None else f"a {type(value).__name__}: {value!r:.100}"
        raise ValueError(f"the {what} is {kind}; it must be text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the {what} is {value}")
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", value).strip()
    else:
        text = repr(int(value) if value == int(value) else value)
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise ValueError(f"the {what} " + (f"has more than {MAX_CHARACTERS:,} characters" if text else "is empty"))
    return text


def bare(text: str) -> str:
    """The text of a label without a thought in front of it and <answer> tags around it."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the solution has more than {MAX_CHARACTERS:,} characters")
    text = final_text(text)
    if re.search("</?(answer|think)>", text):
        raise ValueError(f"a tag without its other half: {text[:100]!r}")
    return text


def listed(text: str) -> list | str:
    """The list of which this is the text, as JSON or as Python writes it; else the text."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    if re.search(r"""['"]\s+['"]""", text):
        raise ValueError(f"a list without commas: {text[:100]!r}")
    for read in (json.loads, ast.literal_eval):
        try:
            if isinstance(value := read(text), list):
                return value
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


def read_plain(value, choices) -> str:
    """Text as it is, anything else as JSON: of a task that says nothing of its labels."""
    if choices:
        raise ValueError("the task knows no choices; the task math does")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_boxes(value, choices) -> str:
    """A list of {"bbox_2d": …, "point_2d": …}, as such or as JSON text; or [x1, y1, x2, y2], or a list of these, whose
    points are their centres."""
    if choices:
        raise ValueError("the answers are boxes; only the task math knows choices")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("the solution is empty")
        value, error = parse_json(bare(value))
        if error:
            raise ValueError({"bad_json": "the solution is not JSON",
                              "not_a_list": "the solution is JSON, but no list of objects",
                              "too_deep": f"the solution is nested more than {MAX_DEPTH} deep"}[error])
    if not isinstance(value, list):
        raise ValueError(f"the solution is a {type(value).__name__}, no list of objects")
    if len(value) > 1 and not isinstance(value[0], (list, dict)):
        value = [value]
    items = []
    for number, item in enumerate(value, 1):
        if isinstance(item, list):
            if not numbers(item, 4):
                raise ValueError(f"item {number}: a box must be 4 numbers, [x1, y1, x2, y2]; it is {item!r:.100}")
            item = {"bbox_2d": item, "point_2d": [(item[0] + item[2]) / 2, (item[1] + item[3]) / 2]}
        if not isinstance(item, dict):
            raise ValueError(f"item {number}: it is {item!r:.100}, not an object with bbox_2d and point_2d")
        for key, count in (("bbox_2d", 4), ("point_2d", 2)):
            if item.get(key) is None:
                raise ValueError(f"item {number}: {key} is missing")
            if not numbers(item[key], count):
                raise ValueError(f"item {number}: {key} must be {count} numbers, it is {item[key]!r:.100}")
        box = item["bbox_2d"]
        if box[0] > box[2] or box[1] > box[3]:
            raise ValueError(f"the box {box} is inverted; it must be [x1, y1, x2, y2] with x1 ≤ x2 and y1 ≤ y2")
        items.append(item)
    if items and all(0 <= c <= 1 for item in items for c in item["bbox_2d"]):
        raise ValueError(f"relative coordinates: all lie in 0 … 1, as in {items[0]['bbox_2d']}; boxes must be in the "
                         "picture's own pixels")
    return json.dumps(items)


def choice_texts(choices) -> list[str]:
    """The texts of a multiple choice, without the letters in front of them."""
    if isinstance(choices, str):
        choices = listed(choices.strip())
    if isinstance(choices, dict) and choices.keys() == {"text", "label"}:       # as in ARC
        choices = dict(zip(choices["label"], choices["text"]))
    if isinstance(choices, dict):
        while choices and list(choices.values())[-1] is None:       # Parquet gives all rows the letters of the longest
            choices.popitem()
        if list(choices) != [chr(ord("A") + i) for i in range(len(choices))]:
            raise ValueError(f"the choices are a record of {', '.join(map(str, choices))}; it must be of A, B, C, …")
        choices = list(choices.values())
    if not isinstance(choices, list) or not 1 <= len(choices) <= 26:
        raise ValueError(f"the choices must be a list of at most 26, they are {choices!r:.100}")
    texts = [scalar_text(choice, f"choice {chr(ord('A') + i)}") for i, choice in enumerate(choices)]
    lettered = [re.fullmatch(rf"\(?{chr(ord('A') + i)}\s*[).:]\s*(.+)", text, re.DOTALL)
                for i, text in enumerate(texts)]
    return [match[1] for match in lettered] if all(lettered) else texts


def choice_of(value, texts: list[str], are_text: bool) -> str:
    """Which of the choices an answer means: its text; its letter, with or without the text; a whole number that is none
    of the choices counts them from 0, as ClassLabel does."""
    answer = scalar_text(value)
    if isinstance(value, (int, float)) and answer.lstrip("-").isdecimal():
        index = int(answer)
        if answer in texts and are_text and 0 <= index < len(texts) and texts[index] != answer:
            raise ValueError(f"the answer {answer} is one of the choices, and the number of another, {texts[index]!r}; "
                             "write it as text")
        if answer not in texts and not 0 <= index < len(texts):
            raise ValueError(f"the answer {answer} is none of the {len(texts)} choices, counted from 0: {texts}")
        return answer if answer in texts else texts[index]
    answer = unboxed(bare(answer))
    same = [text for text in texts if text == answer]
    same = same or [text for text in texts if text.casefold() == answer.casefold()]
    at = letter_of(answer)
    if not same and at is not None and at < len(texts):
        rest = re.sub(r"^\(?[A-Za-z]\s*[).:]?\s*", "", answer)
        if not rest or rest.casefold() == texts[at].casefold() or not re.match(r"\(?[A-Za-z]", answer):
            same = [texts[at]]
    if not same:
        raise ValueError(f"the answer {answer!r:.100} is none of the choices {texts!r:.200}, nor the letter of one")
    return same[0]


def unboxed(text: str) -> str:
    r"""A math label without \boxed{…} or $…$ around it; of a worked solution what it boxes last.

    >>> unboxed(r"so \boxed{\frac12}"), unboxed("$x$")
    ('\\frac12', 'x')
    """
    text = boxed(text) or text
    whole = re.fullmatch(r"\$([^$]+)\$|\\\((.+)\\\)", text)
    return (whole[1] or whole[2]).strip() if whole else text


def read_math(value, choices) -> str:
    """Text or a number; with choices JSON {"answer": text, "choices": [text, …]}."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.startswith('{"answer"'):
        value = json.loads(value)
    if isinstance(value, dict):
        value, choices = value.get("answer"), choices or value.get("choices")
    if not choices:
        text = unboxed(bare(scalar_text(value)))
        if text.startswith('{"answer"'):        # which would be read as JSON with choices
            raise ValueError(f"the answer is a record: {text[:100]!r}; it must be text or a number")
        return text
    texts = choice_texts(choices)
    are_text = not isinstance(choices, list) or all(isinstance(choice, str) for choice in choices)
    return json.dumps({"answer": choice_of(value, texts, are_text), "choices": texts}, ensure_ascii=False)


def read_accepted(value, choices) -> str:
    """Text or a number; a list of accepted ones (also as text, also of {"answer": …}) becomes a JSON list, the most
    frequent first: that one is y."""
    if choices:
        raise ValueError("the task knows no choices; the task math does")
    if isinstance(value, str):
        value = listed(bare(value))
    texts, many = [], isinstance(value, list)
    for one in value if many else [value]:
        if isinstance(one, dict) and len(keys := one.keys() & {"answer", "text"}) == 1:
            one = one[keys.pop()]
        texts += [scalar_text(each, "solution") for each in (one if isinstance(one, list) and not many else [one])]
    if not texts:
        raise ValueError("the list of accepted answers is empty")
    texts = [text for text, _ in Counter(texts).most_common()]
    return json.dumps(texts, ensure_ascii=False) if many or texts[1:] or texts[0].startswith('["') else texts[0]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

@dataclass(frozen=True)
class Task:
    """All that a task is."""
    prompt: str                                   # the user's turn; {question} stands for the question
    render: Callable[[str, str], str]             # (answer, style) → the text of y
    reward: Callable[..., Reward]                 # (response, answer) → named terms; of boxes also side=…
    metric: Callable[[str, str], float] | None    # (response, answer) → 0 … 1; None: the box metrics of eval.py
    boxes: bool = False                           # answers are JSON boxes, converted when the image is resized
    frame: tuple[int, int] | None = None          # (width, height) that every image is resized to, aspect ignored
    strip: str | None = None                      # marks cut off the lower-cased question; None: it stays as it is
    read: Callable[[object, object], str] = read_plain    # (cell of a data set, its choices) → the answer


GROUNDING_PROMPT = (  # the authors' evaluation prompt, to the letter
    'Please find "{question}" with bboxs and points.'
    "Compare the difference between object(s) and find the most closely matched object(s)."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
    "i.e., <think> thinking process here </think>"
    '<answer>[{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}, '
    '{"bbox_2d": [225, 296, 706, 786], "point_2d": [302, 410]}]</answer>')
# The prompt that their earlier trainer used: a newline after the image, no blanks inside the lists.
GROUNDING_TRAIN_PROMPT = "\n" + GROUNDING_PROMPT.replace("[10, 100, 200, 210]", "[10,100,200,210]").replace(
    "[30, 110]", "[30,110]").replace("[225, 296, 706, 786]", "[225,296,706,786]").replace("[302, 410]", "[302,410]")
MATH_PROMPT = (
    "{question} First think about the question and then provide the answer. The answer is in latex format and wrapped "
    "using the \\boxed{} command. The thinking process and answer are enclosed within <think> </think> and "
    "\\boxed{} tags, respectively. i.e., <think> thinking process here. </think>\\boxed{2}")
SHORT_PROMPT = "{question}\nAnswer the question using a single word or phrase."   # Qwen2.5-VL's own, for both


def render_boxed(answer: str, style: str) -> str:
    return f"\\boxed{{{read_choices(answer)[0]}}}"


def render_short(answer: str, style: str) -> str:
    return accepted(answer)[0]


def accuracy_of(reward: Callable[[str, str], Reward]) -> Callable[[str, str], float]:
    """The metric that is a reward's accuracy term, where that is all there is."""
    return lambda response, answer: reward(response, answer).terms["accuracy"]


def math_metric(response: str, answer: str) -> float:
    return float(math_reward(response, answer).total == 1)   # boxed but wrong is wrong


TASKS = {
    "grounding": Task(GROUNDING_PROMPT, render_grounding, grounding_reward, None, True, (840, 840), '."?!',
                      read_boxes),
    "grounding_train": Task(GROUNDING_TRAIN_PROMPT, render_grounding, grounding_reward, None, True, (840, 840), ".",
                            read_boxes),
    "math": Task(MATH_PROMPT, render_boxed, math_reward, math_metric, strip='"!', read=read_math),
    "chartqa": Task(SHORT_PROMPT, render_short, chart_reward, accuracy_of(chart_reward), read=read_accepted),
    "docvqa": Task(SHORT_PROMPT, render_short, document_reward, accuracy_of(document_reward), read=read_accepted),
    "vqa": Task("{question}", render_short, vqa_reward, accuracy_of(vqa_reward), read=read_accepted),
    # The built-in world asks in fewer words, for speed; answers and rewards are the same, in pictures of 112 pixels.
    "scene_grounding": Task(scenes.PROMPT, render_grounding,
                            functools.partial(grounding_reward, side=112), None, True, None, '."?!',
                            read_boxes),
    "scene_math": Task("{question}", render_boxed, math_reward, math_metric, read=read_math),
}


def reward_in(task: str, side: int | None) -> Callable[[str, str], Reward]:
    """Returns the task's reward for boxes in a frame of this side, or of the task's own if it is None
    (`Prompt.side`). Answers without boxes have no frame."""
    reward = TASKS[task].reward
    return functools.partial(reward, side=side) if side and TASKS[task].boxes else reward


def user_text(task: str, question: str) -> str:
    """The user's turn."""
    if TASKS[task].strip is not None:
        question = question.lower().strip(TASKS[task].strip)
    return TASKS[task].prompt.replace("{question}", question)


reported: set[tuple[str, str]] = set()   # failures of rewards whose traceback has been printed


def guarded(function: Callable, task: str, response: str, answer: str) -> tuple:
    """(function(response, answer), None), or (None, "reward_failed_TYPE") if it raises: one odd text must not end a run
    of days. The first traceback of a kind is printed."""
    try:
        return function(response, answer), None
    except Mistake:      # of the installation, not of the text
        raise
    except Exception as error:
        name = f"reward_failed_{type(error).__name__}"
        if (task, name) not in reported:
            reported.add((task, name))
            say(f"the reward of task {task!r} failed on {response[:200]!a}; it counts as 0 points\n"
                + traceback.format_exc())
        return None, name


def score(task: str, response: str, answer: str, side: int | None = None) -> Reward:
    """Returns the task's reward of a response, or 0 points and a named error if it cannot be computed.
    side: as in reward_in."""
    reward, failure = guarded(reward_in(task, side), task, response, answer)
    if reward and not math.isfinite(reward.total):
        return Reward({}, "reward_not_finite")
    return reward or Reward({}, failure)


def read_label(task: str, value, choices=None) -> str:
    """A cell of a data set → the answer, as `task` takes it, in Unicode's form NFC, which tokenizers give back. Raises
    ValueError if it cannot be a label of the task."""
    answer = unicodedata.normalize("NFC", TASKS[task].read(value, choices))
    if not answer.strip() or not (y := TASKS[task].render(answer, "spaced").strip()):
        raise ValueError("the solution is empty")
    if len(y) > MAX_CHARACTERS:
        raise ValueError(f"the solution has more than {MAX_CHARACTERS:,} characters")
    return answer


# ---------------------------------------------------------------------------------------------------------------------
# The three reward controls (section 3.4). All of them act on the label y only.

def label_text(task: str, answer: str, style: str, thought: str = "", before: str = "") -> str:
    """Control 1, align: y in the style that the model itself writes ("spaced" for Qwen2.5-VL), so that tokenisation
    alone does not make y unlikely. thought: comes first where the data has one (pretraining). before: the beginning of
    a rollout, its thought with the tags (`borrowed_thought`), in the place of it."""
    return (before or (f"<think>{thought}</think>" if thought else "")) + TASKS[task].render(answer, style)


def borrowed_thought(rollouts: list[str], seed: int, place: int) -> str:
    """Departure 4: what a rollout says in front of its answer, "<think>…</think>" with the blanks behind it, of one
    that is drawn by (seed, place) among those that think; "" where none does. The answer behind it is
    <answer>…</answer> or, as the math prompt asks for, \\boxed{…}; a thought that holds such a mark or a special token
    is not borrowed. place: of the prompt in the endless sequence of examples."""
    thoughts = []
    for o in rollouts:
        before = re.match(r"<think>.*?</think>\s*", o, re.DOTALL)
        if (before and (has_thinking_format(o) or r"\boxed{" in o[before.end():])
                and not (SPECIAL.search(before[0]) or "<answer>" in before[0] or r"\boxed{" in before[0])):
            thoughts.append(before[0])
    return random.Random(f"{seed}/{place}/thought").choice(thoughts) if thoughts else ""


def label_reward(task: str, y: str, answer: str, no_thinking_reward: bool = True, side: int | None = None) -> Reward:
    """Control 2, no thinking reward: y has no reasoning trace, so its thinking term is 0; format and accuracy stay.
    Off (the ablation): y is paid for thinking as a complete response is, r(y) = 7 where it is 6 with the control."""
    reward = reward_in(task, side)(y, answer)
    if "thinking" not in reward.terms:
        return reward
    return Reward({**reward.terms, "thinking": 0.0 if no_thinking_reward else 1.0}, reward.error)


def reward_group(cfg, task: str, answer: str, y: str | None, rollouts: list[str], side: int | None = None
                 ) -> tuple[list[Reward], list[float], bool]:
    """Section 3.4, of one group: the reward of each response, as terms and as the number r that is normalised, y first
    unless it is None; and whether y was smoothed. cfg: the options of train.py. side: as in reward_in."""
    rewards = [score(task, o, answer, side) for o in rollouts]
    r = [reward.total for reward in rewards]
    if y is None:
        return rewards, r, False
    complete = cfg.label_thought == "rollout" and has_thinking_format(y)                       # departure 4
    y_reward = label_reward(task, y, answer, not (complete or cfg.reward_label_thinking), side)  # control 2
    r_y, smoothed = smooth(y_reward.total, r) if cfg.smoothing else (y_reward.total, False)    # control 3
    return [y_reward, *rewards], [r_y, *r], smoothed


def earned(task: str, y: str, answer: str) -> tuple[Reward, float]:
    """What y earns by the reward of its task, after control 2, and its share of full accuracy, 0 … 1. Errors of the
    reward are not caught: data.check_example tells them of the row."""
    reward = label_reward(task, y, answer)
    metric = TASKS[task].metric
    return reward, metric(y, answer) if metric else reward.terms["accuracy"] / FULL_ACCURACY


def smooth(r_y: float, r_o: list[float]) -> tuple[float, bool]:
    """Control 3, smooth: once a rollout is as good as y, y is no better than the group. Returns (r(y), smoothed?):
    r(y) := mean_j r(o_j) if max_j r(o_j) ≥ r(y). Applied after control 2.

    >>> smooth(6.0, [7.0, 1.0]), smooth(6.0, [5.0, 1.0])
    ((4.0, True), (6.0, False))
    """
    return (math.fsum(r_o) / len(r_o), True) if max(r_o) >= r_y else (r_y, False)

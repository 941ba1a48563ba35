"""Reads what a response says out of its text, and compares short answers. Model output is never
evaluated: `json.loads`, a schema, and bounds on length, depth and magnitude."""
import json
import re

from support.boxes import centre
from support.files import nesting_depth

MAX_CHARACTERS, MAX_DEPTH, MAX_OBJECTS, MAX_COORDINATE = 20_000, 8, 120, 1e6
# <|im_start|> and its like must never come out of data; <tool_call> is text.
SPECIAL = re.compile(r"<\|\w+\|>")


def check_text(name: str, text: str) -> None:
    """Raises ValueError if no tokenizer may be given this text. name: what it is, for the
    sentence."""
    if found := SPECIAL.search(text):
        raise ValueError(f"the {name} holds a special token of the model, {found[0]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"the {name} cannot be encoded: {half!a} is half a character") from None


def answer_text(response: str) -> str | None:
    """Returns the text between the first <answer> and the </answer> after it, or None."""
    start = response.find("<answer>")
    end = response.find("</answer>", start)
    return None if start < 0 or end < 0 else response[start + len("<answer>"):end].strip()


def trailing_text(response: str) -> str:
    """Returns what follows the answer that answer_text reads. The authors' scripts look at the
    answer alone."""
    return response[response.find("<answer>"):].partition("</answer>")[2].strip()


def has_thinking_format(response: str) -> bool:
    """Tells whether the whole response is <think>…</think>, blanks, <answer>…</answer>."""
    body = response.removeprefix("<think>").removesuffix("</answer>")
    return (response.startswith("<think>") and response.endswith("</answer>")
            and re.search(r"</think>\s*<answer>", body) is not None)


def final_text(response: str) -> str:
    """Returns the answer of a short task: what follows the thought and, of that, the text in the
    last <answer> … </answer> if there is one. A thought, or a sentence before the answer, may
    mention the tags."""
    text = response[:MAX_CHARACTERS].rpartition("</think>")[2]
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    return text.strip() if start < 0 else answer_text(text[start:])    # type: ignore[return-value]


def boxed(response: str) -> str | None:
    r"""Returns the text in the last \boxed{…}, or None if that one is cut off or its braces do not
    match. As in the authors' evaluation, what was boxed while thinking is no answer."""
    start = response.rfind("\\boxed{")
    depth = 0
    for at in range(start + 6, len(response)) if start >= 0 else ():
        depth += (response[at] == "{") - (response[at] == "}")
        if depth == 0:
            return response[start + 7:at].strip()
    return None


def parse_json(text: str, list_only: bool = True) -> tuple[list, str | None]:
    """Returns (items, None) of a JSON list, or ([], the name of the error). list_only=False: of any
    JSON value (value, None)."""
    if len(text) > MAX_CHARACTERS:
        return [], "too_long"
    if nesting_depth(text) > MAX_DEPTH:
        return [], "too_deep"
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, too many digits, brackets hidden in strings
        return [], "bad_json"
    return (items, None) if isinstance(items, list) or not list_only else ([], "not_a_list")


def numbers(value, count: int) -> bool:
    """Tells whether value is a list of `count` finite numbers of bounded size. True and False are
    none."""
    return isinstance(value, list) and len(value) == count and all(
        type(x) in (int, float) and abs(x) <= MAX_COORDINATE for x in value)


def item_error(item) -> str | None:
    """Returns the name of what is wrong with an item, or None."""
    if not isinstance(item, dict):
        return "not_an_object"
    for key, count in (("bbox_2d", 4), ("point_2d", 2)):
        if key not in item:
            return f"no_{key}"
        if not numbers(item[key], count):
            return f"bad_{key}"
    return None


def parse_boxes(response: str) -> tuple[list[dict], str | None]:
    """Returns the boxes and points of a response, [{"bbox_2d": [4 numbers], "point_2d": [2
    numbers]}, …], and None; or [] and the name of the error.

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
    """Returns the points of a response, as OmniACT counts them: an item without a point stands for
    the centre of its box, and one without either for nothing."""
    text = answer_text(response)
    points: list = []
    for item in parse_json(text)[0][:MAX_OBJECTS] if text is not None else []:
        fields = item if isinstance(item, dict) else {}
        point, box = fields.get("point_2d"), fields.get("bbox_2d")
        if numbers(point, 2):
            points.append(point)
        elif numbers(box, 4):
            points.append(centre(box))
    return points


# --------------------------------------------------------------------------------------------------
# How like the truth a short answer is

def relaxed_match(answer: str, truth: str) -> bool:
    """Tells whether ChartQA's relaxed accuracy counts an answer: a number (a final % divides by
    100) may be 5 % off a true number other than 0; all else must be equal up to case."""
    def number(text: str) -> float | None:
        form = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,2})?)(%?)"
        found = re.fullmatch(form, text.strip().lower())
        return float(found[1]) / (100 if found[2] else 1) if found else None
    a, b = number(answer[:100]), number(truth)
    if a is not None and b:
        return abs(a - b) <= 0.05 * abs(b)
    return answer.strip().lower() == truth.strip().lower()


def edit_distance(a: str, b: str) -> int:
    """Returns Levenshtein's distance: insertions, deletions and substitutions of one character."""
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, line[0] = line[0], i
        for j, y in enumerate(b, 1):
            corner, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, corner + (x != y))
    return line[-1]


def anls(answer: str, truths: list[str]) -> float:
    """Returns DocVQA's normalised Levenshtein similarity: the best of 1 − distance / longer length
    over the accepted answers, or 0 if that is not above 0.5. At exactly 0.5 the formula (arXiv
    1907.00490) gives 0, while lmms-eval gives 0.5. Case and runs of blanks do not count."""
    def similarity(truth: str) -> float:
        a, b = (" ".join(text.lower().split())[:1000] for text in (answer, truth))
        s = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
        return s if s > 0.5 else 0.0
    return max(map(similarity, truths))

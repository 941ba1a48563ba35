"""Labels: a cell of a data set → the answer, as text that the rewards take; and that text read
back. Each reader raises ValueError, which says why the cell cannot be a label."""
import ast
import json
import math
import re
import unicodedata
from collections import Counter

from support.answers import MAX_CHARACTERS, MAX_DEPTH, boxed, final_text, numbers, parse_json
from support.math_answers import letter_of

def scalar_text(value, what: str = "answer") -> str:
    """Returns text or a number as text."""
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
        wrong = f"has more than {MAX_CHARACTERS:,} characters" if text else "is empty"
        raise ValueError(f"the {what} {wrong}")
    return text


def bare(text: str) -> str:
    """Returns the text of a label without a thought in front of it and <answer> tags around it."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the solution has more than {MAX_CHARACTERS:,} characters")
    text = final_text(text)
    if re.search("</?(answer|think)>", text):
        raise ValueError(f"a tag without its other half: {text[:100]!r}")
    return text


def listed(text: str) -> list | str:
    """Returns the list of which this is the text, as JSON or as Python writes it; else the text."""
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
    """Returns text as it is, anything else as JSON: for a task that says nothing of its labels."""
    if choices:
        raise ValueError("the task knows no choices; the task math does")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_boxes(value, choices) -> str:
    """Reads a list of {"bbox_2d": …, "point_2d": …}, as such or as JSON text; or [x1, y1, x2, y2],
    or a list of these, whose points are their centres."""
    if choices:
        raise ValueError("the answers are boxes; only the task math knows choices")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("the solution is empty")
        value, error = parse_json(bare(value))
        if error:
            raise ValueError("the solution is " + {
                "bad_json": "not JSON", "not_a_list": "JSON, but no list of objects",
                "too_deep": f"nested more than {MAX_DEPTH} deep"}[error])
    if not isinstance(value, list):
        raise ValueError(f"the solution is a {type(value).__name__}, no list of objects")
    if len(value) > 1 and not isinstance(value[0], (list, dict)):
        value = [value]
    items = []
    for number, item in enumerate(value, 1):
        if isinstance(item, list):
            if not numbers(item, 4):
                raise ValueError(f"item {number}: a box must be 4 numbers, [x1, y1, x2, y2]; it is "
                                 f"{item!r:.100}")
            item = {"bbox_2d": item, "point_2d": [(item[0] + item[2]) / 2, (item[1] + item[3]) / 2]}
        if not isinstance(item, dict):
            raise ValueError(f"item {number}: it is {item!r:.100}, not an object with bbox_2d and "
                             "point_2d")
        for key, count in (("bbox_2d", 4), ("point_2d", 2)):
            if item.get(key) is None:
                raise ValueError(f"item {number}: {key} is missing")
            if not numbers(item[key], count):
                raise ValueError(f"item {number}: {key} must be {count} numbers, it is "
                                 f"{item[key]!r:.100}")
        box = item["bbox_2d"]
        if box[0] > box[2] or box[1] > box[3]:
            raise ValueError(f"the box {box} is inverted; it must be [x1, y1, x2, y2] with "
                             "x1 ≤ x2 and y1 ≤ y2")
        items.append(item)
    if items and all(0 <= c <= 1 for item in items for c in item["bbox_2d"]):
        raise ValueError(f"relative coordinates: all lie in 0 … 1, as in {items[0]['bbox_2d']}; "
                         "boxes must be in the picture's own pixels")
    return json.dumps(items)


def choice_texts(choices) -> list[str]:
    """Returns the texts of a multiple choice, without the letters in front of them."""
    if isinstance(choices, str):
        choices = listed(choices.strip())
    if isinstance(choices, dict) and choices.keys() == {"text", "label"}:       # as in ARC
        choices = dict(zip(choices["label"], choices["text"]))
    if isinstance(choices, dict):
        # Parquet gives all rows the letters of the longest.
        while choices and list(choices.values())[-1] is None:
            choices.popitem()
        if list(choices) != [chr(ord("A") + i) for i in range(len(choices))]:
            raise ValueError(f"the choices are a record of {', '.join(map(str, choices))}; it must "
                             "be of A, B, C, …")
        choices = list(choices.values())
    if not isinstance(choices, list) or not 1 <= len(choices) <= 26:
        raise ValueError(f"the choices must be a list of at most 26, they are {choices!r:.100}")
    texts = [scalar_text(choice, f"choice {chr(ord('A') + i)}") for i, choice in enumerate(choices)]
    lettered = [re.fullmatch(rf"\(?{chr(ord('A') + i)}\s*[).:]\s*(.+)", text, re.DOTALL)
                for i, text in enumerate(texts)]
    return [match[1] for match in lettered] if all(lettered) else texts


def choice_of(value, texts: list[str], are_text: bool) -> str:
    """Returns the text of the choice that an answer means by its text, or by its letter with or
    without the text. A whole number that is none of the choices counts them from 0, as ClassLabel
    does."""
    answer = scalar_text(value)
    if isinstance(value, (int, float)) and answer.lstrip("-").isdecimal():
        index = int(answer)
        if answer in texts and are_text and 0 <= index < len(texts) and texts[index] != answer:
            raise ValueError(f"the answer {answer} is one of the choices, and the number of "
                             f"another, {texts[index]!r}; write it as text")
        if answer not in texts and not 0 <= index < len(texts):
            raise ValueError(f"the answer {answer} is none of the {len(texts)} choices, counted "
                             f"from 0: {texts}")
        return answer if answer in texts else texts[index]
    answer = unboxed(bare(answer))
    same = [text for text in texts if text == answer]
    same = same or [text for text in texts if text.casefold() == answer.casefold()]
    at = letter_of(answer)
    if not same and at is not None and at < len(texts):
        rest = re.sub(r"^\(?[A-Za-z]\s*[).:]?\s*", "", answer)
        wrapped = not re.match(r"\(?[A-Za-z]", answer)
        if not rest or rest.casefold() == texts[at].casefold() or wrapped:
            same = [texts[at]]
    if not same:
        raise ValueError(f"the answer {answer!r:.100} is none of the choices {texts!r:.200}, nor "
                         "the letter of one")
    return same[0]


def unboxed(text: str) -> str:
    r"""Returns a math label without \boxed{…} or $…$ around it; of a worked solution what it boxes
    last.

    >>> unboxed(r"so \boxed{\frac12}"), unboxed("$x$")
    ('\\frac12', 'x')
    """
    text = boxed(text) or text
    whole = re.fullmatch(r"\$([^$]+)\$|\\\((.+)\\\)", text)
    return (whole[1] or whole[2]).strip() if whole else text


def read_math(value, choices) -> str:
    """Reads text or a number. With choices the answer is JSON, {"answer": text, "choices": [text,
    …]}."""
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
    label = {"answer": choice_of(value, texts, are_text), "choices": texts}
    return json.dumps(label, ensure_ascii=False)


def read_accepted(value, choices) -> str:
    """Reads text or a number. A list of accepted ones (also as text, also of {"answer": …}) becomes
    a JSON list, the most frequent first: that one is y."""
    if choices:
        raise ValueError("the task knows no choices; the task math does")
    if isinstance(value, str):
        value = listed(bare(value))
    texts, many = [], isinstance(value, list)
    for one in value if many else [value]:
        if isinstance(one, dict) and len(keys := one.keys() & {"answer", "text"}) == 1:
            one = one[keys.pop()]
        several = one if isinstance(one, list) and not many else [one]
        texts += [scalar_text(each, "solution") for each in several]
    if not texts:
        raise ValueError("the list of accepted answers is empty")
    texts = [text for text, _ in Counter(texts).most_common()]
    as_list = many or len(texts) > 1 or texts[0].startswith('["')
    return json.dumps(texts, ensure_ascii=False) if as_list else texts[0]


def read_choices(answer: str) -> tuple[str, list[str]]:
    """Returns the answer of a math label that read_math made, and its choices."""
    if not answer.startswith("{\"answer\""):
        return answer.strip(), []
    label = json.loads(answer)
    return label["answer"].strip(), label["choices"]


def accepted(truth: str) -> list[str]:
    """Returns all accepted texts of a label that read_accepted made."""
    return json.loads(truth) if truth.startswith("[\"") else [truth]

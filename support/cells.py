"""Cells of a data set: a chat → its turns; a label → the answer, as text that the rewards take; and
that text read back. Each reader raises ValueError, which says why the cell cannot be read."""
import ast
import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from decimal import Decimal

from support.answers import MAX_CHARACTERS, MAX_DEPTH, boxed, final_text, numbers, parse_json
from support.boxes import centre
from support.files import nesting_depth
from support.math_answers import letter_of, undollared

BOX_NAMES, POINT_NAMES = ("bbox_2d", "bbox", "box"), ("point_2d", "point")
ROLES = {"system": "system turn", "user": "question", "human": "question", "assistant": "answer",
         "gpt": "answer", "model": "answer"}


def turns_in(cell) -> dict[str, str] | None:
    """Returns the system turn, question and answer of a chat, those that it has, or None if the
    cell is none. A picture is <image> where its part stands. A chat is a list of {"role": …,
    "content": …}, {"from": …, "value": …} or {"user": …, "assistant": …}, or the text of one.

    >>> turns_in([{"from": "human", "value": "<image>1+2?"}, {"from": "gpt", "value": "3"}])
    {'question': '<image>1+2?', 'answer': '3'}
    """
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        cell = listed(cell.strip())
    turns: list[tuple] = []
    for turn in [cell] if isinstance(cell, dict) else cell if isinstance(cell, list) else []:
        if not isinstance(turn, dict):
            return None
        if role := turn.get("role") or turn.get("from"):
            turns.append((role, turn.get("content", turn.get("value"))))
        elif {ROLES.get(name.lower()) for name in turn} >= {"question", "answer"}:
            turns += [(name, text) for name, text in turn.items()
                      if name.lower() in ROLES and text is not None]
    kinds = [ROLES.get(str(role).lower()) for role, _ in turns]
    if kinds != [kind for kind in dict.fromkeys(ROLES.values()) if kind in kinds]:
        shown = ", ".join(f"{role}"[:20] for role, _ in turns[:6]) + ", …" * (len(turns) > 6)
        raise ValueError(f"a chat of {len(turns)} turns ({shown}); a row may have one question and "
                         "one answer, and a system turn before them: make a row of each question")
    return {kind: text_of(content, kind) for kind, (_, content) in zip(kinds, turns) if kind} or None


def text_of(content, what: str) -> str:
    """Returns the content of a turn as text. what: the turn, for the sentence."""
    text = ""
    for part in content if isinstance(content, list) else [{"text": content}]:
        part = part if isinstance(part, dict) else {"type": f"{type(part).__name__} without a type"}
        kind = str(part.get("type", "text"))
        said = {"image": "<image>", "text": part.get("text")}.get(kind)
        if not isinstance(said, str):
            wrong = "has no text" if kind == "text" else f"is {kind[:100]!r}"
            raise ValueError(f'a part of the {what} {wrong}; parts are {{"type": "text", "text": '
                             '…} and {"type": "image"}')
        text += said
    return text


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
        text = format(Decimal(repr(int(value) if value == int(value) else value)), "f")     # no 1e-05
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


def listed(text: str, brackets: tuple[str, ...] = ("[]",)):
    """Returns the list (or, with other brackets, record) whose text this is, as JSON or as Python
    writes it; else the text. Only constants are evaluated, and nothing that is long or deep.

    >>> listed("[{'a': (1, None)}]"), listed("[f(1)]"), listed("[sic]")
    ([{'a': [1, None]}], '[f(1)]', '[sic]')
    """
    if (text[:1] + text[-1:] not in brackets or len(text) > MAX_CHARACTERS
            or nesting_depth(text) > MAX_DEPTH):
        return text
    for read in (json.loads, ast.literal_eval):
        if read is ast.literal_eval and re.search(r"""['"]\s+['"]""", text):
            raise ValueError(f"a list without commas: {text[:100]!r}")
        try:
            with warnings.catch_warnings(action="ignore"):      # of odd escapes
                value = json.loads(json.dumps(read(text)))      # tuples become lists
            return value if isinstance(value, (list, dict)) else text
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


def read_plain(value, choices) -> str:
    """Returns text as it is, anything else as JSON: for a task that says nothing of its labels."""
    if choices:
        raise ValueError("the task knows no choices; the task math does")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def items_in(value) -> list[dict]:
    """Returns the objects in a cell of boxes, [{"bbox_2d": …}, …], as the data has them, and the
    point_2d of those that have one. A cell is a list of such objects or of boxes, or one of
    either; or text of these, as JSON or as Python writes it, in a fence, in <answer>."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("the solution is empty")
        text = bare(value)
        if len(fenced := text.split("```")) == 3:
            text = re.sub(r"^\w+", "", fenced[1]).strip()
        value, error = parse_json(text, list_only=False)
        if error == "bad_json" and (python := listed(text, ("[]", "{}", "()"))) != text:
            value, error = python, None
        if error:
            raise ValueError("the solution is " + (
                "not JSON" if error == "bad_json" else f"nested more than {MAX_DEPTH} deep"))
    if isinstance(value, dict) and (box := named(value, BOX_NAMES)) is not None:
        several = isinstance(box, list) and all(isinstance(each, list) for each in box)
        value = box if several else [value]
    if not isinstance(value, list):
        raise ValueError(f"the solution is a {type(value).__name__}, no list of objects")
    if len(value) > 1 and not isinstance(value[0], (list, dict)):
        value = [value]
    items = []
    for number, item in enumerate(value, 1):
        item = {"bbox_2d": item} if isinstance(item, list) else item
        if not isinstance(item, dict):
            raise ValueError(f"item {number}: it is {item!r:.100}, not an object with bbox_2d")
        box, point = named(item, BOX_NAMES), named(item, POINT_NAMES)
        if box is None:
            raise ValueError(f"item {number}: bbox_2d is missing")
        for name, found, count in (("bbox_2d", box, 4), ("point_2d", point, 2)):
            if found is not None and not numbers(found, count):
                raise ValueError(f"item {number}: {name} must be {count} numbers, it is "
                                 f"{found!r:.100}")
        items.append({"bbox_2d": box} if point is None else {"bbox_2d": box, "point_2d": point})
    if items and all(0 <= c <= 1 for item in items for c in item["bbox_2d"]):
        raise ValueError(f"relative coordinates: all lie in 0 … 1, as in {items[0]['bbox_2d']}; "
                         "give pixels, or thousandths with --box-units thousandths")
    return items


def named(item: dict, names: tuple[str, ...]):
    """Returns the first field of these names that holds something."""
    return next((item[name] for name in names if item.get(name) is not None), None)


def read_boxes(value, choices) -> str:
    """Reads a cell of boxes [x1, y1, x2, y2] (`items_in`). A point is the centre of its box if the
    data has none."""
    if choices:
        raise ValueError("the answers are boxes; only the task math knows choices")
    return json.dumps([{"bbox_2d": box, "point_2d": item.get("point_2d", centre(box))}
                       for item in items_in(value) for box in [item["bbox_2d"]]])


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
    answer = bare(answer)
    same = [text for text in texts if text == answer]
    answer = unboxed(answer)
    same = same or [text for text in texts if answer in (text, undollared(text))]
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
    return undollared(boxed(text) or text)


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
        if isinstance(several := listed(text), list) and any(isinstance(one, str) for one in several):
            raise ValueError(f"the answer is a list of texts, {text:.100}; the task vqa has several answers, math one")
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

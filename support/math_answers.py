"""Whether two answers to a question of mathematics say the same: letters of choices, words, numbers
with units; all else by value (support/verify_math.py)."""
import functools
import re
import unicodedata
from collections.abc import Sequence

from support.verify_math import same_value

WRAPPED = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|sf)|boldsymbol|mbox|ce)\s*\{([^{}]*)\}"
# What math-verify reads as LaTeX alone: sin(x), √2, √(x+1), 2·3, ∞.
SIGNS = ((r"(?<![\\A-Za-z])(sin|cos|tan|log|ln)(?=\s*[\d(])", r"\\\1"),
         (r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])))", r"\\sqrt{\1\2}"),
         (r"[·⋅](?![A-Za-z]{2})", r"\\cdot "), ("∞", r"\\infty "))
RAISED, LOWERED, PARTS = "[⁰¹²³⁴-⁹⁺⁻]+", "[₀-₉]+", "[¼-¾⅐-⅞]"


def plain_value(text: str) -> str:
    r"""Returns a math answer without what says nothing of its value: blanks, a final full stop, a
    leading \approx, a degree sign at the end, \text{…} around it. Raised, full-width and other
    alphabets' digits become 0 … 9.

    >>> tuple(map(plain_value, ("41.2.", "8.4°", r"\approx 4.81", r"\text{ Yes }")))
    ('41.2', '8.4', '4.81', 'Yes')
    >>> plain_value("x²"), plain_value("1½"), plain_value("٣٤")
    ('x^{2}', '1\\frac{1}{2}', '34')
    """
    usual = functools.partial(unicodedata.normalize, "NFKC")
    text = re.sub(PARTS, lambda part: r"\frac{%s}{%s}" % tuple(usual(part[0]).split("⁄")), text)
    for form, mark in ((RAISED, "^"), (LOWERED, "_")):
        text = re.sub(form, lambda digits: f"{mark}{{{usual(digits[0])}}}", text)
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), usual(text))
    for pattern, latex in SIGNS:
        text = re.sub(pattern, latex, text)
    text = re.sub(r"^\s*([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)(?=\s|$)", r"\1\\times 10^{\2}", text)
    text = re.sub(r"^(\\approx|≈)", "", text.strip().replace("−", "-")).strip()
    text = re.sub(r"(°|\^\{?\\circ\}?)$", "", text.removesuffix(".").strip()).strip()
    words = re.fullmatch(WRAPPED, text)
    return words[1].strip() if words else text


def undollared(text: str) -> str:
    """Returns a text without $…$ or \\(…\\) around all of it."""
    whole = re.fullmatch(r"\s*(?:\$([^$]+)\$|\\\(((?:(?!\\\)).)+)\\\))\s*", text)
    return (whole[1] or whole[2]).strip() if whole else text


def letter_of(text: str) -> int | None:
    r"""Returns the number, from 0, of the choice whose letter a text names, or None: B, (B), B., B:
    or "B. 4 cm", in LaTeX too (\text{B}, \textbf{(B)}, $B$). What goes on
    with another letter, as "(A) or (B)" does, names none.

    >>> letter_of("B"), letter_of(r"\textbf{(c)} 4 cm"), letter_of("Bees")
    (1, 2, None)
    """
    inner, text = None, text.replace("$", "").replace("**", "")
    while inner != text:                # a wrapping may hold another
        inner, text = text, re.sub(WRAPPED, r"\1", text)
    letter = re.match(r"\s*\(?\s*([A-Za-z])\s*(?:[):]|\.(?![A-Za-z]\.?$)|$)"    # not a.m.
                      r"(?!\s*(?:or\b|and\b|[,/&])\s*\(?[A-Za-z]\b|\s*\(?[A-Za-z]\))", text)
    return ord(letter[1].upper()) - ord("A") if letter else None


LETTER, FOREIGN = r"[^\W\d_]", r"[^\W\d_A-Za-zͰ-Ͽ]"    # any; neither a … z nor Greek
# The first of each stands for the others. math-verify drops a unit behind a number, whatever it is.
UNITS = {name: names.split()[0] for names in (
    "s sec second", "min minute", "h hr hour", "d day", "wk week", "mo month", "y yr year", "am",
    "pm", "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre",
    "km kilometer kilometre", "in inche", "ft foot feet", "yd yard", "mi mile", "mg milligram",
    "g gram gm", "kg kilogram kilo", "lb pound", "oz ounce", "ml milliliter millilitre",
    "L l liter litre", "deg degree", "sq square", "cu cubic", "/ per", "mi/h mph",
    "km/h kmh kmph kph", "st", "nd", "rd", "th", "unit", "N newton", "J joule", "W watt", "kW kilowatt", "V volt",
    "A amp ampere", "Hz hertz", "Pa pascal", "K kelvin", "C celsius", "F fahrenheit") for name in names.split()}


def unit_name(word: str) -> str:
    """Returns one name for all spellings of a unit. A single letter keeps its case, as a variable
    does."""
    name = word.casefold() if len(word) > 2 or word.casefold() in UNITS and len(word) == 2 else word
    one = name.removesuffix("s") if len(name) > 2 else name
    return UNITS.get(name) or UNITS.get(one, one)


def quantity(text: str) -> tuple[str, str] | None:
    """Returns the value and the unit of a number with letters behind it, or None. Letters that may
    be a product of variables are sorted.

    >>> quantity("7:30 p.m."), quantity("2 cm^2"), quantity("3yx"), quantity("2+3i")
    (('7:30', 'pm'), ('2', 'sqcm'), ('3', 'xy'), None)
    """
    found = re.fullmatch(rf"(.*(?:[\d)}}\]%]|\\pi))(\s*°?\s*)({LETTER}(?:{LETTER}|[\s./'])*?)"
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
    """Tells whether a text is compared as words. It is, if it has no mark of a formula and holds a
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
    r"""Returns a text without LaTeX's wrappings, the digits of chemistry in line: \text{H}_2O is
    H2O."""
    text = re.sub(r"\\([$&%#])", r"\1", re.sub(r"\^\{?\\circ\}?", "°", text))
    text = re.sub(r"([A-Z][a-z]?\}?)_(?:(\d+)|\{(\d+)\})", r"\1\2\3", text)
    text = re.sub(r"\\[ ,;:!]|\\q?quad|~", " ", re.sub(WRAPPED, r"\1", text))
    return " ".join(text.replace(r"\angle", "∠").replace(r"\triangle", "△").split())


def math_equal(answer: str, truth: str, choices: Sequence[str] = ()) -> bool:
    """Tells whether two answers are the same text or the same value. With choices, a letter stands
    for its text (`letter_of`). Words are compared as words (`is_words`), up to case; numbers with
    something behind them by the number and by what that is (`quantity`; if only one answer has a
    unit, it does not count); all else by value, as LaTeX. To LaTeX words are products of their
    letters, which commute, so that "seY" would be "Yes" (and for that "ba" is not "ab" here). Lists
    have no order."""
    answer, truth, *choices = map(undollared, (answer, truth, *choices))
    at = letter_of(answer)
    if not choices and at is not None and re.fullmatch(r"\(?[A-Z][).]?", truth.strip()) and answer.strip()[1:2]:
        return at == letter_of(truth)       # the choices stand in the question
    if answer.strip() not in choices and at is not None and at < len(choices):
        answer = choices[at]
    if len(same := [text for text in choices if text.casefold() == answer.strip().casefold()]) == 1:
        answer = same[0]        # the prompt shows the choices in lower case
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
    if found := one or other:           # the unit of one alone does not count
        (value, unit), line, number = found, lines[0] if one else lines[1], b if one else a
        apart, known = line.removeprefix(value)[:1] in " °", re.sub("^(sq|cu)", "", unit) in UNITS.values()
        if apart and (known or len(unit) > 2) or known and len(unit) > 1:
            return same_value(value, number)
    return a == b or same_value(a, b)

"""rewards.py against hand-worked totals, a slow second implementation, and text that no model should write."""
import contextlib
import decimal
import doctest
import itertools
import json
import math
import random
import re
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rewards
from rewards import (TASKS, Reward, accuracy, chart_reward, document_reward, grounding_reward, label_reward, label_text,
                     math_reward, non_repeat, read_label, score, smooth, user_text, vqa_reward)
from support import answers, cells, files, math_answers, verify_math
from support.answers import (anls, answer_text, boxed, edit_distance, has_thinking_format, parse_boxes, parse_points,
                             relaxed_match, trailing_text)
from support.boxes import iou_matrix
from support.math_answers import letter_of, math_equal
from support.mistakes import Mistake

ERRORS = {"no_answer", "too_long", "too_deep", "bad_json", "not_a_list", "not_an_object", "no_bbox_2d", "no_point_2d",
          "bad_bbox_2d", "bad_point_2d"}
THINK = "<think>They differ in colour.</think>"
CAT = {"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}
DOG = {"bbox_2d": [225, 296, 706, 786], "point_2d": [302, 410]}
GHOST = {"bbox_2d": [700, 10, 720, 30], "point_2d": [710, 20]}  # overlaps neither

ROOT = Path(__file__).resolve().parent.parent


def answer(*items):
    return f"<answer>{json.dumps(items)}</answer>"


def total(response, *truth):
    return grounding_reward(response, json.dumps(truth)).total


def one_pair(box, point, true_box, true_point):
    return accuracy([{"bbox_2d": box, "point_2d": point}], [{"bbox_2d": true_box, "point_2d": true_point}])


# ---------------------------------------------------------------------------------------------------------------------
# Totals of the released scorer (docs/paper.md, section 4) and the repaired empty answers

@pytest.mark.parametrize("response, truth, expected", [
    (THINK + answer(CAT), [CAT], 7),
    (answer(CAT), [CAT], 6),
    (json.dumps([CAT]), [CAT], 1),                          # bare JSON: only non-repeat
    (THINK + answer(CAT, GHOST), [CAT], 5.5),               # two boxes for one truth, one of them perfect
    (THINK + answer(CAT), [CAT, DOG], 5.5),                 # one box for two
    (THINK + answer(DOG, CAT), [CAT, DOG], 7),              # order is free
    (THINK + answer(GHOST), [CAT], 4),                      # well-formed and wrong
    (THINK + answer(), [], 7),
    (answer(), [], 6),
    (THINK + answer(CAT), [], 4),                           # hallucinated: accuracy 0
    (answer(CAT), [], 3),
    (THINK + answer(), [CAT], 2),                           # missed: `[]` is no format to be paid for, as released
    ("", [CAT], 1), ("", [], 1)])
def test_reference_totals(response, truth, expected):
    assert total(response, *truth) == expected


@pytest.mark.parametrize("response, truth", [(answer(), [CAT]), (answer(CAT), []), (answer(CAT, DOG), [])])
def test_exactly_one_side_empty_has_no_accuracy(response, truth):
    for prefix in ("", THINK):
        reward = grounding_reward(prefix + response, json.dumps(truth))
        assert reward.terms["accuracy"] == 0 and reward.error is None


def test_an_unreadable_answer_is_no_correct_rejection():
    for response in ("no such object", "<answer>", "<answer></answer>", "<answer>none</answer>", "<answer>{}</answer>"):
        reward = grounding_reward(response, "[]")
        assert reward.terms["accuracy"] == reward.terms["answer_format"] == 0 and reward.error


@pytest.mark.parametrize("response, expected", [
    ("<think></think><answer></answer>", True),
    ("<think>a\nb</think> \n\t<answer>x</answer>", True),
    ("<think>a</think>b</think><answer>x</answer> <answer>y</answer>", True),   # lazy dots still cross tags
    ("<think>a</think>.<answer>x</answer>", False),
    (" <think>a</think><answer>x</answer>", False),                            # the whole response
    ("<think>a</think><answer>x</answer>\n", False),
    ("<answer>x</answer><think>a</think>", False),
    ("<think>a</think><answer></think>", False),
    ("<think></answer>", False), ("<answer>x</answer>", False), ("", False)])
def test_thinking_format(response, expected):
    assert has_thinking_format(response) is expected


@pytest.mark.parametrize("text, expected", [
    ('[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}]', 2),
    ('[{"bbox_2d": [1, 2, 3, 4]}]', 1),
    ('[{"bbox_2d": [1, 2, 3], "point_2d": [1, 2, 3]}]', 0),
    ('[{"bbox_2d": {"0": 1, "1": 1, "2": 1, "3": 1}, "point_2d": "ab"}]', 0),  # of the right length, but no lists
    ('[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}, {"point_2d": [1, 2]}, {}]', 1),
    ('{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}', 0),
    ('[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}, 5]', 1), ("[1, 2]", 0), ("[[]]", 0), ("[]", 2), ("", 0)])
def test_answer_format(text, expected):
    assert grounding_reward(f"<answer>{text}</answer>", "[]").terms["answer_format"] == expected


def test_answer_is_the_first_one():
    assert answer_text("</answer> <answer> \n[1] </answer><answer>[2]</answer>") == "[1]"
    assert answer_text("<answer>[1] <answer>[2]</answer>") == "[1] <answer>[2]"
    assert answer_text("</answer><answer>[1]") is answer_text("[1]") is None


def test_what_text_behind_an_answer_costs():
    """With the authors the thinking format alone. In the built-in world the format of the answer too."""
    plain, thought = "<answer>[]</answer>", "<think>No.</think><answer>[]</answer>"
    tail = ' be found.</think><answer>[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}]</answer>'
    assert trailing_text(plain + " \n") == trailing_text("</answer> [1]") == trailing_text("<answer>[1]") == ""
    assert trailing_text(plain + tail) == tail.strip()
    assert [grounding_reward(text, "[]").total for text in (plain, plain + tail)] == [6, 6]
    assert [grounding_reward(text, "[]").total for text in (thought, thought + ".")] == [7, 6]
    assert [score("scene_grounding", text, "[]").total
            for text in (plain, plain + " \n", plain + tail, thought, thought + ".")] == [6, 6, 4, 7, 4]


def test_non_repeat():
    assert non_repeat("A cat. A dog. A cat. ") == 1             # one repeat is allowed
    assert non_repeat("A cat. A dog. A cat . A dog") == 0       # two are not, blanks aside
    assert non_repeat("A cat. A cat. A cat.") == 0
    assert non_repeat("...... . .") == 1                        # empty sentences do not count
    assert non_repeat("1.5 1.5 1.5 1.5") == 1                   # a point within a number ends no sentence …
    assert non_repeat("It is 5. It is 5. It is 5.") == 0        # … one behind a number does


def test_a_label_with_decimals_is_paid_in_full():
    """Split at every '.', "5, 20", "5, 30" and so on would repeat each other: r(y) = 5."""
    stored = json.dumps([{"bbox_2d": [10.5, 20.5, 30.5, 40.5], "point_2d": [20.5, 30.5]}] * 2)
    assert label_reward("grounding", label_text("grounding", stored, "spaced"), stored).total == 6


@pytest.mark.parametrize("other, share", [("5", 1), ("null", 1), ('"bbox_2d"', 1), ("[1, 2, 3, 4]", 1), ("{}", 1)])
def test_an_item_that_is_no_object_earns_no_format(other, share):
    good = json.dumps(CAT)
    for text in (f"[{good}, {other}]", f"[{other}, {good}]"):
        for truth in ([CAT], []):
            reward = grounding_reward(f"<answer>{text}</answer>", json.dumps(truth))
            assert (reward.terms["answer_format"], reward.terms["accuracy"]) == (share, 0) and reward.error


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy: cells and matching

@pytest.mark.parametrize("a, b, expected", [
    ([0, 0, 9, 9], [0, 0, 9, 9], 1),
    ([3, 3, 3, 3], [3, 3, 3, 3], 1),                    # one pixel is an area of 1
    ([0, 0, 9, 9], [5, 0, 14, 9], 50 / 150),            # 4 · 9 / 126 if pixels were not inclusive
    ([0, 0, 9, 9], [9, 9, 18, 18], 1 / 199),            # they share the corner pixel
    ([0, 0, 9, 9], [10, 0, 19, 9], 0),
    ([0, 0, 9, 9], [20, 20, 29, 29], 0),                # apart on both axes: two negative overlaps are no area
    ([0, 0, 99, 99], [10, 20, 29, 29], 200 / 10000),
    ([9, 9, 0, 0], [0, 0, 9, 9], 0), ([1, 1, 0, 0], [1, 1, 0, 0], 0)])   # inverted, and 0 / 0
def test_iou_by_hand(a, b, expected):
    for first, second in ((a, b), (b, a)):
        assert iou_matrix(np.array([first], float), np.array([second], float)) == pytest.approx(expected, abs=1e-15)


def test_iou_matrix_is_predictions_by_truths():
    a, b = np.array([[0, 0, 9, 9], [5, 0, 14, 9.]]), np.array([[0, 0, 9, 9], [5, 0, 14, 9], [50, 50, 59, 59.]])
    np.testing.assert_allclose(iou_matrix(a, b), [[1, 1 / 3, 0], [1 / 3, 1, 0]])


@pytest.mark.parametrize("box, true_box, expected", [
    ([0, 0, 199, 99], [0, 0, 199, 199], 0),         # IoU exactly 0.5
    ([0, 0, 199, 100], [0, 0, 199, 199], 1),        # 101 / 200; the corners are 24.75 px off
    ([10, 10, 15, 15], [0, 0, 5, 5], 0),            # corners exactly 10 px off
    ([10, 10, 15, 14], [0, 0, 5, 5], 1),            # 9.75 px on average
    ([0, 0, 5, 44], [0, 0, 5, 5], 1),               # 39 / 4: the mean of the four counts, not the largest
    ([9, 0, 99, 99], [0, 0, 99, 99], 2)])
def test_box_thresholds(box, true_box, expected):
    assert one_pair(box, [-500, -500], true_box, [500, 500]) == expected


@pytest.mark.parametrize("point, true_point, expected", [
    ([30, 0], [0, 0], 0), ([29.99, 0], [0, 0], 1),              # closer than 30 px
    ([18, 24], [0, 0], 0), ([18, 23], [0, 0], 1),               # as the crow flies
    ([0, 0], [0, 0], 1), ([50, 25], [50, 25], 1),               # corners are inside
    ([51, 25], [50, 25], 0), ([50, 26], [50, 25], 0), ([-1, 0], [0, 0], 0), ([0, -1], [0, 0], 0)])
def test_point_thresholds(point, true_point, expected):
    # the true box is elsewhere, so that only the point can score: it must lie in its own box, not in the true one
    assert one_pair([0, 0, 50, 25], point, [500, 500, 600, 600], true_point) == expected
    assert one_pair([700, 700, 750, 725], point, [0, 0, 50, 25], true_point) == 0


@pytest.mark.parametrize("box, point, expected", [
    ([20, 20, 59, 59], [40, 40], 3), ([25, 20, 59, 59], [40, 40], 3), ([26, 20, 59, 59], [40, 40], 2),   # 5/4, 6/4 px
    ([20, 20, 59, 59], [43, 42], 3), ([20, 20, 59, 59], [44, 40], 2)])                                   # 3.6, 4 px
def test_limits_shrink_with_the_picture(box, point, expected):
    """In 112×112 pixels the corners must be closer than 10 · 112 / 840 = 4/3 px, the points than 4 px."""
    item, truth = {"bbox_2d": box, "point_2d": point}, {"bbox_2d": [20, 20, 59, 59], "point_2d": [40, 40]}
    assert accuracy([item], [truth], 112) == expected and accuracy([item], [truth]) == 3
    reward = score("scene_grounding", answer(item), json.dumps([truth]))
    assert reward.terms["accuracy"] == expected


def test_matching_is_best_not_greedy():
    # cells: a-1 3, a-2 2, b-1 2, b-2 0. Taking the best cell first ends with 3 + 0; the best matching is 2 + 2
    one = a = {"bbox_2d": [20, 20, 79, 79], "point_2d": [50, 50]}
    two, b = {"bbox_2d": [29, 29, 88, 88], "point_2d": [88, 88]}, {"bbox_2d": [11, 11, 70, 70], "point_2d": [12, 12]}
    assert [accuracy([p], [t]) for p in (a, b) for t in (one, two)] == [3, 2, 2, 0]
    assert accuracy([a, b], [one, two]) == accuracy([b, a], [one, two]) == 2.0


def test_one_truth_cannot_pay_twice():
    assert accuracy([CAT, CAT, CAT], [CAT]) == 1.0
    assert accuracy([CAT], [CAT, CAT]) == 1.5


def test_at_most_120_objects():
    many = [{"bbox_2d": [50 * i, 0, 50 * i + 9, 9], "point_2d": [50 * i, 0]} for i in range(130)]
    assert total(THINK + answer(*many), *many) == 7
    assert accuracy(many, many[:120]) == 3                                      # the last ten are not read
    assert accuracy(many, many[:1]) == pytest.approx(3 / 120)
    assert accuracy([many[125]], many) == 0 == accuracy(many, [many[125]])      # nor the last ten truths
    assert len(parse_boxes(answer(*many))[0]) == 120


# ---------------------------------------------------------------------------------------------------------------------
# The same reward, written a second time: slow, with the regular expressions of section 5

DIGITS = "0123456789"


def slow_list(item, key, count):
    return type(item) is dict and type(item.get(key)) is list and len(item[key]) == count


def slow_boxes(response):
    """The items of the answer, and the boxes that they make; None for what cannot be read."""
    found = re.search(r"<answer>\s*(.*?)\s*</answer>", response, re.DOTALL)
    try:
        items = json.loads(found.group(1)) if found else None
    except ValueError:
        return None, None
    if type(items) is not list:
        return None, None

    def numeric(item, key, count):
        return slow_list(item, key, count) and all(type(x) in (int, float) and -1e6 <= x <= 1e6 for x in item[key])
    readable = all(numeric(i, "bbox_2d", 4) and numeric(i, "point_2d", 2) for i in items)
    return items, items[:120] if readable else None


def slow_cell(prediction, truth):
    (x1, y1, x2, y2), (px, py) = prediction["bbox_2d"], prediction["point_2d"]
    (u1, v1, u2, v2), (qx, qy) = truth["bbox_2d"], truth["point_2d"]
    shared = max(0, min(x2, u2) - max(x1, u1) + 1) * max(0, min(y2, v2) - max(y1, v1) + 1)
    union = (x2 - x1 + 1) * (y2 - y1 + 1) + (u2 - u1 + 1) * (v2 - v1 + 1) - shared
    corners = (abs(x1 - u1) + abs(y1 - v1) + abs(x2 - u2) + abs(y2 - v2)) / 4
    inside = x1 <= px <= x2 and y1 <= py <= y2
    return (union > 0 and shared / union > 0.5) + (corners < 10) + (math.hypot(px - qx, py - qy) < 30 and inside)


def slow_accuracy(predicted, truth):
    if not predicted or not truth:
        return 3.0 * (predicted == truth)
    cells = [[slow_cell(p, t) for t in truth] for p in predicted]
    if len(cells) > len(cells[0]):
        cells = list(zip(*cells))
    matchings = itertools.permutations(range(len(cells[0])), len(cells))
    return max(sum(row[c] for row, c in zip(cells, columns)) for columns in matchings) / len(cells[0])


def slow_terms(response, truth):
    """An empty list is a well-formed answer to an empty truth only."""
    items, boxes = slow_boxes(response)
    counts = [slow_list(i, "bbox_2d", 4) + slow_list(i, "point_2d", 2) for i in items or []]
    seen, repeats = set(), 0
    marked = "".join("." if c == "." and (i == 0 or response[i - 1] not in DIGITS or response[i + 1:i + 2] not in DIGITS
                                          or i + 1 == len(response)) else "," if c == "." else c
                     for i, c in enumerate(response))      # a point within a number, to which "," is as good as any
    for sentence in filter(None, map(str.strip, marked.split("."))):
        repeats += sentence in seen
        seen.add(sentence)
    return {
        "thinks": float(re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", response, re.DOTALL) is not None),
        "answer_format": 0.0 if items is None else sum(counts) / len(counts) if counts else 0.0 if truth else 2.0,
        "accuracy": 0.0 if boxes is None else slow_accuracy(boxes, truth),
        "non_repeat": float(repeats < 2)}


def random_item(rng):
    x, y = rng.randrange(0, 120, 5), rng.randrange(0, 120, 5)
    w, h = rng.randrange(0, 100, 5), rng.randrange(0, 100, 5)
    return {"bbox_2d": [x, y, x + w, y + h], "point_2d": [x + rng.randrange(-5, w + 10, 5), y + h // 2]}


def jittered(item, rng):
    reach = rng.choice((0, 3, 10, 12, 20, 40))
    return {key: [c + rng.randint(-reach, reach) + rng.choice((0, 0, 0.5)) for c in item[key]] for key in item}


ODD_VALUES = (True, None, "7", 1e7, -1e6, 10**6, 10**6 + 1, 10**30, [], [1], {}, 3.5, math.nan, math.inf)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ODD_TEXT = (*TAGS, "[]", ".", ". A cat. A cat. A cat.", "\n", " ", "]", "[", "{", "}", '"', ",", "1e999", "NaN", "-",
            "0", "\\", "\u00a0", "\x1f", "\u2028")


def mutated(response, rng):
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(response) + 1)
        match rng.randrange(4):
            case 0: response = response[:at] + rng.choice(ODD_TEXT) + response[at:]
            case 1: response = response[:at] + response[at + rng.randint(1, 4):]
            case 2: response = response.replace(rng.choice((*TAGS, ", ", '"')), "", 1)
            case 3: response = response[:at] + response[at // 2:]   # says a part twice
    return response


def random_case(rng):
    """A response and its truth: near-misses of 0 … 6 objects, now and then one of them broken."""
    truth = [random_item(rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 5, 6)))]
    items = [jittered(t, rng) for t in truth if rng.random() < 0.85]
    items += [random_item(rng) for _ in range(rng.choice((0, 0, 0, 1, 2))) if len(items) < 5]
    rng.shuffle(items)
    data = items
    if items and rng.random() < 0.25:
        broken = rng.choice(items)
        key = rng.choice(("bbox_2d", "point_2d"))
        match rng.randrange(5):
            case 0: broken[key][rng.randrange(len(broken[key]))] = rng.choice(ODD_VALUES)
            case 1: broken[key] = rng.choice(([*broken[key], 1], broken[key][1:], rng.choice(ODD_VALUES)))
            case 2: del broken[key]
            case 3: items.append(rng.choice(ODD_VALUES))
            case 4: data = rng.choice((broken, {"objects": items}, None, "[]"))
    style = rng.choice(((", ", ": "), (",", ":")))
    response = f"<answer>{rng.choice(('', ' '))}{json.dumps(data, separators=style)}</answer>"
    return rng.choice(("", THINK, "<think>A. B. A. B.</think>\n", "Surely. ")) + response, truth


def test_equals_the_slow_reward():
    rng, seen = random.Random(0), set()
    for k in range(25_000):
        response, truth = random_case(rng)
        if k % 2:
            response = mutated(response, rng)
        reward, expected = grounding_reward(response, json.dumps(truth)), slow_terms(response, truth)
        assert reward.terms.keys() == expected.keys()
        assert all(abs(points - expected[term]) < 1e-12 for term, points in reward.terms.items()), (response, truth)
        assert (reward.error is None) == (slow_boxes(response)[1] is not None), response
        seen.add((reward.error, round(reward.total)))
    assert {error for error, _ in seen} == {None, *ERRORS} - {"too_long"}   # the search has been everywhere
    assert {points for _, points in seen} == set(range(8))


# ---------------------------------------------------------------------------------------------------------------------
# Anything at all

TRUTHS = [[], [CAT, DOG]]
FUZZ = (*ODD_TEXT, '"bbox_2d":', '"point_2d":', "\\boxed{", "1", "true", "null", "Infinity", "[[[[[[[[[", '{"a":')
NUMBERS = ("1", "2.5", "-0", "1e6", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "true", "null", '"3"', "[]",
           "{}", "9" * 400, "1e-999", '"\ud800"', '"\\ud800"', "01", "0x1", "+1")


def check_reward(response):
    """What holds for any text: no exception, bounded terms, and a name for whatever could not be read."""
    boxes, error = parse_boxes(response)
    assert error is None or boxes == []
    for truth in TRUTHS:
        reward = grounding_reward(response, json.dumps(truth))
        limits = {"thinks": 1, "answer_format": 2, "accuracy": 3, "non_repeat": 1}
        assert reward.terms.keys() == limits.keys()
        assert all(math.isfinite(reward.terms[name]) and 0 <= reward.terms[name] <= limits[name] for name in limits)
        if reward.error is None:
            assert error is None and (len(response) > 5000 or boxes == slow_boxes(response)[1])  # slow indeed
            assert len(boxes) <= 120 and all(np.isfinite([*b["bbox_2d"], *b["point_2d"]]).all() for b in boxes)
        else:
            assert reward.error in ERRORS and reward.terms["accuracy"] == 0
    assert math_reward(response, "2").total in (0.0, 0.1, 1.0)
    assert vqa_reward(response, "2").terms["accuracy"] in (0.0, 1.0)
    return error


def fuzz_text(rng):
    match rng.randrange(5):
        case 0: return rng.randbytes(rng.randrange(60)).decode("latin-1")
        case 1:  # lone surrogates included
            pick = lambda: rng.randrange(*rng.choice(((0x80,), (0x110000,), (0xD800, 0xE000))))  # noqa: E731
            return "".join(chr(pick()) for _ in range(rng.randrange(30)))
        case 2: return "<answer>" + "".join(rng.choice(FUZZ) for _ in range(rng.randrange(25))) + "</answer>"
        case 3: return mutated(random_case(rng)[0], rng)
        case 4:
            c = [rng.choice(NUMBERS) if rng.random() < 0.3 else str(rng.randrange(840)) for _ in range(6)]
            return f'<answer>[{{"bbox_2d":[{",".join(c[:4])}],"point_2d":[{",".join(c[4:])}]}}]</answer>'


def test_fuzz():
    rng, errors = random.Random(7), {}
    start = time.process_time()
    for _ in range(20_000):
        error = check_reward(fuzz_text(rng))
        errors[error] = errors.get(error, 0) + 1
    assert time.process_time() - start < 30  # it takes 6
    assert errors.keys() == {None, *ERRORS} - {"too_long"} and errors[None] > 1000


def test_odd_numbers_are_no_coordinates():
    for number in ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "true", "false", "null", '"1"', "[1]", "1000001"):
        for key, text in (("bbox_2d", f'[{{"bbox_2d": [1, 2, 3, {number}], "point_2d": [1, 2]}}]'),
                          ("point_2d", f'[{{"bbox_2d": [1, 2, 3, 4], "point_2d": [{number}, 2]}}]')):
            reward = grounding_reward(f"<answer>{text}</answer>", json.dumps([CAT]))
            # the lists have the right lengths, which is all that the format asks
            assert (reward.error, reward.total) == (f"bad_{key}", 3), text
    for number in ("9" * 400, "9" * 10_000):  # the second has more digits than Python reads
        assert parse_boxes(f'<answer>[{{"bbox_2d": [1, 2, 3, {number}], "point_2d": [1, 2]}}]</answer>')[1] is not None
    assert parse_boxes('<answer>[{"bbox_2d": [-1e6, -0.0, 1e-999, 1000000], "point_2d": [1, 2]}]</answer>')[1] is None


def long_texts(n):
    """Texts of about n characters that would hurt a backtracking, quadratic or recursive reader."""
    item, inside = '{"bbox_2d":[0,0,0,0],"point_2d":[0,0]},', lambda text: f"<answer>{text}</answer>"
    rng = random.Random(0)
    crowd = ",".join(json.dumps(random_item(rng), separators=(",", ":")) for _ in range(n // 50))
    fill = lambda unit, *tags: unit * ((n - sum(map(len, tags)) - 30) // len(unit))  # noqa: E731
    return {
        "blanks": "<think></think>" + fill(" ", "<think></think>x</answer>") + "x</answer>",
        "newlines": "<think></think>" + fill("\n", "<think></think>x</answer>") + "x</answer>",
        "blanks in answer": inside(fill(" \n\t") + "x"),
        "blanks in list": inside("[" + fill(" ") + "]"),
        "closed thoughts": "<think>" + fill("</think>") + "</answer>",
        "closed thoughts and blanks": "<think>" + fill("</think>" + " " * 40) + "</answer>",
        "opened thoughts": fill("<think>"),
        "opened answers": fill("<answer>"),
        "opened answers, one closed": fill("<answer>") + "</answer>",
        "closed answers": fill("</answer>"),
        "halves of tags": fill("</think><answer") + "</answer>",
        "quotes": inside(fill('"')),
        "nested quotes": inside('["' + fill('\\"') + '"]'),
        "backslashes": inside('["' + fill("\\")),
        "deep lists": inside(fill("[")),
        "deep and closed": inside("[" * (n // 2 - 30) + "]" * (n // 2 - 30)),
        "deep objects": inside(fill('{"a":')),
        "flat lists": inside("[" + fill("[],") + "[]]"),
        "many keys": inside("[{" + ",".join(f'"{k:06}":0' for k in range(n // 11 - 4)) + "}]"),
        "huge integer": inside("[" + fill("9") + "]"),
        "huge integers": inside("[" + ",".join(["9" * 4300] * (n // 4400)) + "]"),
        "long fraction": inside("[0." + fill("7") + "]"),
        "zeros and exponent": inside("[0." + fill("0") + "1e19000]"),
        "the same box": inside("[" + fill(item, item) + item[:-1] + "]"),
        "a crowd": inside("[" + crowd + "]"),
        "full stops": fill("."),
        "sentences": ".".join(f"{k:06}" for k in range(n // 7)),
        "boxes in boxes": fill("\\boxed{"),
        "open braces": "\\boxed{" + fill("{"),
        "surrogates": inside('["' + fill("\ud800") + '"]'),
        "fences": fill("`"), "an open fence": "```" + fill("a"),
        "signs": "[" + fill("-") + "1]", "sums": "[1" + fill("+1") + "]",
    }


@pytest.mark.parametrize("n", [20_000, 1_000_000])
def test_long_texts_are_read_in_time(n):
    """20,000 characters is the most that is read, a million is turned away; either takes a blink."""
    truth = json.dumps([random_item(random.Random(1)) for _ in range(150)])
    calls = {
        "grounding": lambda text: grounding_reward(text, truth), "math": lambda text: math_reward(text, "2"),
        "vqa": lambda text: vqa_reward(text, "2"), "parse": parse_boxes, "thinks": has_thinking_format,
        "label": lambda text: read_label("vqa", text), "boxes": lambda text: read_label("grounding", text),
        "chat": lambda text: cells.turns_in("[{" + text[2:])}
    for name, text in long_texts(n).items():
        assert 0.8 * n < len(text) <= n, name
        for call, function in calls.items():
            seconds = []
            while len(seconds) < 3 and (not seconds or min(seconds) > 0.2):      # a busy machine may be slow once
                start = time.process_time()
                with contextlib.suppress(ValueError):      # a label may be refused, in time
                    function(text)
                seconds.append(time.process_time() - start)
            assert min(seconds) < 0.2, f"{call} of {name}"
        error = check_reward(text)
        assert n == 20_000 or error is not None, name


def test_the_bound_on_length():
    for length, expected in ((20_000, (7, None)), (20_001, (0, "too_long")), (10**6, (0, "too_long"))):
        response = f"<think>{'a' * (length - len(THINK + answer(CAT)) + 22)}</think>{answer(CAT)}"
        reward = grounding_reward(response, json.dumps([CAT]))
        assert len(response) == length and (reward.total, reward.error) == expected


@pytest.mark.parametrize("depth", [5, 500, 5000])
def test_the_bound_on_depth_cannot_be_hidden(depth):
    """Closing brackets inside a string must not pay for opening ones after it: deep JSON overflows Python's stack."""
    for text in ('["' + "]" * depth + '",' + "[" * depth, "]" * depth + "[" * depth,
                 '["' + "]" * depth + '",' + "[" * depth + "]" * depth + "]"):
        reward = grounding_reward(f"<answer>{text}</answer>", "[]")
        assert reward.error is not None and reward.terms["accuracy"] == 0
        with pytest.raises(ValueError):
            read_label("grounding", text)


# ---------------------------------------------------------------------------------------------------------------------
# Short answers

@pytest.mark.parametrize("response, expected", [
    (r"\boxed{2}", "2"), (r"so \boxed{ 2 }.", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{}", ""),
    (r"\boxed{a{b{c}d}e} }", "a{b{c}d}e"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed{1} \boxed{2", None),
    ("\\boxed{1\n2}", "1\n2"),
    (r"\boxed{1", None), (r"\boxed{{1}", None), (r"\boxed", None), (r"\boxed 2", None), ("boxed{2}", None), ("2", None),
    ("", None)])
def test_boxed(response, expected):
    assert boxed(response) == expected


def test_math_reward():
    think = "<think>1 + 1</think>"
    for response, points, error in (
            (think + r"\boxed{2}", 1, None), (r"\boxed{ 2}", 1, None), (r"\boxed{3}", 0.1, None),
            (r"\boxed{}", 0.1, None), ("2", 0, "no_boxed"), (r"\boxed{2", 0, "no_boxed")):
        reward = math_reward(response, " 2 ")
        assert (reward.total, reward.error) == (points, error), response
    assert math_reward(r"\boxed{" + "{" * 10**6, "2").total == 0
    assert math_reward(" " * 19_991 + r"\boxed{2}", "2").total == 1         # 20,000 characters are read
    assert math_reward(" " * 19_992 + r"\boxed{2}", "2").total == 0         # and no more


@pytest.mark.parametrize("task, answer, right", [("vqa", "5", "5"), ("docvqa", "1990", "1990"), ("chartqa", "14", "14.2")])
def test_a_thought_that_mentions_the_tags_costs_a_short_answer_nothing(task, answer, right):
    for response in (f"<think>It goes into <answer> </answer> tags.</think><answer>{right}</answer>",
                     f"<think>so <answer>wrong</answer></think> {right}", f"I use <answer> tags. <answer>{right}</answer>",
                     f"<think>the </think> tag</think>\n<answer> {right} </answer>", right, f"<answer>{right}</answer> ok"):
        assert rewards.score(task, response, answer).total > 0.9, response
    for response in (f"<think><answer>{right}</answer></think><answer>wrong</answer>", f"<answer>{right}",
                     f"<answer>{right}</answer><answer>no</answer>"):
        assert rewards.score(task, response, answer).total < 0.5, response
    boxes = f"<think>in <answer>[]</answer></think><answer>{json.dumps([CAT])}</answer>"
    assert rewards.score("grounding", boxes, json.dumps([CAT])).terms["accuracy"] == 0      # the authors' first tag


TEXTS = ["red", "blue", "green"]


@pytest.mark.parametrize("value, choices, answer", [
    ("B", TEXTS, "blue"), ("(b)", TEXTS, "blue"), ("B.", TEXTS, "blue"), ("B. blue", TEXTS, "blue"), (1, TEXTS, "blue"),
    (r"\text{B}", TEXTS, "blue"), ("<answer>B</answer>", TEXTS, "blue"), (r"\boxed{B}", TEXTS, "blue"),
    ("Blue", TEXTS, "blue"),
    (["B"], TEXTS, "blue"), ("blue", "['red', 'blue', 'green']", "blue"),
    ("B", {"A": "red", "B": "blue", "C": None}, "blue"),
    ("B", {"text": TEXTS, "label": ["A", "B", "C"]}, "blue"), ("B", ["A. red", "B. blue", "C. green"], "blue"),
    (4, [3, 4, 5], "4"), ("4", [3, 4, 5], "4"), (2, [1, 2, 3], "2"), (2.0, [0.5, 2, 3], "2"), (0, TEXTS, "red"),
    ("<think>hm</think><answer>C</answer>", TEXTS, "green"), ("C", ["B", "C", "A"], "C")])
def test_choices_as_data_sets_have_them(value, choices, answer):
    label = json.loads(read_label("math", value, choices))
    assert label["answer"] == answer and answer in label["choices"]
    y = label_text("math", json.dumps(label), "spaced")
    assert math_reward(y, json.dumps(label)).total == 1
    letter = "ABCD"[label["choices"].index(answer)]
    assert letter in label["choices"] or math_reward(f"\\boxed{{{letter}}}", json.dumps(label)).total == 1


def test_brackets_in_a_text_are_no_nesting():
    """30 of them in a name: the answer is read, and its first object lacks a field. 30 around it are too deep."""
    item = {"bbox_2d": [10, 20, 50, 60], "p" + "[" * 30 + "oint_2d": [30, 40], "\\\"{": "[" * 30}
    assert parse_boxes(f"<answer>{json.dumps([item])}</answer>")[1] == "no_point_2d"
    assert parse_boxes("<answer>" + "[" * 30 + json.dumps([item]) + "</answer>")[1] == "too_deep"
    began = time.process_time()
    for text in ('"' * 20_000, '"\\' * 10_000, '\\"' * 10_000, '"[' * 10_000):
        files.nesting_depth(text)
    assert time.process_time() - began < 0.2


def test_labels_of_a_task_that_says_nothing_of_them():
    read = rewards.Task("Look.", lambda answer, style: answer, lambda response, truth: Reward({}), None).read
    assert read("grün", None) == "grün" and read({"a": ["ü", 1]}, None) == '{"a": ["ü", 1]}'
    with pytest.raises(ValueError, match="knows no choices"):
        read("A", ["a", "b"])


@pytest.mark.parametrize("task, value, choices, reason", [
    ("math", "D", TEXTS, "none of the choices"), ("math", "purple", TEXTS, "none of the choices"),
    ("math", 3, TEXTS, "none of the 3"),
    ("math", "1", TEXTS, "none of the choices"), ("math", -1, TEXTS, "none of the 3"),
    ("math", "A. blue", TEXTS, "none of the"),
    ("math", None, TEXTS, "null"), ("math", True, TEXTS, "bool"), ("math", ["A", "B"], TEXTS, "list"),
    ("math", {"a": 1}, TEXTS, "null"), ("math", 1, ["1", "2", "3"], "number of another"), ("math", "A", [], None),
    ("math", "A", ["red", None], "choice B is null"), ("math", "A", ["red", ["blue"], {"x": 1}], "choice C is a dict"),
    ("math", "A", {"x": "red", "y": "blue"}, "record of x, y"), ("math", "A", "red or blue", "must be a list"),
    ("math", "A", [str(i) for i in range(27)], "at most 26"), ("math", "A", ["red", " "], "choice B is empty"),
    ("vqa", "A", TEXTS, "knows no choices"), ("docvqa", "A", TEXTS, "no choices"),
    ("grounding", "[]", TEXTS, "choices"),
    ("math", None, None, "null"), ("math", [1, 2], None, "list"), ("math", "['24/7', '3.429']", None, "the task vqa has several answers"), ("math", float("nan"), None, "nan"),
    ("math", "<answer>5", None, "without its other half"), ("vqa", "5</answer>", None, "other half"),
    ("vqa", [], None, "list of accepted answers is empty"), ("vqa", "[]", None, "empty"),
    *(("math", value, None, "the answer is a record") for value in (
        '<answer>{"answer": "5"}</answer>', r'\boxed{{"answer": "5"}}', '<think>a</think>{"answer"', '${"answer": 5}$')),
    ("vqa", ["", "x"], None, "empty"),
    ("vqa", [None], None, "null"), ("vqa", [{"text": "a", "answer": "b"}], None, "dict"),
    ("vqa", {"score": 1}, None, "dict"),
    ("vqa", [["a"], ["b", "c"]], None, "list"), ("vqa", "['a' 'b']", None, "without commas"),
    ("vqa", True, None, "bool"),
    ("grounding", [1, 2, 3], None, "4 numbers"), ("grounding", ["1", "2", "3", "4"], None, "4 numbers"),
    ("grounding", [1, 2, None, 4], None, "4 numbers"), ("grounding", [[1, 2], [3, 4]], None, "4 numbers"),
    ("grounding", [decimal.Decimal(1)] * 4, None, "4 numbers"), ("grounding", {"x": 1}, None, "dict"),
    ("grounding", [{"x1": 1}], None, "bbox_2d is missing"),
    ("grounding", [0.1, 0.2, 0.5, 0.9], None, "relative coordinates"),
    ("grounding", [{"bbox_2d": [0, 0, 1, 1], "point_2d": [0.5, 0.5]}], None, "relative coordinates")])
def test_labels_that_mean_nothing(task, value, choices, reason):
    if reason is None:
        assert read_label(task, value, choices) == "A"       # no choices at all
        return
    with pytest.raises(ValueError, match=reason):
        read_label(task, value, choices)


@pytest.mark.parametrize("value, first, right", [
    (["1990", "in 1990"], "1990", "in 1990"), ("['3', '5']", "3", "5"), ('["3", "5"]', "3", "5"), ([3, 4.0], "3", "4"),
    ([{"answer": "no"}, {"answer": "yes", "answer_confidence": "maybe"}, {"answer": "yes"}], "yes", "no"),
    ({"answer": ["a", "b"]}, "a", "b"), ({"text": "a"}, "a", "a"), (7, "7", "7"), (2.5, "2.5", "2.5"), (3.0, "3", "3"),
    ("<answer>Paris</answer>", "Paris", "paris"), ("<think>France</think> <answer>Paris</answer>", "Paris", "Paris"),
    ("[sic]", "[sic]", "[SIC]"), ('["', '["', '["'), (["[1]"], "[1]", "[1]")])
def test_accepted_answers_as_data_sets_have_them(value, first, right):
    for task in ("vqa", "docvqa", "chartqa"):
        label = read_label(task, value)
        assert label_text(task, label, "spaced") == first
        assert rewards.score(task, right, label).total == rewards.score(task, first, label).total == 1


@pytest.mark.parametrize("value, expected", [
    (5, "5"), (0.00001, "0.00001"), (2.5e-7, "0.00000025"), (1e20, "1" + "0" * 20), ("[1, 2]", "[1, 2]"),
    (r"\boxed{5}", "5"), ("$x^2$", "x^2"), (r"First 2+3. So \boxed{5}.", "5"), ("<answer>$5$</answer>", "5"),
    ('{"answer": "4", "choices": ["3", "4"]}', '{"answer": "4", "choices": ["3", "4"]}'), (["5"], "5"), ([['{"answer": "5"}']], "5")])
def test_math_labels_as_data_sets_have_them(value, expected):
    assert read_label("math", value) == expected


LABELLED = {"bbox_2d": [2, 4, 6, 9], "label": "the 'dog'"}
BOXES = {       # how models and data sets write a box without its point
    "as such": [2, 4, 6, 9], "a list": [[2, 4, 6, 9]], "text": "[[2, 4, 6, 9]]", "text of one": "[2, 4, 6, 9]",
    "no point": [LABELLED], "null as a point": [LABELLED | {"point_2d": None}], "one object": LABELLED,
    "text of an object": json.dumps(LABELLED), "text of objects": json.dumps([LABELLED], indent=2),
    "a fence": f"```json\n{json.dumps([LABELLED])}\n```", "a fence around one": f"```\n{json.dumps(LABELLED)}\n```",
    "a fence in text": f"Here it is:\n```json\n{json.dumps([LABELLED])}\n```\nDone.",
    "answer": f"<answer>{json.dumps([LABELLED])}</answer>", "answer, one": f"<answer> {json.dumps(LABELLED)}\n</answer>",
    "thought and answer": f"<think>It is on the [left].</think> <answer>{json.dumps([LABELLED])}</answer>",
    "a fence in an answer": f"<answer>```json\n{json.dumps([LABELLED])}\n```</answer>",
    "Python's": str([LABELLED]), "Python's, one": str(LABELLED), "Python's tuples": "[(2, 4, 6, 9)]",
    "Python's tuple": "(2, 4, 6, 9)", "Python's None": "[{'bbox_2d': [2, 4, 6, 9], 'point_2d': None,}]",
    "Python's in a fence": f"```python\n{[LABELLED]}\n```", "bbox": [{"bbox": [2, 4, 6, 9], "score": 0.5}],
    "box": {"box": [2, 4, 6, 9], "name": "dog"}, "a record of lists": {"bbox": [[2, 4, 6, 9]], "category": [3]},
    "with its point": [{"point_2d": [4.0, 6.5], "bbox_2d": [2, 4, 6, 9]}], "point": [{"bbox": [2, 4, 6, 9], "point": [4.0, 6.5]}]}


@pytest.mark.parametrize("name", BOXES)
def test_boxes_as_data_sets_have_them(name):
    """A point that is missing is the centre, and y has the two fields that the prompt asks for."""
    answer = read_label("grounding", BOXES[name])
    assert answer == '[{"bbox_2d": [2, 4, 6, 9], "point_2d": [4.0, 6.5]}]'
    assert rewards.earned("grounding", label_text("grounding", answer, "spaced"), answer)[1] == 1


@pytest.mark.parametrize("value", [[], "[]", "<answer>[]</answer>", "```json\n[]\n```", {"bbox": []}, "()", " [ ] "])
def test_no_boxes_as_data_sets_have_them(value):
    assert read_label("grounding", value) == "[]"


@pytest.mark.parametrize("value, reason", [
    ([{"bbox_2d": ["2", "4", "6", "9"]}], "item 1: bbox_2d must be 4 numbers, it is ['2', '4', '6', '9']"),
    ([{"bbox_2d": [2, 4, 6]}], "4 numbers"), ([{"bbox_2d": "2, 4, 6, 9"}], "4 numbers"),
    ([LABELLED, {"label": "x"}], "item 2: bbox_2d is missing"),
    ([{"point_2d": [1, 2], "label": "dog"}], "item 1: bbox_2d is missing"),
    ({"label": "dog"}, "the solution is a dict, no list"),
    ([LABELLED | {"point_2d": "1, 2"}], "point_2d must be 2 numbers"),
    ([{"box_2d": [2, 4, 6, 9]}], "bbox_2d is missing"),
    ("```json\n[[2, 4, 6, 9]]", "not JSON"), ("```\n[]\n```\n```\n[]\n```", "not JSON"),
    ("dog: [2, 4, 6, 9]", "not JSON"), ("{2, 4, 6, 9}", "not JSON"),
    ("[2 4 6 9]", "not JSON"), ("[[2, 4, 6, 9][2, 4, 6, 9]]", "not JSON"), ("[(2, 4, 6, f())]", "not JSON"),
    ("[__import__('os')]", "not JSON"),
    ("[2, 4, 3 + 3, 9]", "not JSON"), ("[{'bbox_2d': [2, 4, 6, 9], 'label': 'a' 'b'}]", "a list without commas"),
    ("(" * 300 + ")" * 300, "not JSON"), ("[(2, 4, 6, 9j)]", "not JSON"), ("[(2, 4, 6, b'9')]", "not JSON"),
    ("[True]", "it is True")])
def test_boxes_that_mean_nothing(value, reason):
    """Text is never evaluated, and numbers in quotes are none. Nor is long or deep text read as Python's."""
    assert cells.listed("[" * 8 + "]" * 8) != (deep := "[" * 9 + "]" * 9) == cells.listed(deep)
    assert cells.listed(long := f"[{'1,' * 10_000}]") == long
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_label("grounding", value)


@pytest.mark.parametrize("name, error, points", [
    ("no point", "no_point_2d", 2), ("one object", "not_a_list", 1), ("a fence", "bad_json", 1),
    ("Python's", "bad_json", 1), ("a list", "not_an_object", 1),
    ("a record of lists", "not_a_list", 1), ("bbox", "no_bbox_2d", 1), ("a fence in text", "bad_json", 1),
    ("Python's tuples", "bad_json", 1)])
def test_the_same_forms_in_a_response_are_what_the_scorer_makes_of_them(name, error, points):
    """A label may be written in them; a response earns what it earned before. (A field without a point has half the format.)"""
    value, truth = BOXES[name], read_label("grounding", BOXES[name])
    reward = grounding_reward(f"<answer>{value if isinstance(value, str) else json.dumps(value)}</answer>", truth)
    assert (reward.error, reward.total, reward.terms["accuracy"]) == (error, points, 0)


def test_vqa_reward():
    for response in ("Paris", " paris. ", "PARIS .", "\nparis\n", "<answer>Paris</answer>", "<think>Hm.</think>Paris",
                     "<think>Rome?</think> <answer> paris </answer>"):
        assert vqa_reward(response, "Paris.").total == 1, response
    for response in ("", "Paris..", "Paris, France", "<answer>Rome</answer>Paris", "Par is"):
        assert vqa_reward(response, "Paris").total == 0, response
    assert vqa_reward("12", "1").total == vqa_reward("1", "12").total == 0
    assert vqa_reward("in 1990", '["1990", "in 1990"]').total == 1


def test_relaxed_match():
    """ChartQA: 5 % off a true number; text up to case."""
    for answer, truth in (("105", "100"), ("95", "100"), ("-9.6", "-10"), ("50%", "0.5"), ("0.51", "50%"),
                          ("Blue", "blue"), ("1e2", "100"), (".5", "0.5"), ("0", "0"), ("2 cats", "2 Cats")):
        assert relaxed_match(answer, truth), (answer, truth)
    for answer, truth in (("105.1", "100"), ("94.9", "100"), ("50", "50%"), ("0.0", "0"), ("0.001", "0"),
                          ("inf", "100"), ("nan", "100"), ("", "100"), ("1,000", "1000"), ("1_0", "10"),
                          ("red", "blue")):
        assert not relaxed_match(answer, truth), (answer, truth)
    assert chart_reward("<think>It rose.</think> 104", '["7", "100"]').total == 1
    assert chart_reward("9" * 19_000, "9").total == 0


def test_anls():
    """DocVQA, with numbers worked by hand: kitten → sitting takes 3 edits of 7."""
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3
    assert edit_distance("abcd", "acbd") == 2 and edit_distance("same", "same") == 0
    assert anls("sitting", ["kitten"]) == pytest.approx(4 / 7)
    assert anls("ab", ["abcd"]) == 0.0            # similarity 0.5 is not above 0.5
    assert anls("abc", ["abcd"]) == 0.75
    assert anls(" The  CAT ", ["the cat"]) == 1.0
    assert anls("1990", ["in 1990", "1990"]) == 1.0
    assert anls("", [""]) == 1.0 and anls("x", [""]) == 0.0
    assert document_reward("<answer>sitting</answer>", "kitten").total == pytest.approx(4 / 7)
    rng = random.Random(1)
    for _ in range(300):                          # against the recursive definition
        a, b = ("".join(rng.choices("ab", k=rng.randint(0, 6))) for _ in range(2))
        assert edit_distance(a, b) == slow_distance(a, b)


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize("answer, truth, choices, expected", [
    ("0.5", r"\frac{1}{2}", [], True), (r"\frac{2}{4}", "0.5", [], True), ("50\\%", "0.5", [], True),
    ("1,000", "1000", [], True), ("3", "4", [], False), (r"\sqrt{4}", "2", [], True), ("x^2", "x", [], False),
    ("B", "4 cm", ["3 cm", "4 cm"], True), ("(b)", "4 cm", ["3 cm", "4 cm"], True),
    ("A", "4 cm", ["3 cm", "4 cm"], False),
    ("C", "4 cm", ["3 cm", "4 cm"], False), ("4 cm", "4 cm", ["3 cm", "4 cm"], True), ("A", "A", [], True),
    ("__import__('os').getpid()", "2", [], False), ("{", "2", [], False), ("2" * 201, "2", [], False),
    ("41.2.", "41.2", [], True), ("8.4°", "8.4", [], True), (r"8.4^\circ", "8.4°", [], True),
    (r"8.4^{\circ}", "8.4", [], True), (r"\approx 4.81", "4.81", [], True), ("≈ 4.81.", "4.81", [], True),
    ("41.2", "41.3", [], False), ("yes", "Yes", [], True), (r"\text{Yes}", "yes.", [], True), ("seY", "Yes", [], False),
    ("ba", "ab", [], False), ("b+a", "a+b", [], True), ("not red", "red not", [], False),
    *[(said, "3", ["1", "2", "3"], True) for said in ("C. 3", "C) 3", "C:", "(C) 3", "c", "C.", " (c) ")],
    *[(said, "3", ["1", "2", "3"], False) for said in ("Cat", "D", "B. 3", "ß", "ﬀ", "C3", "")],
    ("A. M.", "A. M.", ["P. M.", "A. M."], True),    # a choice's own text is no letter
    *[(said, "5 cm", ["4 cm", "5 cm"], True) for said in (
        r"\text{B}", r"\textbf{(B)}", r"\mathrm{B}", r"\text{B. 5 cm}", r"\mathbf{B}", r"\textbf{\text{B}}", r"(\text{B})",
        "$B$", r"\textbf{(B) } 5", "**B**", r"\text{ (b) 5 cm }")],
    *[(said, "5 cm", ["4 cm", "5 cm"], False) for said in (r"\text{A}", r"\text{Both}", r"\mathrm{C}", r"\text{B}^2")],
    ("a - b", "a-b", [], True), ("a-b", "a - b", [], True), ("-b + a", "a-b", [], True), ("a − b", "a-b", [], True),
    ("b - a", "a - b", [], False), ("well-known", "Well-known", [], True), ("known-well", "well-known", [], False)])
def test_math_equal(answer, truth, choices, expected):
    assert math_equal(answer, truth, choices) is expected


WORDS = [       # told apart: as LaTeX most of them are the same product, or the same number without its unit
    ("HO2", "H2O"), ("OH2", r"\text{H}_2\text{O}"), ("H4SO2", "H2SO4"), ("HO2 + CO2", "H2O + CO2"), ("12B", "B12"), ("1B2", "B12"),
    ("66 Route", "Route 66"), ("Route 6 6", "Route 66"), ("3MP", "MP3"), ("C-3OP", "C-3PO"), ("4-A", "A-4"), ("3dr", "3rd"), ("3th", "3rd"),
    ("7PU", "7UP"), ("аД", "Да"), ("5日", "5月"), ("3月5日", "5月3日"), ("好你", "你好"), ("rößerg", "größer"), ("5 red", "red 5"),
    ("5 der", "5 red"), ("5 pears", "5 apples"), ("(OH)2Ca", "Ca(OH)2"), (r"\angle BAC", r"\angle ABC"), ("y x", "x y"),
    ("3 am", "3 pm"), (r"3\text{ a.m.}", r"3\text{ p.m.}"), ("7:30 am", "7:30 pm"), ("5 hours", "5 minutes"), ("30 s", "30 min"),
    ("30 h", r"30\,\text{min}"), ("x = 5 hours", "x = 5 minutes"), ("2-3 hours", "2-3 minutes"), ("2 min 30 h", "2 h 30 min"),
    (r"4\pi\text{ cm}", r"4\pi\text{ m}"), ("5 mm", "5 cm"), (r"5\text{ m}^2", r"5\text{ m}^3"), (r"5\text{ m}^2", "5 m"), ("3t", "3c"),
    (r"25^\circ\text{C}", r"25^\circ\text{F}"), ("60mph", "60 km/h"), ("5 mW", "5 MW"),
    ("7.30", "7:30"), ("7:30 pm", "19:30"), ("2:1", "1:2"), ("5 Dec", "Dec 5"), ("6/3/2020", "4/2/2020"), ("2020-04-03", "2020-03-04"),
    ("102", "10²"), ("x^2", "x³"), ("5.5", "2½"), ("x2", "x²"), ("√3", r"\sqrt{2}"), ("√2", "2"), ("∞", r"-\infty"), ("tan shirt", "tan hirst"),
    ("5x", "5"), ("5 x", "5"), ("3xyz", "3"), ("4x m", "4"), ("6 cm^2", "7"), ("25 N", "25 J"), ("1e3", "100")]
SAME = [        # words up to case and form; units up to spelling; and formulas, which are none
    ("h2o", "H2O"), ("H_2O", r"\text{H}_2\text{O}"), ("H₂O", r"\mathrm{H_2O}"), ("CO2+H2O", "CO_2 + H_2O"), ("ДА", "Да."), ("GRÖSSER", "größer"),
    ("Cafe\u0301", "café"), ("route  66", "Route 66"), ("Dec. 5", "dec 5"), ("03/04/2020", "3/4/2020"), ("3RD", "3rd"), ("△ABC", r"\triangle ABC"),
    ("3 PM", "3 p.m."), ("7:30pm", r"7:30\text{ PM}"), ("5 hrs", "5 Hours"), (r"\frac{1}{2} hour", "0.5 h"), ("5 centimeters", r"5\text{ cm}"),
    ("5 m²", "5 square meters"), ("10 meters per second", "10 m/s"), ("5 cm", "5"), (r"5\text{ cm}^2", "5"), ("5 hours", "5"),
    ("x = 3", "3"), ("x=3 hours", "3 hours"), ("2x+1", "1+2x"), ("2yx", "2xy"), ("c+ba", "ab+c"), ("1+zyx", "xyz+1"), ("3x", r"x \cdot 3"),
    ("2+3i", "3i+2"), ("xy - 1", "-1+yx"), ("x-4", "-4+x"), (r"\pi 2", r"2\pi"), (r"2\sin(x)", r"2\sin x"), ("sqrt(2)", r"\sqrt{2}"),
    ("(-infinity, 3)", r"(-\infty, 3)"), ("2, 1", "1 and 2"), ("blue, red", "red, blue"), ("50 percent", r"50\%"), ("2:4", "1:2"),
    ("x^2", "x²"), ("10⁻³", "0.001"), ("x_1", "x₁"), ("２５", "25"), ("٢٥", "25"), ("（1，2）", "(1,2)"), ("1½", r"\frac{3}{2}"),
    ("√2", r"\sqrt{2}"), ("2√3/3", r"\frac{2\sqrt{3}}{3}"), ("√(x+1)", r"\sqrt{x+1}"), ("√2.5", r"\sqrt{2.5}"), ("5√2 cm", r"5\sqrt{2}"),
    ("2·3", "6"), ("2sin(x)", r"2\sin x"), ("log 8", r"\log 8"), ("(−∞, 3)", r"(-\infty, 3)"), ("Tan shirt", "tan shirt"), ("√ RIGHT", "√ right"),
    ("100 cm^2", "100"), ("100 m²", "100"), ("25 N", "25"), ("100 °C", "100"), ("100°C", "100"), ("25 dollars", "25"), ("3+4 cm", "7"),
    ("25 N", "25 newtons"), ("1.5e3", "1500"), ("3e8", r"3 \times 10^8"), ("1e-5", "10^{-5}"), ("-2E2 m", "-200")]


@pytest.mark.parametrize("answer, truth, expected", [(*pair, False) for pair in WORDS] + [(*pair, True) for pair in SAME])
def test_words_units_and_formulas(answer, truth, expected):
    assert math_equal(answer, truth) is math_equal(truth, answer) is expected
    assert math_equal(f" {answer} ", answer) and math_equal(truth + ".", truth)


def test_an_abbreviation_is_no_letter_of_a_choice():
    assert not math_equal("a.m.", "3 pm", ["3 pm", "3 am"]) and math_equal("A. 3 pm", "3 pm", ["3 pm", "3 am"])


def test_a_choice_of_two_letters_is_none():
    """An answer that names several choices would be right too often."""
    for hedge in ("(A) or (B)", "A) and B)", "(A), (B)", "(A)(B)", "(A) / B", r"\textbf{(A)} or \textbf{(B)}", "A. or B. or C."):
        assert letter_of(hedge) is None and not math_equal(hedge, "3", ["3", "4"])
    for hedge in ("A) B) C)", "(A) (B)", "A or B"):
        assert not math_equal(hedge, "A") and not math_equal(hedge, "B")
    for answer in ("(A)", "A. x", "A) x = 3", "A. and so on", "**A.** an ox", "(A) orange"):
        assert letter_of(answer) == 0


def test_a_letter_is_an_answer_where_the_choices_stand_in_the_question():
    for answer in ("C", "(C)", "C.", "C. 4 cm", "(C) 4", "C: 4", r"\text{C) 4}"):
        assert math_equal(answer, "C") and math_equal(answer, "(C)") and not math_equal(answer, "D"), answer
    assert not math_equal("C = 4", "C") and not math_equal("CD", "C") and not math_equal("C'", "C")


def test_choices_in_latex_and_in_lower_case():
    texts = [r"$\triangle ABC$", r"\(\triangle DEF\)", "K^+", "k^-"]
    for value, expected in (("A", 0), (texts[0], 0), (r"\triangle ABC", 0), (r"\boxed{\triangle DEF}", 1), (texts[1], 1), ("$K^+$", 2)):
        assert json.loads(read_label("math", value, texts))["answer"] == texts[expected], value
    for answer, right in ((r"\triangle ABC", 0), (r"$\triangle ABC$", 0), ("(a)", 0), (r"\triangle DEF", 1), ("k^+", 2), ("K^+", 2), ("K^-", 3)):
        assert [math_equal(answer, text, texts) for text in texts] == [i == right for i in range(4)], answer
    assert not math_equal("a", "B", ["a", "A", "B"]) and not math_equal("k^+", "K^+", ["K^+", "k^+"])


def test_math_is_bounded_in_time():
    """Each of these keeps sympy busy for seconds or for ever, or fills the memory. The kernel ends the child; the next
    question is answered by a new one."""
    assert math_equal("1/2", "0.5")
    verify_math.ended_now()              # what was ended before: on a slow machine a text of test_fuzz is
    began = time.process_time()
    for bomb in ("9^{9^{9^{9}}}", "((((9!)!)!)!)!", r"\prod_{n=1}^{999999} n", "(x+y+z+a+b+c)^{99}", "2^{99999999999}"):
        assert not math_equal(bomb, "2")
    assert math_equal("3/6", "0.5")
    for text in ("(" * 60 + "1" + ")" * 60, "{" * 13 + "1" + "}" * 13, "1+" * 100 + "1"):
        assert verify_math.too_complex(text) and not math_equal(text, "1")
    assert not verify_math.too_complex(r"\frac{(1+[2])}{\sqrt{3}}")
    assert time.process_time() - began < 5       # of ours: the child's is its own
    assert verify_math.ended_now() == 5 and verify_math.ended_now() == 0


def test_the_verifier_ends_with_its_parent():
    """Killed while the child still imports, while it waits, and while it works."""
    code = ("import sys, time; from support import verify_math as v\n"
            "if sys.argv[1] != 'importing': v.same_value('1/2', '0.5')\n"
            "if sys.argv[1] == 'importing': v.child_says = lambda line: print(v.child.pid, flush=True) or time.sleep(60)\n"
            "else: print(v.child.pid, flush=True)\n"
            "v.same_value('9^{9^{9^{9}}}', '2') if sys.argv[1] != 'waiting' else time.sleep(60)")
    for state in ("importing", "waiting", "working"):
        parent = subprocess.Popen([sys.executable, "-c", code, state], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
        parent.wait()
        deadline = time.time() + 5
        while time.time() < deadline and is_running(child):
            time.sleep(0.02)
        assert not is_running(child), state


def test_a_verifier_that_does_not_start_is_a_mistake(monkeypatch):
    monkeypatch.setattr(verify_math, "child", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Mistake, match="math-verify does not start; is it installed"):
        verify_math.same_value("1/2", "0.50000")
    assert verify_math.child is None


def is_running(pid: int) -> bool:
    """Ended ones may stay as zombies where nobody waits for them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_reward_that_is_not_finite_is_no_reward(monkeypatch):
    for value in (math.nan, math.inf):
        monkeypatch.setitem(rewards.TASKS, "vqa", replace(rewards.TASKS["vqa"], reward=lambda response, truth: Reward(
            {"accuracy": value})))
        assert (score("vqa", "x", "1").total, score("vqa", "x", "1").error) == (0, "reward_not_finite")


def test_repeated_answers_come_from_memory(monkeypatch):
    verify_math.same_value("1/4", "0.25")
    monkeypatch.setattr(verify_math, "child_says", None)          # asking again would fail
    assert verify_math.same_value("1/4", "0.25")


def test_a_verifier_that_died_while_idle_is_started_again():
    assert verify_math.same_value("1/8", "0.125")
    verify_math.child.kill()
    verify_math.child.wait()
    assert verify_math.same_value("1/16", "0.0625")


def test_rewards_are_total_over_all_characters(monkeypatch):
    """Upper-casing ß makes two characters of one; 102 characters are of that kind. Every character that has another
    form, alone in the box, where it could be taken for a letter; and many anywhere in the answers of all tasks."""
    monkeypatch.setattr(math_answers, "same_value", lambda *_: False)
    choices = ["1", "2", "3"]
    changed = [c for c in map(chr, range(0x110000)) if c < "\u3000" or {c.casefold(), unicodedata.normalize("NFKC", c)} != {c}]
    taken = [c for c in changed if math_equal(c, "3", choices)]
    assert {"3", "C", "c", "３", "٣"} <= set(taken) and all(c in "Cc" or unicodedata.digit(c) == 3 for c in taken)
    rng = random.Random(0)
    labels = {task: "[]" if TASKS[task].boxes else "2" for task in TASKS}
    labels["math"] = json.dumps({"answer": "3", "choices": choices})
    for _ in range(3000):
        odd = "".join(chr(rng.choice((rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(0xd800, 0xe000))))
                      for _ in range(rng.randint(1, 3)))
        for task, label in labels.items():
            for response in (odd, f"<think>{odd}</think><answer>{odd}</answer>", f"\\boxed{{{odd}}}"):
                reward = rewards.score(task, response, label)
                assert reward.terms and 0 <= reward.total <= 7, (task, response)


def test_a_reward_that_fails_is_a_named_error_of_0_points(monkeypatch, capsys):
    def fails(response, answer):
        return Reward({"accuracy": 1 / len(response)})
    monkeypatch.setitem(TASKS, "vqa", replace(TASKS["vqa"], reward=fails))
    for _ in range(2):
        reward = rewards.score("vqa", "", "Paris")
        assert (reward.total, reward.error) == (0, "reward_failed_ZeroDivisionError")
    printed = capsys.readouterr()
    assert printed.out.count("'vqa' failed on ''") == 1 == printed.out.count("Traceback")     # once, not every time
    assert rewards.score("vqa", "ab", "Paris").total == 0.5

    def interrupted(response, answer):
        raise KeyboardInterrupt
    monkeypatch.setitem(TASKS, "vqa", replace(TASKS["vqa"], reward=interrupted))
    with pytest.raises(KeyboardInterrupt):
        rewards.score("vqa", "", "Paris")


def test_math_with_choices():
    label = json.dumps({"answer": "4 cm", "choices": ["3 cm", "4 cm"]})
    assert read_label("math", label) == label and label_text("math", label, "spaced") == r"\boxed{4 cm}"
    assert math_reward(r"\boxed{B}", label).total == 1 and math_reward(r"\boxed{A}", label).total == 0.1
    assert read_label("math", '{"answer": "4 cm"}') == "4 cm"


def test_parse_points():
    """A point if there is one, else the middle of the box, else nothing."""
    answer = [{"point_2d": [1, 2]}, {"bbox_2d": [0, 0, 4, 2]}, {"bbox_2d": [0, 0, 9, 9], "point_2d": [5, 6]}, {"a": 1},
              7, {"bbox_2d": [1, 2]}]
    assert parse_points(f"<answer>{json.dumps(answer)}</answer>") == [[1, 2], [2, 1], [5, 6]]
    assert parse_points("") == parse_points("<answer>nothing</answer>") == []


# ---------------------------------------------------------------------------------------------------------------------
# The three controls

COMPACT = '[{"bbox_2d":[10,100,200,210],"point_2d":[30,110]},{"bbox_2d":[225,296,706,786],"point_2d":[302.5,410]}]'
SPACED = ('[{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}, '
          '{"bbox_2d": [225, 296, 706, 786], "point_2d": [302.5, 410]}]')


@pytest.mark.parametrize("task", ["grounding", "scene_grounding"])
@pytest.mark.parametrize("stored", [COMPACT, SPACED])
def test_control_1_aligns_the_text_of_y(task, stored):
    assert label_text(task, stored, "spaced") == f"<answer>{SPACED}</answer>"
    assert label_text(task, stored, "compact") == f"<answer>{COMPACT}</answer>"
    assert label_text(task, "[ ]", "spaced") == label_text(task, "[]", "compact") == "<answer>[]</answer>"
    assert label_text(task, stored, "spaced", "Hm.") == f"<think>Hm.</think><answer>{SPACED}</answer>"


def test_control_1_leaves_short_answers_alone():
    for style in ("spaced", "compact"):
        assert label_text("math", r"\frac{1}{2}", style) == r"\boxed{\frac{1}{2}}"
        assert label_text("vqa", "a,b: c", style) == "a,b: c"


@pytest.mark.parametrize("task", ["grounding", "scene_grounding"])
@pytest.mark.parametrize("style", ["spaced", "compact"])
@pytest.mark.parametrize("stored", [COMPACT, SPACED, "[]"])
def test_control_2_pays_y_no_thinking(task, style, stored):
    for thought in ("", "Hm"):  # even a label that does think
        y = label_text(task, stored, style, thought)
        on, off = label_reward(task, y, stored), label_reward(task, y, stored, pays_thinking=True)
        assert (on.total, on.terms["thinks"], off.total, off.terms["thinks"]) == (6, 0, 7, 1)
        rest = {"answer_format": 2, "accuracy": 3, "non_repeat": 1}
        assert rest.items() <= on.terms.items() and rest.items() <= off.terms.items() and on.error is off.error is None


def test_control_2_does_not_concern_tasks_without_thinking():
    for task, stored in (("vqa", "Paris"), ("math", r"\frac{1}{2}"), ("math", "12")):
        y = label_text(task, stored, "spaced")
        assert label_reward(task, y, stored) == label_reward(task, y, stored, True) == TASKS[task].reward(y, stored)
        assert label_reward(task, y, stored).terms["accuracy"] == 1.0


def test_control_2_keeps_the_error():
    reward = label_reward("grounding", "<answer>?</answer>", "[]", pays_thinking=True)
    assert (reward.error, reward.total) == ("bad_json", 2)


@pytest.mark.parametrize("r_y, r_o, expected", [
    (6.0, [6.0, 1.0], (3.5, True)),                             # as good as y is enough
    (6.0, [math.nextafter(6, 0), 1.0], (6.0, False)),
    (6.0, [7.0, 7.0, 1.0], (5.0, True)),
    (6.0, [6.0, 6.0], (6.0, True)),
    (1.0, [0.1] * 8, (1.0, False)), (0.0, [0.0], (0.0, True))])
def test_control_3_smooths(r_y, r_o, expected):
    assert smooth(r_y, r_o) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and the check of labels

EXPECTED_PROMPT = (  # docs/paper.md, section 3
    """Please find "{Question}" with bboxs and points.Compare the difference between object(s) and find the most """
    """closely matched object(s).Output the thinking process in <think> </think> and final answer in <answer> """
    """</answer> tags.Output the bbox(es) and point(s) inside the interested object(s) in JSON format.i.e., <think> """
    """thinking process here </think><answer>[{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}, """
    """{"bbox_2d": [225, 296, 706, 786], "point_2d": [302, 410]}]</answer>""")


def test_official_prompt():
    """The evaluation's, and the earlier trainer's: a newline first, no blanks inside the example's lists."""
    plain = re.sub(r"(?<=\d), (?=\d)", ",", EXPECTED_PROMPT)
    assert plain.count(", ") == EXPECTED_PROMPT.count(", ") - 8
    assert user_text("grounding_train", '"The Cat."') == "\n" + plain.replace("{Question}", '"the cat."')
    assert user_text("grounding_train", "The Cat.") == "\n" + plain.replace("{Question}", "the cat")
    assert TASKS["grounding"].frame == TASKS["grounding_train"].frame == (840, 840)
    assert user_text("grounding", "the cat") == EXPECTED_PROMPT.replace("{Question}", "the cat")
    assert user_text("scene_grounding", "the cat") == 'Please find "the cat" with bboxs and points.'


@pytest.mark.parametrize("question, plain", [
    ("The Red Cat.", "the red cat"), ('"Who?!"', "who"), ("U.S. flag", "u.s. flag"), (" Cat. ", " cat. "),
    ("a {b} {0} c", "a {b} {0} c")])
def test_questions_are_lower_cased_and_stripped(question, plain):
    assert user_text("grounding", question) == EXPECTED_PROMPT.replace("{Question}", plain)
    assert user_text("scene_grounding", question) == f'Please find "{plain}" with bboxs and points.'
    assert user_text("scene_math", question) == user_text("vqa", question) == question
    assert user_text("math", question) == question.lower().strip('"!') + (      # as evaluation_math.py does
        r" First think about the question and then provide the answer. The answer is in latex format and wrapped using "
        r"the \boxed{} command. The thinking process and answer are enclosed within <think> </think> and \boxed{} "
        r"tags, respectively. i.e., <think> thinking process here. </think>\boxed{2}")


@pytest.mark.parametrize("task, stored", [
    ("grounding", COMPACT), ("scene_grounding", SPACED), ("grounding", "[]"), ("math", "2"), ("vqa", "Paris")])
def test_good_labels(task, stored):
    answer = read_label(task, stored)
    assert json.loads(answer) == json.loads(stored) if TASKS[task].boxes else answer == stored


@pytest.mark.parametrize("task, stored, reason", [
    ("vqa", None, "null"),
    ("vqa", "", "empty"), ("math", " \n", "empty"), ("grounding", "", "empty"), ("grounding", "[{", "not JSON"),
    ("grounding", "null", "no list"),
    ("grounding", "[1]", "item 1: it is 1, not an object"), ("grounding", "[{}]", "item 1: bbox_2d is missing"),
    ("grounding", '[{"bbox_2d": [1, 2, 3], "point_2d": [1, 2]}]', "item 1: bbox_2d must be 4 numbers, it is [1, 2, 3]"),
    ("grounding", '[{"bbox_2d": [1, 2, 3, NaN], "point_2d": [1, 2]}]', "bbox_2d must be 4 numbers, it is [1, 2, 3, nan]"),
    ("scene_grounding", '[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, true]}]', "point_2d must be 2 numbers"),
    ("grounding", "[" * 9 + "]" * 9, "nested more than 8"),
    ("grounding", "[" + " " * 20_000 + "]", "more than 20,000")])
def test_bad_labels(task, stored, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_label(task, stored)


def test_the_task_of_the_page():
    """The example of docs/tasks.md works as it is printed there."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tasks.md").read_text(), re.S)
    names = vars(rewards) | {"TASKS": {}}
    exec(code, names)
    task = names["TASKS"]["read"]
    assert task.render("red ring", "spaced") == "<answer>red ring</answer>"
    assert task.reward("<answer>A red box</answer>", "red ring").terms == {"format": 1.0, "accuracy": 0.5}
    assert task.prompt.startswith("Read out: {question}.")


def test_which_thought_is_borrowed():
    thinking = [f"<think>thought {i}</think>\n<answer>[]</answer>" for i in range(4)]
    odd = ["<answer>[]</answer>", "<think>a", "<think>x <answer>[1]</answer></think><answer>[]</answer>",
           "<think><|im_start|></think><answer>[]</answer>", "", "</think><answer></answer>"]
    assert rewards.borrowed_thought(odd, 0, 0) == "" == rewards.borrowed_thought([], 0, 0)
    drawn = {place: rewards.borrowed_thought(odd + thinking, 42, place) for place in range(40)}
    assert set(drawn.values()) == {f"<think>thought {i}</think>\n" for i in range(4)}
    assert drawn == {place: rewards.borrowed_thought(odd + thinking, 42, place) for place in drawn}
    assert drawn != {place: rewards.borrowed_thought(odd + thinking, 43, place) for place in drawn}
    boxed = ["\\boxed{4}", "2 plus 2. \\boxed{4}", "<think>2 plus \\boxed{2}</think>\\boxed{4}", "<think>4</think>"]
    assert rewards.borrowed_thought(boxed, 0, 0) == ""
    for thought, behind in (("<think>2 plus 2.</think>\n", "\\boxed{5}"), ("<think>a</think> ", "so \\boxed{5}.")):
        assert rewards.borrowed_thought([*boxed, thought + behind], 0, 0) == thought
        y = rewards.label_text("math", "4", "spaced", before=thought)
        assert y == thought + "\\boxed{4}" and rewards.label_reward("math", y, "4").terms == {"accuracy": 1.0, "boxed": 0.0}


def test_braces_in_a_prompt_and_in_a_question_stay(monkeypatch):
    monkeypatch.setitem(rewards.TASKS, "own", replace(rewards.TASKS["vqa"], prompt='{question} As {"answer": {}}: {x}'))
    assert rewards.user_text("own", "Is {question} in {y}?") == 'Is {question} in {y}? As {"answer": {}}: {x}'


def test_doctests():
    for module in (rewards, answers, math_answers, cells):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted >= 1, module

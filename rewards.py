"""Parsing, verifiable rewards per task, and the three reward controls of ViSurf (section 3.4 of the paper).

A response is text. `parse_boxes` turns it into boxes or a *named* error; a reward is a record of named terms whose sum
is r. Model output is never evaluated: `json.loads`, a schema, bounds on length, depth and magnitude.

Grounding totals are those of the authors' released scorer (paper.md, section 5):
    r = thinking (0, 1) + answer_format (0 … 2) + accuracy (0 … 3) + non_repeat (0, 1)  ≤ 7
Departure 1: with truth `[]` the released code gives a correct `[]` 2 points and a hallucinated box 4. Here an empty
    prediction of an empty truth earns full format and accuracy, and exactly one of the two being empty has accuracy 0.
"""
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

MAX_CHARACTERS, MAX_DEPTH, MAX_OBJECTS, MAX_COORDINATE = 20_000, 8, 120, 1e6
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


def has_thinking_format(response: str) -> bool:
    """Whether the whole response is <think>…</think>, blanks, <answer>…</answer>."""
    body = response.removeprefix("<think>").removesuffix("</answer>")
    return (response.startswith("<think>") and response.endswith("</answer>")
            and re.search(r"</think>\s*<answer>", body) is not None)


def nesting_depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def parse_json(text: str) -> tuple[list, str | None]:
    """JSON list → (items, None), or ([], the name of the error)."""
    if len(text) > MAX_CHARACTERS:
        return [], "too_long"
    if nesting_depth(text) > MAX_DEPTH:
        return [], "too_deep"
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, an integer of too many digits, brackets hidden in strings
        return [], "bad_json"
    return (items, None) if isinstance(items, list) else ([], "not_a_list")


def numbers(value, count: int) -> bool:
    """Whether value is a list of `count` finite numbers of bounded size. True and False are no numbers."""
    return isinstance(value, list) and len(value) == count and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= MAX_COORDINATE for x in value)


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


# ---------------------------------------------------------------------------------------------------------------------
# Grounding

def answer_format(response: str, truth: list[dict]) -> float:
    """Mean over the items of 1[bbox_2d is a list of 4] + 1[point_2d is a list of 2]. `[]` has no items: 0, as released,
    but 2 where the truth is empty too (departure 1)."""
    text = answer_text(response)
    items, error = parse_json(text) if text is not None else ([], "no_answer")
    if not items:
        return 2.0 if error is None and not truth else 0.0

    def is_list(item, key: str, count: int) -> bool:
        return isinstance(item, dict) and isinstance(item.get(key), list) and len(item[key]) == count
    return sum(is_list(i, "bbox_2d", 4) + is_list(i, "point_2d", 2) for i in items) / len(items)


def non_repeat(response: str) -> float:
    """0 if at least two sentences (split at '.') repeat earlier ones, else 1."""
    sentences = [s.strip() for s in response.split(".") if s.strip()]
    return 0.0 if len(sentences) - len(set(sentences)) >= 2 else 1.0


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes a [n, 4] and b [m, 4] → [n, m]. x1, y1, x2, y2 are inclusive pixels: width = x2 − x1 + 1."""
    a, b = a[:, None], b[None]
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1, 0, None).prod(-1)
    area_a, area_b = ((each[..., 2:] - each[..., :2] + 1).prod(-1) for each in (a, b))
    union = area_a + area_b - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def accuracy(predicted: list[dict], truth: list[dict]) -> float:
    """0 … 3. Each (prediction, truth) pair scores 1[IoU > 0.5] + 1[mean |Δ corner| < 10 px] + 1[points closer than
    30 px and the predicted point in its own box]; best one-to-one matching, divided by the larger of the counts."""
    predicted, truth = predicted[:MAX_OBJECTS], truth[:MAX_OBJECTS]
    if not predicted or not truth:
        return 3.0 if not predicted and not truth else 0.0
    boxes, points = (np.array([i[key] for i in predicted], float) for key in ("bbox_2d", "point_2d"))
    true_boxes, true_points = (np.array([i[key] for i in truth], float) for key in ("bbox_2d", "point_2d"))
    inside = ((boxes[:, :2] <= points) & (points <= boxes[:, 2:])).all(1)
    near = np.linalg.norm(points[:, None] - true_points[None], axis=-1) < 30
    cells = ((iou_matrix(boxes, true_boxes) > 0.5).astype(float)
             + (np.abs(boxes[:, None] - true_boxes[None]).mean(-1) < 10)
             + (near & inside[:, None]))
    rows, columns = linear_sum_assignment(cells, maximize=True)
    return float(cells[rows, columns].sum()) / max(len(predicted), len(truth))


def grounding_reward(response: str, truth: str) -> Reward:
    """truth: JSON text of the boxes, in the frame the model sees."""
    if len(response) > MAX_CHARACTERS:
        return Reward(dict.fromkeys(("thinking", "answer_format", "accuracy", "non_repeat"), 0.0), "too_long")
    (predicted, error), true_items = parse_boxes(response), json.loads(truth)
    return Reward({
        "thinking": float(has_thinking_format(response)),
        "answer_format": answer_format(response, true_items),
        "accuracy": 0.0 if error else accuracy(predicted, true_items),
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
    r"""The text in the first \boxed{…}, braces balanced, or None."""
    start = response.find("\\boxed{")
    depth = 0
    for at in range(start + 6, len(response)) if start >= 0 else ():
        depth += (response[at] == "{") - (response[at] == "}")
        if depth == 0:
            return response[start + 7:at].strip()
    return None


def math_reward(response: str, truth: str) -> Reward:
    r"""1.0 correct, 0.1 wrong but boxed, 0 without \boxed{}. Compared as text."""
    answer = boxed(response[:MAX_CHARACTERS])
    if answer is None:
        return Reward({"accuracy": 0.0}, "no_boxed")
    return Reward({"accuracy": 1.0 if answer == truth.strip() else 0.1})


def vqa_reward(response: str, truth: str) -> Reward:
    """1 if the response is the answer, up to case, blanks around it and a final full stop; else 0."""
    def plain(text: str) -> str:
        return text.strip().removesuffix(".").strip().lower()
    return Reward({"accuracy": float(plain(response[:MAX_CHARACTERS]) == plain(truth))})


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

@dataclass(frozen=True)
class Task:
    """All that a task is. prompt: with {question}; render(answer, style): the text of y; reward(response, answer);
    boxes: whether answers are JSON boxes, to be converted when the image is resized."""
    prompt: str
    render: Callable[[str, str], str]
    reward: Callable[[str, str], Reward]
    boxes: bool = False


OFFICIAL_PROMPT = (  # the authors' evaluation prompt, to the letter
    'Please find "{question}" with bboxs and points.'
    "Compare the difference between object(s) and find the most closely matched object(s)."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
    "i.e., <think> thinking process here </think>"
    '<answer>[{{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}}, '
    '{{"bbox_2d": [225, 296, 706, 786], "point_2d": [302, 410]}}]</answer>')

OFFICIAL_MATH_PROMPT = (
    "{question} First think about the question and then provide the answer. The answer is in latex format and wrapped "
    "using the \\boxed{{}} command. The thinking process and answer are enclosed within <think> </think> and "
    "\\boxed{{}} tags, respectively. i.e., <think> thinking process here. </think>\\boxed{{2}}")

TASKS = {
    "grounding": Task(OFFICIAL_PROMPT, render_grounding, grounding_reward, boxes=True),
    # The built-in world asks in fewer words, for speed; its answers and rewards are the same.
    "scene_grounding": Task('Please find "{question}" with bboxs and points.', render_grounding, grounding_reward,
                            boxes=True),
    "math": Task(OFFICIAL_MATH_PROMPT, lambda answer, style: f"\\boxed{{{answer}}}", math_reward),
    "scene_math": Task("{question}", lambda answer, style: f"\\boxed{{{answer}}}", math_reward),
    "vqa": Task("{question}", lambda answer, style: answer, vqa_reward),
}


def user_text(task: str, question: str) -> str:
    """The user's turn. Grounding questions are lower-cased and stripped of marks, as in the authors' scripts."""
    if TASKS[task].boxes:
        question = question.lower().strip('."?!')
    return TASKS[task].prompt.format(question=question)


def label_error(task: str, answer: str) -> str | None:
    """Why `answer` cannot be a label of `task`, or None: what data.py checks of every row before anything runs."""
    if task not in TASKS:
        return f"task {task!r} is not one of {sorted(TASKS)}"
    if not isinstance(answer, str):
        return f"the solution is {type(answer).__name__}, not text"
    if not TASKS[task].boxes:
        return None if answer.strip() else "the solution is empty"
    items, error = parse_json(answer)
    return error or next(filter(None, map(item_error, items)), None)


# ---------------------------------------------------------------------------------------------------------------------
# The three reward controls (section 3.4). All of them act on the label y only.

def label_text(task: str, answer: str, style: str, thought: str = "") -> str:
    """Control 1, align: y in the style that the model itself writes ("spaced" for Qwen2.5-VL), so that tokenisation
    alone does not make y unlikely. A thought comes first where the data has one (pretraining)."""
    return (f"<think>{thought}</think>" if thought else "") + TASKS[task].render(answer, style)


def label_reward(task: str, y: str, answer: str, no_thinking_reward: bool = True) -> Reward:
    """Control 2, no thinking reward: y has no reasoning trace, so its thinking term is 0; format and accuracy stay.
    Off (the ablation): y is paid for thinking as a complete response is, r(y) = 7 where it is 6 with the control."""
    reward = TASKS[task].reward(y, answer)
    if "thinking" not in reward.terms:
        return reward
    return Reward({**reward.terms, "thinking": 0.0 if no_thinking_reward else 1.0}, reward.error)


def smooth(r_y: float, r_o: list[float]) -> tuple[float, bool]:
    """Control 3, smooth: once a rollout is as good as y, y is no better than the group. Returns (r(y), smoothed?):
    r(y) := mean_j r(o_j) if max_j r(o_j) ≥ r(y). Applied after control 2.

    >>> smooth(6.0, [7.0, 1.0]), smooth(6.0, [5.0, 1.0])
    ((4.0, True), (6.0, False))
    """
    return (math.fsum(r_o) / len(r_o), True) if max(r_o) >= r_y else (r_y, False)

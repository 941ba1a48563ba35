"""The three reward controls of ViSurf (section 3.4 of the paper), and the rewards of each task.

Glossary
    response   text: y or a rollout; support/answers.py turns it into boxes or a *named* error
    reward     a record of named terms; the number r is their sum
    truth      what a response is held to: the label's answer, boxes in the frame the model sees
    side       of that frame: 840 pixels, 112 in the built-in world, 1000 parts for Qwen3-VL; another if
               the model sees the pictures larger or smaller
    task       prompt template, text of y, and reward (`TASKS`)
    control    1 align the text of y, 2 no thinking reward for y, 3 smooth r(y): `label_text`,
               `label_reward`, `smooth`

Grounding totals are those of the authors' released scorer (docs/paper.md, section 4):
    r = thinking (0, 1) + answer_format (0 … 2) + accuracy (0 … 3) + non_repeat (0, 1)  ≤ 7
Departure 1: with truth `[]` the released code gives a correct `[]` 2 points and a hallucinated box
    4. Here an empty prediction of an empty truth earns full format and accuracy. If exactly one of
    the two is empty, the accuracy is 0.
Departure 2: the released limits of 10 and 30 px belong to 840×840 pictures. In the built-in
    world's, of 112×112, they would pass nearly any box on the right thing. There they are 1.33 and
    4 px, the same share of a side.
Departure 3: the released code splits sentences at every '.', and so takes the decimals of "10.5,
    20.5, 30.5" for sentences that repeat each other. Here a '.' between two digits ends none.
Departure 4, with --label-thought rollout only: the paper's y has no thought. There y is the thought
    of one rollout of its own group and the label's answer, and is rewarded as the complete response
    that it then is (`borrowed_thought`).
"""
import functools
import json
import math
import random
import re
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from support import scenes
from support.answers import (MAX_CHARACTERS, MAX_OBJECTS, SPECIAL, anls, answer_text, boxed,
                             final_text, has_thinking_format, parse_boxes, parse_json,
                             relaxed_match, trailing_text)
from support.boxes import iou_matrix
from support.cells import accepted, read_accepted, read_boxes, read_choices, read_math, read_plain
from support.math_answers import math_equal
from support.mistakes import Mistake
from support.screen import say

FULL_ACCURACY = 3.0     # of boxes
# What stands after an item and after a key.
LABEL_STYLES = {"spaced": (", ", ": "), "compact": (",", ":")}


@dataclass(frozen=True)
class Reward:
    """Holds the points of each term by its name, and why the answer could not be read, or None."""
    terms: dict[str, float]
    error: str | None = None

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Task:
    """Holds all that a task is."""
    prompt: str                            # the user's turn; {question} stands for the question
    render: Callable[[str, str], str]      # (answer, style) → the text of y
    reward: Callable[..., Reward]          # (response, answer) → named terms, "accuracy" among them
    boxes: bool = False                    # answers are JSON boxes, converted with the image
    side: int | None = None                # of the frame; None: the reward does not depend on it
    frame: tuple[int, int] | None = None   # (width, height) of every image, whatever its aspect was
    strip: str | None = None               # cut off the lower-cased question; None: it stays
    read: Callable[[object, object], str] = read_plain      # (cell, its choices) → the answer


# --------------------------------------------------------------------------------------------------
# The three reward controls (section 3.4). All of them act on the label y only.

def label_text(task: str, answer: str, style: str, thought: str = "", before: str = "") -> str:
    """Control 1, align: returns y in the style that the model itself writes ("spaced" for
    Qwen2.5-VL), so that tokenisation alone does not make y unlikely. thought: comes first where the
    data has one (pretraining). before: the thought of a rollout with its tags (`borrowed_thought`),
    instead."""
    before = before or (f"<think>{thought}</think>" if thought else "")
    return before + TASKS[task].render(answer, style)


def borrowed_thought(rollouts: list[str], seed: int, place: int) -> str:
    """Departure 4: returns a rollout's "<think>…</think>" and the blanks behind it, or "" if no
    rollout thinks. The rollout is drawn by (seed, place) among those that do. Behind the thought it
    has <answer>…</answer> or, as the math prompt asks for, \\boxed{…}. A thought that holds such a
    mark or a special token is not borrowed. place: of the prompt in the endless sequence of
    examples."""
    thoughts = []
    for o in rollouts:
        if not (found := re.match(r"<think>.*?</think>\s*", o, re.DOTALL)):
            continue
        thought, rest = found[0], o[found.end():]
        marked = SPECIAL.search(thought) or "<answer>" in thought or r"\boxed{" in thought
        if not marked and (has_thinking_format(o) or r"\boxed{" in rest):
            thoughts.append(thought)
    return random.Random(f"{seed}/{place}/thought").choice(thoughts) if thoughts else ""


def label_reward(task: str, y: str, answer: str, pays_thinking: bool = False,
                 side: float | None = None) -> Reward:
    """Control 2, no thinking reward: y has no reasoning, so its thinking term is 0; format and
    accuracy stay. pays_thinking (the ablation): y is paid for thinking as a complete response is,
    and r(y) is 7 where it is 6 with the control. side: as in reward_in."""
    reward = reward_in(task, side)(y, answer)
    if "thinks" not in reward.terms:
        return reward
    return Reward({**reward.terms, "thinks": float(pays_thinking)}, reward.error)


def smooth(r_y: float, r_o: list[float]) -> tuple[float, bool]:
    """Control 3, smooth: once a rollout is as good as y, y is no better than the group. Returns
    (r(y), smoothed?): r(y) := mean_j r(o_j) if max_j r(o_j) ≥ r(y). Applied after control 2.

    >>> smooth(6.0, [7.0, 1.0]), smooth(6.0, [5.0, 1.0])
    ((4.0, True), (6.0, False))
    """
    return (math.fsum(r_o) / len(r_o), True) if max(r_o) >= r_y else (r_y, False)


def reward_group(cfg, task: str, answer: str, y: str | None, rollouts: list[str], side: float | None = None,
                 *, length_y: int, lengths: list[int], truncated: list[bool], group: int, step: int,
                 steps: int) -> tuple[list[Reward], list[float], bool]:
    """Section 3.4 on one group: returns the reward of each response, as terms and as the number r
    that is normalised, y first unless it is None; and whether y was smoothed. cfg: the options of
    train.py. side: as in reward_in.

    No term uses the rest yet: the tokens of y; the tokens of each rollout, and whether
    --max-new-tokens cut it off; the number of the group; the step, from 0, and the number of steps
    (objective.loss)."""
    rewards = [score(task, o, answer, side) for o in rollouts]
    r = [reward.total for reward in rewards]
    if y is None:
        return rewards, r, False
    complete = cfg.label_thought == "rollout" and has_thinking_format(y)  # departure 4
    pays = complete or cfg.reward_label_thinking
    y_reward = label_reward(task, y, answer, pays, side)                 # control 2
    r_y, smoothed = smooth(y_reward.total, r) if cfg.smoothing else (y_reward.total, False)    # control 3
    return [y_reward, *rewards], [r_y, *r], smoothed


# --------------------------------------------------------------------------------------------------
# What a task makes of texts

def user_text(task: str, question: str) -> str:
    """Returns the user's turn."""
    if TASKS[task].strip is not None:
        question = question.lower().strip(TASKS[task].strip)
    return TASKS[task].prompt.replace("{question}", question)


def read_label(task: str, value, choices=None) -> str:
    """Returns the answer in a cell of a data set, as `task` takes it, in Unicode's form NFC, which
    tokenizers give back. Raises ValueError if it cannot be a label of the task."""
    answer = unicodedata.normalize("NFC", TASKS[task].read(value, choices))
    if not answer.strip() or not (y := TASKS[task].render(answer, "spaced").strip()):
        raise ValueError("the solution is empty")
    if len(y) > MAX_CHARACTERS:
        raise ValueError(f"the solution has more than {MAX_CHARACTERS:,} characters")
    return answer


reported: set[tuple[str, str]] = set()   # failures of rewards whose traceback has been printed


def reward_in(task: str, side: float | None) -> Callable[[str, str], Reward]:
    """Returns the task's reward in a frame of this side, or of the task's own if it is None
    (`Prompt.side`)."""
    reward, own = TASKS[task].reward, TASKS[task].side
    return functools.partial(reward, side=side or own) if own else reward


def score(task: str, response: str, answer: str, side: float | None = None) -> Reward:
    """Returns the task's reward of a response, or 0 points and a named error if it cannot be
    computed: one odd text must not end a run of days. The first traceback of a kind is printed.
    side: as in reward_in."""
    try:
        reward = reward_in(task, side)(response, answer)
        return reward if math.isfinite(reward.total) else Reward({}, "reward_not_finite")
    except Mistake:      # of the installation, not of the text
        raise
    except Exception as error:
        name = f"reward_failed_{type(error).__name__}"
        if (task, name) not in reported:
            reported.add((task, name))
            say(f"the reward of task {task!r} failed on {response[:200]!a}; it counts as 0 points\n"
                + traceback.format_exc())
        return Reward({}, name)


def full_accuracy(task: str) -> float:
    """Returns the most points that the accuracy term of a task's reward can give."""
    return FULL_ACCURACY if TASKS[task].boxes else 1.0


def earned(task: str, y: str, answer: str) -> tuple[Reward, float]:
    """Returns the reward of y, after control 2, and its share of full accuracy, 0 … 1. Errors of
    the reward are not caught: data.check_example tells them of the row."""
    reward = label_reward(task, y, answer)
    return reward, reward.terms["accuracy"] / full_accuracy(task)


# --------------------------------------------------------------------------------------------------
# Grounding

def answer_format(response: str, truth: list[dict]) -> float:
    """Returns the mean over the items of 1[bbox_2d is a list of 4] + 1[point_2d is a list of 2]. An
    item that is no object counts and has neither. `[]` has no items: 0, as released, but 2 if the
    truth is empty too (departure 1)."""
    text = answer_text(response)
    items, error = parse_json(text) if text is not None else ([], "no_answer")
    if not items:
        return 2.0 if error is None and not truth else 0.0

    def is_list(item, key: str, count: int) -> bool:
        value = item.get(key) if isinstance(item, dict) else None
        return isinstance(value, list) and len(value) == count
    return sum(is_list(i, "bbox_2d", 4) + is_list(i, "point_2d", 2) for i in items) / len(items)


def non_repeat(response: str) -> float:
    """Returns 0 if at least two sentences repeat earlier ones, else 1. They are split at '.', but
    not within a number (departure 3)."""
    sentences = [s.strip() for s in re.split(r"(?<![0-9])\.|\.(?![0-9])", response) if s.strip()]
    return 0.0 if len(sentences) - len(set(sentences)) >= 2 else 1.0


def accuracy(predicted: list[dict], truth: list[dict], side: float = 840) -> float:
    """Returns 0 … 3: the sum over the best one-to-one matching, divided by the larger of the
    counts. Each (prediction, truth) pair scores 1[IoU > 0.5] + 1[mean |Δ corner| < 10 px] +
    1[points closer than 30 px and the predicted point in its own box]. The pixels are those of an
    840×840 picture; in a frame of another side the limits shrink with it."""
    predicted, truth = predicted[:MAX_OBJECTS], truth[:MAX_OBJECTS]
    if not predicted or not truth:
        return 3.0 if not predicted and not truth else 0.0
    boxes, points, true_boxes, true_points = (
        np.array([item[key] for item in items], float)
        for items in (predicted, truth) for key in ("bbox_2d", "point_2d"))
    inside = ((boxes[:, :2] <= points) & (points <= boxes[:, 2:])).all(1)
    near = np.linalg.norm(points[:, None] - true_points[None], axis=-1) < 30 * side / 840
    cells = ((iou_matrix(boxes, true_boxes) > 0.5).astype(float)
             + (np.abs(boxes[:, None] - true_boxes[None]).mean(-1) < 10 * side / 840)
             + (near & inside[:, None]))
    rows, columns = linear_sum_assignment(cells, maximize=True)
    return float(cells[rows, columns].sum()) / max(len(predicted), len(truth))


def grounding_reward(response: str, truth: str, side: float = 840, must_end: bool = False) -> Reward:
    """Returns the four terms. truth: JSON text of the boxes, in a frame of this side. must_end: an
    answer has its format only if nothing follows it; in the authors' reward text behind it is free
    unless the response has a thought."""
    if len(response) > MAX_CHARACTERS:
        terms = ("thinks", "answer_format", "accuracy", "non_repeat")
        return Reward(dict.fromkeys(terms, 0.0), "too_long")
    (predicted, error), true_items = parse_boxes(response), json.loads(truth)
    return Reward({
        "thinks": float(has_thinking_format(response)),
        # What can be read has full format.
        "answer_format": 0.0 if must_end and trailing_text(response) else
        2.0 if predicted else answer_format(response, true_items),
        "accuracy": 0.0 if error else accuracy(predicted, true_items, side),
        "non_repeat": non_repeat(response),
    }, error)


def render_grounding(truth: str, style: str) -> str:
    """Returns the text of y: <answer>[…]</answer>, its JSON in the style that reward control 1
    chooses.

    >>> render_grounding('[{"bbox_2d":[1,2,3,4],"point_2d":[2,3]}]', "spaced")
    '<answer>[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}]</answer>'
    """
    return f"<answer>{json.dumps(json.loads(truth), separators=LABEL_STYLES[style])}</answer>"


# --------------------------------------------------------------------------------------------------
# Short answers

def math_reward(response: str, truth: str) -> Reward:
    r"""Returns 1.0 if correct, 0.1 if wrong but boxed, 0 without \boxed{}."""
    answer = boxed(response[:MAX_CHARACTERS])
    if answer is None:
        return Reward({"accuracy": 0.0, "boxed": 0.0}, "no_boxed")
    right = math_equal(answer, *read_choices(truth))
    return Reward({"accuracy": float(right), "boxed": 0.0 if right else 0.1})


def render_boxed(answer: str, style: str) -> str:
    return f"\\boxed{{{read_choices(answer)[0]}}}"


def render_short(answer: str, style: str) -> str:
    return accepted(answer)[0]


def vqa_reward(response: str, truth: str) -> Reward:
    """Returns 1 if the response is an accepted answer, up to case, blanks around it and a final
    full stop; else 0."""
    def plain(text: str) -> str:
        return text.strip().removesuffix(".").strip().lower()
    return Reward({"accuracy": float(plain(final_text(response)) in map(plain, accepted(truth)))})


def chart_reward(response: str, truth: str) -> Reward:
    right = any(relaxed_match(final_text(response), text) for text in accepted(truth))
    return Reward({"accuracy": float(right)})


def document_reward(response: str, truth: str) -> Reward:
    return Reward({"accuracy": anls(final_text(response), accepted(truth))})


# --------------------------------------------------------------------------------------------------
# The tasks

GROUNDING_PROMPT = (  # the authors' evaluation prompt, to the letter
    'Please find "{question}" with bboxs and points.'
    "Compare the difference between object(s) and find the most closely matched object(s)."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
    "i.e., <think> thinking process here </think>"
    '<answer>[{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}, '
    '{"bbox_2d": [225, 296, 706, 786], "point_2d": [302, 410]}]</answer>')
# The prompt that their earlier trainer used: a newline after the image, no blanks inside the lists.
GROUNDING_TRAIN_PROMPT = "\n" + re.sub(r"(\d), ", r"\1,", GROUNDING_PROMPT)
MATH_PROMPT = (
    "{question} First think about the question and then provide the answer. The answer is in latex "
    "format and wrapped using the \\boxed{} command. The thinking process and answer are enclosed "
    "within <think> </think> and \\boxed{} tags, respectively. i.e., <think> thinking process "
    "here. </think>\\boxed{2}")
# Qwen2.5-VL's own, for charts and documents.
SHORT_PROMPT = "{question}\nAnswer the question using a single word or phrase."

GROUNDING = Task(prompt=GROUNDING_PROMPT, render=render_grounding, reward=grounding_reward,
                 boxes=True, side=840, frame=(840, 840), strip='."?!', read=read_boxes)
MATH = Task(prompt=MATH_PROMPT, render=render_boxed, reward=math_reward, strip='"!',
            read=read_math)
VQA = Task(prompt="{question}", render=render_short, reward=vqa_reward, read=read_accepted)
TASKS = {
    "grounding": GROUNDING,
    "grounding_train": replace(GROUNDING, prompt=GROUNDING_TRAIN_PROMPT, strip="."),
    "math": MATH,
    "chartqa": replace(VQA, prompt=SHORT_PROMPT, reward=chart_reward),
    "docvqa": replace(VQA, prompt=SHORT_PROMPT, reward=document_reward),
    "vqa": VQA,
    # The built-in world asks in fewer words, for speed, about pictures of 112×112.
    "scene_grounding": replace(GROUNDING, prompt=scenes.PROMPT, frame=None, side=scenes.SIZE,
                               reward=functools.partial(grounding_reward, must_end=True)),
    "scene_math": replace(MATH, prompt="{question}", strip=None),
}

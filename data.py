"""Prompts, and the packing of a group into one row.

    Example (support/sources.py)
    → Prompt (tokens, M-RoPE positions, patches)
    → Row (the prompt and its S responses)
    → Batch

Everything that depends on the image size happens once, in `Processor.prompt`: resizing, token
count, positions, and the conversion of boxes into the frame the model sees. Prompts are never
truncated.

Glossary
    frame      the size of a picture as the model sees it, for Qwen3-VL always 1000×1000; boxes of
               the label and of the answers are in its pixels
    segment    of each token of a row: 0 in the prompt, 1, 2, … in the responses, −1 in padding
    predictor  of each response token: the token whose output predicts it
    grid       (gh, gw), the patches of a picture per column and row; an image token stands for 2×2
    B rows, T tokens of a row, P prompt tokens, S = G+1 responses, R tokens of a response, N patches
"""
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from model import Config, mrope_positions
from rewards import TASKS, Reward, earned, label_text, read_label, score, user_text
from support import sources
from support.answers import MAX_CHARACTERS, check_text
from support.boxes import FORMATS, UNITS, convert_boxes
from support.folders import IMAGE_PLACEHOLDER, end_of_turn, image_settings, load_tokenizer
from support.images import MARK, smart_resize
from support.mistakes import Mistake
from support.sources import Example
from support.weights import local_folder, read_eos_ids


def load(data: str, task: str = "", skip_bad_rows: bool = False, columns: str = "", fits=None,
         flag: str = "--data", box_format: str = FORMATS[0], box_units: str = UNITS[0]):
    """Returns the examples that a --data string names (support/sources.py), each checked. task: of
    rows that do not say theirs; fits(example, sizes): a check by the model that is trained
    (`Processor.check_label`), like check_example; flag: the option that gave the string."""
    def check(example: Example, sizes: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
        return check_example(example) + (fits(example, sizes) if fits else [])
    rules = sources.Rules(TASKS, read_label, check, MAX_CHARACTERS)
    source = sources.load(data, rules, task, skip_bad_rows, columns, flag, (box_format, box_units))
    if fits and isinstance(source, sources.Scenes):
        source.look_at_some(fits, f"{flag} {data}")
    return source


def check_example(example: Example) -> list[tuple[str, str]]:
    """Returns (kind of oddity, details) of each; the one oddity so far: y earns less than full
    accuracy. Raises ValueError if the example cannot be trained or evaluated on. An empty answer is
    not known yet: it will be the box around a mask."""
    check_text("id", example.id)
    check_text("question", example.question)
    check_text("thought", example.thought)
    check_text("system turn", example.system)
    if not example.answer:
        return []
    y = label_text(example.task, example.answer, "spaced", example.thought)
    check_text("label", y)
    try:
        reward, share = earned(example.task, y, example.answer)
    except Mistake:
        raise
    except Exception as error:
        raise ValueError(f"the reward of task {example.task} fails on its own label "
                         f"{y[:200]!r}: {type(error).__name__}: {error}") from None
    terms = ", ".join(f"{name} {points:g}" for name, points in reward.terms.items())
    if share <= 0 or reward.total <= 0:
        raise ValueError(f"the label {y[:200]!r} has no accuracy by the reward of its own task "
                         f"{example.task}: {terms}")
    if share < 1:
        return [("labels earn less than full accuracy by their own reward",
                 f"{y[:200]} earns {terms}")]
    return []


# --------------------------------------------------------------------------------------------------
# Prompts

@dataclass
class Prompt:
    """Holds an example as the model sees it."""
    example: Example
    tokens: list[int]         # P, image placeholders included
    position: Tensor          # [3, P] M-RoPE ids
    patches: Tensor           # [N, 3·2·14·14] (Qwen3-VL: 16·16) of one image after the other, N = 0 without any
    grids: list[tuple[int, int]]    # (gh, gw) patches of each
    answer: str               # the label's answer, boxes in the frame
    images: list[Image.Image] = field(default_factory=list, repr=False)     # of the frame's size
    side: float | None = None   # of the frame, by which the limits of the reward go (`Processor.side`)

    @property
    def size(self) -> tuple[int, int]:
        """Returns (width, height) of the frame of the first image; boxes have no other."""
        return self.images[0].size if self.images else (0, 0)

    @property
    def original_size(self) -> tuple[int, int]:
        """Returns its size before."""
        return self.example.images[0].size if self.example.images else (0, 0)

    @property
    def next_position(self) -> int:
        """Returns where every response goes on, on all three axes."""
        return int(self.position.max()) + 1


class Processor:
    """Makes prompts by a model folder's tokenizer, chat template and image settings. min_pixels,
    max_pixels: of a picture as the model sees it; 0: the folder's own."""
    def __init__(self, folder, min_pixels: int = 0, max_pixels: int = 0):
        folder = local_folder(folder)
        self.config = Config.from_json(folder / "config.json")
        self.eos_ids = read_eos_ids(folder, self.config)
        self.tokenizer = load_tokenizer(folder, self.config, self.eos_ids)
        settings = image_settings(folder, self.config)
        self.min_pixels = min_pixels or settings["min_pixels"]
        self.max_pixels = max_pixels or settings["max_pixels"]
        if (min_pixels or max_pixels) and self.min_pixels > self.max_pixels:
            raise Mistake(f"--min-pixels {self.min_pixels:,} is more than --max-pixels "
                          f"{self.max_pixels:,}; where one is not given, it is that of {folder}")
        mean, std = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
        # (x / 255 − mean) / std = x · scale − shift
        self.scale, self.shift = 1 / (255 * std), mean / std
        self.end_of_turn = end_of_turn(folder, self.tokenizer, self.eos_ids)

    def patches(self, image: Image.Image, frame: tuple[int, int] | None = None
                ) -> tuple[Tensor, tuple[int, int], Image.Image]:
        """Returns the patches [N, 3·2·14·14] (Qwen3-VL: 16·16) of an RGB image, (gh, gw), and the resized image. A
        still image is doubled in time. frame: (width, height) to resize to first, bilinear and
        whatever the aspect, as the authors do for grounding."""
        c = self.config
        p, t, merge = c.vision_patch_size, c.vision_temporal_patch_size, c.vision_spatial_merge_size
        if frame and image.size != frame:
            image = image.resize(frame, Image.Resampling.BILINEAR)
        height, width = smart_resize(image.height, image.width, p * merge, self.min_pixels,
                                     self.max_pixels)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).float()      # [height, width, 3]
        pixels.mul_(self.scale).sub_(self.shift)
        patches = rearrange(pixels, "(h a y) (w b x) c -> (h w a b) c y x",
                            a=merge, b=merge, y=p, x=p)
        return repeat(patches, "n c y x -> n (c t y x)", t=t), (height // p, width // p), image

    def chat(self, example: Example, images: int) -> str:
        """Returns the prompt as text: the system turn if there is one, the user's turn, and the
        start of the model's. The images stand at the marks in the question, or all of them
        first."""
        text, content = user_text(example.task, example.question), []
        pieces = text.split(MARK) if MARK in example.question else [*[""] * images, text]
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] * (number > 0)
            content += [{"type": "text", "text": piece}] * bool(piece)
        turns = [{"role": "system", "content": example.system}] * bool(example.system) + [
            {"role": "user", "content": content}]
        written = self.tokenizer.apply_chat_template(turns, tokenize=False,
                                                     add_generation_prompt=True)
        if example.system not in written:
            raise ValueError("the model's chat template leaves out the system turn")
        return written

    def prompt(self, example: Example) -> Prompt:
        """Returns the prompt of an example, its images in patches and its boxes in the frame."""
        check_text("question", user_text(example.task, example.question))
        task, answer = TASKS[example.task], example.answer
        made = [self.patches(image, task.frame) for image in example.images]
        patches = torch.cat([torch.empty(0), *(patches for patches, _, _ in made)])     # [0] joins anything
        grids, images = [grid for _, grid, _ in made], [image for _, _, image in made]
        if task.boxes and images:
            if parts := self.config.boxes_in:
                images = [image.resize((parts, parts)) for image in images]
            answer = convert_boxes(answer, example.images[0].size, images[0].size)
        merge = self.config.vision_spatial_merge_size
        image_tokens = [gh * gw // merge ** 2 for gh, gw in grids]
        tokens = []
        pieces = self.chat(example, len(grids)).split(IMAGE_PLACEHOLDER)
        for piece, count in zip(pieces, [*image_tokens, 0], strict=True):
            tokens += self.tokenizer(piece, add_special_tokens=False).input_ids
            tokens += [self.config.image_token_id] * count
        position = mrope_positions(tokens, grids, self.config.image_token_id, merge)
        side = self.side(task, images[0].width, example.images[0].width) if images else None
        return Prompt(example, tokens, position, patches, grids, answer, images, side)

    def side(self, task, seen: int, stored: int) -> float | None:
        """Returns the side of the frame, of which the reward's limits are shares: the model's own
        (Qwen3-VL: 1000), or the task's, by as much larger or smaller as the model sees the picture.
        seen, stored: the picture's width as the model sees it, and before."""
        if not task.side:
            return None
        return self.config.boxes_in or task.side * seen / (task.frame[0] if task.frame else stored)

    def check_label(self, example: Example, sizes: Sequence[tuple[int, int]], style: str,
                    longest: int, max_row_tokens: int = 0, sampled: bool = True,
                    thought: bool = False) -> list[tuple[str, str]]:
        """Returns what is odd, as check_example does: y is longer than a rollout. Raises ValueError
        if the text that comes back from y's own tokens earns less than y, so that no rollout can
        equal it; or if the prompt with y, or with a rollout of `longest` tokens, exceeds
        max_row_tokens (0: no limit). sizes: (width, height) of the pictures, which are not decoded
        for this. style: of y. sampled: there are rollouts. thought: y may have the thought of
        one."""
        task, answer = TASKS[example.task], example.answer
        side = self.config.vision_patch_size * self.config.vision_spatial_merge_size
        seen = [smart_resize(height, width, side, self.min_pixels, self.max_pixels)[::-1]
                for width, height in (task.frame or size for size in sizes)]
        if task.boxes and sizes:    # no answer yet: the box around a mask, at most so many digits
            [size], parts = sizes, self.config.boxes_in
            answer = answer or task.read([*size, *size], None)
            answer = convert_boxes(answer, size, (parts, parts) if parts else seen[0])
        y = label_text(example.task, answer, style, example.thought)
        tokens = self.encode(y)
        if (back := self.decode(tokens)) != y:
            frame = self.side(task, seen[0][0], sizes[0][0]) if seen else None
            points, most = (score(example.task, text, answer, frame).total for text in (back, y))
            if points < most:
                raise ValueError("no rollout can equal the label: its text comes back from its "
                                 f"own tokens as {back[:99]!a}, which earns {points:g} and not "
                                 f"{most:g}; it was {y[:99]!a}")
        label = len(tokens)
        if max_row_tokens:
            pieces = self.chat(example, len(sizes))
            count = len(self.tokenizer(pieces, add_special_tokens=False).input_ids)
            count += sum(width * height // side ** 2 - 1 for width, height in seen)
            rollout = longest if sampled else 1
            response = label + rollout if thought else max(label, rollout)
            if count + response > max_row_tokens:
                taken = sum(width * height // side ** 2 for width, height in seen)
                left = (max_row_tokens - response - count + taken) // max(1, len(seen))
                smaller = f"; --max-pixels {left * side ** 2} makes its pictures small enough"
                raise ValueError(f"its prompt of {count} tokens, and a response of {response}, "
                                 f"exceed --max-row-tokens {max_row_tokens}"
                                 + smaller * (taken > 0 and left > 0))
        odd = f"labels are longer than --max-new-tokens {longest}, which no rollout can equal"
        return [(odd, f"y has {label} tokens")] if label > longest else []

    def encode(self, response: str) -> list[int]:
        """Returns the tokens of a label's text and the one that ends a turn: the ids that carry
        r(y)."""
        check_text("label", response)
        return self.tokenizer(response, add_special_tokens=False).input_ids + [self.end_of_turn]

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of a response, without the EOS that ends it. Other special tokens
        stay."""
        ends = tokens and tokens[-1] in self.eos_ids
        return self.tokenizer.decode(tokens[:-1] if ends else tokens)


# --------------------------------------------------------------------------------------------------
# Rows

@dataclass
class Response:
    """Holds a continuation of a prompt, y or a rollout, and what is known of it."""
    tokens: list[int]               # R, with the one that ends it, unless `truncated`
    logp: list[float] = field(default_factory=list)     # R, of each token as sampled; none of y
    truncated: bool = False         # at max_new_tokens
    entropy: list[float] = field(default_factory=list)  # R, of what each was drawn from; none of y
    is_y: bool = False
    reward: Reward | None = None    # its terms; of y after control 2
    r: float = 0.0                  # its sum; of y after control 3
    advantage: float = 0.0          # Â, Eq. 6; of y Eq. 7


@dataclass
class Row:
    """Holds a prompt and some of its responses, T tokens behind each other (`pack_group`)."""
    prompt: Prompt
    responses: list[Response]
    tokens: list[int]      # T
    segment: list[int]     # T: 0 prompt, 1, 2, … its responses
    predictor: list[int]   # T: where in the row the token's predictor is; 0 for the prompt's
    position: Tensor       # [3, T]


def pack_group(prompt: Prompt, responses: list[Response], max_row_tokens: int = 0) -> list[Row]:
    """Returns one prompt and the responses to it as one row: the image and the prompt are encoded
    once, not S times.

    With a prompt of the tokens 7 8 and the responses 1 2 and 3 4 5:
        tokens      7 8 1 2 3 4 5
        segment     0 0 1 1 2 2 2
        predictor   0 0 1 2 1 4 5      the first of each response is predicted by the prompt's last
        position    0 1 2 3 2 3 4      every response goes on from the prompt's end
    A row longer than max_row_tokens (0: no limit) becomes several, each with the prompt and whole
    responses. Raises Mistake if a single response does not fit.
    """
    P = len(prompt.tokens)
    rows, start = [], 0
    while start < len(responses):
        tokens, segment, predictor = list(prompt.tokens), [0] * P, [0] * P
        position = [prompt.position]
        end = start
        while end < len(responses):
            response = responses[end].tokens
            if max_row_tokens and len(tokens) + len(response) > max_row_tokens:
                break
            predictor += [P - 1, *range(len(tokens), len(tokens) + len(response) - 1)]
            tokens += response
            segment += [end - start + 1] * len(response)
            steps = torch.arange(len(response)) + prompt.next_position
            position.append(repeat(steps, "r -> three r", three=3))
            end += 1
        if end == start:
            raise Mistake(f"example {prompt.example.id}: its prompt of {P} tokens and a response "
                          f"of {len(response)} exceed --max-row-tokens {max_row_tokens}")
        rows.append(Row(prompt, responses[start:end], tokens, segment, predictor,
                        torch.cat(position, 1)))
        start = end
    return rows


@dataclass
class Batch:
    """Holds rows padded to the longest: the keyword arguments of the model's forward."""
    tokens: Tensor      # [B, T]
    segment: Tensor     # [B, T], −1 in padding
    predictor: Tensor   # [B, T]
    position: Tensor    # [3, B, T]
    patches: Tensor     # [N, 3·2·14·14] of all rows
    grids: list[tuple[int, int]]


def collate(rows: list[Row], device="cpu") -> Batch:
    """Returns B rows as tensors [B, T], padded on the right to the longest."""
    if not rows:
        raise ValueError("collate: the list of rows is empty")
    T = max(len(row.tokens) for row in rows)

    def pad(values, fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (T - len(v)) for v in values], device=device)

    position = torch.stack([torch.nn.functional.pad(row.position, (0, T - row.position.shape[1]))
                            for row in rows], 1)
    patches, grids = collate_images([row.prompt for row in rows], device)
    return Batch(tokens=pad([row.tokens for row in rows], 0),
                 segment=pad([row.segment for row in rows], -1),
                 predictor=pad([row.predictor for row in rows], 0),
                 position=position.to(device), patches=patches, grids=grids)


def collate_images(prompts: list[Prompt], device="cpu") -> tuple[Tensor, list[tuple[int, int]]]:
    """Returns the patches of all pictures, [N, …], and their grids, in the order of the prompts."""
    patches = torch.cat([torch.empty(0), *(p.patches for p in prompts)])
    return patches.to(device), [grid for p in prompts for grid in p.grids]

"""Decoding by CUDA graph: one launch a token instead of a large model's thousand, which take longer
to launch than to run."""
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WINDOW = 128   # a graph reads as many slots of the suffix as are written, rounded up to this


def when_to_leave(device: torch.device) -> tuple[int, float]:
    """Returns after how many tokens rollouts that have ended are looked for, and which share of the
    batch must have ended for them to leave it. On a GPU the host waits whenever it looks, and
    leaving copies the cache and captures a new graph."""
    return (1, 0.0) if device.type == "cpu" else (4, 0.5)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a·b [..., m, n], at least in float32, of a [..., m, k] and b [..., k, n]. A GPU reads
    bfloat16 as it is, and adds up in float32."""
    if a.device.type != "cpu" and a.dtype == torch.bfloat16:
        flat = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
        return flat.unflatten(0, a.shape[:-2])
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


@functools.cache
def other_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


class GraphedStep:
    """Does what `step(model, token, position, cache)` does (rollout.decode_one_token), for the
    calls of one `generate`. Captures anew when prompts have left or the window has grown. On a CPU
    it uses the same buffers without a capture."""
    def __init__(self, step: Callable[..., Tensor]):
        self.step = step
        self.cache: Any = None
        self.graph: Any = None
        self.shape = 0, 0

    def __call__(self, model, token: Tensor, position: Tensor, cache) -> Tensor:
        # More slots than are written, so that the graph serves the next steps as well.
        cache.window = min(-(-cache.window // WINDOW) * WINDOW, cache.max_new_tokens)
        if self.cache is not cache or self.shape != (len(token), cache.window):
            self.graph = None                           # frees the old graph's memory first
            self.cache, self.shape = cache, (len(token), cache.window)
            self.token, self.position = token.clone(), position.clone()
            if token.is_cuda:
                self.capture(model)
        self.token.copy_(token)
        self.position.copy_(position)
        if self.graph is None:
            return self.step(model, self.token, self.position, cache)
        self.graph.replay()
        return self.hidden

    def capture(self, model) -> None:
        """Records the step. Libraries must have run once before, on another stream than the
        default, always the same: cuBLAS keeps 32 MB for each. The recording itself runs nothing."""
        slot, stream = self.cache.slot.clone(), other_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(model, self.token, self.position, self.cache)
            self.cache.slot.copy_(slot)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.hidden = self.step(model, self.token, self.position, self.cache)

"""Products of one input as one product while sampling on a GPU: q, k and v; gate and up.

`lay_side_by_side` moves their weights next to each other in memory. They are then one matrix
without a copy, and stay so when an optimizer or LoRA changes them in place. Names, shapes and files
stay as well. Training multiplies by each one separately.
"""
import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICES = ("cuda",)     # on a CPU it is no gain (docs/measured.md)


def groups(model) -> Iterator[tuple[nn.Module, list[list[Tensor]]]]:
    """Yields the parts of the decoder whose method `products` multiplies one input by several
    layers; the weights of these layers; and their biases, if they have some."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for part, layers in ((attention, (attention.q_proj, attention.k_proj, attention.v_proj)),
                             (mlp, (mlp.gate_proj, mlp.up_proj))):
            both = [x.weight for x in layers], [x.bias for x in layers]
            yield part, [tensors for tensors in both if tensors[0] is not None]


def lay_side_by_side(model) -> None:
    for _, kinds in groups(model):
        for tensors in kinds:
            whole = torch.cat([t.detach() for t in tensors])
            for t, piece in zip(tensors, whole.split([len(t) for t in tensors])):
                t.data = piece


def joined(tensors: list[Tensor]) -> Tensor:
    """Returns the tensors as one: themselves if they lie side by side, otherwise a copy."""
    parts = [t.detach() for t in tensors]
    place, memory = parts[0].data_ptr(), parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.untyped_storage().data_ptr() != memory:
            return torch.cat(parts)
        place += part.nbytes
    return parts[0].as_strided((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].stride())


def product(last: int, weight_and_bias: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Returns what the last layer gives, of that width, and before it what the others give."""
    return F.linear(x, *weight_and_bias).tensor_split([-last], -1)


@contextlib.contextmanager
def joined_products(model):
    """Inside, on a GPU, the products of each group are one."""
    parts = [*groups(model)] if model.lm_head.weight.device.type in DEVICES else []
    try:
        for part, kinds in parts:
            part.products = partial(product, len(kinds[0][-1]), [*map(joined, kinds)])
        yield
    finally:
        for part, _ in parts:
            vars(part).pop("products", None)

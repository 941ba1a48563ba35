"""Large float32 matrix products on a CPU through oneDNN: equal up to rounding, up to twice as fast.

PyTorch computes them by MKL. On AMD's cores MKL reaches about half of the speed of oneDNN, which
runs AVX-512 there (experiments/bench.py, "oneDNN / MKL"; other makers' cores were not measured).
Everything else is nn.Linear.
"""
import contextlib
import ctypes
import os

import torch
from einops import rearrange
from torch import Tensor, nn

# Below these, the way to oneDNN costs more than it saves.
ONEDNN_FROM = 2 ** 23    # multiplications in a product
PACKED_FROM = 2 ** 18    # weights in the largest matrix of a model


def has_onednn(weight: Tensor) -> bool:
    return (weight.device.type == "cpu" and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes F.linear without gradient, by the operator of torch.compile. The public way,
    Tensor.to_mkldnn, copies every x."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """Returns x·Wᵀ + b [..., N]. x [..., K], weight [N, K], bias [N] or None."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        columns = rearrange(grad, "... n -> n (...)")
        return (onednn_linear(grad, weight.t()) if for_x else None,
                onednn_linear(columns, rearrange(x, "... k -> k (...)")) if for_weight else None,
                columns.sum(1) if for_bias else None)


class Linear(nn.Linear):
    """nn.Linear, by oneDNN where that is faster (`use_onednn`)."""
    packed: Tensor | None = None    # the weights in oneDNN's own order, within `packed_weights`

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return onednn_linear(x, self.packed, self.bias)
        if x.numel() * len(self.weight) >= ONEDNN_FROM and has_onednn(self.weight):
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


def use_onednn(model: nn.Module) -> nn.Module:
    """Makes a Linear of every nn.Linear of a loaded model (support/equip.py). Call it before the
    first product: oneDNN keeps what it built for each of the last 1,024 shapes. Rows differ in
    length every time, so resident memory would climb by gigabytes. With few kept, and
    give_memory_back after every step, it stays flat."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    return model


@contextlib.contextmanager
def packed_weights(model: nn.Module):
    """Holds a second copy of the weights while sampling, in oneDNN's own order. For the few tokens
    of a decoding step, bringing them into that order takes as long as the product. All layers are
    packed if the model has large matrices, otherwise none."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    if not any(layer.weight.numel() > PACKED_FROM and has_onednn(layer.weight) for layer in layers):
        layers = []
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        yield
    finally:
        for layer in layers:
            layer.packed = None


def give_memory_back() -> None:
    """Frees the pages that glibc keeps for later. Other C libraries have no malloc_trim."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)

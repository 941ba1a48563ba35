"""A whole step on an accelerator that is not there: tensors that say they lie on it, computed by the CPU. What would
mix devices on a GPU is an error here, and waits for the device are counted, but for those of masks that pick elements."""
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import rollout
import train
from data import Processor, Response, collate, pack_group
from eval import evaluate
from experiments import bench
from model import load_model
from rollout import generate, uniforms
from support.lora import add_lora, merge_after
from support.optimizers import make_optimizers
from support.sources import Scenes

TINY = Path(__file__).resolve().parent.parent / "assets/tiny"
FAR = torch.device("meta")       # the only device that every build of PyTorch lets tensors claim
waits: list[str] = []        # each time that the host waited for the device, by the name of the operator


class Far(torch.Tensor):
    """A tensor of that device; inner: its numbers."""
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        far = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=FAR, requires_grad=inner.requires_grad)
        far.inner = inner
        return far

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def tolist(self):
        waits.append("tolist")
        return self.inner.tolist()


def compute(func, args, kwargs):
    """One operator. RuntimeError: of its tensors some are far and some are not, but for scalars and indices."""
    name, tensors = func.overloadpacket.__name__, []

    def near(x):
        tensors.extend([x] if isinstance(x, torch.Tensor) else [])
        return x.inner if isinstance(x, Far) else x
    near_args, near_kwargs = tree_map(near, args), tree_map(near, kwargs)
    goal = near_kwargs.get("device")
    if goal is not None:
        near_kwargs["device"] = torch.device("cpu")
    if func is torch.ops.aten.bmm.dtype:        # a CPU has none: of bfloat16, added up in float32
        near_args, func = [x.to(args[2]) for x in near_args[:2]], torch.ops.aten.bmm.default
    far = any(isinstance(t, Far) for t in tensors)
    host = [t for t in tensors if not isinstance(t, Far) and t.dim()]
    indexed = name in ("index", "index_put_", "_index_put_impl_") and isinstance(args[0], Far)
    if far and host and not indexed and name not in ("_to_copy", "copy_"):
        raise RuntimeError(f"{func} of tensors on the device and of others: {[tuple(t.shape) for t in host]}")
    if far and (name in ("_local_scalar_dense", "nonzero", "equal") or goal is not None and goal.type == "cpu"):
        waits.append(name)
    out = func(*near_args, **near_kwargs)
    if name == "copy_":
        return args[0]
    if not (far if goal is None else goal.type == "meta"):
        return out
    same = {id(t.inner): t for t in tensors if isinstance(t, Far)}
    return tree_map(lambda x: (same[id(x)] if id(x) in same else Far(x)) if isinstance(x, torch.Tensor) else x, out)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Alone(nn.Module):
    """What train.update wants of DistributedDataParallel, which knows no such device."""
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **batch):
        return self.module(**batch)

    no_sync = contextlib.nullcontext


@pytest.fixture
def far(monkeypatch):
    monkeypatch.setattr(train, "gather_json", lambda value, device: [value])
    monkeypatch.setattr(train, "add_over_ranks", lambda values, device: values)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with torch.device("cpu"):
        torch.empty(0)              # torch notes at its first use which functions a device context is for
    plain = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", **kw: plain(data, device="cpu", **kw).to(device))
    torch.__future__.set_swap_module_params_on_conversion(True)        # or tied weights would become two
    with Watching(), sdpa_kernel(SDPBackend.MATH):
        yield FAR
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("settings", [
    {}, {"precision": "bfloat16", "checkpoint_activations": "blocks"}, {"lora_rank": 2, "kl": 0.1, "inner_epochs": 2},
    {"label_thought": "rollout", "normaliser": "seq-mean", "checkpoint_activations": "cheap"}])
def test_a_step_stays_on_its_device(far, monkeypatch, settings):
    """Sampling, rewards, update, evaluation: the same numbers as on the CPU, and few waits: one in four tokens and three
    more while sampling, until what was sampled is read; nine a micro-batch, whatever the number of layers."""
    cfg = train.Config(rollouts=3, max_new_tokens=12, grad_clip=1e9, micro_rows=2, **settings)
    processor = Processor(TINY)
    prompts = [processor.prompt(Scenes("train")[i]) for i in range(4)]

    def step(device):
        torch.manual_seed(0)
        model = load_model(TINY, getattr(torch, cfg.precision), device)
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank, 4.0, "model.layers|visual", str(TINY))
        reference = load_model(TINY, device=device) if cfg.kl else None
        optimizers = make_optimizers(cfg, model)
        merge_after(optimizers[-1], model)
        before = len(waits)
        groups = train.make_groups(cfg, model, processor, prompts, 0)
        sampling, before = sampled[0] - before if sampled else 0, len(waits)
        for group in groups:
            for response, value in zip(group.responses, (0.5, -1.0, 0.25, 0.25)):
                response.advantage = value
        result = train.update(cfg, Alone(model), reference, optimizers, groups, train.Meter())
        training = len(waits) - before
        asked = [Scenes("val")[i] for i in range(3)]
        answers = [record.response for record, _ in evaluate(model, processor, asked, 12, 3)]
        tokens = [o.tokens for group in groups for o in group.responses]
        total = sum(float(p.detach().double().sum()) for p in model.parameters())
        return result, tokens, answers, sampling, training, total
    sampled, collect = [], rollout.collect
    monkeypatch.setattr(rollout, "collect", lambda *args: sampled.append(len(waits)) or collect(*args))
    result, tokens, answers, sampling, training, total = step(far)
    passes = 1 if cfg.inner_epochs == 1 else 4         # a second step, log-probs before it and of the reference
    assert 0 < sampling <= cfg.max_new_tokens // 4 + 3 and 0 < training <= passes * 2 * 9
    plain = step(torch.device("cpu"))
    assert tokens == plain[1] and answers == plain[2]
    assert result[:2] == pytest.approx(plain[0][:2], rel=1e-2 if cfg.precision == "bfloat16" else 1e-4)
    assert total == pytest.approx(plain[5], rel=1e-4)


def test_a_tensor_of_the_wrong_device_is_noticed(far, monkeypatch):
    """As if one .to(device), or one tolist, had been forgotten."""
    model, processor = load_model(TINY, device=far), Processor(TINY)
    prompt = processor.prompt(Scenes("train")[0])
    row = collate(pack_group(prompt, [Response([5, 6, 7])]), far)
    model(**vars(row))
    with pytest.raises(RuntimeError, match="on the device and of others"):
        model(**vars(replace(row, position=row.position.cpu())))
    with pytest.raises(RuntimeError, match="numpy"):
        row.tokens.numpy()
    plain = rollout.collate_images
    monkeypatch.setattr(rollout, "collate_images", lambda prompts, device: plain(prompts, "cpu"))
    with pytest.raises(RuntimeError, match="on the device and of others"):
        generate(model, [prompt], 4, uniforms(0, [0], 2, 4))


@pytest.mark.parametrize("size, most", [("3B", 2.0), ("7B", 1.7)])
def test_a_token_step_has_few_operators_and_moves_few_bytes(tmp_path, size, most):
    """Those of a GPU, counted on tensors without memory: 26 operators a layer, and 1.8 and 1.5 times the bytes of all
    weights and caches, for 128 rollouts. A copy of the prompts' keys in every step would be 30 and 2.0."""
    table = bench.Table()
    bench.counted(table, size, tmp_path / size, 16, 8, 1160, 128)
    [line] = table
    assert line["operators_per_layer"] <= 27 and 1 < line["times_bound"] < most
    assert line["gb_bound"] == pytest.approx({"3B": 7.46, "7B": 16.1}[size], rel=1e-2)
    assert line["gb_drawing"] < 2.2


def test_attention_is_not_cudnns():
    """It gives NaN gradients with a mask at some lengths: pytorch/pytorch#196678."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()

"""AdamW with bfloat16 weights, and the optimizers whose state is sharded over the ranks."""
from pathlib import Path

import pytest
import torch
from processes import free_port, run_ranks
from safetensors.torch import load_file, save_file

import train
from model import load_model, random_model
from support.optimizers import MasterAdamW, make_optimizers, share_of_lr
from support.checkpoints import load_optimizer, optimizer_tensors

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def gradients(step: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(step)).to(like.dtype)


def run(optimizer, parameter: torch.Tensor, steps: range) -> torch.Tensor:
    for step in steps:
        parameter.grad = gradients(step, parameter)
        optimizer.step()
    return parameter.detach().clone()


def start(dtype=torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float32).view(3, 4).to(dtype).requires_grad_()


def test_in_float32_it_is_adamw():
    ours, reference = start(), start()
    run(MasterAdamW([ours], **SETTINGS), ours, range(20))
    run(torch.optim.AdamW([reference], **SETTINGS), reference, range(20))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


def test_small_updates_of_bfloat16_weights_add_up():
    """An update of 1e-4 is below half the distance of two bfloat16 numbers around 1 (1/256): alone it is rounded away,
    a hundred of them are not."""
    def ones():
        return torch.ones(4, dtype=torch.bfloat16).requires_grad_()
    ours, rounded = ones(), ones()
    for optimizer, parameter in ((MasterAdamW([ours], 1e-4, (0.9, 0.999), 0.0), ours),
                                 (torch.optim.AdamW([rounded], 1e-4, (0.9, 0.999), weight_decay=0.0), rounded)):
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(rounded, torch.ones_like(rounded))
    assert torch.equal(ours, torch.full_like(ours, 0.99))    # Adam's update of a constant gradient is lr a step


@pytest.mark.parametrize("host", [False, True])
def test_state_stays_float32_when_it_is_loaded(tmp_path, host):
    whole, half = start(torch.bfloat16), start(torch.bfloat16)
    first = MasterAdamW([half], **SETTINGS, host=host)
    run(first, half, range(5))
    rest = half.detach().clone().requires_grad_()
    second = MasterAdamW([rest], **SETTINGS, host=host)
    save_file(optimizer_tensors(first), tmp_path / "a.safetensors")
    load_optimizer(second, tmp_path / "a.safetensors")
    assert {v.dtype for v in second.state[rest].values()} == {torch.float32}
    assert torch.equal(run(second, rest, range(5, 10)), run(MasterAdamW([whole], **SETTINGS), whole, range(10)))


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16"}, {"optimizer": "muon"}])
def test_adam_eps_makes_small_gradients_small_steps(settings, monkeypatch):
    """The first step of AdamW is lr · g / (|g| + eps): half of lr where g = eps, nearly lr where it is far above."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    model = load_model(Path(__file__).resolve().parent.parent / "assets/tiny").bfloat16().float()
    cfg = train.Config(lr=0.5, adam_eps=1e-3, weight_decay=0.0, **settings)
    *_, adamw = make_optimizers(cfg, model)
    weight = model.model.norm.weight                                # a vector: AdamW's in every setting
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 1e-3)
    weight.grad[0] = 10.0
    adamw.step()
    moved = (before - weight.detach()) / 0.5
    expected = torch.full_like(moved, 0.5).index_fill(0, torch.tensor([0]), 1.0)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0)


def three_steps(rank: int, world: int, port: int, precision: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", port)):
            environment.setenv(name, str(value))
        train.start_ranks()
    torch.manual_seed(0)
    root = Path(__file__).resolve().parent.parent
    model = random_model(root / "assets/tiny", getattr(torch, precision))
    optimizers = make_optimizers(train.Config(precision=precision, lr=1e-3), model)
    for step in range(3):
        if world > 1 and step == 2:         # a stop: saved, and loaded by new optimizers
            [sharded] = optimizers
            sharded.consolidate_state_dict = None           # which takes hours for a large model
            tensors = optimizer_tensors(sharded, rank)
            if rank == 0:
                save_file(tensors, folder / "optimizer.safetensors")
            torch.distributed.barrier()
            optimizers = make_optimizers(train.Config(precision=precision, lr=1e-3), model)
            load_optimizer(optimizers[0], folder / "optimizer.safetensors")
            held = sum(len(part["params"]) for part in optimizers[0].optim.param_groups)
            assert not optimizers[0].state and len(optimizers[0].optim.state) == held < len(list(model.parameters()))
        for p in model.parameters():
            p.grad = gradients(step, p)
        for optimizer in optimizers:
            optimizer.step()
    if rank == 0:
        save_file({n: p.detach().float() for n, p in model.named_parameters()}, folder / f"{world}.safetensors")
    train.leave_ranks()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sharding_the_state_does_not_change_the_update(tmp_path, precision):
    for world in (1, 2):
        run_ranks(three_steps, (world, free_port(), precision, tmp_path), world)
    one, two = (load_file(tmp_path / f"{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("steps, warmup, cooldown", [(3, 0, 1.0), (3, 10, 0.625), (1, 0, 0.0), (7, 2, 0.3)])
def test_no_schedule_gives_a_rate_below_0(steps, warmup, cooldown):
    """Nor after its end."""
    cfg = train.Config(steps=steps, warmup_steps=warmup, cooldown=cooldown)
    assert all(0 <= share_of_lr(cfg, step) <= 1 for step in range(20))


def test_muon_rounds_in_bfloat16(monkeypatch):
    """A gradient that differs by float32's rounding, as the sum of several ranks does, moves Muon's weights a thousand
    times as far apart as AdamW's. With its iteration in float64 they stay together."""
    from torch.optim import _muon

    def in_float64(grad, coefficients, steps, eps):
        a, b, c = coefficients
        x = grad.double() / grad.double().norm()
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.to(grad.dtype)

    def apart(kind, **settings) -> float:
        weights = []
        for noise in (0.0, 1e-7):
            weight, g = torch.nn.Parameter(torch.zeros(96, 256)), torch.Generator().manual_seed(3)
            optimizer = kind([weight], lr=1e-3, **settings)
            for _ in range(5):
                gradient, rounding = torch.randn(2, 96, 256, generator=g)
                weight.grad = gradient * (1 + noise * rounding)
                optimizer.step()
            weights.append(weight.detach())
        return float((weights[0] - weights[1]).abs().max())
    muon = {"adjust_lr_fn": "match_rms_adamw"}
    adamw, rounded = apart(torch.optim.AdamW, eps=1e-3), apart(torch.optim.Muon, **muon)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", in_float64)
    assert rounded > 100 * adamw and apart(torch.optim.Muon, **muon) < 1e-8


def test_an_optimizer_that_never_stepped_is_saved_and_loaded(tmp_path):
    """As after a run whose steps were all skipped."""
    weight = torch.nn.Parameter(torch.ones(3))
    never, after = torch.optim.AdamW([weight], lr=0.5), torch.optim.AdamW([weight], lr=0.25)
    save_file(optimizer_tensors(never), tmp_path / "a.safetensors")
    load_optimizer(after, tmp_path / "a.safetensors")
    assert not after.state and after.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("host, device", [(True, "cpu"), (False, "meta")])
def test_loaded_state_lies_where_the_optimizer_works(tmp_path, host, device):
    """Of weights on a device: with `host` in the host's memory."""
    near, far = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=of)) for of in ("cpu", "meta"))
    first, second = (MasterAdamW([p], 1e-3, (0.9, 0.999), 0.0, host=host) for p in (near, far))
    near.grad = torch.ones_like(near)
    first.step()
    save_file(optimizer_tensors(first), tmp_path / "a.safetensors")
    load_optimizer(second, tmp_path / "a.safetensors")
    places = {name: str(value.device) for name, value in second.state[far].items()}
    assert places == {"step": "cpu", "master": device, "exp_avg": device, "exp_avg_sq": device}

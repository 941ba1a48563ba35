"""The loop: one update for any number of ranks and any micro-batches, resume, SIGTERM, what a run leaves behind."""
import copy
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import free_port, print_into, run_ranks, run_script
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

import objective
import rewards
import support.ranks
import support.run
import support.runs
import train
from data import Processor, Response, collate, pack_group
from eval import judge
from model import RowLayout, load_model, random_model
from support.checkpoints import FIRST, read_state
from support.curves import read_metrics
from support.lora import add_lora, merge_after
from support.mistakes import Mistake, Stopped, stop_signals
from support.optimizers import make_optimizers
from support.ranks import check_same_weights, leave_ranks, start_ranks, wait_for_all
from support.run import Run
from support.sources import Example, Scenes

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--prompts-per-step", "4", "--rollouts", "3", "--max-new-tokens", "12", "--eval-data", "",
         "--warmup-steps", "3", "--cooldown", "0"]


def example(i: int) -> Example:
    """A picture of the built-in world; as number 3 and 7 a question without one, as 2 and 6 one about three small ones."""
    if i % 4 < 2:
        return Scenes("test")[i]
    if i % 4 == 3:
        return Example(f"text {i}", (), "How many legs has a cat?", "4", "vqa")
    three = (Scenes("test")[i + k].images[0].resize(size) for k, size in enumerate([(56, 56), (112, 28), (28, 84)]))
    return Example(f"three {i}", tuple(three), "red <image> or <image><image>", "red", "vqa")


def give(group: train.Group, advantage: list[float]) -> None:
    for response, value in zip(group.responses, advantage, strict=True):
        response.advantage = value


def advantages(group: train.Group) -> list[float]:
    return [response.advantage for response in group.responses]


VARIANTS = {  # every setting whose sums could go wrong when they are split
    "visurf": {}, "seq-mean": {"normaliser": "seq-mean"}, "seq-sum": {"normaliser": "seq-sum", "std": "population"},
    "tied": {}, "sft": {"method": "sft"}, "rlvr": {"method": "rlvr", "max_row_tokens": 70}, "kl": {"kl": 0.1, "inner_epochs": 2},
    "lora": {"lora_rank": 2},
    "offload": {"precision": "bfloat16", "offload_optimizer": True, "lr": 1e-2},     # arXiv 2604.23747: micro-batches were lost
}


def one_update(rank: int, world: int, port: int, micro_rows: list[int], folder: Path) -> None:
    """One step of plain SGD on 8 prompts for each variant and micro-batch size; rank 0 saves the weights' change. The
    variant offload: of the optimizer of train.py, which in one micro-batch lies where the weights do."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_ranks()
    for variant, settings in VARIANTS.items():
        for rows in micro_rows:
            torch.manual_seed(0)
            cfg = replace(train.Config(rollouts=3, max_new_tokens=12, grad_clip=1e9, micro_rows=rows), **settings)
            model = random_model(ROOT / "assets/tiny", getattr(torch, cfg.precision))
            reference = random_model(ROOT / "assets/tiny") if cfg.kl else None
            if cfg.lora_rank:
                add_lora(model, cfg.lora_rank, 64.0, "model.layers|visual", "")
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            processor, meter = Processor(model.folder), train.Meter()
            share = 8 // world
            prompts = [processor.prompt(example(i)) for i in range(rank * share, rank * share + share)]
            # In bfloat16 a rollout may differ from batch to batch.
            exact = copy.deepcopy(model).float() if variant == "offload" else model
            groups = train.make_groups(cfg, exact, processor, prompts, rank * share)
            for i, group in enumerate(groups, rank * share):
                # Random weights earn nothing; rewards that differ make every advantage count.
                torch.manual_seed(len(group.prompt.example.id) + ord(group.prompt.example.id[-1]))
                advantage = torch.randn(len(group.responses)).tolist()
                if variant == "tied":     # of 4 ranks the second has nothing left; of the other groups y goes, or a rollout
                    advantage = [0.0 if i in (2, 3) or s == i % 2 else a for s, a in enumerate(advantage)]
                give(group, advantage)
            ddp = DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            if variant == "offload":
                optimizer, = make_optimizers(replace(cfg, offload_optimizer=rows < 8), model)
            merge_after(optimizer, model)
            loss, norm, _ = train.update(cfg, ddp, reference, [optimizer], groups, meter)
            change = {name: p.detach() - before[name] for name, p in model.named_parameters()}
            weights = meter.read(torch.device("cpu"))
            change["loss"], change["norm"] = torch.tensor(loss), torch.tensor(norm)
            change["weights"] = torch.tensor([weights.get("rlvr_weight", 0), weights.get("sft_weight", 0)])
            if rank == 0:
                save_file(change, folder / f"{variant}_{world}_{rows}.safetensors")
    leave_ranks()


def test_ranks_and_micro_batches_do_not_change_the_update(tmp_path):
    for world, micro_rows in ((1, [8, 3]), (2, [2]), (4, [1])):
        run_ranks(one_update, (world, free_port(), micro_rows, tmp_path), world)
    for variant in VARIANTS:
        files = sorted(tmp_path.glob(f"{variant}_*"))
        assert len(files) == 4
        reference = load_file(tmp_path / f"{variant}_1_8.safetensors")
        size = torch.cat([t.flatten() for n, t in reference.items() if n not in ("loss", "norm", "weights")]).norm()
        assert size > 1e-3
        for file in files:
            other, near = load_file(file), 0.05 if variant == "offload" else 1e-5
            for name in ("loss", "norm", "weights"):
                torch.testing.assert_close(other[name], reference[name], rtol=near, atol=near / 10,
                                           msg=f"{file.name} {name}")
            difference = torch.cat([(other[n] - reference[n]).flatten() for n in reference
                                    if n not in ("loss", "norm", "weights")])
            assert difference.norm() < near * size, file.name


@pytest.fixture
def alone(monkeypatch):
    """A process group of this process only."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    start_ranks()
    yield
    leave_ranks()


def small_model():
    torch.manual_seed(0)
    model = random_model(ROOT / "assets/tiny")
    return model, Processor(model.folder)


def run_update(cfg, model, groups, lr=1e-2):
    meter = train.Meter()
    loss, norm, tokens = train.update(cfg, DistributedDataParallel(model), None,
                                      [torch.optim.SGD(model.parameters(), lr=lr)], groups, meter)
    return loss, norm, tokens, meter.read(torch.device("cpu"))


def test_what_the_log_says_of_an_update(alone):
    """Every logged quantity of an update against its formula, on groups with known advantages."""
    model, processor = small_model()
    cfg = train.Config(rollouts=3, max_new_tokens=12, temperature=0.8)
    prompts = [processor.prompt(Scenes("test")[i]) for i in (0, 1)]
    groups = train.make_groups(cfg, model, processor, prompts, 0)
    give(groups[0], [1.5, -0.5, -0.5, -0.5])
    give(groups[1], [0.0, 1.0, -1.0, 0.0])
    responses = [o for g in groups for o in g.responses]
    total = sum(len(o.tokens) for o in responses)
    logp = {}
    for g in groups:
        batch = collate(pack_group(g.prompt, g.responses))
        with torch.no_grad():
            scored, _ = model(**vars(batch), temperature=0.8)
        for s in range(4):
            logp[id(g), s] = scored[batch.segment == s + 1]
    loss, _, tokens, log = run_update(cfg, model, groups)
    assert loss == pytest.approx(-sum(o.advantage * len(o.tokens) for o in responses) / total, rel=1e-5)
    assert log["sft_weight"] == pytest.approx(1.5 * len(groups[0].responses[0].tokens) / total)
    assert log["rlvr_weight"] == pytest.approx(
        sum(abs(o.advantage) * len(o.tokens) for o in responses if not o.is_y) / total)
    assert log["logp_y"] == pytest.approx(float(logp[id(groups[0]), 0].sum()), rel=1e-5)   # the other y has advantage 0
    assert log["logp_gap"] <= log["logp_gap_max"] < 1e-5 and log["clipped_rollouts"] == log["clipped_y"] == 0
    assert 0 <= log["kl_sampler"] < 1e-9
    # Of the second group y and the last rollout have no gradient, so they are in no row.
    assert tokens == sum(len(g.prompt.tokens) + sum(len(o.tokens) for o in g.responses if o.advantage) for g in groups)


def test_means_totals_and_the_largest_are_joined_over_micro_batches(alone):
    meter = train.Meter()
    for values in ([1.0, 2.0], [6.0], []):
        found = torch.tensor(values)
        meter.take({"x": found, "x_max": found, "total": found.sum()})
    assert meter.read(torch.device("cpu")) == {"x": 3, "x_max": 6, "total": 9}


def test_the_first_token_of_every_response_is_trained():
    """Its log-prob is read from the prompt's last token, and the loss weighs it as any other."""
    model, processor = small_model()
    prompt = processor.prompt(example(0))
    responses = [Response([5], is_y=True), Response([7, 8, 9]), Response([6]), Response([7, 9])]
    cfg = train.Config()
    for o, advantage in zip(responses, (1.0, -2.0, 0.5, 3.0)):
        o.r = o.advantage = advantage
    mb = train.micro_batch(cfg, [(0, pack_group(prompt, responses)[0])], "cpu", idle=False)
    logp, entropy = model(**vars(mb.batch))
    logp.retain_grad()
    loss, _ = objective.loss(cfg, logp=logp, old_logp=logp.detach(), ref_logp=None, entropy=entropy, denominator=7,
                             segment=mb.batch.segment, tokens=7, responses=4, step=0, steps=1, **mb.terms)
    loss.backward()
    segment, position = mb.batch.segment[0], mb.batch.position
    first = [segment.tolist().index(s) for s in (1, 2, 3, 4)]
    assert logp.grad[0, first].tolist() == pytest.approx([-1 / 7, 2 / 7, -0.5 / 7, -3 / 7])
    P = len(prompt.tokens)
    with torch.no_grad():
        x = model.embed(mb.batch.tokens[:, :P], mb.batch.patches, mb.batch.grids)
        hidden = model.decode(x, position[:, :, :P], RowLayout(mb.batch.segment[:, :P]).attend)
        expected = model.logits(hidden[0, -1]).log_softmax(-1)[[5, 7, 6, 7]]
    torch.testing.assert_close(logp.detach()[0, first], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zeros", ["y", "some", "whole groups", "all"])
def test_what_has_no_gradient_is_left_out_and_changes_nothing(alone, monkeypatch, zeros):
    """The update of the rows that have a gradient against that of all rows: gradients, loss, and what AdamW makes of
    them, also where nothing at all is left."""
    results = []
    found_out = train.trained_on
    for which in (found_out, lambda *known: (torch.ones_like(found_out(*known)[0]), False)):
        monkeypatch.setattr(train, "trained_on", which)
        model, processor = small_model()
        cfg = train.Config(rollouts=3, max_new_tokens=12, micro_rows=2, max_row_tokens=100)
        prompts = [processor.prompt(example(i)) for i in range(4)]
        groups = train.make_groups(cfg, model, processor, prompts, 0)
        torch.manual_seed(0)
        for i, group in enumerate(groups):
            give(group, [0.0 if zeros == "all" or zeros == "y" and s == 0 or zeros == "some" and (s + i) % 3 == 0
                         or zeros == "whole groups" and i < 2 else float(torch.randn(())) for s in range(4)])
        ddp, meter = DistributedDataParallel(model), train.Meter()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        out = []
        for _ in range(2):       # the second step has moments, which decay also where there is no gradient
            loss, norm, tokens = train.update(cfg, ddp, None, [optimizer], groups, meter)
            out += [loss, norm]
            for group in groups:
                give(group, [0.0] * 4)
        results.append((out, tokens, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (few, few_tokens, weights), (every, every_tokens, expected) = results
    assert few == pytest.approx(every, rel=1e-5, abs=1e-7) and few_tokens < every_tokens
    assert (weights - expected).norm() <= 1e-6 * expected.norm()
    assert zeros == "all" or every[1] > 1e-3


def test_a_smoothed_y_has_advantage_exactly_0(alone, monkeypatch):
    model, processor = small_model()
    texts = ["<answer>[]</answer>"] + ["red"] * 6 + ["<think>hm</think><answer>[]</answer>"]
    monkeypatch.setattr(train, "generate", lambda *_, **__: [[
        train.Response(processor.encode(t), [0.0] * len(processor.encode(t))) for t in texts]])
    group, = train.make_groups(train.Config(), model, processor, [processor.prompt(Scenes("test")[1])], 0)
    assert group.smoothed and advantages(group)[0] == 0 and all(advantages(group)[1:])
    [mb], *_ = train.pack(train.Config(), [group], "cpu")
    assert not mb.terms["is_y"].any() and int(mb.batch.segment.max()) == 8


def test_a_micro_batch_by_hand():
    """Each response's numbers at each of its tokens; nothing in the prompt and in padding, and no log-prob of y."""
    _, processor = small_model()
    prompt = processor.prompt(example(3))
    P, nan = len(prompt.tokens), math.nan
    y, *o = (train.Response([9] * n, logp, advantage=a, r=r, is_y=not logp) for n, logp, a, r in (
        (2, [], 0.5, 6.0), (1, [-1.0], -1.5, 1.0), (3, [-2.0, -3.0, -4.0], 0.25, 5.0)))
    rows = [(7, row) for row in [*pack_group(prompt, [y, *o]), *pack_group(prompt, o[:1])]]
    terms = train.micro_batch(train.Config(normaliser="seq-mean"), rows, "cpu", False).terms
    expected = {"advantage": ([0.5, 0.5, -1.5, 0.25, 0.25, 0.25], [-1.5] + [0] * 5),
                "r": ([6, 6, 1, 5, 5, 5], [1] + [0] * 5), "is_y": ([1, 1, 0, 0, 0, 0], [0] * 6),
                "length": ([2, 2, 1, 3, 3, 3], [1] + [0] * 5), "truncated": ([0] * 6, [0] * 6),
                "sampled_logp": ([nan, nan, -1, -2, -3, -4], [-1] + [0] * 5),
                "weight": ([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3], [1] + [0] * 5)}
    for name, of_rows in expected.items():
        rows_of = torch.tensor([[0] * P + list(row) for row in of_rows])
        torch.testing.assert_close(terms[name], rows_of.to(terms[name].dtype), equal_nan=True, rtol=0, atol=0)
    assert terms["is_y"].dtype == terms["truncated"].dtype == torch.bool and (terms["group"] == 7).all()


def test_what_the_loss_and_the_rewards_are_told_of_the_batch(alone, monkeypatch):
    """Numbers of the groups, over split rows too, counts of the batch, lengths, and the step."""
    model, processor = small_model()
    told, plain = [], objective.loss
    monkeypatch.setattr(train, "reward_group", lambda *a, **known: told.append(known) or rewards.reward_group(*a, **known))
    cfg = train.Config(rollouts=3, max_new_tokens=12, max_row_tokens=100, steps=40)
    groups = train.make_groups(cfg, model, processor, [processor.prompt(example(i)) for i in range(3)], 5, step=7)
    for n, (known, group) in enumerate(zip(told, groups), 5):
        y, *drawn = group.responses
        assert known == {"group": n, "step": 7, "steps": 40, "length_y": len(y.tokens), "lengths": [len(o.tokens) for o in drawn],
                         "truncated": [o.truncated for o in drawn]}
        give(group, [1.0, 0.5, -1.0, -0.5])
    told.clear()

    def noted(cfg, **terms):
        told.append(terms)
        return plain(cfg, **terms)
    monkeypatch.setattr(objective, "loss", noted)
    ddp = DistributedDataParallel(model)
    train.update(cfg, ddp, None, [torch.optim.SGD(model.parameters(), lr=0.1)], groups, train.Meter(), step=7)
    probed, *real = told
    lengths = [len(o.tokens) for g in groups for o in g.responses]
    assert len(real) > 3 and all((t["step"], t["steps"], t["tokens"], t["responses"]) == (7, 40, sum(lengths), 12) for t in told)
    assert [int(n) for n in probed["group"][0, 1:]] == [n for n in (5, 6, 7) for _ in range(4)]
    found = [(int(t["group"][b, 0]), int(t["length"][b][t["segment"][b] == s][0])) for t in real
             for b in range(len(t["group"])) for s in range(1, int(t["segment"][b].max()) + 1)]
    assert sorted(found) == sorted((g.number, len(o.tokens)) for g in groups for o in g.responses)


def test_rewards_and_advantages_stay_with_their_rollouts(alone, monkeypatch):
    """y first, then the rollouts in order: each with its own reward, from its own text, in its own segment."""
    model, processor = small_model()
    cfg = train.Config(rollouts=3, max_new_tokens=6)
    monkeypatch.setattr(train, "generate", lambda *_, **__: [[
        train.Response(processor.encode(text), [0.0] * len(processor.encode(text)))
        for text in ("<answer>[]</answer>", "nothing", "<think>hm</think><answer>[]</answer>")]])
    absent = processor.prompt(Scenes("test")[1])
    group, = train.make_groups(cfg, model, processor, [absent], 0)
    assert [o.r for o in group.responses] == [pytest.approx(14 / 3), 6, 1, 7] and group.smoothed
    assert [o.reward.total for o in group.responses] == [6, 6, 1, 7] and [o.is_y for o in group.responses] == [1, 0, 0, 0]
    y, *drawn = advantages(group)
    assert y == 0 and drawn[2] > drawn[0] > 0 > drawn[1]
    assert [processor.decode(o.tokens) for o in group.responses] == [
        "<answer>[]</answer>", "<answer>[]</answer>", "nothing", "<think>hm</think><answer>[]</answer>"]
    group, = train.make_groups(replace(cfg, smoothing=False, reward_label_thinking=True), model, processor, [absent], 0)
    assert group.responses[0].r == 7 and not group.smoothed
    group, = train.make_groups(replace(cfg, method="rlvr"), model, processor, [absent], 0)
    assert len(group.responses) == len(group.rollouts) == 3 and sum(advantages(group)) == pytest.approx(0)
    group, = train.make_groups(replace(cfg, method="sft"), model, processor, [absent], 0)
    assert advantages(group) == [1.0] and processor.decode(group.responses[0].tokens) == "<answer>[]</answer>"


@pytest.mark.parametrize("method", objective.METHODS)
def test_every_method_goes_from_rewards_to_an_update(alone, monkeypatch, method):
    """The rivals take the rewards without control 3, and their own advantages; rows and update are the same for all."""
    model, processor = small_model()
    texts = ("<answer>[]</answer>", "nothing", "<think>hm</think><answer>[]</answer>")
    monkeypatch.setattr(train, "generate", lambda *_, **__: [[
        train.Response(processor.encode(text), [0.0] * len(processor.encode(text))) for text in texts]])
    cfg = train.Config(rollouts=3, method=method)
    group, = train.make_groups(cfg, model, processor, [processor.prompt(Scenes("test")[1])], 0)
    if method == "sft":
        assert advantages(group) == [1.0]
    else:
        r = {"visurf": [14 / 3, 6, 1, 7], "rlvr": [6, 1, 7]}.get(method, [6, 6, 1, 7])
        assert [o.r for o in group.responses] == pytest.approx(r) and group.smoothed == (method == "visurf")
        expected = objective.METHODS[method].advantages(cfg, torch.tensor(r, dtype=torch.float64))
        assert advantages(group) == pytest.approx(expected.tolist(), abs=1e-12)
    loss, norm, tokens, log = run_update(cfg, model, [group])
    assert math.isfinite(loss) and norm > 0 and tokens > 0
    if method != "sft":         # a solved group: y is smoothed, or enters failed groups only, or always
        assert (log["sft_weight"] > 0) == (method in ("luffy", "chord", "sum"))


@pytest.mark.parametrize("method", objective.METHODS)
def test_a_method_is_its_record(alone, monkeypatch, method):
    """Under another name, which nothing asks for, the same record gives the same groups, update and sentences."""
    monkeypatch.setitem(objective.METHODS, "unheard of", objective.METHODS[method])
    found = []
    for name in (method, "unheard of"):
        model, processor = small_model()
        solved = [train.Response(o, [0.0] * len(o)) for o in map(processor.encode, ("<answer>[]</answer>", "no", "?"))]
        monkeypatch.setattr(train, "generate", lambda *_, solved=solved, **__: [solved])
        cfg = train.Config(rollouts=3, method=name)
        group, = train.make_groups(cfg, model, processor, [processor.prompt(Scenes("test")[1])], 0)
        said = []
        for options in ({"rollouts": 1}, {"label_thought": "rollout"}, {"kl": 0.1}):
            try:
                replace(cfg, **options).check(1)
            except Mistake as mistake:
                said.append(str(mistake).replace(name, ""))
        found.append((cfg.G, advantages(group), said, run_update(cfg, model, [group])[:3]))
    assert found[0] == found[1] and found[0][0] == (0 if method == "sft" else 3)
    assert len(found[0][2]) == {"sft": 1, "rlvr": 2}.get(method, 1)


def test_the_label_borrows_a_thought(alone, monkeypatch):
    """--label-thought rollout: y is a rollout's beginning and the label's answer, earns 7, and these are the ids that
    carry r(y); without a rollout that thinks, and without the option, y is the paper's."""
    model, processor = small_model()
    texts = ["<think>Is it red?</think> <answer>[1]</answer>", "<answer>[]</answer>", "<think>no end"]
    asked = []

    def fake(_, prompts, __, u, *___, **____):
        asked.append(G := u.shape[1])
        return [[train.Response(processor.encode(text), [0.0] * len(processor.encode(text))) for text in texts[:G]]
                for _ in prompts]
    monkeypatch.setattr(train, "generate", fake)
    cfg = train.Config(rollouts=3, label_thought="rollout")
    prompts = [processor.prompt(Scenes("test")[i]) for i in (0, 1)]
    for prompt, group in zip(prompts, train.make_groups(cfg, model, processor, prompts, 5)):
        y, *rollouts = group.responses
        answer = rewards.label_text("scene_grounding", prompt.answer, "spaced")
        assert processor.decode(y.tokens) == "<think>Is it red?</think> " + answer
        assert y.tokens == processor.encode("<think>Is it red?</think> " + answer)
        assert y.r == y.reward.total == 7 and y.reward.terms["thinks"] == 1 and not group.smoothed
        expected = objective.group_advantages(torch.tensor([7.0, *(o.r for o in rollouts)], dtype=torch.float64))
        assert advantages(group) == expected.tolist() and y.advantage == max(advantages(group)) > 0
    ours, = train.make_groups(replace(cfg, method="sft"), model, processor, prompts[:1], 5)
    assert [o.advantage for o in ours.responses] == [1.0] and "Is it red?" in processor.decode(ours.responses[0].tokens)
    paper = [train.make_groups(replace(cfg, label_thought="none"), model, processor, prompts, 5)]
    texts[0] = "<answer>[1]</answer>"
    for groups in (train.make_groups(cfg, model, processor, prompts, 5), *paper):
        assert [g.responses[0].reward.total for g in groups] == [6, 6]
        assert [processor.decode(g.responses[0].tokens) for g in groups] == [
            rewards.label_text("scene_grounding", p.answer, "spaced") for p in prompts]
    train.make_groups(train.Config(method="sft"), model, processor, prompts, 5)
    assert asked == [3, 3, 3, 3]        # sft samples nothing unless its label borrows


def test_a_prompt_that_comes_twice_in_a_step_is_answered_anew(alone):
    model, processor = small_model()
    cfg = train.Config(rollouts=3, max_new_tokens=8)
    prompt = processor.prompt(Scenes("test")[0])
    drawn = [[o.tokens for o in g.rollouts] for g in train.make_groups(cfg, model, processor, [prompt, prompt], 8)]
    assert drawn[0] != drawn[1]
    for place in (8, 9):        # on a rank of its own
        group, = train.make_groups(cfg, model, processor, [prompt], place)
        assert [o.tokens for o in group.rollouts] == drawn[place - 8]
    apart = train.make_groups(replace(cfg, sampling_batch=1), model, processor, [prompt, prompt], 8)
    assert [[o.tokens for o in g.rollouts] for g in apart] == drawn


def test_the_derivation_of_docs(alone):
    """The lines of docs/derivation.md, with transformers' model, against train.update: every parameter's gradient."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/derivation.md").read_text(), re.S)
    names = {"torch": torch}
    exec(code, names)
    model = load_model(ROOT / "assets/tiny")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "assets/tiny")
    processor = Processor(model.folder)
    cfg = train.Config(rollouts=4, max_new_tokens=48, grad_clip=1e9)
    prompt = processor.prompt(Scenes("test")[1])
    group, = train.make_groups(cfg, model, processor, [prompt], 0)
    for response, r in zip(group.responses, (6.0, 4.0, 1.0, 5.5, 4.0)):      # as unlike as one could wish
        response.r = r
    advantage = objective.group_advantages(torch.tensor([o.r for o in group.responses], dtype=torch.float64))
    give(group, advantage.tolist())
    y, *rollouts = (o.tokens for o in group.responses)
    banned = model.banned.nonzero().flatten().tolist()
    expected = names["visurf_loss"](theirs, prompt, y, rollouts, 6.0, [4.0, 1.0, 5.5, 4.0], banned)
    expected.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, *_ = run_update(cfg, model, [group], lr=1.0)          # plain SGD: the change is minus the gradient
    assert loss == pytest.approx(float(expected), rel=1e-5)
    gradients = {name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): p.grad
                 for name, p in theirs.named_parameters()}
    size = torch.cat([g.flatten() for g in gradients.values() if g is not None]).norm()
    off = torch.cat([(before[name] - p.detach() - gradients[name]).flatten() for name, p in model.named_parameters()
                     if name in gradients and gradients[name] is not None]).norm()
    assert size > 0.01 and off < 1e-4 * size and len(gradients) > 50


EDITS = {
    "README": (None, ["--label-nll", "0.1"], "objective.py"),
    "a length penalty": ('''--- a/rewards.py
+++ b/rewards.py
@@ -0,0 +0,0 @@
     rewards = [score(task, o, answer, side) for o in rollouts]
+    rewards = [Reward({**x.terms, "length": -cfg.length_penalty * len(o)}, x.error) for x, o in zip(rewards, rollouts)]
     r = [reward.total for reward in rewards]
--- a/train.py
+++ b/train.py
@@ -0,0 +0,0 @@
     smoothing: bool = option(True, "controls", "control 3: r(y) := mean r(o) once a rollout is as good as y")
+    length_penalty: float = option(0.0, "controls", "points per character of a rollout", least=0)
''', ["--length-penalty", "0.01"], "rewards.py"),
    "a fourth control": ('''--- a/rewards.py
+++ b/rewards.py
@@ -0,0 +0,0 @@
     r_y, smoothed = smooth(y_reward.total, r) if cfg.smoothing else (y_reward.total, False)    # control 3
+    r_y = min(r_y, max(r) + cfg.lead)
     return [y_reward, *rewards], [r_y, *r], smoothed
--- a/train.py
+++ b/train.py
@@ -0,0 +0,0 @@
     smoothing: bool = option(True, "controls", "control 3: r(y) := mean r(o) once a rollout is as good as y")
+    lead: float = option(1e9, "controls", "control 4: r(y) is at most this much above the best rollout", least=0)
''', ["--lead", "0.5"], "rewards.py")}


def apply_diff(text: str, folder: Path) -> dict[str, int]:
    """Applies a diff whose line numbers do not count, and returns how many hunks each file took."""
    hunks = {}
    for name, body in re.findall(r"^--- a/.*\n\+\+\+ b/(.*)\n((?:(?!--- a/).*\n?)*)", text, re.M):
        source = (folder / name).read_text()
        for hunk in re.split(r"^@@.*\n", body, flags=re.M)[1:]:
            lines = [line for line in hunk.splitlines() if line]
            old, new = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            assert source.count(old) == 1, f"{name} has changed: {old}"
            source = source.replace(old, new)
            hunks[name] = hunks.get(name, 0) + 1
        (folder / name).write_text(source)
    return hunks


def three_steps(script: Path, folder: Path, *flags: str) -> list[dict]:
    code, output = run_script(script, "--model", str(ROOT / "assets/tiny"), *SMALL, "--steps", "3", "--name", "a",
                              *flags, folder=folder)
    assert code == 0, output
    return lines(folder / "runs/a")


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    return three_steps(ROOT / "train.py", tmp_path_factory.mktemp("unedited"))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_one_hunk_and_one_option(tmp_path, edit, unedited):
    """Applied to a copy, which then trains three steps with it; what is logged under a new name arrives."""
    diff, flags, where = EDITS[edit]
    if diff is None:
        [diff] = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "tests", "*.pyc"))
    assert apply_diff(diff, copy) == {where: 1, "train.py": 1}
    edited = three_steps(copy / "train.py", tmp_path, *flags)
    assert len(edited) == 3 and all(math.isfinite(line["loss"]) for line in edited)
    if edit == "README":
        assert all("label_nll" in line for line in edited) and "label_nll" not in unedited[0]
        assert [line["loss"] for line in edited] != [line["loss"] for line in unedited]
    if edit == "a fourth control":      # the loss stays: where all rollouts are equal, Â_y does not depend on r(y)
        assert edited[0]["r(y)"] < unedited[0]["r(y)"]
    if edit == "a length penalty":
        assert all(line["o/length"] < 0 for line in edited)
        assert [line["loss"] for line in edited] != [line["loss"] for line in unedited]


def test_the_entropy_bonus_raises_the_entropy(alone):
    """From the tiny model, whose groups are tied and would be left out: the bonus alone trains, without a NaN."""
    entropy = {}
    for bonus in (0.0, 1.0):
        model = load_model(ROOT / "assets/tiny")
        processor = Processor(model.folder)
        cfg = train.Config(rollouts=3, max_new_tokens=8, entropy_bonus=bonus)
        groups = train.make_groups(cfg, model, processor, [processor.prompt(Scenes("test")[0])], 0)
        give(groups[0], [0.0] * 4)
        loss, norm, tokens, _ = run_update(cfg, model, groups)
        assert math.isfinite(loss) and (norm > 0) == (bonus > 0)
        batch = collate(pack_group(groups[0].prompt, groups[0].responses))
        with torch.no_grad():
            entropy[bonus] = float(model(**vars(batch))[1].sum())
    assert entropy[1.0] > entropy[0.0] + 1e-3


def test_the_label_is_written_in_the_style_asked_for():
    processor = Processor(ROOT / "assets/tiny")
    prompt = processor.prompt(next(e for e in map(Scenes("test").__getitem__, range(9)) if e.answer != "[]"))
    for style, written in (("spaced", '"bbox_2d": ['), ("compact", '"bbox_2d":[')):
        text, ids = train.label_tokens(train.Config(label_style=style), processor, prompt)
        assert written in text and ids == processor.encode(text)


def test_a_step_that_is_not_finite_changes_nothing(alone, monkeypatch):
    model, processor = small_model()
    cfg = train.Config(method="sft")
    groups = train.make_groups(cfg, model, processor, [processor.prompt(Scenes("test")[0])], 0)
    give(groups[0], [float("nan")])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, norm, *_ = run_update(replace(cfg, method="visurf"), model, groups)
    assert loss != loss and norm != norm
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    give(groups[0], [1.0])
    run_update(cfg, model, groups)
    assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(math.inf))
    with pytest.raises(Mistake, match="weights that are not finite: try a smaller --lr"):
        run_update(cfg, model, groups)


def test_an_evaluation_keeps_the_prompts_of_its_picture_alone(alone, monkeypatch, tmp_path):
    """A prompt holds its picture's patches: 192 of them were 60 MB of the built-in world, and gigabytes of real ones."""
    processor, made, most = Processor(ROOT / "assets/tiny"), [], []

    def answered(*_, **__):
        for i in range(40):
            prompt = processor.prompt(Scenes("test")[i % 3])
            made.append(weakref.ref(prompt))
            yield judge(prompt, "<answer>[]</answer>", 5), prompt
            most.append(sum(prompt_of() is not None for prompt_of in made))
    monkeypatch.setattr(train, "evaluate", answered)
    run = Run(train.Config(), 0, 1, torch.device("cpu"), {**FIRST, "step": 7})
    run.folder = tmp_path
    job = train.Job(run.cfg, run, SimpleNamespace(module=None), None, processor, [], [], range(40))
    train.run_evaluation(job)
    assert run.history["step 7"]["N-acc"] == 1 and (tmp_path / "samples/step_7.png").exists()
    assert len(most) == 40 and max(most) <= 14


def test_the_point_of_the_paper_on_one_question(alone):
    """From random weights no rollout ever earns its answer: RLVR stays where it is, every group tied. ViSurf raises y
    until the rollouts find it, then smoothing takes y out. SFT learns y by heart."""
    logs = {}
    for method in ("rlvr", "visurf", "sft"):
        model, processor = small_model()
        cfg = train.Config(method=method, rollouts=4, max_new_tokens=12)
        prompt = processor.prompt(Scenes("test")[1])
        ddp, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=3e-3)
        logs[method] = []
        for step in range(60):
            meter = train.Meter()
            groups = train.make_groups(cfg, model, processor, [prompt], step)
            train.measure_groups(groups, meter, rewards.full_accuracy)
            train.update(cfg, ddp, None, [optimizer], groups, meter)
            logs[method].append(meter.read(torch.device("cpu")))
    first, last = logs["visurf"][0], logs["visurf"][-20:]
    assert first["smoothed"] == 0 and first["advantage_y"] == pytest.approx(4 / 5 ** 0.5)   # G/√(G+1)
    assert sum(m["r(o)"] for m in last) / 20 > 4 and sum(m["smoothed"] for m in last) / 20 > 0.7
    assert all(m["r(o)"] == 1 and m["tied"] == 1 for m in logs["rlvr"])
    assert logs["sft"][-1]["logp_y"] > -1


def wait_for_a_slow_rank(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    support.ranks.TIMEOUT = timedelta(seconds=5)
    start_ranks()
    dist.barrier()
    if rank == 0:
        time.sleep(10)          # a checkpoint, say
        return os._exit(0)
    with pytest.raises(RuntimeError, match="(?i)time.*out"):
        dist.barrier()
    os._exit(0)


def test_ranks_wait_for_a_slow_one_as_long_as_the_time_out_says():
    run_ranks(wait_for_a_slow_rank, (free_port(),), 2)
    assert support.ranks.TIMEOUT >= timedelta(minutes=30)


def look_at_each_other(rank: int, port: int, late: int) -> None:
    """Three ranks: first one holds other weights by a bit, then one comes late. Rank 0 speaks; where it is the late one,
    the others do."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    support.ranks.TIMEOUT = timedelta(seconds=5)
    *_, device = start_ranks()
    model = torch.nn.Linear(3, 2, dtype=(torch.float32, torch.bfloat16)[late % 2])
    torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
    check_same_weights(model, device)
    if rank == 1:
        model.weight.data.view(-1)[5:].copy_(torch.nextafter(model.weight.data.view(-1)[5:], torch.zeros(1, dtype=model.weight.dtype)))
    with pytest.raises(Mistake, match=r"the weights of rank\(s\) 1 are not those of rank 0"):
        check_same_weights(model, device)
    wait_for_all("sampling")
    if rank == late:
        time.sleep(14)
        os._exit(0)
    named = f"{late} did not come" if rank == 0 else r"0 did not come \(or waits for one that it names\)"
    with pytest.raises(Mistake, match=rf"rank\(s\) {named} to the end of sampling within 5 s"):
        wait_for_all("sampling")
    time.sleep(4 if rank == 0 else 0)      # it holds the store by which the others hear
    os._exit(0)


@pytest.mark.parametrize("late", [1, 0])
def test_a_rank_that_is_late_or_drifts_is_named(late):
    run_ranks(look_at_each_other, (free_port(), late), 3)


def end_early(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_ranks()
    if rank != 2:
        with pytest.raises(Mistake, match="another rank ended before the end of sampling: see what it said"):
            wait_for_all("sampling")
        time.sleep(2)
    os._exit(0)


def test_a_rank_that_ends_early_is_not_called_late():
    began = time.monotonic()
    run_ranks(end_early, (free_port(),), 3)
    assert time.monotonic() - began < 60


def test_ranks_must_see_equally_many_rows(monkeypatch):
    monkeypatch.setattr(support.run, "gather_json", lambda value, device: [8, 8, 3])
    with pytest.raises(Mistake, match="--data a.jsonl has 8 rows on rank 0 and 3 on rank 2: all nodes must have the same"):
        support.run.check_same(train.Config(data="a.jsonl"), {}, range(8), 0, torch.device("cpu"))


@pytest.mark.parametrize("environment, ours", [({}, True), ({"OMP_NUM_THREADS": "1"}, False), ({"OMP_NUM_THREADS": "4"}, False),
                                               ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, True),
                                               ({"OMP_NUM_THREADS": "4", "LOCAL_WORLD_SIZE": "2"}, False)])
def test_the_number_of_threads_that_somebody_chose_stays(monkeypatch, environment, ours):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert support.ranks.threads_are_ours() is ours


def test_the_end_of_the_terminal_stops_a_run_as_ctrl_c_does():
    number = signal.SIGHUP
    others = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, number)}
    try:
        signal.signal(number, signal.SIG_DFL)
        times = stop_signals("")
        os.kill(os.getpid(), number)
        assert len(times) == 1
        signal.signal(number, signal.SIG_IGN)               # nohup
        stop_signals("")
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for n, handler in others.items():
            signal.signal(n, handler)


def test_learning_rate_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0)
    cfg = train.Config(lr=1.0, steps=10, warmup_steps=4, cooldown=0.2)
    seen = []
    for step in range(10):
        train.set_lr(cfg, [optimizer], step)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]


@pytest.mark.parametrize("flags, message", [
    (["--prompts-per-step", "0"], "--prompts-per-step"), (["--no-such-flag", "1"], "--no-such-flag"),
    (["--prompts-per-step", "5"], "--prompts-per-step"), (["--method", "ppo"], "ppo"),
    (["--rollouts", "1"], "--rollouts"), (["--temperature", "0"], "--temperature"), (["--step", "3"], "--step"),
    (["--keep-best", "boxes", "--eval-data", ""], "--keep-best boxes: needs evaluations"),
    (["--keep-best", "boxes", "--preset", "paper"], "--keep-best boxes: needs evaluations")])
def test_wrong_flags_are_named(flags, message):
    train.parse_config([]).check(2)
    with pytest.raises(Mistake, match=message):
        train.parse_config(flags).check(2)


def test_presets_are_defaults_that_flags_override():
    paper = train.parse_config(["--preset", "paper", "--steps", "7"])
    assert (paper.steps, paper.lr, paper.adam_eps, paper.warmup_steps, paper.cooldown) == (7, 1e-6, 1e-8, 0, 0)
    assert (paper.prompts_per_step, paper.rollouts, paper.max_new_tokens, paper.precision) == (16, 8, 2000, "bfloat16")
    assert train.parse_config(["--preset", "laptop"]) == train.parse_config([]) == train.Config()
    assert train.parse_config(["--preset", "1x80G-3b"]).model == "Qwen/Qwen2.5-VL-3B-Instruct"
    small = train.parse_config(["--preset", "1x24G-7b"])
    assert (small.model, small.lora_rank, small.lr) == ("Qwen/Qwen2.5-VL-7B-Instruct", 16, 1e-5)


def run_train(folder: Path, *flags: str, ranks: int = 1, small: Sequence[str] = SMALL) -> tuple[int, str]:
    """train.py in `folder`, to its end."""
    script, arguments = ROOT / "train.py", ["--model", str(ROOT / "assets/tiny"), *small, *flags]
    return run_script(script, *arguments, folder=folder, ranks=ranks)


def start_train(folder: Path, *flags: str, ranks: int = 1, restarts: int = 0) -> subprocess.Popen:
    """train.py as a command, several ranks by torchrun, for a test that disturbs it while it runs."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port",
                                      str(free_port()), "--max-restarts", str(restarts)]
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "train.py"), "--model", str(ROOT / "assets/tiny"),
                             *SMALL, *flags], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines(run: Path) -> list[dict]:
    clock = ("seconds", "tokens_per_s", "peak_memory")
    return [{k: v for k, v in json.loads(line).items() if not any(c in k for c in clock)}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks, precision", [(1, "float32"), (2, "bfloat16")])
def test_resume_continues_bit_for_bit(tmp_path, ranks, precision):
    """Of bfloat16 the second run has its optimizer in the host's memory, which changes nothing."""
    offload = ["--offload-optimizer"] if precision == "bfloat16" else []
    whole = run_train(tmp_path, "--steps", "4", "--name", "whole", "--precision", precision, ranks=ranks)
    assert whole[0] == 0, whole[1]
    half = run_train(tmp_path, "--steps", "2", "--name", "half", "--precision", precision, *offload, ranks=ranks)
    assert half[0] == 0, half[1]
    rest = run_train(tmp_path, "--resume", "runs/half", "--steps", "4", ranks=ranks)
    assert rest[0] == 0, rest[1]
    a, b = (load_file(tmp_path / "runs" / name / "checkpoints/step_4/model.safetensors") for name in ("whole", "half"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert lines(tmp_path / "runs/whole") == lines(tmp_path / "runs/half")
    assert [line["step"] for line in lines(tmp_path / "runs/half")] == [1, 2, 3, 4]
    saved = json.loads((tmp_path / "runs/half/config.json").read_text())      # one truth about the options of a run
    assert train.parse_config(["--resume", str(tmp_path / "runs/half")]).steps == saved["config"]["steps"] == 4
    assert [(part["until_step"], part["config"]["steps"]) for part in saved["before"]] == [(2, 2)]


def test_a_run_leaves_all_it_should_and_is_never_overwritten(tmp_path):
    evaluation = ["--eval-data", "scenes:val", "--eval-examples", "6"]
    code, output = run_train(tmp_path, "--steps", "1", "--name", "a", *evaluation)
    assert code == 0, output
    run = tmp_path / "runs/a"
    assert (run / "samples/step_0.png").exists() and (run / "samples/step_1.png").exists()
    assert "Answers, before and after" in (run / "report.html").read_text() and "runs/a/report.html" in output
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["rollouts"] == 3 and config["versions"]["torch"] and config["prompts"]["scene_grounding"]
    assert "loss" in lines(run)[1] and "N-acc" in lines(run)[0]["eval"]
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    reloaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "checkpoints/step_1")
    ours = load_model(run / "checkpoints/step_1")
    assert torch.equal(reloaded.get_input_embeddings().weight, ours.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(run / "checkpoints/step_1")("a").input_ids
    before = lines(run)
    shutil.rmtree(run / "checkpoints")          # as if it had been killed before its first one: it begins anew
    code, output = run_train(tmp_path, "--resume", "runs/a", *evaluation)
    assert code == 0 and lines(run) == before and (run / "checkpoints/step_1").exists()
    code, output = run_train(tmp_path, "--resume", "runs/a", "--steps", "2", *evaluation)
    assert code == 0 and "step 0    step 1    step 2" in output, output     # the table has what was before, too
    text = (run / "metrics.jsonl").read_text()
    kept = [line for line in text.splitlines() if not ('"eval"' in line and '"step": 2' in line)]
    old = "".join(line + "\n" for line in kept).replace('"N-acc"', '"N-acc strict"').replace('"r(o)"', '"r_rollouts"')
    (run / "metrics.jsonl").write_text(old)     # killed in the last evaluation, by a version with other names
    code, output = run_train(tmp_path, "--resume", "runs/a", *evaluation)
    assert code == 0 and (run / "metrics.jsonl").read_text() == text and "is finished" not in output, output
    code, output = run_train(tmp_path, "--resume", "runs/a", *evaluation)
    assert code == 0 and "is finished: it has its 2 steps" in output, output
    code, output = run_train(tmp_path, "--resume", "runs/a", "--steps", "3", "--eval-data", "scenes:train", "--eval-examples", "4")
    assert code == 0 and re.search(r"the evaluations so far were of scenes:val, first 6 \(.*\): the table, the curves and --keep-best "
                                   "begin anew", output), output
    assert re.search("scenes:train, first 4:\n +step 3\n", output), output
    code, output = run_train(tmp_path, "--resume", "runs/a", "--steps", "4", "--eval-data", "scenes:train", "--eval-examples", "4")
    assert re.search("scenes:train, first 4:\n +step 3 +step 4\n", output) and "so far were of" not in output, output
    assert (run / "metrics.jsonl").read_text().startswith(text) and read_metrics(run)["EVAL length"][0] == [3, 4]


def test_dry_run_reports_and_writes_nothing(tmp_path):
    code, output = run_train(tmp_path, "--dry-run", "--preset", "paper", "--data", "scenes:train", "--model",
                             str(ROOT / "assets/tiny"), "--eval-data", "scenes:val", "--max-new-tokens", "64")
    assert code == 0, output
    for said in ("preset paper", "longest prompt", "peak memory", "update", "sampling", "456 steps and 6 evaluations at most"):
        assert said in output
    assert "weights 0.00 GB" in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [2])
def test_a_picture_that_only_decoding_shows_to_be_bad(tmp_path, ranks):
    """Printed at once, counted in metrics.jsonl and in the last line, in training and in evaluations; without the option
    the run stops with the row's name."""
    whole = io.BytesIO()
    Image.new("RGB", (112, 112)).save(whole, "JPEG")
    rows = []
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(whole.getvalue()[:-100] if i in (2, 4) else whole.getvalue())
        rows.append({"image": f"{i}.jpg", "problem": "red ring", "solution": "[]"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data", "a.jsonl", "--task", "scene_grounding", "--steps", "3", "--name", "a", "--eval-data", "a.jsonl",
             "--eval-examples", "6")
    code, output = run_train(tmp_path, *flags, "--skip-bad-rows", ranks=ranks)
    assert code == 0, output
    left_out = [line.get("left_out", 0) for line in lines(tmp_path / "runs/a") if "loss" in line]
    assert sum(left_out) == 4       # 12 examples are two epochs
    assert re.search(r"left out: a.jsonl, row 3 .id 3.: the image cannot be read: 2.jpg: ", output)
    assert "left out: 2 rows of a.jsonl" in output.strip().splitlines()[-1] and "a.jsonl, first 4:" in output
    code, output = run_train(tmp_path, *flags, "--name", "b")
    assert code != 0 and re.search("a.jsonl, row [35] .* .--skip-bad-rows leaves such rows out", output)
    code, output = run_train(tmp_path, *flags, "--skip-bad-rows", "--dry-run", "--method", "sft", "--label-thought",
                             "rollout")
    assert code == 0 and "longest prompt of 4 read" in output and "sampling" in output      # of the thoughts
    (tmp_path / "long.jsonl").write_text(json.dumps({"image": None, "problem": "x", "solution": "red ring " * 99, "task": "vqa"}) + "\n")
    with open(tmp_path / "long.jsonl", "a") as file:        # a longer prompt; its row fits, and so does the other
        file.write(json.dumps({"image": None, "problem": "red ring " * 110, "solution": "x", "task": "vqa"}) + "\n")
    for method, limit in (("sft", "0"), ("visurf", "0"), ("sft", "260")):
        code, output = run_train(tmp_path, "--data", "long.jsonl", "--dry-run", "--method", method, "--max-row-tokens", limit)
        assert code == 0 and int(re.search(r"row.s. of ([0-9,]+) tokens a group", output)[1].replace(",", "")) > 200, output


@pytest.mark.parametrize("name, call, logged", [
    ("sample", 12 + 12 + 5, [0, 1]), ("forward", 4 + 2, [0, 1]), ("sample", 12 + 12 + 12 + 5, [0, 1, 2]),
    ("sample", 5 * 12 + 5, [0, 1, 2, 2, 3])])
def test_a_signal_in_the_middle_loses_nothing(tmp_path, one_rank, monkeypatch, capsys, name, call, logged):
    """While the second step is sampled, in the middle of its update, in the evaluation after it, in the last one: the
    last line says how to go on, what is saved is the state before, and the run ends with the same weights, lines and evaluations as one that was not stopped."""
    import rollout
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--steps", "3", "--model", str(ROOT / "assets/tiny"), "--eval-data", "scenes:val", "--eval-examples",
             "6", "--eval-every", "2"]

    def start(*more):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *more])
        try:
            train.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            support.runs.locks.clear()
    start("--name", "whole")
    module = {"sample": rollout, "forward": train.DistributedDataParallel}[name]
    plain, calls = getattr(module, name), 0

    def interrupting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupting)
        start("--name", "half")
    assert f"stopped at step {logged[-1]}; go on with torchrun train.py --resume runs/half" in capsys.readouterr().out
    assert train.newest_checkpoint.__wrapped__(Path("runs/half")).name == f"step_{logged[-1]}"
    assert [line["step"] for line in lines(tmp_path / "runs/half")] == logged
    start("--resume", "runs/half")
    a, b = (load_file(f"runs/{run}/checkpoints/step_3/model.safetensors") for run in ("whole", "half"))
    assert all(torch.equal(a[key], b[key]) for key in a) and lines(Path("runs/whole")) == lines(Path("runs/half"))


def test_a_signal_that_comes_while_the_ranks_agree_to_go_on_is_left_to_the_next_step():
    """Else this rank alone would leave out its last micro-batch, and the others would wait for it."""
    run = object.__new__(Run)
    run.signals = []
    run.any_signal = lambda: bool(run.signals.append(signal.SIGTERM))       # it comes behind what the ranks agree on
    assert run.leaves(last=True) is False and run.signals
    run.any_signal = lambda: True
    assert run.leaves(last=False) is True
    with pytest.raises(Stopped):
        run.leaves(last=True)


def train_on_two_ranks(rank: int, ports: list[int], folder: Path) -> None:
    """A run that nothing disturbs, and one that a signal stops in the middle, on rank 1 alone: while it samples the
    second step, then in the update of the third. The same in the end. Then one before an update, a step in which rank 0
    has no signal, and one in which rank 1 has no memory left."""
    import rollout
    os.chdir(folder)
    print_into(folder / "output")
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    flags = [*SMALL, "--steps", "3", "--model", str(ROOT / "assets/tiny"), "--save-every", "1"]

    def start(*more: str) -> None:
        os.environ["MASTER_PORT"] = str(ports.pop())
        sys.argv = ["train.py", *flags, *more]
        train.run_main(train.main)
        support.runs.locks.clear()

    def at(module, name: str, call: int, act) -> None:
        """act() before that call of the function, on rank 1; the calls after it are as ever."""
        plain, calls = getattr(module, name), 0

        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call and rank == 1:
                act()
            return plain(*args, **kwargs)
        setattr(module, name, counted)

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")
    start("--name", "whole")
    at(rollout, "sample", 12 + 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    start("--name", "half")
    at(train.DistributedDataParallel, "forward", 2 + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    start("--resume", "runs/half")
    start("--resume", "runs/half")
    at(train, "pack", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))     # before the first micro-batch of a step
    start("--name", "early")
    if rank == 0:
        rewarded = train.reward_group

        def tied(*args, **known):
            rewards, r, smoothed = rewarded(*args, **known)
            return rewards, [1.0] * len(r), smoothed
        train.reward_group = tied
    start("--name", "silent", "--steps", "1")
    at(train, "update", 1, fail)
    start("--name", "full")


def test_what_one_of_two_ranks_meets_alone(tmp_path):
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        run_ranks(train_on_two_ranks, ([free_port() for _ in range(7)], tmp_path), 2)
    output = (tmp_path / "output").read_text()
    assert "stopped at step 1" in output and "stopped at step 2" in output, output
    assert "the learning rate goes on" not in output       # in the warm-up it doubles by itself
    a, b = (load_file(tmp_path / f"runs/{run}/checkpoints/step_3/model.safetensors") for run in ("whole", "half"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert lines(tmp_path / "runs/whole") == lines(tmp_path / "runs/half")
    assert [line["step"] for line in lines(tmp_path / "runs/early")] == [1]
    line, = lines(tmp_path / "runs/silent")
    whole = json.loads((tmp_path / "runs/silent/metrics.jsonl").read_text())
    assert 0 <= whole["seconds_waiting"] <= whole["seconds_sampling"] + 1
    assert line["tied"] == 0.5 and line["grad_norm"] > 0
    assert "out of memory: CUDA out of memory. A smaller --sampling-batch needs less" in output


def test_sigterm_saves_and_leaves(tmp_path):
    process = start_train(tmp_path, "--steps", "100000", "--name", "long")
    metrics = tmp_path / "runs/long/metrics.jsonl"
    for _ in range(600):
        if process.poll() is not None or metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.index("stopping: the step at work is left, and what is complete is saved") < output.index("stopped at step")
    assert process.returncode == 0 and "stopped at step" in output, output
    assert (tmp_path / "runs/long/curves.png").exists() and (tmp_path / "runs/long/report.html").exists()
    step = lines(tmp_path / "runs/long")[-1]["step"]
    folder = tmp_path / f"runs/long/checkpoints/step_{step}"
    state = read_state(folder)
    assert (state["step"], state["cursor"], state["bad_steps"]) == (step, 4 * step, 0)
    assert not list(folder.parent.glob(".unfinished*"))

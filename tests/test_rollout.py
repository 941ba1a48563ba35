"""Sampling: cached = uncached, the recorded log-probs, independence of the batch, the distribution itself."""
import pytest
import torch
from einops import repeat
from scipy import stats
from torch.nn.functional import scaled_dot_product_attention
from transformers import RepetitionPenaltyLogitsProcessor

import rollout
from data import Processor, Response, collate, pack_group
from experiments.one_model import compare
from model import load_model, random_model, row_mask
from rollout import KVCache, collect, decode_one_token, generate, sample, uniforms
from support import graphs
from support.mistakes import Mistake
from support.penalty import RepetitionPenalty
from support.sources import Example, Scenes

FOLDER = "assets/tiny"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def rollouts(model, prompts, G: int, R: int, temperature: float = 1.0, seed: int = 0, places=None, **features):
    """G rollouts of each prompt, by the numbers of its place, which is where it stands in the list."""
    places = range(len(prompts)) if places is None else places
    return generate(model, prompts, R, uniforms(seed, places, G, R), temperature, **features)


@pytest.fixture(scope="module", params=["Qwen2.5-VL", "Qwen3-VL"])
def folder(request, qwen3_folder):
    return FOLDER if request.param == "Qwen2.5-VL" else qwen3_folder


@pytest.fixture(scope="module")
def processor(folder):
    return Processor(folder)


@pytest.fixture
def model(folder):
    """Random weights, large enough that every layer changes what is sampled."""
    torch.manual_seed(1)
    model = random_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
        model.lm_head.weight.mul_(2)   # tied: a peaked distribution, so that greedy decoding has no near-ties
    return model


@pytest.fixture
def prompts(processor):
    """Prompts of different lengths, on different pictures: one, three and none."""
    scenes = [Scenes("test")[i] for i in (0, 2, 5)]
    three = Example("3", tuple(scene.images[0] for scene in scenes), "red <image> or <image><image>", "red", "vqa")
    none = Example("0", (), "How many squares are there?", "4", "vqa")
    return [processor.prompt(example) for example in (*scenes, three, none)]


def rescored(model, prompt, responses):
    """The training forward's log-probs of each response."""
    batch = collate(pack_group(prompt, responses))
    with torch.no_grad():
        logp, _ = model(**vars(batch), temperature=0.7)
    return [logp[batch.segment == s + 1] for s in range(len(responses))]


def hidden_states(model, batch):
    """Of each token, by the whole mask of the row."""
    def attend(_, q, k, v):
        return scaled_dot_product_attention(q, k, v, row_mask(batch.segment), enable_gqa=True)
    return model.decode(model.embed(batch.tokens, batch.patches, batch.grids), batch.position, attend)


def uncached(model, prompt, R, temperature, u):
    """The same sampling without a cache: the whole sequence is run again for every token."""
    tokens = []
    for r in range(R):
        batch = collate(pack_group(prompt, [Response([*tokens, 0])]))
        with torch.no_grad():
            hidden = hidden_states(model, batch)[:, len(prompt.tokens) + r - 1]
            token, *_ = sample(model.logits(hidden, temperature or 1.0), None if u is None else u[r:r + 1])
        tokens.append(int(token))
        if tokens[-1] in model.eos_ids:
            break
    return tokens


def test_cached_tokens_equal_uncached_tokens(model, prompts, products):
    products(model)
    greedy = generate(model, prompts, 12)
    sampled = rollouts(model, prompts, 3, 12, 0.7, seed=5, places=range(9, 9 + len(prompts)))
    for place, (prompt, (alone,), group) in enumerate(zip(prompts, greedy, sampled), 9):
        assert alone.tokens == uncached(model, prompt, 12, 0, None)
        u = uniforms(5, [place], 3, 12)[0]
        assert [r.tokens for r in group] == [uncached(model, prompt, 12, 0.7, u[g]) for g in range(3)]
        assert len({tuple(r.tokens) for r in group}) > 1   # the rollouts of a prompt do differ


def test_recorded_log_probs_equal_the_training_forward(model, prompts, products):
    products(model)
    for prompt, group in zip(prompts, rollouts(model, prompts, 4, 20, 0.7)):
        for response, logp in zip(group, rescored(model, prompt, group)):
            torch.testing.assert_close(torch.tensor(response.logp), logp, atol=1e-5, rtol=1e-5)
        batch = collate(pack_group(prompt, group))
        with torch.no_grad():
            _, entropy = model(**vars(batch), temperature=0.7)
        torch.testing.assert_close(torch.tensor(sum((r.entropy for r in group), [])), entropy[batch.segment > 0],
                                   atol=1e-4, rtol=1e-4)


def test_sampler_and_trainer_agree_to_the_bit_mostly():
    """On experiments/one_model.py's 1,000 rollouts 0.86 of the log-probs are equal; 0.10 if log(softmax) were noted."""
    found = compare(load_model(FOLDER), range(2), 32)
    assert found["rollouts"] == 16 and found["equal"] > 0.5
    assert found["logp_gap"] < 1e-5 and found["logp_gap_max"] < 1e-3 and 0 <= found["kl_sampler"] < 1e-8


@pytest.mark.parametrize("offset", [0, 140, 500])
@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_scores_survive_a_common_offset_of_the_keys(device, offset):
    """Real keys carry large common offsets, which the softmax cancels. Scores rounded to bfloat16 do not: against
    float64 the cache's attention must be as exact as the one of training."""
    torch.manual_seed(0)
    with torch.device(device):
        B, G, K, P, R, d, H = 2, 4, 2, 40, 5, 16, 4
        cache = KVCache(1, G, R, torch.ones(B, P, dtype=torch.bool))
        common = offset * torch.randn(1, K, 1, d)
        k, v = ((torch.randn(B, K, P, d) + common).bfloat16(), torch.randn(B, K, P, d).bfloat16())
        cache.attend_prompt(torch.ones(P, P, dtype=torch.bool), 0, torch.zeros(B, H, P, d).bfloat16(), k, v)
        keys, values = (repeat(x, "b k p d -> (b g) k p d", g=G) for x in (k, v))
        for r in range(R):
            q, k, v = (torch.randn(B * G, heads, 1, d) for heads in (H, K, K))
            q, k, v = q.bfloat16(), (k + common).bfloat16(), v.bfloat16()
            keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            cache.window = r + 1
            cache.hide()
            sampled = cache.attend_token(0, q, k, v)
            cache.slot += 1
            trained, exact = (scaled_dot_product_attention(*(x.to(dtype) for x in (q, keys, values)), enable_gqa=True)
                              for dtype in (torch.bfloat16, torch.float64))
            assert sampled.dtype == torch.bfloat16
            ours, theirs = ((x - exact).abs().mean() for x in (sampled, trained))
            assert ours < 1.5 * theirs, (r, ours, theirs)


def test_bfloat16_sampling_is_the_policy_that_is_trained():
    """The mean gap of log-probs with keys that carry an offset: 0.07 where scores were rounded to bfloat16."""
    model, processor = load_model(FOLDER, torch.bfloat16), Processor(FOLDER)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias += 140
    prompts = [processor.prompt(Scenes("train")[i]) for i in range(4)]
    gap = []
    for prompt, group in zip(prompts, rollouts(model, prompts, 8, 48)):
        batch = collate(pack_group(prompt, group))
        with torch.no_grad():
            logp = model(**vars(batch))[0][batch.segment > 0]
        gap.append((logp - torch.tensor(sum((r.logp for r in group), []))).abs())
    assert torch.cat(gap).mean() < 0.035


def test_no_prompts(model):
    with pytest.raises(ValueError, match="list of prompts is empty"):
        generate(model, [], 4)


def test_rollouts_do_not_depend_on_the_batch(model, prompts):
    def run(places):
        groups = rollouts(model, [prompts[place] for place in places], 4, 16, 1.0, places=places)
        return {place: [r.tokens for r in group] for place, group in zip(places, groups)}
    everywhere = list(range(len(prompts)))
    together = run(everywhere)
    assert run(everywhere[::-1]) == together
    for place in everywhere:
        assert run([place])[place] == together[place]


def test_seed_and_place_each_change_the_rollouts(model, prompts):
    """A prompt that comes twice in one call, as in a set smaller than a step, is answered by other rollouts."""
    def run(chosen, **keywords):
        return [[r.tokens for r in group] for group in rollouts(model, chosen, 4, 16, 1.0, **keywords)]
    alone = prompts[:1]
    assert run(alone, seed=1, places=[7]) == run(alone, seed=1, places=[7])
    assert run(alone, seed=1, places=[7]) != run(alone, seed=2, places=[7])
    assert run(alone, seed=1, places=[7]) != run(alone, seed=1, places=[8])
    first, second = run([prompts[0], prompts[0]], seed=1)
    assert first != second


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_frequencies_match_the_softmax(model, prompts, temperature):
    n = 8000
    batch = collate(pack_group(prompts[1], [Response([0])]))
    with torch.no_grad():
        hidden = hidden_states(model, batch)[0, len(prompts[1].tokens) - 1]
        expected = n * (model.lm_head(hidden).masked_fill(model.banned, -torch.inf) / temperature).softmax(-1).double()
    first = [r.tokens[0] for r in rollouts(model, [prompts[1]], n, 1, temperature, seed=3)[0]]
    seen = torch.bincount(torch.tensor(first), minlength=len(expected)).double()
    common = expected >= 5
    assert common.sum() > 3
    seen = torch.cat((seen[common], seen[~common].sum()[None]))
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    chi_square = float(((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    assert stats.chi2.sf(chi_square, len(seen) - 1) > 1e-3


def test_vision_tokens_are_never_sampled(model, prompts):
    """The final norm is made to point at the image placeholder's embedding: without the ban it would be sampled."""
    c = model.config
    with torch.no_grad():
        direction = model.lm_head.weight[c.image_token_id].clone()
        model.lm_head.weight[c.video_token_id] = direction
        model.model.norm.weight.zero_()
    hidden = direction[None] * 10
    assert int(model.lm_head(hidden).argmax()) in (c.image_token_id, c.video_token_id)
    token, logp, _ = sample(model.logits(hidden).repeat(500, 1), torch.rand(500, dtype=torch.float64))
    assert not model.banned[token].any() and torch.isfinite(logp).all()
    assert not model.banned[sample(model.logits(hidden), None)[0]].any()


def test_sample_takes_no_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    u = torch.tensor([0.0, 0.4999, 0.5, 1 - 2 ** -53], dtype=torch.float64)
    token, logp, _ = sample(logits, u)
    assert token.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(logp, torch.full((4,), 0.5).log())


def by_float64(logits, u):
    """Inverse transform by sums over the whole vocabulary."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]


@pytest.mark.parametrize("V", [460, 1031, 32_000, 151_936, 152_064])
def test_words_are_drawn_as_by_sums_over_the_whole_vocabulary(V):
    """Of one block, of blocks of one word (1031 is prime), of many. Half of the words impossible, all alike, one almost
    certain, none likely but at the end."""
    torch.manual_seed(0)
    logits = torch.randn(6, 8, V)
    logits[1].masked_fill_(torch.rand(8, V) < 0.5, -torch.inf)
    logits[2] = 0
    logits[3] *= 30
    logits[4, :, :-3], logits[5, :, 1:] = -torch.inf, -40
    logits = logits.flatten(0, 1).repeat(4, 1)
    u = torch.rand(len(logits), dtype=torch.float64)
    token, logp, entropy = sample(logits, u)
    assert torch.equal(token, by_float64(logits, u))
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), exact.gather(1, token[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), torch.special.entr(exact.exp()).sum(-1), rtol=0, atol=1e-4)
    for end in (0.0, 1 - 2 ** -53):
        assert sample(logits, torch.full_like(u, end))[1].isfinite().all()


@pytest.mark.parametrize("every, share", [(1, 0.0), (1, 0.5), (4, 0.0), (4, 0.5)])
def test_rollouts_leave_the_batch_and_change_nothing(model, prompts, monkeypatch, every, share):
    """Whatever the others of the group do, a rollout is the one that it would be without an end, cut at its own. Of the
    prompts that go on as many rollouts are decoded as the one has that has the most; on a GPU from the next look on
    that finds half of the batch ended."""
    rows = []

    def step(m, token, *others):
        rows.append(len(token))
        return decode_one_token(m, token, *others)
    model.eos_ids = (-1,)
    endless = rollouts(model, prompts, 4, 16, 1.0, seed=2)
    counts = torch.tensor([o.tokens for group in endless for o in group]).flatten().bincount()
    model.eos_ids = tuple(counts.topk(6).indices.tolist())
    monkeypatch.setattr(rollout, "when_to_leave", lambda device: (every, share))
    lengths = []
    rows.clear()
    for whole, group in zip(endless, rollouts(model, prompts, 4, 16, 1.0, seed=2, step=step)):
        for before, after in zip(whole, group):
            cut = next((i + 1 for i, token in enumerate(before.tokens) if token in model.eos_ids), 16)
            assert after.tokens == before.tokens[:cut] and after.logp == pytest.approx(before.logp[:cut], abs=1e-5)
            assert after.truncated == (before.tokens[cut - 1] not in model.eos_ids)
        lengths.append([len(o.tokens) for o in group])
    going = [[sum(length > r for length in group) for group in lengths] for r in range(1, 16)]
    expected, now = [], 4 * len(prompts)
    for r, counts in enumerate(going, 1):
        left = sum(count > 0 for count in counts) * max(counts)
        if r % every == 0 and now - left >= max(1, share * now):
            now = left
        expected += [now] * bool(now)
    assert rows == expected and len(set(rows)) > 1 and any(max(counts) < 4 for counts in going)
    assert any(min(counts) == 0 < max(counts) for counts in going)          # both kinds of leaving occur


def test_the_repetition_penalty_is_that_of_transformers(model, prompts):
    """Greedy, over several prompts that leave at different times: at each token the logits of what the prompt or the
    answer holds are those that transformers' processor makes of them."""
    penalise = RepetitionPenaltyLogitsProcessor(1.7)
    plain = generate(model, prompts, 12)
    model.eos_ids = tuple({group[0].tokens[k] for group, k in zip(plain, (3, 6))})
    adjust = RepetitionPenalty(1.7, [prompt.tokens for prompt in prompts])
    found = generate(model, prompts, 12, adjust=adjust)
    for prompt, [answer] in zip(prompts, found):
        for r, token in enumerate(answer.tokens):
            batch = collate(pack_group(prompt, [Response([*answer.tokens[:r], 0])]))
            with torch.no_grad():
                logits = model.logits(hidden_states(model, batch)[:, len(prompt.tokens) + r - 1], 1.0)
            logits = penalise(torch.tensor([prompt.tokens + answer.tokens[:r]]), logits)
            assert int(logits.argmax()) == token
    assert [o.tokens for [o] in found] != [o.tokens for [o] in plain] and len({len(o.tokens) for [o] in found}) > 1


def test_every_eos_id_ends_a_response_and_finished_prompts_leave(model, prompts):
    model.eos_ids = (-1,)
    plain = generate(model, prompts, 16)
    ends = {plain[0][0].tokens[2], plain[1][0].tokens[5]}    # two ids that do come up, at different places
    model.eos_ids = tuple(ends)
    sizes = []

    def step(m, token, *others):
        sizes.append(len(token))
        return decode_one_token(m, token, *others)
    for (before,), (after,) in zip(plain, generate(model, prompts, 16, step=step)):
        cut = next((i + 1 for i, token in enumerate(before.tokens) if token in ends), 16)
        assert after.tokens == before.tokens[:cut]
        assert after.logp == pytest.approx(before.logp[:cut], abs=3e-5)
        assert after.truncated == (before.tokens[cut - 1] not in ends)
    assert sizes[0] == len(prompts) and sizes[-1] < len(prompts) and sizes == sorted(sizes, reverse=True)


def test_steps_become_responses():
    """Two prompts of two rollouts, EOS 9. Rollout 0 of prompt 0 ends at once and idles along, as
    rollout 1 of prompt 1 does not end; then prompt 0 has left, with nothing after its EOS."""
    def step(alive, numbers, tokens):
        values = torch.tensor(tokens) / 10
        return tuple(map(torch.tensor, (alive, numbers, tokens))) + (-values, values)
    (a, b), (c, d) = collect([step([0, 1], [[0, 1], [0, 1]], [[9, 5], [6, 7]]),
                              step([0, 1], [[0, 1], [1, 0]], [[4, 9], [3, 8]]),
                              step([1], [[1]], [[2]])], 2, 2, {8, 9})
    assert [(o.tokens, o.truncated) for o in (a, b, c, d)] == [
        ([9], False), ([5, 9], False), ([6, 8], False), ([7, 3, 2], True)]
    for o in (a, b, c, d):
        assert o.logp == pytest.approx([-t / 10 for t in o.tokens])
        assert o.entropy == pytest.approx([t / 10 for t in o.tokens])


@pytest.mark.parametrize("device", DEVICES)
def test_static_steps_sample_the_same(model, prompts, monkeypatch, device):
    """GraphedStep: windows of 5 slots, of which some are not written yet, while prompts leave the batch."""
    monkeypatch.setattr(graphs, "WINDOW", 5)
    model.to(device)
    model.eos_ids = (-1,)
    often = torch.tensor([r.tokens for group in rollouts(model, prompts, 8, 16, 1.0) for r in group]).flatten()
    model.eos_ids = tuple(often.bincount().topk(8).indices.tolist())
    plain, static = (rollouts(model, prompts, 3, 16, 1.0, seed=2, step=step, graphs=False)
                     for step in (decode_one_token, graphs.GraphedStep(decode_one_token)))
    lengths = {max(len(r.tokens) for r in group) for group in plain}
    assert len(lengths) > 1 and max(lengths) > 10
    for group, same in zip(plain, static):
        for response, again in zip(group, same):
            assert response.tokens == again.tokens
            torch.testing.assert_close(torch.tensor(response.logp), torch.tensor(again.logp), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_are_made_where_there_is_cuda_unless_switched_off(model, prompts, monkeypatch, device):
    made = []
    monkeypatch.setattr(rollout, "GraphedStep", lambda step: made.append(step) or graphs.GraphedStep(step))
    model.to(device)
    rollouts(model, prompts, 1, 2, graphs=False)
    assert not made
    rollouts(model, prompts, 1, 2)
    assert made == [decode_one_token] * (device == "cuda")


@pytest.mark.parametrize("u", [None, torch.full((1, 2, 4), 0.5)])
def test_weights_that_are_not_finite_are_one_sentence(u):
    model, processor = load_model(FOLDER), Processor(FOLDER)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(Mistake, match="log-probs are not finite: its weights hold NaN or Inf"):
        generate(model, [processor.prompt(Scenes("test")[0])], 4, u)

"""model.py against transformers' Qwen2.5-VL and Qwen3-VL with the same random weights, and the invariances of the packed
row."""
import doctest
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)

import model as model_file
from data import Batch, Processor, Prompt, Response, collate, pack_group
from model import (VISION_TOKENS, Config, Qwen2_5_VL, RowLayout, for_each_query_head,
                   load_model, mrope_positions, random_model, row_mask)
from rewards import user_text
from rollout import generate
from support.mistakes import Mistake
from support.penalty import RepetitionPenalty
from support.sources import Example, Scenes

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
EOS, START, END, IMAGE, VIDEO = 149, 150, 151, 152, 153
VOCABULARY = 160

# Every config has windows of 112 px = 8 patches = 4 image tokens, and full attention in some of its blocks only. The
# numbers that transformers and we could take from a default (eps, theta, sections) differ from the defaults.
CONFIGS = {
    "4 heads on 2, tied": (
        dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, intermediate_size=96,
             rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])),
        dict(hidden_size=32, num_heads=2, depth=4, intermediate_size=48, out_hidden_size=64,
             fullatt_block_indexes=[1, 3]), True),
    "6 heads on 2, untied": (
        dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=128,
             rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2])),
        dict(hidden_size=48, num_heads=3, depth=5, intermediate_size=64, out_hidden_size=96,
             fullatt_block_indexes=[0, 2]), False),
    "4 heads on 1, untied, last block windowed": (
        dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=96,
             rms_norm_eps=1e-3, rope_parameters=dict(rope_type="default", rope_theta=1e5, mrope_section=[3, 3, 2])),
        dict(hidden_size=64, num_heads=2, depth=4, intermediate_size=48, out_hidden_size=64,
             fullatt_block_indexes=[2]), False),
    # Of Qwen3-VL: a head size that is not width / heads, DeepStack out of order and from two of five blocks.
    "third, 4 heads on 2, tied": (
        dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, intermediate_size=96,
             head_dim=24, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                                 mrope_section=[6, 4, 2])),
        dict(hidden_size=32, num_heads=2, depth=5, intermediate_size=48, out_hidden_size=64,
             num_position_embeddings=49, deepstack_visual_indexes=[1, 3]), True),
    "third, 6 heads on 2, untied": (
        dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3, intermediate_size=128,
             head_dim=16, rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                                                 mrope_section=[4, 2, 2])),
        dict(hidden_size=48, num_heads=3, depth=4, intermediate_size=64, out_hidden_size=96,
             num_position_embeddings=16, deepstack_visual_indexes=[0, 2]), False),
}


@torch.no_grad()
def scramble(model, seed: int) -> None:
    """Weights large enough that every head, norm and bias shows in the logits; the usual std 0.02 hides bugs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(0.15 * noise)
        else:
            parameter.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)


def make_reference(name: str):
    text, vision, tied = CONFIGS[name]
    kind, config, window = ((Qwen3VLForConditionalGeneration, Qwen3VLConfig, {}) if name.startswith("third") else
                            (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {"window_size": 112}))
    reference = kind(config(
        text_config=dict(text, vocab_size=VOCABULARY, eos_token_id=EOS, bos_token_id=None), tie_word_embeddings=tied,
        vision_config=dict(vision, **window, patch_size=14, spatial_merge_size=2, temporal_patch_size=2),
        vision_start_token_id=START, vision_end_token_id=END, image_token_id=IMAGE, video_token_id=VIDEO)).eval()
    scramble(reference, seed=len(name))
    reference.generation_config.eos_token_id = EOS
    return reference


def make_pair(name: str, folder: Path):
    """transformers' model and ours, loaded from the folder that it saved."""
    reference = make_reference(name)
    reference.save_pretrained(folder)
    return reference, load_model(folder)


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module", params=["4 heads on 2, tied", "third, 4 heads on 2, tied"])
def tied_pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def ours(tied_pair):
    return tied_pair[1]


def make_prompt(seed: int, *parts) -> Prompt:
    """parts: a number stands for that many text tokens, a pair (gh, gw) for an image of as many patches."""
    generator = torch.Generator().manual_seed(seed)
    tokens, grids = [], []
    for part in parts:
        if isinstance(part, int):
            tokens += torch.randint(EOS, (part,), generator=generator).tolist()
        else:
            tokens += [START, *[IMAGE] * (part[0] * part[1] // 4), END]
            grids.append(part)
    n = sum(gh * gw for gh, gw in grids)
    patches = torch.randn(n, 3 * 2 * 14 * 14, generator=generator) if n else torch.empty(0)
    position = mrope_positions(tokens, grids, IMAGE)
    return Prompt(Example(str(seed), (), "", "", "vqa"), tokens, position, patches, grids, "")


# 10×22 patches are 140×308 px: 2×3 windows, of 8 or 2 rows and of 8, 8 or 6 columns. No side is a multiple of 112 px.
# One, three (two of them side by side, one of a single window), no and one image.
PROMPTS = [make_prompt(1, 5, (10, 22), 7), make_prompt(2, 3, (18, 6), 2, (4, 26), (2, 4), 4), make_prompt(3, 9),
           make_prompt(4, (12, 12), 6)]
TEXT_ONLY = [make_prompt(5, 11), make_prompt(6, 4)]
RESPONSES = [make_prompt(7 + n, n).tokens for n in (4, 1, 9)]


def reference_inputs(prompts: list[Prompt], responses: list[list[int]]) -> dict:
    """One row for each prompt and response, padded on the right."""
    rows = [torch.tensor(p.tokens + r) for p, r in zip(prompts, responses, strict=True)]
    tokens = pad_sequence(rows, batch_first=True)
    inputs = {"input_ids": tokens, "attention_mask": pad_sequence([torch.ones_like(r) for r in rows], batch_first=True),
              "mm_token_type_ids": (tokens == IMAGE).int()}
    grids = [(1, *grid) for p in prompts for grid in p.grids]
    if grids:
        inputs |= {"pixel_values": torch.cat([p.patches for p in prompts if p.grids]),
                   "image_grid_thw": torch.tensor(grids)}
    return inputs


def masked(segment: torch.Tensor):
    """Attention by the whole mask of the rows."""
    def attend(_, q, k, v):
        return scaled_dot_product_attention(q, *for_each_query_head(q, k, v), row_mask(segment))
    return attend


def hidden_states(model: Qwen2_5_VL, batch: Batch) -> torch.Tensor:
    return model.decode(model.embed(batch.tokens, batch.patches, batch.grids), batch.position, masked(batch.segment))


def rows_of(prompts: list[Prompt], responses: list[list[int]]) -> Batch:
    return collate([row for p in prompts for row in pack_group(p, list(map(Response, responses)))])


def our_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {our_name(name): p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Relative to the largest entry of each parameter's gradient."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (actual[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers as transformers

@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, TEXT_ONLY], ids=["images", "text only"])
def test_logits(pair, prompts, products):
    reference, model = pair
    products(model)
    responses = [RESPONSES[i % 3] for i in range(len(prompts))]
    batch = collate([pack_group(p, [Response(r)])[0] for p, r in zip(prompts, responses)])
    real = batch.segment >= 0
    expected = reference(**reference_inputs(prompts, responses)).logits[real]
    hidden = hidden_states(model, batch)[real]
    assert (model.lm_head(hidden) - expected).abs().max() < 1e-4 * expected.abs().max()
    # What sampling and scoring see: the vision ids are impossible, the rest is as it was.
    logits = model.logits(hidden)
    banned = [START, END, IMAGE, VIDEO]
    assert (logits[:, banned] == -torch.inf).all()
    kept = [i for i in range(VOCABULARY) if i not in banned]
    assert (logits[:, kept] - expected[:, kept]).abs().max() < 1e-4 * expected.abs().max()


def test_logprobs_and_gradients(pair, products):
    """Mean log-prob of three responses to each prompt: packed rows here, one row for each response in transformers."""
    reference, model = pair
    products(model)
    prompts = PROMPTS[:3]
    batch = rows_of(prompts, RESPONSES)
    logp, entropy = model(**vars(batch))
    scored = batch.segment > 0
    pairs = [(p, r) for p in prompts for r in RESPONSES]
    logits = reference(**reference_inputs(*map(list, zip(*pairs)))).logits
    logits[..., [START, END, IMAGE, VIDEO]] = -torch.inf
    source = torch.cat([row[len(p.tokens) - 1:][:len(r)] for row, (p, r) in zip(logits, pairs)])
    expected = source.log_softmax(-1)[torch.arange(len(source)), torch.tensor([t for _, r in pairs for t in r])]
    torch.testing.assert_close(logp[scored], expected, rtol=0, atol=1e-4)
    distribution = torch.distributions.Categorical(logits=source)
    torch.testing.assert_close(entropy[scored], distribution.entropy(), rtol=0, atol=1e-4)
    assert not logp[~scored].any() and not entropy[~scored].any()
    assert_gradients_close(gradients(model, logp[scored].mean()), gradients(reference, expected.mean()), 1e-4)


def test_mrope_positions(tied_pair):
    """A whole row: the prompt with its images, and the response after it."""
    reference, _ = tied_pair
    for prompts in (PROMPTS, [PROMPTS[1]]):
        responses = [RESPONSES[i % 3] for i in range(len(prompts))]
        inputs = reference_inputs(prompts, responses)
        del inputs["pixel_values"]
        expected, _ = reference.model.get_rope_index(**inputs)
        batch = collate([pack_group(p, [Response(r)])[0] for p, r in zip(prompts, responses)])
        real = batch.segment >= 0
        assert torch.equal(batch.position[:, real], expected[:, real])


def test_mrope_positions_refuses_other_placeholders_than_the_images_need():
    block = [IMAGE] * 6
    for tokens, grids, reason in (([1, *block, 2], [(4, 4)], None), ([1, *block], [(4, 8)], "fewer placeholders"),
                                  ([1, *block], [], "more image blocks"), ([1, 2], [(4, 6)], "fewer image blocks"),
                                  ([1, *block], [(4, 6), (4, 6)], "fewer image blocks")):
        with pytest.raises(ValueError, match=reason):
            mrope_positions(tokens, grids, IMAGE)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens(pair, monkeypatch, penalty, products):
    """64 tokens after prompts of different lengths in one batch; transformers takes them one by one."""
    reference, model = pair
    products(model)
    monkeypatch.setattr(model, "eos_ids", ())
    monkeypatch.setattr(reference.generation_config, "eos_token_id", None)
    adjust = RepetitionPenalty(penalty, [prompt.tokens for prompt in PROMPTS])
    sampled = generate(model, PROMPTS, 64, adjust=adjust)
    for prompt, [response] in zip(PROMPTS, sampled):
        expected = reference.generate(**reference_inputs([prompt], [[]]), do_sample=False, max_new_tokens=64,
                                      min_new_tokens=64, suppress_tokens=[START, END, IMAGE, VIDEO],
                                      repetition_penalty=penalty)
        assert response.tokens == expected[0, len(prompt.tokens):].tolist()
        assert len(response.tokens) == 64
    assert len({tuple(response.tokens) for [response] in sampled}) == len(PROMPTS)


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def reloaded(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    reference, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return reference.eval()


@torch.no_grad()
@pytest.mark.parametrize("shard", ["60KB", "5GB"])
def test_saved_folder_opens_in_transformers(pair, tmp_path, shard):
    reference, model = pair
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 if shard == "60KB" else files == ["model.safetensors"]
    inputs = reference_inputs(PROMPTS[:2], RESPONSES[:2])
    assert torch.equal(reloaded(tmp_path)(**inputs).logits, reference(**inputs).logits)
    again = load_model(tmp_path)
    assert again.eos_ids == model.eos_ids == (EOS,)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@torch.no_grad()
def test_hub_layout_config_and_companions(tmp_path):
    """assets/tiny has the hub's flat config.json. A save carries the tokenizer along and names the dtype."""
    torch.manual_seed(0)
    model = random_model(TINY)
    scramble(model, 0)
    model.save_pretrained(tmp_path)
    reference = reloaded(tmp_path)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("Please find the red ring.").input_ids])
    position = torch.arange(tokens.shape[1]).expand(3, 1, -1)
    x = model.embed(tokens, torch.empty(0), [])
    logits = model.lm_head(model.decode(x, position, masked(torch.zeros_like(tokens))))
    expected = reference(input_ids=tokens).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja"}
    model.bfloat16().save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("several", [False, True])
def test_a_saved_folder_answers_the_same_in_transformers(tmp_path, several):
    """Its weights, tokenizer, image processor and generation_config, by transformers alone, on a scene, or on three in
    the midst of a question. (AutoProcessor needs torchvision, which may be missing; it joins the two below.)"""
    model, example = load_model(TINY), Scenes("test")[0]
    model.save_pretrained(tmp_path)
    parts = [{"type": "image"}, {"type": "text", "text": user_text(example.task, example.question)}]
    if several:
        three = tuple(Scenes("test")[i].images[0] for i in (0, 1, 3))
        example = Example("1", three, "Find <image> or <image><image>: the red ring.", "1", "vqa")
        parts = [{"type": "text", "text": "Find "}, parts[0], {"type": "text", "text": " or "}, parts[0], parts[0],
                 {"type": "text", "text": ": the red ring."}]
    prompt = Processor(tmp_path).prompt(example)
    [[response]] = generate(load_model(tmp_path), [prompt], 64)
    tokenizer, images = AutoTokenizer.from_pretrained(tmp_path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    pixels = images(images=list(example.images), return_tensors="pt")
    inputs = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16), return_tensors="pt")
    is_image = (inputs["input_ids"] == model.config.image_token_id).int()
    answer = reloaded(tmp_path).generate(**inputs, **pixels, mm_token_type_ids=is_image, do_sample=False,
                                         max_new_tokens=64)
    assert answer[0, inputs["input_ids"].shape[1]:].tolist() == response.tokens and len(response.tokens) > 20


@torch.no_grad()
@pytest.mark.parametrize("layout", ["hub", "nested"])
def test_loads_both_layouts_of_names(pair, tmp_path, layout):
    reference, model = pair
    reference.save_pretrained(tmp_path)
    state = {our_name(name): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert any(name.startswith("visual.") for name in state) and "model.layers.0.mlp.up_proj.weight" in state
    if layout == "nested":
        state = {name if name.startswith("lm_head.") else "model." + name if name.startswith("visual.") else
                 name.replace("model.", "model.language_model.", 1): tensor for name, tensor in state.items()}
        assert "model.language_model.layers.0.mlp.up_proj.weight" in state
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_model(tmp_path)
    batch = rows_of(PROMPTS[:2], RESPONSES)
    assert torch.equal(loaded(**vars(batch))[0], model(**vars(batch))[0])


def test_config_of_older_transformers(ours, tmp_path):
    """transformers 4.52 … 4.54 wrote image_token_id and video_token_id as null inside text_config."""
    raw = json.loads((ours.folder / "config.json").read_text())
    raw["text_config"] |= {"image_token_id": None, "video_token_id": None, "vision_token_id": 154}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Config.from_json(tmp_path / "config.json") == ours.config


@pytest.fixture
def folder(ours, tmp_path):
    return Path(shutil.copytree(ours.folder, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def stored_name(folder: Path, ending: str) -> str:
    """Whatever layout this version of transformers writes."""
    [name] = [name for name in load_file(folder / "model.safetensors") if name.endswith(ending)]
    return name


def test_missing_tensor(folder):
    stored = stored_name(folder, "layers.1.mlp.up_proj.weight")
    rewrite(folder, lambda state: state.pop(stored))
    with pytest.raises(ValueError, match="1 tensors are missing.*model.layers.1.mlp.up_proj.weight"):
        load_model(folder)


def test_misshapen_tensor(folder):
    stored = stored_name(folder, "visual.blocks.0.norm1.weight")
    rewrite(folder, lambda state: state.update({stored: torch.ones(33)}))
    with pytest.raises(ValueError, match=r"visual.blocks.0.norm1.weight' has shape \(33,\).*\(32,\)"):
        load_model(folder)


def test_unknown_tensor(folder):
    rewrite(folder, lambda state: state.update({"model.layers.0.surprise": torch.ones(1)}))
    with pytest.raises(ValueError, match="model.layers.0.surprise"):
        load_model(folder)


@torch.no_grad()
def test_a_stored_head_must_be_the_embedding_it_is_tied_to(folder):
    """Some savers write the tied embedding twice, which is read; another matrix there is not this model's."""
    embedding = load_file(folder / "model.safetensors")[stored_name(folder, "embed_tokens.weight")]
    rewrite(folder, lambda state: state.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(load_model(folder).lm_head.weight, embedding)
    embedding[3, 5] += 1
    rewrite(folder, lambda state: state.update({"lm_head.weight": embedding}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(folder)


def test_missing_fields_of_qwen3_vl_are_as_in_transformers(tmp_path):
    wide = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 64, "vocab_size": 200000}
    raw = {"model_type": "qwen3_vl", "text_config": wide, "vision_config": {"hidden_size": 64, "out_hidden_size": 64},
           **{name: getattr(Qwen3VLConfig(), name) for name in VISION_TOKENS}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, theirs = Config.from_json(tmp_path / "config.json"), Qwen3VLConfig(**{**raw, "model_type": "qwen3_vl"})
    for name in ("head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        other = theirs.text_config.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(
            theirs if name.startswith("tie") else theirs.text_config, name)
        assert getattr(ours, name) == other, name
    for name in ("depth", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size", "spatial_merge_size",
                 "num_position_embeddings", "deepstack_visual_indexes"):
        other = getattr(theirs.vision_config, name)
        assert getattr(ours, f"vision_{name}") == (tuple(other) if isinstance(other, list) else other), name
    assert ours.mrope_section == (24, 20, 20)


def test_missing_fields_are_as_in_transformers(tmp_path):
    raw = json.loads((TINY / "config.json").read_text())
    for name in ("rms_norm_eps", "rope_theta"):
        del raw[name]
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size", "window_size", "fullatt_block_indexes"):
        del raw["vision_config"][name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, theirs = Config.from_json(tmp_path / "config.json"), Qwen2_5_VLConfig.from_pretrained(tmp_path)
    assert (ours.rms_norm_eps, ours.rope_theta) == (theirs.text_config.rms_norm_eps,
                                                    theirs.text_config.rope_parameters["rope_theta"])
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size", "window_size"):
        assert getattr(ours, f"vision_{name}") == getattr(theirs.vision_config, name)
    assert ours.vision_fullatt_block_indexes == tuple(theirs.vision_config.fullatt_block_indexes)


DAMAGED = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
           "tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json",
           "adapter_config.json"]


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"[1]",
                                    lambda data: b"\xff\xfe\x00", lambda data: b"[" * 100000])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_model_folder_is_named(tmp_path, name, damage):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    whole = (TINY / name).read_bytes() if (TINY / name).exists() else b'{"weight_map": {}}'
    (tmp_path / name).write_bytes(damage(whole))
    with pytest.raises(Mistake) as error:
        Processor(tmp_path)
        load_model(tmp_path)
    said = str(error.value)
    assert name in said, said
    assert "\n" not in said and len(said) < len(str(tmp_path)) * 3 + 400


@pytest.mark.parametrize("name, value", [("model_max_length", "x"), ("model_max_length", [1]), ("padding_side", 3),
                                         ("eos_token", 5), ("added_tokens_decoder", 5), ("tokenizer_class", 5)])
def test_a_wrong_setting_of_the_tokenizer(tmp_path, name, value):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(Mistake, match="its tokenizer cannot be read .*tokenizer_config.json damaged"):
        Processor(tmp_path)


def test_an_index_of_shards_that_names_none(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "pipe")
    for text, said in (("{}", "weight_map is 'None'"), ('{"weight_map": 3}', "weight_map is '3'"),
                       ('{"weight_map": {"a": 3}}', "must say which file"), ('{"weight_map": {}}', "must say which file"),
                       ('{"weight_map": {"a": "../x.safetensors"}}', "which file of the same folder"),
                       ('{"weight_map": {"a": "pipe"}}', "pipe is no regular file"),
                       ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors does not exist")):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(Mistake, match=said):
            load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
                                  "chat_template.jinja", "preprocessor_config.json"])
def test_what_is_no_file_in_a_model_folder(tmp_path, name):
    """A folder, or a pipe, which would be waited for. A file of another kind may be a folder."""
    for make in (Path.mkdir, os.mkfifo):
        shutil.rmtree(tmp_path)
        shutil.copytree(TINY, tmp_path)
        (tmp_path / "LICENSE").mkdir()
        (tmp_path / name).unlink()
        make(tmp_path / name)
        with pytest.raises(Mistake, match=f"{tmp_path}/{name} is .*; it must be a file"):
            Processor(tmp_path)


@pytest.mark.parametrize("ids", ["x", [], ["x"], True, 1.5, {}])
def test_eos_ids_are_ids(tmp_path, ids):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(Mistake, match="generation_config.json: eos_token_id is"):
        load_model(tmp_path)


def test_pickled_weights_are_never_read(folder, tmp_path):
    trace = tmp_path / "trace"
    trap = f"cbuiltins\nopen\n(V{trace}\nVw\ntR.".encode()  # a pickle that makes a file when it is read
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(trap)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(folder)
    assert not trace.exists()
    pickle.loads(trap).close()  # the trap is live
    assert trace.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The packed row

def alone_and_packed(model: Qwen2_5_VL):
    """Log-probs of RESPONSES to PROMPTS, each in a row and a batch of its own; then all as four rows of one batch,
    where the shorter rows stand padded beside the longest. Both in the same order."""
    alone = []
    for prompt in PROMPTS:
        for response in RESPONSES:
            batch = rows_of([prompt], [response])
            alone.append(model(**vars(batch))[0][batch.segment > 0])
    batch = rows_of(PROMPTS, RESPONSES)
    assert (batch.segment == -1).any() and len(batch.segment) == len(PROMPTS)
    return torch.cat(alone), model(**vars(batch))[0][batch.segment > 0]


def test_packed_row_scores_each_response_as_if_alone(pair):
    with torch.no_grad():
        alone, packed = alone_and_packed(pair[1])
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-5)


def test_bfloat16_is_as_exact_as_the_published_implementation():
    """Of the answers to six questions: the mean gap of log-probs to float32's is 0.04 in both, and less between them."""
    processor = Processor(TINY)
    prompts = [processor.prompt(Scenes("train")[i]) for i in range(6)]
    ys = [processor.encode(p.example.answer) for p in prompts]
    ours, theirs = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, reference = (load(TINY, dtype=dtype)
                            for load in (load_model, AutoModelForImageTextToText.from_pretrained))
        with torch.no_grad():
            parts = [(rows_of([p], [y]), reference_inputs([p], [y]), p, y) for p, y in zip(prompts, ys)]
            ours[dtype] = torch.cat([model(**vars(b))[0][b.segment > 0].float() for b, *_ in parts])
            for _, inputs, p, _ in parts:
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
                inputs["pixel_values"] = p.patches.to(dtype)
            logits = [reference(**inputs).logits[0, len(p.tokens) - 1:-1].float() for _, inputs, p, _ in parts]
            theirs[dtype] = torch.cat([x.masked_fill(model.banned, -torch.inf).log_softmax(-1)[range(len(y)), y]
                                       for x, y in zip(logits, ys)])

    def gap(a, b):
        return float((a - b).abs().mean())
    exact = theirs[torch.float32]
    assert gap(ours[torch.float32], exact) < 1e-4
    assert gap(ours[torch.bfloat16], exact) < 1.5 * gap(theirs[torch.bfloat16], exact)
    assert 0 < gap(ours[torch.bfloat16], theirs[torch.bfloat16]) < gap(theirs[torch.bfloat16], exact)


@pytest.mark.parametrize("segments", [
    ["000112333-", "00222333--", "0123456789", "0000000001"],       # lengths, padding, many responses, one
    ["0000111112", "00123-----", "01--------"],
    ["0123"]])
def test_row_layout_is_the_row_mask(segments):
    """Outputs and gradients of attention, float64, wherever there is a token."""
    segment = torch.tensor([[-1 if c == "-" else int(c) for c in line] for line in segments])
    torch.manual_seed(0)
    shape = len(segments), 4, segment.shape[1], 8
    q, weight = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    k, v = (torch.randn(len(segments), 2, segment.shape[1], 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    weight = weight * (segment >= 0)[:, None, :, None]
    results = []
    for out in (masked(segment)(0, q, k, v), RowLayout(segment).attend(0, q, k, v)):
        assert out.shape == shape and out.isfinite().all()
        results.append([out * (weight != 0), *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for expected, actual in zip(*results):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_packed_row_has_the_gradients_of_the_responses_alone(folder):
    model = load_model(folder, dtype=torch.float64)  # so that a slip cannot hide in rounding
    alone, packed = alone_and_packed(model)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    expected = gradients(model, alone.sum())
    assert_gradients_close(gradients(model, packed.sum()), expected, 1e-10)


def test_splitting_a_group_into_rows_changes_nothing(ours):
    whole = rows_of(PROMPTS[:2], RESPONSES)
    split = collate([row for p in PROMPTS[:2] for row in pack_group(p, list(map(Response, RESPONSES)), len(p.tokens) + 9)])
    assert len(split.tokens) == 2 * len(whole.tokens)
    with torch.no_grad():
        logp = [ours(**vars(batch))[0][batch.segment > 0] for batch in (whole, split)]
    torch.testing.assert_close(*logp, rtol=0, atol=1e-5)


class Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""
    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [TINY, "qwen3_folder"])
def test_activation_checkpointing_changes_nothing(family, request):
    """The same bits. Of the operators, "cheap" runs again all but the matrix products, "blocks" these, too."""
    model = random_model(family if family is TINY else request.getfixturevalue(family))
    prompts = [Processor(model.folder).prompt(Scenes("train")[i]) for i in range(2)]
    batch, results, ran = rows_of(prompts, RESPONSES), [], []
    for checkpoint in ("none", "cheap", "blocks"):
        with Operators() as operators:
            logp, entropy = model(**vars(batch), checkpoint=checkpoint)
            results.append((logp, entropy, *gradients(model, logp.sum()).values()))
        ran.append([operators.names.count(name) for name in ("mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu")])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    none, cheap, blocks = ran
    assert cheap == [*none[:2], 2 * none[2]] and blocks[2] == 2 * none[2] and all(b > n for b, n in zip(blocks, none))


def test_score_in_chunks(ours):
    """Against log-softmax and entropy written out, at a temperature; 10 tokens in chunks of 3 leave a remainder."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, ours.config.hidden_size, generator=generator)
    targets = torch.randint(EOS, (10,), generator=generator)
    logits = (hidden @ ours.lm_head.weight.T / 0.7).detach()
    allowed = [i for i in range(VOCABULARY) if i not in (START, END, IMAGE, VIDEO)]
    p = logits[:, allowed].softmax(-1)
    results = []
    for chunk in (10, 3):
        h = hidden.clone().requires_grad_()
        logp, entropy = ours.score(h, targets, 0.7, chunk=chunk)
        assert not entropy.requires_grad
        torch.testing.assert_close(logp, logits.gather(1, targets[:, None])[:, 0] - logits[:, allowed].logsumexp(-1))
        torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
        ours.zero_grad()
        logp.sum().backward()
        results.append((logp, entropy, h.grad, ours.lm_head.weight.grad.clone()))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_entropy(ours):
    """Against autograd through the allowed tokens alone: the banned ones, of log-prob −∞, bring no NaN. In chunks, too."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(10, ours.config.hidden_size, generator=generator)
    allowed = [i for i in range(VOCABULARY) if i not in (START, END, IMAGE, VIDEO)]
    h = hidden.clone().requires_grad_()
    logp = (h @ ours.lm_head.weight.detach()[allowed].T / 0.7).log_softmax(-1)
    expected, = torch.autograd.grad((logp.exp() * logp).sum(-1).square().sum(), h)
    for chunk in (10, 3):
        h = hidden.clone().requires_grad_()
        _, entropy = ours.score(h, torch.zeros(10, dtype=torch.long), 0.7, chunk=chunk, entropy_gradient=True)
        torch.testing.assert_close(entropy, ours.score(h, torch.zeros(10, dtype=torch.long), 0.7)[1])
        got, = torch.autograd.grad(entropy.square().sum(), h)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert got.abs().max() > 1e-3


def test_text_only_batch_touches_every_parameter(ours):
    """Else DDP waits for ever for the vision tower of a rank whose batch has no image."""
    batch = rows_of(TEXT_ONLY, RESPONSES)
    grads = gradients(ours, ours(**vars(batch))[0].sum())  # fails on a gradient that is None
    assert not any(gradient.any() for name, gradient in grads.items() if name.startswith("visual."))
    assert all(gradient.any() for name, gradient in grads.items() if not name.startswith("visual."))


@pytest.mark.parametrize("merge", [3, 4])
def test_text_only_batch_with_another_merge(tmp_path, merge):
    raw = json.loads((TINY / "config.json").read_text())
    raw["vision_config"]["spatial_merge_size"] = merge
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(TINY / "generation_config.json", tmp_path)
    model = random_model(tmp_path)
    grads = gradients(model, model(**vars(rows_of(TEXT_ONLY, RESPONSES)))[0].sum())  # fails on a gradient that is None
    assert not any(gradient.any() for name, gradient in grads.items() if name.startswith("visual."))


def test_images_and_placeholders_must_agree(ours):
    batch = rows_of(PROMPTS[:1], RESPONSES)
    with pytest.raises(ValueError, match="do not fill the grids"):
        ours.embed(batch.tokens, batch.patches[4:], batch.grids)
    with pytest.raises(ValueError, match="55 image placeholders for 36 image tokens"):
        ours.embed(batch.tokens, PROMPTS[3].patches, PROMPTS[3].grids)


def test_docstring_examples():
    result = doctest.testmod(model_file)
    assert result.attempted >= 5 and result.failed == 0


def test_the_ids_used_here_are_the_config_s(ours):
    assert [getattr(ours.config, name) for name in VISION_TOKENS] == [IMAGE, VIDEO, START, END]

"""config.json, field by field: with each value either the logits are those of transformers, or the field is refused by
name, in one sentence, before anything is built."""
import copy
import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_model import END, EOS, IMAGE, START, VIDEO, VOCABULARY, masked, scramble
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)

from model import VISION_TOKENS, Config, load_model, mrope_positions, random_model
from support.mistakes import Mistake

TOP = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
       "tie_word_embeddings": False}
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5}
VISION = {"depth": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 4}
BASE = {
    "qwen2_5_vl": {"model_type": "qwen2_5_vl", **TOP, "text_config": {**TEXT, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {**VISION, "window_size": 16, "fullatt_block_indexes": [1, 3]}},
    "qwen3_vl": {"model_type": "qwen3_vl", **TOP, "text_config": {**TEXT, "head_dim": 12, "rope_scaling": {
        "rope_type": "default", "mrope_section": [2, 2, 2]}, "rope_theta": 1e3},
        "vision_config": {**VISION, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}}}
CLASSES = {"qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
           "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration)}


def changed(family: str, change: dict) -> dict:
    """BASE with {"text_config.rope_scaling.type": value, …}; "absent" takes the field out."""
    raw = copy.deepcopy(BASE[family])
    for name, value in change.items():
        *sections, field = name.split(".")
        part = raw
        for section in sections:
            part = part.setdefault(section, {})
        part.pop(field, None) if value == "absent" else part.update({field: value})
    return raw


def write(folder: Path, raw: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder / "config.json"


# ---------------------------------------------------------------------------------------------------------------------
# The fields of transformers' classes, each in one of three tables

# The model is built from them: here with a value that is not BASE's, below (EQUAL) with more.
HONOURED = {
    "qwen2_5_vl": {
        "image_token_id": 99, "video_token_id": 99, "vision_start_token_id": 99, "vision_end_token_id": 99,
        "tie_word_embeddings": True, "text_config": None, "vision_config": None},
    "qwen2_5_vl.text_config": {
        "vocab_size": 170, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 4, "rms_norm_eps": 0.01, "rope_parameters": None},
    "qwen2_5_vl.vision_config": {
        "depth": 2, "hidden_size": 48, "intermediate_size": 20, "num_heads": 4, "patch_size": 6, "spatial_merge_size": 1,
        "temporal_patch_size": 3, "window_size": 24, "fullatt_block_indexes": [0], "out_hidden_size": None}}
HONOURED["qwen3_vl"] = HONOURED["qwen2_5_vl"]
HONOURED["qwen3_vl.text_config"] = {**HONOURED["qwen2_5_vl.text_config"], "num_attention_heads": 6, "head_dim": 12}
HONOURED["qwen3_vl.vision_config"] = {
    **HONOURED["qwen2_5_vl.vision_config"], "depth": 3, "num_position_embeddings": 49, "deepstack_visual_indexes": [1, 3]}
for name in ("window_size", "fullatt_block_indexes"):
    del HONOURED["qwen3_vl.vision_config"][name]
# Only the value of the published models is computed; here another one, which is refused.
REFUSED = {
    "qwen2_5_vl": {}, "qwen3_vl": {},
    "qwen2_5_vl.text_config": {
        "hidden_act": "gelu", "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2,
        "attention_dropout": 0.1},
    "qwen3_vl.text_config": {"hidden_act": "gelu", "attention_bias": True, "attention_dropout": 0.1},
    "qwen2_5_vl.vision_config": {"hidden_act": "gelu", "in_channels": 4, "rope_parameters": {"rope_theta": 100.0}},
    "qwen3_vl.vision_config": {"hidden_act": "silu", "in_channels": 1, "rope_parameters": {"rope_theta": 100.0}}}
# Whatever their value, no logit changes.
EVERYWHERE = {
    "transformers_version": "says who wrote it", "architectures": "model_type decides", "dtype": "--dtype decides",
    "output_hidden_states": "what a call returns", "return_dict": "what a call returns",
    "chunk_size_feed_forward": "not read by these models", "is_encoder_decoder": "not read by these models",
    "id2label": "classifiers only", "label2id": "classifiers only", "problem_type": "classifiers only"}
RANDOM = {"initializer_range": "random weights only"}
DECODER = {**RANDOM, "max_position_embeddings": "plain rope has no end", "use_cache": "speed only",
           "pad_token_id": "rows are padded by their lengths"}
IRRELEVANT = {
    "qwen2_5_vl": EVERYWHERE, "qwen3_vl": EVERYWHERE,
    "qwen2_5_vl.text_config": {**EVERYWHERE, **DECODER, "bos_token_id": "the chat template decides",
                               "eos_token_id": "read by read_eos_ids", "sliding_window": "use_sliding_window is false",
                               "max_window_layers": "use_sliding_window is false"},
    "qwen3_vl.text_config": {**EVERYWHERE, **DECODER},
    "qwen2_5_vl.vision_config": {**EVERYWHERE, **RANDOM, "tokens_per_second": "video only"},
    "qwen3_vl.vision_config": {**EVERYWHERE, **RANDOM}}


@pytest.mark.parametrize("where", HONOURED)
def test_every_field_of_transformers_is_in_one_table(where):
    """A field that a later transformers adds turns this red: find out what it does, and put it into a table."""
    family, _, section = where.partition(".")
    kind = CLASSES[family][0]
    fields = {field.name for field in dataclasses.fields(kind.sub_configs[section] if section else kind)}
    tables = [set(table[where]) for table in (HONOURED, REFUSED, IRRELEVANT)]
    known = set().union(*tables)
    assert len(known) == sum(map(len, tables)), f"{where}: a field is in two tables"
    assert fields <= known, (f"transformers has new fields in {where}: {sorted(fields - known)}. Does read_config "
                             "(support/weights.py) have to honour or refuse them? Then put each into a table of this file")


def cases(table: dict) -> list:
    return [pytest.param(where.partition(".")[0], {".".join([*where.split(".")[1:], name]): value}, id=f"{where}.{name}")
            for where, fields in table.items() for name, value in fields.items() if value is not None]


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers as transformers

@torch.no_grad()
def assert_same_logits(folder: Path, raw: dict) -> None:
    """Of two pictures and text, with the same random weights. The pictures span several ragged windows."""
    write(folder, raw)
    config, kind = CLASSES[raw["model_type"]]
    reference = kind(config.from_pretrained(folder)).eval()
    scramble(reference, seed=1)
    save_file({name: tensor.clone() for name, tensor in reference.state_dict().items()}, folder / "model.safetensors",
              {"format": "pt"})
    model = load_model(folder)
    c = model.config
    merge, generator = c.vision_spatial_merge_size, torch.Generator().manual_seed(0)
    grids = [(5 * merge, 3 * merge), (2 * merge, 4 * merge)]
    tokens = [1, 2, START, *[c.image_token_id] * 15, END, 3, START, *[c.image_token_id] * 8, END, 4, 5]
    patches = torch.randn(23 * merge ** 2, 3 * c.vision_temporal_patch_size * c.vision_patch_size ** 2, generator=generator)
    position = mrope_positions(tokens, grids, c.image_token_id, merge)[:, None]
    tokens = torch.tensor([tokens])
    expected = reference(input_ids=tokens, pixel_values=patches, image_grid_thw=torch.tensor([[1, *g] for g in grids]),
                         mm_token_type_ids=(tokens == c.image_token_id).int()).logits
    logits = model.lm_head(model.decode(model.embed(tokens, patches, grids), position, masked(torch.zeros_like(tokens))))
    assert expected.std() > 0.1 and logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


FLAT = {"text_config": "absent", **TEXT, "rope_theta": 1e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 0, 2]}}
EQUAL = [
    ("qwen2_5_vl", {}), ("qwen3_vl", {}), ("qwen2_5_vl", FLAT),
    ("qwen2_5_vl", {"hidden_size": 99, "rope_theta": 7.0, "rms_norm_eps": 0.1}),        # text_config counts
    ("qwen2_5_vl", {"text_config.rope_theta": 7.0}),        # rope_parameters counts
    ("qwen3_vl", {"hidden_size": 99, "rope_theta": 7.0}),
    *(("qwen2_5_vl", {f"vision_config.{name}": value}) for name, values in {
        "window_size": [8, 19, 23, 100], "fullatt_block_indexes": [[], [3, 0, 3], [1, 9], [0, 1, 2, 3]],
        "spatial_merge_size": [1], "temporal_patch_size": [1, 2], "tokens_per_second": [25], "in_chans": [3],
        "rope_parameters": [None, {}, {"rope_theta": 10000, "rope_type": "axial"}, {"rope_type": "default"}],
        "head_dim": [16], "num_attention_heads": [2], "model_type": ["qwen2_5_vl", "qwen2_5_vl_vision"]}.items()
      for value in values),
    ("qwen2_5_vl", {"vision_config.spatial_merge_size": 3, "vision_config.window_size": 31}),
    ("qwen2_5_vl", {"vision_config.hidden_size": 8}), ("qwen3_vl", {"vision_config.hidden_size": 8}),
    *(("qwen3_vl", {f"vision_config.{name}": value}) for name, values in {
        "deepstack_visual_indexes": [[], [2], [3, 0], [2, 0, 1], [1, 3, 0]], "num_position_embeddings": [1, 4, 100],
        "spatial_merge_size": [1, 3], "temporal_patch_size": [1], "patch_size": [2],
        "rope_theta": [1e4]}.items() for value in values),
    *(("qwen2_5_vl", {"text_config.rope_parameters.mrope_section": value})
      for value in ([4, 0, 0], [0, 0, 4], [0, 4, 0], [2, 1, 1])),
    *(("qwen3_vl", {"text_config.rope_scaling.mrope_section": value})
      for value in ([6, 0, 0], [0, 6, 0], [0, 0, 6], [1, 4, 1], [3, 1, 2])),
    *(("qwen3_vl", {f"text_config.{name}": value}) for name, values in {
        "rope_theta": ["absent", 5000000], "rope_parameters": [{"rope_theta": 3.0}],       # rope_scaling comes first
        "rope_scaling.mrope_interleaved": [True], "rope_scaling.rope_theta": [50.0], "rope_scaling.type": ["default"],
        "rope_scaling.partial_rotary_factor": [1.0], "layer_types": [["full_attention"] * 3], "sliding_window": [None],
        "num_key_value_heads": [1, 4], "attention_bias": [False], "attention_dropout": [0.0], "pad_token_id": [5]}.items()
      for value in values),
    ("qwen2_5_vl", {"text_config.rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}}),
    ("qwen2_5_vl", {"text_config.sliding_window": 4, "text_config.max_window_layers": 1}),
    ("qwen2_5_vl", {"text_config.head_dim": 8}), ("qwen2_5_vl", {"text_config.head_dim": None}),
    ("qwen2_5_vl", {"tie_word_embeddings": "absent", "text_config.tie_word_embeddings": True}),
    ("qwen3_vl", {"tie_word_embeddings": True, "text_config.tie_word_embeddings": True}),
    ("qwen3_vl", {"tie_word_embeddings": "absent"})]
WIDE = {"text_config.hidden_size": 64, "vision_config.out_hidden_size": 64}


@pytest.mark.parametrize("family, change", [*cases(HONOURED), *EQUAL])
def test_the_logits_are_those_of_transformers(tmp_path, family, change):
    if "text_config.hidden_size" in change:
        change = WIDE | ({"text_config.rope_parameters.mrope_section": [2, 2, 4]} if family == "qwen2_5_vl" else {})
    if family == "qwen2_5_vl" and "text_config.num_attention_heads" in change:
        change = change | {"text_config.rope_parameters.mrope_section": [2, 2, 4]}
    if "text_config.num_key_value_heads" in change and family == "qwen3_vl":
        change = change | {"text_config.num_attention_heads": 8}
    assert_same_logits(tmp_path, changed(family, change))


# ---------------------------------------------------------------------------------------------------------------------
# Refused by name

BOTH = {
    "hidden_act": ["gelu"], "use_sliding_window": [True], "rope_scaling": [{"rope_type": "yarn"}, {"factor": 2.0}, 3],
    "model_type": ["qwen2_vl", "qwen3_vl_moe", None, 3], "quantization_config": [{"quant_method": "awq"}],
    "per_layer_config": [{"0": {"hidden_size": 64}}], "tie_word_embeddings": ["false", 1],
    **{name: [None, "x", -1, True, VOCABULARY, 10 ** 12] for name in VISION_TOKENS},
    "image_token_id": [VIDEO, START], "text_config": ["x", [1], 3], "vision_config": ["x", []],
    **{f"text_config.{name}": [None, "absent", 0, -1, 1.5, "64", True, 10_000_000] for name in TEXT
       if name != "rms_norm_eps"},
    **{f"vision_config.{name}": [None, 0, -1, 1.5, "64", True, 10_000_000] for name in VISION},
    **{f"vision_config.{name}": [None, 0, 10_000_000] for name in ("spatial_merge_size", "temporal_patch_size")},
    "text_config.vocab_size": [10 ** 9, 10 ** 12], "text_config.intermediate_size": [10 ** 12],
    "text_config.num_key_value_heads": [3, 8], "text_config.rms_norm_eps": [None, 0, -1e-6, "1e-6", 1e300, True],
    "text_config.head_dim": [-2, 1.5, 10_000_000],
    "text_config.model_type": ["qwen2_5_vl_moe", "llama"], "text_config.hidden_act": ["gelu", None],
    "text_config.quantization_config": [{"bits": 4}], "text_config.per_layer_config": [{"0": {}}],
    "text_config.use_sliding_window": [True], "text_config.partial_rotary_factor": [0.5],
    "text_config.layer_types": [["full_attention"] * 2, ["sliding_attention"] * 3, []],
    "text_config.num_experts": [8], "text_config.num_experts_per_tok": [2], "text_config.moe_intermediate_size": [16],
    "text_config.attention_dropout": [0.1], "vision_config.model_type": ["siglip"],
    "vision_config.depth": [10_000_000], "vision_config.hidden_size": ["absent", 30, 31, 36, 1, 10 ** 9],
    "vision_config.num_heads": [3, 16], "vision_config.in_channels": [1, 4, None], "vision_config.in_chans": [4],
    "vision_config.out_hidden_size": ["absent", 64], "vision_config.rope_theta": [100.0, None],
    "vision_config.rope_parameters": [3, [1], {"rope_type": "yarn"}, {"rope_theta": 5.0}, {"factor": 2}],
    "vision_config.rope_scaling": [{"rope_theta": 5.0}], "vision_config.head_dim": [8],
    "vision_config.num_attention_heads": [4], "vision_config.num_hidden_layers": [3],
    "vision_config.patch_size": [[4, 4]], "vision_config.quantization_config": [{}]}
SECOND = {
    "text_config.head_dim": [7, 64], "text_config.num_attention_heads": [3, 16],
    "vision_config.hidden_act": ["gelu_pytorch_tanh", None], "vision_config.window_size": [None, 0, 7, 10_000_000],
    "vision_config.fullatt_block_indexes": [None, 3, [-1], [1.5], [10_000_000]],
    **{f"text_config.rope_parameters.{name}": values for name, values in {
        "rope_type": ["yarn", "linear", "dynamic", None], "type": ["yarn"], "mrope_interleaved": [True], "factor": [4.0],
        "mrope_section": [None, [2, 2], [1, 1, 1, 1], [2, 2, 2], [-1, 3, 2], 4, [10 ** 12, 1, 2], "124"],
        "rope_theta": [0, float("nan"), float("inf")], "partial_rotary_factor": [0.5], "attention_factor": [0.9],
        "full_attention": [{}]}.items()}}
THIRD = {
    "text_config.rope_theta": [None, 0, -1.0, "1e6", 10 ** 400], "attention_bias": [True],
    "text_config.head_dim": [0, None, 7, 13], "text_config.attention_bias": [True], "text_config.sliding_window": [4096],
    "text_config": [None, "absent"], "vision_config.hidden_act": ["silu", "gelu", None],
    "vision_config.num_position_embeddings": [None, 0, 50, 10 ** 10],
    "vision_config.deepstack_visual_indexes": [None, 3, [-1], [0, 0, 1], [0, 4], [0, 1, 2, 3], [27, 0]],
    **{f"text_config.rope_scaling.{name}": values for name, values in {
        "rope_type": ["yarn", "mrope", None], "type": ["mrope"], "mrope_interleaved": [False], "factor": [4.0],
        "mrope_section": [[2, 2], [2, 2, 3], [4, 1, 2]], "original_max_position_embeddings": [32768]}.items()}}


def refusals() -> list:
    return [(family, {name: value}) for family, more in (("qwen2_5_vl", SECOND), ("qwen3_vl", THIRD))
            for table in (BOTH, more) for name, values in table.items() for value in values]


@pytest.mark.parametrize("family, change", [
    *cases(REFUSED), *refusals(),
    *(("qwen3_vl", {"text_config.rope_scaling.mrope_section": [2, 1, 1], "text_config.head_dim": d}) for d in (None, 0)),
    ("qwen2_5_vl", {"text_config.tie_word_embeddings": True}),
    *((family, {"text_config.tie_word_embeddings": not tied, "tie_word_embeddings": tied})
      for family in BASE for tied in (True, False)),
    *(("qwen2_5_vl", {**{n: v for n, v in FLAT.items() if n != name}, name: value}) for name, value in {
        "hidden_act": "gelu", "use_sliding_window": True, "head_dim": 64, "hidden_size": None, "num_attention_heads": 0,
        "rope_scaling": {"type": "yarn", "mrope_section": [1, 1, 2]}, "num_hidden_layers": 10_000_000,
        "quantization_config": {}}.items())])
def test_a_value_that_is_not_computed_is_refused_by_name(tmp_path, family, change):
    """With the file, the field and what is supported; at once, whatever the size it asks for."""
    path = write(tmp_path, changed(family, change))
    start = time.monotonic()
    with pytest.raises(Mistake) as error:
        random_model(tmp_path)
    said = str(error.value)
    field = list(change)[-1].split(".")[-1]
    assert said.startswith(f"{path}: ") and time.monotonic() - start < 1
    assert field in said.removeprefix(str(path)), said
    assert "\n" not in said and len(said) < len(str(path)) + 400


@pytest.mark.parametrize("ids", [VOCABULARY, [EOS, VOCABULARY], [EOS, -1], 10 ** 30, IMAGE, [EOS, END]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_token_that_cannot_end_a_response_is_refused(tmp_path, name, ids):
    write(tmp_path, changed("qwen3_vl", {"eos_token_id": ids}))
    (tmp_path / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": ids} if name == "generation_config.json" else {}))
    with pytest.raises(Mistake, match=f"{name}: eos_token_id"):
        random_model(tmp_path)


# As they stand on the hub: Qwen2.5-VL-7B (text at the top), the same saved by transformers 4.54 (at both), Qwen3-VL-4B.
FLAT_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28,
    "model_type": "qwen2_5_vl", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064, "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}}
PUBLISHED = {
    "7B": FLAT_7B,
    "7B, saved": {
        **FLAT_7B, "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "vision_config": {**FLAT_7B["vision_config"], "in_channels": 3, "model_type": "qwen2_5_vl"}, "text_config": {
            **{name: value for name, value in FLAT_7B.items() if name != "vision_config"}, "image_token_id": None,
            "model_type": "qwen2_5_vl_text", "layer_types": ["full_attention"] * 28, "sliding_window": None,
            "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}}},
    "4B": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
            "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
            "intermediate_size": 9728, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
            "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936},
        "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", "video_token_id": 151656, "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
            "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl",
            "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2},
        "vision_end_token_id": 151653, "vision_start_token_id": 151652}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_read_as_transformers_reads_them(tmp_path, name):
    raw = PUBLISHED[name]
    ours = Config.from_json(write(tmp_path, raw))
    theirs = CLASSES[raw["model_type"]][0].from_pretrained(tmp_path)
    again = Config.from_json(write(tmp_path, json.loads(theirs.to_json_string(use_diff=False))))
    assert ours == again and ours.num_attention_heads in (28, 32)       # as this transformers saves it
    for field in dataclasses.fields(ours):
        name = field.name
        part = theirs if name in TOP else theirs.vision_config if name.startswith("vision_") else theirs.text_config
        other = getattr(part, name.removeprefix("vision_") if part is theirs.vision_config else name, None)
        if other is not None:
            assert getattr(ours, name) == (tuple(other) if isinstance(other, list) else other), name


@pytest.mark.parametrize("family", BASE)
def test_the_largest_published_sizes_are_read(tmp_path, family):
    """Those of the 72B."""
    sizes = {"text_config.hidden_size": 8192, "vision_config.out_hidden_size": 8192, "text_config.num_hidden_layers": 80,
             "text_config.num_attention_heads": 64, "text_config.num_key_value_heads": 8,
             "text_config.intermediate_size": 29568, "text_config.vocab_size": 152064, "vision_config.depth": 32}
    rope = {"qwen2_5_vl": {"text_config.rope_parameters.mrope_section": [16, 24, 24]}, "qwen3_vl": {}}
    config = Config.from_json(write(tmp_path, changed(family, sizes | rope[family])))
    assert (config.num_hidden_layers, config.vocab_size, config.vision_depth) == (80, 152064, 32)

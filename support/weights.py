"""Model folders in the Hugging Face layout, hub ids, weights as safetensors. Nothing is ever unpickled."""
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from support import lora
from support.checkpoints import newest_checkpoint
from support.mistakes import Mistake

# What a model folder holds beside config.json and the weights; copied along when a model is saved.
COMPANIONS = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
              "*processor_config.json", "generation_config.json", "chat_template*", "LICENSE*")

REPOSITORY = Path(__file__).resolve().parent.parent
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def local_folder(name) -> Path:
    """The folder of a model: a folder, also one of this repository wherever the program is started (assets/tiny); a run
    of train.py, whose newest sound checkpoint it then is; else a hub id, downloaded (weights as safetensors only)."""
    folder = Path(name)
    if not folder.is_dir() and (REPOSITORY / name).is_dir():
        folder = REPOSITORY / name
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists():
        folder = newest_checkpoint(folder)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise Mistake(f"--model {name}: {folder} has no config.json, so it is no model folder")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise Mistake(f"--model {name}: there is no such folder, and it is no hub id of the form OWNER/NAME")
    from huggingface_hub import snapshot_download
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        raise Mistake(f"--model {name}: there is no such folder, and the hub does not give it "
                      f"({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})") from error


def read_config(path: Path) -> tuple[str, dict]:
    """Family ("qwen2_5_vl" or "qwen3_vl"), and the fields of its config.json that change the computation, those of the
    vision tower as vision_NAME. ValueError: what is not supported. Reads both layouts in use: text fields at the top
    level (the hub's) or under text_config (transformers 5)."""
    try:
        raw = json.loads(Path(path).read_text())
    except ValueError as error:
        raise Mistake(f"{path} is not JSON: {error}") from None
    family = raw.get("model_type")
    if family not in ("qwen2_5_vl", "qwen3_vl"):
        raise Mistake(f"{path}: model_type is {family!r}; this code runs 'qwen2_5_vl' and the dense models of "
                      "'qwen3_vl'")
    third = family == "qwen3_vl"
    text = {**raw, **raw.get("text_config", {})}
    vision = raw.get("vision_config", {})
    if text.get("use_sliding_window"):
        raise Mistake(f"{path}: use_sliding_window is true; sliding-window attention is not supported")
    for where, section, only in (("text", text, "silu"), ("vision", vision, "gelu_pytorch_tanh" if third else "silu")):
        if section.get("hidden_act", only) != only:
            raise Mistake(f"{path}: {where} hidden_act is {section['hidden_act']!r}; only {only!r} is supported")
    if third and text.get("attention_bias"):
        raise Mistake(f"{path}: attention_bias is true; products with biases are not supported")
    if not third and (width := text.get("hidden_size")) and (heads := text.get("num_attention_heads")):
        if width % heads or text.get("head_dim") not in (None, width // heads):
            raise Mistake(f"{path}: hidden_size {width}, num_attention_heads {heads} and head_dim "
                          f"{text.get('head_dim')} do not fit; head_dim must be hidden_size / heads")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if third and rope.get("mrope_interleaved") is False:
        raise Mistake(f"{path}: mrope_interleaved is false; only interleaved M-RoPE is supported")
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise Mistake(f"{path}: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported")

    def field(source: dict, name: str, default=None):
        value = source.get(name, default)
        if value is None:
            raise Mistake(f"{path}: the field {name!r} is missing")
        return value

    numbers = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
               "intermediate_size", "vocab_size")
    defaults = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112,
                "fullatt_block_indexes": (7, 15, 23, 31), "num_heads": 16, "intermediate_size": 3420, "depth": 32}
    own = ["window_size", "fullatt_block_indexes"]
    if third:
        defaults |= {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24),
                     "intermediate_size": 4304, "depth": 27}
        own = ["num_position_embeddings", "deepstack_visual_indexes"]
    visions = ("depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size",
               "spatial_merge_size", *own)
    vision_fields = {f"vision_{name}": field(vision, name, defaults.get(name)) for name in visions}
    for name, value in vision_fields.items():
        vision_fields[name] = tuple(value) if isinstance(value, list) else value
    pixels = vision_fields["vision_patch_size"] * vision_fields["vision_spatial_merge_size"]   # of an image token
    if not third and vision_fields["vision_window_size"] < pixels:
        raise Mistake(f"{path}: a window_size of {vision_fields['vision_window_size']} pixels is smaller than "
                      f"an image token of {pixels}×{pixels}")
    table = vision_fields.get("vision_num_position_embeddings", 1)
    if round(table ** 0.5) ** 2 != table:
        raise Mistake(f"{path}: num_position_embeddings is {table}, which is no square number")
    if third and vision.get("out_hidden_size", text.get("hidden_size")) != text.get("hidden_size"):
        raise Mistake(f"{path}: the tower's out_hidden_size is {vision['out_hidden_size']}, hidden_size "
                      f"{text.get('hidden_size')}; they must be equal")
    by_width = field(text, "hidden_size") // field(text, "num_attention_heads")
    return family, {
        "head_dim": text.get("head_dim") or (128 if third else by_width),
        **{name: field(text, name) for name in numbers},
        "rms_norm_eps": field(text, "rms_norm_eps", 1e-6 if third else 1e-5),    # where it is missing, as transformers
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 5e5 if third else 1e6)),
        "mrope_section": tuple(rope.get("mrope_section", (24, 20, 20) if third else (16, 24, 24))),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        **{name: field(raw, name) for name in VISION_TOKENS},  # some savers also put nulls under text_config
        **vision_fields}


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise Mistake(f"{folder}: neither generation_config.json nor config.json names an eos_token_id")


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Mistake(f"{path} is damaged or no safetensors file ({error})") from None


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Reads *.safetensors (single or sharded) tensor by tensor. Both generations of names are understood:
    visual.*, model.* (the hub's) and model.visual.*, model.language_model.* (newer `transformers` saves). Of an adapter
    (support/lora.py) the base is read, and the adapter merged into it."""
    if (folder / lora.CONFIG).exists():
        adapter = lora.read_adapter(folder)
        load_weights(model, local_folder(adapter.of), dtype)
        return lora.merge_adapter(model, adapter)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    state, head = {}, None
    for file in files:
        if not (folder / file).exists():
            raise Mistake(f"{folder / file} does not exist; weights are read from safetensors only")
        with open_safetensors(folder / file) as weights:
            for stored in weights.keys():
                name = stored.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
                if name not in wanted:
                    if name == "lm_head.weight":  # tied: a copy of the embedding that some savers write
                        head = weights.get_tensor(stored).to(dtype)
                        continue
                    raise Mistake(f"{folder / file}: unknown tensor {stored!r}")
                tensor = weights.get_tensor(stored)
                if tuple(tensor.shape) != wanted[name]:
                    raise Mistake(f"{folder / file}: {stored!r} has shape {tuple(tensor.shape)}, "
                                     f"config.json asks for {wanted[name]}")
                state[name] = tensor.to(dtype)
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise Mistake(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise Mistake(f"{folder}: config.json says tie_word_embeddings, but the stored lm_head.weight differs from "
                      "model.embed_tokens.weight; set it to false, or remove lm_head.weight from the file")
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def save_folder(model: nn.Module, folder, max_shard_size: str) -> None:
    """Writes a complete folder: config, safetensors (sharded above max_shard_size), tokenizer, processor files. Of a
    model with adapters these, in the place of the weights."""
    from huggingface_hub import save_torch_state_dict
    if model.folder is None:
        raise Mistake("this model was not loaded from a folder, so its config.json and tokenizer are unknown")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if lora.adapters(model):
        lora.save_adapter(model, folder)
    else:
        def stored(name: str) -> str:
            return next((there + name.removeprefix(here) for here, there in model.stored_as.items()
                         if name.startswith(here)), name)
        state = {stored(name): tensor.contiguous() for name, tensor in model.state_dict().items()
                 if not (name == "lm_head.weight" and model.config.tie_word_embeddings)}
        save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    raw = json.loads((model.folder / "config.json").read_text())
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if folder.resolve() != model.folder.resolve():
        for pattern in COMPANIONS:
            for path in model.folder.glob(pattern):
                shutil.copy(path, folder / path.name)

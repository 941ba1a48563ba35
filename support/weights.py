"""Model folders in the Hugging Face layout, hub ids, weights as safetensors. Nothing is ever unpickled."""
import hashlib
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from support import lora
from support.checkpoints import newest_checkpoint
from support.files import as_json, check_regular, digest, read_record, writing
from support.mistakes import Mistake
from support.runs import did_you_mean

# What a model folder holds beside config.json and the weights; copied along when a model is saved.
COMPANIONS = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
              "*processor_config.json", "generation_config.json", "chat_template*", "LICENSE*")

REPOSITORY = Path(__file__).resolve().parent.parent
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def local_folder(name, what: str = "--model") -> Path:
    """The folder of a model: a folder, also one of this repository wherever the program is started (assets/tiny); a run
    of train.py, whose newest sound checkpoint it then is; else a hub id, downloaded (weights as safetensors only).
    what: begins the sentence if there is none."""
    folder = Path(name)
    if not folder.is_dir() and (REPOSITORY / name).is_dir():
        folder = REPOSITORY / name
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists():
        folder = newest_checkpoint(folder)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise Mistake(f"{what} {name}: {folder} has no config.json, so it is no model folder")
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".txt", ".jinja"):
                check_regular(path)
        return folder
    if folder.is_file():
        raise Mistake(f"{what} {name}: this is a file; give the folder of the model, which holds its config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise Mistake(f"{what} {name}: there is no such folder, and it is no hub id of the form OWNER/NAME"
                      + did_you_mean(name))
    from huggingface_hub import snapshot_download
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        raise Mistake(f"{what} {name}: there is no such folder, and the hub does not give it "
                      f"({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})") from error


def read_config(path: Path) -> tuple[str, dict]:
    """Family ("qwen2_5_vl" or "qwen3_vl"), and the fields of its config.json that change the computation, those of the
    vision tower as vision_NAME. ValueError: what is not supported. Reads both layouts in use: text fields at the top
    level (the hub's) or under text_config (transformers 5)."""
    raw = read_record(path)
    family = raw.get("model_type")
    if family not in ("qwen2_5_vl", "qwen3_vl"):
        raise Mistake(f"{path}: model_type is {family!r}; this code runs 'qwen2_5_vl' and the dense models of "
                      "'qwen3_vl'")
    third = family == "qwen3_vl"

    def section(source: dict, name: str) -> dict:
        value = source.get(name) or {}
        if not isinstance(value, dict):
            raise Mistake(f"{path}: {name} is {value!r}, not an object")
        return value

    text, vision = {**raw, **section(raw, "text_config")}, section(raw, "vision_config")
    if text.get("use_sliding_window"):
        raise Mistake(f"{path}: use_sliding_window is true; sliding-window attention is not supported")
    for where, part, only in (("text", text, "silu"), ("vision", vision, "gelu_pytorch_tanh" if third else "silu")):
        if part.get("hidden_act", only) != only:
            raise Mistake(f"{path}: {where} hidden_act is {part['hidden_act']!r}; only {only!r} is supported")
    if third and text.get("attention_bias"):
        raise Mistake(f"{path}: attention_bias is true; products with biases are not supported")
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
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
    fields = {name: field(text, name) for name in numbers} | {
        "head_dim": text.get("head_dim") or 0,      # 0: follows from the others, below
        "rms_norm_eps": field(text, "rms_norm_eps", 1e-6 if third else 1e-5),    # where it is missing, as transformers
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 5e5 if third else 1e6)),
        "mrope_section": rope.get("mrope_section", (24, 20, 20) if third else (16, 24, 24)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        **{name: field(raw, name) for name in VISION_TOKENS},  # some savers also put nulls under text_config
        **{f"vision_{name}": field(vision, name, defaults.get(name)) for name in visions}}
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    check_fields(path, fields)

    by_width = fields["hidden_size"] // fields["num_attention_heads"]
    fields["head_dim"] = fields["head_dim"] or (128 if third else by_width)
    if third and vision.get("out_hidden_size", fields["hidden_size"]) != fields["hidden_size"]:
        raise Mistake(f"{path}: the tower's out_hidden_size is {vision['out_hidden_size']}, hidden_size "
                      f"{fields['hidden_size']}; they must be equal")
    check_fit(path, fields, third)
    return family, fields


def check_fields(path: Path, fields: dict) -> None:
    """Mistake: a field of config.json is not the kind of number that it must be."""
    def whole(value, least: int) -> bool:
        return type(value) is int and value >= least

    for name, value in fields.items():
        if name in ("rms_norm_eps", "rope_theta"):
            good, wanted = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
        elif name in ("mrope_section", "vision_fullatt_block_indexes", "vision_deepstack_visual_indexes"):
            good, wanted = isinstance(value, tuple) and all(whole(v, 0) for v in value), "a list of whole numbers"
        elif name == "head_dim" or name in VISION_TOKENS:
            good, wanted = whole(value, 0), "a whole number"
        else:
            good, wanted = name == "tie_word_embeddings" or whole(value, 1), "a whole number above 0"
        if not good:
            where = name if name in VISION_TOKENS else name.replace("vision_", "vision_config.", 1)
            raise Mistake(f"{path}: {where} is {str(value)[:100]!r}; it must be {wanted}")


def check_fit(path: Path, fields: dict, third: bool) -> None:
    """Mistake: fields of config.json that do not fit each other. third: of Qwen3-VL."""
    heads = fields["num_attention_heads"]
    if not third and fields["head_dim"] * heads != fields["hidden_size"]:
        raise Mistake(f"{path}: hidden_size {fields['hidden_size']}, num_attention_heads {heads} and head_dim "
                      f"{fields['head_dim']} do not fit; head_dim must be hidden_size / heads")
    if heads % fields["num_key_value_heads"]:
        raise Mistake(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads "
                      f"{fields['num_key_value_heads']}")
    if sum(fields["mrope_section"]) != fields["head_dim"] // 2 or len(fields["mrope_section"]) != 3:
        raise Mistake(f"{path}: mrope_section {fields['mrope_section']} must have three parts that add up to half the "
                      f"head size, {fields['head_dim'] // 2}")
    if fields["vision_hidden_size"] % fields["vision_num_heads"]:
        raise Mistake(f"{path}: the tower's hidden_size {fields['vision_hidden_size']} is no multiple of its num_heads "
                      f"{fields['vision_num_heads']}")
    pixels = fields["vision_patch_size"] * fields["vision_spatial_merge_size"]      # of an image token
    if not third and fields["vision_window_size"] < pixels:
        raise Mistake(f"{path}: a window_size of {fields['vision_window_size']} pixels is smaller than "
                      f"an image token of {pixels}×{pixels}")
    table = fields.get("vision_num_position_embeddings", 1)
    if round(table ** 0.5) ** 2 != table:
        raise Mistake(f"{path}: num_position_embeddings is {table}, which is no square number")


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = read_record(path).get("eos_token_id") if path.exists() else None
        if ids is not None:
            ids = tuple(ids) if isinstance(ids, list) else (ids,)
            if not ids or not all(type(token) is int for token in ids):
                raise Mistake(f"{path}: eos_token_id is {str(ids)[:100]}; it must be one or more token ids")
            return ids
    raise Mistake(f"{folder}: neither generation_config.json nor config.json names an eos_token_id")


def open_safetensors(path: Path):
    if not path.exists():
        raise Mistake(f"{path} does not exist; weights are read from safetensors only")
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Mistake(f"{path} is damaged or no safetensors file ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: model.safetensors, or those that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    files = read_record(index, weight_map=dict)["weight_map"].values()
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise Mistake(f"{index}: its weight_map must say which file of the same folder holds a tensor")
    return [folder / file for file in sorted(set(files))]


def model_digest(folder: Path) -> str:
    """SHA-256 of a model's config and weights: whether it is the one that was trained. Of an adapter: of its config and
    matrices, which know their base (`base_of`)."""
    names = ("config.json", lora.CONFIG, lora.WEIGHTS, "model*.safetensors")
    files = sorted(path for name in names for path in folder.glob(name))
    return hashlib.sha256("".join(f"{path.name} {digest(path)}\n" for path in files).encode()).hexdigest()


def base_of(adapter: lora.Adapter) -> Path:
    """The folder of an adapter's base. Raises Mistake if it is not there, or not the model that the adapter was trained
    on, which an adapter of other programs does not say."""
    folder = local_folder(adapter.of, f"{adapter.folder} is an adapter of")
    if adapter.base not in ("", model_digest(folder)):
        raise Mistake(f"{adapter.folder}: the base of the adapter, {folder}, is not the model that it was trained on: "
                      "its weights or its config.json have been replaced. Bring them back")
    return folder


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Reads *.safetensors (single or sharded) tensor by tensor. Both generations of names are understood:
    visual.*, model.* (the hub's) and model.visual.*, model.language_model.* (newer `transformers` saves). Of an adapter
    (support/lora.py) the base is read, and the adapter merged into it."""
    if (folder / lora.CONFIG).exists():
        adapter = lora.read_adapter(folder)
        load_weights(model, base_of(adapter), dtype)
        return lora.merge_adapter(model, adapter)
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    state, head = {}, None
    for file in weight_files(folder):
        with open_safetensors(file) as weights:
            for stored in weights.keys():
                name = stored.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
                if name not in wanted:
                    if name == "lm_head.weight":  # tied: a copy of the embedding that some savers write
                        head = weights.get_tensor(stored).to(dtype)
                        continue
                    raise Mistake(f"{file}: unknown tensor {stored!r}")
                tensor = weights.get_tensor(stored)
                if tuple(tensor.shape) != wanted[name]:
                    raise Mistake(f"{file}: {stored!r} has shape {tuple(tensor.shape)}, config.json asks for "
                                  f"{wanted[name]}")
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
        with writing(folder):
            save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    raw = read_record(model.folder / "config.json")
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(as_json(raw, 2))
    if folder.resolve() != model.folder.resolve():
        for pattern in COMPANIONS:
            for path in model.folder.glob(pattern):
                if path.is_file():
                    shutil.copy(path, folder / path.name)

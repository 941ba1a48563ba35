"""Model folders in the Hugging Face layout, hub ids, weights as safetensors. Nothing is ever
unpickled."""
import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from support import lora
from support.checkpoints import check_checkpoint, newest_checkpoint
from support.files import as_json, check_regular, digest, read_record, writing
from support.folders import set_pixels
from support.mistakes import Mistake
from support.runs import did_you_mean

# What a model folder holds beside config.json and the weights; copied along when a model is saved.
COMPANIONS = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
              "*processor_config.json", "generation_config.json", "chat_template*", "LICENSE*")

REPOSITORY = Path(__file__).resolve().parent.parent
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# The largest numbers that config.json may hold, and 2^16 in other fields: far above those of the
# published models (80 layers, 152,064 tokens). More would take hours or all memory before the
# weights are compared with them.
MOST = {"num_hidden_layers": 512, "vision_depth": 512, "vocab_size": 2 ** 20, "intermediate_size": 2 ** 18,
        "vision_patch_size": 64, "vision_temporal_patch_size": 8, "vision_spatial_merge_size": 8,
        **dict.fromkeys(VISION_TOKENS, 2 ** 20)}


def local_folder(name, what: str = "--model") -> Path:
    """Returns the folder of a model: a folder, also one of this repository wherever the program is
    started (assets/tiny); a run of train.py, whose newest sound checkpoint it then is; else a hub
    id, downloaded (weights as safetensors only). what: begins the sentence if there is none."""
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
        check_checkpoint(folder)
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


def shown(value) -> str:
    """Returns a value as it stands in a JSON file, cut to 100 characters."""
    return json.dumps(value)[:100]


class Section:
    """An object of config.json; `name` stands before its fields in messages: "", "vision_config."
    …"""
    def __init__(self, path: Path, name: str, fields: dict):
        self.path, self.name, self.fields = path, name, fields

    def inner(self, *names: str) -> "Section":
        """Returns the object under the first of the names that holds something, or an empty one."""
        name = next((name for name in names if self.fields.get(name)), names[-1])
        value = self.fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise Mistake(f"{self.path}: {self.name}{name} is {shown(value)}, not an object")
        return Section(self.path, f"{self.name}{name}.", value or {})

    def field(self, name: str, default=None):
        value = self.fields.get(name, default)
        if value is None:
            raise Mistake(f"{self.path}: the field {self.name}{name} is missing or null")
        return value

    def only(self, /, **supported: tuple) -> None:
        """Raises Mistake if a field has none of the values supported, the first of which a missing
        one means."""
        for name, values in supported.items():
            if self.fields.get(name, values[0]) not in values:
                raise Mistake(f"{self.path}: {self.name}{name} is {shown(self.fields[name])}; only "
                              f"{shown(values[0])} is supported")


def read_config(path: Path) -> tuple[str, dict]:
    """Returns the family ("qwen2_5_vl" or "qwen3_vl") and the fields of config.json that the model
    is built from, those of the vision tower as vision_NAME. Reads what transformers reads: text
    fields under text_config or, in Qwen2.5-VL's older layout, at the top level. Raises Mistake if a
    field that changes the numbers has a value that this code does not compute; tests/test_config.py
    goes through the fields one by one."""
    top = Section(path, "", read_record(path))
    family = top.fields.get("model_type")
    if family not in ("qwen2_5_vl", "qwen3_vl"):
        raise Mistake(f"{path}: model_type is {shown(family)}; this code runs 'qwen2_5_vl' and the dense models of "
                      "'qwen3_vl'")
    qwen3 = family == "qwen3_vl"
    text = top.inner("text_config") if qwen3 or top.fields.get("text_config") is not None else top
    vision = top.inner("vision_config")
    top_rope, rope, vision_rope = (part.inner("rope_scaling", "rope_parameters") for part in (top, text, vision))

    for part in (top, text, vision):
        part.only(quantization_config=(None,), per_layer_config=(None, {}))
    for part in (top, text):        # transformers does not look at the top where there is a text_config; others may
        part.only(hidden_act=("silu",), use_sliding_window=(False, None), attention_dropout=(0, None),
                  partial_rotary_factor=(1, None), num_experts=(0, None), num_experts_per_tok=(0, None),
                  moe_intermediate_size=(0, None))
        if qwen3:
            part.only(attention_bias=(False, None), sliding_window=(None,))
    text.only(model_type=(f"{family}_text", family))
    vision.only(model_type=(f"{family}_vision", family), hidden_act=("gelu_pytorch_tanh" if qwen3 else "silu",),
                in_channels=(3,), in_chans=(3,), rope_theta=(1e4,))
    kinds = ("default",) if qwen3 else ("default", "mrope")
    for part in (top_rope, rope):
        part.only(rope_type=kinds, type=kinds, mrope_interleaved=(qwen3, None))
    vision_rope.only(rope_type=("axial", "default"), type=("axial", "default"), rope_theta=(1e4,))
    known = {"rope_type", "type", "mrope_interleaved", "mrope_section", "rope_theta"}
    for part in (top_rope, rope, vision_rope):
        if more := {name: value for name, value in part.fields.items() if name not in known and value not in (1, None)}:
            raise Mistake(f"{path}: {part.name[:-1]} holds {shown(more)}, which is not supported")
    ties = [part.fields.get("tie_word_embeddings") for part in (top, text)]
    ties = [tie for tie in ties if tie is not None]
    if any(tie is not True for tie in ties) and any(tie is not False for tie in ties):
        raise Mistake(f"{path}: tie_word_embeddings is {' and under text_config '.join(map(shown, ties))}; it must be "
                      "true or false, and the same in both places")

    numbers = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
               "intermediate_size", "vocab_size")
    defaults = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112,
                "fullatt_block_indexes": (7, 15, 23, 31), "num_heads": 16, "intermediate_size": 3420, "depth": 32,
                "out_hidden_size": 3584}
    own = ["window_size", "fullatt_block_indexes"]
    if qwen3:
        defaults |= {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24),
                     "intermediate_size": 4304, "depth": 27}
        own = ["num_position_embeddings", "deepstack_visual_indexes"]
    visions = ("depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size",
               "spatial_merge_size", "out_hidden_size", *own)
    fields = {name: text.field(name) for name in numbers} | {
        "rms_norm_eps": text.field("rms_norm_eps", 1e-6 if qwen3 else 1e-5),    # missing ones are as in transformers
        "rope_theta": rope.fields.get("rope_theta", text.fields.get("rope_theta", 5e5 if qwen3 else 1e6)),
        "mrope_section": rope.fields.get("mrope_section", (24, 20, 20) if qwen3 else (16, 24, 24)),
        "tie_word_embeddings": any(ties),
        **{name: top.field(name) for name in VISION_TOKENS},  # some savers also put nulls under text_config
        **{f"vision_{name}": vision.field(name, defaults.get(name)) for name in visions}}
    if qwen3 or text.fields.get("head_dim"):
        fields["head_dim"] = text.field("head_dim", 128)
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    check_fields(path, fields)

    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    text.only(layer_types=(["full_attention"] * fields["num_hidden_layers"], None))
    depth, width, heads = (fields[f"vision_{name}"] for name in ("depth", "hidden_size", "num_heads"))
    vision.only(head_dim=(width // heads, None), num_attention_heads=(heads, None), num_hidden_layers=(depth, None))
    check_fit(path, fields, qwen3)
    del fields["vision_out_hidden_size"]        # the decoder's hidden_size
    return family, fields


def check_fields(path: Path, fields: dict) -> None:
    """Raises Mistake if a field of config.json is not the kind of number that it must be, or is
    absurdly large."""
    def whole(value, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    for name, value in fields.items():
        most = MOST.get(name, 2 ** 16)
        if name in ("rms_norm_eps", "rope_theta"):
            good, wanted = type(value) in (int, float) and 1e-30 < value < 1e30, "a number from 1e-30 to 1e30"
        elif name in ("mrope_section", "vision_fullatt_block_indexes", "vision_deepstack_visual_indexes"):
            good = isinstance(value, tuple) and len(value) <= most and all(whole(v, 0, most) for v in value)
            wanted = f"a list of whole numbers from 0 to {most:,}"
        else:
            least = 0 if name in VISION_TOKENS else 1
            good = name == "tie_word_embeddings" or whole(value, least, most)
            wanted = f"a whole number from {least} to {most:,}"
        if not good:
            where = name if name in VISION_TOKENS else name.replace("vision_", "vision_config.", 1)
            raise Mistake(f"{path}: {where} is {shown(value)}; it must be {wanted}")


def check_fit(path: Path, fields: dict, qwen3: bool) -> None:
    """Raises Mistake if fields of config.json do not fit each other. qwen3: those of Qwen3-VL."""
    heads, kv_heads, width, d = (fields[name] for name in (
        "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"))
    side, depth, section = (fields[name] for name in ("vision_patch_size", "vision_depth", "mrope_section"))
    side *= fields["vision_spatial_merge_size"]      # of an image token, in pixels
    table, stack = fields.get("vision_num_position_embeddings", 1), fields.get("vision_deepstack_visual_indexes", ())
    ids = [fields[name] for name in VISION_TOKENS]
    for wrong, sentence in (
            (not qwen3 and d * heads != width, f"hidden_size {width}, num_attention_heads {heads} and head_dim {d} do "
             "not fit; head_dim must be hidden_size / heads"),
            (heads % kv_heads, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"),
            (d % 2 or sum(section) != d // 2 or len(section) != 3, f"mrope_section {shown(section)} must have three "
             f"parts that add up to half of {d}, which must be even (head_dim, or hidden_size / num_attention_heads)"),
            (fields["vision_hidden_size"] % (4 * fields["vision_num_heads"]), "vision_config.hidden_size "
             f"{fields['vision_hidden_size']} is no multiple of 4 times num_heads {fields['vision_num_heads']}, as the "
             "rotary embedding needs"),
            (not qwen3 and fields.get("vision_window_size", 0) < side, "a window_size of "
             f"{fields.get('vision_window_size')} pixels is smaller than an image token of {side}×{side}"),
            (round(table ** 0.5) ** 2 != table, f"num_position_embeddings is {table}, which is no square number"),
            (len(set(stack)) < len(stack) or max(stack, default=0) >= depth or len(stack) > fields["num_hidden_layers"],
             f"vision_config.deepstack_visual_indexes is {shown(stack)}; it must name different blocks from 0 to "
             f"{depth - 1}, no more than num_hidden_layers {fields['num_hidden_layers']}"),
            (fields["vision_out_hidden_size"] != width, "vision_config.out_hidden_size is "
             f"{fields['vision_out_hidden_size']} (3584 if it is missing), hidden_size {width}; they must be equal"),
            (len(set(ids)) < len(ids) or max(ids) >= fields["vocab_size"], ", ".join(
                f"{name} {token}" for name, token in zip(VISION_TOKENS, ids))
             + f" must be different and below vocab_size {fields['vocab_size']}")):
        if wrong:
            raise Mistake(f"{path}: {sentence}")


def read_eos_ids(folder: Path, config) -> tuple[int, ...]:
    """Returns every token that ends a response. config: the model's, for its vocabulary."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = read_record(path).get("eos_token_id") if path.exists() else None
        if ids is not None:
            ids = tuple(ids) if isinstance(ids, list) else (ids,)
            if not ids or not all(type(token) is int and 0 <= token < config.vocab_size for token in ids):
                raise Mistake(f"{path}: eos_token_id is {str(ids)[:100]}; it must be one or more token ids below "
                              f"vocab_size {config.vocab_size}")
            if banned := [name for name in VISION_TOKENS if getattr(config, name) in ids]:
                raise Mistake(f"{path}: eos_token_id {str(ids)[:100]} holds the {banned[0]} of config.json, which is "
                              "never sampled")
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
    """Returns the files that hold the weights: model.safetensors, or those that
    model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    files = read_record(index, weight_map=dict)["weight_map"].values()
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise Mistake(f"{index}: its weight_map must say which file of the same folder holds a tensor")
    return [folder / file for file in sorted(set(files))]


def model_digest(folder: Path) -> str:
    """Returns the SHA-256 of a model's config and weights: whether it is the one that was trained.
    Of an adapter: of its config and matrices, which know their base (`base_of`)."""
    names = ("config.json", lora.CONFIG, lora.WEIGHTS, "model*.safetensors")
    files = sorted(path for name in names for path in folder.glob(name))
    return hashlib.sha256("".join(f"{path.name} {digest(path)}\n" for path in files).encode()).hexdigest()


def base_of(adapter: lora.Adapter) -> Path:
    """Returns the folder of an adapter's base. Raises Mistake if it is not there, or not the model
    that the adapter was trained on, which an adapter of other programs does not say."""
    folder = local_folder(adapter.of, f"{adapter.folder} is an adapter of")
    if adapter.base not in ("", model_digest(folder)):
        raise Mistake(f"{adapter.folder}: the base of the adapter, {folder}, is not the model that it was trained on: "
                      "its weights or its config.json have been replaced. Bring them back")
    return folder


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Reads *.safetensors (single or sharded) tensor by tensor. Both generations of names are
    understood: visual.*, model.* (the hub's) and model.visual.*, model.language_model.* (newer
    `transformers` saves). Of an adapter (support/lora.py) the base is read, and the adapter merged
    into it."""
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
    """Writes a complete folder: config, safetensors (sharded above max_shard_size), tokenizer,
    processor files. For a model with adapters it writes these instead of the weights."""
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
        def alone(tensor: torch.Tensor) -> torch.Tensor:
            """Returns the tensor, or a copy if its memory holds others too (support/joined.py)."""
            shares = tensor.untyped_storage().nbytes() > tensor.nbytes
            return tensor.to("cpu", copy=True) if shares else tensor.contiguous()
        state = {stored(name): alone(tensor) for name, tensor in model.state_dict().items()
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
    if model.pixels:
        set_pixels(folder, model.pixels)

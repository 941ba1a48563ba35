"""Model folders in the Hugging Face layout, hub ids, weights as safetensors. Nothing is ever unpickled."""
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

# What a model folder holds beside config.json and the weights; copied along when a model is saved.
COMPANIONS = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
              "*processor_config.json", "generation_config.json", "chat_template*", "LICENSE*")


def local_folder(name) -> Path:
    """A local folder as it is; anything else is taken for a hub id and downloaded (weights as safetensors only)."""
    if Path(name).is_dir():
        return Path(name)
    if str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise FileNotFoundError(f"{name} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]
    return Path(snapshot_download(str(name), allow_patterns=patterns))


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ValueError(f"{folder}: neither generation_config.json nor config.json names an eos_token_id")


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Reads *.safetensors (single or sharded) tensor by tensor. Both generations of names are understood:
    visual.*, model.* (the hub's) and model.visual.*, model.language_model.* (newer `transformers` saves)."""
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
            raise FileNotFoundError(f"{folder / file} does not exist; weights are read from safetensors only")
        with safe_open(folder / file, framework="pt") as weights:
            for stored in weights.keys():
                name = stored.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
                if name not in wanted:
                    if name == "lm_head.weight":  # tied: a copy of the embedding that some savers write
                        head = weights.get_tensor(stored).to(dtype)
                        continue
                    raise ValueError(f"{folder / file}: unknown tensor {stored!r}")
                tensor = weights.get_tensor(stored)
                if tuple(tensor.shape) != wanted[name]:
                    raise ValueError(f"{folder / file}: {stored!r} has shape {tuple(tensor.shape)}, "
                                     f"config.json asks for {wanted[name]}")
                state[name] = tensor.to(dtype)
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise ValueError(f"{folder}: config.json says tie_word_embeddings, but the stored lm_head.weight differs from "
                         "model.embed_tokens.weight; set it to false, or remove lm_head.weight from the file")
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def save_folder(model: nn.Module, folder, max_shard_size: str) -> None:
    """Writes a complete folder: config, safetensors (sharded above max_shard_size), tokenizer, processor files."""
    from huggingface_hub import save_torch_state_dict
    if model.folder is None:
        raise ValueError("this model was not loaded from a folder, so its config.json and tokenizer are unknown")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()
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

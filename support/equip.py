"""Puts on a loaded model what model.py need not know of."""
from pathlib import Path

from torch import nn

from support.joined import lay_side_by_side
from support.lora import add_lora, freeze, load_adapter
from support.onednn import use_onednn


def equip(model: nn.Module, cfg=None, digest: str = "", adapter: Path | None = None) -> nn.Module:
    """Returns the model. From now on its large products on a CPU go by oneDNN (support/onednn.py),
    and on a GPU the weights that share an input lie side by side (support/joined.py). cfg: the
    options of a training, which may freeze parts of it or add adapters (support/lora.py). Layers
    change their classes in place; their names and weights stay.

    digest: weights.model_digest of the model. adapter: a checkpoint whose adapter goes on learning.
    Raises Mistake if an option does not fit the model.
    """
    use_onednn(model)
    if next(model.parameters()).is_cuda:
        lay_side_by_side(model)
    if cfg is not None:
        freeze(model, cfg.freeze)
        if cfg.lora_rank:
            of = str(Path(cfg.model).resolve()) if Path(cfg.model).is_dir() else cfg.model
            add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, of, digest)
            if adapter:
                load_adapter(model, adapter)
    return model

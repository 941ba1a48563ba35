"""Makes one whole model of an adapter and its base: `python experiments/merge.py RUN FOLDER`. RUN: a run that was
trained with --lora-rank, or one of its checkpoints. The weights are in the type of the training."""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import load_model  # noqa: E402
from support.lora import CONFIG, read_adapter  # noqa: E402
from support.mistakes import Mistake, run_main  # noqa: E402
from support.weights import local_folder  # noqa: E402


def main() -> None:
    if len(sys.argv) != 3:
        raise Mistake(__doc__)
    source, folder = local_folder(sys.argv[1]), Path(sys.argv[2])
    if not (source / CONFIG).exists():
        raise Mistake(f"{source} holds no adapter: it is a whole model already")
    if folder.exists():
        raise Mistake(f"{folder} is there already: choose another name, or remove it")
    dtype = json.loads((source / "config.json").read_text())["dtype"]
    load_model(source, getattr(torch, dtype)).save_pretrained(folder)
    print(f"{source} and its base {read_adapter(source).of}, as one model in {dtype}: {folder}")


if __name__ == "__main__":
    run_main(main)

"""Shows that sampler and trainer are one model: log-probs noted while sampling against those of the packed rows.

    python experiments/one_model.py [--json experiments/one_model.json]

8 rollouts of each question of scenes:test, on one core. `equal` is the share of tokens whose two log-probs have the
same bits. `logp_gap`, `logp_gap_max` and `kl_sampler` are what train.py logs (docs/logged.md).
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

from data import Processor, collate, pack_group  # noqa: E402
from experiments.bench import TINY, make_model  # noqa: E402
from model import Config, Qwen2_5_VL, Qwen3_VL, Qwen3Config, load_model  # noqa: E402
from objective import kl_k3  # noqa: E402
from rollout import generate, uniforms  # noqa: E402
from support.equip import equip  # noqa: E402
from support.lora import adapters, add_lora  # noqa: E402
from support.sources import Scenes  # noqa: E402

G, TOGETHER = 8, 25         # rollouts of a question, questions sampled together
# Questions, and the most tokens of a rollout.
MODELS = {"tiny": (125, 64), "tiny, LoRA": (125, 64), "Qwen3-VL": (125, 64), "116M": (13, 32)}


def make(name: str, dtype: torch.dtype, folder: Path) -> Qwen2_5_VL:
    """Returns assets/tiny; the same with adapters, whose B is drawn as if it had learnt; a Qwen3-VL of its shape with
    large random weights, so that all of it counts; bench.py's 116M with random weights."""
    torch.manual_seed(0)
    if name == "116M":
        return make_model(name, folder, torch.device("cpu"), dtype)
    model = load_model(TINY, dtype)
    if name == "Qwen3-VL":
        model = Qwen3_VL(Qwen3Config(**vars(Config.from_json(TINY / "config.json")) | {
            "mrope_section": (6, 5, 5), "vision_window_size": 0, "vision_fullatt_block_indexes": (),
            "vision_num_position_embeddings": 36, "vision_deepstack_visual_indexes": (0, 1)}))
        model.reset_parameters()
        for parameter in model.parameters():
            parameter.data.mul_(6 if parameter.dim() > 1 else 1)
        model.to(dtype).eos_ids = load_model(TINY).eos_ids
    if name == "tiny, LoRA":
        add_lora(model, 4, 8.0, "model.layers|visual", str(TINY))
        for layer in adapters(model).values():
            torch.nn.init.normal_(layer.lora_B, 0, 0.02)
            layer.merge()
    return equip(model)


@torch.no_grad()
def compare(model: Qwen2_5_VL, questions: range, R: int) -> dict[str, float]:
    processor, asked = Processor(TINY), Scenes("test")
    sampled: list[float] = []
    trained = []
    for first in questions[::TOGETHER]:
        places = range(first, min(first + TOGETHER, questions.stop))
        prompts = [processor.prompt(asked[i]) for i in places]
        for prompt, group in zip(prompts, generate(model, prompts, R, uniforms(0, places, G, R))):
            row = collate(pack_group(prompt, group))
            trained.append(model(**vars(row))[0][row.segment > 0])
            sampled += [logp for response in group for logp in response.logp]
    gap = torch.cat(trained) - torch.tensor(sampled)
    return {"rollouts": G * len(questions), "tokens": len(gap), "equal": float((gap == 0).double().mean()),
            "logp_gap": float(gap.abs().double().mean()), "logp_gap_max": float(gap.abs().max()),
            "kl_sampler": float(kl_k3(torch.zeros_like(gap), gap.double()).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", help="file for the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name, (questions, R) in MODELS.items():
        for precision in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                model = make(name, getattr(torch, precision), Path(folder) / name)
            lines.append({"model": name, "precision": precision, **compare(model, range(questions), R)})
            print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in lines[-1].items()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"torch": torch.__version__, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The options of train.py, and its presets: named sets of other defaults.

    torchrun train.py                                      the built-in world and the tiny model: minutes on a laptop
    torchrun --nproc-per-node 8 train.py --preset paper    Qwen2.5-VL-7B on the authors' data
    torchrun train.py --resume runs/NAME                   goes on from the newest checkpoint
"""
import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from rewards import LABEL_STYLES, TASKS

# Named sets of options; what is given on the command line wins. The paper leaves learning rate, batch and lengths open:
# `paper` is the authors' earlier public recipe (paper.md, section 1), 8 GPUs of 80 GB for 7B.
AUTHORS = {"data": "Ricky06662/ViSurf_multi_non_object_7300_size840", "task": "grounding", "steps": 456,
           "eval_data": "", "lr": 1e-6, "adam_eps": 1e-8, "warmup_steps": 0, "cooldown_steps": 0, "micro_rows": 1,
           "precision": "bfloat16", "checkpoint_activations": True}
PRESETS = {
    "laptop": {},
    "paper": {**AUTHORS, "model": "Qwen/Qwen2.5-VL-7B-Instruct", "max_new_tokens": 2000},
    "1x80G-3b": {**AUTHORS, "model": "Qwen/Qwen2.5-VL-3B-Instruct", "max_new_tokens": 512, "max_row_tokens": 4096},
}


def option(default, text: str, choices: tuple = ()):
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass
class Config:
    """Every option of train.py; saved with the run."""
    preset: str = option("laptop", "named set of options, the defaults of all others", tuple(PRESETS))
    dry_run: bool = option(False, "one step at worst-case length: memory and hours; then stop")
    method: str = option("visurf", "visurf (Eq. 8), rlvr (GRPO), sft (cross-entropy)", ("visurf", "rlvr", "sft"))
    model: str = option("assets/tiny", "model folder in the Hugging Face layout, or hub id")
    data: str = option("scenes:train", "scenes:SPLIT, .jsonl or .parquet file, folder, or hub id (sources.py)")
    task: str = option("", "task of rows without a column task (rewards.py)", ("", *TASKS))
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and count them")
    name: str = option("", "the run's folder is runs/NAME (default: the method and the time); never overwritten")
    resume: str = option("", "run folder to go on with, from its newest checkpoint and its saved options")
    seed: int = option(42, "seeds the order of the data, the rollouts and random weights")
    steps: int = option(400, "optimizer steps (with --inner-epochs E: sampling rounds of E optimizer steps)")
    prompts_per_step: int = option(16, "prompts per step over all ranks [paper.md 1: 16]")
    rollouts: int = option(8, "G, rollouts of each prompt [paper.md 1: 8]")
    max_new_tokens: int = option(128, "R, longest response; a longer rollout is truncated [paper.md 1: 2000]")
    temperature: float = option(1.0, "T of sampling and scoring [paper.md 1: 1.0]")
    micro_rows: int = option(4, "rows per forward; any value gives the same update")
    max_row_tokens: int = option(0, "a group whose row is longer becomes several rows (0: no limit)")
    lr: float = option(1e-3, "learning rate [paper.md 1: 1e-6, constant, for 7B]")
    adam_eps: float = option(1e-3, "eps of AdamW [paper.md 1: 1e-8]; far above a weight's usual gradient it makes "
                             "small gradients small steps")
    warmup_steps: int = option(10, "steps of linear warm-up")
    cooldown_steps: int = option(250, "last steps, of linear decay to 0; a shorter run starts lower")
    optimizer: str = option("adamw", "adamw; muon: Muon for matrices, AdamW for the rest (for pretraining)",
                            ("adamw", "muon"))
    weight_decay: float = option(0.01, "decoupled weight decay [paper.md 1: 1e-2]")
    grad_clip: float = option(1.0, "largest gradient norm [paper.md 1: 1.0]")
    clip: float = option(0.2, "ε of the clipped surrogate, Eq. 8 [paper.md 1: 0.2]; inert with one inner epoch")
    kl: float = option(0.0, "weight of the k3 KL to the frozen initial model; ViSurf has none")
    inner_epochs: int = option(1, "optimizer steps per sampling round [paper.md 1: 1]")
    std: str = option("sample", "std R of Eq. 6 and 7", ("sample", "population", "none"))
    normaliser: str = option("token-mean", "length normalisation; seq-sum is Eq. 9 to the letter",
                             ("token-mean", "seq-mean", "seq-sum"))
    label_style: str = option("spaced", "control 1, the text of y: spaced (the paper's), compact (off), auto (what the "
                              "policy finds likeliest)", (*LABEL_STYLES, "auto"))
    no_thinking_reward: bool = option(True, "control 2: y earns no thinking reward")
    smoothing: bool = option(True, "control 3: r(y) := mean r(o) once a rollout is as good as y")
    precision: str = option("float32", "of weights and gradients; the optimizer keeps float32 weights either way",
                            ("float32", "bfloat16"))
    cuda_graphs: bool = option(False, "sample by CUDA graphs (rollout.GraphedStep); not tried on a GPU yet")
    checkpoint_activations: bool = option(False, "recompute each block in backward: less memory, about 30 %% more time")
    random_weights: bool = option(False, "take only config and tokenizer from --model (for pretraining)")
    eval_data: str = option("scenes:val", "evaluated before, during and after; empty: never")
    eval_examples: int = option(192, "how many of it")
    eval_every: int = option(100, "steps between evaluations (0: only before and after)")
    save_every: int = option(100, "steps between checkpoints (0: only at the end)")
    log_every: int = option(10, "steps between printed lines; metrics.jsonl has every step")

    def check(self, world: int) -> None:
        for flag, wrong, rule in (
                ("prompts-per-step", self.prompts_per_step < 1 or self.prompts_per_step % world,
                 f"must be a multiple of the {world} ranks"),
                ("rollouts", self.method != "sft" and self.rollouts < 2, "must be 2 or more, or no group has a spread"),
                ("temperature", self.temperature <= 0, "must be above 0"),
                ("inner-epochs", self.inner_epochs < 1, "must be at least 1"),
                ("micro-rows", self.micro_rows < 1, "must be at least 1"),
                ("optimizer", self.optimizer == "muon" and self.precision == "bfloat16",
                 "keeps no float32 weights; use --precision float32"),
                ("kl", self.kl and self.method == "sft", "has no meaning with --method sft")):
            if wrong:
                raise SystemExit(f"--{flag} {getattr(self, flag.replace('-', '_'))}: {rule}")


def parse_config(arguments: list[str] | None = None) -> Config:
    """Flags → Config. The preset's options are the defaults; with --resume the run's saved ones are. Unknown flags are
    errors."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"]}
        shown = "" if f.type is bool else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + shown, **kind)
    given = vars(parser.parse_args(arguments))
    saved = PRESETS[given.get("preset", "laptop")]
    if given.get("resume"):
        path = Path(given["resume"]) / "config.json"
        if not path.exists():
            raise SystemExit(f"--resume {given['resume']}: there is no {path}")
        saved = json.loads(path.read_text())["config"]
    return Config(**{**saved, **given})

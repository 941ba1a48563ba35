"""One update of TRL's GRPOTrainer (pip install trl), for bench.py: same model, pictures, G and lengths.

TRL wants a ProcessorMixin; transformers' own for Qwen2.5-VL needs torchvision. `StandIn` has its methods and does no
more than these: the tokenizer's chat template, one image token for each 2×2 patches, transformers' image processor that
does without torchvision.
"""
import os

import torch
from transformers import ProcessorMixin, Qwen2VLImageProcessorPil, TrainerCallback

from data import Processor
from support.folders import IMAGE_PLACEHOLDER


class StandIn(ProcessorMixin):
    def __init__(self, processor: Processor, folder):
        self.tokenizer = processor.tokenizer
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.image_token_id, self.chat_template = processor.config.image_token_id, self.tokenizer.chat_template

    def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
        pictures = self.image_processor(images=[i for several in images for i in several], return_tensors="pt")
        counts = iter((pictures["image_grid_thw"].prod(1) // 4).tolist())
        rows = []
        for t in text:
            first, *others = t.split(IMAGE_PLACEHOLDER)
            t = first + "".join(IMAGE_PLACEHOLDER * next(counts) + other for other in others)
            rows.append(self.tokenizer(t, add_special_tokens=False).input_ids)
        if len(set(map(len, rows))) > 1:
            raise ValueError("the prompts of a benchmark are of one length")
        kinds = [[int(t == self.image_token_id) for t in row] for row in rows]
        if return_tensors:
            rows, kinds = torch.tensor(rows), torch.tensor(kinds)
        return {"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows] if padding is False else
                torch.ones_like(rows), "mm_token_type_ids": kinds, **pictures}

    def apply_chat_template(self, conversation, tokenize=False, **settings):
        settings = {"add_generation_prompt": settings.get("add_generation_prompt", False)}
        if not tokenize:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, **settings)
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False, **settings) for c in conversation]
        pictures = [[part["image"] for m in c if isinstance(m["content"], list) for part in m["content"]
                     if part["type"] == "image"] for c in conversation]
        return self(pictures, texts)

    def batch_decode(self, *inputs, **settings):
        return self.tokenizer.batch_decode(*inputs, **settings)

    def save_pretrained(self, *_, **__):
        pass


class Between(TrainerCallback):
    """Calls `began` before each step of the trainer and `ended` after it."""
    def __init__(self, began, ended):
        self.began, self.ended = began, ended

    def on_step_begin(self, *_, **__):
        self.began()

    def on_step_end(self, *_, **__):
        self.ended()


def run_trl(theirs, folder, prompts: list, G: int, R: int, steps: int, reward, began, ended) -> None:
    """`steps` updates of len(prompts) × G rollouts of R tokens; AdamW, no KL, one update per sampling round,
    micro-batches of one group, activations kept."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):    # of bench.py's own process group: TRL runs without DDP
        os.environ.pop(name, None)
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    config = GRPOConfig(
        output_dir=str(folder / "trl"), report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        bf16=theirs.dtype == torch.bfloat16, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(),
        num_generations=G, per_device_train_batch_size=G, gradient_accumulation_steps=len(prompts), max_steps=steps,
        max_completion_length=R, generation_kwargs={"min_new_tokens": R}, temperature=1.0, beta=0.0, num_iterations=1,
        learning_rate=1e-6, optim="adamw_torch", loss_type="dapo", seed=0)
    rows = [{"prompt": [{"role": "user", "content": p.example.question}], "image": p.example.images[0]}
            for p in prompts]
    trainer = GRPOTrainer(theirs, reward_funcs=[lambda completions, **_: [
        reward(c[0]["content"] if isinstance(c, list) else c, "").total for c in completions]],
        args=config, train_dataset=Dataset.from_list(rows), processing_class=StandIn(Processor(folder), folder),
        callbacks=[Between(began, ended)])
    trainer.train()

"""Writes everything of assets/tiny/ but its weights: config, a tokenizer trained on the built-in world's text, the chat
template, generation and preprocessor settings. The weights come from train.py (see assets/README.md).

    python experiments/make_tiny.py [FOLDER]        FOLDER: default assets/tiny
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from support import scenes  # noqa: E402
from rewards import label_text, user_text  # noqa: E402

VOCABULARY = 512  # embedding rows; the last 14 are the special tokens
# The special tokens of Qwen2.5-VL, in its order. <think> and <answer> are ordinary text there, and so they are here.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# Words, single digits, marks, blanks: how Qwen2 splits text before merging bytes.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
CHAT = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()

    def corpus():
        yield from ["system\nYou are a helpful assistant.\nuser\nassistant\n"] * 2000
        for split in ("words", "pretrain"):
            for index in range(10_000):
                example = scenes.make(split, index)
                yield user_text(example["task"], example["question"])
                yield label_text(example["task"], example["answer"], "spaced", example["thought"])
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(SPECIAL)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    tokenizer.save(str(folder / "tokenizer.json"))

    def write(name: str, content: dict) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    write("tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "unk_token": None, "model_max_length": 4096, "clean_up_tokenization_spaces": False,
        "additional_special_tokens": SPECIAL[1:]})
    (folder / "chat_template.jinja").write_text(CHAT)   # a file of its own: AutoProcessor reads it nowhere else
    write("generation_config.json", {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
                                     "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})
    write("preprocessor_config.json", {
        "processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]})
    write("config.json", {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "dtype": "float32",
        "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 384, "vocab_size": VOCABULARY, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        # With Qwen2.5-VL's theta of 1e6 and even sections the column axis, which has the lowest frequencies, would turn
        # by 0.0001 a step: invisible on a grid of 4×4 image tokens.
        "max_position_embeddings": 4096, "rope_theta": 100.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 4, 10]}, "tie_word_embeddings": True,
        "initializer_range": 0.02, "use_sliding_window": False, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"], "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {"model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 128, "num_heads": 4,
                          "intermediate_size": 384, "hidden_act": "silu", "in_chans": 3, "out_hidden_size": 128,
                          "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112,
                          "fullatt_block_indexes": [1], "tokens_per_second": 2}})
    print(f"{folder}: {first} byte-pair tokens and {len(SPECIAL)} special tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "assets" / "tiny")

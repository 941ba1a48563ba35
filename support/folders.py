"""Checks of a model folder's tokenizer, chat template and image settings: whether they belong to
its model, and whether this code makes of them what transformers does. config: the model's own
(model.Config)."""
import math
from pathlib import Path

from support.files import as_json, read_record
from support.mistakes import Mistake

IMAGE_PLACEHOLDER = "<|image_pad|>"


def image_settings(folder: Path, config) -> dict:
    """Returns the settings of the image processor: `image_processor` in processor_config.json, as
    transformers 5 writes it, else preprocessor_config.json, as the hub has it. What is missing
    there is as in transformers. Raises Mistake if it makes other patches than the tower of `config`
    takes, or than this code makes."""
    settings = None
    for name in ("processor_config.json", "preprocessor_config.json"):
        if settings is None and (path := folder / name).exists():
            settings = read_record(path)
            if name == "processor_config.json":
                settings = settings.get("image_processor")
    if settings is None:
        raise Mistake(f"{folder} has neither preprocessor_config.json nor an image_processor in "
                      "processor_config.json; copy them from the model it was made of")
    if not isinstance(settings, dict):
        raise Mistake(f"{path}: image_processor is {str(settings)[:100]!r}, not an object")
    sizes = {"patch_size": config.vision_patch_size, "merge_size": config.vision_spatial_merge_size,
             "temporal_patch_size": config.vision_temporal_patch_size}
    only = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
            "resample": 3, "rescale_factor": 1 / 255, **sizes}
    missing = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    for name, value in {**missing, **settings}.items():
        if name in only and value != only[name]:
            raise Mistake(f"{path}: {name} is {str(value)[:100]}; it must be {only[name]}"
                          + ", as in config.json" * (name in sizes))
    size = settings.get("size") or {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    if not isinstance(size, dict):
        raise Mistake(f"{path}: size is {str(size)[:100]!r}, not an object")
    read = {"image_mean": settings.get("image_mean") or [0.48145466, 0.4578275, 0.40821073],
            "image_std": settings.get("image_std") or [0.26862954, 0.26130258, 0.27577711]}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        where, value = name, settings.get(name)
        if value is None:
            where, value = f"size.{edge}", size.get(edge)
        if type(value) is not int or value < 1:
            raise Mistake(f"{path}: {where} is {str(value)[:100]!r}; it must be a whole number "
                          "above 0")
        read[name] = value
    for name, least in (("image_mean", -math.inf), ("image_std", 0)):
        if not isinstance(read[name], list) or len(read[name]) != 3 or not all(
                type(part) in (int, float) and least < part < math.inf for part in read[name]):
            raise Mistake(f"{path}: {name} is {str(read[name])[:100]!r}; it must be three numbers"
                          + " above 0" * (least == 0))
    return read


def set_pixels(folder: Path, limits) -> None:
    """Writes the least and the most pixels of a picture into a folder's image settings, under each
    name that a version of transformers reads."""
    least, most = limits
    for name in ("processor_config.json", "preprocessor_config.json"):
        record = read_record(path) if (path := folder / name).exists() else {}
        settings = record.get("image_processor") if name.startswith("processor") else record
        if not settings:
            continue
        size = {"size": {"shortest_edge": least, "longest_edge": most}} if "size" in settings else {}
        changed = {"min_pixels": least, "max_pixels": most, **size}
        if any(settings.get(key) != value for key, value in changed.items()):
            settings.update(changed)
            path.write_text(as_json(record, 2))


def load_tokenizer(folder: Path, config, eos_ids: tuple[int, ...]):
    """Returns the tokenizer of a model folder. Raises Mistake if there is none, or another model's:
    transformers makes up an empty one, and the model would go on with tokens that mean nothing to
    it."""
    from transformers import AutoTokenizer
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise Mistake(f"{folder} has no tokenizer.json; copy it from the model it was made of")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer("x")   # a wrong model_max_length is met only here
    except Exception as error:
        raise Mistake(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: "
                      f"{str(error)[:200]}). Are tokenizer.json and tokenizer_config.json damaged? "
                      "Copy them anew from where they came") from None
    other = f"{folder}: the tokenizer belongs to another model:"
    for token, wanted in ((IMAGE_PLACEHOLDER, config.image_token_id),
                          ("<|video_pad|>", config.video_token_id),
                          ("<|vision_start|>", config.vision_start_token_id),
                          ("<|vision_end|>", config.vision_end_token_id)):
        if (found := tokenizer.get_vocab().get(token)) != wanted:
            raise Mistake(f"{other} {token} is {found} in it, {wanted} in config.json")
    if tokenizer.eos_token_id not in eos_ids or len(tokenizer) > config.vocab_size:
        raise Mistake(f"{other} it has {len(tokenizer)} tokens and ends by "
                      f"{tokenizer.eos_token_id}; the model has {config.vocab_size} and ends by "
                      f"{eos_ids}")
    if not tokenizer.chat_template:
        raise Mistake(f"{folder} has no chat template (chat_template.jinja, or in "
                      "tokenizer_config.json)")
    return tokenizer


def end_of_turn(folder: Path, tokenizer, eos_ids: tuple[int, ...]) -> int:
    """Returns the token that ends a turn of the model, and so ends y: what the chat template writes
    behind an answer, whatever the order of eos_ids. Raises Mistake if the template leaves out the
    picture, the question or the answer, ends by a token that does not end sampling, or begins the
    thought for the model."""
    question = {"role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "A question"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "An answer"}]}
    template, write = f"{folder}: its chat template", tokenizer.apply_chat_template
    try:
        asked = write([question], tokenize=False, add_generation_prompt=True)
        answered = write([question, answer], tokenize=False)
    except Exception as error:
        raise Mistake(f"{template} cannot write a question about a picture "
                      f"({type(error).__name__}: {str(error)[:200]}); take the one of Qwen2.5-VL"
                      ) from None
    image = f"<|vision_start|>{IMAGE_PLACEHOLDER}<|vision_end|>"
    if asked.count(image) != 1 or asked.count("A question") != 1 or "'type'" in asked:
        raise Mistake(f"{template} makes {asked[:200]!r} of a question about a picture, without "
                      f"one {image} and the question; is it for text only? Take the one of "
                      "Qwen2.5-VL")
    if "<think>" in (behind := asked.partition("A question")[2]):
        raise Mistake(f"{template} opens the thought itself, by {behind[-60:]!r} behind the "
                      "question: the thinking reward would be 0 for every answer, and y trained "
                      "inside a thought; take the Instruct model, or remove <think> from the "
                      "template")
    ends = tokenizer(answered.rpartition("An answer")[2], add_special_tokens=False).input_ids
    if not ends or ends[0] not in eos_ids:
        raise Mistake(f"{template} ends an answer by {tokenizer.decode(ends[:1])!r}, which is not "
                      f"among the tokens {eos_ids} that end a response (eos_token_id in "
                      "generation_config.json)")
    return ends[0]

"""LoRA: the same numbers in sampling, in scoring and in a merged folder, and the gradient of W + s·B·A."""
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import run_script
from safetensors.torch import load_file, save_file
from test_train import SMALL, lines, run_train

import train
from data import Processor, Response, collate, collate_images, pack_group
from experiments import merge
from model import Qwen2_5_VL, load_model
from rollout import generate, prefill, uniforms
from support.checkpoints import digest_of
from support.equip import equip
from support.files import digest
from support.lora import (CONFIG, WEIGHTS, LowRank, add_lora, adapters, freeze, load_adapter, merge_after,
                          without_adapters)
from support.mistakes import Mistake
from support.onednn import Linear, use_onednn
from support.optimizers import learn
from support.sources import Example, Scenes

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets/tiny"
EVERYTHING = "model.layers|visual"


def tiny(dtype=torch.float64, rank: int = 0, targets: str = EVERYTHING, seed: int = 1) -> Qwen2_5_VL:
    model = load_model(TINY, dtype)
    if rank:
        torch.manual_seed(seed)
        add_lora(model, rank, 8.0, targets, str(TINY))
    return model


def learnt(model: Qwen2_5_VL, seed: int = 2) -> Qwen2_5_VL:
    """B is 0 at first; here it is what a training could have made of it."""
    torch.manual_seed(seed)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.02)
        layer.merge()
    return model


def batch():
    processor = Processor(TINY)
    prompt = processor.prompt(Scenes("test")[0])
    return collate(pack_group(prompt, [Response(processor.encode(text)) for text in ("<answer>[]</answer>", "so")]), "cpu")


def logp(model: Qwen2_5_VL) -> torch.Tensor:
    return model(**vars(batch()))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_b_0_nothing_changes(dtype):
    plain, model = tiny(dtype), tiny(dtype, rank=4)
    for layer in adapters(model).values():
        layer.merge()
    assert len(adapters(model)) == sum(isinstance(m, torch.nn.Linear) for m in model.modules()) - 1      # lm_head
    assert torch.equal(logp(plain), logp(model))
    assert all(p.dtype == torch.float32 and name.rsplit(".")[-1] in ("lora_A", "lora_B")
               for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("onednn", [False, True])
def test_the_gradient_is_that_of_w_plus_b_a(onednn, monkeypatch):
    """Against autograd on a model whose weights are W + s·B·A of tensors that want a gradient; float64."""
    import support.onednn
    monkeypatch.setattr(support.onednn, "ONEDNN_FROM", 1)
    dtype, near = (torch.float32, 2e-4) if onednn else (torch.float64, 1e-9)
    model = tiny(dtype)
    if onednn:
        use_onednn(model)
    torch.manual_seed(1)
    add_lora(model, 3, 6.0, EVERYTHING, str(TINY))
    learnt(model)
    logp(model).sum().backward()
    plain = tiny(dtype)
    pairs = {name: (layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_())
             for name, layer in adapters(model).items()}
    sums = {f"{name}.weight": plain.get_submodule(name).weight.detach() + 2.0 * B @ A for name, (A, B) in pairs.items()}
    torch.func.functional_call(plain, sums, kwargs=vars(batch()))[0].sum().backward()
    for name, layer in adapters(model).items():
        for own, other in zip((layer.lora_A, layer.lora_B), pairs[name]):
            assert torch.allclose(own.grad, other.grad, rtol=near, atol=near * float(other.grad.abs().max())), name
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_an_adapter_of_full_rank_steps_as_full_fine_tuning():
    """A = 1 and s = 1: W changes by what AdamW makes of B, from 0; A has no gradient yet, as B is 0."""
    full, model = tiny(), tiny()
    width = model.config.hidden_size
    add_lora(model, width, width, r"model\.layers\.\d+\.mlp\.(gate|up)_proj", "")
    theirs = {name: full.get_submodule(name).weight for name in adapters(model)}
    for layer in adapters(model).values():
        torch.nn.init.eye_(layer.lora_A)
    for each in (full, model):
        logp(each).sum().backward()
    for name, layer in adapters(model).items():
        assert torch.allclose(layer.lora_B.grad, theirs[name].grad, rtol=1e-9, atol=1e-12)
        assert not layer.lora_A.grad.any()
    options = {"lr": 1e-3, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([layer.lora_B for layer in adapters(model).values()], **options)
    merge_after(optimizer, model)
    optimizer.step()
    torch.optim.AdamW(theirs.values(), **options).step()
    for name, layer in adapters(model).items():
        assert torch.allclose(layer.weight, theirs[name], rtol=1e-9, atol=1e-12) and layer.lora_B.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_model_without_its_adapters(dtype):
    """To the bit, and without a second model; after it the adapters are back, and an error does not lose them."""
    cfg = train.Config(model=str(TINY), kl=0.1, lora_rank=4, precision=str(dtype).removeprefix("torch."))
    model, reference = train.make_models(cfg, None, "", torch.device("cpu"))
    assert reference is model
    learnt(model)
    before = logp(model)
    with without_adapters(model):
        frozen = logp(model)
    assert torch.equal(frozen, logp(use_onednn(tiny(dtype)))) and not torch.equal(frozen, before)
    assert torch.equal(logp(model), before)
    with pytest.raises(ValueError), without_adapters(model):
        raise ValueError
    assert torch.equal(logp(model), before)
    plain = tiny()
    with without_adapters(plain):
        assert torch.equal(logp(plain), logp(tiny()))


@pytest.mark.parametrize("dtype, gap", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_the_gap_between_sampling_and_scoring_is_that_without_lora(dtype, gap):
    """The log-probs that sampling noted against those of the packed row: with adapters as far apart as without. Of the
    200 tokens of two prompts one mean is up to four times the other, of the 1,600 of 24 a quarter more."""
    processor = Processor(TINY)
    prompts = [processor.prompt(Scenes("test")[i]) for i in range(24)]

    def gaps(model: Qwen2_5_VL) -> torch.Tensor:
        apart = []
        for prompt, responses in zip(prompts, generate(model, prompts, 24, uniforms(0, range(len(prompts)), 4, 24))):
            row = collate(pack_group(prompt, responses), "cpu")
            scored = model(**vars(row))[0][row.segment > 0]
            apart.append((scored - torch.tensor([p for o in responses for p in o.logp])).abs())
        return torch.cat(apart)
    model = learnt(tiny(dtype, rank=4))
    with torch.no_grad():
        with_lora, without = gaps(model), gaps(tiny(dtype))
    assert float(with_lora.max()) < gap and float(with_lora.mean()) < 1.5 * float(without.mean()) + 1e-6


def test_an_adapter_goes_out_and_in(tmp_path):
    """Saved, merged into a plain model, taken back into one with adapters: the same weights, to the bit."""
    model = learnt(tiny(torch.bfloat16, rank=4))
    model.save_pretrained(tmp_path / "a")
    assert not list((tmp_path / "a").glob("model*.safetensors")) and (tmp_path / "a/tokenizer.json").exists()
    again = load_model(tmp_path / "a", torch.bfloat16)
    assert not adapters(again) and torch.equal(logp(again), logp(model))
    other = tiny(torch.bfloat16, rank=4, seed=9)
    load_adapter(other, tmp_path / "a")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    with pytest.raises(Mistake, match="is not of this run: .* has another adapter, or none"):
        load_adapter(tiny(torch.bfloat16, rank=5), tmp_path / "a")
    with pytest.raises(Mistake, match="is not of this run"):
        load_adapter(tiny(torch.bfloat16, rank=4, targets="model.layers.0"), tmp_path / "a")


def change_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 2 ** -20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two runs that need the folder `base` beside their checkpoints: an adapter on it, and one with --kl to it."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(TINY, place / "base")
    flags = ["--model", "base", *SMALL, "--max-new-tokens", "6", "--steps", "1"]
    for name, own in (("lora", ["--lora-rank", "2"]), ("kl", ["--kl", "0.1"])):
        code, output = run_script(ROOT / "train.py", *flags, *own, "--name", name, folder=place)
        assert code == 0, output
    return place


@pytest.mark.parametrize("change, fits", [(change_a_weight, False), (change_config, False), (lambda folder: None, True)])
def test_a_base_that_was_replaced(trained, tmp_path, change, fits):
    """Is another model: no run goes on with it, and nothing scores it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for config in tmp_path.glob("runs/lora/checkpoints/*/adapter_config.json"):     # as if it had lain here
        config.write_text(config.read_text().replace(str(trained), str(tmp_path)))
    for path in tmp_path.glob("runs/lora/checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        state["files"]["adapter_config.json"] = digest(path.with_name("adapter_config.json"))
        path.write_text(json.dumps({**state, "digest": digest_of(state)}))
    change(tmp_path / "base")
    for script, flags, sentence in (
            ("train.py", ["--resume", "runs/lora", "--steps", "2"], "--model base is not the model that runs/lora began"),
            ("train.py", ["--resume", "runs/kl", "--steps", "2"], "--model base is not the model that runs/kl began"),
            ("eval.py", ["--model", "runs/lora", "--data", "scenes:test", "--limit", "1", "--max-new-tokens", "2"],
             "base, is not the model that it was trained on")):
        code, output = run_script(ROOT / script, *flags, folder=tmp_path)
        assert (code == 0) == fits and (sentence in output) != fits and "Traceback" not in output, output


def test_muon_with_adapters(tmp_path):
    """An adapter has matrices alone, so that there is nothing left for AdamW."""
    flags = ["--model", str(TINY), *SMALL, "--max-new-tokens", "6", "--lora-rank", "2", "--optimizer", "muon"]
    for more in (["--steps", "1", "--name", "a"], ["--resume", "runs/a", "--steps", "2"]):
        code, output = run_script(ROOT / "train.py", *flags, *more, folder=tmp_path)
        assert code == 0, output
    assert (tmp_path / "runs/a/checkpoints/step_2/optimizer_0.safetensors").exists()


@pytest.mark.parametrize("change, said", [
    ({"r": 0}, "r is 0 .* r must be 1 or more"), ({"r": 5}, "their rank r is 5"), ({"r": None}, "r is 'None'"),
    ({"lora_alpha": math.nan}, "lora_alpha 'nan'"), ({"base_model_name_or_path": 3}, "base_model_name_or_path is '3'"),
    ({"use_dora": True}, "use_dora is True, which is not supported"), ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ("cut", "the adapter cannot be read"), ("B", "has only one of A and B"), ("name", "unknown tensor 'x'"),
    ("base", "does not fit to .*: model.layers.0.self_attn.q_proj is of shape"),
    ({"base_model_name_or_path": "no/where/at all"}, "no/where/at all"),
    ([1], "holds a JSON list, not an object"), ({}, "r is 2 and lora_alpha 'None'; r must be 1 or more")])
def test_adapters_that_are_not_ours(tmp_path, change, said):
    learnt(tiny(torch.float32, rank=2, targets="model.layers.0.self_attn.q")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    if not change:
        del config["lora_alpha"]
    if isinstance(change, (dict, list)):
        (tmp_path / CONFIG).write_text(json.dumps(config | change if isinstance(change, dict) else change))
    elif change == "cut":
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:100])
    else:
        stored = load_file(tmp_path / WEIGHTS)
        key = next(name for name in stored if "lora_B" in name)
        tensor = stored.pop(key)
        stored |= {"B": {}, "name": {"x": tensor.clone(), key: tensor}, "base": {key: tensor[:-1].clone()}}[change]
        save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(Mistake, match=said):
        load_model(tmp_path)


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_peft_opens_it(tmp_path, pictures):
    """Its logits with our adapter on its own base against ours, in float32."""
    peft = pytest.importorskip("peft")
    from transformers import Qwen2_5_VLForConditionalGeneration
    model = learnt(tiny(torch.float32, rank=4))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY), tmp_path)
    images = tuple(Scenes("test")[i].images[0] for i in range(pictures))
    prompt = Processor(TINY).prompt(Example("1", images, "red ring" + " <image>?" * pictures, "1", "vqa"))
    patches, grids = collate_images([prompt], "cpu")
    tokens = torch.tensor([prompt.tokens])
    seen = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, *grid] for grid in grids])}
    with torch.no_grad():
        other = theirs(input_ids=tokens, **(seen if pictures else {}),
                       mm_token_type_ids=(tokens == model.config.image_token_id).int()).logits[0, -1]
        own = model.lm_head(prefill(model, [prompt], 1, 1)[0])[0]
    assert torch.allclose(own, other, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("parts, left", [
    ("tower", {"visual.merger", "model.embed_tokens", "model.layers", "model.norm"}),
    ("tower,merger,embeddings", {"model.layers", "model.norm"}), ("decoder", {"visual.patch_embed", "visual.blocks",
                                                                              "visual.merger", "model.embed_tokens"})])
def test_what_is_frozen(parts, left):
    model = tiny()
    freeze(model, parts)
    assert {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad} == left
    assert len(learn(model)) < len(list(model.parameters()))
    add_lora(model, 2, 4.0, EVERYTHING, "")
    assert all(any(name.startswith(part) for part in left) for name in adapters(model))
    frozen = tiny()
    for wrong, said in (("towr", "there is no part 'towr'"), ("tower,merger,decoder,embeddings", "leaves nothing")):
        with pytest.raises(Mistake, match=said):
            freeze(frozen, wrong)


def test_what_is_put_on_a_model():
    """Adapters lie over oneDNN's products; an evaluation gets these alone, and all of it learns."""
    cfg = train.Config(freeze="tower", lora_rank=2, lora_targets=EVERYTHING)
    model, evaluated = equip(tiny(), cfg, "abc"), equip(tiny())
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            adapted = name.startswith(("model.layers", "visual.merger"))
            assert type(part).__mro__[:3] == (type(part), LowRank, Linear) if adapted else type(part) is Linear
            assert not adapted or (part.digest, len(part.lora_A)) == ("abc", 2)
            assert type(evaluated.get_submodule(name)) is Linear
    assert all(p.requires_grad for p in evaluated.parameters()) and torch.equal(logp(model), logp(evaluated))


def test_targets_that_match_nothing():
    for targets, said in (("models", "matches no linear layer"), ("(", "no regular expression")):
        with pytest.raises(Mistake, match=said):
            tiny(rank=2, targets=targets)


def test_a_run_with_lora(tmp_path, monkeypatch):
    """Four steps, and the last two of them once more from the checkpoint before: the same adapter, to the bit; on two
    ranks the same course. Then one command makes a whole model of it, whose log-probs are the run's."""
    flags = ["--lora-rank", "4", "--precision", "bfloat16", "--freeze", "merger", "--lr", "0.01", "--lora-targets",
             "model.layers|visual"]

    def start(*more: str, ranks: int = 1) -> str:
        code, output = run_train(tmp_path, *flags, *more, ranks=ranks)
        assert code == 0, output
        return output
    output = start("--steps", "4", "--name", "whole", "--save-every", "2")
    assert "1.6 M parameters of" in output and "M learn" in output
    assert "weights 0.00 GB, gradients 0.00 GB, optimizer 0.00 GB; 0.00 GB of the base in the memory of the host" in output
    start("--steps", "2", "--name", "two", ranks=2)
    whole, two = ([line["entropy"] for line in lines(tmp_path / f"runs/{name}")[:2]] for name in ("whole", "two"))
    assert two == pytest.approx(whole, rel=1e-3) and abs(whole[1] / whole[0] - 1) > 0.02
    shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/half")
    code, output = run_train(tmp_path, "--resume", "runs/half/checkpoints/step_2", small=[])
    assert code == 0, output
    a, b = (load_file(tmp_path / f"runs/{name}/checkpoints/step_4" / WEIGHTS) for name in ("whole", "half"))
    assert all(torch.equal(a[name], b[name]) for name in a) and any("visual" in name for name in a)
    assert not any("merger" in name for name in a) and any(b[name].any() for name in b if "lora_B" in name)
    assert lines(tmp_path / "runs/whole") == lines(tmp_path / "runs/half")
    state = load_file(tmp_path / "runs/half/checkpoints/step_4/optimizer_0.safetensors")
    assert len(state) == 3 * len(b) and not any("master" in name for name in state)
    for more, said in (((), "greedy, bfloat16"), (("--precision", "float32", "--out", "x"), "greedy, float32")):
        code, output = run_script(ROOT / "eval.py", "--model", "runs/half", "--data", "scenes:test", "--limit", "2",
                                  "--max-new-tokens", "4", *more, folder=tmp_path)
        assert code == 0 and said in output and f"scenes:test, {said.split()[1]}" in output, output
    code, output = run_script(ROOT / "experiments/merge.py", "runs/half", "merged", folder=tmp_path)
    assert code == 0 and "as one model in bfloat16: merged" in output, output
    run, whole = (load_model(tmp_path / name, torch.bfloat16) for name in ("runs/half", "merged"))
    assert torch.equal(logp(run), logp(whole)) and not torch.equal(logp(run), logp(tiny(torch.bfloat16)))
    monkeypatch.setattr(sys, "argv", ["merge.py", str(tmp_path / "merged"), "x"])
    with pytest.raises(Mistake, match="holds no adapter"):
        merge.main()

"""support/joined.py: sampling with joined products is sampling, also after an update, with LoRA, and from a saved
folder."""
import pytest
import torch
from torch.testing import assert_close

from data import Processor, Response, collate, pack_group
from model import load_model, random_model
from rollout import decode_one_token, generate, uniforms
from support import graphs, joined
from support.joined import groups, joined_products, lay_side_by_side
from support.lora import adapters, add_lora, merge_after
from support.sources import Scenes
from test_rollout import DEVICES


def lie_together(model) -> bool:
    """Whether all weights and biases are joined without a copy."""
    return all(joined.joined(tensors).data_ptr() == tensors[0].data_ptr() for _, kinds in groups(model) for tensors in kinds)


@pytest.fixture(params=["Qwen2.5-VL", "Qwen3-VL"])
def folder(request, qwen3_folder):
    return "assets/tiny" if request.param == "Qwen2.5-VL" else qwen3_folder


@pytest.mark.parametrize("lora", ["", r"model\.layers\.1\.self_attn\.k_proj|model\.layers.*up_proj"])
@pytest.mark.parametrize("device", DEVICES)
def test_joined_products_sample_the_same(folder, device, lora, monkeypatch):
    """With static steps, and on a GPU with graphs, against plain ones and separate products. Before and after an update,
    which leaves all in its place; training multiplies by each on its own. Where weights have been moved, as by .to, they
    are joined by a copy."""
    torch.manual_seed(0)
    model, processor = random_model(folder), Processor(folder)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.12)
    model.to(device)
    names = {name: p.shape for name, p in model.named_parameters()}
    lay_side_by_side(model)
    if lora:
        add_lora(model, 4, 16.0, lora, str(folder))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    merge_after(optimizer, model)
    prompts = [processor.prompt(Scenes("test")[i]) for i in (0, 2)]
    calls: list = []
    monkeypatch.setattr(joined, "product", lambda *args, plain=joined.product: calls.append(1) or plain(*args))

    def sampled(*devices: str) -> list:
        monkeypatch.setattr(joined, "DEVICES", devices)
        calls.clear()
        step = graphs.GraphedStep(decode_one_token) if devices else decode_one_token
        made = generate(model, prompts, 12, uniforms(0, range(2), 3, 12), step=step, graphs=False)
        assert bool(calls) == bool(devices)
        return [(o.tokens, o.logp) for group in made for o in group]
    seen = []
    for _ in range(2):
        one, several = sampled(device), sampled()
        assert [tokens for tokens, _ in one] == [tokens for tokens, _ in several]
        assert_close([torch.tensor(logp) for _, logp in one], [torch.tensor(logp) for _, logp in several],
                     rtol=0, atol=1e-4)
        assert lie_together(model) and one not in seen
        seen.append(one)
        calls.clear()
        model(**vars(collate(pack_group(prompts[0], [Response([5, 6, 7])]), device)))[0].sum().backward()
        assert not calls
        optimizer.step()
    assert names.items() <= {name: p.shape for name, p in model.named_parameters()}.items()
    assert bool(adapters(model)) == bool(lora)
    model.to(torch.float64)
    assert not lie_together(model)
    assert [tokens for tokens, _ in sampled(device)] == [tokens for tokens, _ in sampled()]


def test_a_model_whose_weights_lie_together_is_saved_whole(tmp_path):
    model = load_model("assets/tiny")
    lay_side_by_side(model)
    model.save_pretrained(tmp_path, "500KB")
    again = load_model(tmp_path)
    assert lie_together(model) and not lie_together(again)
    assert all(torch.equal(own, same) for own, same in zip(model.state_dict().values(), again.state_dict().values(),
                                                           strict=True))


def test_after_an_interruption_the_products_are_separate_again(monkeypatch):
    monkeypatch.setattr(joined, "DEVICES", ("cpu",))
    model = load_model("assets/tiny")
    with pytest.raises(KeyboardInterrupt), joined_products(model):
        raise KeyboardInterrupt
    assert not any("products" in vars(part) for part, _ in groups(model))

"""support/onednn.py: the same products as nn.Linear's. test_model.py runs the model both ways, test_rollout.py sampling."""
import pytest
import torch

from support import onednn
from support.onednn import Linear, onednn_linear, packed_weights, use_onednn


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_matrix_product(bias, products, monkeypatch):
    """Output and gradients against float64, for one token, many, and none; with part of them frozen; packed."""
    calls = []
    count = lambda *inputs: calls.append(1) or onednn_linear(*inputs)  # noqa: E731
    monkeypatch.setattr(onednn, "onednn_linear", count)
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias)
    for shape in ((1, 24), (3, 7, 24), (0, 24)):
        x, weight = torch.randn(shape), torch.randn(*shape[:-1], 40)
        inputs = [x.requires_grad_(), *layer.parameters()]
        expected = [t.detach().double().requires_grad_() for t in inputs]
        out, wide = layer(x), torch.nn.functional.linear(*expected)
        torch.testing.assert_close(out, wide.float(), rtol=0, atol=1e-5)
        wanted = torch.autograd.grad((wide * weight).sum(), expected)
        for frozen in [(), *[(i,) for i in range(len(inputs))]]:
            kept = [i for i in range(len(inputs)) if i not in frozen]
            for i, t in enumerate(inputs):
                t.requires_grad_(i in kept)
            found = torch.autograd.grad((layer(x) * weight).sum(), [inputs[i] for i in kept])
            for i, gradient in zip(kept, found):
                torch.testing.assert_close(gradient, wanted[i].float(), rtol=0, atol=1e-5)
        with torch.no_grad(), packed_weights(layer):
            assert (layer.packed is not None) == (products is onednn.use_onednn)
            torch.testing.assert_close(layer(x), wide.float(), rtol=0, atol=1e-5)
        assert layer.packed is None
    assert bool(calls) == (products is onednn.use_onednn)


def test_linear_takes_any_layout(products):
    """Inputs and gradients that are transposed, expanded, or every second column."""
    torch.manual_seed(0)
    layer = Linear(24, 40)
    for x in (torch.randn(24, 5).t(), torch.randn(1, 24).expand(6, 24), torch.randn(5, 48)[:, ::2]):
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        with torch.no_grad(), packed_weights(layer):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
        for loss in (torch.sum, lambda out: out.t()[::3].cumsum(0).sum()):
            gradients = [torch.autograd.grad(loss(out), list(layer.parameters()), retain_graph=True)
                         for out in (layer(x), expected)]
            torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)


def test_packed_weights_follow_the_weights(products):
    """Sampling after an update samples from the new weights."""
    layer, x = Linear(24, 40), torch.randn(2, 24)
    for _ in range(2):
        with torch.no_grad():
            layer.weight.add_(1)
            with packed_weights(layer):
                torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias),
                                           rtol=0, atol=1e-5)


def test_a_loaded_model_gets_the_faster_products_and_keeps_its_names():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2, bias=False))
    names = list(model.state_dict())
    assert [type(layer) for layer in use_onednn(model)] == [Linear, torch.nn.GELU, Linear]
    assert list(model.state_dict()) == names and all(layer.packed is None for layer in (model[0], model[2]))

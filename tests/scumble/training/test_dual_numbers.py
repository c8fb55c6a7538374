"""Forward-mode scores are the derivatives that torch computes otherwise."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from scumble.evaluation.published_defenses import grad2_scores
from scumble.training.dual_numbers import WithScores, fused
from scumble.training.nets import Normalize, Residual, conv, small_cnn

pytestmark = pytest.mark.torch


def lively(net):
    """With batch norms that do something."""
    torch.manual_seed(3)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor, 0.2, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return net.double().eval()


def flat_net():
    return nn.Sequential(
        Normalize([0.4, 0.5], [0.2, 0.3]),
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 5, (3, 2), padding=(1, 0), dilation=(1, 2)),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(5 * 4, 7),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    ).double()


def linear_net():
    return nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(2 * 10 * 11, 4)).double()


def surrogate_net():
    return fused(lively(nn.Sequential(Normalize([0.4, 0.5], [0.2, 0.3]), small_cnn(2, 6))))


@pytest.mark.filterwarnings("ignore:.*jit.script.*:FutureWarning")  # torch's own, in its jvp
@pytest.mark.parametrize("make", [flat_net, linear_net, surrogate_net])
def test_scores_are_the_directional_derivative(make):
    torch.manual_seed(0)
    net = make()
    x = torch.rand(5, 2, 10, 11, dtype=torch.float64)
    logits, scores = WithScores(net)(x)
    torch.testing.assert_close(logits, net(x))

    parameters = {k: v.detach() for k, v in net.named_parameters()}
    ones = {k: torch.ones_like(v) for k, v in parameters.items()}
    _, forward = jvp(lambda p: functional_call(net, p, (x,)).log_softmax(1), (parameters,), (ones,))
    torch.testing.assert_close(scores, forward, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores, grad2_scores(net, x), rtol=1e-9, atol=1e-9)
    # By the definition: one backward pass per image and class.
    gradients = torch.autograd.grad(net(x)[2].log_softmax(0)[1], list(net.parameters()))
    assert scores[2, 1].item() == pytest.approx(sum(g.sum().item() for g in gradients), rel=1e-9)


def test_fused_is_the_same_function_in_one_row_of_layers():
    net = lively(nn.Sequential(conv(3, 5), conv(5, 6, stride=2), nn.Flatten(), nn.Linear(96, 4)))
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    flat = fused(net)
    assert [type(layer).__name__ for layer in flat] == [
        "Conv2d", "ReLU", "Conv2d", "ReLU", "Flatten", "Linear",
    ]  # fmt: skip
    torch.testing.assert_close(flat(x), net(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(3),
        nn.MaxPool2d(2, stride=1),
        nn.AdaptiveMaxPool2d(2),
        nn.BatchNorm2d(4),
        nn.Conv2d(2, 2, 3, groups=2),
        Residual(nn.Conv2d(2, 2, 1)),
        nn.Tanh(),
    ],
    ids=lambda layer: repr(layer)[:35],
)
def test_a_layer_without_a_known_tangent_is_refused(layer):
    with pytest.raises(TypeError, match=f"no tangent is known of {type(layer).__name__}"):
        WithScores(nn.Sequential(layer))

"""The service's fast forms give what the published forms give."""

import numpy as np
import pytest
import torch
from torch import nn

from scumble.defenses import make
from scumble.evaluation.published_defenses import grad2_reference, grad2_scores, mad_reference
from scumble.training.dual_numbers import WithScores

pytestmark = pytest.mark.torch

CLASSES = 6


class Surrogate:
    """A torch network in the place of a bundle's file."""

    def __init__(self, net):
        self.net = net

    @torch.no_grad()
    def __call__(self, images):
        logits, scores = WithScores(self.net)(torch.from_numpy(images))
        return {"probabilities": logits.softmax(1), "scores": scores}

    def auxiliary(self, file, output):
        assert file == "surrogate.onnx"
        return lambda images: self(images)[output].numpy()


@pytest.fixture(params=range(4))
def case(request):
    """(net, x, p): a surrogate, images, and rows of a victim that differs from it."""
    torch.manual_seed(request.param)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(5, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    ).double()
    x = torch.rand(9, 2, 8, 8, dtype=torch.float64)
    p = (2 * net(x) + torch.randn(9, CLASSES)).softmax(1).detach()
    return net, x, p


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "reference"), [("mad", mad_reference), ("grad2", grad2_reference)]
)
def test_fast_form_equals_the_published_form(case, name, reference, epsilon):
    net, x, p = case
    y = make(name, epsilon=epsilon, bundle=Surrogate(net))(p.numpy(), x.numpy())
    np.testing.assert_allclose(y, reference(net, x, p, epsilon).detach(), rtol=0, atol=1e-9)
    l1 = abs(y - p.numpy()).sum(1)
    assert (l1 <= epsilon + 1e-9).all()


def test_scores_are_the_gradients_of_each_image_and_class(case):
    net, x, _ = case
    scores = grad2_scores(net, x)
    for i in (0, 8):
        for k in range(CLASSES):
            parts = torch.autograd.grad(net(x[i : i + 1]).log_softmax(1)[0, k], net.parameters())
            total = sum(part.sum().item() for part in parts)
            assert scores[i, k].item() == pytest.approx(total, rel=1e-9, abs=1e-9)

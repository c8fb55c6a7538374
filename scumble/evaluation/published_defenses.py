"""MAD and GRAD² as their papers compute them: by backpropagation through a surrogate in torch.

The service computes the same answers without a gradient (`scumble/defenses/mad.py`,
`scumble/defenses/grad2.py`). These forms are what it is compared with, in tests for the values and
in benchmarks for the time: they cost what the published defenses cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Reference = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
"""(net, x, p, epsilon) -> y: surrogate, images (N, ...), clean rows (N, K), L1 bound."""


def mad_reference(net: nn.Module, x: Tensor, p: Tensor, epsilon: float) -> Tensor:
    """MAD with the one-hot oracle on the gradient of the last linear layer.

    K + 1 backward passes per image, one image at a time. Source: see `scumble/defenses/mad.py`.
    """
    last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    parameters = list(last.parameters())

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    answers = []
    for image, clean in zip(x, p, strict=True):
        likelihood = net(image[None])[0].log_softmax(0)
        honest = gradient((clean * likelihood).sum())
        angles = [1 - torch.cosine_similarity(gradient(one), honest, dim=0) for one in likelihood]
        k = max(range(len(angles)), key=lambda i: (angles[i].item(), i))  # the last on ties
        target = torch.zeros_like(clean)
        target[k] = 1
        distance = (clean - target).abs().sum().item()
        t = 1.0 if distance <= epsilon else epsilon / distance
        answers.append((1 - t) * clean + t * target)
    return torch.stack(answers)


def grad2_scores(net: nn.Module, x: Tensor) -> Tensor:
    """<d log softmax_k / d theta, 1> (N, K) over all parameters theta, by backpropagating twice.

    With weights w on the log-likelihoods, the inner product of their gradient and the direction is
    linear in w; its derivative with respect to w is the scores.
    """
    likelihood = net(x).log_softmax(1)
    weights = torch.zeros_like(likelihood, requires_grad=True)
    gradients = torch.autograd.grad(
        (weights * likelihood).sum(), list(net.parameters()), create_graph=True
    )
    inner = torch.stack([gradient.sum() for gradient in gradients]).sum()
    return torch.autograd.grad(inner, weights)[0]


def grad2_reference(net: nn.Module, x: Tensor, p: Tensor, epsilon: float) -> Tensor:
    """GRAD² along the all-ones direction, the exchange done class by class.

    Source: see `scumble/defenses/grad2.py`.
    """
    answers = []
    for clean, scores in zip(p, grad2_scores(net, x), strict=True):
        row, order = clean.tolist(), scores.argsort(stable=True).tolist()
        best = int(scores.argmax())
        give = min(1 - row[best], epsilon / 2)
        wanted = give
        for k in order:
            if k == best:
                continue
            taken = min(row[k], wanted)
            row[k] -= taken
            wanted -= taken
        row[best] += give - wanted
        y = torch.tensor(row, dtype=clean.dtype).clamp(1e-15, 1)
        answers.append(y / y.sum())
    return torch.stack(answers)

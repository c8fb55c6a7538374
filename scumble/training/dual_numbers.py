"""How a network's log-probabilities move when all its parameters grow alike: forward mode.

The GRAD² defense ranks the classes of an image by

    score_k = <d log softmax_k / d theta, 1>,

the directional derivative along the all-ones vector over all parameters theta. The usual way is to
backpropagate twice. One pass of dual numbers gives the same for all classes and images at once:
beside every value goes its derivative along that direction.

    layer              value            tangent
    W x + b            W x + b          W x' + 1 x + 1      (1 x: the layer with all weights 1)
    ReLU               max(x, 0)        x' where x > 0, else 0
    mean, flatten      the same map of both
    max over pixels    the maximum      x' where the (first) maximum is
    z -> log softmax                    z'_k - sum_j softmax_j(z) z'_j

The input and constants (`Normalize`) have no tangent. Being made of ordinary layers, the pass
exports to ONNX, so that a service computes scores without torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scumble.training.nets import Normalize

LINEAR_MAPS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Flatten, nn.Identity)


class WithScores(nn.Module):
    """A sequence of layers that gives (logits (N, K), scores (N, K)) instead of logits alone.

    Attributes:
        net: the layers; it shares its parameters.

    Raises:
        TypeError: a layer whose tangent is not known here.
    """

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        for layer in net:
            if not _known(layer):
                raise TypeError(f"no tangent is known of {layer}")
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moved: Tensor | None = None  # nothing has moved before the first layer with parameters
        for layer in self.net:
            x, moved = _step(layer, x, moved)
        assert moved is not None  # noqa: S101 - a network without parameters has no scores
        return x, moved - (x.softmax(1) * moved).sum(1, keepdim=True)


def _known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    if isinstance(layer, nn.AdaptiveMaxPool2d):
        return layer.output_size == 1 and not layer.return_indices
    if isinstance(layer, nn.MaxPool2d):
        return repr(layer) == repr(nn.MaxPool2d(2)) and not layer.return_indices
    return isinstance(layer, (Normalize, nn.Linear, nn.ReLU, *LINEAR_MAPS))


def _step(layer: nn.Module, x: Tensor, moved: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(value, tangent) behind one layer."""
    if isinstance(layer, nn.Conv2d):
        # With all weights 1 every output channel is the same: one is computed, and broadcast.
        ones = torch.ones_like(layer.weight[:1])
        one = None if layer.bias is None else torch.ones_like(layer.bias[:1])
        grown = _convolve(layer, x, ones, one)
        through = None if moved is None else _convolve(layer, moved, layer.weight, None)
    elif isinstance(layer, nn.Linear):
        grown = x.sum(1, keepdim=True) + float(layer.bias is not None)
        through = None if moved is None else F.linear(moved, layer.weight)
    elif isinstance(layer, nn.ReLU):
        return layer(x), None if moved is None else torch.where(x > 0, moved, 0.0)
    elif isinstance(layer, nn.MaxPool2d):
        return layer(x), None if moved is None else _pooled(layer(x), x, moved)
    elif isinstance(layer, nn.AdaptiveMaxPool2d):
        at = x.flatten(2).argmax(2, keepdim=True)
        return layer(x), None if moved is None else moved.flatten(2).gather(2, at)[..., None]
    else:
        still = moved is None or isinstance(layer, Normalize)
        return layer(x), None if still else layer(moved)
    out: Tensor = layer(x)
    return out, grown.expand_as(out) if through is None else through + grown


def _convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def _pooled(largest: Tensor, x: Tensor, moved: Tensor) -> Tensor:
    """The tangent behind a 2x2 max-pool, by comparison: indices of a max-pool export badly."""
    height, width = (2 * side for side in largest.shape[2:])
    corners = [(slice(i, height, 2), slice(j, width, 2)) for i in (0, 1) for j in (0, 1)]
    first, *others = [(x[:, :, i, j], moved[:, :, i, j]) for i, j in corners][::-1]
    out = first[1]  # the last corner, unless an earlier one is the largest
    for value, tangent in others:
        out = torch.where(value == largest, tangent, out)
    return out


def fused(net: nn.Module) -> nn.Sequential:
    """The same function as one flat sequence, each batch norm folded into the convolution before.

    Args:
        net: nested sequences of layers, in eval mode.
    """
    layers: list[nn.Module] = []
    for layer in (m for m in net.modules() if not list(m.children())):
        if isinstance(layer, nn.BatchNorm2d) and layers and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(True)

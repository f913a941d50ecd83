"""A warm start: the weights of a float ONNX file, as `tools.training.export` writes it, read back into the network.

The file holds convolutions with their batch norms folded in. Each norm is put back with the mean and variance that its
convolution shows on training tiles, so that the network computes what the file computes and trains on. A network may be
deeper than the file, or have a trunk beside it: what the file lacks begins by changing nothing.
"""

# torch is read as if it were absent (pyproject.toml).
# mypy: disable-error-code="misc, no-any-return"

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from agent.errors import AgentError
from agent.redaction.manifest import read_manifest
from tools.training.efficientnet import trunk
from tools.training.export import rgb_from_ycc
from tools.training.layers import INPUT, Conv
from tools.training.network import Network, folded
from tools.training.plan import beside_layers, head_names


class StartError(AgentError, ValueError):
    """A file whose weights do not fit the network: says which file and which tensor."""


def weights_in(manifest: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a manifest's float ONNX file, by name; borrowed weights as numbers where it has their steps."""
    model = onnx.load(manifest.parent / read_manifest(manifest).model)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in [f"{layer.name}.w" for layer in trunk()]:
        if f"{name}.q" in found:
            found[name] = np.asarray(found[f"{name}.q"] * found[f"{name}.scale"][:, None, None, None], np.float32)
    return found


def holds_borrowed(manifest: Path) -> bool:
    """Whether a float file has a borrowed trunk beside its own."""
    return f"{trunk()[0].name}.w" in weights_in(manifest)


def _folded_in(manifest: Path, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of the network's convolutions as a file has them, for the RGB that training has.

    What is made of the borrowed trunk may be missing, and stays as it is.
    """
    weights = weights_in(manifest)
    if read_manifest(manifest).input.colour == "YCbCr":
        weights = _for_rgb(weights, network)
    found = {}
    beside = {layer.name for layer in beside_layers(network.shape)}
    for layer in network.layers:
        if not isinstance(layer, Conv) or (layer.name in beside and f"{layer.name}.w" not in weights):
            continue
        name, module = layer.name, network.convs[layer.name]
        if f"{name}.w" not in weights and layer.deepens:
            found[name] = _unchanging(module.conv)
            continue
        weight, bias = (_tensor(weights, f"{name}.{part}", manifest) for part in "wb")
        if name in head_names():  # may have more inputs than the file's, which begin unheard
            weight = functional.pad(weight, (0, 0, 0, 0, 0, module.conv.in_channels - weight.shape[1]))
        if module.conv.weight.shape != weight.shape:
            message = f"{manifest}: {name}.w is {tuple(weight.shape)}, wanted {tuple(module.conv.weight.shape)}"
            raise StartError(message)
        found[name] = weight, bias
    return found


def _unchanging(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias that hand on what comes, for a convolution that a shallower file does not have.

    What comes has been through a ReLU, so another one changes nothing either (Net2DeeperNet, arXiv 1511.05641).
    """
    weight = torch.zeros_like(conv.weight)
    nn.init.dirac_(weight)
    return weight, torch.zeros(conv.out_channels)


def _for_rgb(weights: dict[str, NDArray[np.float32]], network: Network) -> dict[str, NDArray[np.float32]]:
    """The weights with those of the convolutions that look at the picture as training has them."""
    changed = dict(weights)
    for layer in network.layers:
        names = f"{layer.name}.w", f"{layer.name}.b"
        if isinstance(layer, Conv) and layer.source == INPUT and weights.keys() >= set(names):
            changed |= zip(names, rgb_from_ycc((weights[names[0]], weights[names[1]])), strict=True)
    return changed


def start_from(network: Network, manifest: Path, batches: Iterable[NDArray[np.uint8]]) -> None:
    """Give the network a file's weights; `batches` (B, H, W, 3) RGB are what the norms are measured on."""
    fresh = {name: float(module.conv.weight.detach().std()) for name, module in network.convs.items()}
    found = _folded_in(manifest, network)
    for name, (weight, bias) in found.items():
        _put(network.convs[name], weight, bias)
    for name, (mean, variance) in _measured(network, batches).items():
        if name in found:
            _refer(network.convs[name], mean, variance, fresh[name])


def mean_with(network: Network, manifest: Path) -> None:
    """Give a network that is no longer trained the mean of its own weights and a file's, from which its run began.

    Such means find more than either end of the way between them (arXiv 2203.05482). A layer that the file lacks stays
    as it is; an input of a head that it lacks counts as zeros there.
    """
    own = folded(network)
    for name, parts in _folded_in(manifest, network).items():
        _put(network.convs[name], *((one + other) / 2 for one, other in zip(own[name], parts, strict=True)))


def _tensor(weights: Mapping[str, NDArray[np.float32]], name: str, manifest: Path) -> Tensor:
    if name not in weights:
        message = f"{manifest}: no tensor {name}, wanted a float file written by residency-tools train ship"
        raise StartError(message)
    return torch.from_numpy(weights[name].copy())


def _put(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """The folded convolution as it is, with a norm that only adds the bias."""
    with torch.no_grad():
        module.conv.weight.copy_(weight)
        norm = getattr(module, "norm", None)
        (module.conv if norm is None else norm).bias.copy_(bias)
        if norm is not None:
            norm.weight.fill_(1.0)
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0 - norm.eps)


def _measured(network: Network, batches: Iterable[NDArray[np.uint8]]) -> dict[str, tuple[Tensor, Tensor]]:
    """(mean, variance) of each channel that a norm receives, by layer name."""
    seen: dict[str, list[Tensor]] = {name: [] for name, module in network.convs.items() if hasattr(module, "norm")}
    hooks = [
        network.convs[name].conv.register_forward_hook(lambda _, __, value, kept=kept: kept.append(_moments(value)))
        for name, kept in seen.items()
    ]
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    with torch.no_grad():
        for pixels in batches:
            network(torch.as_tensor(pixels).to(device).permute(0, 3, 1, 2).float().div(255))
    network.train(training)
    for hook in hooks:
        hook.remove()
    means = {name: torch.stack(kept).mean(0) for name, kept in seen.items()}
    return {name: (first, second - first**2) for name, (first, second) in means.items()}


def _moments(value: Tensor) -> Tensor:
    """Mean and mean square (2, C) of (B, C, H, W)."""
    return torch.stack([value.mean((0, 2, 3)), (value**2).mean((0, 2, 3))])


def _refer(module: nn.Module, mean: Tensor, variance: Tensor, spread: float) -> None:
    """Let the norm do what it did not have to, with kernels as wide as fresh ones: a norm makes their width free."""
    with torch.no_grad():
        norm, weight = module.norm, module.conv.weight
        gain = spread / float(weight.std())
        weight.mul_(gain)
        norm.running_mean.copy_(mean * gain)
        norm.running_var.copy_(variance.clamp(min=0) * gain**2)
        norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps) / gain)
        norm.bias.add_(mean)

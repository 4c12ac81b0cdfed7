"""The same models and steps in PyTorch, with pytorch_optimizer's SAMs."""

from collections.abc import Callable
import itertools
import math
from typing import Any

import numpy as np
import pytorch_optimizer
import steps as steps_lib
import torch
from torch import nn
import workloads


def mlp() -> nn.Module:
  """The perceptron of :func:`workloads.mlp`."""
  layers: list[nn.Module] = []
  for fan_in, fan_out in itertools.pairwise(workloads.MLP_LAYERS):
    layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
  return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
  """The convolutional network of :func:`workloads.cnn`."""
  layers: list[nn.Module] = []
  for (fan_in, out), stride in zip(
    itertools.pairwise(workloads.CNN_CHANNELS),
    workloads.CNN_STRIDES,
    strict=True,
  ):
    layers += [nn.Conv2d(fan_in, out, 3, stride, padding=1), nn.ReLU()]
  side = workloads.IMAGE[0] // math.prod(workloads.CNN_STRIDES)
  features = workloads.CNN_CHANNELS[-1] * side**2
  return nn.Sequential(
    *layers, nn.Flatten(), nn.Linear(features, workloads.CLASSES)
  )


class Transformer(nn.Module):
  """The blocks of :func:`workloads.transformer`."""

  def __init__(self):
    """Builds the layers."""
    super().__init__()
    width = workloads.WIDTH
    self.tokens = nn.Embedding(workloads.VOCABULARY, width)
    self.positions = nn.Parameter(0.02 * torch.randn(workloads.LENGTH, width))
    self.blocks = nn.ModuleList(
      nn.ModuleDict(
        {
          "norm_1": nn.LayerNorm(width, bias=False),
          "qkv": nn.Linear(width, 3 * width, bias=False),
          "out": nn.Linear(width, width, bias=False),
          "norm_2": nn.LayerNorm(width, bias=False),
          "up": nn.Linear(width, 4 * width, bias=False),
          "down": nn.Linear(4 * width, width, bias=False),
        }
      )
      for _ in range(workloads.DEPTH)
    )

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, vocabulary, T]`` of the next token."""
    x = self.tokens(tokens) + self.positions
    for block in self.blocks:
      heads = (*x.shape[:2], workloads.HEADS, -1)
      q, k, v = (
        y.view(heads).transpose(1, 2)
        for y in block["qkv"](block["norm_1"](x)).chunk(3, dim=-1)
      )
      y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + block["out"](y.transpose(1, 2).reshape(x.shape))
      x = x + block["down"](torch.relu(block["up"](block["norm_2"](x))))
    return (x @ self.tokens.weight.T).transpose(1, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
  "mlp": mlp,
  "cnn": cnn,
  "transformer": Transformer,
}
OPTIMIZERS: dict[str, tuple[str | None, dict[str, Any]]] = {
  "torch SGD": (None, {}),
  "pytorch_optimizer SAM": ("SAM", {}),
  "pytorch_optimizer FriendlySAM": ("FriendlySAM", {}),
  "pytorch_optimizer FriendlySAM, foreach": ("FriendlySAM", {"foreach": True}),
}


def steps(
  workload: str, batch: tuple[np.ndarray, ...]
) -> dict[str, Callable[[int], None]]:
  """Functions by name that take so many steps on one batch, to their end.

  The batch is the workload's, of images with their channels last.
  """
  return {name: _step(workload, name, batch) for name in OPTIMIZERS}


def _step(workload, optimizer, batch):
  torch.manual_seed(0)
  model = MODELS[workload]()
  inputs, labels = (torch.as_tensor(x) for x in batch)
  if workload == "cnn":
    inputs = inputs.permute(0, 3, 1, 2).contiguous()
  labels = labels.long()
  inputs = inputs.long() if workload == "transformer" else inputs
  name, options = OPTIMIZERS[optimizer]
  base = {"lr": steps_lib.LEARNING_RATE, "momentum": steps_lib.MOMENTUM}
  if name is None:
    chosen = torch.optim.SGD(model.parameters(), **base)
  else:
    chosen = getattr(pytorch_optimizer, name)(
      model.parameters(), torch.optim.SGD, rho=steps_lib.RHO, **options, **base
    )

  def closure():
    chosen.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss

  def take(steps):
    for _ in range(steps):
      closure()
      chosen.step() if name is None else chosen.step(closure)

  return take

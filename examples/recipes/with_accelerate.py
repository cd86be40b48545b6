"""Accelerate: `fuse_` in front of `prepare`, which wraps the model in DDP or FSDP and casts for mixed precision."""

import torch
from accelerate import Accelerator
from torch import nn

import fusedres


def train(model, loader, epochs, **accelerator):
    accelerator = Accelerator(**accelerator)
    fusedres.fuse_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()

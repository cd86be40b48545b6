"""Lightning: `fuse_` in `__init__`; checkpoints, callbacks and strategies find the names that they know."""

import lightning.pytorch as pl
import torch
from torch import nn

import fusedres


class Classifier(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        fusedres.fuse_(self.model)

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def train(model, loader, epochs, **trainer):
    pl.Trainer(max_epochs=epochs, **trainer).fit(Classifier(model), loader)

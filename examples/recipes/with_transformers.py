"""Hugging Face: `fuse_` in front of `Trainer`; `save_pretrained` writes the plain model's names."""

from transformers import Trainer, TrainingArguments

import fusedres


def train(model, rows, **arguments):
    """rows: {"pixel_values": [C, H, W], "labels": number} each."""
    fusedres.fuse_(model)
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=rows)
    trainer.train()
    return trainer

"""examples/recipes: each trains a fused model as its framework trains the plain one.

Each runs in a process of its own, which may warn of what it likes; the plain training is the same one with the backend
`off`, where fused blocks run their own forward.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"

BOTH = """
import sys
import torch, fusedres
from torch.utils.data import DataLoader, TensorDataset

images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 5, (8,))
def batches():
    return DataLoader(TensorDataset(images, labels), batch_size=4)

def compare(make, train):
    ends = []
    for backend in ("off", "aten"):
        torch.manual_seed(0)
        model = make()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with fusedres.backend(backend):
            train(model)
        assert fusedres.is_fused(model)
        ends.append(model.state_dict())
    assert any(not torch.equal(before[name], tensor) for name, tensor in ends[0].items())
    for name, plain in ends[0].items():
        torch.testing.assert_close(ends[1][name], plain, rtol=1e-5, atol=1e-6, msg=name)
    print("alike")
"""
SMALL = """
import timm
def make():
    return timm.create_model("test_resnet", num_classes=5)
"""
LIGHTNING = """
import with_lightning as recipe
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
compare(make, lambda model: recipe.train(model, batches(), 2, default_root_dir=sys.argv[1], **quiet))
"""
ACCELERATE = """
import with_accelerate as recipe
how = {"cpu": True, "gradient_accumulation_steps": 2}
compare(make, lambda model: recipe.train(model, batches(), 2, **how))
"""
TRANSFORMERS = """
import with_transformers as recipe
from transformers import ResNetConfig, ResNetForImageClassification
config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]
how = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "save_strategy": "no"}
compare(
    lambda: ResNetForImageClassification(config),
    lambda model: recipe.train(model, rows, output_dir=sys.argv[1], seed=0, disable_tqdm=True, **how),
)
"""
# What timm's script says where it makes its model.
SCRIPT = """
import sys
import fusedres
from timm.models import create_model, safe_model_name
model = create_model(sys.argv[1], num_classes=5)
print("alike" if fusedres.is_fused(model) else "plain")
"""


def run(tmp_path, *command: str, **environment: str) -> str:
    path = os.pathsep.join(filter(None, [str(RECIPES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env=os.environ | {"PYTHONPATH": path, **environment},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(SMALL + ACCELERATE, id="accelerate"),
        pytest.param(SMALL + LIGHTNING, id="lightning", marks=pytest.mark.slow),
        pytest.param(TRANSFORMERS, id="transformers", marks=pytest.mark.slow),
    ],
)
@pytest.mark.composes("Lightning, Hugging Face Trainer, Accelerate", "works")
def test_a_framework_trains_the_fused_model_as_the_plain_one(recipe, tmp_path):
    assert run(tmp_path, "-c", BOTH + recipe, str(tmp_path)) == "alike"


def test_the_recipe_for_timm_hands_its_script_a_fused_model(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    recipe = str(RECIPES / "timm_train.py")
    assert run(tmp_path, recipe, "test_resnet", TIMM=str(tmp_path)) == "alike"

"""timm's own train.py with its own arguments, its models fused:

TIMM=/path/to/pytorch-image-models python timm_train.py --data-dir PATH --model resnet50d ...

In a copy of it these are two lines: `import fusedres`, and `fusedres.fuse_(model)` behind `model = create_model(...)`.
"""

import os
import runpy
import sys

import timm.models

import fusedres

create_model = timm.models.create_model


def create_fused(*arguments, **options):
    model = create_model(*arguments, **options)
    fusedres.fuse_(model)
    return model


timm.models.create_model = create_fused  # train.py imports it from there
sys.path.insert(0, os.environ["TIMM"])
runpy.run_path(os.path.join(os.environ["TIMM"], "train.py"), run_name="__main__")

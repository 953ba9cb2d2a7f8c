"""Compress timm and torchvision networks to a budget with Tucker-2 decompositions.

```python
import timm, batude_fx

model = timm.create_model("resnet50", pretrained=True)
small = batude_fx.compress(model, 0.5)  # the same class, half of the flops
```
"""

from batude_fx.budget import Budget
from batude_fx.compression import Plan, compress, plan
from batude_fx.discovery import discover
from batude_fx.errors import (
    BatudeError,
    BudgetError,
    CalibrationError,
    DiscoveryError,
    ExportError,
    RecipeError,
    SavedModelError,
    SelectionError,
    TrainingError,
    UnsupportedError,
)
from batude_fx.exporting import export
from batude_fx.folding import fold
from batude_fx.handlers import Handler, register
from batude_fx.plugin import create
from batude_fx.recipe import Recipe
from batude_fx.serialization import load, save
from batude_fx.sites import ConvSite, Ranks
from batude_fx.training import run

__version__ = "0.1.0"

__all__ = [
    "BatudeError",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "ConvSite",
    "DiscoveryError",
    "ExportError",
    "Handler",
    "Plan",
    "Ranks",
    "Recipe",
    "RecipeError",
    "SavedModelError",
    "SelectionError",
    "TrainingError",
    "UnsupportedError",
    "compress",
    "create",
    "discover",
    "export",
    "fold",
    "load",
    "plan",
    "register",
    "run",
    "save",
]

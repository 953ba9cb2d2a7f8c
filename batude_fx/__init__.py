"""Compress timm and torchvision networks to a budget by Tucker-2 decompositions of their convolutions.

```python
import timm, batude_fx

model = timm.create_model("resnet50", pretrained=True)
small = batude_fx.compress(model, 0.5)  # the same class, half of the flops
```
"""

from batude_fx.budget.budget import Budget
from batude_fx.compression.plan import Plan
from batude_fx.compression.planning import compress, plan
from batude_fx.deploy.export import export
from batude_fx.deploy.fold import fold
from batude_fx.errors import (
    BatudeError,
    BudgetError,
    CalibrationError,
    DiscoveryError,
    ExportError,
    QualityWarning,
    RecipeError,
    SavedModelError,
    SelectionError,
    TrainingError,
    UnsupportedError,
)
from batude_fx.graph.discovery import discover
from batude_fx.graph.sites import ConvSite
from batude_fx.saving.saved_folder import load, save
from batude_fx.training.recipe import Recipe
from batude_fx.training.run import run
from batude_fx.tucker.dense_layers import Handler, register
from batude_fx.tucker.ranks import Ranks
from batude_fx.zoo import cifar, timm_plugin  # noqa: F401 - the imports register networks
from batude_fx.zoo.create import create

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


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
    "QualityWarning",
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

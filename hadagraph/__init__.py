"""hadagraph: a torch.compile backend that trains models in 8 bit at the same loss.

torch.compile(model, backend="hadagraph")
"""

from hadagraph.config import Config
from hadagraph.explanation import Explanation, explain, measure_sqnr
from hadagraph.formats import FORMATS
from hadagraph.measurement import measure_device
from hadagraph.plan import Plan
from hadagraph.recipes import RECIPES
from hadagraph.reports import report, reset_report
from hadagraph.rotation import Rotation

__all__ = [
    "FORMATS",
    "RECIPES",
    "Config",
    "Explanation",
    "Plan",
    "Rotation",
    "explain",
    "measure_device",
    "measure_sqnr",
    "report",
    "reset_report",
]
__version__ = "0.1.0"

"""hadagraph: a torch.compile backend that trains models in 8 bit at the same loss.

torch.compile(model, backend="hadagraph")
"""

from hadagraph.calibration import calibrate
from hadagraph.config import Config
from hadagraph.explanation import Explanation, explain, measure_sqnr
from hadagraph.formats import FORMATS
from hadagraph.measurement import measure_device
from hadagraph.observation import last_profile
from hadagraph.plan import Plan
from hadagraph.profile import Profile
from hadagraph.recipes import RECIPES
from hadagraph.reports import report, reset_report
from hadagraph.rotation import Rotation

__all__ = [
    "FORMATS",
    "RECIPES",
    "Config",
    "Explanation",
    "Plan",
    "Profile",
    "Rotation",
    "calibrate",
    "explain",
    "last_profile",
    "measure_device",
    "measure_sqnr",
    "report",
    "reset_report",
]
__version__ = "0.1.0"

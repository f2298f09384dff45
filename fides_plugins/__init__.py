"""Check the answers of machine-learning services that run on machines you don't control."""

from fides_plugins.errors import (
    BundleError,
    FidesError,
    InputError,
    PluginError,
    ServerError,
    SettingsError,
    TrainingError,
)
from fides_plugins.hookspecs import hookimpl
from fides_plugins.types import (
    Detection,
    Prediction,
    Query,
    Reclassification,
    Status,
    Verdict,
    Verification,
)

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "Detection",
    "FidesError",
    "InputError",
    "PluginError",
    "Prediction",
    "Query",
    "Reclassification",
    "ServerError",
    "SettingsError",
    "Status",
    "TrainingError",
    "Verdict",
    "Verification",
    "__version__",
    "hookimpl",
]

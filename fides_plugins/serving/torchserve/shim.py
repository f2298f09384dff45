"""TorchServe handler that protects another one; goes into a model archive as it is.

    torch-model-archiver --handler handlers/fides_handler.py --config-file model-config.yaml \
        --extra-files bundle,my_handler.py ...

Configuration is the section `fides:` of model-config.yaml; see docs/how-to/torchserve.md.
"""

import os
import sys

_VENDOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fides_vendor")
if os.path.isdir(_VENDOR):
    # The vendored package wins over an installed one; its dependencies only fill gaps, because a second
    # copy of what torch uses (typing_extensions) could break the worker.
    sys.path.insert(0, os.path.join(_VENDOR, "package"))
    sys.path.append(os.path.join(_VENDOR, "dependencies"))

try:
    from fides_plugins.serving.torchserve import handler as _handler
except ImportError as error:
    remedy = "Install fides-plugins there, or attach again with --vendor."
    if os.path.isdir(_VENDOR):
        with open(os.path.join(_VENDOR, "TAG"), encoding="utf-8") as stream:
            remedy = f"The vendored copy is for {stream.read().strip()}; attach with that server's Python."
    # Not an ImportError: TorchServe would then look for a built-in handler and report that instead.
    raise RuntimeError(
        f"The worker's Python {sys.version.split()[0]} cannot import Fides: {error}. {remedy}"
    ) from error


class FidesHandler(_handler.FidesHandler):
    """TorchServe takes the only class that this module defines."""

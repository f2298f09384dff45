"""Torch modules that somebody else made: a factory by its name, a TorchScript file, weights. Never a pickle."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

from fides_plugins.errors import TrainingError


def load_factory(spec: str) -> nn.Module:
    """Call `package.module:factory` and return the torch module it makes. The working folder is searched too.

    Raises
    ------
    TrainingError
        If the module or the function is not there, or what it returns is no torch module.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise TrainingError(f"{spec!r} is not of the form package.module:factory.")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise TrainingError(f"{module_name} cannot be imported: {error}.", "Check the name and the folder.") from error
    except AttributeError as error:
        raise TrainingError(f"{module_name} has no {attribute!r}.", "Check the name of the factory.") from error
    finally:
        sys.path.remove(folder)
    try:
        module = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:  # somebody else's code: whatever it raises, this factory cannot be used
        raise TrainingError(
            f"{spec} failed: {type(error).__name__}: {error}.", "Call it yourself to see why."
        ) from error
    if not isinstance(module, nn.Module):
        raise TrainingError(f"{spec} gives a {type(module).__name__}, not a torch module.")
    return module


def load_torchscript(path: Path) -> nn.Module:
    """Load a TorchScript file.

    Raises
    ------
    TrainingError
        If it is none.
    """
    try:
        module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"{path.name} is not a TorchScript file.", "Save it with torch.jit.save.") from error
    return module


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a ``.safetensors`` state dict; pickled files are refused.

    Raises
    ------
    TrainingError
        If the file is of another kind, or its names or shapes do not fit the module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise TrainingError(
            f"{path.name} is not a .safetensors file; pickled state dicts can run code and are refused.",
            "Convert it where you trust it: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors').",
        )
    try:
        state = load_file(str(path))
        module.load_state_dict(state)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path.name} cannot be read: {error}.") from error
    except RuntimeError as error:
        raise TrainingError(f"{path.name} does not fit the student: {error}") from error

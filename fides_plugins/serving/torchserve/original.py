"""Find the handler that an archive had before, and intercept its `inference()`.

TorchServe's own rules are followed: a name is a module in the archive or on the path, else a module of
`ts.torch_handler`; a function of that name (`handle` by default) wins over a class; a class must be the
module's only one. How Fides gets in depends on what is found:

- a class: a subclass with its own `inference()`, made before it is instantiated, so that micro-batching,
  which keeps bound methods, sees it too;
- a function with service objects or classes beside it (`_service = MyHandler()`): their `inference()`
  is replaced where it is looked up;
- a function with a module-level function `inference` beside it: that one is replaced;
- a function alone: nothing can be wrapped; only request and response bodies can be read.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from fides_plugins.errors import SettingsError

#: Given a call of the original `inference()` and the tensor it gets, returns what the caller should get.
Capture = Callable[[Callable[[], Any], Any, "int | None"], Any]
Kind = Literal["class", "service", "function", "body"]

_thread = threading.local()
_BUILT_IN_PACKAGE = "ts.torch_handler"
_REMEDY = "Give `handler` as the archive's manifest had it: a file, `module:function`, or a built-in name."


@dataclass(frozen=True)
class Found:
    """What a handler's name stands for.

    Attributes
    ----------
    kind:
        "class", "service" (a function beside handler objects or classes), "function" (a function beside a
        function `inference`) or "body" (nothing to wrap).
    target:
        The class or the function that TorchServe would call.
    classes, objects:
        Where `inference()` is looked up, for "service".
    """

    kind: Kind
    module: ModuleType
    target: Any
    classes: tuple[type, ...] = ()
    objects: tuple[Any, ...] = ()

    @property
    def description(self) -> str:
        """One line for people."""
        name = getattr(self.target, "__name__", str(self.target))
        how = {
            "class": f"class {name}",
            "service": f"function {name} with a handler object",
            "function": f"function {name} with a function inference",
            "body": f"function {name} without an inference() to wrap",
        }[self.kind]
        return f"{self.module.__name__}: {how}"


@dataclass
class Original:
    """The original handler, ready to be called as TorchServe would."""

    initialize: Callable[[Any], Any]
    handle: Callable[[Any, Any], Any]
    instance: Any = None


def find_handler(spec: str) -> Found:
    """Import a handler and say what it is, without making or calling anything.

    Raises
    ------
    SettingsError
        If there is no such module, function or class, or the module fails to import.
    """
    name, _, attribute = spec.partition(":")
    module = _import(name)
    function = getattr(module, attribute or "handle", None)
    if attribute and function is None:
        raise SettingsError(f"The handler module {module.__name__!r} has no {attribute!r}.", _REMEDY)
    if function is None or inspect.isclass(function):
        return _find_class(module, function)
    if not callable(function):
        raise SettingsError(f"{attribute or 'handle'!r} in {module.__name__!r} cannot be called.", _REMEDY)
    members = [value for key, value in vars(module).items() if not key.startswith("__")]
    classes = tuple(c for c in members if inspect.isclass(c) and callable(getattr(c, "inference", None)))
    objects = tuple(
        o
        for o in members
        if not inspect.isclass(o) and not inspect.ismodule(o) and callable(getattr(type(o), "inference", None))
    )
    if classes or objects:
        return Found("service", module, function, classes, objects)
    if inspect.isfunction(getattr(module, "inference", None)):
        return Found("function", module, function)
    return Found("body", module, function)


def require_wrappable(found: Found) -> None:
    """Check that there is an `inference()` to get in between.

    Raises
    ------
    SettingsError
        If there is none, or it is a static or class method, which has no handler to belong to.
    """
    if found.kind == "body":
        raise SettingsError(
            f"{found.description}: there is nothing to intercept.",
            "Declare `parser` in the section `fides:` to read request and response bodies instead.",
        )
    owners = {found.target} if found.kind == "class" else {*found.classes, *(type(o) for o in found.objects)}
    for cls in owners:
        if isinstance(inspect.getattr_static(cls, "inference", None), (staticmethod, classmethod)):
            raise SettingsError(
                f"{cls.__name__}.inference is a static or class method, which Fides does not wrap.",
                "Make it an ordinary method, or declare a `parser`.",
            )


def protect(found: Found, capture: Capture | None) -> Original:
    """Make the original handler callable, with `capture` around each of its `inference()` calls.

    `capture` None leaves everything as it is, for body-level capture; otherwise the handler has passed
    `require_wrappable`.
    """
    if found.kind == "class":
        handler_class = found.target
        if capture is not None and callable(getattr(handler_class, "inference", None)):
            body = {"__module__": handler_class.__module__, "__qualname__": handler_class.__qualname__}
            body |= _wrapped_methods(handler_class, capture)
            handler_class = type(handler_class)(handler_class.__name__, (handler_class,), body)
        instance = handler_class()
        return Original(instance.initialize, instance.handle, instance)
    if capture is not None:
        # In place, because code looks these names up at call time, and a new class under an old name
        # would break `super(Name, self)`.
        for cls in {*found.classes, *(type(o) for o in found.objects)}:
            for name, method in _wrapped_methods(cls, capture).items():
                setattr(cls, name, method)
        for item in found.objects:
            _renew_micro_batching(item)
        if found.kind == "function":
            inference = found.module.inference
            found.module.inference = _wrapped(inference, capture, is_method=False)  # type: ignore[attr-defined]
    return Original(lambda context: found.target(None, context), found.target)


def _import(name: str) -> ModuleType:
    module_name = (name[:-3] if name.endswith(".py") else name).split("/")[-1]
    for candidate in (module_name, f"{_BUILT_IN_PACKAGE}.{module_name}"):
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            # Only "there is no such module" leads to the next candidate; a package that the handler
            # itself lacks must be named, or people look for the wrong thing.
            if error.name is None or not (candidate == error.name or candidate.startswith(f"{error.name}.")):
                raise SettingsError(
                    f"The handler {module_name!r} cannot be imported: it needs the package {error.name!r}.",
                    "Install it for the interpreter that runs the workers.",
                ) from error
        except Exception as error:  # foreign code may raise anything at import; told in one line
            raise SettingsError(
                f"The handler {module_name!r} cannot be imported: {type(error).__name__}: {error}.",
                "Fix the handler first; TorchServe could not load it either.",
            ) from error
    raise SettingsError(f"There is no handler {module_name!r} in the archive or in {_BUILT_IN_PACKAGE}.", _REMEDY)


def _find_class(module: ModuleType, chosen: Any) -> Found:
    if chosen is None:
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        if len(own) != 1:
            names = ", ".join(sorted(c.__name__ for c in own)) or "none"
            raise SettingsError(
                f"The handler module {module.__name__!r} has no function handle(), and must have exactly one class; "
                f"it has: {names}.",
                "TorchServe would refuse it too; name a class as `module.py:Class`.",
            )
        (chosen,) = own
    missing = [m for m in ("initialize", "handle") if not callable(getattr(chosen, m, None))]
    if missing or inspect.isabstract(chosen):
        what = f"lacks {' and '.join(missing)}" if missing else "is abstract"
        raise SettingsError(f"The handler class {chosen.__name__!r} {what}.", _REMEDY)
    return Found("class" if callable(getattr(chosen, "inference", None)) else "body", module, chosen)


def _wrapped_methods(cls: type, capture: Capture) -> dict[str, Callable[..., Any]]:
    """`inference` with `capture` around it, and `explain_handle`, whose calls of it make explanations, not answers."""
    methods = {"inference": capture, "explain_handle": lambda call, data, micro_batch: call()}
    found = {name: getattr(cls, name, None) for name in methods}
    return {name: _wrapped(method, methods[name]) for name, method in found.items() if callable(method)}


def _wrapped(original: Callable[..., Any], capture: Capture, is_method: bool = True) -> Callable[..., Any]:
    """`original` with `capture` around the outermost of nested calls: `super().inference()` is the same request."""

    @functools.wraps(original)
    def inference(*args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "inside", False):
            return original(*args, **kwargs)
        given = args[1:] if is_method else args
        # The model's input is the first argument, whatever the handler calls it.
        data = given[0] if given else next(iter(kwargs.values()), None)
        _thread.inside = True
        try:
            return capture(lambda: original(*args, **kwargs), data, _micro_batch(args[0]) if is_method else None)
        finally:
            _thread.inside = False

    return inference


def _micro_batch(handler: Any) -> int | None:
    """Index of the micro-batch that this thread works on; None where micro-batching is not in use."""
    for holder in ("handle", "micro_batching", "_micro_batching"):
        index = getattr(getattr(handler, holder, None), "get_micro_batch_idx", None)
        if callable(index):
            value = index()
            return value if isinstance(value, int) else None
    return None


def _renew_micro_batching(handler: Any) -> None:
    """Let a micro-batcher that was made at import look `inference` up again.

    It keeps bound methods in its threads; setting the parallelism to zero and back makes new ones.
    """
    batching = getattr(handler, "handle", None)
    module = sys.modules.get("ts.handler_utils.micro_batching")
    if module is None or not isinstance(batching, module.MicroBatching):
        return
    before = {"inference": 1, **batching.parallelism}["inference"]
    batching.parallelism = {"inference": 0}
    batching.parallelism = {"inference": before}

"""Original handlers found by TorchServe's own rules, and wrapped where their inference() is looked up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fides_plugins.errors import SettingsError
from fides_plugins.serving.torchserve.original import find_handler, protect, require_wrappable

CLASS = """
class Handler:
    def initialize(self, context): self.ready = True
    def inference(self, data): return data + 1
    def handle(self, data, context): return self.inference(data)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Writes a handler module that only this test can import; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def make(source: str) -> str:
        name = f"handler_{abs(hash(request.node.nodeid))}_{len(made)}"
        (tmp_path / f"{name}.py").write_text(source)
        made.append(name)
        return name

    yield make  # type: ignore[misc]
    for name in made:
        sys.modules.pop(name, None)


class Seen(list[Any]):
    """A capture that notes the inputs and multiplies the outputs by ten."""

    def __call__(self, call: Callable[[], Any], data: Any, micro_batch: int | None) -> Any:
        self.append(data)
        return call() * 10


def run(spec: str) -> tuple[Any, Seen, str]:
    seen = Seen()
    found = find_handler(spec)
    require_wrappable(found)
    original = protect(found, seen)
    original.initialize(None)
    return original.handle(5, None), seen, found.kind


KINDS = {
    "class": (CLASS, "", "class"),
    "old-style super": (
        CLASS.replace("self.ready = True", "super(Handler, self).__init__()"),
        "",
        "class",
    ),
    "named class": (CLASS + "class Other: ...\n", ":Handler", "class"),
    "service object": (
        CLASS + "_service = Handler()\ndef handle(data, context):\n    return data and _service.inference(data)\n",
        "",
        "service",
    ),
    "object of any name": (
        CLASS + "thing = Handler()\ndef handle(data, context):\n    return data and thing.handle(data, context)\n",
        "",
        "service",
    ),
    "made on first use": (
        CLASS + "made = []\ndef serve(data, context):\n    made or made.append(Handler())\n"
        "    return data and made[0].inference(data=data)\n",
        ":serve",
        "service",
    ),
    "derived calls super": (
        CLASS.replace("class Handler", "class Base")
        + "class Handler(Base):\n    def inference(self, data): return super().inference(data) + 0\n"
        "_service = Handler()\ndef handle(data, context):\n    return data and _service.inference(data)\n",
        "",
        "service",
    ),
    "functions": (
        "def inference(data): return data + 1\ndef handle(data, context):\n    return data and inference(data)\n",
        "",
        "function",
    ),
}


@pytest.mark.parametrize("what", KINDS)
def test_inference_is_seen_once_and_its_answer_replaced(write: Callable[[str], str], what: str) -> None:
    source, suffix, kind = KINDS[what]
    answer, seen, found = run(write(source) + (suffix or ".py"))
    assert (answer, seen, found) == (60, [5], kind)


def test_built_in_handlers_are_found() -> None:
    pytest.importorskip("ts")
    pytest.importorskip("torch")
    found = find_handler("base_handler")
    assert (found.kind, found.target.__name__) == ("class", "BaseHandler")


def test_micro_batching_made_at_import_is_renewed(write: Callable[[str], str]) -> None:
    pytest.importorskip("ts")
    source = """
from types import SimpleNamespace
from ts.handler_utils.micro_batching import MicroBatching

class Handler:
    def __init__(self):
        self.handle = MicroBatching(self, micro_batch_size=2)
    def initialize(self, context): ...
    def preprocess(self, data): return data
    def inference(self, data): return [d + 1 for d in data]
    def postprocess(self, data): return data

_service = Handler()

def handle(data, context):
    return data and _service.handle.handle(data)
"""
    seen: list[tuple[Any, int | None]] = []

    def capture(call: Callable[[], Any], data: Any, micro_batch: int | None) -> Any:
        seen.append((data, micro_batch))
        return call()

    found = find_handler(write(source))
    original = protect(found, capture)
    try:
        assert original.handle([1, 2, 3], None) == [2, 3, 4]
    finally:
        found.objects[0].handle.shutdown()
    assert sorted(seen, key=str) == [([1, 2], 0), ([3], 1)]


BROKEN = {
    "absent": None,
    "no such function": (CLASS, ":serve"),
    "two classes": (CLASS + "class Other: ...\n", ""),
    "abstract": ("import abc\n" + CLASS.replace("Handler:", "Handler(abc.ABC):").replace(
        "    def initialize", "    @abc.abstractmethod\n    def initialize"), ""),
    "not callable": ("handle = 3\n", ""),
    "function alone": ("def handle(data, context): return data\n", ""),
    "class method": (CLASS.replace("    def inference(self", "    @classmethod\n    def inference(cls"), ""),
    "raises": ("raise OSError('no file')\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_wrapped_is_named(write: Callable[[str], str], what: str) -> None:
    case = BROKEN[what]
    spec = "a_module_that_is_not_there" if case is None else write(case[0]) + case[1]
    with pytest.raises(SettingsError) as caught:
        require_wrappable(find_handler(spec))
    assert caught.value.remedy

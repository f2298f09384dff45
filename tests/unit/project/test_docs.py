"""The documentation says what the code does: hooks, settings, commands, metrics, examples, links.

The checks are functions of their text, so that the tests at the end can show that each of them fails
when it should.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer
import typer.main
import yaml

from fides_plugins import hookspecs
from fides_plugins.cli import app
from fides_plugins.errors import SettingsError
from fides_plugins.settings import Settings, nest
from tests.support.docs_blocks import Block, blocks, fides_commands, pages
from tests.support.paths import REPOSITORY
from tests.support.plugin_environments import fides_script

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = REPOSITORY / "docs"
HOOKS = {n: f for n, f in vars(hookspecs).items() if n.startswith("fides_") and inspect.isfunction(f)}
SHELLS = ("sh", "bash", "console", "shell", "")
HOOK_SECTIONS = ("Arguments", "Order", "Errors", "Example")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


# --- hooks ---------------------------------------------------------------------------------------------


def hook_page_problems(name: str, function: Callable[..., Any], text: str) -> list[str]:
    """What a hook's page says otherwise than the hook: its arguments by heading and by signature."""
    wanted = list(inspect.signature(function).parameters)
    section = re.search(r"^## Arguments\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^### `(\w+)`$", section[1] if section else "", re.MULTILINE)
    problems = []
    if headings != wanted:
        problems.append(f"{name}: the page describes {headings}, the hook takes {wanted}")
    signature = f"{name}({', '.join(wanted)})"
    if signature not in text:
        problems.append(f"{name}: the page does not show {signature}")
    problems += [f"{name}: no section {s}" for s in HOOK_SECTIONS if f"\n## {s}\n" not in text]
    if "-> " in text.split("```")[1] and "\n## Answer\n" not in text:
        problems.append(f"{name}: no section Answer")
    return problems


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_each_hook_has_a_page_with_its_arguments(name: str) -> None:
    page = DOCS / "reference" / "hooks" / f"{name}.md"
    assert hook_page_problems(name, HOOKS[name], page.read_text()) == []


def test_the_overview_and_the_command_know_every_hook() -> None:
    from fides_plugins.cli.plugins import HOOK_ORDER

    overview = (DOCS / "reference" / "hooks.md").read_text()
    assert set(HOOK_ORDER) == set(HOOKS)
    assert set(re.findall(r"hooks/(fides_\w+)\.md", overview)) == set(HOOKS)


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_the_example_in_each_docstring_runs_and_fits_its_hook(name: str) -> None:
    import doctest

    from fides_plugins.manager import FidesPluginManager

    globs: dict[str, Any] = {}
    examples = doctest.DocTestParser().get_doctest(HOOKS[name].__doc__ or "", globs, name, None, 0)
    assert examples.examples
    runner = doctest.DocTestRunner()
    runner.run(examples, clear_globs=False)
    assert runner.failures == 0
    classes = [
        c for c in examples.globs.values() if (inspect.isclass(c) and c.__module__ == "builtins") or _is_plugin(c)
    ]
    manager = FidesPluginManager()
    for plugin in classes:
        manager.add_plugin(plugin, plugin.__name__, "docstring")
    assert name in {hook for p in manager.report.plugins for hook in p.hooks}


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_the_example_on_each_page_keeps_the_contract(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fides_plugins.testing import check_plugin

    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in blocks(DOCS / "reference" / "hooks" / f"{name}.md") if b.language == "python")
    space: dict[str, Any] = {}
    exec(block.text, space)  # noqa: S102 - our own documentation
    plugins = [value for value in space.values() if _is_plugin(value)]
    assert plugins
    for plugin in plugins:
        assert name in check_plugin(plugin, class_counts=(2, 10)).hooks


def _is_plugin(value: Any) -> bool:
    return inspect.isclass(value) and any(hasattr(m, "fides_impl") for m in vars(value).values())


# --- pages from the code -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GENERATOR.PAGES))
def test_generated_pages_are_those_of_the_code(path: str) -> None:
    assert (DOCS / path).read_text() == GENERATOR.PAGES[path](), "run `python docs/generate.py`"


def test_the_settings_page_names_every_key_of_every_section() -> None:
    page = (DOCS / "reference" / "settings.md").read_text()

    def keys(model: Any, prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = field.annotation if hasattr(field.annotation, "model_fields") else None
            found += keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
        return found

    for key in keys(Settings):
        assert f"| `{key}` |" in page
    assert all(f.description for f in Settings.model_fields.values())


def test_the_bundle_page_names_every_key_of_the_manifest() -> None:
    from fides_plugins.bundle import Manifest

    table = (DOCS / "reference" / "bundle.md").read_text().split("## Graphs")[0]
    for key in Manifest.model_fields:
        assert f"`{key}`" in table


def test_every_command_and_option_has_help() -> None:
    for path, command in leaves(typer.main.get_command(app), ()):
        assert command.help, f"fides {' '.join(path)} has no help"
        for parameter in command.params:
            assert parameter.help or parameter.hidden, f"fides {' '.join(path)} {parameter.name} has no help"


def leaves(command: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", {})
    found = [leaf for name, child in children.items() for leaf in leaves(child, (*path, name))]
    return found if path == () else [(path, command), *found]


# --- code blocks ---------------------------------------------------------------------------------------

ALL_BLOCKS = [b for page in pages() for b in blocks(page)]


def command_problems(block: Block, root: Any) -> list[str]:
    """Commands and flags in a shell block that the command line does not have."""
    problems = []
    for words in fides_commands(block):
        command, rest = root, list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
        if (
            getattr(command, "commands", {})
            and not getattr(command, "invoke_without_command", False)
            and command is root
        ):
            problems.append(f"{block}: there is no command {words}")
        flags = [w.partition("=")[0] for w in rest if w.startswith("-") and w != "-"]
        problems += [f"{block}: `fides {' '.join(words)}` has no flag {f}" for f in flags if f not in known]
    return problems


def test_every_fides_command_shown_exists_with_its_flags() -> None:
    root = typer.main.get_command(app)
    shown = [b for b in ALL_BLOCKS if b.language in SHELLS]
    assert sum(len(fides_commands(b)) for b in shown) > 10
    assert [p for b in shown for p in command_problems(b, root)] == []


@pytest.mark.parametrize("page", [p for p in pages() if any(b.language == "python" for b in blocks(p))], ids=str)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    """All blocks of a page in one fresh process; the tutorial's are run by its own test, with its server."""
    if page.parent.name == "tutorial":
        pytest.skip("run by tests/integration/test_tutorial.py")
    python = [b for b in blocks(page) if b.language == "python"]
    code = [f"# line {b.line}\n{importable(b) if b.title.startswith('needs ') else b.text}" for b in python]
    (tmp_path / "page.py").write_text("\n".join(code))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if "def test_" in (tmp_path / "page.py").read_text():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "page.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout


def importable(block: Block) -> str:
    """The imports of a block that cannot run alone (its title says what it needs); the rest must parse."""
    tree = ast.parse(block.text)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in imports)


def settings_of(block: Block) -> dict[str, Any] | None:
    """The Fides settings in a block of TOML, yaml, config.pbtxt or environment variables."""
    if block.language == "toml":
        table = tomllib.loads(block.text)
        return table.get("fides") if "project" not in table else None
    if block.language == "yaml":
        content = yaml.safe_load(block.text)
        return content.get("fides") if isinstance(content, dict) else None
    pairs = dict(re.findall(r'key: "(fides\.[^"]+)" value \{ string_value: "([^"]*)" \}', block.text))
    return nest(pairs) or None


def test_every_setting_shown_is_valid() -> None:
    from fides_plugins.serving.torchserve.options import HostOptions

    shown = [(b, s) for b in ALL_BLOCKS if (s := settings_of(b)) is not None]
    assert len(shown) > 6
    for block, values in shown:
        own = {k: v for k, v in values.items() if k in HostOptions.model_fields}
        try:
            Settings.from_mapping({k: v for k, v in values.items() if k not in own})
        except SettingsError as error:
            pytest.fail(f"{block}: {error}")


def test_the_plugin_in_the_readme_keeps_the_contract_in_under_twenty_lines(tmp_path: Path) -> None:
    found = [b for b in blocks(REPOSITORY / "README.md") if b.language == "python" and "@hookimpl" in b.text]
    assert found, "the README shows no plug-in"
    for block in found:
        assert len([line for line in block.text.splitlines() if line.strip()]) < 20
        name = re.search(r"(\w+)\.py", block.text + block.title)
        module = name[1] if name else "readme_plugin"
        (tmp_path / f"{module}.py").write_text(block.text)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", "fides_plugins.cli", "plugins", "check", module]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_plugin_from_nothing_is_checked_and_listed_by_the_commands_shown(tmp_path: Path) -> None:
    from fides_plugins.testing import make_bundle

    page = DOCS / "how-to" / "plugin.md"
    text = page.read_text()
    start, end = (text[: text.index(heading)].count("\n") for heading in ("## Or from nothing", "## Put it into"))
    shown = [b for b in blocks(page) if start < b.line <= end]
    here = tmp_path / "here"
    make_bundle(here / "bundle")
    for block in shown:
        if block.title:
            (here / block.title).write_text(block.text)
    assert sorted(p.name for p in here.iterdir()) == ["bundle", "fides.toml", "night.py"]
    (shell,) = (b for b in shown if b.language == "sh")
    assert len(fides_commands(shell)) == 2
    done = subprocess.run(
        ["sh", "-e", "-c", shell.text], cwd=here, env=fides_script(tmp_path / "bin"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NightWatch keeps its contract" in done.stdout
    assert "module night:NightWatch" in done.stdout


# --- the site ------------------------------------------------------------------------------------------


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(str(values["id"]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        if tag in ("script", "img", "iframe") and values.get("src"):
            self.loaded.append(str(values["src"]))
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload") and values.get("href"):
            self.loaded.append(str(values["href"]))


def site_problems(site: Path) -> list[str]:
    """Links and anchors that lead nowhere, and things that a page would load from another host."""
    parsed: dict[Path, _Links] = {}
    for page in site.rglob("*.html"):
        parsed[page] = _Links()
        parsed[page].feed(page.read_text(encoding="utf-8"))
    problems = []
    for page, found in parsed.items():
        if page.name == "404.html":
            continue
        problems += [f"{page.name} loads {u}" for u in found.loaded if urlsplit(u).scheme or u.startswith("//")]
        for link in [*found.links, *found.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                problems.append(f"{page.relative_to(site)} links to {link}, which is not there")
            elif target in parsed and unquote(parts.fragment) not in {"", "__top", *parsed[target].ids}:
                problems.append(f"{page.relative_to(site)} links to {link}, which has no such anchor")
    return problems


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=REPOSITORY, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_the_site_builds_without_a_warning_or_a_broken_link(site: Path) -> None:
    assert (site / "index.html").exists()
    assert site_problems(site) == []


def test_pictures_load_nothing_from_elsewhere() -> None:
    for picture in (DOCS / "assets").glob("*.svg"):
        assert re.findall(r'(?:href="|url\("?)(https?:[^")]+)', picture.read_text()) == [], picture.name


def test_links_of_readme_and_examples_lead_somewhere() -> None:
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "examples").glob("*/README.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not urlsplit(link).scheme:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


# --- tests of these tests ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(n for n, f in HOOKS.items() if inspect.signature(f).parameters))
def test_deleting_any_argument_from_a_hook_page_is_noticed(name: str) -> None:
    text = (DOCS / "reference" / "hooks" / f"{name}.md").read_text()
    for argument in inspect.signature(HOOKS[name]).parameters:
        assert hook_page_problems(name, HOOKS[name], text.replace(f"### `{argument}`\n", ""))
        assert hook_page_problems(name, HOOKS[name], text.replace(f"### `{argument}`\n", "### `other`\n"))


def test_an_argument_that_the_hook_loses_or_gains_is_noticed() -> None:
    text = (DOCS / "reference" / "hooks" / "fides_detect.md").read_text()

    def fides_detect(query: Any, service: Any) -> None: ...
    def fides_detect_more(query: Any, service: Any, verification: Any, when: Any) -> None: ...

    assert hook_page_problems("fides_detect", fides_detect, text)
    assert hook_page_problems("fides_detect", fides_detect_more, text)


def test_deleting_any_documented_flag_from_the_code_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option of each command is taken away in turn, and the generated page must then differ."""
    root = typer.main.get_command(app)
    monkeypatch.setattr(typer.main, "get_command", lambda _: root)
    page = GENERATOR.cli_page()
    tried = 0
    for _, command in leaves(root, ()):
        whole = list(command.params)
        for parameter in whole:
            if parameter.hidden or parameter.name == "help":
                continue
            command.params = [p for p in whole if p is not parameter]
            assert GENERATOR.cli_page() != page, parameter.name
            tried += 1
        command.params = whole
    assert tried > 30


def test_a_flag_that_the_tutorial_uses_and_the_code_lost_is_noticed() -> None:
    root = typer.main.get_command(app)
    tutorial = [b for b in blocks(DOCS / "tutorial" / "index.md") if b.language == "sh"]
    assert [p for b in tutorial for p in command_problems(b, root)] == []
    attach = root.commands["attach"].commands["triton"]
    attach.params = [p for p in attach.params if "--mode" not in p.opts]
    assert any("--mode" in p for b in tutorial for p in command_problems(b, root))
    del root.commands["inspect"]
    assert any("no command" in p for b in tutorial for p in command_problems(b, root))


def test_a_setting_without_its_line_and_a_wrong_setting_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = (DOCS / "reference" / "settings.md").read_text()
    fields = dict(Settings.model_fields)
    fields.pop("threads")
    monkeypatch.setattr(Settings, "__pydantic_fields__", fields)
    assert GENERATOR.settings_page() != committed
    wrong = Block(DOCS / "index.md", 1, "toml", "", "[fides]\nmodus = 'flag'\n")
    with pytest.raises(SettingsError, match="modus"):
        Settings.from_mapping(settings_of(wrong))


def test_broken_links_and_loads_from_elsewhere_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x">1</a><a href="c.html">2</a><script src="https://cdn.example/m.js"></script><p id="y"></p>'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#y">ok</a>')
    problems = site_problems(tmp_path)
    assert len(problems) == 3
    assert any("cdn.example" in p for p in problems)
    assert any("c.html" in p for p in problems)
    assert any("no such anchor" in p for p in problems)

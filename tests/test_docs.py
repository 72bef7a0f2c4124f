"""What the documents say is what the package does."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

from splitquant_plugins import hookspecs
from splitquant_plugins.plugins import Plugins

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_documents_is_python(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block, str(path), "exec")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_hook_is_documented_with_its_arguments() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    hooks = {n: f for n, f in vars(hookspecs).items() if n.startswith("splitquant_") and callable(f)}
    assert len(hooks) >= 10
    for name, function in hooks.items():
        assert f"`{name}({', '.join(inspect.signature(function).parameters)})`" in text
    documented = set(re.findall(r"`(splitquant_\w+)\(", text))
    assert documented == set(hooks)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = [b.strip() for b in blocks(ROOT / "README.md", "bash") if b.strip().endswith("tox")]
    setup, _, test = command.partition(" && pip ")
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert f"pip {test}" in script
    for step in setup.split(" && "):
        assert step in script


def test_the_quantile_splitter_of_the_readme_works() -> None:
    import torch

    from splitquant_plugins import SplitQuantPass, hookimpl

    (block,) = [b for b in blocks(ROOT / "README.md", "python") if "class QuantileSplitter" in b]
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)

    class Plugin:
        @hookimpl
        def splitquant_register_splitters(self, register):
            register("quantile", scope["QuantileSplitter"], "parts with equally many values")

    plugins = Plugins.load()
    plugins.add(Plugin(), "readme")
    layer = torch.nn.Linear(16, 16)
    weight = layer.weight.detach().clone()
    split = SplitQuantPass(splitter="quantile", plugins=plugins)(torch.nn.Sequential(layer))[0]
    counts = [int((part.weight != 0).sum()) for part in split.parts()]
    assert torch.equal(split.weight, weight)
    assert max(counts) - min(counts) <= 2


def test_every_splitter_and_backend_has_a_page() -> None:
    plugins = Plugins.load()
    for kind, table in (("splitters", plugins.splitters), ("backends", plugins.backends)):
        for name in table:
            assert (ROOT / "docs" / kind / f"{name}.md").is_file(), f"docs/{kind}/{name}.md"

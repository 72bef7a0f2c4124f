"""What the documents say is what the package does."""

import inspect
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from splitquant_plugins import hookspecs, manifest_of
from splitquant_plugins.cli.main import run
from splitquant_plugins.plugins import Plugins

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_ends_in_spaces(path: Path) -> None:
    assert not re.findall(r"[ \t]+$", path.read_text("utf-8"), re.MULTILINE)


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


def runs(text: str, scope: dict[str, Any], document: str = "README.md") -> dict[str, Any]:
    """Run the one Python block of a document that holds a text, with what its comments say it is given."""
    (block,) = [block for block in blocks(ROOT / document, "python") if text in block]
    exec(compile(block, document, "exec"), scope)
    return scope


@pytest.mark.usefixtures("_in_a_folder")
def test_recipes_of_the_readme_for_quanto_work(models: Any) -> None:
    pytest.importorskip("optimum.quanto")
    models.bert().save_pretrained("float")
    assert manifest_of(runs("AutoModelForSequenceClassification.from_pretrained(", {"name": "float"})["model"]).split
    model = models.bert()
    scope = runs("splitquant_quanto.save", {"model": model})
    assert scope["model"] is not model
    assert manifest_of(scope["model"]).split


@pytest.mark.filterwarnings("ignore")  # INC's own
def test_recipes_of_the_readme_for_inc_work(models: Any) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("neural_compressor")
    model = runs("SplitQuantPass() + RTNConfig(bits=2, use_sym=False, group_size=-1)))", {"model": models.mlp()})[
        "model"
    ]
    assert manifest_of(model).split
    batches = [torch.randn(16, 12) for _ in range(2)]
    block = "DecoupleQPass(calibration=batches) + recipe))"
    scope = runs(block, {"model": models.mlp(), "batches": batches})
    assert len(manifest_of(scope["model"]).solved) == 3
    (on_parts,) = re.findall(r"# or on the parts of a split model: (.+)", (ROOT / "README.md").read_text())
    assert eval(on_parts, scope) != eval("DecoupleQPass(calibration=batches) + recipe", scope)


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_the_recipe_of_the_readme_for_pt2e_works(models: Any) -> None:
    pytest.importorskip("torchao")
    inputs = (torch.randn(4, 12),)
    model = runs("LowBitWeightQuantizer", {"model": models.mlp(), "inputs": inputs})["model"]
    assert manifest_of(model).split
    assert model(*inputs).shape == (4, 2)


@pytest.mark.usefixtures("_in_a_folder")
def test_a_float_split_model_is_saved_and_loaded_as_the_readme_says(models: Any) -> None:
    from splitquant_plugins import SplitQuantPass

    model = SplitQuantPass()(models.conv())
    loaded = runs("save_model", {"model": model, "unsplit": models.conv()})["model"].eval()
    images = torch.randn(2, 3, 16, 16)
    assert loaded is not model
    assert torch.equal(loaded(images), model(images))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_in_a_folder")
def test_a_split_language_model_comes_back_as_the_readme_says(models: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from splitquant_plugins import SplitQuantPass

    unsplit = models.gpt2()
    model = SplitQuantPass()(models.gpt2())
    scope = runs('model.save_pretrained("saved")', {"model": model})
    tokens = torch.randint(3, 99, (2, 8))
    assert torch.equal(scope["model"](tokens).logits, model(tokens).logits)
    runs("save_model", {"model": model, "unsplit": unsplit})  # the way of models that are not transformers'
    assert torch.equal(unsplit(tokens).logits, model(tokens).logits)
    with pytest.raises(OSError, match="no file named"):
        transformers.GPT2LMHeadModel.from_pretrained("split")


@pytest.fixture
def _language_model(_in_a_folder: None) -> None:
    """A folder `float` with a small Llama and its tokenizer."""
    pytest.importorskip("optimum.quanto")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"Once": 0, "upon": 1, "a": 2, "time": 3, **{f"w{number}": number for number in range(4, 99)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w98"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w97").save_pretrained("float")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=99, max_position_embeddings=32)
    transformers.LlamaForCausalLM(config).save_pretrained("float")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_language_model")
def test_the_page_on_transformers_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    scope = runs("model.push_to_hub", {"name": "float"}, "docs/transformers.md")
    again = runs("tokenizer.decode", {}, "docs/transformers.md")
    assert capsys.readouterr().out.startswith("Once upon a time w")
    tokens = torch.arange(6)[None]
    assert torch.equal(scope["model"](tokens).logits, again["model"](tokens).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_language_model")
def test_the_first_screen_of_the_readme_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    scope = runs("tokenizer.decode", {"name": "float"})
    assert capsys.readouterr().out.startswith("Once upon a time w")
    assert scope["tokens"].shape[1] > 4
    assert len(manifest_of(scope["model"]).split) == 7


def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))
    pictures["main"](tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs").glob("*.svg"))
    for name in drawn:
        text = (tmp_path / name).read_text("utf-8")
        assert text == (ROOT / "docs" / name).read_text("utf-8"), f"docs/{name} is old: python docs/make_pictures.py"
        assert len(text) < 12_000


def test_the_picture_of_the_flow_names_hooks_and_rooms_that_are_there() -> None:
    steps = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))["STEPS"]
    assert list(steps) == ["prepare", "select", "split", "build", "check", "record"]
    for _, hooks, room in steps.values():
        assert all(hasattr(hookspecs, f"splitquant_{hook}") for hook in hooks)
        assert (ROOT / "splitquant_plugins" / room).is_dir()


def test_the_module_of_the_page_on_measuring_can_be_compared(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs" / "measuring.md", "python")
    (tmp_path / "net.py").write_text(block)
    model, data = f"{tmp_path / 'net.py'}:load", f"{tmp_path / 'net.py'}:test"
    assert (
        run(["compare", model, "--data", data, "--backend", "simulated", "--weights", "int4", "--split", "grid"]) == 0
    )

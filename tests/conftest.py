"""Small models made on the spot, and the plugins of this checkout."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from splitquant_plugins import LayerPlan, Splitter, hookimpl
from splitquant_plugins.plugins import Plugins

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("here", deadline=None, max_examples=25, database=None, derandomize=True)
settings.load_profile("here")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def plugins() -> Plugins:
    """The installed plugins; from a checkout that is not installed, those of this checkout."""
    loaded = Plugins.load()
    if "quanto" not in loaded.backends:
        import splitquant_quanto.plugin

        loaded.add(splitquant_quanto.plugin, "quanto")
    return loaded


@pytest.fixture
def with_splitter(plugins: Plugins) -> Callable[..., Plugins]:
    """Return the plugins with one more splitter, `test`, made of a function (tensor, plan) -> parts."""

    def add(split: Callable[..., Sequence[Tensor]], *, bias: bool = True) -> Plugins:
        class FromFunction(Splitter):
            splits_bias = bias

            def split(self, tensor: Tensor, plan: Any, grid: Any) -> Sequence[Tensor]:
                return split(tensor, plan)

        class Plugin:
            @hookimpl
            def splitquant_register_splitters(self, register: Any) -> None:
                register("test", FromFunction, "made by a test")

        plugins.add(Plugin(), "test")
        return plugins

    return add


@pytest.fixture(scope="session")
def python_path() -> Callable[..., dict[str, str]]:
    """Return the environment of a fresh interpreter that finds what this one finds, and some folders first."""

    def environment(*first: Path) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, first), *filter(None, sys.path)])}

    return environment


@pytest.fixture
def assert_same_function() -> Callable[..., None]:
    """Compare two modules on inputs, exactly or within a tolerance."""

    @torch.no_grad()
    def check(one: nn.Module, other: nn.Module, *inputs: Tensor, atol: float = 1e-5) -> None:
        ours, theirs = one(*inputs), other(*inputs)
        ours, theirs = (getattr(o, "logits", o) for o in (ours, theirs))
        ours, theirs = (getattr(o, "last_hidden_state", o) for o in (ours, theirs))
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= atol

    return check


@pytest.fixture
def sum_of_parts() -> Callable[[nn.Module, str], Tensor]:
    """Add up what the parts of a split module hold, without its own help."""

    def total(split: nn.Module, role: str = "weight") -> Tensor:
        held = [getattr(split._modules[name], role) for name in split.part_names]
        held = [tensor.detach() for tensor in held if tensor is not None]
        result = torch.zeros_like(held[0])
        for tensor in held:
            result = result + tensor
        return result

    return total


class ConvNet(nn.Module):
    """Convolutions, plain, grouped, depthwise and dilated, with BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.norm2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8, padding_mode="reflect", padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        x = self.act(x + self.norm2(self.grouped(x)))
        return self.head(self.depthwise(x).mean(dim=(2, 3)))


class TiedNet(nn.Module):
    """One module in two places, and two Linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.again(self.first(x).relu()).relu())


def settle_batchnorms(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and an affine map that a fold can get wrong."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.normal_()
    return model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2)).eval()


def transformers_model(kind: str, config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, kind)
    return made(made.config_class(**config)).eval()


def bert(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers_model(
        "BertForSequenceClassification", {**sizes, "vocab_size": 99, "max_position_embeddings": 24, **options}
    )


def gpt2(**options: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 24}
    return transformers_model("GPT2LMHeadModel", {**sizes, "bos_token_id": 1, "eos_token_id": 2, **options})


def t5(**options: Any) -> Any:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
    return transformers_model("T5ForConditionalGeneration", {**sizes, "decoder_start_token_id": 0, **options})


def vit(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers_model("ViTForImageClassification", {**sizes, "image_size": 16, "patch_size": 8, **options})


def resnet(**options: Any) -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
    return settle_batchnorms(transformers_model("ResNetForImageClassification", {**sizes, **options}))


@pytest.fixture
def models() -> SimpleNamespace:
    """The makers of small models, each with random weights, in evaluation mode."""
    return SimpleNamespace(
        mlp=mlp,
        conv=lambda: settle_batchnorms(ConvNet()).eval(),
        tied=lambda: TiedNet().eval(),
        settle=settle_batchnorms,
        bert=bert,
        gpt2=gpt2,
        t5=t5,
        vit=vit,
        resnet=resnet,
    )


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 99, (4, 12))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Fail where a temporary file is left in the test's folder."""
    yield
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


FUZZ = int(os.environ.get("SPLITQUANT_FUZZ", "1"))  # how many times longer the random searches run
CASES = "cases tried"


@pytest.fixture
def fuzz() -> int:
    """How many times longer than in a common run the random searches are to go on."""
    return FUZZ


@pytest.fixture
def count_cases(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Note a number of cases, which is printed below the results, whichever process the test runs in."""

    def note(what: str, number: int, more: str = "") -> None:
        record_property(CASES, f"{what}: {number} cases{', ' + more if more else ''}")

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, line in report.user_properties if report.when == "call" else ():
                if name == CASES:
                    terminalreporter.write_line(line)


@pytest.fixture
def mutations() -> Callable[..., Iterator[str]]:
    """Return what makes mutants of a JSON text, up to a number drawn with a fixed seed."""

    def mutate(text: str, most: int = 150) -> Iterator[str]:
        document = json.loads(text)
        every = [(path, number) for path in _paths(document) for number in range(len(DAMAGES))]
        for path, number in random.Random(0).sample(every, min(len(every), most * FUZZ)):
            yield json.dumps(DAMAGES[number](copy.deepcopy(document), path))
        for key in document if isinstance(document, dict) else ():
            yield text.replace(f'"{key}"', f'"{key}": 0, "{key}"', 1)
        for end in range(0, len(text) - 2, max(1, len(text) // 20)):
            yield text[:end]

    return mutate


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def _holder(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def _drop(document: Any, path: tuple[Any, ...]) -> Any:
    del _holder(document, path)[path[-1]]
    return document


def _double(document: Any, path: tuple[Any, ...]) -> Any:
    holder, key = _holder(document, path), path[-1]
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[f"{key}_again"] = copy.deepcopy(holder[key])
    return document


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _put(value: Any) -> Callable[[Any, tuple[Any, ...]], Any]:
    def replace(document: Any, path: tuple[Any, ...]) -> Any:
        _holder(document, path)[path[-1]] = value
        return document

    return replace


RETYPED = (None, True, -1, 0, 1.5, "", "text", [], {}, [None], {"node": None}, "../../etc/passwd", "__class__")
HUGE = (10**30, -(2**63), 1e308, "9" * 10_000, [0] * 10_000, _nested(0, 300))
DAMAGES = (_drop, _double, *map(_put, RETYPED), *map(_put, HUGE))


@pytest.fixture
def linear_plan() -> Callable[[Tensor], LayerPlan]:
    return lambda weight: LayerPlan("linear", weight, None)


@pytest.fixture
def language_model(tmp_path: Path) -> Callable[..., Path]:
    """The maker of a small causal language model's folder, with a tokenizer of the words w0 to w119."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def make(name: str = "language", *, tied: bool = False, **options: Any) -> Path:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(
            **{**sizes, "vocab_size": 120, "max_position_embeddings": 16, "tie_word_embeddings": tied, **options}
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        words = {f"w{number}": number for number in range(120)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A text file of documents of 3 to 40 tokens, one in each line."""
    path = tmp_path / "documents.txt"
    lines = [" ".join(f"w{(7 * place + row) % 110}" for place in range(3 + row * 37 // 5)) for row in range(6)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


MODULE_FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Sizes:
    inputs: int = 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(Sizes().inputs, 8, 3, padding=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.conv(x).relu().mean(dim=(2, 3)))

calls = 0

def load():
    torch.manual_seed(0)
    return Net()

def inputs():
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))

def test():
    return inputs(), load().eval()(inputs()).argmax(-1)

def by_name():
    return {"x": inputs()}, list(range(4)) * 5

def counts():
    global calls
    calls += 1
    return torch.zeros(calls, 3, 8, 8)

def few_labels():
    return inputs(), [0, 1]

def high_labels():
    return inputs(), [9] * 20

def float_labels():
    return inputs(), [0.5] * 20

def two_inputs():
    return (inputs(), inputs()), [0] * 20

def uneven():
    return {"x": inputs(), "y": inputs()[:3]}, None

def empty():
    return inputs()[:0], None

def text():
    return "no tensors"

def wrong_size():
    return inputs()[:, :2]

def broken():
    raise RuntimeError("no data here")

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def module_file(tmp_path: Path) -> Path:
    """A Python file with a module and data for it, some of them wrong."""
    path = tmp_path / "net.py"
    path.write_text(MODULE_FILE)
    return path

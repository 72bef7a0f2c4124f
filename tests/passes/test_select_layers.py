"""The choice of layers by itself, with a plugin that answers for every Linear."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from splitquant_plugins import LayerPlan, Skip, SplitConfig
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.select import (
    NOT_QUANTIZED,
    Layer,
    Selection,
    matches,
    reason_to_ignore,
    refuse_unmatched_patterns,
    select_layers,
    tied_reason,
)


class Plugins:
    """Answers for Linear layers, for one block as a whole, and refuses bilinear ones; notes what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def select_layer(self, name, module, config):
        self.asked.append(name)
        assert isinstance(config, SplitConfig)
        if isinstance(module, Block):
            return LayerPlan("block", module.inner.weight, None)
        if isinstance(module, nn.Bilinear):
            return Skip("it is bilinear")
        return LayerPlan("linear", module.weight, module.bias) if isinstance(module, nn.Linear) else None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def select(model, plugins=None, ignore=(), **options):
    return select_layers(model, SplitConfig(**options), plugins or Plugins(), ignore)


def names_of(selection: Selection) -> tuple[list[tuple[str, ...]], dict[str, str | None]]:
    assert all(layer.reason is None for layer in selection.split)
    return [layer.names for layer in selection.split], {layer.name: layer.reason for layer in selection.ignored}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.norm = nn.LayerNorm(2)
        self.both = nn.Bilinear(2, 2, 2)
        self.act = nn.ReLU()
        self.one = nn.Linear(2, 2)
        self.blocks_too = nn.ModuleList([nn.Linear(2, 2)])
        self.again = self.one


def test_every_module_is_asked_about_once_but_for_what_is_inside_a_chosen_one():
    plugins, model = Plugins(), Net()
    selection = select(model, plugins)
    assert plugins.asked == ["", "block", "norm", "both", "act", "one", "blocks_too", "blocks_too.0"]
    assert names_of(selection) == (
        [("block",), ("one", "again"), ("blocks_too.0",)],
        {"norm": "LayerNorm is of no type that a plugin splits", "both": "it is bilinear"},
    )
    assert [layer.kind for layer in (*selection.split, *selection.ignored)] == [
        *("block", "linear", "linear"),
        *("LayerNorm", "Bilinear"),
    ]
    assert selection.split[1].module is model.one
    assert selection.split[1].plan.weight is model.one.weight


def test_a_chosen_root_leaves_nothing_else_to_ask_about():
    plugins, model = Plugins(), nn.Linear(2, 2)
    model.inner = nn.Linear(2, 2)
    assert names_of(select(model, plugins)) == ([("",)], {})
    assert plugins.asked == [""]


def test_a_module_inside_a_shared_block_is_inside_under_each_of_its_names():
    model = nn.ModuleDict({"a": Block(), "z": nn.Linear(2, 2)})
    model["b"] = model["a"]
    model["c"] = model["b"].inner
    plugins = Plugins()
    assert names_of(select(model, plugins))[0] == [("a", "b"), ("z",)]
    assert plugins.asked == ["", "a", "z"]


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"include": ("one", "block")}, {"blocks_too.0": "no include pattern matches it"}),
        ({"include": ("again", "b*k")}, {"blocks_too.0": "no include pattern matches it"}),
        ({"exclude": ("again",)}, {"one": "an exclude pattern matches it"}),
        ({"ignore": ["ag?in"]}, {"one": "the recipe does not quantize it"}),
        ({"exclude": ("again",), "ignore": ["*"]}, {"one": "an exclude pattern matches it", "block": NOT_QUANTIZED}),
        ({"ignore": ["[!o]*"]}, {"block": NOT_QUANTIZED, "blocks_too.0": NOT_QUANTIZED}),
        ({"ignore": ["ONE", "on"]}, {}),
    ],
)
def test_patterns_decide_what_is_ignored_and_why(options, reasons):
    split, ignored = names_of(select(Net(), **options))
    assert {name: ignored[name] for name in reasons} == reasons
    chosen = {names[0] for names in split}
    assert not chosen & set(ignored)
    assert chosen | set(ignored) == {"block", "one", "blocks_too.0", "norm", "both"}
    if not options.get("ignore"):
        assert len(chosen) == 3 - len(reasons)


def test_reasons_in_their_order():
    patterns = SimpleNamespace(include=("a", "b"), exclude=("b", "c"))
    assert reason_to_ignore(["a"], patterns) is None
    assert reason_to_ignore(["c"], patterns, ["c"]) == "no include pattern matches it"
    assert reason_to_ignore(["b"], patterns, ["b"]) == "an exclude pattern matches it"
    assert reason_to_ignore(["a"], patterns, ["x", "a"]) == "the recipe does not quantize it"
    assert reason_to_ignore(["a"], SimpleNamespace(include=(), exclude=())) is None


def test_patterns_match_in_full_and_mind_the_case():
    assert matches(["x", "layer.1"], ["y", "layer.?"])
    assert not matches(["layer.10"], ["layer.?"])
    assert not matches(["Layer.1"], ["layer.*"])
    assert not matches([], ["*"])
    assert not matches(["a"], [])


def test_patterns_that_match_nothing_are_errors():
    config = SplitConfig(include=("one",), exclude=("two",))
    refuse_unmatched_patterns(config, ["one", "two"], "thing")
    with pytest.raises(ConfigError, match=r"^include pattern 'one' matches no thing$"):
        refuse_unmatched_patterns(config, ["two"], "thing")
    with pytest.raises(ConfigError, match=r"^exclude pattern 'two' matches no thing$"):
        refuse_unmatched_patterns(config, ["one"], "thing")
    with pytest.raises(ConfigError, match=r"no module of Net; its modules are named like block, block\.inner, norm$"):
        select(Net(), include=("nothing",))
    assert select(Net(), include=("again",)).split  # a further name of a shared module


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3), nn.Embedding(3, 2), nn.Linear(2, 3), nn.Linear(2, 3))
    model[1].weight, model[3].weight = model[0].weight, model[2].weight
    return model


def test_weights_of_embeddings_are_ignored_unless_they_are_to_be_untied():
    split, ignored = names_of(select(tied()))
    assert split == [("4",)]
    assert {name: ignored[name] for name in "13"} == {"1": tied_reason("0"), "3": tied_reason("2")}
    assert ignored["1"] == "its weight is that of embedding 0; untie_embeddings splits it"
    assert names_of(select(tied(), untie_embeddings=True))[0] == [("1",), ("3",), ("4",)]
    assert names_of(select(tied(), exclude=("1",)))[1]["1"] == "an exclude pattern matches it"


def test_a_weight_of_an_embedding_within_a_chosen_block_is_found():
    model = nn.ModuleDict({"words": nn.Embedding(2, 2), "block": Block()})
    model["block"].inner.weight = model["words"].weight
    assert names_of(select(model))[1]["block"] == tied_reason("words")
    assert names_of(select(model, untie_embeddings=True))[0] == [("block",)]


def test_what_has_no_values_is_ignored_and_what_has_no_parameters_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(0, 2))
    assert names_of(select(model)) == ([("0",)], {"1": "it has no values"})
    assert names_of(select(nn.Sequential(nn.LayerNorm(2))))[0] == []
    with pytest.raises(InputError, match=r"^Sequential has no parameters: there is nothing to split$"):
        select(nn.Sequential(nn.ReLU()))


def test_a_plan_for_what_has_no_parameters_of_its_own_is_taken():
    class Fixed(Plugins):
        def select_layer(self, name, module, config):
            return LayerPlan("relu", torch.ones(2, 2), None) if isinstance(module, nn.ReLU) else None

    assert names_of(select(nn.Sequential(nn.ReLU()), Fixed()))[0] == [("0",)]


class Experts(nn.Module):
    def __init__(self, *ranks: int) -> None:
        super().__init__()
        for number, rank in enumerate(ranks):
            self.register_parameter(f"w{number}", nn.Parameter(torch.zeros((2,) * rank)))


def test_experts_in_one_tensor_are_named():
    single = nn.Sequential(Experts())
    for shape, stacked in (((1, 4, 4), False), ((2, 1, 4), True), ((2, 4, 4), True)):
        single[0].w = nn.Parameter(torch.zeros(shape))
        assert ("several experts" in names_of(select(single))[1]["0"]) == stacked
    outer = Experts(2)
    outer.inner = Experts(3)
    assert names_of(select(outer))[1] == {
        "": "Experts is of no type that a plugin splits",
        "inner": "Experts keeps the weights of several experts as one tensor (w0), which is no layer; it is of no type "
        "that a plugin splits",
    }
    ignored = names_of(select(nn.Sequential(Experts(3, 2, 3), Experts(2, 4), nn.Conv1d(2, 2, 1))))[1]
    assert ignored == {
        "0": "Experts keeps the weights of several experts as one tensor (w0, w2), which is no layer; it is of no "
        "type that a plugin splits",
        "1": "Experts is of no type that a plugin splits",
        "2": "Conv1d is of no type that a plugin splits",
    }


def test_a_layer_is_a_plan_or_a_reason():
    plan = LayerPlan("linear", torch.ones(2, 2), None)
    chosen, skipped = (Layer(("a", "b"), nn.ReLU(), answer) for answer in (plan, Skip("it is round")))
    assert (chosen.name, chosen.plan, chosen.reason, chosen.kind) == ("a", plan, None, "linear")
    assert (skipped.name, skipped.reason, skipped.kind) == ("a", "it is round", "ReLU")
    with pytest.raises(AssertionError, match="a is ignored: it is round"):
        skipped.plan  # noqa: B018

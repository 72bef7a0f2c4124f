"""A graph.json is data: nothing in it is run or imported, damage is one clear error, and guards stay."""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict

import pytest
import torch
from splitquant_pt2e import LowBitWeightQuantizer, load, save
from torch import nn

from splitquant_plugins.errors import InputError, SkeletonMismatchError

CODE = "__import__('pathlib').Path('pwned').touch()"


@pytest.fixture
def saved(split, quantize, nets, tmp_path):
    x = torch.randn(4, 12)
    graph = quantize(nets.mlp(), split() + LowBitWeightQuantizer("int2", granularity="tensor", activations="int8"), x)
    save(graph, tmp_path / "saved")
    return graph, x, tmp_path / "saved"


def edit(folder, change):
    path = folder / "graph.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def first(described, op):
    return next(node for node in described["nodes"] if node["op"] == op)


def enum_spec():
    """A structure as torch writes it, which would import a module."""
    context = json.dumps({"__enum__": True, "fqn": "evilmod:X", "name": "a"})
    return json.dumps([1, {"type": "builtins.tuple", "context": context, "children_spec": []}])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda g: g.update(inputs=[f"x='''+str({CODE})):\n    pass #"]), id="input"),
        pytest.param(lambda g: g.update(inputs=[f"x={CODE}"]), id="default"),
        pytest.param(lambda g: first(g, "call_function").update(kwargs={f"z={CODE}, y": 1}), id="keyword"),
        pytest.param(lambda g: first(g, "call_function").update(args=[f"'+str({CODE})+'"]), id="text"),
        pytest.param(lambda g: first(g, "call_function").update(target=f"aten.{CODE}.default"), id="operator"),
        pytest.param(lambda g: first(g, "get_attr").update(target=f"x{CODE}"), id="tensor"),
        pytest.param(lambda g: g.update(in_spec=enum_spec()), id="structure"),
        pytest.param(lambda g: g.update(guards=[["==", CODE, 1]]), id="guard"),
    ],
)
def test_s1_nothing_in_graph_json_is_run(saved, change, monkeypatch):
    _, x, folder = saved
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    (folder / "evilmod.py").write_text("open('pwned', 'w')\nclass X: a = 1\n")
    edit(folder, change)
    with contextlib.suppress(Exception):
        load(folder)(x)
    assert not (folder / "pwned").exists()


def test_s1_generated_code_holds_no_name_of_the_file(saved):
    graph, x, folder = saved
    text = (folder / "graph.json").read_text()
    for name in {node["name"] for node in json.loads(text)["nodes"]}:
        text = re.sub(rf'("name"|"node"): "{name}"', rf'\1: "marked {name}"', text)
    (folder / "graph.json").write_text(text.replace('"input"', '"marked_input"'))
    described = json.loads((folder / "graph.json").read_text())
    again = load(folder)
    assert "marked" not in again.code
    assert not [node for node in described["nodes"] if node["op"] == "get_attr" and node["target"] in again.code]
    assert torch.equal(again(marked_input=x), graph(x))  # though callers may use the names


def test_w3_a_loaded_graph_keeps_the_guards(saved, tmp_path):
    """Exported at batch 4, it raises at batch 8 as it did before it was saved, after a second save, too."""
    graph, x, folder = saved
    save(load(folder), tmp_path / "twice")
    for one in (graph, load(folder), load(tmp_path / "twice")):
        assert torch.equal(one(x), graph(x))
        with pytest.raises(AssertionError, match=r"Guard failed: input.size\(\)\[0\] == 4"):
            one(torch.randn(8, 12))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, more):
        return {"y": self.linear(x) + more["z"]}


def test_w3_guards_with_dynamic_sizes(split, tmp_path):
    """Bounds and equal sizes of several inputs, one of them in a dict."""
    from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e

    half = torch.export.Dim("half", min=2, max=20)
    shapes = {"x": {0: 2 * half}, "more": {"z": {0: 2 * half}}}
    x = torch.randn(8, 6)
    exported = torch.export.export(Two().eval(), (x, {"z": x}), dynamic_shapes=shapes)
    prepared = prepare_pt2e(exported.module(), split() + LowBitWeightQuantizer())
    prepared(x, {"z": x})
    converted = convert_pt2e(prepared)
    save(converted, tmp_path)
    again = load(tmp_path)
    for rows, other, fits in ((8, 8, True), (40, 40, True), (42, 42, False), (8, 1, False)):
        one, two = torch.randn(rows, 6), {"z": torch.randn(other, 6)}
        if fits:
            assert torch.equal(again(one, more=two)["y"], converted(one, two)["y"])
            continue
        for graph in (converted, again):
            with pytest.raises(AssertionError, match="Guard failed"):
                graph(one, two)
    with pytest.raises(TypeError, match="lacks its argument more"):
        again(x)
    with pytest.raises(TypeError, match="less is unknown"):
        again(x, less={"z": x})
    with pytest.raises(ValueError, match="nest otherwise"):
        again(x, {"w": x})


def test_containers_that_cannot_be_saved_are_named(split, quantize, tmp_path):
    class Nest(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return OrderedDict(y=self.linear(x))

    graph = quantize(Nest().eval(), split() + LowBitWeightQuantizer(), torch.randn(2, 6))
    with pytest.raises(InputError, match="OrderedDict"):
        save(graph, tmp_path)


def test_mutated_graphs_are_refused_or_load(saved, mutations, count_cases):
    """Each field dropped, doubled, of another type, or huge: one line of error, or a graph."""
    _, _, folder = saved
    path = folder / "graph.json"
    mutants = list(mutations(path.read_text()))
    refused = 0
    for text in mutants:
        path.write_text(text)
        try:
            load(folder)
        except (InputError, SkeletonMismatchError) as error:
            refused += 1
            lines = str(error).splitlines()
            if len(lines) > 1:
                pytest.fail(f"an error of {len(lines)} lines: {error}")
    count_cases("graph.json mutated", len(mutants), f"{refused} refused")
    assert refused > len(mutants) / 2

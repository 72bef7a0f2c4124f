"""Saved graphs come back with identical outputs, from safetensors and JSON alone, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from splitquant_pt2e import LowBitWeightQuantizer, load, save, stored_weights
from torch import nn

from splitquant_plugins import manifest_of
from splitquant_plugins.errors import InputError, SkeletonMismatchError


@pytest.fixture
def saved(split, quantize, nets, tmp_path):
    x = torch.randn(4, 12)
    graph = quantize(nets.mlp(), split() + LowBitWeightQuantizer("int2", granularity="tensor", activations="int8"), x)
    save(graph, tmp_path)
    return graph, x, tmp_path


def test_reload_is_identical(saved):
    graph, x, folder = saved
    again = load(folder)
    assert torch.equal(again(x), graph(x))
    assert manifest_of(again) == manifest_of(graph)
    assert {path.name for path in folder.iterdir()} == {
        "graph.json",
        "model.safetensors",
        "splitquant_manifest.json",
    }
    found, kept = stored_weights(again), stored_weights(graph)
    assert found.keys() == kept.keys()
    assert all(torch.equal(a.weight, b.weight) for name in kept for a, b in zip(found[name], kept[name], strict=True))


def test_reload_in_a_fresh_process(saved, python_path):
    graph, x, folder = saved
    save_file({"x": x, "y": graph(x).detach()}, folder / "expected.safetensors")
    script = (
        "import sys, torch; from safetensors.torch import load_file; from splitquant_pt2e import load\n"
        "io = load_file(sys.argv[1] + '/expected.safetensors'); assert torch.equal(load(sys.argv[1])(io['x']), io['y'])"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=python_path(), timeout=120)


@pytest.mark.parametrize("recipe", ["int8", "x86"])
def test_conv_net(recipe, split, quantize, x86, nets, images, tmp_path):
    quantizer = x86() if recipe == "x86" else LowBitWeightQuantizer("int8", scheme="symmetric")
    graph = quantize(nets.residual(), split() + quantizer, images)
    save(graph, tmp_path)
    assert torch.equal(load(tmp_path)(images), graph(images))


def test_plain_graphs_can_be_saved_too(quantize, nets, tmp_path):
    x = torch.randn(4, 12)
    graph = quantize(nets.mlp(), LowBitWeightQuantizer("int4"), x)
    save(graph, tmp_path)
    assert torch.equal(load(tmp_path)(x), graph(x))


def test_dynamic_shapes_and_keywords(split, nets, tmp_path):
    from splitquant_pt2e.compat import convert_pt2e, prepare_pt2e

    x = torch.randn(4, 12)
    graph = torch.export.export(nets.mlp(), (), {"input": x}, dynamic_shapes={"input": {0: torch.export.Dim.DYNAMIC}})
    prepared = prepare_pt2e(graph.module(), split() + LowBitWeightQuantizer())
    prepared(input=x)
    converted = convert_pt2e(prepared)
    save(converted, tmp_path)
    y = torch.randn(7, 12)
    assert torch.equal(load(tmp_path)(input=y), converted(input=y))


def test_loaded_graph_can_be_exported(saved):
    graph, x, folder = saved
    again = torch.export.export(load(folder), (x,)).module()
    assert torch.equal(again(x), graph(x))


def test_compiled(saved):
    """Traced by torch.compile without a code generator, which would take a minute."""
    graph, x, folder = saved
    with torch.no_grad():
        for one in (graph, load(folder)):
            assert torch.equal(torch.compile(one, backend="aot_eager", fullgraph=True)(x), graph(x))


def test_float_graphs_are_refused(export, nets, tmp_path):
    with pytest.raises(InputError, match="not quantized"):
        save(export(nets.mlp(), torch.randn(2, 12)), tmp_path)
    with pytest.raises(InputError, match="not a Sequential"):
        save(nets.mlp(), tmp_path)


def edit(folder, change):
    path = folder / "graph.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def test_missing_and_surplus_tensors(saved):
    _, _, folder = saved
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[0]
    save_file({**state, "more": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(SkeletonMismatchError, match="has tensor more"):
        load(folder)
    save_file({key: value for key, value in state.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(SkeletonMismatchError, match=f"reads tensor {name}"):
        load(folder)


def test_graph_of_another_model(saved, quantize, nets, tmp_path_factory):
    """A graph that was not split is refused beside a manifest that says it was."""
    _, x, folder = saved
    other = tmp_path_factory.mktemp("other")
    save(quantize(nets.mlp(), LowBitWeightQuantizer("int4"), x), other)
    for name in ("graph.json", "model.safetensors"):
        (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(SkeletonMismatchError, match="split in 3, and the graph quantizes 0"):
        load(folder)


def _node(described, op):
    return next(node for node in described["nodes"] if node["op"] == op)


def _call(target):
    def change(described):
        next(node for node in described["nodes"] if node["op"] == "call_function")["target"] = target

    return change


INPUT = object()


def _insert(target, *args, **kwargs):
    """Call an operator after the inputs; INPUT stands for the first of them."""

    def change(described):
        nodes = described["nodes"]
        first = {"node": _node(described, "placeholder")["name"]}
        last = max(number for number, node in enumerate(nodes) if node["op"] == "placeholder")
        entry = {"op": "call_function", "name": "more", "target": target}
        entry["args"] = [first if value is INPUT else value for value in args]
        entry["kwargs"] = {key: first if value is INPUT else value for key, value in kwargs.items()}
        nodes.insert(last + 1, entry)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_call("os.system"), "not allowed"),
        (_call("aten.from_file.default"), "not allowed"),
        (_insert("aten.manual_seed.default", 123), "not allowed"),
        (_insert("aten.set_grad_enabled.default", True), "not allowed"),
        (_insert("aten._print.default", "hello"), "not allowed"),
        (_insert("aten.save.default", "hello", "here"), "not allowed"),
        (_insert("aten.zero_.default", INPUT), "zero_.default writes into input 0"),
        (_insert("aten.add.out", INPUT, INPUT, out=INPUT), "add.out writes into input 0"),
        (_call("aten.no_such_operator.default"), "does not have"),
        (_call("builtins.eval.default"), "not allowed"),
        (lambda described: described["nodes"][-1].update(op="call_module"), "kind 'call_module'"),
        (lambda described: described["nodes"][0].update(name="a; import os"), "which does not come before it"),
        (lambda described: _node(described, "get_attr").update(target="__import__('os')"), "reads tensor __import"),
        (lambda described: _node(described, "placeholder").update(target="__import__('os')"), "field 'target'"),
        (lambda described: described["nodes"].insert(1, None), "node 1 is no object"),
        (lambda described: described.update(more=1), "field 'more'"),
        (lambda described: described["nodes"][0].update(more=1), "field 'more'"),
        (lambda described: described.update(inputs=["class"]), "an input is called 'class'"),
        (lambda described: described.update(inputs=["self"]), "one name each"),
        (lambda described: described.update(out_spec={"evilmod:X": []}), "no container"),
        (lambda described: described.update(out_spec={"output": ["import_module", [["name", None]]]}), "no output"),
        (lambda described: described.update(guards=[["exec", "print(1)"]]), "values for 'exec'"),
        (lambda described: described.update(guards=[["size", 9, 0]]), "reads size"),
        (lambda described: described.update(format=9), "format 9"),
        (lambda described: described["nodes"].pop(0), "damaged"),
        (lambda described: described.pop("in_spec"), "damaged"),
    ],
)
def test_damaged_or_hostile_graphs_are_refused(saved, change, message):
    _, _, folder = saved
    edit(folder, change)
    with pytest.raises((InputError, SkeletonMismatchError), match=message):
        load(folder)


def test_folders_that_hold_no_graph(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path)
    (tmp_path / "graph.json").write_text("[]")
    with pytest.raises(InputError, match="holds no graph"):
        load(tmp_path)


def test_unknown_operators_cannot_be_saved(quantize, tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            return self.head(x)

    graph = quantize(Odd(), LowBitWeightQuantizer(), torch.randn(2, 3))
    node = next(node for node in graph.graph.nodes if node.target == torch.ops.aten.linear.default)
    with graph.graph.inserting_after(node):
        extra = graph.graph.call_function(print, (node,))
    del extra
    with pytest.raises(InputError, match="cannot be saved"):
        save(graph, tmp_path)

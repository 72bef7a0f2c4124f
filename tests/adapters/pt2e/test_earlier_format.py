"""Graphs of the first format are read as data too."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torchao.quantization.pt2e")

import torch
from splitquant_pt2e.earlier_format import from_earlier
from splitquant_pt2e.graph_json import graph_from_json
from splitquant_pt2e.tree_json import tree_from_json
from torch.utils import _pytree as pytree

from splitquant_plugins.errors import InputError

SAVED = Path(__file__).parents[2] / "compatibility" / "saved" / "pt2e" / "model"


@pytest.fixture
def described():
    return json.loads((SAVED / "graph.json").read_text("utf-8"))


def test_a_structure_comes_back():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    made = outputs.SequenceClassifierOutput(logits=torch.ones(1), hidden_states=(torch.ones(1), torch.ones(1)))
    for nest in ((1, [2, {"a": 3, "b": (4,)}]), made):
        spec = pytree.tree_structure(nest)
        text = pytree.treespec_dumps(spec)
        new = from_earlier({"nodes": [], "in_spec": text, "out_spec": text}, 2)
        assert tree_from_json(new["in_spec"]) == tree_from_json(new["out_spec"]) == spec


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[1]",
        "[2, null]",
        '[1, {"type": "os.environ", "context": "[]", "children_spec": []}]',
        '[1, {"type": "transformers.modeling_outputs.torch", "context": "[]", "children_spec": []}]',
        '[1, {"type": "builtins.dict", "context": "[1, 2]", "children_spec": []}]',
        '[1, {"type": "builtins.tuple", "children_spec": [[]]}]',
        "[1, " + "[" * 100_000,
    ],
)
def test_other_structures_are_refused(described, text):
    described["in_spec"] = text
    with pytest.raises(InputError, match="is damaged"):
        graph_from_json(described, {}, "graph.json")

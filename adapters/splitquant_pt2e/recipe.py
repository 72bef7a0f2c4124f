"""`SplitQuantPass() + quantizer`: a quantizer of the same class that splits the graph it has annotated.

The quantizer annotates the unsplit graph, so that its patterns (conv + add + relu, for one) match what they
would have matched, and nothing else. Then each layer whose weight it quantizes is split, and its parts take over
the annotations: every part's weight gets a scale of its own, the input is quantized once, the last sum is
quantized where the layer's output was. Partial sums stay float unless the target knows integers only: see
`integer_sums`. Passes of other kinds work on the annotated layers as modules: see `graph_passes`.
"""

from __future__ import annotations

import pickle
from typing import Any

from torch.fx import GraphModule

from splitquant_plugins.passes.base import ModelPass
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_pt2e.annotation import annotation_of
from splitquant_pt2e.compat import ANNOTATION, fold_batchnorms
from splitquant_pt2e.graph import refuse_unfit_graph, split_graph
from splitquant_pt2e.graph_passes import apply_to_graph
from splitquant_pt2e.mixing import with_mixin


class SplittingQuantizer:
    """What `attach` mixes into the class of a quantizer."""

    splitquant_pass: ModelPass

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies hold the plain quantizer and the pass; the class is made anew."""
        return splitting, (self.splitquant_pass, self.plain())

    def __eq__(self, other: object) -> bool:
        """Whether the other is a quantizer of the same kind and settings, with the same pass."""
        if not isinstance(other, SplittingQuantizer) or self.splitquant_pass != other.splitquant_pass:
            return False
        one, two = self.plain(), other.plain()
        return type(one) is type(two) and (vars(one) == vars(two) or _pickled(one) == _pickled(two) is not None)

    __hash__ = object.__hash__

    def plain(self) -> Any:
        """Return the quantizer without its pass."""
        kind: Any = next(each for each in type(self).__mro__[1:] if not issubclass(each, SplittingQuantizer))
        made = kind.__new__(kind)
        made.__dict__.update({name: value for name, value in vars(self).items() if name != "splitquant_pass"})
        return made

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Refuse a graph that was split or quantized before, then do what the quantizer does."""
        refuse_unfit_graph(model)
        transformed: GraphModule = super().transform_for_annotation(model)  # type: ignore[misc]
        if transformed is not model:  # prepare_pt2e hands on the meta of the graph that it was given
            model.meta.update(transformed.meta)
            transformed.meta = model.meta
        return transformed

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the graph, then run the pass on the layers whose weights are to be quantized."""
        annotated = super().annotate(model)  # type: ignore[misc]
        # PT2E goes on with the graph that it passed, whatever is returned.
        if isinstance(self.splitquant_pass, SplitQuantPass):
            split_graph(model, self.splitquant_pass, annotated=True)
        else:
            apply_to_graph(model, self.splitquant_pass)
        return annotated


def splitting(split_pass: ModelPass, quantizer: Any) -> Any:
    """Return a quantizer of the same kind, with its settings, that runs the pass on what it annotates."""
    attached = with_mixin(quantizer, SplittingQuantizer, "Split")
    attached.splitquant_pass = split_pass
    return attached


def _pickled(quantizer: Any) -> bytes | None:
    """The settings as bytes, for those that compare by identity; they are never loaded."""
    try:
        return pickle.dumps(vars(quantizer))
    except (AttributeError, TypeError, pickle.PicklingError):
        return None


def split_ahead(model: GraphModule, split_pass: SplitQuantPass, quantizer: Any) -> None:
    """Split a graph in place as the attached `quantizer` would, for a `prepare_pt2e` that gets another of its kind.

    BatchNorms are folded and the graph is annotated as prepare_pt2e will do once more. What took the place of a
    layer carries its annotations; the marks by which quantizers look for layers are taken off all that is
    annotated, and off the weights. On an error the annotations are taken off again; the fold, which changes no
    output, stays.
    """
    refuse_unfit_graph(model)
    fold_batchnorms(model)
    quantizer.annotate(quantizer.transform_for_annotation(model))
    try:
        split_graph(model, split_pass, annotated=True)
    except BaseException:
        for node in model.graph.nodes:
            node.meta.pop(ANNOTATION, None)
        raise
    for node in model.graph.nodes:
        if node.op == "get_attr" or annotation_of(node) is not None:
            node.meta.pop("source_fn_stack", None)
            node.meta.pop("torch_fn", None)

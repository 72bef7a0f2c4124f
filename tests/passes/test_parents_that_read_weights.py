"""Parents that read a child's `.weight` or `.bias` themselves get an answer, or the child is left whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.modules import SplitModule


class Reader(nn.Module):
    """Casts its input to the dtype and device of a child's weight, as many transformers modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)
        self.conv = nn.Conv1d(4, 3, 1)

    def forward(self, x):
        x = x.to(self.proj.weight.dtype).to(self.proj.weight.device)
        x = self.proj(x) + self.proj.bias
        scale = self.conv.weight.abs().mean() * self.proj.weight.shape[0] / self.proj.in_features
        return self.conv(x.unsqueeze(-1)) * scale + self.conv.bias[:, None]


def quantized(model: nn.Module, weights: str = "qint8") -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=getattr(quanto, weights))
    quanto.freeze(model)
    return model


def attend(x):
    return {"query": x, "key": x, "value": x}


def test_a_parent_that_reads(assert_same_function):
    model = Reader().eval()
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    assert len(manifest_of(model).split) == 2
    assert_same_function(model, reference, torch.randn(5, 6, dtype=torch.float64))


@torch.no_grad()
def test_a_parent_that_reads_after_quantization():
    model = Reader().eval()
    x = torch.randn(5, 6)
    expected = model(x)
    model = quantized(SplitQuantPass()(model))
    assert isinstance(model.proj.weight, torch.Tensor)
    assert not hasattr(model.proj.weight, "qtype")  # no tensor of quanto's
    assert model.proj.weight.dtype == torch.float32
    parts = [part.weight.dequantize() for part in model.proj.parts()]
    assert torch.equal(model.proj.weight, parts[0] + parts[1] + parts[2])
    assert torch.allclose(model(x), expected, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True], ids=["float", "quantized"])
def test_multihead_attention_is_left_whole(after):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "out": nn.Linear(8, 8)}).eval()
    x = torch.randn(3, 5, 8)
    expected = model["attention"](**attend(x))[0]
    model = SplitQuantPass()(model)
    reasons = {record.name: record.reason for record in manifest_of(model).kept}
    assert "nn.MultiheadAttention" in reasons["attention"]
    assert "nn.MultiheadAttention" in reasons["attention.out_proj"]
    if after:
        model = quantized(model)
    assert torch.allclose(model["attention"](**attend(x))[0], expected, atol=0.05 if after else 0)


ENCODERS = {
    "layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1),
    "layer norm first": lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "decoder layer": lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
}


@pytest.mark.parametrize("after", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("grad", [False, True], ids=["fast path", "slow path"])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_torch_transformers(name, grad, after):
    model = ENCODERS[name]().eval()
    x = torch.randn(3, 5, 8)
    inputs = (x, x) if name == "decoder layer" else (x,)
    with torch.set_grad_enabled(grad):
        expected = model(*inputs)
        model = SplitQuantPass()(model)
        split = [record.name.rpartition(".")[2] for record in manifest_of(model).split]
        assert set(split) == {"linear1", "linear2"}
        if after:
            model = quantized(model)
        assert torch.allclose(model(*inputs), expected, atol=0.1 if after else 1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("after", [False, True], ids=["float", "quantized"])
def test_the_fast_path_with_padding(after):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = model(x, src_key_padding_mask=padding)
    model = SplitQuantPass()(model)
    if after:
        model = quantized(model)
    # What torch leaves at padded places depends on the path it takes, split or not.
    ours, expected = (output[~padding] for output in (model(x, src_key_padding_mask=padding), expected))
    assert torch.allclose(ours, expected, atol=0.1 if after else 1e-5)


def test_training_a_transformer_encoder_layer():
    model = SplitQuantPass()(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)).train()
    model(torch.randn(3, 5, 8)).sum().backward()
    assert model.linear1.lower.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5_reads_the_dtype_of_wo(models, tokens, kind, after):
    model = models.t5(feed_forward_proj=kind)
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
    expected = model(**inputs).logits
    model = SplitQuantPass()(model)
    assert any(isinstance(m, SplitModule) for n, m in model.named_modules() if n.endswith(".wo"))
    if after:
        model = quantized(model)
    error = (model(**inputs).logits - expected).abs().max()
    assert float(error) <= (0.1 * float(expected.abs().max()) if after else 1e-5)


@torch.no_grad()
def test_generation(models, tokens):
    model = models.gpt2()
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
    model = SplitQuantPass()(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), expected)

"""Second moments: equal to the definition, for every layer type, whatever the batches look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.calibration import collect_second_moments, input_rows, iter_second_moments


def naive(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows.T @ rows / len(rows)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(input=self.drop(self.first(x)))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture
def model() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 5, 4, generator=generator) for size in (2, 3, 1)]


def test_streamed_mean_is_the_mean_over_all_rows(model: TwoLayers, batches: list[Tensor]) -> None:
    found = collect_second_moments(model, batches, linears(model))
    everything = torch.cat([batch.reshape(-1, 4) for batch in batches])
    torch.testing.assert_close(found["first"].matrix, naive(everything)[None])
    hidden = model.first(everything).detach()  # no dropout: the model was in evaluation mode
    torch.testing.assert_close(found["second"].matrix, naive(hidden)[None], rtol=1e-6, atol=1e-7)
    assert found["first"].samples == 30
    assert found["first"].matrix.dtype == torch.float64


def test_a_layer_that_is_never_called_is_recorded_with_no_samples(model: TwoLayers, batches: list[Tensor]) -> None:
    found = collect_second_moments(model, batches, linears(model))
    assert found["unused"].samples == 0
    assert found["unused"].matrix.shape == (1, 3, 3)
    assert not found["unused"].matrix.any()


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "callable", "labels", "generator"])
def test_batches_of_any_form_give_the_same(form: str, model: TwoLayers, batches: list[Tensor]) -> None:
    forms = {
        "tensor": batches,
        "tuple": [(batch,) for batch in batches],
        "list": [[batch] for batch in batches],
        "dict": [{"x": batch} for batch in batches],
        "callable": lambda: iter(batches),
        "labels": [{"x": batch, "labels": torch.zeros(1)} for batch in batches],
        "generator": (batch for batch in batches),
    }
    expected = collect_second_moments(model, batches, linears(model))["second"]
    found = collect_second_moments(model, forms[form], linears(model))["second"]
    torch.testing.assert_close(found.matrix, expected.matrix)
    assert found.samples == expected.samples


def test_padded_tokens_do_not_count_even_if_they_are_nan(model: TwoLayers, batches: list[Tensor]) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    batch = batches[0].clone()
    batch[mask == 0] = torch.nan
    found = collect_second_moments(model, [{"x": batch, "attention_mask": mask}], linears(model))
    torch.testing.assert_close(found["first"].matrix[0], naive(batch[mask == 1]))
    assert found["second"].samples == 4


def test_a_mask_of_another_shape_is_not_applied(model: TwoLayers, batches: list[Tensor]) -> None:
    mask = torch.zeros(2, 7)
    found = collect_second_moments(model, [{"x": batches[0], "attention_mask": mask}], linears(model))
    assert found["first"].samples == 10


def test_several_passes_within_max_bytes_give_the_same(model: TwoLayers, batches: list[Tensor]) -> None:
    passes = 0

    def counted() -> list[Tensor]:
        nonlocal passes
        passes += 1
        return batches

    whole = collect_second_moments(model, batches, linears(model))
    # 4 x 4 and 3 x 3 float64 matrices: 128 bytes, then twice 72.
    parts = dict(iter_second_moments(model, counted, linears(model), max_bytes=150))
    assert passes == 2
    for name, moment in whole.items():
        torch.testing.assert_close(parts[name].matrix, moment.matrix)
    with pytest.raises(InputError, match=r"one-shot.*max_bytes"):
        collect_second_moments(model, iter(batches), linears(model), max_bytes=150)


def test_nan_names_the_layer_and_everything_is_restored(model: TwoLayers, batches: list[Tensor]) -> None:
    with torch.no_grad():
        model.first.weight[0, 0] = torch.inf
    model.train()
    model.drop.eval()
    with pytest.raises(InputError, match=r"second: .*NaN or infinity"):
        collect_second_moments(model, batches, linears(model))
    assert model.training
    assert model.first.training
    assert not model.drop.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_the_model_is_left_as_it_was(model: TwoLayers, batches: list[Tensor]) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_second_moments(model, batches, linears(model))
    assert all(module.training for module in model.modules())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_batches_and_wrong_batches_are_errors(model: TwoLayers) -> None:
    with pytest.raises(InputError, match="no calibration batches"):
        collect_second_moments(model, [], linears(model))
    with pytest.raises(InputError, match="is a str"):
        collect_second_moments(model, ["text"], linears(model))


def test_wrong_options_are_errors(model: TwoLayers, batches: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="drop: no second moment for Dropout"):
        collect_second_moments(model, batches, {"drop": model.drop})
    with pytest.raises(ConfigError, match="max_bytes=0"):
        collect_second_moments(model, batches, linears(model), max_bytes=0)
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8"):
        collect_second_moments(model, batches, linears(model), dtype=torch.int8)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv1d(4, 4, 3, groups=4, padding="same", dilation=2),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 2, (4, 3), padding="same"),
    nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 2, 3, padding="valid"),
    nn.Conv3d(4, 6, (2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_unfolded_rows_times_the_weight_are_the_convolution(layer: nn.Conv2d) -> None:
    inputs = torch.randn(2, 4, *[7] * (layer.weight.ndim - 2))
    expected = layer(inputs)
    rows = input_rows(layer, inputs)
    weight = layer.weight.reshape(layer.groups, -1, rows.shape[-1])
    assert layer.bias is not None
    outputs = (rows @ weight.mT).permute(0, 2, 1).reshape(layer.out_channels, -1)
    outputs = outputs + layer.bias[:, None]
    torch.testing.assert_close(outputs, expected.transpose(0, 1).reshape(layer.out_channels, -1), rtol=1e-4, atol=1e-5)


def test_moments_of_a_grouped_convolution() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    inputs = torch.randn(3, 4, 6, 6)
    rows = input_rows(layer, inputs)
    for batches in ([inputs], list(inputs)):  # batched, and single images without a batch axis
        found = collect_second_moments(layer, batches, {"": layer})[""]
        assert found.matrix.shape == (2, 18, 18)
        assert found.samples == 3 * 16
        torch.testing.assert_close(found.matrix, torch.stack([naive(r.detach()) for r in rows]), rtol=1e-6, atol=1e-6)


def test_a_layer_that_is_only_called_conv1d_has_no_second_moment() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

    with pytest.raises(ConfigError, match="layer: no second moment for Conv1D"):
        collect_second_moments(Conv1D(), [torch.randn(7, 4)], {"layer": Conv1D()})


def test_transformers_conv1d_is_recognised_by_its_class() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

    class Projection(pytorch_utils.Conv1D):  # type: ignore[misc, name-defined]
        """A Conv1D of somebody's own."""

    layer = Projection(3, 4)
    batch = torch.randn(7, 4)
    found = collect_second_moments(layer, [batch], {"layer": layer})["layer"]
    torch.testing.assert_close(found.matrix[0], naive(batch))


def test_half_precision_inputs_are_summed_in_the_wider_type() -> None:
    layer = nn.Linear(2, 2).half()
    batch = torch.full((5000, 2), 8.0, dtype=torch.float16)
    found = collect_second_moments(layer, [batch, batch], {"layer": layer}, dtype=torch.float32)["layer"]
    torch.testing.assert_close(found.matrix, torch.full((1, 2, 2), 64.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (torch.zeros(2, 5, 3), r": first takes 4 features, and gets \(2, 5, 3\)"),
        ({"y": torch.zeros(2, 4)}, r" does not fit TwoLayers \(TypeError: .*unexpected keyword argument 'y'"),
        ((), r" does not fit TwoLayers \(TypeError: .*missing 1 required positional argument"),
        (torch.zeros(2, 4, dtype=torch.int64), r" does not fit TwoLayers \(RuntimeError: .*dtype"),
        (torch.full((2, 4), torch.nan), ": first: its calibration inputs contain NaN"),
    ],
    ids=["shape", "key", "none", "dtype", "nan"],
)
def test_a_batch_that_does_not_fit_is_named(model: TwoLayers, batches: list[Tensor], bad: object, cause: str) -> None:
    with pytest.raises(InputError, match=f"calibration batch 3{cause}"):
        collect_second_moments(model, [*batches[:2], bad, batches[2]], linears(model))
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_batch_of_a_wrong_type_is_counted_from_one(model: TwoLayers, batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="calibration batch 2 is a str"):
        collect_second_moments(model, [batches[0], "text"], linears(model))


@pytest.mark.parametrize("single", [{"x": torch.zeros(2, 4)}, 5])
def test_what_is_no_list_of_batches_is_an_error(model: TwoLayers, single: object) -> None:
    with pytest.raises(InputError, match=rf"calibration is a {type(single).__name__}: give a list"):
        collect_second_moments(model, single, linears(model))


def test_running_out_of_memory_is_not_blamed_on_the_batch(batches: list[Tensor]) -> None:
    class Full(TwoLayers):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            raise torch.OutOfMemoryError("full")

    full = Full()
    with pytest.raises(torch.OutOfMemoryError):
        collect_second_moments(full, batches, linears(full))


@pytest.mark.parametrize("inputs", [torch.zeros(2, 4, 6, 6), torch.zeros(5, 6, 6), torch.zeros(6)])
def test_a_convolution_with_inputs_of_other_channels_is_named(inputs: Tensor) -> None:
    layer = nn.Conv2d(3, 6, 3)
    with pytest.raises(InputError, match="calibration batch 1: conv takes 3 features, and gets"):
        collect_second_moments(layer, [inputs], {"conv": layer})


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.add_(1))


@pytest.mark.parametrize("given", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "dict"])
def test_batches_stay_as_they_are_whatever_the_model_does_to_its_inputs(given) -> None:
    inputs = torch.randn(8, 4)
    batches, model = [given(inputs.clone())], WritesIntoItsInput()
    for _ in range(2):
        moments = collect_second_moments(model, batches, linears(model))
        torch.testing.assert_close(moments["layer"].matrix[0].double(), naive(inputs + 1))


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_reads_what_its_labels_say():
    """Without decoder_input_ids transformers' encoder-decoders shift their labels; padding of these does not count."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32, "max_position_embeddings": 16}
    heads = {f"{one}_{name}": 2 for one in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).eval()
    labels = torch.randint(4, 32, (3, 7))
    labels[:, 5:] = -100
    batch = {"input_ids": torch.randint(4, 32, (3, 9)), "labels": labels}
    layers = {name: one for name, one in model.named_modules() if name.endswith("coder.layers.0.fc1")}
    samples = {name.split(".")[1]: one.samples for name, one in collect_second_moments(model, [batch], layers).items()}
    assert samples == {"encoder": 27, "decoder": 15}

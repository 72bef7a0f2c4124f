"""Padding is left out of each layer's statistics by the mask of the tokens which that layer reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import DecoupleQPass
from splitquant_plugins.decoupleq.capture import BlockInputs
from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.passes.calibration import collect_second_moments

ENCODER_TOKENS, DECODER_TOKENS = 3, 5


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.tanh(self.inner(x)),)


class DecoderBlock(nn.Module):
    """Attends to what the encoder returned; its feed-forward layer takes tokens without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.flat = nn.Linear(8, 8)

    def forward(self, y: Tensor, encoded: Tensor) -> Tensor:
        chances = (self.query(y) @ self.key(encoded).mT).softmax(dim=-1)
        y = y + chances @ self.value(encoded)
        return y + self.flat(y.flatten(0, 1)).view_as(y)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.encoder = Encoder()
        self.blocks = nn.ModuleList([DecoderBlock(), DecoderBlock()])
        self.head = nn.Linear(8, 4)
        self.projection: nn.Module | None = None

    def get_encoder(self) -> nn.Module:
        return self.encoder

    def forward(
        self,
        x: Tensor,
        decoder_inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        (encoded,) = self.encoder(x)
        encoded = encoded if self.projection is None else self.projection(encoded)
        y = x if decoder_inputs_embeds is None else decoder_inputs_embeds
        for block in self.blocks:
            y = block(y, encoded)
        return self.head(y)


def batch(decoder_length: int, rows: int = 4) -> dict[str, Tensor]:
    masks = torch.zeros(rows, 8, dtype=torch.long), torch.zeros(rows, decoder_length, dtype=torch.long)
    masks[0][:, :ENCODER_TOKENS], masks[1][:, :DECODER_TOKENS] = 1, 1
    values = torch.randn(rows, 8, 8), torch.randn(rows, decoder_length, 8)
    return {
        "x": values[0],
        "decoder_inputs_embeds": values[1],
        "attention_mask": masks[0],
        "decoder_attention_mask": masks[1],
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder().eval()


@pytest.mark.parametrize("decoder_length", [8, 11])  # as long as what the encoder reads, or not
def test_each_layer_counts_the_tokens_that_it_reads(model: EncoderDecoder, decoder_length: int) -> None:
    moments = collect_second_moments(model, [batch(decoder_length), batch(decoder_length)], linear_layers(model))
    for name, moment in moments.items():
        reads_encoder = name.startswith("encoder.") or name.endswith((".key", ".value"))
        assert moment.samples == 2 * 4 * (ENCODER_TOKENS if reads_encoder else DECODER_TOKENS), name


def test_a_decoder_without_a_mask_counts_all_of_its_tokens(model: EncoderDecoder) -> None:
    given = batch(8)
    del given["decoder_attention_mask"]
    moments = collect_second_moments(model, [given], linear_layers(model))
    assert {name: moment.samples for name, moment in moments.items()} == {
        "encoder.inner": 4 * ENCODER_TOKENS,
        **{f"blocks.{number}.{name}": 4 * 8 for number in (0, 1) for name in ("query", "flat")},
        **{f"blocks.{number}.{name}": 4 * ENCODER_TOKENS for number in (0, 1) for name in ("key", "value")},
        "head": 4 * 8,
    }


def test_replayed_blocks_know_the_masks(model: EncoderDecoder) -> None:
    block = model.blocks[1]
    inputs = BlockInputs.captured(model, block, [batch(8)])
    moments = collect_second_moments(inputs, inputs.batches, linear_layers(block))
    samples = {name: moment.samples // 4 for name, moment in moments.items()}
    assert samples == {"query": DECODER_TOKENS, "key": ENCODER_TOKENS, "value": ENCODER_TOKENS, "flat": DECODER_TOKENS}


@pytest.mark.parametrize("options", [{}, {"tune_blocks": True}, {"tune_model": True}], ids=str)
def test_padding_changes_nothing_that_decoupleq_solves(model: EncoderDecoder, options: dict[str, Any]) -> None:
    """Whatever stands in the decoder's padding, from which no other token reads, the solution is the same."""
    given = batch(8, rows=8)
    embeds = given["decoder_inputs_embeds"].clone()
    other = {**given, "decoder_inputs_embeds": embeds}
    embeds[:, DECODER_TOKENS:] = 5 * torch.randn(8, 8 - DECODER_TOKENS, 8)
    grid = UniformGrid(bits=2, granularity="channel", scheme="affine")
    solved = []
    for one in (given, other):
        torch.manual_seed(0)
        twin = EncoderDecoder().eval()
        DecoupleQPass(
            calibration=[one],
            rounds=1,
            starts=(1.0,),
            search_inputs=0,
            **({"block_steps": 3, "model_steps": 3} if options else {}),
            **options,
        ).apply(twin, grid=grid)
        solved.append(twin.state_dict())
    for name, value in solved[0].items():
        torch.testing.assert_close(value, solved[1][name], msg=name)


def test_a_decoder_that_reads_what_the_encoder_does_has_its_mask(model: EncoderDecoder) -> None:
    given = batch(8)
    for each in (
        {"x": given["x"], "attention_mask": given["attention_mask"]},
        (given["x"], None, given["attention_mask"]),
    ):
        moments = collect_second_moments(model, [each], linear_layers(model))
        assert {moment.samples for moment in moments.values()} == {4 * ENCODER_TOKENS}


def test_masks_may_be_given_by_position_and_the_encoder_may_be_projected(model: EncoderDecoder) -> None:
    model.projection = nn.Linear(8, 8)
    layers = linear_layers(model)
    for given in (batch(8), tuple(batch(8).values())):
        samples = {name: one.samples // 4 for name, one in collect_second_moments(model, [given], layers).items()}
        reads_encoder = {
            "encoder.inner",
            "projection",
            *(f"blocks.{n}.{name}" for n in (0, 1) for name in ("key", "value")),
        }
        assert {name for name, tokens in samples.items() if tokens == ENCODER_TOKENS} == reads_encoder
        assert {tokens for name, tokens in samples.items() if name not in reads_encoder} == {DECODER_TOKENS}


def test_masks_are_two_dimensional() -> None:
    model = nn.Sequential(nn.Linear(8, 8))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    masked = Masked()
    given = {"x": torch.randn(2, 4, 8), "attention_mask": torch.zeros(2, 1, 4, 4)}
    moments = collect_second_moments(masked, [given], {"inner.0": model[0]})
    assert moments["inner.0"].samples == 8

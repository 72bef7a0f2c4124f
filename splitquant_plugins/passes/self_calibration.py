"""Calibration data that costs nothing: a causal language model writes text of its own.

Text sampled from the model has, by construction, the distribution that the model believes in, does not run out, and
serves as calibration for every part of the package (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import ConfigError, InputError, first_line
from splitquant_plugins.passes.calibration import evaluating

# Sequences that are written side by side; more would only cost memory.
_WRITTEN_TOGETHER = 128
# What logits of the same prefix may differ by from run to run, as a part of their spread.
_SAME = 1e-2


def self_calibration(
    model: nn.Module,
    *,
    sequences: int = 1024,
    length: int = 256,
    seed: int = 0,
    temperature: float = 1.0,
    prompts: Tensor | None = None,
    batch_size: int = 16,
) -> list[dict[str, Tensor]]:
    """Return batches of text that a causal language model writes itself, for `calibration=`.

    Each batch is a dict with `input_ids` [batch_size, length], int64, and, where sequences ended early with the model's
    end token, their `attention_mask` (the rest is padding). A sequence starts with the model's start token, or without
    one with a token drawn evenly from the vocabulary, or with a row of `prompts` [rows, tokens], taken in turns; these
    count towards `length`. Tokens are drawn from the model's own probabilities at `temperature`.

    `model` is called as a causal language model of transformers is: with `input_ids`, giving logits [batch, tokens,
    vocabulary]; its cache of keys and values is used where it has one. It runs in evaluation mode and is left as it
    was. The random state of torch is neither used nor changed: the same seed gives the same text, up to what the
    arithmetic of another machine or number of threads changes in the logits.

    Raises ConfigError for options out of range, and InputError for a model that does not predict the next token.
    """
    _check_options(model, sequences, length, temperature, batch_size, seed)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(model), torch.inference_mode():
        starts = _starts(model, sequences, prompts, generator, device)
        if starts.shape[1] >= length:
            raise ConfigError(f"length={length}: prompts of {starts.shape[1]} tokens leave nothing to write")
        _refuse_unless_causal(model, starts[:1])
        ends = _ends(model)
        written = [
            _written(model, some, length, temperature, ends, generator)
            for some in torch.split(starts, _WRITTEN_TOGETHER)
        ]
    batches = []
    # Cloned, because tensors made in inference mode cannot take part in training.
    for tokens in torch.split(torch.cat(written).clone(), batch_size):
        mask = _mask(tokens, starts.shape[1], ends)
        batches.append({"input_ids": tokens} if bool(mask.all()) else {"input_ids": tokens, "attention_mask": mask})
    return batches


def _check_options(
    model: nn.Module, sequences: int, length: int, temperature: float, batch_size: int, seed: int
) -> None:
    for name, value, least in (("sequences", sequences, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: give a whole number of at least {least}")
    if not isinstance(seed, int):
        raise ConfigError(f"seed={seed!r}: give a whole number")
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature={temperature}: give a number above 0; 1 is the model's own distribution")
    longest = _setting(model, "max_position_embeddings", "n_positions")
    if isinstance(longest, int) and length > longest:
        raise ConfigError(f"length={length}: {type(model).__name__} takes at most {longest} tokens")


def _setting(model: nn.Module, *names: str) -> Any:
    """The first of these settings that the model's generation config or config has a value for."""
    for home in ("generation_config", "config"):
        for name in names:
            value = getattr(getattr(model, home, None), name, None)
            if value is not None:
                return value
    return None


def _starts(
    model: nn.Module, sequences: int, prompts: Tensor | None, generator: torch.Generator, device: torch.device
) -> Tensor:
    """The first tokens of every sequence, [sequences, tokens]."""
    if prompts is not None:
        if prompts.ndim != 2 or not prompts.numel() or prompts.is_floating_point():
            raise InputError(f"prompts of {prompts.dtype}, {tuple(prompts.shape)}: expected token ids, [rows, tokens]")
        rows = torch.arange(sequences) % len(prompts)
        return prompts.to(device, torch.int64)[rows.to(device)]
    first = _setting(model, "bos_token_id", "decoder_start_token_id")
    if isinstance(first, int):
        return torch.full((sequences, 1), first, device=device)
    vocabulary = _setting(model, "vocab_size")
    if not isinstance(vocabulary, int):
        raise InputError(
            f"{type(model).__name__} tells neither its start token nor the size of its vocabulary (in config): "
            "give prompts=token ids, [rows, tokens]"
        )
    return torch.randint(vocabulary, (sequences, 1), generator=generator, device=device)


def _ends(model: nn.Module) -> Tensor:
    """Tokens that end a sequence."""
    found = _setting(model, "eos_token_id")
    ends = [] if found is None else found if isinstance(found, (list, tuple)) else [found]
    return torch.tensor(list(ends), dtype=torch.int64)


def _called(model: nn.Module, **inputs: Any) -> tuple[Tensor, Any]:
    """Logits [batch, tokens, vocabulary] and the cache, or None."""
    try:
        outputs = model(**inputs)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__} cannot write text of its own: called with {', '.join(inputs)} it raises "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point():
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(outputs).__name__
        raise InputError(
            f"{type(model).__name__} cannot write text of its own: expected logits [batch, tokens, vocabulary] for "
            f"input_ids, found {shape}; give calibration batches"
        )
    return logits, getattr(outputs, "past_key_values", None)


def _refuse_unless_causal(model: nn.Module, start: Tensor) -> None:
    """Raise InputError where later tokens change the logits of earlier ones, or the shapes are not those of text."""
    short, _ = _called(model, input_ids=start)
    another = (start[:, -1:] + 1) % short.shape[-1]
    longer, _ = _called(model, input_ids=torch.cat([start, another], dim=1))
    if short.shape[1] != start.shape[1] or longer.shape[1] != start.shape[1] + 1:
        raise InputError(f"{type(model).__name__} cannot write text of its own: it has no logits for every token")
    if not torch.isfinite(short).all():
        raise InputError(f"{type(model).__name__} cannot write text of its own: its logits contain NaN or infinity")
    # Medians, because a model may rule tokens out with huge logits.
    change, size = (longer[:, :-1] - short).abs().median(), (short - short.median()).abs().median()
    if change > _SAME * size:
        raise InputError(
            f"{type(model).__name__} cannot write text of its own: later tokens change its logits for earlier ones, "
            "so it is no causal language model; give calibration batches"
        )


def _written(
    model: nn.Module, tokens: Tensor, length: int, temperature: float, ends: Tensor, generator: torch.Generator
) -> Tensor:
    """Sequences [rows, length] that go on from `tokens`; after an end token comes only that token."""
    ends = ends.to(tokens.device)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    caches = {"use_cache": True} if _takes(model, "use_cache") else {}
    cache, last = None, tokens
    while tokens.shape[1] < length:
        known: dict[str, Any] = (
            {"input_ids": tokens} if cache is None else {"input_ids": last, "past_key_values": cache}
        )
        logits, cache = _called(model, **known, **caches)
        if not torch.isfinite(logits[:, -1]).all():
            raise InputError(f"{type(model).__name__}: its logits contain NaN or infinity while it writes")
        chances = torch.softmax(logits[:, -1].float() / temperature, dim=-1)
        drawn = torch.multinomial(chances, 1, generator=generator)
        last = torch.where(done[:, None], tokens[:, -1:], drawn)
        done |= torch.isin(last[:, 0], ends)
        tokens = torch.cat([tokens, last], dim=1)
        if bool(done.all()):
            rest = tokens[:, -1:].expand(-1, length - tokens.shape[1])
            return torch.cat([tokens, rest], dim=1)
    return tokens


def _mask(tokens: Tensor, started: int, ends: Tensor) -> Tensor:
    """1 for every token up to and with the first end token after the start, 0 for the padding, int64."""
    ended = torch.isin(tokens, ends.to(tokens.device))
    ended[:, :started] = False
    return (ended.long().cumsum(dim=1) - ended.long() == 0).long()


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(one.name == name or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)

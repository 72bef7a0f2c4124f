"""Loading transformers models and tokenizers from a folder or the Hub, with errors a user can act on.

Code that comes with a model is never run: transformers would ask on a terminal whether to, unless it is told not to.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import nn

from splitquant_plugins.checkpoints.files import read_json, write_json
from splitquant_plugins.checkpoints.pretrained_config import plain_configuration
from splitquant_plugins.checkpoints.source import SINGLE_FILE, Source, is_sharded
from splitquant_plugins.errors import InputError, MissingExtraError, first_line, optional


def require_transformers() -> Any:
    """Return the transformers package, or raise MissingExtraError."""
    return optional("transformers", "this needs", "eval")


def model_class(config: Any, where: str | Path) -> Any:
    """Return the transformers class that a configuration names; anything else is an InputError."""
    transformers = require_transformers()
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(f"{where}: config.json names no transformers architecture (architectures={names})")
    return found


def empty_model(config: Any, where: str | Path) -> nn.Module:
    """Make a model of that configuration, with weights to be loaded into."""
    try:
        made: nn.Module = model_class(config, where)._from_config(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: config.json describes no model: {first_line(error)}") from None
    return made


def forget_tied_embeddings(model: nn.Module, layers: Container[str] = ()) -> None:
    """Tell a transformers model that its head, split or one of `layers`, no longer shares the embedding's weight.

    Its configuration goes on saying that embeddings are tied where others are, or where the model may compute
    differently by it, as encoder-decoders like UMT5 do.
    """
    config: Any = getattr(model, "config", None)
    tied = getattr(model, "all_tied_weights_keys", None)
    others: dict[str, str] = {}
    if isinstance(tied, dict):
        there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        others = {name: of for name, of in tied.items() if name in there and name.rpartition(".")[0] not in layers}
        cast("Any", model).all_tied_weights_keys = others
    may_say = not others and not getattr(config, "is_encoder_decoder", False)
    if may_say and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def load_classifier(model: str) -> nn.Module:
    """Load a sequence classifier from a folder or a Hub id, in evaluation mode; InputError where it cannot be."""
    transformers = require_transformers()
    _refuse_missing_folder(model)
    return _loaded_whole(transformers.AutoModelForSequenceClassification, model)


def load_model(model: str) -> nn.Module:
    """Load a model from a folder or a Hub id as the architecture that its configuration names.

    The model is in evaluation mode. Raises InputError, naming what is missing.
    """
    return _loaded_whole(model_class(load_config(model), model), model)


def load_config(model: str | Path) -> Any:
    """Load a configuration from a folder or a Hub id; a missing or damaged one is an InputError."""
    transformers = require_transformers()
    _refuse_missing_folder(str(model))
    try:
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a file that is not what it should be
        raise InputError(f"cannot load the configuration of {model}: {first_line(error)}") from None


def model_of_folder(folder: Path) -> nn.Module:
    """Make the unsplit transformers model that a saved folder describes, with weights to be loaded into."""
    try:
        config = load_config(folder)
    except InputError as error:
        raise InputError(f"{error}; for a model that is not of transformers, pass the unsplit float model") from None
    with torch.random.fork_rng(devices=[]):
        model = empty_model(config, folder)
    load_generation_config(model, folder)
    return model


def _loaded_whole(kind: Any, model: str) -> nn.Module:
    """Load a model in evaluation mode; one whose checkpoint lacks weights, which would be random, is refused."""
    folder = Path(model)
    if is_sharded(folder) and not (folder / SINGLE_FILE).is_file():
        Source(folder, check_total=False)  # transformers takes an index that is wrong in silence
    try:
        # Mismatches are refused below, with their names.
        loaded, report = kind.from_pretrained(
            model, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    except Exception as error:  # whatever transformers makes of a file that is not what it should be
        if is_sharded(folder) or (folder / SINGLE_FILE).is_file():
            Source(folder, check_total=False)  # names the file that is damaged
        if isinstance(error, UnpicklingError):
            raise InputError(f"{model}: its pickled weights are damaged or no tensors; give safetensors") from None
        raise InputError(f"cannot load model {model}: {first_line(error)}") from None
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise InputError(f"{model}: {name} is {list(stored)}, and {list(wanted)} in {type(loaded).__name__}")
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{model} lacks {len(missing)} weights of a {type(loaded).__name__}, {missing[0]} among them")
    whole: nn.Module = loaded.eval()
    return whole


GENERATION_FILE = "generation_config.json"


def save_configs(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a transformers model, and how it generates, where it says so."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        write_json(folder / "config.json", {**plain_configuration(config), "architectures": [type(model).__name__]})
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            write_json(folder / GENERATION_FILE, generation.to_dict())


def load_generation_config(model: nn.Module, folder: Path) -> None:
    """Give a model the generation config of a folder, where there is one."""
    if hasattr(model, "generation_config") and (folder / GENERATION_FILE).is_file():
        transformers = require_transformers()
        content = read_json(folder / GENERATION_FILE)
        try:
            cast(Any, model).generation_config = transformers.GenerationConfig.from_dict(content)
        except Exception as error:  # whatever transformers makes of values that are not what they should be
            raise InputError(f"{folder / GENERATION_FILE} is damaged: {first_line(error)}") from None


# Position numbers of these start behind that of the padding token.
OFFSET_POSITIONS = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "xmod", "data2vec-text"),
    *("longformer", "mpnet", "esm", "ibert", "luke", "mluke", "layoutlmv3", "lilt", "markuplm", "bigbird_roberta"),
)


def max_length_of(config: Any, limit: int = 512) -> int:
    """Longest input in tokens that a model of that configuration takes, at most `limit`."""
    positions = int(getattr(config, "max_position_embeddings", None) or limit)
    if getattr(config, "model_type", None) in OFFSET_POSITIONS:
        padding = getattr(config, "pad_token_id", None)
        positions -= 1 + (1 if padding is None else int(padding))
    return max(1, min(positions, limit))


def load_tokenizer(model: str, *, padding: bool = True) -> Any:
    """Load the tokenizer of a model; one without its vocabulary or, with `padding`, a padding token is refused."""
    transformers = require_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a file that is not what it should be
        raise InputError(f"cannot load the tokenizer of {model}: {first_line(error)}") from None
    if len(tokenizer) < 100:  # a vocabulary that was not found leaves only the special tokens
        raise InputError(f"the tokenizer of {model} knows only {len(tokenizer)} tokens; is vocab.txt there?")
    if padding and tokenizer.pad_token is None:
        raise InputError(
            f"the tokenizer of {model} has no padding token, and texts of several lengths cannot be put together: set "
            "pad_token in its tokenizer_config.json, and pad_token_id in config.json"
        )
    return tokenizer


def load_image_processor(model: str) -> Any:
    """Load what prepares pictures for a model."""
    transformers = require_transformers()
    optional("PIL", "pictures need pillow, imported as", "image")
    try:
        return transformers.AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except ImportError as error:  # some are written for torchvision alone
        raise MissingExtraError(
            f"the image processor of {model} is missing something: {first_line(error)}; try pip install torchvision"
        ) from None
    except Exception as error:  # whatever transformers makes of a file that is not what it should be
        raise InputError(f"cannot load the image processor of {model}: {first_line(error)}") from None


def _refuse_missing_folder(model: str) -> None:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{model} holds no config.json: give a folder with a transformers model, or a Hub id")
    elif path.suffix == ".py":
        raise InputError(f"{model} is a Python file: give FILE.py:FUNCTION, a function of it that returns the model")
    elif path.exists():
        raise InputError(f"{model} is no folder: give a folder with a transformers model, or a Hub id")
    elif path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise InputError(f"no such model: {model} is neither a folder nor a Hub id")

"""Image classifiers of transformers, on folders of pictures or on datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.transformers_models import load_image_processor
from splitquant_plugins.errors import InputError, first_line, optional
from splitquant_plugins.evaluation.kept import Kept
from splitquant_plugins.evaluation.rows import SPLITS, is_saved_dataset, load_dataset, refuse_function
from splitquant_plugins.evaluation.scores import ClassScore
from splitquant_plugins.evaluation.tasks.base import CALIBRATION_INPUTS, Examples, Kind
from splitquant_plugins.evaluation.tasks.text_classification import CLASS_MEASURES, OWN_TEXT
from splitquant_plugins.evaluation.tasks.transformers_model import TransformersModel
from splitquant_plugins.evaluation.texts import label_number

if TYPE_CHECKING:
    from splitquant_plugins.backends import Batch

IMAGE_CLASSIFICATION = Kind("image-classification", "accuracy", CLASS_MEASURES, ClassScore)
SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")
# Pictures of other formats are not opened, and not passed over either.
OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".ppm", ".tif", ".tiff", ".webp")
BATCH = 32
NAMED = ("image", "img")


@dataclass(frozen=True)
class Picture:
    """A picture that is opened when it is needed; `where` names it in errors, `label` is its class as it is given."""

    where: str
    label: Any
    open: Callable[[], Any]


class ImageClassification(TransformersModel):
    """An image classifier, on a folder with a folder of PNG or JPEG files for each class, or on a dataset."""

    kind = IMAGE_CLASSIFICATION

    def examples(self, data: str, limit: int | None = None) -> Examples:
        """Find pictures and their labels; they are opened batch by batch."""
        found = _pictures(data, need_label=True, limit=limit)
        ids = self.label_numbers()
        labels = torch.tensor([label_number(each.label, ids, each.where) for each in found])
        return Examples(data, len(found), self._batches(found), torch.split(labels, BATCH))

    def calibration(self, source: str, limit: int = CALIBRATION_INPUTS) -> list[Batch]:
        """Open the first pictures; with class folders, evenly over the classes."""
        if source == OWN_TEXT:
            raise InputError(f"{self.model} is an image classifier, and cannot write text of its own: give pictures")
        return list(self._batches(_pictures(source, need_label=False, limit=limit)))

    def example_batch(self, model: nn.Module) -> Batch:
        """Make noise of the size that the configuration says."""
        sizes: Any = getattr(self.config, "image_size", None) or 224
        height, width = (sizes, sizes) if isinstance(sizes, int) else tuple(sizes)[:2]
        channels = int(getattr(self.config, "num_channels", None) or 3)
        return {"pixel_values": torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))}

    def _batches(self, found: Sequence[Picture]) -> Sequence[Batch]:
        processor = load_image_processor(self.model)

        def make(number: int) -> dict[str, Tensor]:
            group = found[number * BATCH : (number + 1) * BATCH]
            images = [_opened(picture) for picture in group]
            try:
                made = processor(images=images, return_tensors="pt")["pixel_values"]
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"the image processor of {self.model} cannot take {group[0].where} and those behind it: "
                    f"{first_line(error)}"
                ) from None
            return {"pixel_values": made}

        return Kept(-(-len(found) // BATCH), make)


def _pictures(source: str, *, need_label: bool, limit: int | None) -> list[Picture]:
    """Find pictures: in folders of classes, of which each gives one in turn, in one folder, or in a dataset."""
    refuse_function(source)
    path = Path(source)
    if path.is_file():
        raise InputError(f"{source} is a file: give a folder that has a folder of PNG or JPEG files for each class")
    if path.is_dir() and not is_saved_dataset(path):
        found = _in_folder(path, need_label=need_label)
    else:
        local = path.is_absolute() or source.startswith(".") or source.count("/") > 1
        if local and not path.is_dir():
            raise InputError(f"no such data: {source} is neither a folder nor a Hub id")
        found = _in_dataset(source, need_label=need_label, limit=limit)
    if not found:
        raise InputError(f"{source} has no pictures")
    return found[:limit]


def _in_folder(path: Path, *, need_label: bool) -> list[Picture]:
    require_pillow()
    split = next((path / name for name in SPLITS if (path / name).is_dir() and _classes(path / name)), path)
    classes = _classes(split)
    if not classes and need_label:
        raise InputError(f"{split} has no folders of PNG or JPEG files, one for each class")
    _refuse_deeper_pictures(split)
    alone = [_of_file(file, None) for file in _files(split)]
    if alone and classes:
        raise InputError(f"{split} has pictures beside the folders of classes, {alone[0].where} for one")
    columns = [[_of_file(file, folder.name) for file in _files(folder)] for folder in classes]
    longest = max((len(column) for column in columns), default=0)
    # One of each class in turn, so that the first ones of a limit are of all classes.
    return alone + [column[row] for row in range(longest) for column in columns if row < len(column)]


def _classes(path: Path) -> list[Path]:
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _files(folder)]


def _files(path: Path) -> list[Path]:
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    other = next((file for file in files if file.suffix.lower() in OTHER_SUFFIXES), None)
    if other is not None:
        raise InputError(f"{other} is neither PNG nor JPEG: convert it, or take it out of the folder")
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def _refuse_deeper_pictures(path: Path) -> None:
    """Raise InputError for pictures below the folders of classes, where none are looked for."""
    for folder in (each for each in sorted(path.iterdir()) if each.is_dir()):
        for inner in (each for each in sorted(folder.iterdir()) if each.is_dir()):
            if found := _files(inner):
                raise InputError(f"{found[0]} is not in the folder of its class itself: put it into {folder}")


def _of_file(file: Path, label: str | None) -> Picture:
    def opened() -> Any:
        from PIL import Image

        return Image.open(file, formats=FORMATS)

    return Picture(str(file), label, opened)


def _in_dataset(source: str, *, need_label: bool, limit: int | None) -> list[Picture]:
    require_pillow()
    chosen = load_dataset(source)
    name = next((each for each in NAMED if each in chosen.column_names), None)
    if name is None or (need_label and "label" not in chosen.column_names):
        needs = "image and label" if need_label else "image"
        raise InputError(f"data {source} has the columns {', '.join(chosen.column_names)}; it needs {needs}")
    labels = islice(chosen["label"], limit) if need_label else [None] * min(len(chosen), limit or len(chosen))

    def at(number: int) -> Callable[[], Any]:
        return lambda: chosen[number][name]

    return [Picture(f"{source}, row {number + 1}", label, at(number)) for number, label in enumerate(labels)]


def _opened(picture: Picture) -> Any:
    try:
        return picture.open().convert("RGB")
    except Exception as error:  # whatever pillow makes of a file that is not what it should be
        raise InputError(f"{picture.where} is no picture that can be read: {first_line(error)}") from None


def require_pillow() -> None:
    """Raise MissingExtraError unless pillow can be imported."""
    optional("PIL", "pictures need pillow, imported as", "image")

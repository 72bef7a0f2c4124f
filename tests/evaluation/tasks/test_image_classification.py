"""Image classifiers on folders of pictures, and on datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.subject import load_task_subject
from splitquant_plugins.evaluation.tasks.choose import task_of
from splitquant_plugins.evaluation.tasks.image_classification import ImageClassification

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
COLOURS = {"LABEL_0": (200, 0, 0), "LABEL_1": (0, 200, 0)}


@pytest.fixture
def classifier(models: Any, tmp_path: Path) -> Path:
    models.vit(num_labels=2).save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "vit"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number, suffix in enumerate((".png", ".jpg", ".JPEG")):
            mode = "L" if number == 2 else "RGB"
            picture = Image.new("RGB", (20 + number, 18), colour).convert(mode)
            picture.save(tmp_path / "pictures" / name / f"{number}{suffix}")
    return tmp_path / "pictures"


def test_a_folder_of_class_folders(classifier: Path, pictures: Path) -> None:
    task = task_of(str(classifier))
    assert isinstance(task, ImageClassification)
    subject = load_task_subject(task, str(pictures))
    assert (subject.examples.count, subject.examples.batches[0]["pixel_values"].shape) == (6, (6, 3, 16, 16))
    assert subject.examples.targets is not None
    assert subject.examples.targets[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert task.examples(str(pictures), 2).targets[0].tolist() == [0, 1]  # type: ignore[index]
    assert 0 <= float(subject.figures["accuracy"] or 0) <= 1
    assert len(task.calibration(str(pictures / "LABEL_1"))[0]["pixel_values"]) == 3
    assert task.example_batch(subject.model)["pixel_values"].shape == (2, 3, 16, 16)  # type: ignore[index]


def test_the_test_folder_is_taken_where_there_is_one(classifier: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "splits").mkdir()
    pictures.rename(tmp_path / "splits" / "test")
    (tmp_path / "splits" / "train" / "LABEL_0").mkdir(parents=True)
    assert task_of(str(classifier)).examples(str(tmp_path / "splits")).count == 6


def test_a_saved_dataset(classifier: Path, pictures: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(pictures / name / "0.png") for name in COLOURS], "label": [1, 0]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    found = task_of(str(classifier)).examples(str(tmp_path / "saved"))
    assert found.targets[0].tolist() == [1, 0]  # type: ignore[index]
    assert found.batches[0]["pixel_values"].shape == (2, 3, 16, 16)
    made.rename_column("image", "photo").save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="has the columns photo, label; it needs image and label"):
        task_of(str(classifier)).examples(str(tmp_path / "other"))


def test_no_picture_is_passed_over(classifier: Path, pictures: Path) -> None:
    task = task_of(str(classifier))
    (pictures / "LABEL_0" / "notes.txt").write_text("no picture")
    assert task.examples(str(pictures)).count == 6
    (pictures / "LABEL_0" / "more").mkdir()
    deeper = (pictures / "LABEL_0" / "0.png").rename(pictures / "LABEL_0" / "more" / "0.png")
    with pytest.raises(InputError, match=r"more/0.png is not in the folder of its class itself"):
        task.examples(str(pictures))
    deeper.rename(pictures / "LABEL_0" / "0.webp")
    for data in (pictures, pictures / "LABEL_0"):
        with pytest.raises(InputError, match=r"LABEL_0/0.webp is neither PNG nor JPEG: convert it"):
            task.calibration(str(data))


def test_folders_that_are_wrong(classifier: Path, pictures: Path, tmp_path: Path) -> None:
    task = task_of(str(classifier))
    (pictures / "LABEL_0" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"LABEL_0/0.png is no picture that can be read"):
        load_task_subject(task, str(pictures))
    (pictures / "dogs").mkdir()
    (pictures / "LABEL_1" / "0.png").rename(pictures / "dogs" / "0.png")
    with pytest.raises(InputError, match=r"dogs/0.png: label 'dogs' is not one of the model's"):
        task.examples(str(pictures))
    (pictures / "dogs" / "0.png").rename(pictures / "0.png")
    with pytest.raises(InputError, match="pictures beside the folders of classes"):
        task.examples(str(pictures))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no folders of PNG or JPEG files"):
        task.examples(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="has no pictures"):
        task.calibration(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="no such data"):
        task.examples(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="is a file: give a folder"):
        task.examples(str(classifier / "config.json"))
    with pytest.raises(InputError, match="give pictures"):
        task.calibration("self")
    (classifier / "preprocessor_config.json").unlink()
    (pictures / "0.png").unlink()
    with pytest.raises(InputError, match="cannot load the image processor"):
        task.examples(str(pictures))

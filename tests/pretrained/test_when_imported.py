"""Being told when a module is imported."""

import importlib
import importlib.util
import inspect
import sys

import pytest

from splitquant_plugins.pretrained.when_imported import when_imported


def test_a_module_that_is_watched_tells_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "watched_by_test.py").write_text("value = 5")
    monkeypatch.syspath_prepend(tmp_path)
    finders, heard = list(sys.meta_path), []
    when_imported("watched_by_test", lambda: heard.append(sys.modules["watched_by_test"].value))
    when_imported("watched_by_test", lambda: heard.append("twice"))
    assert importlib.util.find_spec("watched_by_test") is not None
    assert heard == []
    module = importlib.import_module("watched_by_test")
    assert heard == [5]
    assert sys.meta_path == finders
    assert inspect.getsource(module).strip() == "value = 5"
    when_imported("watched_by_test", lambda: heard.append("at once"))
    assert heard == [5, "at once"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("watched_by_test.no_package")
    del sys.modules["watched_by_test"]

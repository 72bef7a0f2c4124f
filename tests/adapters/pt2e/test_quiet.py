"""Vendors are quiet, this package is not."""

from __future__ import annotations

import logging
import warnings

import pytest
from splitquant_pt2e.quiet import quiet

from splitquant_plugins.errors import SplitQuantWarning


def speak():
    with quiet() as said:
        print("42 cycles")
        warnings.warn("too new", UserWarning, stacklevel=1)
        logging.getLogger("vendor").warning("cannot resolve")
        warnings.warn("a layer is left whole", SplitQuantWarning, stacklevel=1)
    return said.getvalue()


def test_only_own_warnings_are_heard(capsys, caplog):
    with pytest.warns(SplitQuantWarning) as heard:
        assert speak() == "42 cycles\n"
    assert [str(one.message) for one in heard] == ["a layer is left whole"]
    assert not capsys.readouterr().out
    assert not caplog.records
    logging.getLogger("vendor").warning("heard again")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("level", "within"), [(logging.INFO, logging.WARNING), (logging.ERROR, logging.ERROR)])
def test_what_asks_for_the_level_of_its_logger_is_quiet_too(monkeypatch, level, within):
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    logging.root.setLevel(level)
    with quiet():
        assert logging.getLogger("vendor.backend").getEffectiveLevel() == within
    assert logging.root.level == level

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

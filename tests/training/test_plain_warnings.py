from __future__ import annotations

import logging
import sys
import warnings

import pytest

from meshpeft.training.streams import plain_warnings


def test_a_warning_of_ours_is_one_sentence_of_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain_warnings("meshpeft finetune"):
        warnings.warn("the data are few", stacklevel=1)
        monkeypatch.setenv("RANK", "1")
        warnings.warn("the data are few indeed", stacklevel=1)
    assert capsys.readouterr().err == "meshpeft finetune: warning: the data are few\n"


def test_what_other_packages_say_to_their_developers_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise() -> None:
        for category in (DeprecationWarning, FutureWarning):
            warnings.warn_explicit("isinstance(treespec, LeafSpec) is deprecated", category, "_pytree.py", 1)
        logging.getLogger("torchao").warning("Failed to load _C_cutlass.so")

    monkeypatch.setattr(sys, "warnoptions", [])
    with plain_warnings("meshpeft finetune"):
        warnings.simplefilter("always")
        noise()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "warnoptions", ["always"])

    def told() -> None:
        with plain_warnings("meshpeft finetune"):
            warnings.simplefilter("always")
            noise()

    with pytest.warns(FutureWarning, match="LeafSpec"):
        told()

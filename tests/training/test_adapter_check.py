"""What a run is told of its adapter before anything is read."""

from __future__ import annotations

import warnings

from meshpeft.training.adapters import check_adapter
from meshpeft.training.base import find_base
from meshpeft.training.config import FinetuneConfig


def test_each_kind_of_doubt_is_said_once() -> None:
    # More than the channels of any of the 16 layers, whose smaller sides differ.
    config = FinetuneConfig(rank=2048, exclude_modules=["output_layer", "absent"]).resolved()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_adapter(find_base(None), config)
    exclusion, rank = sorted((str(warning.message) for warning in caught), key=lambda text: "absent" not in text)
    assert "'absent'" in exclusion
    assert "dim=2048 is above the layer's smaller side" in rank
    assert rank.endswith("(and 15 more of the kind)")

"""The plugin of `make test-latest` finds deprecated calls of ours and no others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.utils.deprecation import deprecate_kwarg
from typing_extensions import deprecated

from tests.latest import HANDLER, warn

LOG = logging.getLogger("transformers.models")


@deprecate_kwarg("old", version="99.0.0", new_name="new")  # type: ignore[untyped-decorator]
def renamed(new: int) -> int:
    return new


@torch.no_grad()
def through_torch(**arguments: Any) -> Any:
    return renamed(**arguments)


@deprecated("gone soon", category=FutureWarning)
def gone_soon() -> int:
    return 1


@pytest.fixture
def latest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin, for one test."""
    monkeypatch.setattr(warnings, "warn", warn)
    LOG.addHandler(HANDLER)
    yield
    LOG.removeHandler(HANDLER)


@pytest.mark.usefixtures("latest")
def test_a_deprecated_argument_of_ours_is_an_error() -> None:
    assert renamed(new=3) == 3
    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        renamed(old=3)
    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        through_torch(old=3)
    with pytest.raises(FutureWarning, match="gone soon"):
        gone_soon()


@pytest.mark.usefixtures("latest")
def test_a_record_of_a_deprecation_is_an_error() -> None:
    LOG.warning("a word about something else")
    with pytest.raises(FutureWarning, match="`past_key_values` is deprecated"):
        LOG.warning("`%s` is deprecated", "past_key_values")


@pytest.mark.usefixtures("latest")
def test_a_deprecated_argument_of_somebody_elses_is_a_warning() -> None:
    theirs = compile("renamed(old=3)", "/elsewhere/theirs.py", "exec")
    with pytest.warns(FutureWarning, match="`old` is deprecated"):
        exec(theirs, {"renamed": renamed})


@pytest.mark.usefixtures("latest")
def test_what_a_filter_ignores_is_no_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert renamed(old=3) == 3


@pytest.mark.usefixtures("latest")
def test_other_warnings_stay_warnings() -> None:
    with pytest.warns(UserWarning, match="a word"):
        warnings.warn("a word", stacklevel=1)

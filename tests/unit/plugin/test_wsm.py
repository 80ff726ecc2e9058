"""What WSM promises without a model."""

from __future__ import annotations

import pytest

from wsm_megatron.plugin.wsm import WSM


@pytest.mark.parametrize(
    ("former", "name"), [("keep", "snapshot"), ("resume", "refill"), ("recipe", "coefficients")]
)
def test_former_names_still_do(former: str, name: str) -> None:
    wsm = WSM.__new__(WSM)
    with pytest.warns(DeprecationWarning, match=f"WSM.{former} is WSM.{name} now"):
        assert getattr(wsm, former) == getattr(wsm, name)


def test_an_unknown_name_is_none_of_them() -> None:
    with pytest.raises(AttributeError, match="'WSM' object has no attribute 'kepp'"):
        WSM.__new__(WSM).kepp  # noqa: B018

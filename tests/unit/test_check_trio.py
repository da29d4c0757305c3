"""Tests that a Trio without a private name that we use is refused, and the name is said."""

from __future__ import annotations

import pytest

from trio_uring import IncompatibleTrioError
from trio_uring._trio_private import TrioSocket, check_trio


@pytest.mark.parametrize("name", ["_resolve_address_nocp", "_nonblocking_helper"])
def test_a_missing_method_of_sockets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trio()
    monkeypatch.delattr(TrioSocket, name)
    with pytest.raises(IncompatibleTrioError, match=name):
        check_trio()

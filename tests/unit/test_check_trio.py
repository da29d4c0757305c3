"""A Trio without a private name that we use is refused, and the name is said.

In a Python of its own: where Trio is patched already, it is not looked at again.
"""

from __future__ import annotations

import pytest
from children import output_of, run_python


@pytest.mark.parametrize("name", ["_resolve_address_nocp", "_nonblocking_helper"])
def test_a_missing_method_of_sockets(name: str) -> None:
    program = f"""
from trio_uring import IncompatibleTrioError
from trio_uring._trio_private import TrioSocket, check_trio

check_trio()
del TrioSocket.{name}
try:
    check_trio()
except IncompatibleTrioError as exc:
    print(exc)
"""
    [line] = output_of(run_python(program))
    assert f"does not find _SocketType.{name} in it" in line

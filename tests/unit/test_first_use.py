"""The package imports some of its names on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest
from children import output_of, run_python

import trio_uring


def test_every_public_name_is_there() -> None:
    for name in trio_uring.__all__:
        assert getattr(trio_uring, name) is not None
    assert set(trio_uring.__all__) <= set(dir(trio_uring))
    with pytest.raises(AttributeError, match="'trio_uring' has no attribute 'sendfile'"):
        trio_uring.sendfile  # type: ignore[attr-defined]  # noqa: B018


def test_what_a_run_does_not_use_is_not_imported() -> None:
    lines = output_of(
        run_python("""
            import sys, trio, trio_uring
            later = ["trio_uring._channels", "trio_uring._multishot", "trio_uring._transfers"]
            trio_uring.run(trio.sleep, 0)
            print([name for name in later if name in sys.modules])
            from trio_uring import serve_threads, receive_many, send_file
            from trio_uring import *
            print([name for name in later if name in sys.modules] == later, relay.__module__)
        """)
    )
    assert lines == ["[]", "True trio_uring._transfers._relay"]


def test_lowlevel_needs_no_import_of_its_own() -> None:
    programs = [
        "import trio_uring; trio_uring.lowlevel.operations.nop(); trio_uring.lowlevel.on_ring",
        "from trio_uring import lowlevel; lowlevel.operations.nop()",
        "from trio_uring.lowlevel import on_ring, operations; operations.nop()",
    ]
    for program in programs:
        subprocess.run([sys.executable, "-c", program], check=True)

"""The constants in uapi.py agree with our C header, the system's headers and each other."""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import pytest

from trio_uring._kernel import uapi
from trio_uring._kernel.uapi import OPCODE_SINCE, Opcode

OUR_HEADER = Path(__file__).parents[2] / "trio_uring" / "_kernel" / "uapi.h"
SYSTEM_HEADERS = [
    Path("/usr/include/linux/io_uring.h"),
    Path("/usr/include/linux/io_uring/query.h"),
    Path("/usr/include/linux/futex.h"),
]

# Where a name of the kernel is found in uapi.py: without its prefix, in this class (None: in
# the module). A prefix may lead to several places; the first that has the name counts.
PLACES: list[tuple[str, type[Enum] | None]] = [
    ("IORING_OP_", uapi.Opcode),
    ("IORING_SETUP_", uapi.SetupFlag),
    ("IORING_FEAT_", uapi.FeatureFlag),
    ("IORING_ENTER_", uapi.EnterFlag),
    ("IOSQE_", uapi.SqeFlag),
    ("IORING_CQE_F_", uapi.CqeFlag),
    ("IORING_CQE_", uapi.CqeFlag),  # IORING_CQE_F_32: a member cannot be called 32
    ("IORING_SQ_", uapi.SqFlag),
    ("IORING_CQ_", uapi.CqFlag),
    ("IORING_REGISTER_", uapi.RegisterOpcode),
    ("IORING_", uapi.RegisterOpcode),  # IORING_UNREGISTER_*
    ("IORING_RESTRICTION_", uapi.RestrictionOpcode),
    ("IORING_FSYNC_", uapi.FsyncFlag),
    ("IORING_TIMEOUT_", uapi.TimeoutFlag),
    ("IORING_", uapi.TimeoutFlag),  # IORING_LINK_TIMEOUT_UPDATE
    ("IORING_ASYNC_CANCEL_", uapi.CancelFlag),
    ("IORING_RECVSEND_", uapi.RecvSendFlag),
    ("IORING_RECV_", uapi.RecvSendFlag),
    ("IORING_SEND_", uapi.RecvSendFlag),
    ("IORING_ACCEPT_", uapi.AcceptFlag),
    ("IORING_MSG_", uapi.MsgRingCommand),
    ("FUTEX2_", uapi.Futex2Flag),
    ("IORING_", None),
    ("IO_URING_", None),
    ("", None),
]


def test_our_two_mirrors_agree() -> None:
    # Each holds only what is used there.
    numbers = ((name, value, mirrored(name)) for name, value in header_numbers(OUR_HEADER))
    both = {name: (value, twin) for name, value, twin in numbers if twin is not None}
    assert len(both) > 10
    assert all(value == twin for value, twin in both.values()), both


@pytest.mark.parametrize("header", SYSTEM_HEADERS, ids=lambda header: header.name)
def test_system_header_agrees(header: Path) -> None:
    if not header.exists():
        pytest.skip(f"no {header}")
    theirs = {name: value for name, value in header_numbers(header) if mirrored(name) is not None}
    assert theirs, "the parser found nothing that we know"
    assert theirs == {name: mirrored(name) for name in theirs}


def test_our_header_agrees_with_the_system_s() -> None:
    system = SYSTEM_HEADERS[0]
    if not system.exists():
        pytest.skip(f"no {system}")
    theirs = dict(header_numbers(system))
    ours = {name: value for name, value in header_numbers(OUR_HEADER) if name in theirs}
    assert len(ours) > 15
    assert ours == {name: theirs[name] for name in ours}


def test_every_class_has_a_place() -> None:
    # Otherwise a new class in uapi.py would escape the two tests above.
    classes = {
        value
        for value in vars(uapi).values()
        if isinstance(value, type) and value.__module__ == uapi.__name__
    }
    assert classes == {place for _, place in PLACES if place is not None}


def test_opcodes_have_no_holes() -> None:
    assert [opcode.value for opcode in Opcode] == list(range(len(Opcode)))


def test_every_opcode_has_a_release() -> None:
    assert list(OPCODE_SINCE) == list(Opcode)
    for release in OPCODE_SINCE.values():
        assert re.fullmatch(r"[5-9]\.\d+", release)


def test_releases_never_go_back() -> None:
    releases = [tuple(map(int, OPCODE_SINCE[opcode].split("."))) for opcode in Opcode]
    assert releases == sorted(releases)
    # A release in the wrong place of the table would hide behind a later one.
    assert set(OPCODE_SINCE.values()) == set(uapi._FIRST_OPCODE_OF)


@pytest.mark.parametrize(
    ("opcode", "release"),
    [
        (Opcode.POLL_REMOVE, "5.1"),
        (Opcode.RECVMSG, "5.3"),
        (Opcode.CONNECT, "5.5"),
        (Opcode.EPOLL_CTL, "5.6"),
        (Opcode.REMOVE_BUFFERS, "5.7"),
        (Opcode.UNLINKAT, "5.11"),
        (Opcode.LINKAT, "5.15"),
        (Opcode.URING_CMD, "5.19"),
        (Opcode.FUTEX_WAITV, "6.7"),
        (Opcode.LISTEN, "6.11"),
        (Opcode.WRITEV_FIXED, "6.15"),
        (Opcode.URING_CMD128, "6.19"),
    ],
)
def test_last_opcode_of_a_release(opcode: Opcode, release: str) -> None:
    # The table names the first opcode of each release; io_uring_enter(2) says this of the last.
    assert OPCODE_SINCE[opcode] == release


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#define IOU_A (1U << 3)", 8),
        ("#define IOU_A\t0x10ULL /* why */", 16),
        ("#define IOU_A (~0U)", 0xFFFFFFFF),
        ("#define IOU_A ((__u32)1 << 4)", 16),
        ("enum {\n\tIOU_Z,\n\tIOU_A,\n};", 1),
        ("enum e {\n\tIOU_Z = 1U << 5, /* a, b */\n\tIOU_A\n};", 33),
        ("#define IOU_Z 6\n#define IOU_A (IOU_Z | 1)", 7),
    ],
)
def test_header_parser(text: str, number: int, tmp_path: Path) -> None:
    header = tmp_path / "header.h"
    header.write_text(text)
    assert dict(header_numbers(header))["IOU_A"] == number


def mirrored(name: str) -> int | None:
    """Return the number that uapi.py has for the kernel's *name*, or None."""
    for prefix, place in PLACES:
        members = vars(uapi) if place is None else place.__members__
        found = members.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if isinstance(found, int):
            return found & 0xFFFFFFFF
    return None


def header_numbers(header: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and number (as 32 bits) of each #define and enum member in *header*."""
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
    known: dict[str, int] = {}
    for enum_body, define, expression in re.findall(
        r"\benum\b[^{;]*\{([^}]*)\}|^#define[ \t]+(\w+)[ \t]+(.+)$", text, flags=re.MULTILINE
    ):
        constants = [(define, expression)] if define else list(enum_constants(enum_body))
        for name, value in constants:
            number = c_value(value, known)
            if number is not None:
                known[name] = number
                yield name, number & 0xFFFFFFFF


def enum_constants(body: str) -> Iterator[tuple[str, str]]:
    """Yield name and expression of each member of a C enum, also if the value is implicit."""
    implied = "0"
    for member in filter(None, map(str.strip, body.split(","))):
        name, _, expression = map(str.strip, member.partition("="))
        yield name, expression or implied
        implied = f"{name} + 1"


OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.LShift: operator.lshift,
    ast.BitOr: operator.or_,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
}
UNARY_OPERATORS: dict[type[ast.unaryop], Callable[[int], int]] = {
    ast.Invert: operator.invert,
    ast.USub: operator.neg,
}


def c_value(expression: str, known: dict[str, int]) -> int | None:
    """Evaluate a constant C expression, with Python's rules, which agree. None for all else."""
    expression = re.sub(r"\b(0x[0-9a-fA-F]+|\d+)[uUlL]+\b", r"\1", expression)
    expression = re.sub(r"\(__[us]\d+\)", "", expression)
    try:
        return evaluate(ast.parse(expression.strip(), mode="eval").body, known)
    except (SyntaxError, KeyError):
        return None


def evaluate(node: ast.expr, known: dict[str, int]) -> int:
    """Evaluate an expression of integers. Raise KeyError if it contains anything else."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return known[name]
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY_OPERATORS[type(op)](evaluate(operand, known))
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](evaluate(left, known), evaluate(right, known))
    raise KeyError(ast.dump(node))

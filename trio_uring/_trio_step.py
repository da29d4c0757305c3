"""Adds the native engine's task step to Trio's loop. Like `_trio_private`, it uses private names.

The native engine runs the steps of tasks in C, in place of the inner loop of Trio's
``unrolled_run``. This module has no copy of Trio's loop. It takes the source of the installed Trio
and inserts one statement before the inner loop. That statement runs the steps that the engine
supports and leaves the rest of the batch to the inner loop::

    step(runner, batch)
    while batch:
        ...

The C code does the same as the Trio functions whose hashes are below. If the installed Trio has
other sources, or none, its loop is not changed.
"""

from __future__ import annotations
import __future__

import ast
import hashlib
import linecache
import types
from typing import TYPE_CHECKING, Final

import outcome
import trio
import trio._core._run as _run
from trio._core._traps import CancelShieldedCheckpoint, WaitTaskRescheduled

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[object, list[object]], None]

_LOOP: Final = _run.unrolled_run

# SHA-256 of the functions that the C code replaces, in Trio 0.32 to 0.35. (In 0.32, `reschedule`
# has another type annotation.)
_READ: Final[dict[Callable[..., object], frozenset[str]]] = {
    _LOOP: frozenset({"9226ba6956c1ca77c9a82b37847f1aa5f2c2f39c37e7f9aed569590db6e98499"}),
    _run.Runner.reschedule: frozenset(
        {
            "2c517643a930b254dce9f65b828d27fd2e5ed0a30bc76eb9945217ab122135a5",
            "d25a5648b6a42879f3b29cfa2a7fd8402d56f34e03a547a2d7142880d1df2394",
        }
    ),
    _run.Task._attempt_abort: frozenset(
        {"b7e50a09f93367bdf6e3253f56b637e00fd9972b85c5c2a7c25854dd81577c83"}
    ),
    _run.Task._attempt_delivery_of_any_pending_cancel: frozenset(
        {"16a19fcafc86d89c827e1d05ac108b09c2d1c71b1154ff2a365ce5b3f4cfb306"}
    ),
    _run.Task._attempt_delivery_of_pending_ki: frozenset(
        {"990af995dc0a40837a1dad3efdbfc9f8483fa92e6cf7dbeae09feed8ac763172"}
    ),
}

# The name of `step` in Trio's module, whose globals the loop uses.
_NAME: Final = "_trio_uring_step"


# The slots that the C code reads and writes: its names for them, and Trio's.
_TASK_SLOTS: Final = {
    "next_send_fn": "_next_send_fn",
    "next_send": "_next_send",
    "abort_func": "_abort_func",
    "custom_sleep_data": "custom_sleep_data",
    "cancel_status": "_cancel_status",
    "coro": "coro",
    "task_context": "context",
    "schedule_points": "_schedule_points",
    "cancel_points": "_cancel_points",
}
_RUNNER_SLOTS: Final = ("ki_pending", "main_task", "runq", "instruments", "io_manager")


def trio_names() -> dict[str, object]:
    """Return what the engine uses of Trio: slots, objects, and names of attributes.

    Raises:
      KeyError: there is no such slot.
    """
    task, runner, status = vars(_run.Task), vars(_run.Runner), vars(_run.CancelStatus)
    return {
        "task_type": _run.Task,
        "runner_type": _run.Runner,
        "status_type": _run.CancelStatus,
        "wait_type": WaitTaskRescheduled,
        "checkpoint": CancelShieldedCheckpoint,
        "value": outcome.Value,
        "error": outcome.Error,
        "abort_failed": trio.lowlevel.Abort.FAILED,
        "context": _run.GLOBAL_RUN_CONTEXT,
        **{name: task[slot] for name, slot in _TASK_SLOTS.items()},
        **{name: runner[name] for name in _RUNNER_SLOTS},
        "effectively_cancelled": status["effectively_cancelled"],
        "deliver_cancel": _run.Task._attempt_delivery_of_any_pending_cancel.__name__,
        "deliver_ki": _run.Task._attempt_delivery_of_pending_ki.__name__,
        "socket": "socket",
        "stdlib_socket": "_sock",
        "fileno": "fileno",
        "is_stream": "is_stream",
        "did_shutdown": "_did_shutdown_SHUT_WR",
        "push": "push",
        "release": "release",
        "try_acquire": "try_acquire",
    }


def set_step(step: Step) -> str:
    """Make Trio's loop call *step*; return why that is not possible, or an empty string.

    It cannot be undone: *step* is called in every run, and does nothing in runs without the engine.
    """
    if _run.unrolled_run is not _LOOP:
        return "something else has replaced Trio's loop"
    sources = {function: _source_of(function) for function in _READ}
    if not all(sources.values()):
        return "Trio's loop has no source"
    for function, source in sources.items():
        if hashlib.sha256(source.encode()).hexdigest() not in _READ[function]:
            return f"{function.__qualname__} of Trio {trio.__version__} is not one that was read"
    code, source = _LOOP.__code__, sources[_LOOP]
    # Empty lines in front, for the line numbers.
    tree = ast.parse("\n" * (code.co_firstlineno - 1) + source)
    with_step = _compiled(_with_step(tree), code)
    if not _differ_by_step(with_step, code):
        return "Trio's loop is not what its source says"
    setattr(_run, _NAME, step)
    scope: dict[str, Callable[..., object]] = {}
    exec(with_step, _run.__dict__, scope)
    setattr(_run, _LOOP.__name__, scope[_LOOP.__name__])
    return ""


def _source_of(function: Callable[..., object]) -> str:
    """Return the source of *function*, or an empty string.

    `inspect.getsource` returns the same, but tokenizes it. For these functions that takes 2 ms. A
    wrong end would change the hash.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    first = code.co_firstlineno - 1
    end = max((line for *_, line in code.co_lines() if line is not None), default=0)
    if not first < end <= len(lines):
        return ""
    width = len(lines[first]) - len(lines[first].lstrip())
    while end < len(lines) and not lines[end][: width + 1].strip():
        end += 1
    return "".join(lines[first:end]).rstrip() + "\n"


def _with_step(tree: ast.Module) -> ast.Module:
    """Insert the call of `step` before the only ``while batch:``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.While):
            continue
        for place, statement in enumerate(node.body):
            if isinstance(statement, ast.While) and ast.unparse(statement.test) == "batch":
                call = ast.parse(f"{_NAME}(runner, batch)").body[0]
                for part in ast.walk(call):
                    ast.copy_location(part, statement.test)
                node.body.insert(place, call)
                return tree
    raise AssertionError("its hash was known")


def _compiled(tree: ast.Module, code: types.CodeType) -> types.CodeType:
    """Compile *tree* with the file name of *code*."""
    compiled: types.CodeType = compile(
        tree,
        code.co_filename,
        "exec",
        flags=__future__.annotations.compiler_flag,
        dont_inherit=True,
    )
    return compiled


def _differ_by_step(module: types.CodeType, code: types.CodeType) -> bool:
    """Whether the function in *module* is *code* with the call of `step`."""
    [compiled] = [
        constant
        for constant in module.co_consts
        if isinstance(constant, types.CodeType) and constant.co_name == code.co_name
    ]
    names = tuple(name for name in compiled.co_names if name != _NAME)
    return names == code.co_names and _constants(compiled) == _constants(code)


def _constants(code: types.CodeType) -> list[object]:
    return [constant for constant in code.co_consts if not isinstance(constant, types.CodeType)]

"""What building needs to run code for; everything else is in pyproject.toml."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

KERNEL = "trio_uring/_kernel"
ENGINE = f"{KERNEL}/engine"

SOURCES = "https://github.com/trio-uring/trio-uring"

# Debian's names. libc6-dev brings the kernel's headers; cffi itself comes as a wheel.
DEBIAN_PACKAGES = "gcc libc6-dev python3-dev"

# Python runs this line of `trio_uring.pth` at each start, so it must cost nothing where
# TRIO_URING is unset: `os` is always imported by then. Where it is set, the one file
# `_autostart.py` is run without importing the package, which would import Trio.
PTH = """\
import os; os.environ.get("TRIO_URING", "").strip().lower() in ("", "0", "off") or exec("\
from importlib.machinery import PathFinder, SourceFileLoader\\n\
package = PathFinder.find_spec('trio_uring')\\n\
if package is not None and package.origin is not None:\\n\
    file = os.path.join(os.path.dirname(package.origin), '_autostart.py')\\n\
    scope = {'__name__': 'trio_uring._autostart', '__file__': file}\\n\
    exec(SourceFileLoader(scope['__name__'], file).get_code(scope['__name__']), scope)\\n\
    scope['start']()\\n\
", {"os": os})
"""


class BuildPy(build_py):
    """Puts `trio_uring.pth` beside the package: Python reads it only from there."""

    def run(self) -> None:
        """Build, then write the file that starts us where TRIO_URING is set."""
        super().run()
        if not self.editable_mode:
            self._pth.parent.mkdir(parents=True, exist_ok=True)
            self._pth.write_text(PTH, encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:  # noqa: FBT001, FBT002
        """List what was built."""
        return [*super().get_outputs(include_bytecode), str(self._pth)]

    @property
    def _pth(self) -> Path:
        return Path(self.build_lib, "trio_uring.pth")


class BuildExt(build_ext):
    """Builds what can be built, says what the machine lacks, and puts the C files into the sdist.

    Without the native engine the package works, but is slower. Without the C core it runs programs
    on Trio's own I/O, and says so at each start.
    """

    def build_extensions(self) -> None:
        """Build the C extensions, where there is a compiler and Python's headers."""
        for extension in self.extensions:
            extension.optional = True
        if missing := self._missing():
            _leave_out("C core and native engine are", f"{missing} is missing")
            self.extensions = []
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, or go on without."""
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as exc:
            what = "native engine is" if ext.name.endswith("_native") else "C core is"
            _leave_out(what, f"it cannot be built: {exc}")

    def get_source_files(self) -> list[str]:
        """List the files that the extensions are built from."""
        files = [
            path
            for directory in (KERNEL, ENGINE)
            for suffix in ("c", "h", "txt")
            for path in Path(directory).glob(f"*.{suffix}")
        ]
        return sorted({*super().get_source_files(), *map(str, files)})

    def _missing(self) -> str | None:
        compiler: list[str] = self.compiler.compiler_so
        includes = [f"-I{path}" for path in self.include_dirs]
        try:
            preprocessed = subprocess.run(
                [*compiler, *includes, "-E", "-x", "c", "-o", os.devnull, "-"],
                input="#include <Python.h>\n#include <linux/types.h>\n",
                env={**os.environ, "LC_ALL": "C"},
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            return f"the C compiler `{compiler[0]}`"
        header = re.search(r"fatal error: (\S+): No such file", preprocessed.stderr)
        if header:
            return f"the header `{header[1]}`"
        return (
            f"a C compiler that works, unlike `{compiler[0]}`," if preprocessed.returncode else None
        )


def description() -> str:
    """Return the README with links that work outside of the repository, too."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?=docs/)", rf"\1{SOURCES}/raw/main/", text)
    return re.sub(r"(\]\()(?=docs/|examples)", rf"\1{SOURCES}/blob/main/", text)


def _leave_out(what: str, why: str) -> None:
    print(
        f"WARNING: trio_uring's {what} left out, because {why}. "
        f"On Debian, run `apt-get install {DEBIAN_PACKAGES}`, then reinstall trio_uring.",
        file=sys.stderr,
    )


def arguments() -> dict[str, Any]:
    """Return what to build here: the C extension is for Linux only."""
    if sys.platform != "linux":
        return {}
    arguments: dict[str, Any] = {"cffi_modules": [f"{KERNEL}/build.py:ffibuilder"]}
    # It counts references itself, and reaches into CPython's slots.
    free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
    if sys.implementation.name == "cpython" and not free_threaded:
        arguments["ext_modules"] = [
            Extension(
                "trio_uring._kernel._native",
                sorted(map(str, Path(ENGINE).glob("*.c"))),
                include_dirs=[KERNEL],
                depends=[f"{ENGINE}/engine.h", *map(str, Path(KERNEL).glob("*.h"))],
                extra_compile_args=[
                    *("-std=gnu11", "-fvisibility=hidden"),  # libc has a `step`, too
                    *("-Wall", "-Wextra", "-Wno-unused-parameter"),
                    *("-Wno-cast-function-type", "-Wno-missing-field-initializers"),
                ],
                optional=True,
            )
        ]
    return arguments


setup(
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    long_description=description(),
    long_description_content_type="text/markdown",
    **arguments(),
)

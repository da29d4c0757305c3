"""Run a command on another Linux kernel, in QEMU without acceleration.

    python guest.py linux-image-6.1.0-56-amd64_6.1.192-2_amd64.deb -- python -m pytest ...

The guest has this machine's files, read-only, at the same paths (9p), and `/dev/shm` to write to.
It has no network but loopback. The kernel is one of Debian's packages. The exit status is the
command's. It needs QEMU, dpkg-deb and a static busybox:

    apt-get install qemu-system-x86 busybox-static
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p")  # and what they depend on

# Printed by the guest at its end, with the command's exit status.
END: Final = "guest ended with"
LAST_OUTPUT: Final = 1000  # bytes, in which it is found

INIT: Final = """\
#!/bin/busybox sh
for module in {modules}; do /bin/busybox insmod /modules/$module; done
/bin/busybox mkdir /files
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 root /files
/bin/busybox mount -t proc proc /files/proc
/bin/busybox mount -t sysfs sys /files/sys
/bin/busybox mount -t devtmpfs dev /files/dev
/bin/busybox mkdir -p /files/dev/shm /files/dev/pts
/bin/busybox mount -t tmpfs tmpfs /files/dev/shm
/bin/busybox mount -t devpts devpts /files/dev/pts
/bin/busybox ln -s /proc/self/fd /files/dev/fd
/bin/busybox ifconfig lo 127.0.0.1 up
/bin/busybox ip addr add ::1/128 dev lo
ulimit -n 65536
/bin/busybox chroot /files /bin/sh -c {command}
echo "{end} $?"
/bin/busybox poweroff -f
"""


# --- The kernel -----------------------------------------------------------------------------


class Kernel:
    """An unpacked package with a kernel."""

    def __init__(self, package: Path, directory: Path) -> None:
        subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
        [self.image] = directory.glob("boot/vmlinuz-*")
        # In Debian 13 the modules are in usr/lib, and compressed.
        self._modules = {
            path.name.partition(".")[0].replace("-", "_"): path for path in directory.rglob("*.ko*")
        }

    def modules(self) -> dict[str, bytes]:
        """Return the modules that the guest needs, each after those it depends on."""
        needed: dict[str, bytes] = {}
        for name in MODULES:
            self._add(name, needed)
        return needed

    def _add(self, name: str, needed: dict[str, bytes]) -> None:
        if name in needed or name not in self._modules:  # built in
            return
        path = self._modules[name]
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        for depends in re.findall(rb"\0depends=([^\0]*)\0", data):
            for other in filter(None, depends.decode().replace("-", "_").split(",")):
                self._add(other, needed)
        needed[name] = data


# --- The guest ------------------------------------------------------------------------------


def cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """Return a file, directory or device as the kernel's format "newc" has it."""
    encoded = name.encode() + b"\0"
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0]
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return padded(header + encoded) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def initramfs(kernel: Kernel, busybox: str, command: str) -> bytes:
    """Return an archive with an init that mounts this machine's files and runs *command*."""
    modules = kernel.modules()
    init = INIT.format(modules=" ".join(modules), command=shlex.quote(command), end=END)
    archive = b"".join(cpio_entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules"))
    archive += cpio_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += cpio_entry("init", stat.S_IFREG | 0o755, init.encode())
    archive += cpio_entry("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    for name, data in modules.items():
        archive += cpio_entry(f"modules/{name}", stat.S_IFREG | 0o644, data)
    return archive + cpio_entry("TRAILER!!!", 0)


def qemu(kernel: Path, archive: Path, memory: str) -> list[str]:
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", memory),
        *("-nodefaults", "-no-reboot", "-nographic", "-serial", "stdio", "-nic", "none"),
        *("-kernel", str(kernel), "-initrd", str(archive)),
        *("-append", "console=ttyS0 quiet panic=-1"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
    ]


def run(package: Path, command: str, memory: str) -> int:
    """Run *command* on a kernel, print its output, and return its exit status."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "no busybox: apt-get install busybox-static"
    with tempfile.TemporaryDirectory(prefix="guest") as name:
        directory = Path(name)
        kernel = Kernel(package, directory / "kernel")
        archive = directory / "initramfs"
        archive.write_bytes(initramfs(kernel, busybox, command))
        last_output = b""
        with subprocess.Popen(
            qemu(kernel.image, archive, memory), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as guest:
            assert guest.stdout is not None
            while output := os.read(guest.stdout.fileno(), 65536):
                sys.stdout.buffer.write(output)
                sys.stdout.buffer.flush()
                last_output = (last_output + output)[-LAST_OUTPUT:]
    if ended := re.search(rf"{END} (\d+)".encode(), last_output):
        return int(ended[1])
    print("the guest ended before the command", file=sys.stderr)
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", type=Path, help="a linux-image package of Debian")
    parser.add_argument("--memory", default="4G")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "TMPDIR": "/dev/shm",
        "HOME": "/dev/shm",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    words = ["cd", str(Path.cwd()), "&&", "exec", "env"]
    words += [shlex.quote(f"{name}={value}") for name, value in environment.items()]
    words += map(shlex.quote, options.command)
    sys.exit(run(options.package, " ".join(words), options.memory))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The stock Debian kernel, as bzImage and as vmlinux.

Where the CPU virtualises, it boots to the panic for want of a root file system. Where the host only
emulates the guest's ring 0, it gets exactly as far as under QEMU, the same bytes at the same RIP, and
ferry explains the stop. The kernel is fetched from Debian's archive once and kept in the cache.
"""

import ctypes
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import unittest
import zlib

import ferrylab as lab

PACKAGE = "linux-image-cloud-amd64"
CMDLINE = "console=ttyS0 nokaslr panic=-1 quiet"
MEMORY_MIB = 128
LIMIT = 4 * lab.LIMIT  # a minute of emulation each, when nothing else runs

RIP = re.compile(r"\brip ([0-9a-f]{16})  cs \w+ \(ring 0\)")
BYTES = re.compile(r"bytes at rip: ((?:[0-9a-f]{2} ?)+)\n")
QEMU_RIP = re.compile(rb"\bRIP=([0-9a-f]{16})")
QEMU_CODE = re.compile(rb"\bCode=[0-9a-f ]*<([0-9a-f]{2})>((?: [0-9a-f]{2})*)")


def fetch(directory):
    """Puts the kernel of today's package into `directory`/vmlinuz."""
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if not shutil.which(tool):
            raise unittest.SkipTest(f"no {tool}: the kernel is Debian's")
    listing = subprocess.run(["apt-cache", "depends", PACKAGE], capture_output=True, text=True,
                             check=False)
    name = re.search(r"Depends: (linux-image-\d\S+)", listing.stdout)
    if not name:
        raise unittest.SkipTest(f"apt does not know {PACKAGE}: {listing.stderr.strip()[:200]}")
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as tmp:
        got = subprocess.run(["apt-get", "download", name.group(1)], cwd=tmp, capture_output=True,
                             text=True, check=False, timeout=lab.LIMIT)
        packages = os.listdir(tmp)
        if got.returncode or not packages:
            raise unittest.SkipTest(f"apt-get download {name.group(1)}: {got.stderr.strip()[-200:]}")
        subprocess.run(["dpkg", "-x", packages[0], "x"], cwd=tmp, check=True)
        boot = os.path.join(tmp, "x", "boot")
        image = next(entry for entry in os.listdir(boot) if entry.startswith("vmlinuz-"))
        os.replace(os.path.join(boot, image), os.path.join(directory, "vmlinuz"))


def library(name):
    try:
        return ctypes.CDLL(name)
    except OSError as e:
        raise unittest.SkipTest(str(e)) from None


def unpack_lz4(data):
    """The legacy frame: blocks of at most 8 MiB, each with its compressed size before it."""
    lz4 = library("liblz4.so.1")
    block = ctypes.create_string_buffer(8 << 20)
    out, at = b"", 4
    while at + 4 < len(data):
        size, = struct.unpack_from("<I", data, at)
        n = lz4.LZ4_decompress_safe(data[at + 4:at + 4 + size], block, size, len(block))
        assert n > 0, f"LZ4 block at {at} does not unpack"
        out, at = out + block.raw[:n], at + 4 + size
    return out


def unpack_zstd(data, size):
    zstd = library("libzstd.so.1")
    zstd.ZSTD_decompress.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(size)
    n = zstd.ZSTD_decompress(out, ctypes.c_size_t(size), data, ctypes.c_size_t(len(data)))
    assert n == size, "the zstd payload does not unpack"
    return out.raw


def vmlinux_of(image):
    """The ELF inside a bzImage (x86 boot protocol 2.08: payload_offset, payload_length)."""
    setup_sectors = image[0x1f1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start:start + length]
    size, = struct.unpack("<I", payload[-4:])
    if payload.startswith(b"\x02\x21\x4c\x18"):
        elf = unpack_lz4(payload[:-4])
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        elf = unpack_zstd(payload[:-4], size)
    elif payload.startswith(b"\xfd7zXZ"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        elf = zlib.decompressobj(31).decompress(payload)
    else:
        raise unittest.SkipTest(f"payload of an unknown kind: {payload[:6].hex()}")
    assert len(elf) == size and elf.startswith(b"\x7fELF"), "no ELF in the bzImage"
    return elf


def stock_kernel():
    """Paths of the bzImage and of its vmlinux."""
    directory = os.path.join(lab.CACHE, "stock")
    image, elf = os.path.join(directory, "vmlinuz"), os.path.join(directory, "vmlinux")
    if not os.path.exists(image):
        fetch(directory)
    if not os.path.exists(elf) or os.path.getmtime(elf) < os.path.getmtime(image):
        with open(image, "rb") as f:
            content = vmlinux_of(f.read())
        with open(elf + ".new", "wb") as f:
            f.write(content)
        os.replace(elf + ".new", elf)
    return image, elf


class QemuStop:
    """Where QEMU stops on this host; kept in the cache, since it takes a minute to get there."""

    PROGRAM = "qemu-system-x86_64"

    def __init__(self, laboratory, elf):
        version = subprocess.run([self.PROGRAM, "--version"], capture_output=True, check=True).stdout
        with open(elf, "rb") as f:
            content = f.read()
        with open("/proc/cpuinfo", "rb") as f:
            cpu = b"".join(line for line in f if line.startswith((b"model name", b"flags")))
        key = hashlib.sha256(b"\0".join([version, content, cpu, platform.release().encode(),
                                         CMDLINE.encode()])).hexdigest()[:16]
        self.path = os.path.join(os.path.dirname(elf), f"qemu-stop-{key}.json")
        self.process = None
        if not os.path.exists(self.path):
            # With the CPU features that ferry leaves on such a host.
            self.process = laboratory.start(lab.Process(
                [self.PROGRAM, "-enable-kvm", "-cpu", "host,-cx16,-pcid,-arch-capabilities",
                 "-M", "microvm,rtc=on", "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none",
                 "-serial", "null", "-kernel", elf, "-append", CMDLINE]))

    def get(self):
        """RIP and the bytes from there on."""
        if self.process:
            code = self.process.stderr.wait(QEMU_CODE, limit=LIMIT)
            dump = bytes(self.process.stderr.data)
            stop = {"rip": QEMU_RIP.search(dump).group(1).decode(),
                    "bytes": (code.group(1) + code.group(2)).decode().split()}
            with open(self.path + ".new", "w") as f:
                json.dump(stop, f)
            os.replace(self.path + ".new", self.path)
        with open(self.path) as f:
            stop = json.load(f)
        return stop["rip"], stop["bytes"]


class Stock(unittest.TestCase):
    """All of them run at the same time: each takes a minute of emulation to its first stop."""

    @classmethod
    def setUpClass(cls):
        cls.image, cls.elf = stock_kernel()
        cls.lab = lab.Lab()
        cls.addClassCleanup(cls.lab.close)
        cls.emulated = cls.lab.ferry("check", "--json").json()["software_backend"]
        cls.vms = {kind: cls.lab.vm("run", "--kernel", kernel, "--memory", f"{MEMORY_MIB}M",
                                    "--append", CMDLINE)
                   for kind, kernel in (("bzImage", cls.image), ("vmlinux", cls.elf))}
        cls.qemu = None
        if cls.emulated and shutil.which(QemuStop.PROGRAM):
            cls.qemu = QemuStop(cls.lab, cls.elf)

    def stop_of(self, kind):
        """RIP and bytes in ferry's diagnosis."""
        vm = self.vms[kind]
        self.assertEqual(lab.EMULATION, vm.wait(LIMIT), vm.errors())
        text = vm.errors()
        rip, code = RIP.search(text), BYTES.search(text)
        self.assertTrue(rip and code, text)
        return rip.group(1), code.group(1).split()

    def check_explained(self, kind):
        if not self.emulated:
            vm = self.vms[kind]
            vm.wait_for(b"Kernel panic - not syncing: VFS", limit=LIMIT)
            return
        self.stop_of(kind)
        text = self.vms[kind].errors()
        self.assertIn("cannot be emulated", text)
        for register in ("rax", "rsp", "r15", "cr0", "cr3", "cr4", "efer"):
            self.assertRegex(text, rf"\b{register} +[0-9a-f]+")
        # What the bytes are and what to do about it.
        self.assertRegex(text, r"\n  likely \w+.*: .*(add|use|hide|run on) ")

    def test_bzimage(self):
        self.check_explained("bzImage")

    def test_vmlinux(self):
        self.check_explained("vmlinux")

    def test_as_far_as_under_qemu(self):
        if not self.emulated:
            self.skipTest("this host runs the kernel: there is no stop to compare")
        if not self.qemu:
            self.skipTest("no qemu-system-x86_64")
        rip, under_qemu = self.qemu.get()
        for kind in self.vms:
            with self.subTest(kernel=kind):
                stopped_at, bytes_there = self.stop_of(kind)
                self.assertEqual(rip, stopped_at)
                self.assertEqual(under_qemu[:len(bytes_there)], bytes_there)


if __name__ == "__main__":
    unittest.main()

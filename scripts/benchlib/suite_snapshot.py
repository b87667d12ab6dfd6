# SPDX-License-Identifier: Apache-2.0
"""scripts/bench snapshot: saving a guest that runs, and bringing it back.

The guest looks at the TSC all the time: the longest gap between two looks is the longest time it
did not run. Files go to $TMPDIR; every figure of a save includes their way to the disk.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time

from rows import Metric, Row, add
from suite_boot import khz
from suite_migrate import GAP_LONGEST, GAP_RESET, GAP_TOTAL, image_probe, wait_for
from vmms import FERRY, Failed, Ferry, GuestMemory, Machine, Qemu, Qmp, bare_guest, program

MIB = 1 << 20
PAGE = 4096
RATE = 20000  # pages a second that the guest goes on writing to


def ferry(*args):
    done = subprocess.run([FERRY, *args, "--json"], capture_output=True, text=True, timeout=300,
                          check=False)
    if done.returncode:
        raise Failed(f"ferry {args[0]}: status {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout)


def sync(path):
    with open(path, "rb") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def place():
    directory = tempfile.mkdtemp(prefix="ferry-bench-snapshot-")
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Guest:
    """`dirty` with `mib` of its memory written to, which goes on writing at `rate`."""

    def __init__(self, machine, mib):
        self.machine = machine
        machine.wait_console("sync 1", 60)
        self.gap = machine.values()[("gap", 0)]
        self.memory = machine.guest_memory(*image_probe(bare_guest("dirty")))
        wait_for(lambda: self.total() >= mib * 256, "the guest to touch its memory")

    def total(self):
        return self.memory.read_u64(self.gap + GAP_TOTAL)

    def forget(self):
        self.memory.write_u64(self.gap + GAP_RESET, 1)
        wait_for(lambda: self.memory.read_u64(self.gap + GAP_RESET) == 0, "the guest to go on")

    def longest_ms(self):
        before = self.total()
        wait_for(lambda: self.total() > before + 1, "the guest to go on")
        return self.memory.read_u64(self.gap + GAP_LONGEST) / khz()


@contextlib.contextmanager
def running(vmm, memory, mib, rate=RATE):
    with vmm.start(bare_guest("dirty"), append=f"mib={mib} rate={rate} tsc_khz={khz()}",
                   memory=memory) as machine:
        guest = Guest(machine, mib)
        with guest.memory:
            yield guest


# --- saving


def qemu_save(machine, path):
    """As savevm does it: the guest stands still meanwhile."""
    with Qmp(machine.directory) as qmp:
        qmp.call("migrate-set-parameters", {"max-bandwidth": 100 << 30})
        qmp.call("stop")
        qmp.call("migrate", {"uri": f"exec:cat > {path}"})
        wait_for(lambda: qmp.call("query-migrate").get("status") in ("completed", "failed"),
                 "QEMU to write the guest")
        info = qmp.call("query-migrate")
        if info["status"] != "completed":
            raise Failed(f"QEMU migration to a file: {info}")
        sync(path)


def save_ferry(memory, mib):
    with place() as directory, running(Ferry(), memory, mib) as guest:
        guest.forget()
        began = time.monotonic()
        report = ferry("snapshot", guest.machine.name, os.path.join(directory, "a"))
        took = time.monotonic() - began
        return {"gap_ms": guest.longest_ms(), "pause_ms": report["pause_us"] / 1e3,
                "rate": mib / took}


def save_qemu(memory, mib):
    with place() as directory, running(Qemu(), memory, mib) as guest:
        guest.forget()
        began = time.monotonic()
        qemu_save(guest.machine, os.path.join(directory, "a"))
        took = time.monotonic() - began
        with Qmp(guest.machine.directory) as qmp:
            qmp.call("cont")
        return {"gap_ms": guest.longest_ms(), "pause_ms": took * 1e3, "rate": mib / took}


def data_file(directory, mib):
    """As the guest's memory: the first word of each page is a number."""
    path = os.path.join(directory, "data")
    with open(path, "wb") as f:
        for first in range(0, mib * 256, 256):
            f.write(b"".join(n.to_bytes(8, "little") + bytes(PAGE - 8)
                             for n in range(first, first + 256)))
    sync(path)
    return path


def copy(mib):
    with place() as directory:
        path = data_file(directory, mib)
        began = time.monotonic()
        subprocess.run(["cp", "--reflink=never", "--sparse=never", path, path + ".copy"],
                       check=True)
        sync(path + ".copy")
        return {"rate": mib / (time.monotonic() - began)}


def save_raw(memory, mib):
    with place() as directory, running(Ferry(), memory, mib) as guest:
        began = time.monotonic()
        ferry("snapshot", guest.machine.name, os.path.join(directory, "a"), "--layout", "mapped")
        return {"rate": mib / (time.monotonic() - began)}


# --- diffs


def diff(mib, memory=512):
    """The guest writes to all its pages again and again; the second diff has them all."""
    with place() as directory, running(Ferry(), memory, mib, rate=0) as guest:
        for i, more in enumerate(([], ["--diff"], ["--diff"])):
            before = guest.total()
            wait_for(lambda: guest.total() > before + 2 * mib * 256, "the guest to write again")
            report = ferry("snapshot", guest.machine.name, os.path.join(directory, str(i)), *more)
        if report["kind"] != "diff":
            raise Failed(f"not a diff: {report}")
        pages = report["data_pages"]
        return {"pause_ms": report["pause_us"] / 1e3, "pages": pages,
                "share": report["pause_us"] / (2000 + pages)}


# --- restoring


def mapping(pid, size):
    with open(f"/proc/{pid}/maps") as f:
        for line in f:
            start, end = (int(word, 16) for word in re.match(r"(\w+)-(\w+)", line).groups())
            if end - start >= size:
                yield start, end


def first_change(machine, memory, gap):
    """ns from exec until the guest's count of pages changes: it has gone on."""
    probe_gpa, probe = image_probe(bare_guest("dirty"))
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        machine._read(0)
        if machine.child.poll() is not None:
            raise Failed(f"it ended: {machine.errors[-300:]!r}")
        with contextlib.suppress(OSError, ValueError, Failed):
            with open(f"/proc/{machine.pid}/mem", "r+b", buffering=0) as mem:
                for start, end in mapping(machine.pid, memory * MIB):
                    for base in range(start, min(start + 4 * MIB, end - memory * MIB + 1), PAGE):
                        mem.seek(base + probe_gpa)
                        if mem.read(len(probe)) == probe:
                            return counting(GuestMemory(mem, base), gap) - machine.began
    raise Failed("the guest does not go on")


def counting(memory, gap):
    first = memory.read_u64(gap + GAP_TOTAL)
    limit = time.monotonic() + 60
    while memory.read_u64(gap + GAP_TOTAL) == first:
        if time.monotonic() > limit:
            raise Failed("the guest stands still")
    return time.monotonic_ns()


@functools.lru_cache(maxsize=None)
def saved(vmm_name, memory, mib, layout):
    """A guest in a file, made once; (directory, path, where it counts)."""
    directory = tempfile.TemporaryDirectory(prefix="ferry-bench-snapshot-")
    path = os.path.join(directory.name, "saved")
    vmm = Ferry() if vmm_name == "ferry" else Qemu()
    with running(vmm, memory, mib) as guest:
        if vmm_name == "ferry":
            ferry("snapshot", guest.machine.name, path, "--layout", layout)
        else:
            qemu_save(guest.machine, path)
        return directory, path, guest.gap


def restore_ferry(memory, mib, layout, *how):
    _, path, gap = saved("ferry", memory, mib, layout)
    name = Ferry()._name()
    argv = [program(FERRY, "ninja -C build"), "restore", path, "-n", name, "--console", "stdio",
            *how]
    with Machine(argv, memory, None) as machine:
        took = first_change(machine, memory, gap)
        return {"first_ms": took / 1e6, "rate": mib / (took / 1e9)}


def restore_qemu(memory, mib):
    _, path, gap = saved("qemu", memory, mib, None)
    vmm, directory = Qemu(), tempfile.mkdtemp(prefix="ferry-bench-")
    argv = vmm._argv(directory, bare_guest("dirty"), None, "", memory, 1)
    with vmm._start(argv + ["-incoming", f"exec:cat {path}"], directory, memory) as machine:
        # It was saved while it stood still, so it has to be told to go on.
        wait_for(lambda: os.path.exists(f"{directory}/qmp"), "QEMU's monitor")
        with Qmp(directory) as qmp:
            wait_for(lambda: qmp.call("query-status")["status"] == "paused", "QEMU to load")
            qmp.call("cont")
        took = first_change(machine, memory, gap)
        return {"first_ms": took / 1e6, "rate": mib / (took / 1e9)}


def register():
    gap = "longest time the guest did not run"
    rate = "MiB of guest data a second"
    add(Row("snapshot", "save", "a running 1 GiB guest with 768 MiB written to, which goes on "
            f"writing to {RATE} pages/s; QEMU: stop, migrate to a file, cont",
            {"ferry": functools.partial(save_ferry, 1024, 768),
             "qemu": functools.partial(save_qemu, 1024, 768)},
            [Metric("pause_ms", "save: pause the VMM reports", "ms", goal=10),
             Metric("gap_ms", f"save: {gap}", "ms"),
             Metric("rate", f"save: {rate}", "MiB/s", goal_ratio_least=("qemu", 1))], runs=3))
    add(Row("snapshot", "raw", "512 MiB of guest data written as they are, beside cp of a file of "
            "that size, both synced",
            {"ferry": functools.partial(save_raw, 640, 512), "cp": functools.partial(copy, 512)},
            [Metric("rate", f"raw: {rate}", "MiB/s", goal_ratio_least=("cp", 0.8))], runs=3))
    for mib in (4, 32, 256):
        add(Row("snapshot", f"diff {mib}M", f"a diff of a running guest that has written to {mib} "
                "MiB since the one before",
                {"ferry": functools.partial(diff, mib)},
                [Metric("pause_ms", f"diff {mib}M: pause the VMM reports", "ms"),
                 Metric("pages", f"diff {mib}M: pages in it", "pages"),
                 Metric("share", f"diff {mib}M: pause / (2 ms + 1 us a page)", "", goal=1)],
                runs=3))
    add(Row("snapshot", "eager", "512 MiB of guest data read back before the guest goes on, from "
            "exec to its first count",
            {"ferry": functools.partial(restore_ferry, 640, 512, "packed"),
             "qemu": functools.partial(restore_qemu, 640, 512)},
            [Metric("first_ms", "eager: exec to the guest going on", "ms"),
             Metric("rate", f"eager: {rate}", "MiB/s")], runs=3))
    for memory, mib in ((128, 96), (4096, 2048)):
        label = "128M" if memory == 128 else "4G"
        add(Row("snapshot", f"lazy {label}", f"a {label} guest with {mib} MiB written to goes on at "
                "once; QEMU reads it all",
                {"ferry": functools.partial(restore_ferry, memory, mib, "packed", "--lazy"),
                 "mapped": functools.partial(restore_ferry, memory, mib, "mapped", "--map"),
                 "qemu": functools.partial(restore_qemu, memory, mib)},
                [Metric("first_ms", f"lazy {label}: exec to the guest going on", "ms",
                        goal=10, goal_ratio=("qemu", 0.1))], runs=5))

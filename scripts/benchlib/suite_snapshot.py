# SPDX-License-Identifier: Apache-2.0
"""scripts/bench snapshot: saving a guest that runs, and bringing it back.

The guest looks at the TSC all the time: the longest gap between two looks is the longest time it
did not run. Files go to $TMPDIR; every figure of a save includes their way to the disk.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time

from rows import Absent, Metric, Row, add
from suite_boot import khz
from suite_migrate import GAP_LONGEST, GAP_RESET, GAP_TOTAL, image_probe
from vmms import (FERRY, Failed, Ferry, GuestMemory, Machine, Qemu, Qmp, bare_guest, program,
                  wait_for)

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


def save_layout(memory, mib, layout):
    with place() as directory, running(Ferry(), memory, mib) as guest:
        began = time.monotonic()
        ferry("snapshot", guest.machine.name, os.path.join(directory, "a"), "--layout", layout)
        return {"rate": mib / (time.monotonic() - began)}


def lz4(*args):
    if not shutil.which("lz4"):
        raise Absent("no lz4 (package lz4)")
    subprocess.run(["lz4", "-q", "-f", *args], check=True)


def compress(mib):
    with place() as directory:
        path = data_file(directory, mib)
        began = time.monotonic()
        lz4("-1", path, path + ".lz4")
        sync(path + ".lz4")
        return {"rate": mib / (time.monotonic() - began)}


@functools.lru_cache(maxsize=None)
def compressed(mib):
    directory = tempfile.TemporaryDirectory(prefix="ferry-bench-snapshot-")
    path = data_file(directory.name, mib)
    lz4("-1", path, path + ".lz4")
    os.unlink(path)
    return directory, path + ".lz4"


def unpack(mib):
    """One file after the other into memory of /dev/shm, as a guest's memory is."""
    _, path = compressed(mib)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as out:
        began = time.monotonic()
        lz4("-d", path, out.name)
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


def places(pid, size, most=1024):
    """Where memory of at least `size` may begin, `most` pages of each mapping: a file may be mapped
    in several pieces."""
    with open(f"/proc/{pid}/maps") as f:
        found = [[int(word, 16) for word in re.match(r"(\w+)-(\w+)", line).groups()]
                 for line in f]
    ends = {}  # of a mapping -> of all that lie one behind the other
    for start, end in reversed(found):
        ends[start] = ends.get(end, end)
    for start, _ in found:
        if ends[start] - start >= size:
            yield from range(start, min(start + most * PAGE, ends[start] - size + 1),
                             PAGE)


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
                for base in places(machine.pid, memory * MIB):
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
    with running(vmm, memory, mib, rate=20 * RATE) as guest:
        if vmm_name == "ferry":
            ferry("snapshot", guest.machine.name, path, "--layout", layout)
        else:
            qemu_save(guest.machine, path)
        return directory, path, guest.gap


def restore_ferry(memory, mib, layout, *how):
    _, path, gap = saved("ferry", memory, mib, layout)
    name = Ferry()._name()
    argv = [program(FERRY, "ninja -C build"), "restore", path, "-n", name, "--console", "stdio",
            "--log", "debug", *how]
    with Machine(argv, memory, None) as machine:
        took = first_change(machine, memory, gap)
        limit = time.monotonic() + 60
        while not (runs := re.search(rb"runs since (\d+) ns", machine.errors)):
            machine._read(0.1)
            if time.monotonic() > limit:
                raise Failed("it does not say when the guest ran")
        return {"first_ms": took / 1e6, "rate": mib / (took / 1e9),
                "run_ms": (int(runs.group(1)) - machine.began) / 1e6}


def monitor(directory):
    limit = time.monotonic() + 60
    while True:
        try:
            return Qmp(directory)
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.001)


def restore_qemu(memory, mib):
    _, path, gap = saved("qemu", memory, mib, None)
    vmm, directory = Qemu(), tempfile.mkdtemp(prefix="ferry-bench-")
    argv = vmm._argv(directory, bare_guest("dirty"), None, "", memory, 1)
    with vmm._start(argv + ["-incoming", f"exec:cat {path}"], directory, memory) as machine:
        # It was saved while it stood still, so it has to be told to go on.
        with monitor(directory) as qmp:
            wait_for(lambda: qmp.call("query-status")["status"] == "paused", "QEMU to load")
            qmp.call("cont")
        took = first_change(machine, memory, gap)
        return {"first_ms": took / 1e6, "rate": mib / (took / 1e9)}


# --- the first request: one pass over all that the guest has written to


class Api(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)

    def call(self, method, route, body):
        self.request(method, route, json.dumps(body))
        answer = self.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise Failed(f"{method} {route}: {answer.status}: {text[-300:]!r}")


def api_of(path):
    wait_for(lambda: os.path.exists(path), "the API's socket")
    api = Api(path)
    limit = time.monotonic() + 10
    while True:
        try:
            api.connect()
            return api
        except ConnectionRefusedError:
            if time.monotonic() > limit:
                raise


@functools.lru_cache(maxsize=None)
def stopped(memory, mib):
    """A paused guest in a file: (directory, path, where it counts, how far it is)."""
    directory = tempfile.TemporaryDirectory(prefix="ferry-bench-snapshot-")
    path = os.path.join(directory.name, "saved")
    with running(Ferry(), memory, mib, rate=0) as guest:
        ferry("pause", guest.machine.name)
        ferry("snapshot", guest.machine.name, path)
        return directory, path, guest.gap, guest.total()


def settle(pid):
    """Until its memory no longer grows: what is fetched ahead is there."""
    last, since = None, time.monotonic()
    while time.monotonic() < since + 0.3:
        with open(f"/proc/{pid}/statm") as f:
            now = int(f.read().split()[1])
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.01)


def has_reached(guests, gap, end):
    for guest in guests:
        with contextlib.suppress(OSError):  # its page is not there yet
            if end <= guest.read_u64(gap + GAP_TOTAL) < end + (1 << 40):
                return True
    return False


def one_pass(path, guests, gap, end):
    """ms from the request to go on until the guest has been at all its pages."""
    sent_read, sent_write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(sent_write, struct.pack("=Q", time.monotonic_ns()))
            Api(path).call("PATCH", "/vm", {"state": "Resumed"})
        finally:
            os._exit(0)
    limit = time.monotonic() + 20
    while not has_reached(guests, gap, end):
        if time.monotonic() > limit:
            raise Failed("the guest stands still")
    now = time.monotonic_ns()
    os.waitpid(pid, 0)
    began = struct.unpack("=Q", os.read(sent_read, 8))[0]
    os.close(sent_read)
    os.close(sent_write)
    return (now - began) / 1e6


def first_pass(memory, mib, known, **how):
    """`known`: the working set has been recorded; False: it is not."""
    _, path, gap, start = stopped(memory, mib)
    if known and how and not os.path.exists(path + ".ws"):
        first_pass(memory, mib, False, **how)
    if not known:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".ws")
    with place() as directory:
        socket_path = os.path.join(directory, "api")
        argv = [program(FERRY, "ninja -C build"), "--api-sock", socket_path, "--control", "false"]
        with Machine(argv, memory, None) as machine:
            api = api_of(socket_path)
            api.call("PUT", "/snapshot/load", {"snapshot_path": path, **how})
            settle(machine.pid)
            with open(f"/proc/{machine.pid}/mem", "rb", buffering=0) as mem:
                # It cannot be looked for while its pages are not there: all that may be it.
                guests = [GuestMemory(mem, base) for base in places(machine.pid, memory * MIB, 1)]
                took = one_pass(socket_path, guests, gap, start + mib * 256)
            Api(socket_path).call("PUT", "/stop", {})
            machine.child.wait(60)  # FILE.ws is written
            return {"pass_ms": took}


# --- clones


def private_mib(pid):
    with open(f"/proc/{pid}/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Private_")) / 1024


def clone(count, memory):
    """`count` clones of an idle guest; memory that is a clone's own, a share of its RAM."""
    with running(Ferry(), memory, 1, rate=10) as guest:
        made = []
        try:
            report = ferry("clone", guest.machine.name, "--count", str(count))
            made = report["clones"]
            pids = [ferry("info", name)["pid"] for name in made]
            own = sum(private_mib(pid) for pid in pids) / count
            return {"pause_ms": report["pause_us"] / 1e3, "total_ms": report["total_us"] / 1e3,
                    "own": own / memory * 100}
        finally:
            for name in made:
                ferry("stop", name)


def register():
    gap = "longest time the guest did not run"
    rate = "MiB of guest data a second"
    add(Row("snapshot", "save", "a running 1 GiB guest with 256 MiB written to, which goes on "
            f"writing to {RATE} pages/s; QEMU: stop, migrate to a file, cont",
            {"ferry": functools.partial(save_ferry, 1024, 256),
             "qemu": functools.partial(save_qemu, 1024, 256)},
            [Metric("pause_ms", "save: pause the VMM reports", "ms", goal=10),
             Metric("gap_ms", f"save: {gap}", "ms"),
             Metric("rate", f"save: {rate}", "MiB/s", goal_ratio_least=("qemu", 1))], runs=3))
    add(Row("snapshot", "raw", "256 MiB of guest data written as they are, beside cp of a file of "
            "that size, both synced",
            {"ferry": functools.partial(save_layout, 384, 256, "mapped"),
             "cp": functools.partial(copy, 256)},
            [Metric("rate", f"raw: {rate}", "MiB/s", goal_ratio_least=("cp", 0.8))], runs=3))
    add(Row("snapshot", "packed", "256 MiB of guest data compressed while the guest runs, beside "
            "lz4 -1 of a file of that size, both synced",
            {"ferry": functools.partial(save_layout, 384, 256, "packed"),
             "lz4": functools.partial(compress, 256)},
            [Metric("rate", f"packed: {rate}", "MiB/s", goal_ratio_least=("lz4", 0.8))], runs=3))
    for mib in (4, 32, 256):
        add(Row("snapshot", f"diff {mib}M", f"a diff of a running guest that has written to {mib} "
                "MiB since the one before",
                {"ferry": functools.partial(diff, mib)},
                [Metric("pause_ms", f"diff {mib}M: pause the VMM reports", "ms"),
                 Metric("pages", f"diff {mib}M: pages in it", "pages"),
                 Metric("share", f"diff {mib}M: pause / (2 ms + 1 us a page)", "", goal=1)],
                runs=3))
    add(Row("snapshot", "eager", "256 MiB of guest data read back before the guest goes on, from "
            "exec to its first count; beside lz4 -d",
            {"ferry": functools.partial(restore_ferry, 384, 256, "packed"),
             "qemu": functools.partial(restore_qemu, 384, 256),
             "lz4": functools.partial(unpack, 256)},
            [Metric("first_ms", "eager: exec to the guest going on", "ms"),
             Metric("rate", f"eager: {rate}", "MiB/s", goal_ratio_least=("lz4", 0.8))], runs=3))
    add(Row("snapshot", "first pass", "a restored 128 MiB guest goes on and writes to each of "
            "16 MiB of pages once: fetched ahead, as they are touched, all read before",
            {"ferry": functools.partial(first_pass, 128, 16, True, lazy=True),
             "unknown": functools.partial(first_pass, 128, 16, False, lazy=True),
             "resident": functools.partial(first_pass, 128, 16, True)},
            [Metric("pass_ms", "first pass after a lazy restore", "ms",
                    goal_ratio=("resident", 1.3))], runs=5))
    add(Row("snapshot", "clone", "8 clones of a running, idle 256 MiB guest",
            {"ferry": functools.partial(clone, 8, 256)},
            [Metric("pause_ms", "clone: pause of the parent", "ms", goal=10),
             Metric("total_ms", "clone: until all 8 run", "ms", goal=1000),
             Metric("own", "clone: memory of its own, of its RAM", "%", goal=5)], runs=5))
    for memory, mib in ((128, 96), (4096, 1024)):
        label = "128M" if memory == 128 else "4G"
        add(Row("snapshot", f"lazy {label}", f"a {label} guest with {mib} MiB written to goes on at "
                "once; QEMU reads it all",
                {"ferry": functools.partial(restore_ferry, memory, mib, "packed", "--lazy"),
                 "mapped": functools.partial(restore_ferry, memory, mib, "mapped", "--map"),
                 "qemu": functools.partial(restore_qemu, memory, mib)},
                [Metric("run_ms", f"lazy {label}: exec to the guest's first instruction", "ms", goal=10),
                 Metric("first_ms", f"lazy {label}: exec to the guest going on", "ms",
                        goal_ratio=("qemu", 0.1))], runs=5))

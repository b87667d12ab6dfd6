# SPDX-License-Identifier: Apache-2.0
"""scripts/bench migrate: live migration over TCP, seen by the VMM and by the guest.

The guest looks at the TSC all the time, so the longest gap between two looks is the longest time it
did not run; and it counts the pages it writes to.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass

from rows import Absent, Metric, Row, add
from suite_boot import khz
from vmms import Failed, Ferry, Qemu, bare_guest, bench_program, wait_for

DOWNTIME_LIMIT_MS = 300  # the default of both VMMs
# Offsets in struct ucall_gap, guest/bare/ucall_abi.h.
GAP_LONGEST, GAP_TOTAL, GAP_RESET = 0, 16, 24
FAULTS = 10000  # of the floor


@dataclass
class Load:
    """A guest that writes to `mib` of its memory, `rate` pages a second (0: as fast as it can).
    `noise` MiB, those included, are filled with what cannot be packed before the migration begins;
    else the rest of each page is zero."""
    memory: int
    mib: int
    rate: int
    noise: int = 0

    def append(self):
        return f"mib={self.mib} rate={self.rate} noise={self.noise} tsc_khz={khz()}"

    def touched(self):
        """Pages that have been written when the migration begins: all, or the first."""
        return 1 if self.noise or self.rate <= 10 else self.mib * 256

    def __str__(self):
        rate = f"{self.rate} pages/s" if self.rate else "as many pages as it can"
        noise = f", {self.noise} MiB of noise" if self.noise else ""
        return f"{self.memory} MiB guest that writes to {rate} of {self.mib} MiB{noise}"


LOADS = {
    "idle": Load(1024, 1, 10),
    "dirtying": Load(512, 256, 20000),
    "increment": Load(256, 100, 0),
    "limit": Load(256, 100, 20000),
    "full": Load(1024, 1, 10, noise=512),
    "link": Load(512, 1, 10, noise=256),
    "heavy": Load(256, 64, 25000, noise=128),
}


def image_probe(path):
    """(gpa, bytes) of the start of the guest's text, to find guest memory in a process."""
    with open(path, "rb") as f:
        header = f.read(64)
        f.seek(struct.unpack_from("<Q", header, 32)[0])  # program headers, the first is the text
        file_offset, _, gpa = struct.unpack_from("<QQQ", f.read(56), 8)
        f.seek(file_offset)
        return gpa, f.read(256)


# --- CPU time


class Cpu:
    """CPU time of processes without their vCPUs. One may end meanwhile: its time stays readable
    until it is reaped, that of its threads does not, so vCPUs are looked at now and then."""

    def __init__(self, *machines):
        self.machines = machines
        self.vcpus = {}  # path of schedstat -> ns when first and last seen
        self.done = threading.Event()
        self.began = [self._process(m) for m in machines]
        self._find(lambda ns: ns)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    @staticmethod
    def _process(machine):
        return time.clock_gettime_ns((~machine.pid << 3) | 2)  # CPUCLOCK_SCHED of the process

    @staticmethod
    def _thread(path):
        with open(path) as f:
            return int(f.read().split()[0])

    def _find(self, before):
        for machine in self.machines:
            with contextlib.suppress(OSError):
                for task in os.listdir(f"/proc/{machine.pid}/task"):
                    path = f"/proc/{machine.pid}/task/{task}"
                    with open(f"{path}/comm") as f:
                        vcpu = f.read().startswith(("vcpu", "CPU "))
                    if vcpu and f"{path}/schedstat" not in self.vcpus:
                        now = self._thread(f"{path}/schedstat")
                        self.vcpus[f"{path}/schedstat"] = [before(now), now]

    def _look(self):
        for path, times in self.vcpus.items():
            with contextlib.suppress(OSError):
                times[1] = self._thread(path)

    def _watch(self):
        while not self.done.wait(0.005):
            self._look()

    def seconds(self):
        self.done.set()
        self.thread.join()
        self._look()
        total = sum(self._process(m) - began for m, began in zip(self.machines, self.began))
        self._find(lambda ns: 0)  # what came meanwhile did all of its work meanwhile
        return (total - sum(last - first for first, last in self.vcpus.values())) / 1e9


# --- a link with a limit, between two network namespaces


class Link:
    ADDRESSES = ("10.79.0.1", "10.79.0.2")

    def __init__(self, mbit):
        self.mbit = mbit
        self.holders = []

    def __enter__(self):
        if os.geteuid():
            raise Absent("a link with a limit takes two network namespaces, which only root makes")
        for tool in ("unshare", "nsenter", "ip", "tc"):
            if not shutil.which(tool):
                raise Absent(f"no {tool}: install util-linux and iproute2")
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self):
        ours = os.readlink("/proc/self/ns/net")
        for _ in self.ADDRESSES:
            self.holders.append(subprocess.Popen(["unshare", "--net", "sleep", "infinity"]))
            holder = self.holders[-1].pid
            wait_for(lambda pid=holder: os.readlink(f"/proc/{pid}/ns/net") != ours,
                     "a network namespace", 10)
        self.run(0, "ip", "link", "add", "link0", "type", "veth", "peer", "name", "link1", "netns",
                 str(self.holders[1].pid))
        for host, address in enumerate(self.ADDRESSES):
            self.run(host, "ip", "addr", "add", f"{address}/24", "dev", f"link{host}")
            for name in ("lo", f"link{host}"):
                self.run(host, "ip", "link", "set", name, "up")
            self.run(host, "tc", "qdisc", "add", "dev", f"link{host}", "root", "tbf", "rate",
                     f"{self.mbit}mbit", "burst", f"{max(256, self.mbit)}kb", "latency", "50ms")

    def __exit__(self, *_):
        for holder in self.holders:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()

    def enter(self, host):
        return ["nsenter", f"--net=/proc/{self.holders[host].pid}/ns/net", "--"]

    def run(self, host, *argv):
        done = subprocess.run([*self.enter(host), *argv], capture_output=True, text=True,
                              check=False)
        if done.returncode:
            raise Failed(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def bits(self):
        """What the limit has counted so far from the first host: with all headers."""
        tbf = json.loads(self.run(0, "tc", "-s", "-j", "qdisc", "show", "dev", "link0"))
        return sum(q["bytes"] for q in tbf if q["kind"] == "tbf") * 8


# --- a guest on its way


class Gauge:
    """What the guest notes in its memory, wherever it is."""

    def __init__(self, machine, gap):
        self.gap = gap
        self.memory = machine.guest_memory(*image_probe(bare_guest("dirty")))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.memory.__exit__()

    def read(self, offset):
        return self.memory.read_u64(self.gap + offset)

    def pages(self):
        return self.read(GAP_TOTAL)

    def forget(self):
        self.memory.write_u64(self.gap + GAP_RESET, 1)
        wait_for(lambda: self.read(GAP_RESET) == 0, "the guest to forget its longest gap")

    def speed(self, seconds=0.3):
        """Pages a ms."""
        began, before = time.monotonic(), self.pages()
        time.sleep(seconds)
        pages, now = self.pages(), time.monotonic()
        return (pages - before) / (now - began) / 1e3

    def longest_ms(self):
        before = self.pages()
        wait_for(lambda: self.pages() > before, "the guest to go on at its new place")
        return self.read(GAP_LONGEST) / khz()


@dataclass
class Trip:
    """How a guest is moved."""
    load: Load
    mode: str = "precopy"
    limit_ms: int = DOWNTIME_LIMIT_MS
    mbit: int = 0  # of the link; 0: loopback
    there: tuple = ()  # further options of whoever receives
    here: tuple = ()  # and sends


def hop(vmm, trip, source, target, gap):
    """Moves the guest from one machine to the other."""
    with Gauge(source, gap) as gauge:
        gauge.forget()
        speed = gauge.speed()
        quiet_ms = gauge.longest_ms()
        gauge.forget()
        cpu = Cpu(source, target)
        began, pages = time.monotonic(), gauge.pages()
    result = vmm.migrate(source, target, trip.limit_ms, trip.mode, trip.here)
    with Gauge(target, gap) as gauge:
        pages, now = gauge.pages() - pages, time.monotonic()
        result["cpu_s"] = cpu.seconds()
        result["gap_ms"], result["quiet_ms"] = gauge.longest_ms(), quiet_ms
    if not trip.load.rate:
        result["lost_ms"] = (now - began) * 1e3 - pages / speed
        result["slow"] = 100 * result["lost_ms"] / result["total_ms"]
    return result


def depart(vmm, load, enter=()):
    """A machine with the guest at work, and where the guest keeps its notes."""
    more = {"more": ("--backing", "thp")} if isinstance(vmm, Ferry) else {}  # as QEMU does
    machine = vmm.start(bare_guest("dirty"), append=load.append(), memory=load.memory,
                        enter=enter, **more)
    try:
        machine.wait_console("sync 1", 120)
        gap = machine.values()[("gap", 0)]
        with Gauge(machine, gap) as gauge:
            wait_for(lambda: gauge.pages() >= load.touched(), "the guest to touch its memory")
    except BaseException:
        machine.__exit__()
        raise
    return machine, gap


def travel(vmm, trip):
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Link(trip.mbit)) if trip.mbit else None
        enter = [link.enter(host) if link else () for host in (0, 1)]
        host = link.ADDRESSES[1] if link else "127.0.0.1"
        insecure = ("--insecure",) if link and isinstance(vmm, Ferry) else ()
        trip = Trip(**{**trip.__dict__, "here": trip.here + insecure,
                       "there": trip.there + insecure})
        source, gap = depart(vmm, trip.load, enter[0])
        stack.enter_context(source)
        target = stack.enter_context(vmm.receive(trip.load.memory, bare_guest("dirty"), trip.mode,
                                                 host, enter[1], trip.there))
        before = link.bits() if link else 0
        result = hop(vmm, trip, source, target, gap)
        result["rate"] = (trip.load.noise or trip.load.mib) / result["total_ms"] * 1e3
        if link:
            sent = link.bits() - before
            result["share"] = 100 * sent / 1e6 / (result["total_ms"] / 1e3) / trip.mbit
        return result


def travel_tls(trip):
    """The same with a key that both sides share."""
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as directory:
        key = os.path.join(directory, "psk")
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "w") as f:
            f.write(f"bench:{os.urandom(32).hex()}\n")
        options = ("--psk", key)
        return travel(Ferry(), Trip(**{**trip.__dict__, "there": options, "here": options}))


def to_and_fro(vmm, trip, hops):
    """Share of migrations, in percent, that kept to the limit."""
    kept = []
    source, gap = depart(vmm, trip.load)
    try:
        for _ in range(hops):
            target = vmm.receive(trip.load.memory, bare_guest("dirty"), trip.mode)
            try:
                kept.append(hop(vmm, trip, source, target, gap))
            except BaseException:
                target.__exit__()
                raise
            source.__exit__()
            source = target
    finally:
        source.__exit__()
    within = {name: [result[name] <= trip.limit_ms for result in kept]
              for name in ("gap_ms", "downtime_ms")}
    return {"gap_kept": 100 * sum(within["gap_ms"]) / hops,
            "kept": 100 * sum(within["downtime_ms"]) / hops,
            "worst_ms": max(result["downtime_ms"] for result in kept)}


def floor():
    done = subprocess.run([bench_program("bench_fault"), str(FAULTS)], capture_output=True,
                          text=True, timeout=120, check=False)
    if done.returncode:
        raise Failed(f"bench_fault: {done.stderr.strip()}")
    values = [float(word) for word in done.stdout.split()]
    return {"p50": values[0], "p99": values[1]}


# --- rows


def gaps(name, **goals):
    return [Metric("gap_ms", f"{name}: longest time the guest did not run", "ms", **goals),
            Metric("quiet_ms", f"{name}: the same in 0.3 s without a migration", "ms")]


def common(name):
    return [Metric("downtime_ms", f"{name}: downtime the VMM reports", "ms"),
            Metric("total_ms", f"{name}: total time the VMM reports", "ms"),
            Metric("wire_mib", f"{name}: sent", "MiB"),
            Metric("cpu_s", f"{name}: CPU time of both VMMs without vCPUs", "s")]


def lost(name):
    return [Metric("lost_ms", f"{name}: guest time lost", "ms"),
            Metric("slow", f"{name}: guest slow-down", "%")]


def both(trip):
    return {vmm.name: functools.partial(travel, vmm, trip) for vmm in (Ferry(), Qemu())}


def row(name, trip, metrics, runs=5, more=None):
    way = f"{trip.mbit} Mbit/s" if trip.mbit else "loopback"
    add(Row("migrate", name, f"{trip.mode} of a {trip.load}, over TCP, {way}, downtime limit "
            f"{trip.limit_ms} ms", {**both(trip), **(more or {})}, metrics, runs=runs))


def register():
    trip = Trip(LOADS["idle"])
    row("idle", trip, [*gaps("idle", goal=2, goal_ratio=("qemu", 0.5)), *common("idle")])
    trip = Trip(LOADS["dirtying"])
    row("dirtying", trip, [*gaps("dirtying"), *common("dirtying")])
    trip = Trip(LOADS["increment"])
    row("increment", trip, [*gaps("increment", goal_ratio=("qemu", 0.3)), *common("increment"),
                            *lost("increment")])
    trip = Trip(LOADS["limit"], limit_ms=30)
    hops = 10
    add(Row("migrate", "limit", f"{hops} times pre-copy of a {trip.load}, over loopback, downtime "
            f"limit {trip.limit_ms} ms",
            {vmm.name: functools.partial(to_and_fro, vmm, trip, hops) for vmm in (Ferry(), Qemu())},
            [Metric("kept", "limit: kept, by what the VMM reports", "%", goal_least=99),
             Metric("gap_kept", "limit: kept, by the guest's longest gap", "%", goal_least=99),
             Metric("worst_ms", "limit: longest downtime the VMM reports", "ms")], runs=10,
            warmup=0))
    trip = Trip(LOADS["full"])
    row("stream", trip, [Metric("rate", "stream: throughput", "MiB/s",
                                goal_ratio_least=("qemu", 1.5)), *common("stream")],
        more={"tls": functools.partial(travel_tls, trip)})
    for mbit, runs, goal in ((1000, 5, 95), (10000, 5, None)):
        name = f"{mbit // 1000} Gbit"
        row(name, Trip(LOADS["link"], mbit=mbit),
            [Metric("share", f"{name}: of the link", "%", goal_least=goal),
             Metric("rate", f"{name}: throughput", "MiB/s"), *common(name)], runs=runs)
    row("write-heavy", Trip(LOADS["heavy"], mbit=1000, limit_ms=30),
        [Metric("wire_mib", "write-heavy: sent", "MiB", goal_ratio=("qemu", 0.7)),
         *gaps("write-heavy"), *[m for m in common("write-heavy") if m.name != "wire_mib"]], runs=3)
    trip = Trip(LOADS["increment"], "postcopy")
    row("post-copy", trip, [*gaps("post-copy", goal=2, goal_ratio=("qemu", 0.5)),
                            Metric("requests", "post-copy: pages asked for", "",
                                   goal_ratio=("qemu", 1)),
                            *common("post-copy"), *lost("post-copy")])
    quiet = Trip(LOADS["increment"], "postcopy", here=("--prepaging", "none"))
    add(Row("migrate", "faults", f"how long pages asked for take in post-copy of a {trip.load}",
            {"ferry": functools.partial(travel, Ferry(), quiet),
             "pushing": functools.partial(travel, Ferry(), trip), "floor": floor},
            [Metric("p50", "fault: median", "us", goal_ratio=("floor", 1.3)),
             Metric("p99", "fault: 99th percentile", "us", goal_ratio=("floor", 3)),
             Metric("requests", "fault: requests", "")], runs=5))

# SPDX-License-Identifier: Apache-2.0
"""scripts/bench sched: who gets the processor, and how soon, when VMs compete for one pCPU: under
ferry's scheduler, under control groups (weights, quotas), and under Linux alone.

Shares are of the CPU time that these VMs had together, so that other load of the machine takes
from all of them alike."""

import contextlib
import functools
import json
import os
import re
import resource
import subprocess
import tempfile
import time

from rows import Absent, Metric, Row, add
from vmms import FERRY, Failed, bare_guest, program

CPU_S = 10        # CPU time that the VMs of a row have together in one run
WINDOW_S = 1      # ... and in one window of it
SETTLE_S = 0.4
WAKES = 150
LOOPS = 6_000_000_000
LIMIT_S = 240


def until(what):
    end = time.monotonic() + LIMIT_S
    while True:
        value = what()
        if value is not None:
            return value
        if time.monotonic() > end:
            raise Failed(f"nothing for {LIMIT_S} s")
        time.sleep(0.005)


class Vm:
    def __init__(self, host, name, guest, append, options, prepare):
        self.stderr = tempfile.TemporaryFile()
        self.child = subprocess.Popen(
            [program(FERRY, "ninja -C build"), "run", "-k", bare_guest(guest), "--ucall", "-m",
             "32M", "-a", append, "--console", "null", "--control", "false", "--name", name,
             *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.stderr,
            preexec_fn=prepare)
        self.host = host
        until(lambda: True if "sync 1" in self.said() else None)
        # clock_getcpuclockid(3). Of the process, whose other threads sleep; a thread's schedstat
        # lags behind by a tick of the kernel.
        self.clock = ~self.child.pid << 3 | 2

    def said(self):
        if self.child.poll() is not None and self.child.returncode:
            raise Failed(f"a VM ended with {self.child.returncode}")
        # Not through the file's own offset, which is the child's as well.
        return os.pread(self.stderr.fileno(), 1 << 20, 0).decode(errors="replace")

    def values(self, name):
        return [int(v) for v in re.findall(rf"{name}\[0\] = (\d+)", self.said())]

    def cpu_s(self):
        return time.clock_gettime(self.clock)

    def end(self):
        self.child.kill()
        self.child.wait()
        self.stderr.close()


class Host:
    """One pCPU, and what shares it among VMs. A context manager."""

    def __init__(self):
        self.cpu = min(os.sched_getaffinity(0))
        self.vms = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for vm in self.vms:
            vm.end()

    def pin(self):
        os.sched_setaffinity(0, {self.cpu})

    def vm(self, guest, append="", weight=256, cap=0):
        raise NotImplementedError

    def add(self, guest, append, options, prepare):
        vm = Vm(self, f"bench-{os.getpid()}-{len(self.vms)}", guest, append, options, prepare)
        self.vms.append(vm)
        return vm

    def cpu_s(self):
        """CPU time of what does the scheduling, beside the VMs."""
        return 0


class Linux(Host):
    def vm(self, guest, append="", weight=256, cap=0):
        if weight != 256 or cap:
            raise Absent("Linux alone knows neither weights nor caps for VMs")
        return self.add(guest, append, ["--sched", "off"], self.pin)


class Groups(Host):
    """cgroup v2 if its cpu controller is there, else v1."""

    def __init__(self):
        super().__init__()
        self.groups = []
        self.v2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        self.root = "/sys/fs/cgroup" if self.v2 else "/sys/fs/cgroup/cpu"
        if self.v2:
            with open(f"{self.root}/cgroup.subtree_control") as f:
                if "cpu" not in f.read().split():
                    raise Absent("the cpu controller of cgroup v2 is not enabled at the root")
        if not os.access(self.root, os.W_OK):
            raise Absent(f"{self.root} is not ours to make groups in")

    def write(self, group, name, value):
        with open(f"{group}/{name}", "w") as f:
            f.write(str(value))

    def vm(self, guest, append="", weight=256, cap=0):
        group = f"{self.root}/ferry-bench-{os.getpid()}-{len(self.groups)}"
        os.mkdir(group)
        self.groups.append(group)
        if self.v2:
            self.write(group, "cpu.weight", max(1, weight * 100 // 1024))
            if cap:
                self.write(group, "cpu.max", f"{cap * 1000} 100000")
        else:
            self.write(group, "cpu.shares", weight)
            if cap:
                self.write(group, "cpu.cfs_quota_us", cap * 1000)

        def enter():
            self.write(group, "cgroup.procs", os.getpid())
            self.pin()

        return self.add(guest, append, ["--sched", "off"], enter)

    def __exit__(self, *exc):
        super().__exit__(*exc)
        for group in self.groups:
            with contextlib.suppress(OSError):
                os.rmdir(group)


class Sched(Host):
    def __init__(self, *options):
        super().__init__()
        self.dir = tempfile.TemporaryDirectory()
        self.socket = os.path.join(self.dir.name, "sched")
        self.log = tempfile.TemporaryFile()
        self.daemon = subprocess.Popen(
            [program(FERRY, "ninja -C build"), "sched", "daemon", "--socket", self.socket,
             "--pcpus", str(self.cpu), *options], stderr=self.log)
        until(lambda: True if self.status() else None)

    def status(self):
        done = subprocess.run([FERRY, "sched", "status", "--socket", self.socket, "--json"],
                              capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def vm(self, guest, append="", weight=256, cap=0):
        return self.add(guest, append, ["--sched", self.socket, "--weight", str(weight), "--cap",
                                        str(cap)], None)

    def cpu_s(self):
        with open(f"/proc/{self.daemon.pid}/schedstat") as f:
            return int(f.read().split()[0]) / 1e9

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.daemon.kill()
        self.daemon.wait()
        self.log.close()
        self.dir.cleanup()


# --- shares

def windows(vms, cpu_s, window_s):
    """CPU time of each VM in each window, which ends when all together had `window_s`."""
    result, last = [], [vm.cpu_s() for vm in vms]

    def passed():
        now = [vm.cpu_s() for vm in vms]
        return now if sum(now) - sum(last) >= window_s else None

    while len(result) * window_s < cpu_s:
        now = until(passed)
        result.append([a - b for a, b in zip(now, last)])
        last = now
    return result


def error_of(had, due):
    return max(abs(h / sum(had) - d / sum(due)) for h, d in zip(had, due)) * 100


def jain(had, due):
    x = [h / d for h, d in zip(had, due)]
    return sum(x) ** 2 / (len(x) * sum(v * v for v in x))


def shares(make, weights):
    with make() as host:
        vms = [host.vm("spin", weight=w) for w in weights]
        windows(vms, SETTLE_S, SETTLE_S)
        had = windows(vms, CPU_S, WINDOW_S)
        total = [sum(column) for column in zip(*had)]
        return {"error": error_of(total, weights),
                "worst": max(error_of(one, weights) for one in had),
                "unfair": (1 - jain(total, weights)) * 1e6}


def cap(make, percent):
    """Alone on its pCPU with a cap: what it had in each window of wall time."""
    with make() as host:
        vm = host.vm("spin", cap=percent)
        time.sleep(0.5)
        had, last, then = [], vm.cpu_s(), time.monotonic()
        start = (last, then)
        for _ in range(40):
            time.sleep(0.05)
            cpu, now = vm.cpu_s(), time.monotonic()
            had.append((cpu - last) / (now - then) * 100)
            last, then = cpu, now
        mean = (last - start[0]) / (then - start[1]) * 100
        rough = (sum((h - mean) ** 2 for h in had) / len(had)) ** 0.5
        return {"over": max(0, mean - percent), "had": mean, "rough": rough}


# --- wake-ups, cost

def wake(make, hogs):
    with make() as host:
        for _ in range(hogs):
            host.vm("spin")
        vm = host.vm("wake", f"period_us=5000 n={WAKES} rate=2")
        until(lambda: True if len(vm.values("wake_max")) == 2 else None)
        return {name: vm.values(f"wake_{name}")[1] / 1000 for name in ("p50", "p99")}


def cost(make):
    """CPU time that two VMs need for the same work, and what the scheduler itself takes."""
    with make() as host:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        own, start = host.cpu_s(), time.monotonic()
        vms = [host.vm("spin", f"loops={LOOPS}") for _ in range(2)]
        until(lambda: True if all(vm.child.poll() is not None for vm in vms) else None)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        passed = time.monotonic() - start
        return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "own": (host.cpu_s() - own) / passed * 100}


def register():
    ten, slow = (functools.partial(Sched, "--slice", time) for time in ("10ms", "30ms"))
    two = {"ferry": Sched, "ferry, 30 ms": slow, "cgroups": Groups}
    three = {**two, "Linux": Linux}

    def each(makers, function, *args):
        return {name: functools.partial(function, make, *args) for name, make in makers.items()}

    share_metrics = [Metric("error", f"share error over {CPU_S} s", "% points", goal=2),
                     Metric("worst", f"worst in {WINDOW_S} s of it", "% points"),
                     Metric("unfair", "1 - Jain's index", "1/1000000")]
    add(Row("sched", "equal", "3 burning VMs of equal weight on one pCPU",
            each(three, shares, (256, 256, 256)), share_metrics, runs=3, warmup=0))
    add(Row("sched", "256:512:1024", "3 burning VMs of these weights on one pCPU",
            each(two, shares, (256, 512, 1024)), share_metrics, runs=3, warmup=0))
    for percent in (25, 50):
        add(Row("sched", f"cap {percent}", f"one burning VM with a cap of {percent} %",
                each(two, cap, percent),
                [Metric("had", "had, of one pCPU", "%"), Metric("over", "above its cap", "% points"),
                 Metric("rough", "deviation among windows of 50 ms", "% points")],
                runs=3, warmup=0))
    for hogs in (1, 3):
        add(Row("sched", f"wake beside {hogs}", f"a VM that wakes every 5 ms beside {hogs} that "
                "burn, all of equal weight on one pCPU", each(three, wake, hogs),
                [Metric("p50", "timer to handler, median", "ms"),
                 Metric("p99", "timer to handler, 99th percentile", "ms", goal=2)],
                runs=3, warmup=0))
    add(Row("sched", "cost", "CPU time for the same work of 2 VMs on one pCPU, and of what schedules "
            "them", {"ferry": functools.partial(cost, Sched),
                     "ferry, 10 ms": functools.partial(cost, ten),
                     "ferry, 30 ms": functools.partial(cost, slow),
                     "Linux": functools.partial(cost, Linux)},
            [Metric("cpu", "CPU time of the VMs", "s", goal_ratio=("Linux", 1.005)),
             Metric("own", "CPU time of the daemon, of one pCPU", "%")], runs=5, warmup=0))

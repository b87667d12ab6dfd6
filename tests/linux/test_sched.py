# SPDX-License-Identifier: Apache-2.0
"""The credit scheduler with real VMs. Compared is CPU time within one run, never how long things
take: other processes of the host take from all VMs alike."""

import json
import os
import re
import shutil
import signal
import tempfile
import time
import unittest

import ferrylab as lab

def until(what, limit=lab.LIMIT):
    """Waits for `what()` to be true; its value."""
    end = time.monotonic() + limit
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"did not come in {limit} s")
        time.sleep(0.02)


class Sched(unittest.TestCase):
    def setUp(self):
        self.lab = lab.Lab()
        self.addCleanup(self.lab.close)
        self.socket = self.lab.path("sched")
        self.cpus = sorted(os.sched_getaffinity(0))

    def scheduler(self, *args, one=True):
        """With one pCPU, so that VMs compete, and short slices, so that short runs say much."""
        pcpus = str(self.cpus[0]) if one else ",".join(map(str, self.cpus))
        process = lab.Process([lab.FERRY, "sched", "daemon", "--socket", self.socket, "--pcpus",
                               pcpus, "--slice", "10ms", "--tick", "5ms", *args],
                              env=self.lab.env)
        self.lab.start(process)
        process.stderr.wait(b"scheduling at")
        return process

    def guest(self, image, *args, append="", **options):
        return self.lab.vm("run", "-k", lab.bare_guest(image + ".elf"), "--ucall", "-m", "32M",
                           "-a", append, "--sched", self.socket, *args, **options)

    def spin(self, *args):
        vm = self.guest("spin", *args)
        vm.stderr.wait(b"sync 1")
        return vm

    def status(self):
        return self.lab.ferry("sched", "status", "--socket", self.socket, "--json").json()

    def scheduled(self):
        return {vm["name"]: vm for vm in self.status()["vms"]}

    def run_ns(self, vms):
        all_vms = self.scheduled()
        return [all_vms[vm.name]["run_ns"] for vm in vms]

    def windows(self, vms, cpu_s, nr):
        """CPU time of each in `nr` windows, of `cpu_s` together each."""
        result, last = [], self.run_ns(vms)

        def passed():
            now = self.run_ns(vms)
            return now if sum(now) - sum(last) >= cpu_s * 1e9 else None

        for _ in range(nr):
            now = until(passed)
            result.append([a - b for a, b in zip(now, last)])
            last = now
        return result

    def measure(self, vms, cpu_s):
        """Shares of the CPU time that they had, once it is `cpu_s` together."""
        had = self.windows(vms, cpu_s, 1)[0]
        return [one / sum(had) for one in had]

    def error(self, had, due):
        """Of the shares, in points."""
        return max(abs(h / sum(had) - d / sum(due)) for h, d in zip(had, due)) * 100

    def assert_shares(self, shares, due, tolerance=0.03):
        due = [one / sum(due) for one in due]
        print("  shares", [round(s, 4) for s in shares], "due", [round(d, 4) for d in due])
        for share, want in zip(shares, due):
            self.assertAlmostEqual(share, want, delta=tolerance)

    SAMPLE = 20 if lab.LONG else 1.2

    def test_weights(self):
        self.scheduler()
        vms = [self.spin("--weight", str(w)) for w in (256, 512, 1024)]
        self.measure(vms, 0.3)
        self.assert_shares(self.measure(vms, self.SAMPLE), (1, 2, 4))
        # Changed from both sides; in effect at once.
        self.assertEqual(self.lab.ferry("set", vms[0].name, "weight=1024").status, 0)
        done = self.lab.ferry("sched", "set", vms[2].name, "weight=512", "--socket", self.socket)
        self.assertEqual(done.status, 0, done)
        self.measure(vms, 0.3)
        self.assert_shares(self.measure(vms, self.SAMPLE), (2, 1, 1))
        info = vms[2].ferry("info", "--json").json()["sched"]
        self.assertEqual((info["weight"], info["attached"]), (512, True))

    def test_unequal_vcpus(self):
        self.scheduler("--weights", "vm")
        vms = [self.spin("-c", "1"), self.spin("-c", "4")]
        self.measure(vms, 0.3)
        self.assert_shares(self.measure(vms, self.SAMPLE), (1, 1))

    def test_two_pcpus(self):
        """On two pCPUs: at most 2 % off over 10 s, and 5 % in each second of it."""
        if len(self.cpus) < 2:
            self.skipTest("one CPU")
        nr, cpu_s = (10, 2) if lab.LONG else (3, 0.4)
        mixes = (((2, 512), (2, 256)), ((2, 256), (2, 512), (2, 1024)), ((4, 256), (1, 256)))
        for mix in mixes:
            daemon = self.scheduler(one=False)
            vms = [self.spin("-c", str(nr_vcpus), "--weight", str(weight))
                   for nr_vcpus, weight in mix]
            due = [nr_vcpus * weight for nr_vcpus, weight in mix]
            self.measure(vms, 0.5)
            had = self.windows(vms, cpu_s, nr)
            whole = self.error([sum(column) for column in zip(*had)], due)
            worst = max(self.error(one, due) for one in had)
            print(f"  vCPUs, weight {mix}: {whole:.2f} points off, at worst {worst:.2f} in "
                  f"{cpu_s} s of CPU time")
            self.assertLess(whole, 2 if lab.LONG else 5)
            if lab.LONG:
                self.assertLess(worst, 5)
            for vm in vms:
                vm.ferry("stop")
                self.assertEqual(vm.wait(), lab.STOPPED)
            daemon.child.kill()
            daemon.child.wait()

    def test_caps(self):
        self.scheduler(one=False)
        for cap, cpus in ((10, 1), (25, 1), (50, 2), (150, 2)):
            vm = self.spin("--cap", str(cap), "-c", str(cpus))
            self.measure([vm], 0.05)
            before = self.status()
            self.measure([vm], (10 if lab.LONG else 0.8) * cap / 100)
            after = self.status()

            def of(status):
                return [v["run_ns"] for v in status["vms"] if v["name"] == vm.name][0]

            had = (of(after) - of(before)) / (after["time_ns"] - before["time_ns"]) * 100
            print(f"  cap {cap}: {had:.2f} % of one pCPU")
            self.assertLess(had, cap * 1.02 + 0.5)
            vm.ferry("stop")
            self.assertEqual(vm.wait(), lab.STOPPED)

    def test_refused(self):
        self.scheduler()
        vm = self.spin()
        for option, value in (("--weight", "0"), ("--weight", "65536"), ("--cap", "-1"),
                              ("--affinity", "x"), ("--affinity", "1023")):
            done = self.lab.ferry("run", "-k", lab.bare_guest("spin.elf"), "-m", "32M", "--sched",
                                  self.socket, option, value)
            self.assertNotEqual(done.status, 0, done)
            self.assertIn(value, done.stderr)
            done = vm.ferry("set", f"{option[2:]}={value}")
            self.assertNotEqual(done.status, 0, done)
            self.assertIn(value, done.stderr)
        self.assertEqual(list(self.scheduled()), [vm.name])

    def test_sleeper(self):
        """One that sleeps and wakes beside hogs does not queue up behind them."""
        self.scheduler()
        hogs = [self.spin() for _ in range(3)]
        vm = self.guest("wake", append="period_us=5000 n=60")
        vm.stderr.wait(re.compile(rb"wake_p99\[0\] = \d+"))
        start = vm.stderr.size()
        worst = vm.stderr.wait(re.compile(rb"wake_p50\[0\] = (\d+)"), start)
        late = int(worst.group(1))
        print(f"  woke late by {late} us (median) beside {len(hogs)} hogs")
        mine = self.scheduled()[vm.name]["vcpus"][0]
        self.assertGreaterEqual(mine["wakes"], 60)
        if not os.geteuid():
            self.assertLess(late, 20000)  # the hogs' slices together are more

    def steal(self, vm, number):
        found = [m for m in re.finditer(rb"steal_ns\[0\] = (\d+)", bytes(vm.stderr.data))]
        return int(found[number].group(1)) if len(found) > number else None

    def waited(self, vm):
        """What the daemon logged, and what Linux did (KVM counts that by itself)."""
        vcpu = self.scheduled()[vm.name]["vcpus"][0]
        with open(f"/proc/{vm.pid}/task/{vcpu['tid']}/schedstat") as f:
            return vcpu["wait_ns"] + int(f.read().split()[1])

    def test_steal(self):
        """A guest sees as stolen what it waited for turns."""
        self.scheduler()
        hogs = [self.spin() for _ in range(2)]
        vm = self.guest("steal", append="period_us=1000000")
        until(lambda: self.steal(vm, 0))
        before, first = self.waited(vm), self.steal(vm, 0)
        nr = 8 if lab.LONG else 2
        until(lambda: self.steal(vm, nr))
        waited, stolen = self.waited(vm) - before, self.steal(vm, nr) - first
        print(f"  waited {waited / 1e6:.1f} ms, guest saw {stolen / 1e6:.1f} ms stolen")
        self.assertEqual(len(hogs), 2)
        # The two are read a moment after each other, in which it may wait for some turns.
        self.assertAlmostEqual(stolen / waited, 1, delta=0.02 if lab.LONG else 0.1)

    def test_no_steal_asleep(self):
        self.scheduler()
        hogs = [self.spin() for _ in range(2)]
        vm = self.guest("steal", append="period_us=300000 irqs=1")
        until(lambda: self.steal(vm, 0) is not None)
        before = self.waited(vm)
        until(lambda: self.steal(vm, 5))
        waited, stolen = self.waited(vm) - before, self.steal(vm, 4) - self.steal(vm, 1)
        print(f"  {stolen / 1e6:.1f} ms stolen of 900 ms asleep beside {len(hogs)} hogs; waited, "
              f"awake, {waited / 1e6:.1f} ms meanwhile")
        self.assertLess(stolen, waited + 5e6)

    def test_pause_and_stop(self):
        self.scheduler()
        vms = [self.spin("-c", "2"), self.spin()]
        for _ in range(20 if lab.LONG else 3):
            self.assertEqual(vms[0].ferry("pause").status, 0)
            until(lambda: all(v["state"] == "blocked"
                              for v in self.scheduled()[vms[0].name]["vcpus"]))
            self.assert_shares(self.measure(vms, 0.1), (0, 1), 0.01)
            self.assertEqual(vms[0].ferry("resume").status, 0)
            self.measure([vms[0]], 0.05)
        for vm in vms:
            self.assertEqual(vm.ferry("stop").status, 0)
            self.assertEqual(vm.wait(), lab.STOPPED)
        until(lambda: not self.scheduled())

    def test_stopped_process(self):
        """One that the host stopped, wherever it was, holds nobody up."""
        self.scheduler()
        vms = [self.spin(), self.spin()]
        for _ in range(20 if lab.LONG else 4):
            os.kill(vms[0].pid, signal.SIGSTOP)
            self.measure([vms[1]], 0.05)
            os.kill(vms[0].pid, signal.SIGCONT)
            self.measure([vms[0]], 0.05)
        os.kill(vms[0].pid, signal.SIGKILL)
        vms[0].child.wait()
        until(lambda: list(self.scheduled()) == [vms[1].name])
        self.measure([vms[1]], 0.05)

    def cpu_ns(self, vm):
        total = 0
        for task in os.listdir(f"/proc/{vm.pid}/task"):
            with open(f"/proc/{vm.pid}/task/{task}/schedstat") as f:
                total += int(f.read().split()[0])
        return total

    def advance(self, vm, ns=20e6):
        before = self.cpu_ns(vm)
        until(lambda: self.cpu_ns(vm) >= before + ns)

    def test_daemon_dies(self):
        """VMs run on without a scheduler, and find the next one with what was set."""
        daemon = self.scheduler()
        vms = [self.spin() for _ in range(8 if lab.LONG else 3)]
        self.assertEqual(vms[0].ferry("set", "weight=768", "cap=0").status, 0)
        for number in range(50 if lab.LONG else 2):
            if number % 2:
                os.kill(daemon.pid, signal.SIGTERM)
            else:
                os.kill(daemon.pid, signal.SIGKILL)
            daemon.child.wait()
            for vm in vms:
                self.advance(vm)
            daemon = self.scheduler()
            until(lambda: len(self.scheduled()) == len(vms))
            self.assertEqual(self.scheduled()[vms[0].name]["weight"], 768)
            self.measure(vms, 0.2)
        self.assert_shares(self.measure(vms, self.SAMPLE), [3] + [1] * (len(vms) - 1))

    def test_no_daemon(self):
        vm = self.spin()
        vm.stderr.wait(b"vCPUs run freely")
        self.advance(vm)
        done = self.lab.ferry("sched", "status", "--socket", self.socket)
        self.assertNotEqual(done.status, 0)
        self.assertIn(self.socket, done.stderr)
        self.scheduler()
        until(lambda: self.scheduled())  # it comes later
        self.measure([vm], 0.05)

    @unittest.skipIf(os.geteuid(), "a jail with another user needs root")
    def test_jail(self):
        """From a jail the daemon's socket is out of sight; somebody outside connects for the VM."""
        outside = tempfile.mkdtemp(prefix="ferry-sched-")
        self.addCleanup(shutil.rmtree, outside)
        self.socket = os.path.join(outside, "sched")
        daemon = self.scheduler()
        vms = [self.spin("--weight", "512", "--jail", self.lab.jail()), self.spin()]
        self.assertNotEqual(os.stat(f"/proc/{vms[0].pid}").st_uid, 0)
        self.measure(vms, 0.3)
        self.assert_shares(self.measure(vms, self.SAMPLE), (2, 1))
        self.assertEqual(vms[0].ferry("set", "weight=768").status, 0)
        daemon.child.kill()
        daemon.child.wait()
        for vm in vms:
            self.advance(vm)
        self.scheduler()
        until(lambda: len(self.scheduled()) == 2)
        self.assertEqual(self.scheduled()[vms[0].name]["weight"], 768)
        self.measure(vms, 0.3)
        self.assert_shares(self.measure(vms, self.SAMPLE), (3, 1))
        for vm in vms:
            self.assertEqual(vm.ferry("stop").status, 0)
            self.assertEqual(vm.wait(), lab.STOPPED)
        until(lambda: not self.scheduled())

    def test_told(self):
        self.scheduler()
        vms = [self.spin(), self.spin()]
        self.measure(vms, 0.2)
        trace = self.lab.ferry("sched", "trace", "--socket", self.socket, "--json").json()
        kinds = {event["event"] for event in trace["events"]}
        self.assertLessEqual({"run", "stop", "wake"}, kinds)
        self.assertEqual({event["name"] for event in trace["events"]}, {vm.name for vm in vms})
        times = [event["at_ns"] for event in trace["events"]]
        self.assertEqual(times, sorted(times))
        text = self.lab.ferry("sched", "status", "--socket", self.socket).stdout
        for vm in vms:
            self.assertIn(vm.name, text)
        rows = json.loads(self.lab.ferry("sched", "top", "--socket", self.socket, "--json",
                                         "--count", "1", "--delay", "0.3").stdout)
        self.assertEqual({row["vm"] for row in rows}, {vm.name for vm in vms})

    def test_linux(self):
        self.scheduler()
        vm = self.lab.linux("--sched", self.socket, "--weight", "512")
        vm.prompt()
        hog = self.spin("--weight", "256")
        vm.type("while :; do :; done\n")
        self.measure([vm, hog], 0.5)
        self.assert_shares(self.measure([vm, hog], self.SAMPLE), (2, 1), 0.05)


if __name__ == "__main__":
    unittest.main()

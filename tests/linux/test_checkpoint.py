# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: made while the guest runs, gone back to, and started from after a crash.

Bare metal: the memory oracle of guest/bare/guests/incr.c, whose heartbeat also tells how old a
state is. Linux: a process that counts on the console.
"""

import json
import os
import re
import shutil
import signal
import threading
import unittest

import ferrylab as lab
from ferrylab import LabTest
import test_migrate  # not its classes: their tests would run here once more
from test_migrate import MIB, Oracle

COUNT = re.compile(rb"count (\d{6})\r\n")
PAGES = 1024


class Pid:
    """A VM whose process is not our child: its name and pid, and the console of the one before."""

    def __init__(self, test, vm, pid):
        self.lab, self.name, self.pid, self.console = test.lab, vm.name, pid, vm.console

    def ferry(self, command, *args, **options):
        return self.lab.ferry(command, self.name, *args, **options)


class Checkpoints(LabTest):
    check_oracle, beats_on = test_migrate.BareMoves.check_oracle, test_migrate.BareMoves.beats_on

    def bare(self, *args, command="run"):
        start = ["--kernel", lab.bare_guest("incr.elf"), "--ucall", "--memory", "64M", "--append",
                 f"pages={PAGES} period_us=500"]
        return self.lab.vm(command, *(start if command == "run" else []), "--backing", "memfd",
                           *args)

    def oracle(self, vm):
        """The guest's values come by ucall, to stderr."""
        vm.stderr.wait(b"sync 1")
        oracle = Oracle.__new__(Oracle)
        oracle.memory, oracle.values = 64 * MIB, {}
        for name, index, value in Oracle.VALUE.findall(bytes(vm.stderr.data)):
            oracle.values.setdefault(name.decode(), {})[int(index)] = int(value)
        return oracle

    def poll(self, what, text):
        """Waits for what no event tells; the limit only ends what hangs."""
        for _ in range(lab.LIMIT * 20):
            found = what()
            if found:
                return found
            threading.Event().wait(0.05)
        self.fail(text)

    def info(self, name):
        result = self.lab.ferry("info", name, "--json")
        return result.json() if result.status == lab.OK else None

    def status(self, name):
        return self.assertStatus(self.lab.ferry("checkpoint", name, "--explain", "--json"),
                                 lab.OK).json()

    def made(self, name, number):
        """Waits until this VM process has made `number` checkpoints."""
        def enough():
            result = self.lab.ferry("checkpoint", name, "--explain", "--json")
            return result.status == lab.OK and result.json()["made"] >= number and result.json()
        return self.poll(enough, f"{name} makes no checkpoints")

    def files(self, where):
        listed = self.assertStatus(self.lab.ferry("checkpoint", "ls", where, "--json"), lab.OK)
        return listed.json()["checkpoints"]

    def beat(self, oracle, vm):
        return oracle.read(vm)[1][0]

    def other_process(self, vm, old):
        """The VM that took the place of process `old`."""
        info = self.poll(lambda: (i := self.info(vm.name)) and i["pid"] != old and
                         i["state"] in ("running", "snapshotting") and i,
                         f"{vm.name} does not come back: {vm.errors()}")
        return Pid(self, vm, info["pid"])

    def stop(self, vm):
        self.assertStatus(vm.ferry("stop"), lab.OK)

    def test_killed_and_started_again(self):
        where = self.lab.path("checkpoints")
        vm = self.bare("--checkpoints", f"{where},interval=200ms,keep=3,chain=4")
        oracle = self.oracle(vm)
        kills = 10 if lab.LONG else 2
        place = Pid(self, vm, self.info(vm.name)["pid"])
        for kill in range(kills):
            self.made(vm.name, 3)
            before = self.beat(oracle, place)
            os.kill(place.pid, signal.SIGKILL)
            place = self.other_process(vm, place.pid)
            vm.stderr.wait(re.compile(rb"(starts again from \S+/checkpoint-\d+.snap\n[^$]*?){%d}"
                                      % (kill + 1)))
            self.beats_on(oracle, place, {0: before})
        self.assertStatus(vm.ferry("checkpoint", "--stop"), lab.OK)
        self.check_oracle(oracle, place, {0: before})
        self.stop(vm)
        self.assertEnds(vm, lab.STOPPED)
        with open(os.path.join(where, "failures")) as f:
            words = [line.split()[1:] for line in f]
        self.assertEqual([["start"]] + kills * [[]] + [["stop"]], words)

    def test_kill_is_the_end(self):
        """For the process that would start it again, too; a VM that is not watched ends as before."""
        where = self.lab.path("checkpoints")
        for crash in range(20 if lab.LONG else 4):
            vm = self.bare("--checkpoints", f"{where},interval=100ms,keep=2")
            self.oracle(vm)
            self.made(vm.name, 2)
            if crash % 2:  # it is about to be started again, or just was
                os.kill(self.info(vm.name)["pid"], signal.SIGKILL)
            killed = self.assertStatus(vm.ferry("kill", "--json"), lab.OK).json()
            self.assertNotEqual(vm.pid, killed["pid"])
            self.assertEqual(128 + signal.SIGKILL, vm.wait(), vm.errors())
            if not crash % 2:
                self.assertNotIn("starts again", vm.errors())
            with open(os.path.join(where, "failures")) as f:
                self.assertEqual("stop", f.read().split()[-1])
            self.assertStatus(vm.ferry("kill"), lab.FAILED)
        # Nobody would start this one again.
        vm = self.bare("--checkpoints", f"{where}2,interval=100ms,restarts=0")
        self.oracle(vm)
        self.assertEqual(vm.pid, self.assertStatus(vm.ferry("kill", "--json"), lab.OK).json()["pid"])
        self.assertEqual(-signal.SIGKILL, vm.wait())

    def test_newest_is_damaged(self):
        where = self.lab.path("checkpoints")
        vm = self.bare()
        oracle = self.oracle(vm)
        self.assertStatus(vm.ferry("checkpoint", "--interval", "100ms", "--dir", where, "--chain",
                                   "1"), lab.OK)
        self.made(vm.name, 3)
        self.stop(vm)
        self.assertEnds(vm, lab.STOPPED)
        files = self.files(where)
        newest = os.path.join(where, files[-1]["name"])
        with open(newest, "r+b") as f:
            f.seek(os.path.getsize(newest) // 2)
            byte = f.read(1)[0]
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte ^ 1]))
        again = self.bare("--newest", where, command="restore")
        again.stderr.wait(files[-1]["name"].encode() + b" is passed over: ")
        self.poll(lambda: self.info(again.name), "it does not run")
        # It goes on being saved as before.
        self.assertTrue(self.made(again.name, 2)["fixed"])
        self.beats_on(oracle, again, {})
        self.assertStatus(again.ferry("checkpoint", "--stop"), lab.OK)
        self.check_oracle(oracle, again, {})
        self.stop(again)
        for file in self.files(where):
            os.truncate(os.path.join(where, file["name"]), 5000)
        self.assertIn("no whole checkpoint", self.lab.ferry("restore", "--newest", where).stderr)

    def test_rollback(self):
        vm = self.bare()
        oracle = self.oracle(vm)
        where = self.lab.path("checkpoints")
        pid = self.info(vm.name)["pid"]
        self.assertStatus(vm.ferry("checkpoint", "--interval", "100ms", "--dir", where, "--keep",
                                   "1000"), lab.OK)
        self.made(vm.name, 6)
        states = {}
        for number in (5, 2, 1, 5, 2):
            self.beats_on(oracle, vm, {0: self.beat(oracle, vm)})
            self.assertStatus(vm.ferry("checkpoint", "--stop"), lab.OK)
            self.assertStatus(vm.ferry("pause"), lab.OK)
            path = os.path.join(where, f"checkpoint-{number:06}.snap")
            self.assertStatus(vm.ferry("rollback", path), lab.OK)
            self.assertEqual("paused", self.info(vm.name)["state"])
            state = oracle.read(vm)
            self.assertEqual(states.setdefault(number, state), state)
            self.assertStatus(vm.ferry("resume"), lab.OK)
            self.beats_on(oracle, vm, {0: self.beat(oracle, vm)})
            self.check_oracle(oracle, vm, state[1])
            self.assertStatus(vm.ferry("resume"), lab.OK)
            self.assertStatus(vm.ferry("checkpoint", "--interval", "100ms", "--dir", where,
                                       "--keep", "1000"), lab.OK)
        beats = [states[number][1][0] for number in (1, 2, 5)]
        self.assertEqual(sorted(set(beats)), beats)
        # While checkpoints are made, by number; they go on.
        self.made(vm.name, 2)
        self.assertStatus(vm.ferry("rollback", "3"), lab.OK)
        self.made(vm.name, 2)
        self.assertEqual(pid, self.info(vm.name)["pid"])
        result = self.assertStatus(vm.ferry("rollback", "999"), lab.FAILED)
        self.assertIn("no checkpoint '999'", result.stderr)
        # Another machine's: nothing has happened.
        other = self.bare("--vmgenid", "false")
        self.oracle(other)
        self.assertStatus(other.ferry("snapshot", self.lab.path("other")), lab.OK)
        result = self.assertStatus(vm.ferry("rollback", self.lab.path("other")), lab.USAGE)
        self.assertIn("another machine", result.stderr)
        self.stop(other)
        self.beats_on(oracle, vm, {0: self.beat(oracle, vm)})
        # A page that is damaged: all of them are read before the guest is touched.
        saved = os.path.join(where, "saved")
        shutil.copy(os.path.join(where, "checkpoint-000001.snap"), saved)
        os.chmod(saved, 0o644)
        self.assertStatus(vm.ferry("rollback", saved), lab.OK)
        with open(saved, "r+b") as f:
            f.seek(5000)
            byte = f.read(1)
            f.seek(5000)
            f.write(bytes([byte[0] ^ 1]))
        before = self.beat(oracle, vm)
        result = self.assertStatus(vm.ferry("rollback", saved), lab.FAILED)
        self.assertIn("damaged", result.stderr)
        self.assertIn(self.info(vm.name)["state"], ("running", "snapshotting"))
        self.beats_on(oracle, vm, {0: before})
        self.made(vm.name, 2)  # checkpoints go on as well
        self.stop(vm)
        self.assertEnds(vm, lab.STOPPED)

    def test_keep_and_refusals(self):
        vm = self.bare()
        self.oracle(vm)
        where = self.lab.path("a/b/checkpoints")
        self.assertStatus(vm.ferry("checkpoint", "--stop"), lab.FAILED)
        for wrong in (("--interval", "1ms"), ("--mtbf", "never"), ("--keep", "0"),
                      ("--mtbf", "1h", "--failure-log", "/dev/null"), ("--failure-log", "/nowhere")):
            self.assertNotEqual(lab.OK, vm.ferry("checkpoint", "--dir", where, *wrong).status)
        self.assertStatus(vm.ferry("checkpoint", "--interval", "50ms", "--dir", where, "--keep",
                                   "2", "--chain", "3"), lab.OK)
        status = self.made(vm.name, 12)
        self.assertGreater(status["removed"], 0)
        self.assertEqual(0, status["failed"], status)
        self.assertGreater(status["model"]["cost_s"], 0)
        files = self.files(where)
        self.assertLessEqual(len(files), 2 + 2 + 2)
        self.assertEqual("full", files[0]["kind"])
        other = self.bare()
        self.oracle(other)
        result = other.ferry("checkpoint", "--interval", "1s", "--dir", where)
        self.assertStatus(result, lab.FAILED)
        self.assertIn("another VM", result.stderr)
        self.stop(other)
        # A paused guest loses nothing: nothing is saved.
        self.poll(lambda: vm.ferry("pause").status == lab.OK, "it cannot be paused")
        made = self.status(vm.name)["made"]
        threading.Event().wait(0.3)
        self.assertEqual(made, self.status(vm.name)["made"])
        self.assertStatus(vm.ferry("resume"), lab.OK)
        self.poll(lambda: self.status(vm.name)["made"] > made, "no more checkpoints")
        self.stop(vm)
        self.assertEnds(vm, lab.STOPPED)

    def test_first_start_that_fails(self):
        where = self.lab.path("checkpoints")
        result = self.lab.ferry("run", "--kernel", "/nowhere", "--checkpoints", where)
        self.assertStatus(result, lab.FAILED)
        self.assertNotIn("again", result.stderr)
        self.assertFalse(os.path.exists(where))
        for wrong in ("", ",keep=1", f"{where},keep", f"{where},mtbf=x", f"{where},restarts=-1"):
            self.assertStatus(self.lab.ferry("run", "--kernel", "/nowhere", "--checkpoints", wrong),
                              lab.USAGE)

    def test_linux_goes_on(self):
        """What was counted after the checkpoint is counted again; nothing else is missing."""
        where = self.lab.path("checkpoints")
        vm = self.lab.linux("--memory", "64M", "--checkpoints", f"{where},interval=1s,keep=2")
        vm.prompt()
        vm.command("stty -echo")
        vm.type("counter 40\n")
        vm.wait_for(COUNT)
        pid = self.info(vm.name)["pid"]
        self.made(vm.name, self.status(vm.name)["made"] + 2)
        os.kill(pid, signal.SIGKILL)
        vm.stderr.wait(b"starts again from")
        killed = vm.console.size()
        place = self.other_process(vm, pid)
        counts = [int(n) for n in COUNT.findall(bytes(vm.console.data[:killed]))]
        vm.wait_for(b"count %06d" % (counts[-1] + 20), killed)
        again = [int(n) for n in COUNT.findall(bytes(vm.console.data[killed:]))]
        self.assertEqual(list(range(len(counts))), counts)
        self.assertLessEqual(again[0], counts[-1] + 1)
        self.assertEqual(list(range(again[0], again[0] + len(again))), again)
        self.assertEqual(1, len(re.findall("starts again", vm.errors())))
        self.stop(place)
        self.assertEnds(vm, lab.STOPPED)


class Arithmetic(LabTest):
    """ferry checkpoint without a VM."""

    def ask(self, *args):
        return self.assertStatus(self.lab.ferry("checkpoint", *args, "--json"), lab.OK).json()

    def test_explain(self):
        model = self.ask("--explain", "--mtbf", "24h", "--cost", "100ms", "--write-time", "1s")
        self.assertAlmostEqual(131.45, model["interval_s"], 1)
        self.assertAlmostEqual(0.0015, model["expected_loss"], 4)
        daly = self.ask("--explain", "--mtbf", "24h", "--cost", "100ms", "--daly")
        self.assertLess(daly["interval_s"], model["interval_s"])
        slow = self.ask("--explain", "--mtbf", "1h", "--cost", "1ms", "--write-time", "1m")
        self.assertEqual(60, slow["interval_s"])
        log = self.lab.path("log")
        with open(log, "w") as f:
            f.write(100 * "36h\n")
        measured = self.ask("--explain", "--failure-log", log)
        self.assertAlmostEqual(36 * 3600, measured["mtbf_s"], delta=36 * 36)

    def test_simulate(self):
        svg = self.lab.path("loss.svg")
        trial = self.ask("--simulate", "--mtbf", "24h", "--cost", "1s", "--svg", svg)
        self.assertLess(abs(trial["policy"]["loss"] / trial["model"]["best_loss"] - 1), 0.05)
        for point in trial["points"]:
            self.assertLess(abs(point["loss"] / point["expected_loss"] - 1), 0.1)
            self.assertGreater(point["loss"], 0.95 * trial["model"]["best_loss"])
        with open(svg) as f:
            text = f.read()
        self.assertTrue(text.startswith("<svg ") and text.endswith("</svg>\n"))
        self.assertEqual(json.dumps(trial), json.dumps(
            self.ask("--simulate", "--mtbf", "24h", "--cost", "1s")))


if __name__ == "__main__":
    unittest.main()

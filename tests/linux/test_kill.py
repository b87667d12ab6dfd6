# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of a migration: exactly one guest is left, and its memory is right.

Bare metal: the memory oracle of guest/bare/guests/incr.c in real ferry processes, over loopback. The
seed is printed with each failure; FERRY_SEED sets it. FERRY_LONG=1: hundreds of kills.

victim           before COMMIT                     after it                   post-copy, pages missing
source           no guest, the destination ends    the destination runs       the destination stands still
destination      the source runs on                it died with its owner     the source keeps its pages,
                                                   (or: the source is in      says so; checkpoints
                                                   doubt, until force-resume)
ferry migrate    the source runs on, or the destination has it: whatever it is, it is one of them
"""

import collections
import os
import random
import re
import socket
import subprocess
import threading
import time
import unittest

import ferrylab as lab
from ferrylab import LabTest
import test_migrate  # not its classes: their tests would run here once more
from test_migrate import MIB, MODES, Oracle

WAITING = re.compile(rb"waiting for a guest on (\S+)\n")
ARRIVED = b"arrived, runs here"
VICTIMS = ("source", "destination", "ferry migrate")
KILLS = 300 if lab.LONG else 18
# Slow enough that a kill meets every state, fast enough for hundreds: 8 MiB of data.
PAGES, BANDWIDTH = 2048, "40M"


class Kills(LabTest):
    check_oracle, beats_on = test_migrate.BareMoves.check_oracle, test_migrate.BareMoves.beats_on

    def setUp(self):
        super().setUp()
        self.seed = int(os.environ.get("FERRY_SEED") or random.SystemRandom().randrange(1 << 32))
        self.random = random.Random(self.seed)

    def boot(self, *args):
        vm = self.lab.vm("run", "--kernel", lab.bare_guest("incr.elf"), "--memory", "64M",
                         "--backing", "memfd", "--append", f"pages={PAGES} period_us=500", *args)
        oracle = Oracle(vm, 64 * MIB)
        self.beats_on(oracle, vm, {})
        return vm, oracle

    def receive(self):
        vm = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0", "--backing", "memfd")
        return vm, vm.stderr.wait(WAITING).group(1).decode()

    def client(self, vm, address, mode):
        return self.lab.start(lab.Process(
            [lab.FERRY, "migrate", vm.name, address, "--mode", mode, "--bandwidth", BANDWIDTH],
            env=self.lab.env, stdout=subprocess.DEVNULL))

    def poll(self, what):
        """Waits for what no event tells; the limit only ends what hangs."""
        for _ in range(lab.LIMIT * 50):
            found = what()
            if found is not None:
                return found
            threading.Event().wait(0.02)
        return self.fail("nothing comes")

    def settled(self, vm):
        """Who has the guest, as the source says once it knows; its end is an answer, too."""
        def says():
            if vm.child.poll() is not None:
                return "destination"
            status = self.lab.ferry("migrate", "status", vm.name, "--json")
            if status.status != lab.OK:
                return None  # it is about to end
            status = status.json()
            if status["phase"] not in ("idle", "done", "failed"):
                return None
            return status["report"]["owner"] if status.get("report") else "source"

        def twice():  # a client that was killed may have left its request behind
            first = says()
            threading.Event().wait(0.1)
            return first if first == says() else None
        return self.poll(twice)

    def state(self, vm):
        return self.assertStatus(vm.ferry("info", "--json"), lab.OK).json()["state"]

    def whole(self, vm, oracle):
        """It runs, all of its memory is right, and it goes on afterwards."""
        before = oracle.read(vm)[1]
        self.beats_on(oracle, vm, before)
        self.check_oracle(oracle, vm, {})
        self.assertStatus(vm.ferry("resume"), lab.OK)
        self.beats_on(oracle, vm, oracle.read(vm)[1])

    @staticmethod
    def waits(address):
        """A stranger is told why it is sent away only by who waits for a first connection."""
        try:
            with socket.create_connection(address.split(":")[1:], lab.LIMIT) as s:
                s.sendall(bytes(16))  # a header, of no type there is
                return b"record type 0" in s.makefile("rb").read()
        except OSError:  # it ends just now
            return False

    def arrival(self, target, address, oracle):
        """What becomes of the guest at the destination when its source has died."""
        def becomes():
            if target.child.poll() is not None:
                return "ended"
            said = bytes(target.stderr.data)
            if ARRIVED not in said:
                return "waits" if self.waits(address) else None
            if b"stands still" in said:
                return "lacks pages"
            # Two rounds over all of its pages, none of which can come any more: it has them.
            beats = oracle.read(target)[1]
            self.first = self.first or beats
            return "runs" if all(beats[cpu] > self.first[cpu] + 2 for cpu in beats) else None
        self.first = None
        return self.poll(becomes)

    # What is left when the victim is dead: (what happened, the VM that has the guest or None).

    def source_killed(self, vm, target, address, oracle):
        what = self.arrival(target, address, oracle)
        if what in ("ended", "waits"):
            if what == "waits":
                target.end()
            else:
                self.assertEqual(lab.FAILED, target.wait(), target.errors())
            self.assertNotIn(ARRIVED, bytes(target.stderr.data))
            return "gone with the source", None
        if what == "lacks pages":
            self.assertEqual("paused", self.state(target))
            beats = oracle.read(target)[1]
            self.assertEqual(beats, oracle.read(target)[1])
            return "destination, lacking pages for ever", None
        return "destination", target

    def destination_killed(self, vm, target, address, oracle):
        owner = self.settled(vm)
        if owner == "source":
            return owner, vm
        if owner == "destination":
            self.assertEnds(vm, lab.OK, "migrated")
            return "gone with the destination", None
        self.assertEqual("migrating", self.state(vm))
        self.assertStatus(vm.ferry("resume"), lab.FAILED)
        if owner == "in doubt":  # this human knows that it does not run there
            self.assertStatus(self.lab.ferry("migrate", "force-resume", vm.name), lab.OK)
            return owner, vm
        self.assertEqual("destination, lacking pages", owner)
        return owner, None

    def client_killed(self, vm, target, address, oracle):
        owner = self.settled(vm)
        self.assertIn(owner, ("source", "destination"))
        if owner == "source":
            target.end()
            return owner, vm
        self.assertEnds(vm, lab.OK, "migrated")
        return owner, target

    def one_kill(self, vm, oracle, victim, mode, moment):
        target, address = self.receive()
        client = self.client(vm, address, mode)
        process = {"source": vm, "destination": target, "ferry migrate": client}[victim]
        try:
            process.child.wait(moment)
        except subprocess.TimeoutExpired:
            process.child.kill()
        process.wait()
        if victim != "ferry migrate":
            client.wait()
        left = {"source": self.source_killed, "destination": self.destination_killed,
                "ferry migrate": self.client_killed}[victim]
        what, guest = left(vm, target, address, oracle)
        if guest:
            self.whole(guest, oracle)
        # Never two: whoever has not got it does not run it.
        for other in (vm, target):
            if other is not guest:
                self.assertTrue(other.child.poll() is not None or
                                self.state(other) in ("paused", "migrating"), other.errors())
                other.end()
        client.end()
        return what, guest

    def unharmed(self, vm, mode):
        """How long it takes when nobody is killed, and where the guest is then."""
        target, address = self.receive()
        start = time.monotonic()
        client = self.client(vm, address, mode)
        self.assertEqual(lab.OK, client.wait(), client.errors())
        took = time.monotonic() - start
        self.assertEnds(vm, lab.OK, "migrated")
        return took, target

    def test_kill_at_random_moments(self):
        vm, oracle = self.boot()
        took = {}
        for mode in MODES:
            took[mode], vm = self.unharmed(vm, mode)
        seen = collections.Counter()
        for kill in range(KILLS):
            victim, mode = VICTIMS[kill % len(VICTIMS)], MODES[kill // len(VICTIMS) % len(MODES)]
            moment = self.random.uniform(0, 1.1 * took[mode])
            if vm is None:
                vm, oracle = self.boot()
            with self.subTest(seed=self.seed, kill=kill, victim=victim, mode=mode, moment=moment):
                what, left = None, None
                try:
                    what, left = self.one_kill(vm, oracle, victim, mode, moment)
                finally:
                    vm = left
                seen[victim, mode, what] += 1
        print(f"seed {self.seed}: {KILLS} kills; unharmed it takes",
              ", ".join(f"{mode} {seconds:.2f} s" for mode, seconds in took.items()))
        for (victim, mode, what), number in sorted(seen.items()):
            print(f"  {number:4} {victim:13} killed, {mode:8}: {what}")

    def test_destination_killed_in_postcopy(self):
        """Its memory is torn between two processes, one of them dead: the newest checkpoint is left."""
        where = self.lab.path("checkpoints")
        vm, oracle = self.boot()
        self.assertStatus(vm.ferry("checkpoint", "--interval", "100ms", "--dir", where), lab.OK)
        self.poll(lambda: vm.ferry("checkpoint", "--explain", "--json").json()["made"] >= 3 or None)
        self.assertStatus(vm.ferry("checkpoint", "--stop"), lab.OK)
        target, address = self.receive()
        # Nothing is pushed until nobody has asked for anything for a second.
        client = self.lab.start(lab.Process(
            [lab.FERRY, "migrate", vm.name, address, "--mode", "postcopy", "--prepaging", "none"],
            env=self.lab.env, stdout=subprocess.DEVNULL))
        client.stderr.wait(b"pushing")
        target.end()
        self.assertEqual(lab.FAILED, client.wait())
        self.assertIn("waits there for what is still here", client.errors())
        what, guest = self.destination_killed(vm, target, address, oracle)
        self.assertEqual(("destination, lacking pages", None), (what, guest))
        # Nobody is there to take the rest.
        self.assertStatus(self.lab.ferry("migrate", "recover", vm.name, address), lab.FAILED)
        self.assertEqual("destination, lacking pages", self.settled(vm))
        self.assertStatus(vm.ferry("stop"), lab.OK)
        vm.wait()
        again = self.lab.vm("restore", "--newest", where, "--backing", "memfd")
        self.poll(lambda: self.lab.ferry("info", again.name).status == lab.OK or None)
        self.assertStatus(again.ferry("checkpoint", "--stop"), lab.OK)
        self.whole(again, oracle)
        self.assertStatus(again.ferry("stop"), lab.OK)
        self.assertEnds(again, lab.STOPPED)


if __name__ == "__main__":
    unittest.main()

# SPDX-License-Identifier: Apache-2.0
"""A running guest is saved, restored and moved between two network namespaces.

Linux: one process counts on the console and answers what is typed; the console output of all hosts,
one after the other, must be exactly what one uninterrupted guest would have written. Bare metal: the
memory oracle of guest/bare/guests/incr.c.
"""

import os
import re
import shutil
import subprocess
import threading
import unittest

import ferrylab as lab
from ferrylab import LabTest

MIB, GIB = 1024 * 1024, 1024 * 1024 * 1024
PAGE = 4096
RAM_BELOW, RAM_ABOVE = 3 * GIB, 4 * GIB  # vmm/layout.h: no RAM between these addresses

MODES = ("precopy", "postcopy", "hybrid")
AUTHS = ("psk", "certificates", "insecure")
HOPS = 200 if lab.LONG else 20
COUNTER_MS = 40

COUNT = re.compile(rb"count (\d{6})\r\n")
WAITING = re.compile(rb"waiting for a guest on (tcp:\S+)\n")


class Hosts:
    """Two hosts, each a network namespace, and the VMs on them."""

    def __init__(self):
        self.lab = lab.Lab()
        try:
            self.namespaces = lab.Namespaces()
            self.certificates()
        except BaseException:
            self.lab.close()
            raise
        self.auth = "psk"

    def close(self):
        self.lab.close()
        self.namespaces.close()

    def certificates(self):
        """A shared key, and a folder for each host: a CA, its own certificate and key."""
        def openssl(*args):
            subprocess.run(["openssl", *args], check=True, capture_output=True)

        def path(*names):
            return self.lab.path(os.path.join(*names))

        with open(path("psk"), "w", encoding="ascii") as f:
            f.write(f"lab:{os.urandom(32).hex()}\n")
        new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", "-x509", *new, "-keyout", path("ca.key"), "-out", path("ca.pem"),
                "-subj", "/CN=lab CA", "-days", "2")
        for index, side in enumerate(self.namespaces.sides):
            host = f"host{index}"
            os.mkdir(path(host))
            shutil.copy(path("ca.pem"), path(host))
            openssl("req", *new, "-keyout", path(host, "key.pem"), "-out", path("request"),
                    "-subj", f"/CN={host}")
            with open(path("extensions"), "w", encoding="ascii") as f:
                f.write(f"subjectAltName=IP:{side.address}\n")
            openssl("x509", "-req", "-in", path("request"), "-CA", path("ca.pem"), "-CAkey",
                    path("ca.key"), "-CAcreateserial", "-days", "2", "-extfile",
                    path("extensions"), "-out", path(host, "cert.pem"))

    def trust(self, index):
        """The options by which host `index` proves who it is, as self.auth says."""
        return {"psk": ("--psk", self.lab.path("psk")),
                "certificates": ("--tls", self.lab.path(f"host{index}")),
                "insecure": ("--insecure",)}[self.auth]

    def receive(self, index, *args):
        """A `ferry receive` on host `index`, and the address it waits on."""
        side = self.namespaces.sides[index]
        vm = self.lab.vm("receive", "--listen", f"tcp:{side.address}:0", *self.trust(index), *args,
                         namespace=side)
        address = vm.stderr.wait(WAITING).group(1).decode()
        return vm, address



class Journey:
    """The Linux guest that counts, and what it wrote on each host so far."""

    def __init__(self, hosts):
        self.hosts, self.lab = hosts, hosts.lab
        self.host = 0
        self.past = []
        self.asked = 0
        side = hosts.namespaces.sides[self.host]
        self.vm = self.lab.linux("--memory", "64M", "--cpus", "2", namespace=side)
        self.vm.prompt()
        self.boot_id = self.vm.command("cat /proc/sys/kernel/random/boot_id")
        # No echo by the terminal: it would stand anywhere between the counter's bytes.
        self.vm.command("stty -echo", start=0)
        self.vm.type(f"counter {COUNTER_MS}\n")
        found = self.vm.wait_for(re.compile(rb"counter: pid (\d+)\r\n"))
        self.pid, self.start = found.group(1), found.end()

    def moved_to(self, vm):
        """`vm` is the guest now; the process it came from has ended."""
        self.past.append(self.vm.console.rest())
        self.vm.end()
        self.vm = vm

    def ask(self):
        """Types a line, without waiting for the answer."""
        self.asked += 1
        self.vm.type(f"question {self.asked}\n")

    def answered(self):
        """Waits until the last typed line was answered, on whichever host, and the guest counts on."""
        answer = b"echo: question %d\r\n" % self.asked
        past = b"".join(self.past)  # may hold the answer or a part of it
        console = self.vm.console
        with console.changed:
            if not console.changed.wait_for(lambda: answer in past + console.data or console.ended,
                                            lab.LIMIT) or console.ended:
                raise AssertionError(f"question {self.asked} has no answer; stderr: "
                                     f"{self.vm.errors()}; last: {bytes(console.data[-600:])}")
        self.counts_on()

    def counts_on(self):
        self.vm.wait_for(COUNT, self.vm.console.size())

    def text(self):
        """What all hosts' consoles got since the counter began, up to the last whole line."""
        text = (b"".join(self.past) + bytes(self.vm.console.data))[self.start:]
        return text[:text.rindex(b"\n") + 1]


class LinuxMoves(unittest.TestCase):
    """The tests hand one guest on to each other: a boot is dear."""

    assertStatus, assertEnds = LabTest.assertStatus, LabTest.assertEnds

    @classmethod
    def setUpClass(cls):
        cls.hosts = Hosts()
        cls.addClassCleanup(cls.hosts.close)
        cls.lab = cls.hosts.lab
        cls.journey = Journey(cls.hosts)

    def check_output(self):
        """Not a byte is lost, repeated or out of order, whichever hosts wrote them."""
        lines = self.journey.text().split(b"\r\n")[:-1]
        counts = [line for line in lines if line.startswith(b"count ")]
        answers = [line for line in lines if not line.startswith(b"count ")]
        self.assertEqual([b"count %06d" % n for n in range(len(counts))], counts)
        self.assertEqual([b"echo: question %d" % n for n in range(1, len(answers) + 1)], answers)
        self.assertIn(len(answers), (self.journey.asked, self.journey.asked - 1))

    def migrate(self, mode, *args, arrival=()):
        """Moves the guest to the other host while a question is on its way."""
        j = self.journey
        target, address = self.hosts.receive(1 - j.host, *arrival)
        source = j.vm
        j.ask()
        report = self.assertStatus(source.ferry("migrate", address, "--mode", mode, "--json",
                                                *self.hosts.trust(j.host), *args), lab.OK).json()
        self.assertEqual("destination", report["owner"])
        self.assertEnds(source, lab.OK, "migrated")
        j.moved_to(target)
        j.host = 1 - j.host
        j.answered()
        return report

    def test_1_snapshot_and_restore(self):
        j = self.journey
        path = self.lab.path("guest.snapshot")
        source = j.vm
        j.ask()
        self.assertStatus(source.ferry("pause"), lab.OK)
        self.assertEqual("paused", source.ferry("info", "--json").json()["state"])
        report = self.assertStatus(source.ferry("snapshot", path, "--json"), lab.OK).json()
        self.assertEqual(os.path.getsize(path), report["file_bytes"])
        self.assertStatus(source.ferry("stop"), lab.OK)
        self.assertEnds(source, lab.STOPPED)
        restored = self.lab.vm("restore", path, namespace=self.hosts.namespaces.sides[0])
        j.moved_to(restored)
        j.answered()
        self.check_output()

    def test_2_snapshot_of_a_running_guest(self):
        """The guest goes on after it, and the file continues where it was taken."""
        j = self.journey
        path = self.lab.path("live.snapshot")
        before = j.vm.console.size()
        j.counts_on()
        self.assertStatus(j.vm.ferry("snapshot", path), lab.OK)
        j.counts_on()
        twin = self.lab.vm("restore", path)
        first = twin.wait_for(COUNT)
        twin.wait_for(COUNT, first.end())
        # Perhaps a line was half written: its other half is the first thing the twin writes.
        n = int(first.group(1))
        self.assertTrue((b"count %06d\r\n" % (n - 1)).endswith(bytes(twin.console.data[:first.start()])))
        self.assertIn(b"count %06d\r\n" % (n - 1), bytes(j.vm.console.data[before:]))
        self.assertStatus(twin.ferry("stop"), lab.OK)
        self.assertEnds(twin, lab.STOPPED)
        self.check_output()

    def test_3_back_and_forth(self):
        self.addCleanup(setattr, self.hosts, "auth", "psk")
        for hop in range(HOPS):
            mode = MODES[hop % len(MODES)]
            self.hosts.auth = AUTHS[hop // len(MODES) % len(AUTHS)]
            report = self.migrate(mode)
            self.assertEqual(mode, report["mode"], f"hop {hop}")
            self.check_output()

    def test_3a_strangers(self):
        """Whoever is not let in leaves the guest where it is, and both sides' users know why."""
        j, hosts = self.journey, self.hosts
        here, there = j.host, 1 - j.host
        target, address = hosts.receive(there)
        with open(self.lab.path("other"), "w", encoding="ascii") as f:
            f.write(f"other:{os.urandom(32).hex()}\n")
        for trust, says in (((), "--tls DIR or --psk FILE"),
                            (("--insecure",), "it speaks TLS"),
                            (("--psk", self.lab.path("other")), "same --psk"),
                            (("--psk", self.lab.path("nothing")), self.lab.path("nothing")),
                            (("--tls", self.lab.path(f"host{here}")), "it refuses")):
            result = j.vm.ferry("migrate", address, "--quiet", *trust)
            self.assertStatus(result, lab.FAILED)
            self.assertIn(says, result.stderr, trust)
            self.assertEqual("running", j.vm.ferry("info", "--json").json()["state"])
        target.end()
        refused = self.lab.ferry("receive", "--listen", "tcp:0.0.0.0:0")
        self.assertStatus(refused, lab.FAILED)
        self.assertIn("--tls DIR or --psk FILE", refused.stderr)
        j.ask()
        j.answered()
        self.check_output()

    def failing_migration(self, hurt, mode="precopy", bandwidth="1M"):
        """Starts a slow migration, calls hurt(target) once pages flow; the guest must go on here."""
        j = self.journey
        target, address = self.hosts.receive(1 - j.host)
        client = self.lab.start(lab.Process(
            [lab.FERRY, "migrate", j.vm.name, address, "--mode", mode, "--bandwidth", bandwidth,
             *self.hosts.trust(j.host)],
            env=self.lab.env))
        client.stderr.wait(b"rounds")
        hurt(target)
        self.assertEqual(lab.FAILED, client.wait(), client.errors())
        j.ask()
        j.answered()
        info = j.vm.ferry("info", "--json").json()
        self.assertEqual("running", info["state"])
        self.check_output()
        return target, client

    def test_3b_several_connections_and_dirty_rings(self):
        """There, from one with dirty rings, and back; a number of connections that is none."""
        address = f"tcp:{self.hosts.namespaces.sides[1 - self.journey.host].address}:9"
        for number in ("0", "17", "many"):
            result = self.journey.vm.ferry("migrate", address, "--connections", number)
            self.assertStatus(result, lab.USAGE)
            self.assertIn("connections", result.stderr)
        for number, mode, log in ((4, "precopy", "ring"), (2, "hybrid", "ring"),
                                  (16, "precopy", "bitmap")):
            report = self.migrate(mode, "--connections", str(number), arrival=("--dirty-log", log))
            self.assertEqual(number, report["connections"])
            self.check_output()

    def test_4_cancelled(self):
        def cancel(_target):
            self.assertStatus(self.lab.ferry("migrate", "cancel", self.journey.vm.name), lab.OK)

        target, client = self.failing_migration(cancel)
        self.assertIn("cancel", client.errors())
        self.assertEqual(lab.FAILED, target.wait(), target.errors())
        self.assertEqual(b"", target.console.rest())

    def test_5_destination_killed(self):
        target, client = self.failing_migration(lambda target: target.child.kill())
        target.wait()
        self.assertEqual(b"", target.console.rest())

    def test_6_link_cut(self):
        """The address vanishes under the connection and the peer is told nothing."""
        side = self.hosts.namespaces.sides[1 - self.journey.host]

        def cut(_target):
            side.run("ip", "link", "set", side.link, "down")

        self.addCleanup(side.run, "ip", "link", "set", side.link, "up")
        target, _ = self.failing_migration(cut)
        target.end()
        self.assertEqual(b"", target.console.rest())

    def test_7_nobody_listens(self):
        j = self.journey
        nobody = f"tcp:{self.hosts.namespaces.sides[1 - j.host].address}:9"
        result = j.vm.ferry("migrate", nobody, "--quiet", *self.hosts.trust(j.host))
        self.assertStatus(result, lab.FAILED)
        self.assertEqual(1, len(result.stderr.splitlines()), result.stderr)
        self.assertIn(nobody, result.stderr)
        j.ask()
        j.answered()
        self.check_output()

    def test_8_moves_after_all_that_and_is_the_same(self):
        """The same process of the same boot."""
        self.migrate("precopy")
        j = self.journey
        before = len(COUNT.findall(j.text()))
        stopped = j.vm.console.size()
        j.vm.type("\x1a")  # Ctrl-Z: the counter stops, and the shell that started it is back
        shell = j.vm.wait_for(lab.PROMPT, stopped)
        j.vm.type("stty echo\n")
        j.vm.wait_for(lab.PROMPT, shell.end())
        processes = j.vm.command("ps")
        self.assertRegex(processes, rf"(?m)^ *{j.pid.decode()} .*counter {COUNTER_MS}$")
        self.assertEqual(j.boot_id, j.vm.command("cat /proc/sys/kernel/random/boot_id"))
        # What the shell writes from here on is no line of the counter's.
        j.vm.type("fg\n")
        j.counts_on()
        counts = [int(n) for n in COUNT.findall(j.text())]
        self.assertEqual(list(range(len(counts))), counts)
        self.assertGreater(len(counts), before)


class Oracle:
    """Guest incr, seen from outside: the RAM of the process that runs it."""

    VALUE = re.compile(rb"value (\w+)\[(\d+)\] = (\d+)")

    def __init__(self, vm, memory):
        self.memory = memory
        vm.wait_for(b"sync 1")
        self.values = {}
        for name, index, value in self.VALUE.findall(bytes(vm.console.data)):
            self.values.setdefault(name.decode(), {})[int(index)] = int(value)

    def ram(self, vm):
        """An open descriptor of the memfd that is the guest's RAM."""
        base = f"/proc/{vm.pid}/fd"
        for fd in os.listdir(base):
            path = os.path.join(base, fd)
            if os.readlink(path).startswith("/memfd:") and os.stat(path).st_size >= self.memory:
                return os.open(path, os.O_RDONLY)
        raise AssertionError(f"{vm.name}: no memfd of {self.memory} bytes")

    @staticmethod
    def offset(gpa):
        return gpa if gpa < RAM_BELOW else gpa - (RAM_ABOVE - RAM_BELOW)

    def read(self, vm):
        """First bytes of each CPU's pages in walking order, and its heartbeat."""
        ram = self.ram(vm)
        try:
            cpus = {cpu: bytearray() for cpu in self.values["heartbeat"]}
            for index, base in sorted(self.values["range_base"].items()):
                cpu, pages = self.values["range_cpu"][index], self.values["range_pages"][index]
                for page in range(pages):
                    cpus[cpu] += os.pread(ram, 1, self.offset(base + page * PAGE))
            beats = {cpu: int.from_bytes(os.pread(ram, 8, self.offset(gpa)), "little")
                     for cpu, gpa in self.values["heartbeat"].items()}
        finally:
            os.close(ram)
        return cpus, beats


class BareMoves(LabTest):
    def setUp(self):
        self.hosts = Hosts()
        self.addCleanup(self.hosts.close)
        self.lab = self.hosts.lab

    def check_oracle(self, oracle, vm, before):
        """Paused: bytes equal along the pages but for one step down by one; and frozen."""
        self.assertStatus(vm.ferry("pause"), lab.OK)
        cpus, beats = oracle.read(vm)
        for cpu, data in cpus.items():
            self.assertGreater(len(data), 100)
            steps = [i for i in range(1, len(data)) if data[i] != data[i - 1]]
            self.assertLessEqual(len(steps), 1, f"CPU {cpu}: bytes change at pages {steps}: {data}")
            for i in steps:
                self.assertEqual(1, (data[i - 1] - data[i]) % 256, f"CPU {cpu}, page {i}")
            # The loop counter says what the pages hold: as many, or one more where the walk is.
            self.assertIn((data[-1] - beats[cpu]) % 256, (0, 1), f"CPU {cpu}")
            self.assertGreater(beats[cpu], before.get(cpu, 0), f"CPU {cpu} stands still")
        self.assertEqual((cpus, beats), oracle.read(vm), "it changes although it is paused")
        return beats

    def beats_on(self, oracle, vm, before):
        """Waits until every CPU has made at least two more rounds: each page written anew."""
        done = threading.Event()
        for _ in range(lab.LIMIT * 100):
            _, beats = oracle.read(vm)
            if all(beats[cpu] > before.get(cpu, 0) + 2 for cpu in beats):
                return
            done.wait(0.01)  # there is no event: the guest only writes to its memory
        self.fail(f"the guest stands still: {before} -> {beats}")

    def oracle_moves(self, cpus, memory, base):
        vm = self.lab.vm("run", "--kernel", lab.bare_guest("incr.elf"), "--cpus", str(cpus),
                         "--memory", f"{memory // MIB}M", "--backing", "memfd",
                         "--append", f"pages={512 * cpus} base={base} period_us=200",
                         namespace=self.hosts.namespaces.sides[0])
        oracle = Oracle(vm, memory)
        self.assertEqual(cpus, len(oracle.values["heartbeat"]))
        self.assertGreaterEqual(min(oracle.values["range_base"].values()), base)
        beats, host = {}, 0
        for mode in MODES:
            with self.subTest(mode=mode):
                self.beats_on(oracle, vm, beats)
                target, address = self.hosts.receive(1 - host, "--backing", "memfd")
                self.assertStatus(vm.ferry("migrate", address, "--mode", mode,
                                           *self.hosts.trust(host)), lab.OK)
                self.assertEnds(vm, lab.OK)
                vm, host = target, 1 - host
                self.beats_on(oracle, vm, beats)
                beats = self.check_oracle(oracle, vm, beats)
                self.assertStatus(vm.ferry("resume"), lab.OK)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED)

    def test_post_copy_paused_and_recovered(self):
        """The link is broken in the middle, twice: nobody runs the guest, nothing is lost."""
        memory = 64 * MIB
        vm = self.lab.vm("run", "--kernel", lab.bare_guest("incr.elf"), "--memory", "64M",
                         "--backing", "memfd", "--append", "pages=4096 period_us=200",
                         namespace=self.hosts.namespaces.sides[0])
        oracle = Oracle(vm, memory)
        self.beats_on(oracle, vm, {})
        target, address = self.hosts.receive(1, "--backing", "memfd")
        command = ["migrate", vm.name, address, "--mode", "postcopy", "--prepaging", "none",
                   *self.hosts.trust(0)]
        heard = 0
        for _ in range(2):
            # Nothing is pushed until nobody has asked for anything for a second.
            client = self.lab.start(lab.Process([lab.FERRY, *command], env=self.lab.env))
            client.stderr.wait(b"pushing")
            self.assertStatus(self.lab.ferry("migrate", "pause", vm.name), lab.OK)
            self.assertEqual(lab.FAILED, client.wait(), client.errors())
            self.assertIn("ferry migrate recover", client.errors())
            heard = target.stderr.wait(b"stands still", heard).end()
            self.assertEqual("paused", target.ferry("info", "--json").json()["state"])
            self.assertStatus(vm.ferry("resume"), lab.FAILED)
            status = self.lab.ferry("migrate", "status", vm.name, "--json").json()
            self.assertEqual("destination, lacking pages", status["report"]["owner"])
            _, beats = oracle.read(target)
            self.assertEqual(beats, oracle.read(target)[1])
            command = ["migrate", "recover", vm.name, address]
        report = self.assertStatus(self.lab.ferry("migrate", "recover", vm.name, address, "--json"),
                                   lab.OK).json()
        self.assertEqual((2, "destination"), (report["recoveries"], report["owner"]))
        self.assertEnds(vm, lab.OK)
        self.beats_on(oracle, target, {})
        self.check_oracle(oracle, target, {})
        self.assertStatus(target.ferry("stop"), lab.OK)
        self.assertEnds(target, lab.STOPPED)

    def test_one_cpu_below_3_gib(self):
        self.oracle_moves(1, 64 * MIB, 0)

    def test_two_cpus_below_3_gib(self):
        self.oracle_moves(2, 64 * MIB, 0)

    def test_one_cpu_above_3_gib(self):
        self.oracle_moves(1, RAM_BELOW + 64 * MIB, RAM_ABOVE)

    def test_two_cpus_above_3_gib(self):
        self.oracle_moves(2, RAM_BELOW + 64 * MIB, RAM_ABOVE)


if __name__ == "__main__":
    unittest.main()

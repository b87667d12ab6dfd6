# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a guest at work, lazy restores, clones: its disk and its memory as they were at one
instant, its clock never behind, each copy on its own afterwards."""

import os
import re
import shutil
import socket
import unittest

import ferrylab as lab

RESEEDED = "crng reseeded due to virtual machine fork"


class Attached(lab.Vm):
    """A VM that is not our child, by its console."""

    def __init__(self, the_lab, name, path):
        self.lab, self.name, self.socket = the_lab, name, socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.console = lab.Stream(self.socket.fileno(), f"console of {name}")

    def errors(self):
        return ""


class Live(lab.LabTest):
    def setUp(self):
        super().setUp()
        self.directory = self.lab.path("live")
        os.mkdir(self.directory)
        self.base = os.path.join(self.directory, "base")
        shutil.copy(lab.guest_file("disk.ext4"), self.base)
        self.vm = self.lab.linux("--memory", "64M", "--rng", "--disk",
                                 f"{self.base},overlay={self.file('overlay')}")
        self.vm.prompt()
        self.vm.command("head -c 64 /dev/random >/dev/null; mkdir -p /mnt; mount /dev/vda /mnt")
        self.vm.command("cd /mnt; head -c 65536 /bin/busybox >blob; sha256sum blob >sums")
        # At work from here on: disk, memory, clock.
        self.vm.command("echo 'i=0; while :; do i=$((i+1)); echo $i >>log; cat /proc/uptime >>log; "
                        "cp blob copy; sync; sleep 1; done' >load; sh load &")

    def file(self, name):
        return os.path.join(self.directory, name)

    def save(self, name, *args):
        return self.assertStatus(self.vm.ferry("snapshot", self.file(name), "--disks", "--json", *args),
                                 lab.OK).json()

    def check(self, vm):
        """Files are right, the load goes on, and the clock that it wrote down never went back."""
        def lines():
            return int(vm.command("wc -l </mnt/log").split()[0])
        self.assertIn("blob: OK", vm.command("cd /mnt; sha256sum -c sums"))
        before = lines()
        while lines() <= before:
            pass
        log = vm.command("cat /mnt/log").split("\n")
        times = [float(line.split()[0]) for line in log if re.fullmatch(r"[\d.]+ [\d.]+", line)]
        counts = [int(line) for line in log if line.isdigit()]
        self.assertEqual(sorted(times), times)
        self.assertEqual(list(range(1, len(counts) + 1)), counts)
        return len(counts)

    def test_restores_of_a_guest_at_work(self):
        report = self.save("packed")
        self.assertEqual("full", report["kind"])
        self.assertGreater(self.check(self.vm), 0)  # it goes on
        self.save("mapped", "--layout", "mapped")
        for name, *how in (("packed",), ("packed", "--lazy"), ("mapped", "--map")):
            with self.subTest(name=name, how=how):
                vm = self.lab.vm("restore", self.file(name), "--disks", *how)
                self.check(vm)
                self.assertEqual(1, vm.command("dmesg").count(RESEEDED))
                # A copy of a copy, which may still be on its way.
                again = self.file("again")
                self.assertStatus(vm.ferry("snapshot", again, "--disks"), lab.OK)
                self.assertStatus(self.lab.ferry("snapshot", "verify", again), lab.OK)
                vm.ferry("stop")
                vm.child.wait()
        self.assertTrue(os.path.exists(self.file("packed.ws")))

    def test_rollback_with_disks(self):
        """The same process, the same disk file: memory and disk go back together."""
        self.save("then")
        pid = self.lab.ferry("info", self.vm.name, "--json").json()["pid"]
        self.vm.command("echo 1 >/mnt/after; sync")
        self.assertStatus(self.vm.ferry("rollback", self.file("then")), lab.OK)
        self.vm.command("echo 3 >/proc/sys/vm/drop_caches")
        self.assertIn("No such file", self.vm.command("cat /mnt/after"))
        self.check(self.vm)
        info = self.lab.ferry("info", self.vm.name, "--json").json()
        self.assertEqual([pid, "running"], [info["pid"], info["state"]])

    def test_clones(self):
        sockets = self.file("console{}")
        made = self.assertStatus(self.vm.ferry("clone", "--count", "2", "--name", self.vm.name + "c",
                                               "--dir", self.directory, "--json", "--",
                                               "--console", f"unix:{sockets}"), lab.OK).json()
        names = [f"{self.vm.name}c1", f"{self.vm.name}c2"]
        self.assertEqual(names, made["clones"])
        listed = {vm["name"]: vm for vm in self.lab.ferry("ls", "--json").json()}
        try:
            for name, number in zip(names, "12"):
                self.assertEqual("running", listed[name]["state"])
                clone = Attached(self.lab, name, sockets.replace("{}", number))
                self.check(clone)
                self.assertEqual(1, clone.command("dmesg").count(RESEEDED))
                clone.command(f"echo {name} >/mnt/mine; sync")
            self.check(self.vm)
            self.assertIn("No such file", self.vm.command("cat /mnt/mine"))
            # Each writes to a file of its own.
            overlays = [f for _, _, files in os.walk(self.directory) for f in files
                        if f.startswith("memory.disk0.")]
            self.assertEqual(["memory.disk0." + n for n in names], sorted(overlays))
            again = self.vm.ferry("clone", "--name", self.vm.name + "c")
            self.assertIn("there is a VM", self.assertStatus(again, lab.FAILED).stderr)
        finally:
            for name in names:
                self.lab.ferry("kill", name)

    def test_refusals(self):
        for args, says in ((("--lazy", "--map"), "not both"),):
            self.save("a")
            says_it = self.lab.ferry("restore", self.file("a"), *args)
            self.assertIn(says, says_it.stderr)
        packed = self.lab.ferry("restore", self.file("a"), "--disks", "--map")
        self.assertIn("mapped layout", self.assertStatus(packed, lab.FAILED).stderr)
        plain = self.lab.linux("--disk", self.file("a.disk0"))
        plain.prompt()
        refused = plain.ferry("snapshot", self.file("b"), "--disks")
        self.assertIn("written in place", refused.stderr)
        self.assertFalse(os.path.exists(self.file("b")))


if __name__ == "__main__":
    unittest.main()

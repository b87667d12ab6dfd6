# SPDX-License-Identifier: Apache-2.0
"""A guest moves, and its disk with it: an image that both hosts share changes hands, one of the
host's own goes over the wire.

The guest (guest/bare/guests/diskwalk.c) reads each block before it writes it anew, and fails when it
finds anything but what it wrote there last. So a walk that begins and ends on the other side shows
that no write was lost or came twice.
"""

import os
import re
import shutil
import subprocess
import unittest

import ferrylab as lab
from ferrylab import LabTest

MIB = 1024 * 1024
DISK, STATIC = 64 * MIB, 40 * MIB  # bytes; where what the guest never touches begins
BLOCKS, STRIDE = 256, 32  # what it walks over; KiB from one to the next
WAITING = re.compile(rb"waiting for a guest on (tcp:\S+)\n")
WALKED = re.compile(rb"count\[0\] = (\d+)\n")


class DiskMoves(LabTest):
    def image(self, name, size=DISK):
        """Data of its own at the end, behind a hole."""
        path = self.lab.path(name)
        with open(path, "wb") as f:
            f.truncate(size)
            f.seek(STATIC)
            f.write(os.urandom(3 * MIB) + bytes(MIB) + os.urandom(MIB + 512))
        os.chmod(path, 0o666)
        return path

    def static(self, path):
        with open(path, "rb") as f:
            f.seek(STATIC)
            return f.read()

    def walker(self, disk, **options):
        vm = self.lab.vm("run", "--kernel", lab.bare_guest("diskwalk.elf"), "--ucall", "--memory",
                         "48M", "--append", f"acpi=off pages={BLOCKS} kib={STRIDE}", "--disk", disk,
                         **options)
        self.walks(vm, 1)
        return vm

    def walks(self, vm, times=2):
        """It has done so many more walks over its disk: the last one saw all that was there before."""
        at = vm.stderr.size()
        for _ in range(times):
            at = vm.stderr.wait(WALKED, at).end()

    def receiver(self, disk, *args):
        vm = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0", "--disk", disk, *args)
        return vm, vm.stderr.wait(WAITING).group(1).decode()

    def moved(self, vm, disk, *args, receive=()):
        target, address = self.receiver(disk, *receive)
        report = self.assertStatus(vm.ferry("migrate", address, "--json", *args), lab.OK).json()
        self.assertEqual("destination", report["owner"])
        self.assertEnds(vm, lab.OK, "migrated")
        self.walks(target)
        return target, report

    def refused(self, vm, disk, says, *args, receive=()):
        """The guest goes on here, and its user and the destination's know why."""
        target, address = self.receiver(disk, *receive)
        result = self.assertStatus(vm.ferry("migrate", address, "--quiet", *args), lab.FAILED)
        self.assertIn(says, result.stderr)
        self.assertIn(target.wait(), (lab.FAILED, lab.USAGE))
        self.assertIn(says, target.errors())
        self.walks(vm)

    def broken(self, vm, disk, hurt, *args):
        """A migration that would take long; hurt(target) in the middle."""
        target, address = self.receiver(disk)
        client = self.lab.start(lab.Process(
            [lab.FERRY, "migrate", vm.name, address, *args], env=self.lab.env))
        client.stderr.wait(re.compile(rb"(disks|rounds) .*\n.*(disks|rounds) "))
        hurt(target)
        self.assertEqual(lab.FAILED, client.wait(), client.errors())
        target.wait()
        self.walks(vm)

    def stranger(self, disk):
        result = self.lab.ferry("run", "--kernel", lab.bare_guest("hello.elf"), "--disk", disk)
        self.assertStatus(result, lab.FAILED)
        self.assertIn("another VM uses it", result.stderr)

    # --- one image, seen by both

    def test_shared(self):
        """From host to host; at no time can another VM have the image."""
        path = self.image("shared")
        before = self.static(path)
        vm = self.walker(path)
        for mode in ("precopy", "postcopy", "hybrid"):
            self.stranger(path)
            vm, report = self.moved(vm, path, "--mode", mode)
            self.assertEqual(0, report["disk_bytes"])
        self.stranger(path)
        self.assertEqual(before, self.static(path))

    def test_shared_and_it_fails(self):
        """The source has the image again, whoever failed and when."""
        path, other = self.image("shared"), self.image("other")
        vm = self.walker(path)
        blocker = self.walker(other)
        # An image that another VM has: only when the guest is loaded does anybody know.
        self.refused(vm, other, "another VM uses it")
        self.refused(vm, self.image("small", DISK - MIB), "the disk that was saved had")
        self.refused(vm, self.lab.path("nothing"), "0 bytes")
        self.assertFalse(os.path.exists(self.lab.path("nothing")))
        never = ("--downtime-ms", "0", "--max-rounds", "1000000")
        self.broken(vm, path, lambda target: target.child.kill(), *never)
        self.broken(vm, path, lambda _: self.assertStatus(
            self.lab.ferry("migrate", "cancel", vm.name), lab.OK), *never)
        self.stranger(path)
        self.walks(blocker)
        self.moved(vm, path)

    # --- images of their own

    def test_moves_along(self):
        """There, back over what was left there, and there again."""
        a, b = self.image("a"), self.lab.path("b")
        before = self.static(a)
        vm, report = self.moved(self.walker(a), b, "--disk")
        self.assertEqual(DISK, os.path.getsize(b))
        self.assertEqual(0o600, os.stat(b).st_mode & 0o777)
        self.assertEqual(before, self.static(b))
        self.assertLess(os.stat(b).st_blocks * 512, DISK // 2)  # what was a hole is one
        self.assertGreater(report["disk_bytes"], 4 * MIB)
        self.assertLess(report["disk_bytes"], DISK)
        self.assertGreater(report["disk_passes"], 1)
        self.assertEqual(0, report["disks_kept"])
        # The way back: what has not changed is not sent. (No tool but this test changes a file and
        # puts its time back.)
        times = os.stat(a)
        with open(a, "r+b") as f:
            f.seek(STATIC)
            f.write(b"as it was left")
        os.utime(a, ns=(times.st_atime_ns, times.st_mtime_ns))
        before = self.static(a)
        vm, report = self.moved(vm, a, "--disk", "--mode", "hybrid")
        self.assertEqual(1, report["disks_kept"])
        self.assertEqual(before, self.static(a))
        # There again; it does not help that it is cut once.
        self.broken(vm, b, lambda _: self.assertStatus(
            self.lab.ferry("migrate", "cancel", vm.name), lab.OK), "--disk", "--bandwidth", "3M")
        vm, report = self.moved(vm, b, "--disk", "--mode", "postcopy")
        self.assertEqual(1, report["disks_kept"])
        # Somebody has written to what was left: it is no more than any other file.
        os.utime(a)
        self.refused(vm, a, "--disk-overwrite", "--disk")
        self.assertEqual(before, self.static(a))
        with open(a, "r+b") as f:
            f.write(b"to be lost")
        vm, report = self.moved(vm, a, "--disk", receive=["--disk-overwrite"])
        self.assertEqual(0, report["disks_kept"])
        self.assertEqual(self.static(b), self.static(a))
        # One that has grown since is another one.
        self.assertStatus(vm.ferry("set", f"disk0.size={DISK + MIB}"), lab.OK)
        self.refused(vm, b, "--disk-overwrite", "--disk")

    def test_refused(self):
        a = self.image("a")
        vm = self.walker(a)
        self.refused(vm, self.image("b", DISK + 512), "--disk-overwrite", "--disk")
        with open(self.lab.path("sparse"), "wb") as f:
            f.truncate(DISK - 512)
        self.refused(vm, f.name, f"{DISK - 512} bytes", "--disk")
        self.assertEqual(DISK - 512, os.path.getsize(f.name))
        # The source's own.
        self.refused(vm, a, "leave --disk out", "--disk")
        self.refused(vm, f"{a},ro", "read-only", "--disk")
        with open(self.lab.path("base"), "wb") as f:
            f.truncate(DISK)
        self.refused(vm, f"{f.name},overlay={self.lab.path('over')}", "an overlay here", "--disk")
        self.assertFalse(os.path.exists(self.lab.path("over")))
        result = vm.ferry("migrate", "unix:/nowhere", "--mode", "local", "--disk")
        self.assertStatus(result, lab.USAGE)
        self.assertIn("leave --disk out", result.stderr)
        self.moved(vm, self.lab.path("c"), "--disk")

    def test_cut_in_the_middle(self):
        """The guest goes on with its own image, which nobody has touched; the other is gone."""
        a, b = self.image("a"), self.lab.path("b")
        before = self.static(a)
        slow = ("--disk", "--bandwidth", "3M")
        vm = self.walker(a)
        self.broken(vm, b, lambda _: self.assertStatus(
            self.lab.ferry("migrate", "cancel", vm.name), lab.OK), *slow)
        self.assertFalse(os.path.exists(b))
        size = vm.ferry("set", f"disk0.size={2 * DISK}")  # it is its own again
        self.assertStatus(size, lab.OK)
        self.broken(vm, b, lambda target: target.child.kill(), *slow)
        self.assertEqual(before, self.static(a)[:len(before)])
        os.unlink(b)
        self.moved(vm, b, "--disk")
        self.assertEqual(2 * DISK, os.path.getsize(b))

    def late(self, vm, disk, hurt):
        """A post-copy whose blocks take some seconds; hurt(target) when the guest runs there."""
        target, address = self.receiver(disk)
        client = self.lab.start(lab.Process(
            [lab.FERRY, "migrate", vm.name, address, "--disk", "--mode", "postcopy",
             "--bandwidth", "3M", "--json"], env=self.lab.env))
        target.stderr.wait(re.compile(rb"arrived, runs here"))
        hurt(target)
        return target, client, address

    def test_comes_later(self):
        """The guest is there before its disk; until that is there it goes nowhere else."""
        a, b = self.image("a"), self.lab.path("b")
        before = self.static(a)

        def hurt(target):
            for command in (("snapshot", self.lab.path("s")), ("rollback", self.lab.path("before")),
                            ("set", "disk0.size=1G"), ("migrate", "tcp:127.0.0.1:9", "--disk")):
                result = target.ferry(*command)
                self.assertNotEqual(lab.OK, result.status)
                self.assertIn("still at the host", result.stderr)
            self.assertFalse(os.path.exists(self.lab.path("s")))
            self.assertStatus(self.lab.ferry("migrate", "pause", vm.name), lab.OK)
            target.stderr.wait(re.compile(rb"and [1-9]\d* blocks \(of 64 KiB\) of its disks are still"))

        vm = self.walker(a)
        self.assertStatus(vm.ferry("snapshot", self.lab.path("before")), lab.OK)
        target, client, address = self.late(vm, b, hurt)
        self.assertEqual(lab.FAILED, client.wait())
        self.stranger(a)
        self.stranger(b)
        result = self.lab.ferry("set", vm.name, f"disk0.size={2 * DISK}")
        self.assertIn("its size is fixed", result.stderr)
        again = self.assertStatus(
            self.lab.ferry("migrate", "recover", vm.name, address, "--json"), lab.OK).json()
        self.assertEnds(vm, lab.OK, "migrated")
        self.assertGreater(again["pushed_blocks"] + again["demand_blocks"], 0)
        self.assertEqual(1, again["recoveries"])
        self.walks(target)
        self.assertEqual(before, self.static(b))
        self.assertStatus(target.ferry("snapshot", self.lab.path("s")), lab.OK)
        vm, report = self.moved(target, a, "--disk", "--mode", "hybrid")  # and back
        self.assertEqual(1, report["disks_kept"])
        self.assertEqual(before, self.static(a))

    def test_comes_later_and_one_dies(self):
        """The source: what is missing is said, and the guest stands still. The destination: the
        source's images are as they were."""
        a, b = self.image("a"), self.lab.path("b")
        before = self.static(a)
        vm = self.walker(a)
        target, client, _ = self.late(vm, b, lambda _: vm.child.kill())
        client.wait()
        target.stderr.wait(re.compile(rb"and [1-9]\d* blocks \(of 64 KiB\) of its disks are still"))
        state = self.lab.ferry("info", target.name)
        self.assertIn("paused", state.stdout)
        self.stranger(b)
        target.child.kill()
        target.wait()
        self.assertEqual(before, self.static(a))
        os.unlink(b)
        vm = self.walker(a)  # begins with what it was at the switch
        target, client, _ = self.late(vm, b, lambda target: target.child.kill())
        self.assertEqual(lab.FAILED, client.wait())
        self.assertEqual(before, self.static(a))
        self.stranger(a)  # until somebody ends the source

    def test_overlay(self):
        """Only the overlay goes, over a base that is the same there."""
        base, twin, other = self.image("base"), self.lab.path("twin"), self.image("other")
        with open(base, "rb") as f, open(twin, "wb") as g:
            g.write(f.read())  # the same bytes, without the holes
        before = self.static(base)
        vm = self.walker(f"{base},overlay={self.lab.path('o1')}")
        self.refused(vm, f"{other},overlay={self.lab.path('o2')}", "another base", "--disk")
        self.assertFalse(os.path.exists(self.lab.path("o2")))
        vm, report = self.moved(vm, f"{twin},overlay={self.lab.path('o2')}", "--disk")
        self.assertLess(report["disk_bytes"], 40 * MIB)
        self.assertLess(os.stat(self.lab.path("o2")).st_blocks * 512, 16 * MIB)
        self.assertEqual(before, self.static(twin))
        self.refused(vm, f"{base},overlay={self.lab.path('o1')}", "an overlay with data", "--disk")
        vm, _ = self.moved(vm, f"{base},overlay={self.lab.path('o3')}", "--disk")

    def test_linux(self):
        """A file system at work: its files are right, nothing is missing, and fsck finds nothing."""
        a, b = self.lab.path("a.ext4"), self.lab.path("b.ext4")
        shutil.copy(lab.guest_file("disk.ext4"), a)
        os.chmod(a, 0o666)
        vm = self.lab.linux("--memory", "64M", "--disk", a)
        vm.prompt()
        vm.command("mkdir -p /mnt; mount /dev/vda /mnt; cd /mnt")
        vm.command("head -c 65536 /bin/busybox >blob; sha256sum blob >sums")
        vm.command("i=0; while :; do i=$((i+1)); cp blob copy; echo $i >>log; sync; done &")
        target, address = self.receiver(b)
        report = self.assertStatus(vm.ferry("migrate", address, "--disk", "--json"), lab.OK).json()
        self.assertGreater(report["disk_bytes"], MIB // 2)
        self.assertEnds(vm, lab.OK, "migrated")
        vm = target
        numbers = [int(n) for n in vm.command("kill $!; wait; sync; cat log").split() if n.isdigit()]
        self.assertEqual(list(range(1, len(numbers) + 1)), numbers)
        vm.command("cd /; umount /mnt; mount /dev/vda /mnt; cd /mnt")  # nothing from memory
        self.assertIn("blob: OK", vm.command("sha256sum -c sums"))
        vm.command("cd /; umount /mnt")
        vm.ferry("stop")
        vm.child.wait()
        if shutil.which("e2fsck"):
            fsck = subprocess.run(["e2fsck", "-fn", b], capture_output=True, text=True)
            self.assertEqual(0, fsck.returncode, fsck.stdout)


if __name__ == "__main__":
    unittest.main()

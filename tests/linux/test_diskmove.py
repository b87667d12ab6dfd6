# SPDX-License-Identifier: Apache-2.0
"""A guest moves, and its disk with it: an image that both hosts share changes hands, one of the
host's own goes over the wire.

The guest (guest/bare/guests/diskwalk.c) reads each block before it writes it anew, and fails when it
finds anything but what it wrote there last. So a walk that begins and ends on the other side shows
that no write was lost or came twice.
"""

import os
import re
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
        self.assertEqual(before, self.static(b))
        self.assertLess(os.stat(b).st_blocks * 512, DISK // 2)  # what was a hole is one
        self.assertGreater(report["disk_bytes"], 4 * MIB)
        self.assertLess(report["disk_bytes"], DISK)
        self.assertGreater(report["disk_passes"], 1)
        self.refused(vm, a, "--disk-overwrite", "--disk")
        self.assertEqual(before, self.static(a))
        vm, _ = self.moved(vm, a, "--disk", "--mode", "hybrid", receive=["--disk-overwrite"])
        self.assertEqual(before, self.static(a))
        os.truncate(b, 0)
        vm, _ = self.moved(vm, b, "--disk", "--mode", "postcopy")
        self.assertEqual(before, self.static(b))

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


if __name__ == "__main__":
    unittest.main()

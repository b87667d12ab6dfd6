# SPDX-License-Identifier: Apache-2.0
"""Linux uses virtio disks and the entropy device: reads what the host wrote, writes what the host
reads afterwards, keeps its disk over snapshot and restore, and never shares a writable image."""

import hashlib
import os
import shutil
import subprocess
import unittest

import ferrylab as lab

MIB = 1024 * 1024
DATA = 1 * MIB


def pattern(seed):
    """Bytes that the guest makes with `yes`, too."""
    line = f"ferry writes {seed}\n".encode()
    return (line * (DATA // len(line) + 1))[:DATA]


class Disk(unittest.TestCase):
    def setUp(self):
        self.lab = lab.Lab()
        self.addCleanup(self.lab.close)
        self.image = self.lab.path("disk.ext4")
        shutil.copy(lab.guest_file("disk.ext4"), self.image)
        shutil.copy(self.image, f"{self.image}.ro")
        self.raw = self.lab.path("raw")
        with open(self.raw, "wb") as f:
            f.truncate(4 * MIB)

    def boot(self, *disks, append=None, name="disks"):
        more = [word for disk in disks for word in ("--disk", disk)]
        vm = self.lab.linux("--rng", "--cpus", "2", "--memory", "96M", *more, append=append,
                            name=name)
        vm.prompt()
        return vm

    def check_read(self, vm):
        """The file system of the image, and every byte of its files."""
        vm.command("mount -t ext4 /dev/vda /mnt")
        self.assertEqual("hello from the disk\n", vm.command("cat /mnt/hello"))
        sums = vm.command("cd /mnt && sha256sum -c data.sha256; cd /")
        self.assertEqual(["data/numbers: OK", "data/megabyte: OK"], sums.split("\n")[:2])

    def write(self, vm, seed):
        # In lines that fit the guest's 80 columns: a longer one is echoed with breaks in it.
        vm.command(f"yes 'ferry writes {seed}' | head -c {DATA} > /tmp/data")
        out = vm.command("dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync; echo status $?")
        self.assertIn("status 0", out)

    def raw_data(self):
        with open(self.raw, "rb") as f:
            return f.read(DATA)

    def check_rng(self, vm):
        self.assertIn("virtio", vm.command("cat /sys/class/misc/hw_random/rng_available"))
        self.assertEqual("1024\n", vm.command("head -c 1024 /dev/hwrng | wc -c").replace(" ", ""))

    def power_off(self, vm):
        vm.type("exit 0\n")
        self.assertEqual(lab.OK, vm.wait(), vm.errors())

    def test_1_split_ring_found_by_acpi(self):
        vm = self.boot(self.image, f"{self.raw},serial=raw-0042,queues=2",
                       f"{self.image}.ro,ro,cached")
        self.check_read(vm)
        self.check_rng(vm)
        self.assertEqual("raw-0042", vm.command("cat /sys/block/vdb/serial").strip())
        self.assertEqual("1\n", vm.command("cat /sys/block/vdc/ro"))
        self.write(vm, 1)
        second = self.lab.ferry("run", "--kernel", lab.guest_file("vmlinux"), "--disk", self.raw,
                                "--console", "null")
        self.assertEqual(lab.FAILED, second.status, str(second))
        self.assertIn("another VM uses it", second.stderr)
        before = vm.command("sha256sum /mnt/data/megabyte")
        vm.command("echo changed > /mnt/new; sync")
        snap = self.lab.path("snap")
        self.assertEqual(lab.OK, vm.ferry("snapshot", snap).status)
        self.assertIn("alive", vm.command("echo alive"))  # it goes on, with its disks
        self.write(vm, 2)
        self.power_off(vm)
        self.assertEqual(hashlib.sha256(pattern(2)).digest(),
                         hashlib.sha256(self.raw_data()).digest())

        self.check_restore(snap, before)

    def check_restore(self, snap, before):
        missing = self.lab.ferry("restore", snap, "--console", "null")
        self.assertEqual(lab.FAILED, missing.status, str(missing))
        back = self.lab.vm("restore", snap, "--disk", self.image,
                           "--disk", f"{self.raw},serial=raw-0042,queues=2",
                           "--disk", f"{self.image}.ro,ro,cached", name="back")
        back.type("\n")
        back.prompt()
        back.command("echo 3 > /proc/sys/vm/drop_caches")
        self.assertEqual(before, back.command("sha256sum /mnt/data/megabyte"))
        self.assertEqual("changed\n", back.command("cat /mnt/new"))
        self.write(back, 3)
        back.command("umount /mnt")
        self.power_off(back)
        self.assertEqual(hashlib.sha256(pattern(3)).digest(),
                         hashlib.sha256(self.raw_data()).digest())
        if shutil.which("e2fsck"):
            fsck = self.lab.path("fsck.log")
            with open(fsck, "w") as log:
                status = subprocess.call(["e2fsck", "-fn", self.image], stdout=log,
                                                       stderr=log)
            self.assertEqual(0, status, open(fsck).read())

    def test_2_packed_ring_found_by_command_line(self):
        vm = self.boot(f"{self.image},packed", f"{self.raw},packed,cached",
                       append=lab.guest_cmdline("acpi=off"), name="packed")
        self.check_read(vm)
        self.check_rng(vm)
        self.write(vm, 4)
        self.assertEqual(hashlib.sha256(pattern(4)).digest(),
                         hashlib.sha256(self.raw_data()).digest())
        vm.ferry("stop")


if __name__ == "__main__":
    unittest.main()

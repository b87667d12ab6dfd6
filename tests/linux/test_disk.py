# SPDX-License-Identifier: Apache-2.0
"""Linux uses virtio disks and the entropy device: reads what the host wrote, writes what the host
reads afterwards, keeps its disk over snapshot and restore, and never shares a writable image."""

import hashlib
import shutil
import socket
import subprocess
import unittest

import ferrylab as lab

MIB = 1024 * 1024


LINE = b"ferry carries a machine across\n"  # what guest/linux/disk.conf fills data/megabyte with
MEGABYTE = (LINE * (MIB // len(LINE) + 1))[:MIB]


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

    def write(self, vm, place):
        """Copies a file to the `place`-th MiB of the raw disk, and sees it on the host."""
        seek = 16 * place
        out = vm.command(f"dd if=/mnt/data/megabyte of=/dev/vdb bs=64k seek={seek} conv=fsync")
        self.assertIn("16+0 records out", out)
        with open(self.raw, "rb") as f:
            f.seek(place * MIB)
            self.assertEqual(hashlib.sha256(MEGABYTE).digest(),
                             hashlib.sha256(f.read(MIB)).digest())

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
        self.assertNotEqual(lab.OK, second.status, str(second))
        self.assertIn("another VM uses it", second.stderr)
        before = vm.command("sha256sum /mnt/data/megabyte")
        vm.command("echo changed > /mnt/new; sync")
        snap = self.lab.path("snap")
        self.assertEqual(lab.OK, vm.ferry("snapshot", snap).status)
        self.assertIn("alive", vm.command("echo alive"))  # it goes on, with its disks
        self.write(vm, 0)
        self.power_off(vm)

        self.check_restore(snap, before)

    def check_restore(self, snap, before):
        missing = self.lab.ferry("restore", snap, "--console", "null")
        self.assertNotEqual(lab.OK, missing.status, str(missing))
        self.assertIn("virtio-blk[0]", missing.stderr)
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
        if shutil.which("e2fsck"):
            fsck = subprocess.run(["e2fsck", "-fn", self.image], capture_output=True, text=True)
            self.assertEqual(0, fsck.returncode, fsck.stdout)

    def test_2_packed_ring_found_by_command_line(self):
        vm = self.boot(f"{self.image},packed", f"{self.raw},packed,cached",
                       append=lab.guest_cmdline("acpi=off"), name="packed")
        self.check_read(vm)
        self.check_rng(vm)
        self.write(vm, 0)
        vm.ferry("stop")

    def test_3_migrates_with_its_disks(self):
        """The lock of the image goes along: the destination has it, the source gave it up."""
        vm = self.boot(self.image, self.raw, name="source")
        self.check_read(vm)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"tcp:127.0.0.1:{s.getsockname()[1]}"
        there = self.lab.vm("receive", "--listen", address, "--disk", self.image,
                            "--disk", self.raw, name="there")
        there.stderr.wait(b"waiting")
        self.assertEqual(lab.OK, vm.ferry("migrate", address).status)
        self.assertEqual(lab.OK, vm.wait(), vm.errors())
        there.type("\n")
        there.prompt()
        self.write(there, 2)
        self.assertEqual("hello from the disk\n", there.command("cat /mnt/hello"))
        again = self.lab.ferry("run", "--kernel", lab.guest_file("vmlinux"), "--disk", self.image,
                               "--console", "null")
        self.assertIn("another VM uses it", again.stderr)
        there.command("umount /mnt")
        self.power_off(there)


if __name__ == "__main__":
    unittest.main()

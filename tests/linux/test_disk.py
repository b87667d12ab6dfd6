# SPDX-License-Identifier: Apache-2.0
"""Linux uses virtio disks and the entropy device: reads what the host wrote, writes what the host
reads afterwards, keeps its disk over snapshot and restore, and never shares a writable image."""

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import unittest

import ferrylab as lab
import guestblocks

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


def merged(base, overlay, to):
    """The disk that an overlay and its base are (docs/formats.md), as a plain file."""
    shutil.copy(base, to)
    with open(overlay, "rb") as f, open(to, "r+b") as out:
        size, = struct.unpack_from("<Q", f.read(64), 24)
        f.seek(56)
        data, = struct.unpack("<Q", f.read(8))
        f.seek(4096)
        table = f.read((size + 4095) // 4096 // 8 + 1)
        out.truncate(size)
        for cluster in range((size + 4095) // 4096):
            if table[cluster // 8] >> cluster % 8 & 1:
                f.seek(data + cluster * 4096)
                out.seek(cluster * 4096)
                out.write(f.read(min(4096, size - cluster * 4096)))
    return to


class Durability(unittest.TestCase):
    """The guest's `verify` writes blocks that tell their place and generation, and says on its
    console what it flushed. That the test notices a flush that does nothing was checked: with
    T_FLUSH answered at once and `overlay=` (whose table then stays in memory) it fails."""

    BLOCKS, EVERY = 128, 16

    def setUp(self):
        self.lab = lab.Lab()
        self.addCleanup(self.lab.close)
        self.raw = self.lab.path("raw")
        with open(self.raw, "wb") as f:
            f.truncate(4 * MIB)

    def check_blocks(self, image, generation, flushed):
        found = guestblocks.generations(image, self.BLOCKS)
        for number, is_there in enumerate(found):
            least = generation if number < flushed else generation - 1
            # Being written when the end came: whatever a power cut leaves.
            if is_there is None and flushed <= number < flushed + self.EVERY:
                continue
            self.assertIsNotNone(is_there, f"block {number} is broken, {found}")
            self.assertGreaterEqual(is_there, least, f"block {number}, {found}")

    def kill_midway(self, disk, image):
        lines = re.compile(rb"verify: flushed (\d+) (\d+)\r\n")
        vm = self.lab.linux("--memory", "64M", "--disk", disk)
        vm.prompt()
        vm.type(f"verify write /dev/vda {self.BLOCKS} 1000 {self.EVERY}\n")
        place = 0
        for _ in range(random.randrange(1, 24)):
            place = vm.wait_for(lines, place).end()
        os.kill(vm.pid, signal.SIGKILL)
        vm.child.wait()
        console = vm.console.rest()
        generation, flushed = map(int, lines.findall(console)[-1])
        self.check_blocks(image() if callable(image) else image, generation, flushed)

    def test_1_killed_raw(self):
        for options in ("", ",packed,cached") * (4 if lab.LONG else 1):
            with open(self.raw, "wb") as f:
                f.truncate(4 * MIB)
            self.kill_midway(self.raw + options, self.raw)

    def test_2_killed_overlay(self):
        overlay = self.lab.path("overlay")
        for n in range(8 if lab.LONG else 2):
            if n:
                os.unlink(overlay)
            self.kill_midway(f"{self.raw},overlay={overlay}",
                             lambda: merged(self.raw, overlay, self.lab.path("merged")))
        self.assertEqual([0] * self.BLOCKS, guestblocks.generations(self.raw, self.BLOCKS))

    def test_3_ext4_compared_on_the_host(self):
        """A file that the guest writes and reads back on ext4 over an overlay, and the whole disk
        afterwards: file system and file are right on the host, and the base is as it was."""
        base = self.lab.path("disk.ext4")
        overlay = self.lab.path("overlay")
        shutil.copy(lab.guest_file("disk.ext4"), base)
        vm = self.lab.linux("--memory", "96M", "--disk", f"{base},overlay={overlay},queues=2",
                            "--disk", f"{self.raw},bps=8M,iops=1000")
        vm.prompt()
        vm.command("mount -t ext4 /dev/vda /mnt")
        self.assertIn("wrote 64 blocks, generation 2", vm.command("verify write /mnt/v 64 2 32"))
        vm.command("echo 3 > /proc/sys/vm/drop_caches")
        self.assertIn("ok 64 blocks, generations 2 to 2", vm.command("verify read /mnt/v 64 2"))
        self.assertIn("wrote 64 blocks", vm.command("verify write /dev/vdb 64 1 64"))
        self.check_resize(vm)
        vm.command("umount /mnt")
        vm.type("exit 0\n")
        self.assertEqual(lab.OK, vm.wait(), vm.errors())
        self.assertEqual([1] * 64, guestblocks.generations(self.raw, 64))
        image = merged(base, overlay, self.lab.path("merged"))
        with open(base, "rb") as a, open(lab.guest_file("disk.ext4"), "rb") as b:
            self.assertEqual(a.read(), b.read())
        if not shutil.which("e2fsck") or not shutil.which("debugfs"):
            self.skipTest("e2fsprogs is missing: the file system was not looked at")
        fsck = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
        self.assertEqual(0, fsck.returncode, fsck.stdout)
        out = self.lab.path("v")
        subprocess.run(["debugfs", "-R", f"dump /v {out}", image], check=True, capture_output=True)
        self.assertEqual([2] * 64, guestblocks.generations(out, 64))

    def check_resize(self, vm):
        self.assertEqual(f"{8 * 1024}\n", vm.command("cat /sys/block/vdb/size"))
        self.assertEqual(lab.OK, vm.ferry("set", "disk1.size=8M").status)
        self.assertEqual(8 * MIB, os.path.getsize(self.raw))
        # The guest hears of it by an interrupt and asks for the size in its own time.
        self.assertIn("seen", vm.command(
            f"until [ $(cat /sys/block/vdb/size) = {16 * 1024} ]; do :; done; echo s''een"))
        self.assertIn("1 ", vm.command("verify write /dev/vdb 64 1 64"))
        small = vm.ferry("set", "disk1.size=1M")
        self.assertNotEqual(lab.OK, small.status)
        self.assertIn("shrink", small.stderr)
        self.assertEqual(lab.OK, vm.ferry("set", "disk1.bps=0").status)
        disk = vm.ferry("info", "--json").json()["devices"]["disk1"]
        self.assertEqual((8 * MIB, 1000, None), (disk["size"], disk["iops"], disk.get("bps")))
        self.assertGreaterEqual(disk["written-bytes"], 128 * 4096)
        self.assertEqual((0, 0), (disk["errors"], disk["in-flight"]))


if __name__ == "__main__":
    unittest.main()

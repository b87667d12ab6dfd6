# SPDX-License-Identifier: Apache-2.0
"""Linux finds its virtio devices on the PCI bus, with and without ACPI, many of them on either
transport, and keeps them over snapshot, restore and migration."""

import re
import shutil
import socket
import unittest

import ferrylab as lab

DEVICES = 24
LABEL = 16  # bytes at the start of each raw disk


class Transport(unittest.TestCase):
    def setUp(self):
        self.lab = lab.Lab()
        self.addCleanup(self.lab.close)

    def disk(self, number):
        """A small disk that says which one it is."""
        path = self.lab.path(f"raw{number}")
        with open(path, "wb") as f:
            f.write(f"disk {number:02}".ljust(LABEL - 1).encode() + b"\n")
            f.truncate(1024 * 1024)
        return path

    def boot(self, *args, append=None, name=None):
        vm = self.lab.linux("--rng", "--memory", "96M", *args, append=append, name=name)
        vm.prompt()
        return vm

    def check_labels(self, vm, count):
        """Every disk is there, in order, and reads what was written on the host."""
        out = vm.command(f"for d in /dev/vd?; do head -c {LABEL} $d; done")
        self.assertEqual([f"disk {i:02}" for i in range(count)],
                         [line.strip() for line in out.strip().split("\n")])

    def check_rng(self, vm):
        out = vm.command("head -c 256 /dev/hwrng | wc -c")
        self.assertEqual("256", out.strip())

    def check_pci(self, vm, count):
        """`count` functions of ours, each with a driver, each interrupt a message of its own."""
        found = vm.command("cat /sys/bus/pci/devices/*/vendor").split("\n")
        self.assertEqual(count, found.count("0x1af4"), found)
        table = vm.command("cat /proc/interrupts")
        queues = re.findall(r"PCI-MSI.*virtio\d+-(?:req\.0|input)", table)
        self.assertEqual(count, len(queues), table)
        self.assertNotIn("IO-APIC  16", table)

    def power_off(self, vm):
        vm.type("exit 0\n")
        self.assertEqual(lab.OK, vm.wait(), vm.errors())

    def many(self, transport, append=None):
        disks = [word for i in range(DEVICES - 1) for word in ("--disk", self.disk(i))]
        vm = self.boot("--transport", transport, *disks, append=append)
        self.check_labels(vm, DEVICES - 1)
        self.check_rng(vm)
        if transport == "pci":
            self.check_pci(vm, DEVICES)
        # All at once, some requests each: shared lines and neighbouring vectors lose nothing.
        vm.command("for d in /dev/vd?; do cat $d >/dev/null & done; wait")
        # The last one is written to and flushed.
        last = chr(ord("a") + DEVICES - 2)
        vm.command(f"echo written >/tmp/w; dd if=/tmp/w of=/dev/vd{last} conv=fsync")
        with open(self.lab.path(f"raw{DEVICES - 2}"), "rb") as f:
            self.assertEqual(b"written\n", f.read(8))
        vm.ferry("stop")

    def test_1_many_by_pci(self):
        self.many("pci")

    def test_2_many_by_mmio(self):
        self.many("mmio")

    def test_3_many_by_mmio_on_the_command_line(self):
        self.many("mmio", lab.guest_cmdline("acpi=off"))

    def test_4_pci_without_acpi(self):
        vm = self.boot("--transport", "pci", "--disk", self.disk(0), "--disk", self.disk(1),
                       append=lab.guest_cmdline("acpi=off"))
        self.check_labels(vm, 2)
        self.check_rng(vm)
        self.check_pci(vm, 3)
        vm.ferry("stop")

    def test_5_pci_moves(self):
        """Snapshot and restore, then a live migration, of a guest with a mounted file system."""
        image = self.lab.path("disk.ext4")
        shutil.copy(lab.guest_file("disk.ext4"), image)
        raw = self.disk(0)
        disks = ("--disk", f"{image},queues=2", "--disk", raw)
        vm = self.boot("--transport", "pci", *disks, name="source")
        vm.command("mount -t ext4 /dev/vda /mnt")
        before = vm.command("sha256sum /mnt/data/megabyte")
        vm.command("echo changed >/mnt/new; sync")
        snap = self.lab.path("snap")
        self.assertEqual(lab.OK, vm.ferry("snapshot", snap).status)
        vm.ferry("stop")
        vm.wait()

        back = self.lab.vm("restore", snap, *disks, name="back")
        back.type("\n")
        back.prompt()
        self.check_moved(back, before)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"tcp:127.0.0.1:{s.getsockname()[1]}"
        there = self.lab.vm("receive", "--listen", address, *disks, name="there")
        there.stderr.wait(b"waiting")
        self.assertEqual(lab.OK, back.ferry("migrate", address).status)
        self.assertEqual(lab.OK, back.wait(), back.errors())
        there.type("\n")
        there.prompt()
        self.check_moved(there, before)
        there.command("echo there >/mnt/there; umount /mnt")
        self.power_off(there)

    def check_moved(self, vm, before):
        vm.command("echo 3 > /proc/sys/vm/drop_caches")
        self.assertEqual(before, vm.command("sha256sum /mnt/data/megabyte"))
        self.assertEqual("changed\n", vm.command("cat /mnt/new"))
        self.assertIn("disk 00", vm.command("head -c 16 /dev/vdb"))
        self.check_rng(vm)


if __name__ == "__main__":
    unittest.main()

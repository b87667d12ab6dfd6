# SPDX-License-Identifier: Apache-2.0
"""The generation id: another one after each restore, and the guest's random number generator knows;
the same one for a guest that goes on or moves live."""

import re
import unittest

import ferrylab as lab

ID_GPA = 0xef000  # LAYOUT_VMGENID
RESEEDED = "crng reseeded due to virtual machine fork"


class VmGenId(lab.LabTest):
    def boot(self, *args):
        vm = self.lab.linux("--memory", "64M", "--rng", *args)
        vm.prompt()
        return vm

    def generation(self, vm):
        text = vm.command(f"dd if=/dev/mem bs=16 skip={ID_GPA // 16} count=1|hexdump -C")
        line = re.search(r"^00000000  ([0-9a-f ]{48})", text, re.M)
        self.assertTrue(line, text)
        return line.group(1).replace(" ", "")

    def reseeds(self, vm):
        return vm.command("dmesg").count(RESEEDED)

    def test_1_new_after_each_restore(self):
        vm = self.boot()
        self.assertIn("FERY0001:00", vm.command("ls /sys/bus/acpi/devices"))
        vm.command("head -c 64 /dev/random >/dev/null")  # waits until the generator is ready
        first = self.generation(vm)
        self.assertEqual(32, len(first))
        self.assertNotEqual("0" * 32, first)
        path = self.lab.path("snapshot")
        self.assertStatus(vm.ferry("snapshot", path), lab.OK)
        self.assertEqual(first, self.generation(vm))
        self.assertEqual(0, self.reseeds(vm))
        seen = {first}
        for _ in range(2):
            clone = self.lab.vm("restore", path)
            seen.add(self.generation(clone))
            self.assertEqual(1, self.reseeds(clone))
        self.assertEqual(3, len(seen), seen)
        # A clone's snapshot is another generation again.
        self.assertStatus(clone.ferry("snapshot", path), lab.OK)
        again = self.lab.vm("restore", path)
        self.assertNotIn(self.generation(again), seen)
        self.assertEqual(2, self.reseeds(again))

    def test_2_the_same_after_a_move(self):
        vm = self.boot()
        vm.command("head -c 64 /dev/random >/dev/null")
        first = self.generation(vm)
        target = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0")
        address = target.stderr.wait(re.compile(rb"waiting for a guest on (tcp:\S+)\n")).group(1)
        self.assertStatus(vm.ferry("migrate", address.decode()), lab.OK)
        self.assertEqual(first, self.generation(target))
        self.assertEqual(0, self.reseeds(target))

    def test_3_left_off(self):
        vm = self.boot("--vmgenid", "false")
        self.assertNotIn("FERY0001", vm.command("ls /sys/bus/acpi/devices"))
        path = self.lab.path("snapshot")
        self.assertStatus(vm.ferry("snapshot", path), lab.OK)
        clone = self.lab.vm("restore", path)
        self.assertIn("alive", clone.command("echo alive"))
        self.assertEqual(0, self.reseeds(clone))


if __name__ == "__main__":
    unittest.main()

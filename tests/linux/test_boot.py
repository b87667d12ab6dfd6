# SPDX-License-Identifier: Apache-2.0
"""Linux boots to a shell, sees its machine, answers, and ends in every way a machine can end.

A boot takes 10 to 25 s where the guest's ring 0 is emulated, so each boot serves several checks and
the next test's guest boots while this one is looked at.
"""

import re
import unittest

import ferrylab as lab
from ferrylab import LabTest

MIB = 1024 * 1024
LEGACY_HOLE = 0x100000 - 0x9fc00

INFO = re.compile(r"ferry-guest: cpus=(\d+) mem=(\d+) ticks=(\d+)")
RAM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", re.M)


def spec(cpus, memory_mib, *args, append=None, **options):
    return {"cpus": cpus, "memory_mib": memory_mib, "append": append or lab.guest_cmdline(),
            "args": ["--cpus", str(cpus), "--memory", f"{memory_mib}M", *args], **options}


def specs():
    """In the order of the tests."""
    triple = lab.guest_cmdline("acpi=off reboot=t", drop=["reboot="])
    return {
        "one": spec(1, 128, "--boot", "linux64"),
        "two": spec(2, 96, "--boot", "pvh"),
        "four": spec(4, 160, kernel="bzImage"),
        "mptable": spec(2, 128, append=triple),
        "panic": spec(1, 64, initrd=False),
    }


class Boot(unittest.TestCase):
    assertEnds = LabTest.assertEnds

    @classmethod
    def setUpClass(cls):
        cls.specs = specs()
        cls.lab = lab.Lab()
        cls.addClassCleanup(cls.lab.close)
        cls.vms = {}

    def start(self, name):
        if name not in self.vms:
            s = self.specs[name]
            self.vms[name] = self.lab.linux(*s["args"], append=s["append"], name=name,
                                            kernel=s.get("kernel", "vmlinux"),
                                            initrd=s.get("initrd", True))
        return self.vms[name]

    def take(self, name):
        """The VM of this name; the one that is looked at next boots meanwhile."""
        vm = self.start(name)
        self.addCleanup(vm.end)
        names = list(self.specs)
        following = names[names.index(name) + 1:][:1]
        for other in following:
            self.start(other)
        return vm

    def info(self, vm):
        return tuple(int(n) for n in INFO.search(vm.command("info")).groups())

    def check_machine(self, name):
        """Boots to the prompt; CPUs, memory, timer interrupts and vector registers are right."""
        vm, s = self.take(name), self.specs[name]
        vm.prompt()
        cpus, memory_kib, ticks = self.info(vm)
        self.assertEqual(s["cpus"], cpus)
        self.assertLess(memory_kib, s["memory_mib"] * 1024)
        # All RAM there is, as the kernel was told: what it may use itself lies within.
        ranges = [(int(a, 16), int(b, 16) + 1) for a, b in RAM.findall(vm.command("cat /proc/iomem"))]
        usable = sum(end - start for start, end in ranges)
        self.assertEqual(s["memory_mib"] * MIB, max(end for _, end in ranges))
        self.assertAlmostEqual(s["memory_mib"] * MIB, usable, delta=LEGACY_HOLE + 4096)
        self.assertGreater(memory_kib * 1024, usable * 0.7)
        # Every CPU takes timer interrupts of its own, and they go on.
        per_cpu = [int(n) for n in vm.command("grep LOC: /proc/interrupts").split()[1:1 + cpus]]
        self.assertEqual(cpus, len(per_cpu))
        self.assertGreater(min(per_cpu), 0)
        self.assertGreater(self.info(vm)[2], ticks)
        # Vector registers of more processes than CPUs.
        self.assertIn(f"vectest: ok 40 rounds, {cpus + 2} processes",
                      vm.command(f"vectest {cpus + 2} 40"))
        return vm

    def test_1_one_cpu_linux64_and_reboot(self):
        vm = self.check_machine("one")
        self.assertEqual("typed 42\n", vm.command("echo typed $((6 * 7))"))
        vm.type("reboot -f\n")
        self.assertEnds(vm, lab.REBOOT, "reboot")

    def test_2_two_cpus_pvh_and_power_off(self):
        vm = self.check_machine("two")
        vm.type("exit 0\n")
        vm.wait_for(b"ferry-guest: exit 0")
        self.assertEnds(vm, lab.OK, "powered off")

    def test_3_four_cpus_bzimage_and_power_button(self):
        vm = self.check_machine("four")
        self.assertEqual(lab.OK, vm.ferry("stop", "--powerbutton").status)
        vm.wait_for(b"ferry-guest: power button")
        self.assertEnds(vm, lab.OK, "powered off")

    def test_4_mp_table_without_acpi_and_triple_fault(self):
        vm = self.check_machine("mptable")
        self.assertIn("No such file", vm.command("ls /sys/firmware/acpi"))
        # This kernel's reboot=t loads an empty IDT and faults: what a VMM sees is a triple fault.
        self.assertIn("reboot=t", vm.command("cat /proc/cmdline"))
        vm.type("reboot -f\n")
        self.assertEnds(vm, lab.TRIPLE_FAULT, "triple fault")

    def test_5_panic(self):
        vm = self.take("panic")  # no initrd: there is no root file system to be found
        vm.wait_for(b"Kernel panic - not syncing")
        self.assertEnds(vm, lab.PANIC, "panic")


if __name__ == "__main__":
    unittest.main()

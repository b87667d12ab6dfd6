# SPDX-License-Identifier: Apache-2.0
"""A guest that filled 60 % of its memory and gave it free again moves without it: the guest's hints
name the pages, or its balloon takes them for the time of the move. What it uses arrives whole, and
it has all its memory again where it runs, also where a move was given up."""

import re
import time
import unittest

import ferrylab as lab

MIB = 1024 * 1024
PAGE = 4096
MEMORY, HOG, TAKE = 128, 76, 8  # MiB
LIMIT = 4 * lab.LIMIT  # a page costs the guest dearly where its ring 0 is emulated


class LessToSend(lab.LabTest):
    def balloon(self, vm):
        return self.assertStatus(vm.ferry("info", "--json"), lab.OK).json()["devices"]["balloon0"]

    def until(self, what, test):
        """Waits until test() holds; the guest works at its own pace."""
        end = time.monotonic() + LIMIT
        while not test():
            self.assertLess(time.monotonic(), end, what)
            time.sleep(0.1)

    def fill_and_free(self, vm):
        start = vm.console.size()
        vm.type(f"memhog {HOG}\n")
        vm.wait_for(b"memhog: holds", start, LIMIT)
        start = vm.console.size()
        vm.type("\n")
        vm.wait_for(lab.PROMPT, vm.wait_for(b"memhog: freed", start, LIMIT).end())

    def move(self, vm, *options):
        """Moves it, with what it should not lose checked; the VM there and the report."""
        want = vm.command("sha256sum /tmp/data")
        there = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0")
        address = there.stderr.wait(re.compile(rb"waiting for a guest on (tcp:\S+)\n")).group(1)
        report = self.assertStatus(vm.ferry("migrate", address.decode(), *options, "--json"),
                                   lab.OK).json()
        self.assertEnds(vm, lab.OK, "migrated")
        self.assertEqual(want, there.command("sha256sum /tmp/data", there.console.size()))
        return there, report

    def gets_it_back(self, vm):
        """The balloon is empty, as its user has it."""
        self.assertEqual(0, self.balloon(vm)["target_bytes"])
        self.assertEqual(0, self.balloon(vm)["migration_bytes"])
        self.until("deflated", lambda: not self.balloon(vm)["actual_bytes"])

    def given_up(self, vm):
        """A move that is cancelled while the balloon grows."""
        there = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0")
        address = there.stderr.wait(re.compile(rb"waiting for a guest on (tcp:\S+)\n")).group(1)
        mover = self.lab.start(lab.Process([lab.FERRY, "migrate", vm.name, address.decode(),
                                            "--balloon", "auto", "--bandwidth", "1M"],
                                           env=self.lab.env))
        self.until("taking", lambda: self.balloon(vm)["actual_bytes"])
        self.assertGreater(self.balloon(vm)["migration_bytes"], HOG // 2 * MIB)
        self.assertStatus(vm.ferry("set", "balloon0.stats=0"), lab.OK)  # others' settings work
        self.assertStatus(self.lab.ferry("migrate", "cancel", vm.name), lab.OK)
        self.assertNotEqual(lab.OK, mover.wait())
        self.gets_it_back(vm)

    def test_free_memory_is_not_sent(self):
        here = self.lab.linux("--memory", f"{MEMORY}M", "--balloon", "reporting=off")
        here.prompt()
        here.command("head -c 300000 /dev/urandom > /tmp/data")
        self.fill_and_free(here)
        there, report = self.move(here)
        self.assertGreater(report["free_pages"] * PAGE, (HOG - 16) * MIB)
        self.assertLess(report["data_pages"] * PAGE, HOG // 3 * MIB)
        self.assertLess(report["wire_bytes"], HOG // 3 * MIB)
        self.assertEqual(0, report["balloon_bytes"])
        self.given_up(there)
        # Post-copy asks for no hints: what is spared is what the balloon took.
        last, report = self.move(there, "--balloon", f"{TAKE}M", "--mode", "postcopy")
        self.assertGreater(report["balloon_bytes"], (TAKE - 2) * MIB)
        self.assertLessEqual(report["balloon_bytes"], TAKE * MIB)
        self.assertGreater(report["balloon_us"], 0)
        self.assertEqual(0, report["free_pages"])
        self.gets_it_back(last)


if __name__ == "__main__":
    unittest.main()

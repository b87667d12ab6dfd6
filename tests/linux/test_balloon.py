# SPDX-License-Identifier: Apache-2.0
"""Linux gives memory back to the host: the balloon takes it, free page reporting names it unasked,
and a migration leaves out what the guest does not need. What is given back is measured in the VMM's
own memory (smaps_rollup)."""

import re
import time
import unittest

import ferrylab as lab
from test_api import Api

MIB = 1024 * 1024
PAGE = 4096
MEMORY, HOG, TARGET = 256, 160, 128  # MiB
LIMIT = 4 * lab.LIMIT  # a page costs the guest dearly where its ring 0 is emulated


def pss(vm):
    """Bytes of host memory that are the VMM's alone, or its share of."""
    with open(f"/proc/{vm.pid}/smaps_rollup") as f:
        return int(re.search(r"^Pss:\s+(\d+) kB", f.read(), re.M).group(1)) * 1024


class Balloon(lab.LabTest):
    def boot(self, options, *args):
        vm = self.lab.linux("--memory", f"{MEMORY}M", "--balloon", options, *args)
        vm.prompt()
        return vm

    def show(self, vm):
        return self.assertStatus(vm.ferry("info", "--json"), lab.OK).json()["devices"]["balloon0"]

    def until(self, vm, what, test):
        """Waits until test(what the balloon shows) holds; the guest works at its own pace."""
        end = time.monotonic() + LIMIT
        while True:
            shown = self.show(vm)
            if test(shown):
                return shown
            if time.monotonic() > end:
                self.fail(f"{what}: {shown}, {pss(vm) / MIB:.0f} MiB; {vm.errors()}")
            time.sleep(0.2)

    def hold(self, vm, mib):
        """The guest uses `mib` MiB until release(); the host's memory for it."""
        start = vm.console.size()
        vm.type(f"memhog {mib}\n")
        vm.wait_for(b"memhog: holds %d MiB" % mib, start, LIMIT)
        return pss(vm)

    def release(self, vm):
        start = vm.console.size()
        vm.type("\n")
        vm.wait_for(lab.PROMPT, vm.wait_for(b"memhog: freed", start).end())

    def set(self, vm, **settings):
        for key, value in settings.items():
            self.assertStatus(vm.ferry("set", f"balloon0.{key}={value}"), lab.OK)

    def test_0_hinting_on_request(self):
        """The host asks; what the guest does not need comes back, what it uses stays."""
        vm = self.boot("reporting=off", "--api-sock", self.lab.path("api"))
        api = Api(self.lab.path("api"))
        vm.command("head -c 1000000 /dev/urandom > /tmp/kept; sha256sum /tmp/kept > /tmp/sum")
        full = self.hold(vm, HOG)
        self.release(vm)
        for acknowledge in (False, True):
            self.assertEqual(204, api.call("PATCH", "/balloon/hinting/start",
                                           {"acknowledge_on_stop": acknowledge})[0])
            status, answer = api.call("PATCH", "/balloon/hinting/start", {})
            if not acknowledge:  # otherwise the first may have ended
                self.assertEqual(400, status)
                self.assertIn("under way", answer["fault_message"])
                self.until(vm, "taken", lambda shown: pss(vm) < full - HOG // 2 * MIB)
                said = api.call("GET", "/balloon/hinting/status")[1]
                self.assertGreaterEqual(said["host_cmd"], 2)
                self.assertEqual(204, api.call("PATCH", "/balloon/hinting/stop", {})[0])
            self.until(vm, "acknowledged", lambda shown: shown["hint_command"] == 1)
        self.assertIn("/tmp/kept: OK", vm.command("sha256sum -c /tmp/sum"))
        self.assertGreater(self.show(vm)["hinted_bytes"], HOG // 2 * MIB)
        self.hold(vm, HOG)  # and it can be used again
        self.release(vm)

    def test_1_inflate_and_deflate(self):
        vm = self.boot("reporting=off")
        self.hold(vm, HOG)
        self.release(vm)
        before = pss(vm)
        self.assertGreater(before, HOG * MIB)  # nothing is given back unasked
        self.set(vm, target=f"{TARGET}M")
        shown = self.until(vm, "inflating", lambda b: b["actual_bytes"] == TARGET * MIB)
        self.assertEqual(TARGET * MIB, shown["inflated_bytes"])
        self.assertGreaterEqual(before - pss(vm), 120 * MIB)
        # More than the balloon has left: it gives some back before the guest kills processes.
        self.hold(vm, MEMORY - TARGET)
        self.assertLess(self.show(vm)["actual_bytes"], TARGET * MIB)
        self.release(vm)
        self.assertNotIn("Out of memory", vm.command("dmesg"))
        for text, status in (("1024M", lab.FAILED), ("x", lab.USAGE)):
            self.assertStatus(vm.ferry("set", f"balloon0.target={text}"), status)
        self.set(vm, target="0", stats="1")
        self.until(vm, "deflating", lambda b: b["actual_bytes"] == 0)
        self.assertGreater(self.hold(vm, HOG), before - 8 * MIB)  # the guest has it again
        guest = self.until(vm, "statistics",
                           lambda b: b["guest"].get("free", MEMORY * MIB) < 100 * MIB)["guest"]
        self.assertGreater(guest["total"], 200 * MIB)
        self.assertGreater(guest["minor_faults"], 0)
        self.release(vm)
        vm.type("exit 0\n")
        self.assertEnds(vm, lab.OK)

    def test_2_reporting(self):
        vm = self.boot("target=0")
        idle = pss(vm)
        held = self.hold(vm, HOG)
        self.assertGreater(held, idle + (HOG - 16) * MIB)
        self.release(vm)
        self.until(vm, "reporting", lambda b: pss(vm) < held - (HOG - 24) * MIB)
        self.assertGreater(self.show(vm)["reported_bytes"], (HOG - 24) * MIB)
        self.assertGreater(self.hold(vm, HOG), idle + (HOG - 16) * MIB)
        self.release(vm)
        self.assertIn("alive", vm.command("echo alive"))

    def migrate(self, hinting):
        """Moves a guest with much free but once used memory; pages of data that went."""
        vm = self.boot(f"reporting=off,hinting={hinting}")
        vm.command("head -c 65536 /dev/urandom > /tmp/x")
        want = vm.command("sha256sum /tmp/x")
        self.hold(vm, 64)
        self.release(vm)
        target = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0")
        address = target.stderr.wait(re.compile(rb"waiting for a guest on (tcp:\S+)\n")).group(1)
        report = self.assertStatus(vm.ferry("migrate", address.decode(), "--json"), lab.OK).json()
        self.assertEnds(vm, lab.OK, "migrated")
        start = target.console.size()
        self.assertEqual(want, target.command("sha256sum /tmp/x", start))
        hog = self.hold(target, 64)  # whatever was not sent can be used
        self.assertGreater(hog, 64 * MIB)
        self.release(target)
        self.assertEqual(want, target.command("sha256sum /tmp/x"))
        return report["data_pages"] * PAGE

    def test_3_hints_spare_a_migration_the_free_pages(self):
        without = self.migrate("off")
        self.assertGreater(without, 64 * MIB)
        self.assertLess(self.migrate("on"), without - 48 * MIB)


if __name__ == "__main__":
    unittest.main()

# SPDX-License-Identifier: Apache-2.0
"""A guest that starts again in the same process: by its own reboot, by `ferry reset`; its disks, its
devices and its control socket stay."""

import json
import os
import re
import signal
import socket
import threading
import time

import ferrylab as lab


class Bare(lab.LabTest):
    def syncs(self, vm, count):
        """Waits until the guest has started that many times."""
        vm.wait_for(re.compile(rb"(?:(?s:.*?)sync 1\b){%d}" % count))

    def test_a_reboot_ends_the_vm_unless_told_otherwise(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("reset.elf"))
        self.assertEnds(vm, lab.REBOOT, "reset the machine")
        result = self.lab.ferry("run", "-k", lab.bare_guest("reset.elf"), "--on-reboot", "again")
        self.assertIn("expected stop or reset", self.assertStatus(result, lab.USAGE).stderr)
        for guest in ("reset.elf", "triple.elf"):
            with self.subTest(guest=guest):
                vm = self.lab.vm("run", "-k", lab.bare_guest(guest), "--on-reboot", "reset")
                self.syncs(vm, 5)
                self.assertStatus(vm.ferry("stop"), lab.OK)
                self.assertEnds(vm, lab.STOPPED, "starts again: its guest rebooted")

    def test_reset_while_it_runs_and_while_it_is_paused(self):
        kernel = self.lab.path("kernel")
        with open(lab.bare_guest("incr.elf"), "rb") as f, open(kernel, "wb") as to:
            to.write(f.read())
        vm = self.lab.vm("run", "-k", kernel, "-m", "32M", "-c", "2", "-a", "pages=256")
        self.syncs(vm, 1)
        with open(kernel + ".new", "w") as f:
            f.write("no kernel")
        os.rename(kernel + ".new", kernel)  # what it was started from stays what it starts from
        follower = self.lab.start(lab.Process([lab.FERRY, "events", vm.name, "--json"],
                                              env=self.lab.env))
        while b"paused" not in follower.stdout.data:  # until it follows
            self.assertIsNone(follower.child.poll(), follower.errors())
            vm.ferry("pause")
            vm.ferry("resume")
        self.assertEqual({}, self.assertStatus(vm.ferry("reset", "--json"), lab.OK).json())
        self.syncs(vm, 2)
        self.assertStatus(vm.ferry("pause"), lab.OK)
        self.assertStatus(vm.ferry("reset"), lab.OK)
        info = vm.ferry("info", "--json").json()
        self.assertEqual(("paused", vm.pid), (info["state"], info["pid"]))
        self.assertStatus(vm.ferry("resume"), lab.OK)
        self.syncs(vm, 3)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED)
        self.assertEqual(0, follower.wait())
        states = [json.loads(line)["to"] for line in follower.stdout.rest().split(b"\n") if line]
        self.assertEqual(["starting", "running", "paused", "starting", "paused", "running",
                          "stopped"], states[-7:])

    def test_one_that_always_reboots_can_be_ended(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("reset.elf"), "--on-reboot", "reset")
        self.syncs(vm, 2)
        info = vm.ferry("info", "--json").json()
        self.assertIn(info["state"], ("running", "starting"))
        os.kill(vm.pid, signal.SIGTERM)  # it does not listen for the button
        self.assertEnds(vm, lab.STOPPED)

    def test_one_that_came_without_its_kernel(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("incr.elf"), "-m", "32M", "-a", "pages=64")
        vm.wait_for(b"sync 1")
        self.assertStatus(vm.ferry("snapshot", self.lab.path("snap")), lab.OK)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED)
        vm = self.lab.vm("restore", self.lab.path("snap"))
        while vm.ferry("info", "--json").status or \
                vm.ferry("info", "--json").json()["state"] != "running":
            self.assertIsNone(vm.child.poll(), vm.errors())
        self.assertIn("without its kernel", self.assertStatus(vm.ferry("reset"), lab.FAILED).stderr)
        self.assertEqual("running", vm.ferry("info", "--json").json()["state"])
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED)


class Linux(lab.LabTest):
    def boot(self, *args):
        disk = self.lab.path("disk")
        with open(disk, "wb") as f:
            f.truncate(1 << 20)
        vm = self.lab.linux("--disk", disk, "--rng", "--balloon", "target=4M", "--memory", "96M",
                            "--cpus", "2", "--vsock", f"cid=3,path={self.lab.path('v')}", *args)
        vm.prompt()
        return vm

    def again(self, vm, start):
        """At the prompt for the second time; what was flushed is there, what was not is gone."""
        userspace = vm.wait_for(b"ferry-guest: userspace", start)
        vm.wait_for(lab.PROMPT, userspace.end())
        self.assertEqual("flushed\n", vm.command("head -c 8 /dev/vda"))
        self.assertIn("No such file", vm.command("ls /tmp/volatile"))
        self.assertEqual("2\n", vm.command("grep -c ^processor /proc/cpuinfo"))
        self.assertEqual("64\n", vm.command("head -c 64 /dev/hwrng | wc -c").replace(" ", ""))
        while vm.ferry("info", "--json").json()["devices"]["balloon0"]["actual_bytes"] != 4 << 20:
            self.assertIsNone(vm.child.poll(), vm.errors())
            time.sleep(0.05)

    def prepare(self, vm):
        vm.command("echo flushed | dd of=/dev/vda conv=fsync,notrunc; touch /tmp/volatile")
        return vm.console.size()

    def test_1_mmio_and_a_reboot_during_a_migration(self):
        vm = self.boot("--on-reboot", "reset")
        start = self.prepare(vm)
        self.assertStatus(vm.ferry("reset"), lab.OK)
        self.again(vm, start)
        start = self.prepare(vm)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            to = "tcp:127.0.0.1:%d" % silent.getsockname()[1]
            answers = []
            thread = threading.Thread(target=lambda: answers.append(vm.ferry("migrate", to)))
            thread.start()
            held, _ = silent.accept()
            self.assertEqual("migrating", vm.ferry("info", "--json").json()["state"])
            vm.type("reboot -f\n")
            vm.wait_for(b"reboot -f", start)
            exits = -1  # until its vCPUs stand still
            while exits != (now := sum(v["exits"] for v in
                                       vm.ferry("info", "--json").json()["vcpus"])):
                exits = now
                time.sleep(1)
            self.assertEqual("migrating", vm.ferry("info", "--json").json()["state"])
            held.close()
        thread.join()
        self.assertStatus(answers[0], lab.FAILED)
        self.again(vm, start)
        vm.type("exit 0\n")
        self.assertEnds(vm, lab.OK)
        self.assertEqual(2, vm.errors().count("starts again"))

    def test_2_pci(self):
        vm = self.boot("--transport", "pci")
        start = self.prepare(vm)
        self.assertStatus(vm.ferry("reset"), lab.OK)
        self.again(vm, start)
        vm.type("exit 0\n")
        self.assertEnds(vm, lab.OK)

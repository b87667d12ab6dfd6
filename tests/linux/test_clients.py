# SPDX-License-Identifier: Apache-2.0
"""Client libraries that somebody else wrote drive Ferry, unchanged: a Linux guest is described, started,
paused, saved, stopped, and comes back from the snapshot.

FERRY_FIRECRACKERODE names a directory with the library firecrackerode (and its dependency debug), for
hosts whose npm registry does not have it."""

import json
import os
import re
import shutil
import subprocess
import unittest

import ferrylab as lab

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "clients.js")


def installed(*packages):
    """The directory of the first package, installed by npm into the cache; skips if npm cannot."""
    home = os.path.join(lab.CACHE, "clients", packages[0])
    where = os.path.join(home, "node_modules", packages[0])
    if os.path.isdir(where):
        return where
    if not shutil.which("npm") or not shutil.which("node"):
        raise unittest.SkipTest("node or npm is missing (packages nodejs, npm)")
    os.makedirs(home, exist_ok=True)
    done = subprocess.run(["npm", "install", "--no-save", "--prefix", home, *packages], text=True,
                          capture_output=True, timeout=lab.LIMIT)
    if done.returncode:
        said = re.findall(r"(?m)^npm (?:error|ERR!) (.+)$", done.stderr)
        raise unittest.SkipTest(f"npm has no {packages[0]}: {(said or [done.stderr])[0]}")
    return where


class Client(lab.LabTest):
    def call(self, socket, step, fails="", **given):
        done = subprocess.run(["node", SCRIPT, self.kind, self.library, socket, step,
                               json.dumps(given)], text=True, capture_output=True,
                              timeout=lab.LIMIT)
        if fails:
            self.assertEqual(1, done.returncode, done)
            self.assertRegex(done.stderr, fails)
            return None
        self.assertEqual(0, done.returncode, (step, done))
        return json.loads(done.stdout)

    def waiting(self):
        path = self.lab.path(self.lab.new_name() + ".api")
        vm = self.lab.vm("run", "--api-sock", path)
        while not os.path.exists(path):
            self.assertIsNone(vm.child.poll(), vm.errors())
        return vm, path

    def life(self, machine):
        disk = self.lab.path("disk")
        with open(disk, "wb") as f:
            f.truncate(1 << 20)
        vm, api = self.waiting()
        self.assertEqual("Not started", self.call(api, "info")["state"])
        self.call(api, "start", fails="no kernel")
        self.call(api, "boot", kernel_image_path=lab.guest_file("vmlinux"),
                  initrd_path=lab.guest_file("initramfs.cpio"), boot_args=lab.guest_cmdline())
        self.call(api, "machine", **machine)
        self.assertEqual(96, self.call(api, "config")["mem_size_mib"])
        self.call(api, "drive", drive_id="data", path_on_host=disk, is_root_device=False,
                  is_read_only=False)
        self.call(api, "drive", fails="/nowhere", drive_id="none", path_on_host="/nowhere",
                  is_root_device=False, is_read_only=False)
        self.call(api, "vsock", vsock_id="v", guest_cid=3, uds_path=self.lab.path("vsock"))
        self.call(api, "metrics", metrics_path=self.lab.path("metrics"))
        self.call(api, "start")
        vm.prompt()
        vm.command("echo kept > /tmp/kept")
        paths = {"snapshot_path": self.lab.path("snapshot"), "mem_file_path": self.lab.path("mem")}
        self.call(api, "save", fails="running", snapshot_type="Full", **paths)
        self.call(api, "state", state="Paused")
        self.assertEqual("Paused", self.call(api, "info")["state"])
        self.call(api, "save", snapshot_type="Full", **paths)
        self.call(api, "state", state="Resumed")
        self.call(api, "button")
        vm.wait_for(b"ferry-guest: power button")
        self.assertEnds(vm, lab.OK)
        vm, api = self.waiting()
        self.call(api, "load", resume_vm=True, snapshot_path=paths["snapshot_path"], mem_backend={
            "backend_type": "File", "backend_path": paths["mem_file_path"]})
        vm.type("\n")
        vm.prompt()
        self.assertEqual("kept\n", vm.command("cat /tmp/kept"))
        self.assertEqual("Running", self.call(api, "info")["state"])
        self.call(api, "button")
        self.assertEnds(vm, lab.OK)


class Firecrackerode(Client):
    kind = "firecrackerode"

    def test_life(self):
        self.library = os.environ.get("FERRY_FIRECRACKERODE") or installed("firecrackerode", "debug")
        self.life({"vcpu_count": 1, "mem_size_mib": 96, "ht_enabled": False})


class FromTheDescription(Client):
    kind = "openapi"

    def test_life(self):
        self.library = installed("openapi-client-axios", "axios")
        self.life({"vcpu_count": 1, "mem_size_mib": 96, "smt": False})

# SPDX-License-Identifier: Apache-2.0
"""scripts/lab: two hosts, a guest that goes there and back, and nothing left afterwards."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest

import ferrylab as lab

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts", "lab")


class TwoHosts(unittest.TestCase):
    def setUp(self):
        if os.geteuid():
            self.skipTest("network namespaces need root")
        for tool in ("unshare", "nsenter", "ip", "tc"):
            if not shutil.which(tool):
                self.skipTest(f"{tool} is missing (packages util-linux, iproute2)")
        lab.guest_file("vmlinux")
        parent = tempfile.mkdtemp(prefix="ferry-test-lab-")
        self.dir = os.path.join(parent, "lab")
        self.addCleanup(shutil.rmtree, parent, True)
        self.addCleanup(self.run_lab, "down")

    def run_lab(self, *args):
        env = {**os.environ, "FERRY_LAB": self.dir, "FERRY": lab.FERRY,
               "FERRY_GUEST": os.path.dirname(lab.guest_file("vmlinux"))}
        return subprocess.run([sys.executable, SCRIPT, *args], env=env, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=2 * lab.LIMIT, check=False)

    def ok(self, *args):
        done = self.run_lab(*args)
        self.assertEqual(0, done.returncode, (args, done.stdout, done.stderr))
        return done.stdout

    def refused(self, says, *args):
        done = self.run_lab(*args)
        self.assertEqual(1, done.returncode, (args, done.stdout, done.stderr))
        self.assertIn(says, done.stderr)

    def processes(self):
        """Whoever was given this lab's folder: in its command line or its environment."""
        mine = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                for file in ("cmdline", "environ"):
                    with open(f"/proc/{pid}/{file}", "rb") as f:
                        if self.dir.encode() in f.read() and int(pid) != os.getpid():
                            mine.append(pid)
            except OSError:
                pass  # it has ended
        return mine

    def test_there_and_back(self):
        self.refused("scripts/lab up", "run")
        self.ok("up", "--rate", "1gbit", "--delay", "2", "--memory", "64M")
        self.refused("scripts/lab down", "up")
        self.assertIn("host A (10.78.0.1), running, after 0 moves", self.ok("status"))
        out = self.ok("run", "--hops", "2")
        self.assertIn("host A -> host B, precopy, over TLS", out)
        self.assertIn("host B -> host A, precopy, over TLS", out)
        self.assertIn("host A (10.78.0.1), running, after 2 moves", out)
        self.assertTrue(os.path.exists(os.path.join(self.dir, "report2.html")))
        self.assertNotEqual([], self.processes())
        self.ok("down")
        self.assertEqual([], self.processes())
        self.assertFalse(os.path.exists(self.dir))
        self.refused("scripts/lab up", "status")


if __name__ == "__main__":
    unittest.main()

# SPDX-License-Identifier: Apache-2.0
"""`ferry snapshot` and what it does with files: diffs, chains, ls, verify, merge, rm. The guest is a
small one that writes to its memory all the time."""

import os

import ferrylab as lab
from ferrylab import LabTest


class Files(LabTest):
    def setUp(self):
        super().setUp()
        self.vm = self.lab.vm("run", "--kernel", lab.bare_guest("incr.elf"), "--memory", "32M",
                              "--append", "pages=64")
        self.vm.wait_for(b"sync 1")
        self.directory = self.lab.path("snapshots")
        os.mkdir(self.directory)

    def file(self, name):
        return os.path.join(self.directory, name)

    def snapshot(self, *args, status=lab.OK):
        return self.assertStatus(self.lab.ferry("snapshot", *args), status)

    def create(self, name, *args):
        """With the word or without it: both are the same."""
        path = self.file(name)
        words = ("create",) if len(args) % 2 else ()
        report = self.snapshot(*words, self.vm.name, path, *args, "--json").json()
        self.assertEqual(os.path.getsize(path), report["file_bytes"])
        self.assertEqual(path, report["path"])
        return path, report

    def listed(self):
        return {s["name"]: s for s in self.snapshot("ls", self.directory, "--json").json()["snapshots"]}

    def restore(self, path):
        if lab.JAIL:  # it may be a tool's, which is not in the jail
            os.chown(path, lab.JAIL_UID, lab.JAIL_GID)
        vm = self.lab.vm("restore", path)
        self.assertEnds(self.running(vm), lab.STOPPED)

    def running(self, vm):
        """Ends it once its vCPU has worked."""
        worked = False
        while not worked:
            self.assertIsNone(vm.child.poll(), vm.errors())
            info = vm.ferry("info", "--json")  # not at once: it is read first
            worked = info.status == lab.OK and info.json().get("vcpus", [{}])[0].get("cpu_ns")
        vm.ferry("stop")
        return vm

    def test_a_chain_and_its_tools(self):
        base, full = self.create("base")
        one, first = self.create("one", "--diff")
        two, second = self.create("two", "--parent", one, "--layout", "mapped")
        three, _ = self.create("three", "--diff", "--compress", "none")
        self.assertEqual(["full", "diff", "diff"], [r["kind"] for r in (full, first, second)])
        self.assertEqual(32 << 8, full["data_pages"] + full["zero_pages"])
        self.assertLess(first["data_pages"] + first["zero_pages"], 32 << 8)
        files = self.listed()
        names = ("base", "one", "two", "three")
        self.assertEqual([None, "base", "one", "two"], [files[n]["parent"] for n in names])
        self.assertEqual(["lz4", "lz4", "none", "none"], [files[n]["compress"] for n in names])
        self.assertEqual(["mapped"], [files[n]["layout"] for n in names if files[n]["layout"] != "packed"])
        tree = self.snapshot("ls", self.directory).stdout.splitlines()
        self.assertEqual(["NAME", "base", "  one", "    two", "      three"],
                         [line[:28].rstrip() for line in tree])
        self.assertEqual(4, self.snapshot("verify", three, "--json").json()["files"])

        # A parent is neither removed nor replaced; the newest may be.
        for parent, child in ((base, "one"), (one, "two"), (two, "three")):
            self.assertIn(f"{child} beside it needs it", self.snapshot("rm", parent, status=lab.FAILED).stderr)
        self.assertIn("needs it", self.snapshot(self.vm.name, one, status=lab.FAILED).stderr)
        self.restore(three)
        self.snapshot("merge", three, "-o", three)
        self.assertEqual(1, self.snapshot("verify", three, "--json").json()["files"])
        for path in (two, one, base):
            self.snapshot("rm", path)
        self.assertEqual(["three"], list(self.listed()))
        self.restore(three)

    def test_rm_takes_what_is_the_files_own(self):
        base, overlay, a, b = (self.file(n) for n in ("base", "overlay", "a", "b"))
        with open(base, "wb") as f:
            f.truncate(1 << 20)
        vm = self.lab.vm("run", "--kernel", lab.bare_guest("incr.elf"), "--memory", "32M", "--append",
                         "pages=64", "--disk", f"{base},overlay={overlay}")
        vm.wait_for(b"sync 1")
        self.snapshot(vm.name, a, "--disks")
        self.snapshot(vm.name, b)
        self.assertEnds(self.running(vm), lab.STOPPED)
        vm = self.lab.vm("restore", a, "--disks", "--lazy")
        self.assertEnds(self.running(vm), lab.STOPPED)
        for name in ("b.disk0", "b.ws"):  # a disk and a file of somebody's, called so
            with open(self.file(name), "w") as f:
                f.write(name)
        self.assertEqual({"base", "overlay", "a", "a.ws", "a.disk0", "a.disk0." + vm.name, "b", "b.ws",
                          "b.disk0"}, set(os.listdir(self.directory)))
        self.snapshot("rm", a)
        self.snapshot("rm", b)
        self.assertEqual({"base", "overlay", "a.disk0." + vm.name, "b.disk0", "b.ws"},
                         set(os.listdir(self.directory)))

    def test_damage_and_loss(self):
        base, _ = self.create("base")
        diff, _ = self.create("diff", "--diff")
        with open(base, "r+b") as f:
            f.seek(5000)
            byte = f.read(1)
            f.seek(5000)
            f.write(bytes([byte[0] ^ 1]))
        says = self.snapshot("verify", diff, status=lab.FAILED).stderr
        self.assertIn(base, says)
        self.assertIn("chunk 0 damaged", says)
        self.assertIn("chunk 0 damaged", self.assertStatus(self.lab.ferry("restore", base), lab.FAILED).stderr)
        os.rename(base, base + "2")
        self.assertIn("needs its parent", self.snapshot("verify", diff, status=lab.FAILED).stderr)
        self.assertEqual("orphan", self.listed()["diff"]["state"])
        with open(diff, "r+b") as f:
            f.seek(30)
            byte = f.read(1)
            f.seek(30)
            f.write(bytes([byte[0] ^ 1]))
        self.assertEqual("damaged", self.listed()["diff"]["state"])
        self.assertIn("header damaged", self.listed()["diff"]["why"])
        # The VM's last snapshot is past help: a diff of it is refused, a full one does not mind.
        self.assertIn("header damaged",
                      self.snapshot(self.vm.name, self.file("x"), "--diff", status=lab.FAILED).stderr)
        self.create("base")

    def test_words(self):
        for args, says in ((("merge", "a"), "-o OUT"), (("verify",), "expected 1"),
                           (("a", "b", "--layout", "x"), "expected packed or mapped"),
                           (("a", "b", "--compress"), "needs a value"),
                           (("rm", "a", "--diff"), "unknown option")):
            with self.subTest(args=args):
                self.assertIn(says, self.snapshot(*args, status=lab.USAGE).stderr)
        self.assertIn("nowhere", self.snapshot("ls", "/nowhere", status=lab.FAILED).stderr)
        self.assertIn("not a ferry snapshot", self.snapshot("rm", lab.bare_guest("incr.elf"),
                                                            status=lab.USAGE).stderr)
        self.assertTrue(os.path.exists(lab.bare_guest("incr.elf")))

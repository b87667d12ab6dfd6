# SPDX-License-Identifier: Apache-2.0
"""Filters: each thread of a VM has one. ferry run --jail: what a VM's process can still see and do,
and what it refuses."""

import json
import os
import re
import select
import shutil
import socket
import time
import unittest

import ferrylab as lab

UID, GID = lab.JAIL_UID, lab.JAIL_GID


def status_of(pid):
    with open(f"/proc/{pid}/status") as f:
        return dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)


class Filters(lab.LabTest):
    def modes(self, vm):
        """{name of a thread: (mode of its filter, whether it may gain rights)}"""
        threads = [status_of(f"{vm.pid}/task/{task}") for task in os.listdir(f"/proc/{vm.pid}/task")]
        return {status["Name"]: (int(status["Seccomp"]), int(status["NoNewPrivs"]))
                for status in threads
                if not status["Name"].startswith(("iou-", "kvm-"))}  # the kernel's own

    def filtered(self, vm, *names):
        """The VM has these threads, and each has a filter (mode 2 of seccomp(2)): soon, for it
        answers a moment before its loop's thread is confined."""
        wanted = dict.fromkeys(names, (2, 1))
        end = time.monotonic() + lab.LIMIT
        while self.modes(vm) != wanted and time.monotonic() < end:
            self.assertIsNone(vm.child.poll(), vm.errors())
            time.sleep(0.02)
        self.assertEqual(wanted, self.modes(vm))

    def wait_running(self, vm):
        vm.stderr.wait(b"sync")

    def wait_arrived(self, vm):
        end = time.monotonic() + lab.LIMIT
        while vm.ferry("info").status != lab.OK:
            self.assertLess(time.monotonic(), end)
            self.assertIsNone(vm.child.poll(), vm.errors())
            time.sleep(0.05)

    def test_run(self):
        disk = self.lab.path("disk")
        with open(disk, "wb") as f:
            f.truncate(1 << 20)
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--cpus", "2",
                         "--disk", disk, "--rng", "--balloon", "target=0", "--vsock",
                         f"cid=5,path={self.lab.path('vsock')}", "--seccomp", "on")
        self.wait_running(vm)
        self.filtered(vm, "ferry", "http", "vcpu0", "vcpu1")
        vm.end()
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--control", "false",
                         "--seccomp", "on")
        vm.stderr.wait(b"sync")
        vm.type("\x04")
        self.assertEqual(vm.wait(), lab.OK)  # without a server, too

    def test_arrivals(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall")
        self.wait_running(vm)
        saved = self.lab.path("saved")
        self.assertStatus(vm.ferry("snapshot", saved), lab.OK)
        restored = self.lab.vm("restore", saved, "--seccomp", "on")
        self.wait_arrived(restored)
        self.filtered(restored, "ferry", "http", "vcpu0")
        target = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0", "--seccomp", "on")
        address = target.stderr.wait(re.compile(rb"waiting for a guest on (tcp:\S+)\n")).group(1)
        self.assertStatus(vm.ferry("migrate", address.decode()), lab.OK)
        self.wait_arrived(target)
        self.filtered(target, "ferry", "http", "vcpu0")

    def test_before_the_start(self):
        """With the API alone, before there is a guest: a wider filter, and then the usual one."""
        api = self.lab.path("api")
        vm = self.lab.vm("run", "--api-sock", api, "--seccomp", "on")
        self.filtered(vm, "ferry", "http")
        for route, body in (("boot-source", {"kernel_image_path": lab.bare_guest("serial.elf")}),
                            ("actions", {"action_type": "InstanceStart"})):
            status, text = JailTest.call(self, api, "PUT", "/" + route, body)
            self.assertEqual(204, status, text)
        self.filtered(vm, "ferry", "http", "vcpu0")

    @unittest.skipUnless(shutil.which("passt"), "passt is missing (package passt)")
    def test_before_the_start_with_user_networking(self):
        """It is the same; passt was not started yet, and is by a process without filters."""
        api = self.lab.path("api")
        vm = self.lab.vm("run", "--api-sock", api, "--net", "user", "--seccomp", "on")
        self.filtered(vm, "ferry", "http")
        for route, body in (("boot-source", {"kernel_image_path": lab.bare_guest("serial.elf")}),
                            ("actions", {"action_type": "InstanceStart"})):
            status, text = JailTest.call(self, api, "PUT", "/" + route, body)
            self.assertEqual(204, status, text)
        self.filtered(vm, "ferry", "http", "vcpu0")
        net = vm.ferry("info", "--json").json()["devices"]["net0"]
        self.assertEqual(("user", "up"), (net["backend"], net["link"]))

    def test_off(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--seccomp", "off")
        self.wait_running(vm)
        self.assertEqual("0", status_of(vm.pid)["Seccomp"].strip())


class JailTest(lab.LabTest):
    def setUp(self):
        super().setUp()
        self.dir = os.path.join(os.path.realpath(self.lab.dir), f"jail-{self.id().split('.')[-1]}")
        os.mkdir(self.dir, 0o755)
        os.chmod(self.dir, 0o755)

    def refused(self, text, *jail, status=None):
        got = self.lab.ferry("run", "-k", lab.bare_guest("first.elf"), "-o", "null", "--jail", *jail)
        self.assertNotEqual(got.status, 0)
        self.assertIn(text, got.stderr)
        if status is not None:
            self.assertEqual(got.status, status)
        return got

    def wait_path(self, path):
        end = time.monotonic() + lab.LIMIT
        while not os.path.exists(path):
            self.assertLess(time.monotonic(), end, path)
            time.sleep(0.01)

    def call(self, path, method, route, body):
        text = json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(lab.LIMIT)
            s.connect(path)
            s.sendall(f"{method} {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                      f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
            answer = b""
            while chunk := s.recv(65536):
                answer += chunk
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()


@unittest.skipIf(os.geteuid(), "a jail with namespaces needs root")
class AsRoot(JailTest):
    def jail(self, more=""):
        return f"{self.dir},uid={UID},gid={GID}{more}"

    def start(self, *args, more=""):
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--jail",
                         self.jail(more), *args)
        vm.stderr.wait(b"sync")
        return vm, vm.pid

    def test_what_is_left(self):
        before, after = socket.socketpair()  # not given to the VM, but open when it starts
        os.set_inheritable(after.fileno(), True)
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--jail", self.jail(),
                         fds=(after.fileno(),))
        vm.stderr.wait(b"sync")
        pid = vm.pid
        after.close()
        self.assertEqual(before.recv(1), b"")  # nobody holds its other end
        before.close()
        while status_of(pid)["Seccomp"].strip() == "0":  # it says "sync" a moment before
            self.assertIsNone(vm.child.poll(), vm.errors())
        for task in os.listdir(f"/proc/{pid}/task"):
            status = status_of(f"{pid}/task/{task}")
            self.assertEqual(status["Uid"].split(), [str(UID)] * 4)
            self.assertEqual(status["Gid"].split(), [str(GID)] * 4)
            self.assertEqual(status["Groups"].strip(), "")
            for which in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
                self.assertEqual(int(status[which], 16), 0, which)
            self.assertEqual(status["NoNewPrivs"].strip(), "1")
            self.assertEqual(status["Seccomp"].strip(), "2")
        self.assertEqual(sorted(os.listdir(f"/proc/{pid}/root")), ["dev"])
        self.assertEqual(os.stat(f"/proc/{pid}/root").st_ino, os.stat(self.dir).st_ino)
        with open(f"/proc/{pid}/mounts") as f:
            mounts = [line.split() for line in f]
        self.assertEqual([mount[1] for mount in mounts], ["/", "/dev"])
        for option in ("nosuid", "nodev", "noexec"):
            self.assertIn(option, mounts[0][3].split(","))
        for space in ("mnt", "ipc", "uts"):
            self.assertNotEqual(os.readlink(f"/proc/{pid}/ns/{space}"),
                                os.readlink(f"/proc/self/ns/{space}"))
        self.assertEqual(os.readlink(f"/proc/{pid}/ns/net"), os.readlink("/proc/self/ns/net"))
        with open(f"/proc/{pid}/limits") as f:
            self.assertRegex(f.read(), r"Max core file size\s+0\s+0")
        self.assertEqual(os.listdir(os.path.join(self.dir, "dev")), [])  # its /dev is no one else's
        # It answers, and leaves nothing behind.
        info = vm.ferry("info", "--json").json()
        self.assertEqual(info["pid"], pid)
        self.assertGreater(info["resident_bytes"], 0)
        self.assertEqual(vm.ferry("stop").status, 0)
        self.assertEqual(vm.wait(), lab.STOPPED)
        self.assertEqual([n for n in os.listdir(self.lab.run_dir) if n.startswith(vm.name)], [])

    def test_network_of_its_own(self):
        vm, pid = self.start(more=",net=own")
        self.assertNotEqual(os.readlink(f"/proc/{pid}/ns/net"), os.readlink("/proc/self/ns/net"))
        vm.end()

    def test_a_killed_vm_leaves_nothing(self):
        vm, pid = self.start()
        os.kill(pid, 9)
        self.assertEqual(vm.wait(), -9)
        self.assertIn("ended by a signal", vm.errors())
        self.assertEqual([n for n in os.listdir(self.lab.run_dir) if n.startswith(vm.name)], [])

    def test_it_dies_with_the_process_outside(self):
        vm, pid = self.start()
        handle = os.pidfd_open(pid)
        vm.child.kill()
        vm.child.wait()
        self.assertTrue(select.select([handle], [], [], lab.LIMIT)[0])
        os.close(handle)

    def test_signals_reach_it(self):
        vm, _ = self.start()
        vm.child.terminate()
        self.assertEqual(vm.wait(), lab.STOPPED)

    def test_built_inside_by_the_api(self):
        api = os.path.join(self.lab.dir, "jail.api")
        for name in ("serial.elf",):
            with open(lab.bare_guest(name), "rb") as source:
                with open(os.path.join(self.dir, name), "wb") as copy:
                    copy.write(source.read())
            os.chmod(os.path.join(self.dir, name), 0o644)
        vm = self.lab.vm("run", "--api-sock", api, "--jail", self.jail())
        self.wait_path(api)
        outside = self.call(api, "PUT", "/boot-source", {"kernel_image_path": lab.bare_guest("serial.elf")})
        if outside[0] == 204:  # looked at when the instance starts
            outside = self.call(api, "PUT", "/actions", {"action_type": "InstanceStart"})
        self.assertEqual(outside[0], 400, outside)
        self.assertIn("No such file", outside[1])
        self.assertEqual(self.call(api, "PUT", "/boot-source", {"kernel_image_path": "/serial.elf"})[0], 204)
        started = self.call(api, "PUT", "/actions", {"action_type": "InstanceStart"})
        self.assertEqual(started[0], 204, started)
        # A snapshot lands inside.
        os.chown(self.dir, UID, GID)
        vm.ferry("pause")
        saved = self.call(api, "PUT", "/snapshot/file", {"path": "/saved"})
        self.assertEqual(saved[0], 200, saved)
        self.assertEqual(os.stat(os.path.join(self.dir, "saved")).st_uid, UID)
        self.assertEqual(vm.ferry("stop").status, 0)
        self.assertEqual(vm.wait(), lab.STOPPED)
        self.assertFalse(os.path.exists(api))

    # --- what a VM in a jail can be made of, and what can be made of it

    def answers(self, name):
        """Soon, with this; it is in a jail, and runs as its user."""
        end = time.monotonic() + lab.LIMIT
        while (got := self.lab.ferry("info", name, "--json")).status or \
                got.json()["state"] not in ("running", "paused"):
            said = [vm.errors() for vm in self.lab.started if vm.name == name]
            self.assertLess(time.monotonic(), end, f"{got} {said}")
            time.sleep(0.05)
        info = got.json()
        self.assertEqual(str(UID), status_of(info["pid"])["Uid"].split()[0])
        self.assertEqual(os.stat(f"/proc/{info['pid']}/root").st_ino, os.stat(self.dir).st_ino)
        return info

    def with_disk(self):
        base, overlay = self.lab.path("base"), self.lab.path("overlay")
        with open(base, "wb") as f:
            f.write(b"base" * 4096)
        os.chmod(base, 0o600)  # not the VM's user's
        os.chown(self.dir, UID, GID)
        return base, overlay, self.start("--disk", f"{base},overlay={overlay}")[0]

    def test_clone(self):
        base, overlay, vm = self.with_disk()
        before = set(os.listdir(self.dir))
        made = self.assertStatus(vm.ferry("clone", "--count", "2", "--name", "c", "--json"), lab.OK)
        self.assertEqual(["c1", "c2"], made.json()["clones"])
        try:
            pids = {self.answers(name)["pid"] for name in ("c1", "c2")}
            self.assertEqual(3, len(pids | {vm.pid}))
            folder, = set(os.listdir(self.dir)) - before
            self.assertEqual(["memory.disk0.c1", "memory.disk0.c2"],
                             sorted(os.listdir(os.path.join(self.dir, folder))))
            again = self.assertStatus(self.lab.ferry("clone", "c1", "--name", "d"), lab.OK)
            self.answers("d1")  # a clone of a clone reads the same base
        finally:
            for name in ("c1", "c2", "d1"):
                self.lab.ferry("kill", name)
            end = time.monotonic() + lab.LIMIT  # the processes outside remove what is left
            while {"c1.json", "c2.json", "d1.json"} & set(self.lab.sockets()):
                self.assertLess(time.monotonic(), end)
                time.sleep(0.01)
        self.answers(vm.name)
        outside = vm.ferry("clone", "--name", "e", "--dir", "/dev/shm")
        self.assertIn("expected a folder there", self.assertStatus(outside, lab.USAGE).stderr)

    def test_snapshot_and_restore(self):
        base, overlay, vm = self.with_disk()
        saved = os.path.join(self.dir, "saved")
        self.assertStatus(vm.ferry("snapshot", saved, "--disks"), lab.OK)  # its name outside
        self.assertEqual(UID, os.stat(saved).st_uid)
        self.assertStatus(vm.ferry("rollback", saved), lab.OK)
        self.answers(vm.name)
        vm.end()
        # What the file says of this host's files is not believed.
        refused = self.lab.ferry("restore", saved, "--disks", "--jail", self.jail(), "-o", "null")
        self.assertIn("No such file", self.assertStatus(refused, lab.FAILED).stderr)
        restored = self.lab.vm("restore", saved, "--disks", "--jail", self.jail(), "--base", base)
        self.answers(restored.name)
        restored.child.terminate()
        self.assertEqual(restored.wait(), lab.STOPPED)
        self.assertEqual([], [n for n in os.listdir(self.lab.run_dir) if restored.name in n])
        outside = self.lab.path("outside")
        os.rename(saved, outside)
        refused = self.lab.ferry("restore", outside, "--jail", self.jail(), "-o", "null")
        self.assertIn("not in the jail", self.assertStatus(refused, lab.USAGE).stderr)

    def test_receive(self):
        vm, _ = self.start()
        target = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0", "--jail", self.jail())
        address = target.stderr.wait(re.compile(rb"waiting for a guest on (tcp:\S+)\n")).group(1)
        self.assertEqual("starting", target.ferry("info", "--json").json()["state"])
        self.assertStatus(vm.ferry("migrate", address.decode()), lab.OK)
        self.assertEqual(target.pid, self.answers(target.name)["pid"])
        self.assertStatus(target.ferry("stop"), lab.OK)
        self.assertEqual(target.wait(), lab.STOPPED)

    @unittest.skipUnless(shutil.which("passt"), "passt is missing (package passt)")
    def test_receive_with_user_networking(self):
        """passt is outside, and the filter is there before the guest."""
        vm, _ = self.start("--net", "user")
        target = self.lab.vm("receive", "--listen", "tcp:127.0.0.1:0", "--net", "user", "--jail",
                             self.jail(), "--seccomp", "on")
        address = target.stderr.wait(re.compile(rb"waiting for a guest on (tcp:\S+)\n")).group(1)
        while status_of(target.pid)["Seccomp"].strip() == "0":
            self.assertIsNone(target.child.poll(), target.errors())
        self.assertStatus(vm.ferry("migrate", address.decode()), lab.OK)
        self.answers(target.name)
        net = target.ferry("info", "--json").json()["devices"]["net0"]
        self.assertEqual(("user", "up"), (net["backend"], net["link"]))
        self.assertStatus(target.ferry("stop"), lab.OK)
        self.assertEqual(target.wait(), lab.STOPPED)

    def test_checkpoints(self):
        """In a folder outside, which is shared with the jail; started again from there, with the
        disk of the command line."""
        where = self.lab.path("checkpoints")
        base, overlay = self.lab.path("base"), self.lab.path("overlay")
        with open(base, "wb") as f:
            f.write(b"base" * 4096)
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--disk",
                         f"{base},overlay={overlay}", "--jail", self.jail(), "--checkpoints",
                         f"{where},interval=100ms")
        vm.stderr.wait(b"sync")
        pid = self.answers(vm.name)["pid"]
        while len(self.lab.ferry("checkpoint", "ls", vm.name, "--json").json()["checkpoints"]) < 2:
            self.assertIsNone(vm.child.poll(), vm.errors())
        listed = self.lab.ferry("checkpoint", "ls", vm.name, "--json").json()
        self.assertEqual(where, listed["dir"])
        self.assertEqual(UID, os.stat(where).st_uid)
        self.assertStatus(vm.ferry("rollback"), lab.OK)
        os.kill(pid, 9)
        vm.stderr.wait(b"starts again from " + where.encode())
        while (now := self.answers(vm.name)["pid"]) == pid:
            self.assertIsNone(vm.child.poll(), vm.errors())
        # What is written beside them from outside is the VM's user's to read, and follows no link.
        failures, victim = os.path.join(where, "failures"), self.lab.path("victim")
        self.assertEqual(UID, os.stat(failures).st_uid)
        os.unlink(failures)
        os.symlink(victim, failures)
        os.kill(now, 9)
        vm.stderr.wait(b"Too many levels of symbolic links")
        self.assertFalse(os.path.exists(victim))
        while self.answers(vm.name)["pid"] == now:
            self.assertIsNone(vm.child.poll(), vm.errors())
        self.assertStatus(self.lab.ferry("kill", vm.name), lab.OK)
        vm.wait()

    def test_links_on_the_way(self):
        link = os.path.join(os.path.dirname(self.dir), "link")
        os.symlink(self.dir, link)
        self.refused("a symbolic link is on the way", f"{link},uid={UID},gid={GID}")
        os.mkdir(os.path.join(self.dir, "inner"))
        self.refused("a symbolic link is on the way", f"{link}/inner,uid={UID},gid={GID}")
        # Its /dev is mounted where the name leads: not out of the folder.
        target = os.path.join(self.lab.dir, "elsewhere")
        os.mkdir(target)
        os.symlink(target, os.path.join(self.dir, "dev"))
        self.refused("/dev", self.jail())
        self.assertEqual(os.listdir(target), [])

    def test_others_folder(self):
        os.chmod(self.dir, 0o777)
        self.refused("others may write to it", self.jail())
        os.chmod(self.dir, 0o755)
        os.chown(self.dir, UID + 1, GID)
        self.refused("others may write to it", self.jail())

    def test_root_is_no_user(self):
        for who in ("", f",uid={UID}", f",gid={GID}", f",uid=0,gid={GID}", f",uid={UID},gid=0"):
            self.refused("uid=N and gid=N", self.dir + who)

    def test_bad_words(self):
        for text in ("relative", ",uid=1", f"{self.dir},uid=x", f"{self.dir},uid=-1",
                     f"{self.dir},net=other", f"{self.dir},cgroup=relative", f"{self.dir},what=1",
                     f"{self.dir},memory.max=1M", f"{self.dir},cgroup=/x,../memory.max=1"):
            self.refused("--jail", text, status=lab.USAGE)

    def test_missing_folder(self):
        self.refused("No such file", f"{self.dir}/none,uid={UID},gid={GID}")

    def hierarchies(self):
        """Control group file systems, and a limit of each that this test may set."""
        limits = {"cgroup2": ("cgroup.max.descendants", "7"), "pids": ("pids.max", "77"),
                  "memory": ("memory.limit_in_bytes", str(1 << 30))}
        with open("/proc/self/mounts") as f:
            mounts = [line.split() for line in f]
        for _, where, kind, options, *_ in mounts:
            if kind.startswith("cgroup") and os.access(where, os.W_OK):
                for key in {kind, *options.split(",")} & limits.keys():
                    yield where, *limits[key]

    def test_cgroups(self):
        found = list(self.hierarchies())
        if not found:
            self.skipTest("no control groups to make one in")
        name = f"ferry-test-{os.getpid()}"
        groups = [os.path.join(where, name) for where, _, _ in found]
        more = "".join(f",cgroup={group},{file}={value}"
                       for group, (_, file, value) in zip(groups, found))
        vm, pid = self.start(more=more)
        for group, (_, file, value) in zip(groups, found):
            with open(os.path.join(group, file)) as f:
                self.assertEqual(f.read().strip(), value)
            with open(os.path.join(group, "cgroup.procs")) as f:
                self.assertEqual(f.read().split(), [str(pid)])
        self.assertEqual(vm.ferry("stop").status, 0)
        self.assertEqual(vm.wait(), lab.STOPPED)
        self.assertEqual([group for group in groups if os.path.exists(group)], [])
        # One that was there stays; what cannot be set is named, and nothing is left.
        os.mkdir(groups[0])
        self.addCleanup(os.rmdir, groups[0])
        self.refused("such.file", self.jail(f",cgroup={groups[0]},such.file=1"))
        self.assertTrue(os.path.exists(groups[0]))
        inner = os.path.join(groups[0], "inner")
        self.refused("such.file", self.jail(f",cgroup={inner},such.file=1"))
        self.assertFalse(os.path.exists(inner))

    def test_missing_cgroup(self):
        self.refused("No such file", self.jail(",cgroup=/sys/fs/cgroup/ferry-test-none/inner"))
        self.refused("not a folder of control groups", self.jail(f",cgroup={self.dir}/group"))


@unittest.skipIf(os.geteuid(), "becomes an ordinary user, which needs root")
class AsOrdinaryUser(JailTest):
    """/dev/kvm is made accessible to a group by a node of the test's own, seen by these processes
    only."""

    def setUp(self):
        super().setUp()
        os.chown(self.dir, UID, GID)
        self.run_dir = os.path.join(self.lab.dir, "user-run")
        os.mkdir(self.run_dir)
        os.chown(self.run_dir, UID, GID)
        os.chmod(self.lab.dir, 0o755)

    def start(self, *args):
        device = os.stat("/dev/kvm").st_rdev
        inside = (f"mount -t tmpfs none /dev/net; mknod -m 660 /dev/net/kvm c {os.major(device)} "
                  f"{os.minor(device)}; chgrp {GID} /dev/net/kvm; "
                  "mount --bind /dev/net/kvm /dev/kvm; exec \"$@\"")
        vm = lab.Process(["unshare", "--mount", "sh", "-ec", inside, "sh", "setpriv",
                          f"--reuid={UID}", f"--regid={GID}", "--clear-groups", lab.FERRY, "run",
                          "--name", "ordinary", *args],
                         env=dict(self.lab.env, FERRY_RUN_DIR=self.run_dir))
        self.addCleanup(vm.end)
        return vm

    def copy(self, name, path):
        with open(lab.bare_guest(name), "rb") as f, open(path, "wb") as copy:
            copy.write(f.read())
        os.chmod(path, 0o644)

    def test_filters(self):
        kernel = os.path.join(self.dir, "kernel")
        self.copy("serial.elf", kernel)
        vm = self.start("-k", kernel, "--ucall", "-o", "null", "--seccomp", "on")
        vm.stderr.wait(b"sync")
        info = self.lab.ferry("info", "ordinary", "--json",
                              env=dict(self.lab.env, FERRY_RUN_DIR=self.run_dir)).json()
        status = status_of(info["pid"])
        while status["Seccomp"].strip() == "0":  # it answers a moment before
            self.assertIsNone(vm.child.poll(), vm.errors())
            status = status_of(info["pid"])
        self.assertEqual((status["Uid"].split(), status["Groups"].strip(), status["CapEff"].strip("0\t"),
                          status["Seccomp"].strip()), ([str(UID)] * 4, "", "", "2"))
        vm.child.terminate()
        self.assertEqual(vm.wait(), lab.STOPPED)
        self.assertEqual(os.listdir(self.run_dir), [])

    def test_landlock(self):
        secret = os.path.join(self.lab.dir, "secret")
        with open(secret, "w") as f:
            f.write("x")
        os.chmod(secret, 0o644)
        api = os.path.join(self.run_dir, "api")
        vm = self.start("--api-sock", api, "-o", "null", "--jail", self.dir)
        self.wait_path(api)
        for path, wanted in ((secret, "Permission denied"), (f"{self.dir}/kernel", None)):
            if not wanted:
                self.copy("serial.elf", path)
                vsock = {"guest_cid": 5, "uds_path": f"{self.dir}/vsock"}
                self.assertEqual(self.call(api, "PUT", "/vsock", vsock)[0], 204)
            answer = self.call(api, "PUT", "/boot-source", {"kernel_image_path": path})
            if answer[0] == 204:
                answer = self.call(api, "PUT", "/actions", {"action_type": "InstanceStart"})
            self.assertEqual(answer[0], 400 if wanted else 204, answer)
            self.assertIn(wanted or "", answer[1])
        self.assertEqual(["kernel", "vsock"], sorted(os.listdir(self.dir)))  # listened on inside
        vm.child.terminate()
        self.assertEqual(vm.wait(), lab.STOPPED)
        self.assertEqual(os.listdir(self.run_dir), [])


if __name__ == "__main__":
    unittest.main()

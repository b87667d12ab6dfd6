# SPDX-License-Identifier: Apache-2.0
"""ferry run --jail: what a VM's process can still see and do, and what it refuses."""

import json
import os
import select
import socket
import time
import unittest

import ferrylab as lab

UID, GID = lab.JAIL_UID, lab.JAIL_GID


def status_of(pid):
    with open(f"/proc/{pid}/status") as f:
        return dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)


def child_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return int(f.read().split()[0])


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
        return vm, child_of(vm.pid)

    def test_what_is_left(self):
        before, after = socket.socketpair()  # not given to the VM, but open when it starts
        os.set_inheritable(after.fileno(), True)
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--jail", self.jail(),
                         fds=(after.fileno(),))
        vm.stderr.wait(b"sync")
        pid = child_of(vm.pid)
        after.close()
        self.assertEqual(before.recv(1), b"")  # nobody holds its other end
        before.close()
        for task in os.listdir(f"/proc/{pid}/task"):
            status = status_of(f"{pid}/task/{task}")
            self.assertEqual(status["Uid"].split(), [str(UID)] * 4)
            self.assertEqual(status["Gid"].split(), [str(GID)] * 4)
            self.assertEqual(status["Groups"].strip(), "")
            for which in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
                self.assertEqual(int(status[which], 16), 0, which)
            self.assertEqual(status["NoNewPrivs"].strip(), "1")
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
        self.assertEqual(vm.wait(), lab.FAILED)
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
                     f"{self.dir},net=other", f"{self.dir},cgroup=relative", f"{self.dir},what=1"):
            self.refused("--jail", text, status=lab.USAGE)

    def test_missing_folder(self):
        self.refused("No such file", f"{self.dir}/none,uid={UID},gid={GID}")

    def test_missing_cgroup(self):
        self.refused("No such file", self.jail(",cgroup=/sys/fs/cgroup/ferry-test-none"))


@unittest.skipIf(os.geteuid(), "becomes an ordinary user, which needs root")
class AsOrdinaryUser(JailTest):
    """/dev/kvm is made accessible to a group by a node of the test's own, seen by these processes
    only."""

    def test_landlock(self):
        os.chown(self.dir, UID, GID)
        run = os.path.join(self.lab.dir, "user-run")
        os.mkdir(run)
        os.chown(run, UID, GID)
        os.chmod(self.lab.dir, 0o755)
        secret = os.path.join(self.lab.dir, "secret")
        with open(secret, "w") as f:
            f.write("x")
        os.chmod(secret, 0o644)
        api = os.path.join(run, "api")
        device = os.stat("/dev/kvm").st_rdev
        inside = (f"mount -t tmpfs none /dev/net; mknod -m 660 /dev/net/kvm c {os.major(device)} "
                  f"{os.minor(device)}; chgrp {GID} /dev/net/kvm; "
                  "mount --bind /dev/net/kvm /dev/kvm; exec \"$@\"")
        env = dict(self.lab.env, FERRY_RUN_DIR=run)
        vm = lab.Process(["unshare", "--mount", "sh", "-ec", inside, "sh", "setpriv",
                          f"--reuid={UID}", f"--regid={GID}", "--clear-groups", lab.FERRY, "run",
                          "--api-sock", api, "-o", "null", "--name", "ordinary", "--jail", self.dir],
                         env=env)
        self.addCleanup(vm.end)
        self.wait_path(api)
        for path, wanted in ((secret, "Permission denied"), (f"{self.dir}/kernel", None)):
            if not wanted:
                with open(lab.bare_guest("serial.elf"), "rb") as f, open(path, "wb") as copy:
                    copy.write(f.read())
                os.chmod(path, 0o644)
            answer = self.call(api, "PUT", "/boot-source", {"kernel_image_path": path})
            if answer[0] == 204:
                answer = self.call(api, "PUT", "/actions", {"action_type": "InstanceStart"})
            self.assertEqual(answer[0], 400 if wanted else 204, answer)
            self.assertIn(wanted or "", answer[1])
        vm.child.terminate()
        self.assertEqual(vm.wait(), lab.STOPPED)
        self.assertEqual(os.listdir(run), [])


if __name__ == "__main__":
    unittest.main()

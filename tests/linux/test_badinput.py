# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear line, an exit status that is not 0, nothing left behind."""

import json
import os
import struct
import subprocess
import unittest

import ferrylab as lab
from ferrylab import LabTest

MIB = 1024 * 1024
PT_LOAD, PT_NOTE = 1, 4


def elf64(segments, entry=MIB, machine=62):
    """A little ELF64 executable; segments are (type, paddr, data, memsz)."""
    ehsize, phsize = 64, 56
    offset = ehsize + phsize * len(segments)
    headers, body = b"", b""
    for kind, paddr, data, memsz in segments:
        headers += struct.pack("<IIQQQQQQ", kind, 7, offset + len(body), paddr, paddr, len(data),
                               memsz, 1)
        body += data
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    return (struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, entry, ehsize, 0, 0, ehsize,
                        phsize, len(segments), 0, 0, 0) + headers + body)


CODE = b"\xf4" * 64  # hlt
GOOD = elf64([(PT_LOAD, MIB, CODE, 4096)])


class BadInput(LabTest):
    def setUp(self):
        super().setUp()
        self.kernel = self.file("good.elf", GOOD)

    def file(self, name, content):
        path = self.lab.path(name)
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
        return path

    def left_behind(self):
        """Files under our directory, and what a VM would leave in /dev/shm or as a process."""
        files = sorted(os.path.join(where, name) for where, _, names in os.walk(self.lab.dir)
                       for name in names)
        mine = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())],
                              capture_output=True, text=True, check=True).stdout.split("\n")
        return files, [line for line in mine if line.endswith("ferry")], os.listdir("/dev/shm")

    def refused(self, *args, says, status=lab.USAGE, command="run", **options):
        """Runs ferry; it refuses in one line that holds each text of `says`. Status None: the host
        decides which failure comes first."""
        before = self.left_behind()
        result = self.lab.ferry(command, *args, limit=60, **options)
        wanted = (lab.FAILED, lab.USAGE, lab.HOST) if status is None else (status,)
        self.assertIn(result.status, wanted, str(result))
        self.assertEqual("", result.stdout, str(result))
        lines = result.stderr.split("\n")
        self.assertEqual((2, ""), (len(lines), lines[-1]), str(result))
        self.assertTrue(lines[0].startswith("ferry: "), str(result))
        self.assertLess(len(lines[0]), 400, str(result))
        for text in [says] if isinstance(says, str) else says:
            self.assertIn(text, lines[0], str(result))
        self.assertEqual(before, self.left_behind())

    def test_the_good_kernel_is_good(self):
        self.assertEqual(lab.OK, self.lab.ferry("run", "-k", self.kernel, "--dry-run").status)

    def test_kernel_files(self):
        self.refused(says="--kernel")
        missing = self.lab.path("missing")
        self.refused("-k", missing, says=[missing, "No such file"], status=lab.FAILED)
        self.refused("-k", self.lab.dir, says=[self.lab.dir, "irectory"], status=None)
        for name, content in {
            "empty": b"", "short": b"\x7fELF\x02\x01\x01", "text": "not a kernel\n" * 400,
            "noise": bytes(i * 167 % 251 for i in range(100000)), "half": GOOD[:100],
            "other-machine": elf64([(PT_LOAD, MIB, CODE, 64)], machine=183),
            "nothing-to-load": elf64([]), "zeroes": bytes(65536),
        }.items():
            with self.subTest(kernel=name):
                path = self.file(name, content)
                self.refused("-k", path, says=path)

    def test_one_terminal_for_two_consoles(self):
        self.refused("-k", self.kernel, "--vconsole", "stdio", "--console", "stdio",
                     says="2 consoles and ports on stdio")
        self.assertStatus(self.lab.ferry("run", "-k", self.kernel, "--vconsole", "stdio",
                                         "--dry-run"), lab.OK)

    def test_unreadable_kernel(self):
        self.refused("-k", "/proc/self/mem", says="/proc/self/mem", status=None)

    def test_elf_segments(self):
        for name, segments, word in (
            ("outside", [(PT_LOAD, 200 * MIB, CODE, 4096)], "0x"),
            ("beyond", [(PT_LOAD, MIB, CODE, 1 << 40)], "0x"),
            ("wraps", [(PT_LOAD, (1 << 64) - 4096, CODE, 8192)], "0x"),
            ("overlap", [(PT_LOAD, MIB, CODE, 8192), (PT_LOAD, MIB + 4096, CODE, 4096)], "overlap"),
            ("more-file-than-memory", [(PT_LOAD, MIB, CODE, 8)], ""),
        ):
            with self.subTest(elf=name):
                path = self.file(name, elf64(segments))
                self.refused("-k", path, "-m", "64M", says=[path, word])

    def test_entry_outside_the_image(self):
        path = self.file("entry", elf64([(PT_LOAD, MIB, CODE, 4096)], entry=48 * MIB))
        self.refused("-k", path, says=[path, "0x3000000"])

    def test_damaged_bzimage(self):
        with open(lab.guest_file("bzImage"), "rb") as f:
            image = f.read()
        for name, content in (("cut", image[:len(image) // 2]),
                              ("flipped", image[:-300000] + bytes(100) + image[-299900:]),
                              ("header-only", image[:1024])):
            with self.subTest(image=name):
                path = self.file(name, content)
                self.refused("-k", path, says=path)

    def test_initrd(self):
        big = self.lab.path("big")
        with open(big, "wb") as f:
            f.truncate(100 * MIB)
        self.refused("-k", self.kernel, "-m", "64M", "-i", big, says=[big, "102400 KiB"])
        missing = self.lab.path("missing")
        self.refused("-k", self.kernel, "-i", missing, says=[missing, "No such file"],
                     status=lab.FAILED)
        self.refused("-k", self.kernel, "-i", self.lab.dir, says=self.lab.dir, status=None)

    def test_memory(self):
        for value in ("0", "-1", "1M", "lots", "12X", "", "99999999T", "1e3", "18446744073709551616",
                      "20000000000000K", "16777217K0"):
            with self.subTest(memory=value):
                self.refused("-k", self.kernel, f"--memory={value}",
                             says=["--memory", f"'{value}'", "expected"])

    def test_memory_the_host_does_not_have(self):
        # More address space than a process has on common hosts (47 bits, less on some).
        self.refused("-k", self.kernel, "--backing", "hugetlb", "-m", "8T", says="8", status=None)

    def test_cpus(self):
        for value in ("0", "10000", "65", "-1", "two", "", "1.5", "0x2", "99999999999999999999"):
            with self.subTest(cpus=value):
                self.refused("-k", self.kernel, f"--cpus={value}",
                             says=["--cpus", f"'{value}'", "1 to 64"])

    def test_cpu_model(self):
        for value in ("host,-nosuchflag", "pentium", "", "host,", "host,cx16"):
            with self.subTest(cpu=value):
                self.refused("-k", self.kernel, f"--cpu={value}", says="--cpu")
        self.refused("-k", self.kernel, "--cpu=host,-nosuchflag", says="nosuchflag")

    def test_command_line(self):
        self.refused("-k", self.kernel, "-a", "x" * 5000, says=["5000", "command line"])

    def test_console(self):
        for value in ("", "teletype", "file:", "unix:", "fd:", "fd:x", "fd:-1", "unix:" + "x" * 200,
                      "stdio,escape=", "stdio,what"):
            with self.subTest(console=value):
                self.refused("-k", self.kernel, f"--console={value}", says="console")
        for value in ("fd:999", "file:/nonexistent/dir/file", "unix:/nonexistent/dir/socket",
                      "pty,link=/nonexistent/dir/link"):
            with self.subTest(console=value):
                self.refused("-k", self.kernel, f"--console={value}",
                             says=value.split(":")[-1].split("=")[-1], status=None)

    def test_name(self):
        for value in ("", "a/b", ".hidden", "x" * 64, "..", "a\nb", "\x1b[31m"):
            with self.subTest(name=value):
                self.refused("-k", self.kernel, f"--name={value}", says="name")

    def test_other_values(self):
        for option, value in (("--boot", "uefi"), ("--backing", "paper"), ("--numa", "everywhere"),
                              ("--numa", "bind:999"), ("--log", "loud"), ("--control", "maybe")):
            with self.subTest(option=option, value=value):
                self.refused("-k", self.kernel, option, value, says=value, status=None)

    def test_arguments(self):
        self.refused("--nonsense", says="--nonsense")
        self.refused("-Z", says="-Z")
        self.refused("-k", says="-k")
        self.refused("-k", self.kernel, "surplus", says="surplus")
        self.refused("-k", self.kernel, "--dry-run=yes", says="--dry-run")
        self.refused(command="frobnicate", says="frobnicate")
        self.refused("--json=yes", command="version", says="--json")
        self.refused("surplus", command="check", says="surplus")
        self.refused("--nonsense", command="check", says="--nonsense")

    def test_config(self):
        for name, content, says in (
            ("syntax", "{", "syntax"), ("list", "[]", "object"),
            ("unknown", '{"colour": "red"}', "colour"),
            ("value", '{"cpus": 0}', "cpus"), ("type", '{"cpus": [1]}', "cpus"),
            ("twice", '{"cpus": 1, "cpus": 2}', "cpus"), ("nested", '{"config": "x"}', "config"),
            ("null", '{"name": null}', "name"), ("empty", "", "empty"),
            ("receiver", '{"listen": "tcp:0:0"}', "listen"),
        ):
            with self.subTest(config=name):
                path = self.file(name, content)
                self.refused("-k", self.kernel, "--config", path, says=[path, says])
        missing = self.lab.path("missing")
        self.refused("--config", missing, says=missing, status=None)

    def test_no_vm_of_that_name(self):
        for command, more in (("info", []), ("pause", []), ("resume", []), ("stop", []),
                              ("snapshot", ["file"]), ("migrate", ["tcp:127.0.0.1:1"])):
            with self.subTest(command=command):
                self.refused("nobody", *more, command=command, says="nobody", status=lab.FAILED)
                self.refused(command=command, says="", status=lab.USAGE)

    def test_restore(self):
        self.refused(command="restore", says="FILE")
        for name, content in (("empty", b""), ("text", "no snapshot\n" * 100),
                              ("magic", b"FERRYSNP" + bytes(100))):
            with self.subTest(file=name):
                path = self.file(name, content)
                self.refused(path, command="restore", says=name, status=None)  # in a jail: from its root
        self.refused(self.lab.path("missing"), command="restore", says="missing", status=lab.FAILED)

    def test_addresses(self):
        for value in ("", "tcp:", "7000", "tcp:127.0.0.1", "tcp:127.0.0.1:99999", "udp:127.0.0.1:1",
                      "tcp:127.0.0.1:x"):
            with self.subTest(listen=value):
                self.refused(f"--listen={value}", command="receive", says=value, status=None)
        self.refused("--listen", "tcp:192.0.2.1:7000", command="receive", says="192.0.2.1",
                     status=lab.FAILED)

    def test_name_in_use(self):
        first = self.lab.vm("run", "-k", lab.bare_guest("halt.elf"), name="taken")
        first.wait_for(b"")
        while not self.lab.ferry("info", "taken").status == lab.OK:
            self.assertIsNone(first.child.poll(), first.errors())
        self.refused("-k", self.kernel, "--name", "taken", "--console", "null", says=["taken"],
                     status=lab.FAILED)
        self.assertEqual("running", self.lab.ferry("info", "taken", "--json").json()["state"])

    def test_socket_of_a_dead_vm_is_taken_over(self):
        first = self.lab.vm("run", "-k", lab.bare_guest("halt.elf"), name="dead")
        while not self.lab.ferry("info", "dead").status == lab.OK:
            self.assertIsNone(first.child.poll(), first.errors())
        first.end()
        self.assertEqual(["dead.json", "dead.sock"], self.lab.sockets())
        second = self.lab.vm("run", "-k", lab.bare_guest("poweroff.elf"), name="dead")
        self.assertEnds(second, lab.OK)

    def test_no_access_to_kvm(self):
        if os.geteuid():
            self.skipTest("only root can become a user without access")
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        probe = subprocess.run([*nobody, "test", "-r", "/dev/kvm"], check=False)
        if not probe.returncode:
            self.skipTest("/dev/kvm is open to everybody here")
        for path in (lab.FERRY, self.kernel):
            if subprocess.run([*nobody, "test", "-r", path], check=False).returncode:
                os.chmod(self.lab.dir, 0o755)
        run_dir = self.lab.path("nobody")
        os.mkdir(run_dir)
        os.chown(run_dir, 65534, 65534)
        env = {**self.lab.env, "FERRY_RUN_DIR": run_dir}
        self.refused("-k", self.kernel, env=env, enter=nobody, status=lab.HOST,
                     says=["/dev/kvm", "group kvm"])
        check = self.lab.ferry("check", "--json", env=env, enter=nobody)
        self.assertEqual(lab.HOST, check.status)
        self.assertFalse(json.loads(check.stdout)["can_run"])


if __name__ == "__main__":
    unittest.main()

# SPDX-License-Identifier: Apache-2.0
"""The program as its user meets it: help, man page, completion, configuration, consoles, control."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import termios
import unittest

import ferrylab as lab
from ferrylab import LabTest

COMMANDS = ("run", "check", "info", "console", "pause", "resume", "stop", "reset", "ls", "ps", "kill", "rm", "prune",
            "top", "events", "set", "snapshot", "restore", "migrate",
            "receive", "version", "sched")
SCHED = ("daemon", "status", "top", "set", "trace", "sim")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
SHORT = re.compile(r"(?m)^ +-(\w), --([a-z-]+)")
ESCAPE = b"\x1d"  # Ctrl-]


class Texts(LabTest):
    def help(self, *command):
        result = self.lab.ferry(*command, "--help")
        self.assertStatus(result, lab.OK)
        self.assertEqual("", result.stderr)
        return result.stdout

    def options(self, *command):
        """What the help text lists; its examples may show other commands' options."""
        text = re.sub(r"(?ms)^examples?:.*?(\n\n|\Z)", "\n", self.help(*command))
        return set(OPTION.findall(text)), text

    def test_commands_in_help_exist_and_have_help(self):
        text = self.assertStatus(self.lab.ferry("help"), lab.OK).stdout
        listed = re.findall(r"(?m)^  ([a-z]+)  ", text)
        self.assertEqual(sorted(COMMANDS), sorted(listed))
        for command in listed:
            with self.subTest(command=command):
                self.assertIn(f"ferry {command}", self.help(command))
        self.assertEqual(text, self.lab.ferry("--help").stdout)
        self.assertStatus(self.lab.ferry(), lab.USAGE)

    def test_options_in_help_are_known(self):
        """What a help text lists is not answered with "unknown option"."""
        for command in COMMANDS:
            options, text = self.options(command)
            for option in sorted(options - {"help"}):
                with self.subTest(command=command, option=option):
                    value = ["x"] if re.search(rf"--{option} [A-Z]", text) else []
                    # What would wait for its API or a key ends by itself.
                    ends = {"run": ["--kernel", "/missing"], "top": ["--count", "1"]}
                    result = self.lab.ferry(command, *ends.get(command, []), f"--{option}", *value)
                    self.assertNotRegex(result.stderr, "unknown|bad option")
        self.assertRegex(self.lab.ferry("run", "--nonsense").stderr, "unknown")
        self.assertRegex(self.lab.ferry("check", "--nonsense").stderr, "bad option")

    def test_short_options(self):
        """A short option does what its long form does."""
        kernel = lab.bare_guest("hello.elf")
        values = {"kernel": kernel, "initrd": "/missing", "append": "x", "boot": "none",
                  "cpus": "0", "memory": "0", "cpu": "none", "backing": "none", "numa": "none",
                  "console": "none", "name": "a/b"}
        for brief, name in SHORT.findall(self.help("run")):
            if name not in values:
                continue
            with self.subTest(option=name):
                long = self.lab.ferry("run", "--dry-run", "-k", kernel, f"--{name}", values[name])
                short = self.lab.ferry("run", "--dry-run", "-k", kernel, f"-{brief}", values[name])
                anonymous = re.compile(r"ferry-\d+")
                self.assertEqual([anonymous.sub("", t) for t in (long.stdout, long.stderr)],
                                 [anonymous.sub("", t) for t in (short.stdout, short.stderr)])
                self.assertEqual(long.status, short.status)

    def test_man_page_and_help_name_the_same_options(self):
        with open(os.path.join(lab.ROOT, "docs", "ferry.1")) as f:
            page = f.read()
        # .Fl -name in mdoc is --name; examples are set as they are typed.
        in_page = set(re.findall(r"Fl (?:\w , )?-([a-z][a-z-]*)", page)) | set(OPTION.findall(page))
        in_page |= set(re.findall(r", -([a-z][a-z-]+)", page))
        in_help = set()
        for command in COMMANDS:
            in_help |= self.options(command)[0]
        for command in SCHED:
            in_help |= self.options("sched", command)[0]
        in_help -= {"help"}
        self.assertEqual(sorted(in_help), sorted(in_page - {"help"}))
        for command in COMMANDS + SCHED:
            self.assertRegex(page, rf"\b{command}\b")

    def test_exit_statuses_in_the_man_page(self):
        with open(os.path.join(lab.ROOT, "docs", "ferry.1")) as f:
            page = f.read()
        with open(os.path.join(lab.ROOT, "vmm", "exit_status.h")) as f:
            codes = re.findall(r"EXIT_\w+ = (\d+)", f.read())
        documented = re.findall(r"(?m)^\.It (\d+)$", page)
        self.assertEqual([c for c in codes if int(c) < 27], documented)

    def test_man_page_renders(self):
        man = subprocess.run(["man", "--warnings", "-l", os.path.join(lab.ROOT, "docs", "ferry.1")],
                             capture_output=True, text=True, check=False,
                             env={**os.environ, "MANPAGER": "cat"}) if self.have("man") else None
        if not man:
            self.skipTest("no man")
        self.assertEqual("", man.stderr)
        self.assertIn("--kernel", man.stdout)

    @staticmethod
    def have(program):
        return any(os.access(os.path.join(d, program), os.X_OK) for d in os.get_exec_path())

    def complete(self, *words):
        """What bash would offer for the last word."""
        script = os.path.join(lab.ROOT, "scripts", "completion", "ferry.bash")
        done = subprocess.run(
            ["bash", "--norc", "-c", 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
             '_ferry; printf "%s\\n" "${COMPREPLY[@]}"', script, lab.FERRY, *words],
            capture_output=True, text=True, check=True, env=self.lab.env, cwd=self.lab.dir)
        self.assertEqual("", done.stderr)
        return sorted(line for line in done.stdout.split("\n") if line)

    def test_completion(self):
        self.assertEqual(sorted(COMMANDS), self.complete(""))
        self.assertEqual(["receive", "reset", "restore", "resume"], self.complete("re"))
        self.assertEqual(["--memory"], self.complete("run", "--mem"))
        self.assertEqual(["pvh"], self.complete("run", "--boot", "p"))
        self.assertEqual(["hybrid", "postcopy", "precopy"], self.complete("migrate", "--mode", ""))
        for command in COMMANDS:
            options = sorted(f"--{option}" for option in self.options(command)[0])
            self.assertEqual(options, self.complete(command, "--"), command)
        self.assertEqual(sorted(SCHED), self.complete("sched", ""))
        for command in SCHED:
            options = {f"--{option}" for option in self.options("sched", command)[0]}
            self.assertEqual(sorted(options), self.complete("sched", command, "--"), command)
        with open(self.lab.path("a-kernel"), "w"):
            pass
        self.assertEqual(["a-kernel"], self.complete("run", "--kernel", "a-k"))
        vm = self.lab.vm("run", "-k", lab.bare_guest("halt.elf"), name="completes-me")
        while not vm.ferry("info").status == lab.OK:
            self.assertIsNone(vm.child.poll(), vm.errors())
        self.assertEqual(["completes-me"], self.complete("stop", "comp"))

    def test_each_command_has_json_and_an_example(self):
        for command in set(COMMANDS) - {"migrate"}:
            with self.subTest(command=command):
                self.assertIn("json", self.options(command)[0])
        for command in set(COMMANDS) - {"check", "version", "migrate", "receive", "restore"}:
            with self.subTest(command=command):
                self.assertRegex(self.help(command), r"(?m)^examples?:")

    def test_json_texts(self):
        version = self.assertStatus(self.lab.ferry("version", "--json"), lab.OK).json()
        self.assertRegex(version["version"], r"^\d+\.\d+")
        self.assertIn(version["version"], self.lab.ferry("--version").stdout)
        check = self.lab.ferry("check", "--json").json()
        self.assertTrue(check["can_run"])
        self.assertIn("/dev/kvm", json.dumps(check["findings"]))
        for finding in check["findings"]:
            self.assertIn(finding["status"], ("ok", "warn", "lack"))
            self.assertEqual(finding["status"] == "ok", not finding["remedy"], finding)
        self.assertEqual("", self.assertStatus(self.lab.ferry("check", "--quiet"), lab.OK).stdout)


class Configuration(LabTest):
    def describe(self, *args):
        return self.assertStatus(self.lab.ferry("run", "--dry-run", *args), lab.OK).json()

    def config(self, **keys):
        path = self.lab.path("config.json")
        with open(path, "w") as f:
            json.dump(keys, f)
        return path

    def test_config_equals_flags(self):
        kernel = lab.bare_guest("hello.elf")
        flags = ["--kernel", kernel, "--append", "a=1 b", "--boot", "pvh", "--cpus", "3", "--memory",
                 "1G", "--cpu", "host,-cx16", "--backing", "memfd", "--console", "null", "--name",
                 "same", "--control", "false", "--trace", "--log", "warn", "--ucall", "--debug-exit",
                 "--mark"]
        config = self.config(**{
            "kernel": kernel, "append": "a=1 b", "boot": "pvh", "cpus": 3, "memory": "1G",
            "cpu": "host,-cx16", "backing": "memfd", "console": "null", "name": "same",
            "control": False, "trace": True, "log": "warn", "ucall": True, "debug-exit": True,
            "mark": True})
        by_flags = self.describe(*flags)
        self.assertEqual(by_flags, self.describe("--config", config))
        self.assertEqual({"cpus": 3, "memory": "1G", "boot": "pvh", "name": "same"},
                         {key: by_flags[key] for key in ("cpus", "memory", "boot", "name")})
        # What --dry-run prints is a configuration itself.
        self.assertEqual(by_flags, self.describe("--config", self.config(**by_flags)))
        # The later one counts.
        self.assertEqual(2, self.describe("--config", config, "--cpus", "2")["cpus"])
        self.assertEqual(3, self.describe("--cpus", "2", "--config", config)["cpus"])

    def test_dry_run_starts_nothing(self):
        before = sorted(os.listdir(self.lab.dir))
        log = self.lab.path("log")
        self.describe("--kernel", lab.bare_guest("hello.elf"), "--name", "dry", "--console", "null")
        self.assertEqual([], self.lab.sockets())
        self.assertFalse(os.path.exists(log))
        self.assertLessEqual(set(os.listdir(self.lab.dir)) - set(before), {"run"})


class Control(LabTest):
    def test_info_pause_resume_stop(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("incr.elf"), "-m", "32M", "-c", "2", "-a",
                         "pages=256")
        vm.wait_for(b"sync 1")
        info = self.assertStatus(vm.ferry("info", "--json"), lab.OK).json()
        self.assertEqual((vm.name, "running", vm.pid, 32 << 20, 2),
                         (info["name"], info["state"], info["pid"], info["memory_bytes"],
                          len(info["vcpus"])))
        self.assertStatus(vm.ferry("pause"), lab.OK)
        self.assertEqual("paused", vm.ferry("info", "--json").json()["state"])
        self.assertStatus(vm.ferry("pause"), lab.OK)  # is paused: nothing to do, nothing wrong
        self.assertStatus(vm.ferry("resume"), lab.OK)
        self.assertEqual("running", vm.ferry("info", "--json").json()["state"])
        self.assertIn("not paused", self.assertStatus(vm.ferry("resume"), lab.FAILED).stderr)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED, "stop")

    def attached(self, console, says):
        """`ferry console` on a terminal of its own; what is typed comes back from the guest."""
        vm = self.lab.start(lab.Process([lab.FERRY, "run", "-k", lab.bare_guest("serial.elf"),
                                         "--name", "attached", "--console", console, "--ucall"],
                                        env=self.lab.env))
        vm.stderr.wait(b"sync")
        ours, theirs = pty.openpty()
        client = self.lab.start(lab.Process([lab.FERRY, "console", "attached"], env=self.lab.env,
                                            stdin=theirs, stdout=theirs))
        os.close(theirs)
        where = self.assertStatus(self.lab.ferry("console", "attached", "--json"), lab.OK)
        self.assertIn(where.json()["console"], self.lab.ferry("info", "attached").stdout)
        screen = lab.Stream(ours, "the terminal")
        for text in says:
            os.write(ours, text.encode())
            screen.wait(text.encode())
        os.write(ours, b"\x1dq")
        self.assertEqual(lab.OK, client.wait(), client.errors())
        self.assertIsNone(vm.child.poll(), vm.errors())
        self.assertStatus(self.lab.ferry("stop", "attached"), lab.OK)
        self.assertEqual(lab.STOPPED, vm.wait(), vm.errors())
        screen.thread.join(lab.LIMIT)
        os.close(ours)

    def test_console_is_attached(self):
        self.attached("pty", ["hello", "world"])
        self.attached("unix:" + self.lab.path("console"), ["one", "two"])
        vm = self.lab.vm("run", "-k", lab.bare_guest("halt.elf"), "--ucall")
        vm.stderr.wait(b"sync")
        self.assertIn("--console pty", self.assertStatus(vm.ferry("console"), lab.USAGE).stderr)
        self.assertStatus(self.lab.ferry("console", "nobody"), lab.FAILED)

    def test_probes_are_those_of_the_guide(self):
        if not shutil.which("readelf"):
            self.skipTest("readelf is missing (package binutils)")
        notes = subprocess.run(["readelf", "--notes", "--wide", lab.FERRY], capture_output=True,
                               text=True, check=True).stdout
        there = set(re.findall(r"Provider: ferry\s+Name: (\w+)", notes))
        if not there:
            self.skipTest("built without <sys/sdt.h> (package systemtap-sdt-dev)")
        with open(os.path.join(lab.ROOT, "docs", "tracing.md")) as f:
            listed = set(re.findall(r"(?m)^\| `(\w+)` \|", f.read()))
        self.assertEqual(listed, there)

    def test_log_formats(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("poweroff.elf"), "--ucall", "--log-format",
                         "json")
        self.assertEnds(vm, lab.OK)
        lines = [json.loads(line) for line in vm.errors().splitlines()]
        self.assertEqual({vm.name}, {line["vm"] for line in lines})
        self.assertIn(("info", "powered off: the guest powered off"),
                      [(line["level"], line["text"]) for line in lines])
        with open(self.lab.path("journal"), "wb") as journal:
            st = os.fstat(journal.fileno())
            subprocess.run([lab.FERRY, "run", "-k", lab.bare_guest("poweroff.elf"), "--console",
                            "null"], stderr=journal, timeout=lab.LIMIT, check=True,
                           env={**self.lab.env, "JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino}"})
        with open(self.lab.path("journal")) as journal:
            self.assertRegex(journal.read(), r"(?m)^<6>ferry: .*powered off")

    def listener(self, *args, n=0):
        """A guest that hears its power button, and ends at the n-th press (0: never)."""
        vm = self.lab.vm("run", "-k", lab.bare_guest("listen.elf"), "--ucall", "-a", f"n={n}", *args)
        vm.stderr.wait(b"sync 1")
        return vm

    def test_a_guest_that_listens_is_asked_to_end(self):
        vm = self.listener(n=1)
        os.kill(vm.pid, signal.SIGTERM)
        self.assertEnds(vm, lab.OK)
        vm = self.listener(n=1)
        self.assertStatus(vm.ferry("stop", "--powerbutton"), lab.OK)
        self.assertEnds(vm, lab.OK)

    def test_who_does_not_end_is_ended(self):
        vm = self.listener("--stop-timeout", "1")
        os.kill(vm.pid, signal.SIGTERM)
        self.assertEnds(vm, lab.STOPPED, "did not end within 1 s")
        vm = self.listener("--stop-timeout", "3600")
        os.kill(vm.pid, signal.SIGTERM)
        vm.stderr.wait(b"has 3600 s to end")
        self.assertEqual("stopping", self.assertStatus(vm.ferry("info", "--json"),
                                                       lab.OK).json()["state"])
        self.assertIn("stopping", self.assertStatus(vm.ferry("pause"), lab.FAILED).stderr)
        os.kill(vm.pid, signal.SIGTERM)
        self.assertEnds(vm, lab.STOPPED, signal.strsignal(signal.SIGTERM))
        vm = self.listener("--stop-timeout", "0")
        os.kill(vm.pid, signal.SIGTERM)
        self.assertEnds(vm, lab.STOPPED, signal.strsignal(signal.SIGTERM))
        vm = self.listener("--stop-timeout", "3600")
        self.assertStatus(vm.ferry("stop", "--powerbutton"), lab.OK)
        self.assertStatus(vm.ferry("stop"), lab.OK)
        self.assertEnds(vm, lab.STOPPED, "ferry stop")

    def test_signals(self):
        """At once, for a guest without a driver for the power button."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(signal=number):
                vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall")
                vm.stderr.wait(b"sync")
                os.kill(vm.pid, number)
                self.assertEnds(vm, lab.STOPPED, signal.strsignal(number))

    def test_without_control_socket(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--control", "false")
        vm.stderr.wait(b"sync")
        self.assertEqual([], self.lab.sockets())
        vm.child.terminate()
        self.assertEnds(vm, lab.STOPPED)

    def test_trace(self):
        vm = self.lab.vm("run", "-k", lab.bare_guest("poweroff.elf"), "--trace")
        self.assertEnds(vm, lab.OK)
        self.assertRegex(vm.errors(), r"(?i)exits")


class Consoles(LabTest):
    """The guest `serial` echoes what it gets on COM1, which is the console."""

    def echo_guest(self, console, **options):
        argv = [lab.FERRY, "run", "-k", lab.bare_guest("serial.elf"), "--ucall", "--name", "echo",
                "--console", console]
        vm = self.lab.start(lab.Process(argv, env=self.lab.env, **options))
        vm.name = "echo"
        return vm

    def ready(self, vm):
        vm.stderr.wait(b"sync")
        return vm

    def test_file(self):
        path = self.lab.path("console.log")
        with open(path, "w") as f:
            f.write("old")
        vm = self.lab.start(lab.Process(
            [lab.FERRY, "run", "-k", lab.bare_guest("hello.elf"), "--debug-exit", "--console",
             f"file:{path}"], env=self.lab.env))
        self.assertEqual(lab.OK, vm.wait(), vm.errors())
        with open(path) as f:
            text = f.read()
        self.assertIn("sync 1", text)
        self.assertNotIn("old", text)

    def test_unix_socket(self):
        path = self.lab.path("console.sock")
        vm = self.ready(self.echo_guest(f"unix:{path}"))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            reader = lab.Stream(client.fileno(), "socket")
            client.sendall(b"over a socket\n")
            reader.wait(b"over a socket")
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(path)
                second.settimeout(lab.LIMIT)
                answer = b""
                while chunk := second.recv(4096):
                    answer += chunk
                self.assertTrue(answer, "the second client is told nothing")
            client.sendall(b"still there\n")
            reader.wait(b"still there")
            vm.child.terminate()
            reader.rest()
        self.assertEnds(vm, lab.STOPPED)
        self.assertFalse(os.path.exists(path))

    def test_pty(self):
        link = self.lab.path("tty")
        vm = self.ready(self.echo_guest(f"pty,link={link}"))
        tty = os.open(link, os.O_RDWR | os.O_NOCTTY)
        try:
            os.set_blocking(tty, True)
            os.write(tty, b"over a pty\n")
            reader = lab.Stream(tty, "pty")
            reader.wait(b"over a pty")
            info = self.lab.ferry("info", "echo", "--json").json()
            self.assertEqual(os.readlink(link), info["console"])
            vm.child.terminate()
            self.assertEnds(vm, lab.STOPPED)
            reader.rest()
        finally:
            os.close(tty)
        self.assertFalse(os.path.lexists(link))

    def test_pipes(self):
        """stdio without a terminal: the escape key is a byte like others."""
        vm = self.ready(self.echo_guest("stdio", stdin=subprocess.PIPE))
        with vm.child.stdin:
            vm.child.stdin.write(b"piped " + ESCAPE + b"q\n")
            vm.child.stdin.flush()
            vm.stdout.wait(b"piped " + ESCAPE + b"q")
        vm.child.terminate()
        self.assertEnds(vm, lab.STOPPED)

    def on_terminal(self):
        """The echo guest on a terminal of its own; terminal's other side and its old settings."""
        ours, theirs = os.openpty()
        self.addCleanup(os.close, theirs)
        before = termios.tcgetattr(theirs)
        vm = self.ready(self.echo_guest("stdio", stdin=theirs, stdout=theirs))
        self.addCleanup(os.close, ours)
        return vm, ours, theirs, before, lab.Stream(os.dup(ours), "terminal")

    def test_terminal_and_escape_key(self):
        vm, ours, theirs, before, screen = self.on_terminal()
        self.assertNotEqual(before, termios.tcgetattr(theirs))
        os.write(ours, b"typed\x03\x1a")  # Ctrl-C and Ctrl-Z are the guest's
        screen.wait(b"typed\x03\x1a")
        os.write(ours, ESCAPE + b"?")
        screen.wait(re.compile(rb"(?i)quit"))
        os.write(ours, ESCAPE + ESCAPE)
        screen.wait(ESCAPE)
        os.write(ours, ESCAPE)
        os.write(ours, b"q")
        self.assertEnds(vm, lab.STOPPED)
        self.assertEqual(before, termios.tcgetattr(theirs))

    def test_terminal_is_restored_after_a_signal(self):
        vm, _, theirs, before, _ = self.on_terminal()
        vm.child.terminate()
        self.assertEnds(vm, lab.STOPPED)
        self.assertEqual(before, termios.tcgetattr(theirs))


if __name__ == "__main__":
    unittest.main()

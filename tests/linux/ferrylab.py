# SPDX-License-Identifier: Apache-2.0
"""What the tests that run the ferry program share: VMs with their consoles, one-shot commands,
network namespaces. Python's standard library only.

Environment (scripts/test sets it): FERRY the program, FERRY_BUILD the build directory, FERRY_GUEST
the Linux guest, FERRY_LONG=1 the long variants. FERRY_TEST_SECCOMP=on|off|log gives every VM that
--seccomp, FERRY_TEST_JAIL=1 every `ferry run` a --jail. Tests wait for events; LIMIT only ends what
hangs.
"""

import atexit
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("FERRY_BUILD") or os.path.join(ROOT, "build")
FERRY = os.environ.get("FERRY") or os.path.join(BUILD, "ferry")
CACHE = os.environ.get("FERRY_CACHE") or os.path.expanduser("~/.cache/ferry")
GUEST = os.environ.get("FERRY_GUEST") or os.path.join(CACHE, "guest")
LONG = bool(os.environ.get("FERRY_LONG"))
SECCOMP = os.environ.get("FERRY_TEST_SECCOMP")
JAIL = os.environ.get("FERRY_TEST_JAIL") == "1" and not os.geteuid()
JAIL_UID, JAIL_GID = 4321, 4322  # nobody's, on any host: the kernel does not ask for a name
if JAIL:
    os.umask(0)  # disks that tests make are the VM's to write to

LIMIT = 300  # seconds; hosts that emulate the guest's ring 0 boot Linux in 10 to 25 s

# vmm/exit_status.h
OK, FAILED, USAGE, HOST = 0, 1, 2, 3
REBOOT, PANIC, TRIPLE_FAULT, EMULATION, STOPPED = 16, 17, 18, 19, 20

PROMPT = b"ferry# "

# Told to end, a test run ends what it started: atexit functions run, which they do not by default.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def guest_file(name):
    path = os.path.join(GUEST, name)
    if not os.path.exists(path):
        raise unittest.SkipTest(f"{path} is missing: run guest/build")
    return path


def bare_guest(name):
    path = os.path.join(BUILD, "guest", "bare", name)
    if not os.path.exists(path):
        raise unittest.SkipTest(f"{path} is missing: build with meson")
    return path


def guest_cmdline(*extra, drop=()):
    """The guest's own command line, without the words that start with one of `drop`."""
    with open(guest_file("cmdline")) as f:
        words = [word for word in f.read().split() if not word.startswith(tuple(drop))]
    return " ".join(words + list(extra))


class Stream:
    """Collects what comes from a file descriptor, so that nobody ever waits for us to read."""

    def __init__(self, fd, label):
        self.fd, self.label = fd, label
        self.data = bytearray()
        self.ended = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        while True:
            try:
                chunk = os.read(self.fd, 65536)
            except OSError:  # a pty whose other side closed
                chunk = b""
            with self.changed:
                self.data += chunk
                self.ended |= not chunk
                self.changed.notify_all()
            if not chunk:
                return

    def wait(self, pattern, start=0, limit=LIMIT):
        """The first match of `pattern` (bytes: literal; compiled: as it is) from `start` on."""
        if isinstance(pattern, bytes):
            pattern = re.compile(re.escape(pattern))
        found = None

        def seen():
            nonlocal found
            found = pattern.search(self.data, start)
            return found or self.ended

        with self.changed:
            self.changed.wait_for(seen, limit)
            if not found:
                why = "ended" if self.ended else f"nothing for {limit} s"
                raise AssertionError(f"{self.label}: no {pattern.pattern!r} ({why}) after byte "
                                     f"{start}; last: {bytes(self.data[-600:])!r}")
            # A copy: the match refers to a buffer that grows.
            return re.compile(pattern.pattern, pattern.flags).search(bytes(self.data), start)

    def rest(self, limit=LIMIT):
        """Everything, once the other side has closed."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.ended, limit):
                raise AssertionError(f"{self.label}: still open after {limit} s")
            return bytes(self.data)

    def size(self):
        with self.changed:
            return len(self.data)


class Process:
    """A child with its stderr collected; ends by its pid."""

    def __init__(self, argv, env=None, pass_fds=(), stdin=subprocess.DEVNULL,
                 stdout=subprocess.PIPE, **options):
        self.argv = argv
        self.child = subprocess.Popen(argv, env=env, pass_fds=pass_fds, stdin=stdin, stdout=stdout,
                                      stderr=subprocess.PIPE, **options)
        self.stderr = Stream(self.child.stderr.fileno(), "stderr")
        self.stdout = Stream(self.child.stdout.fileno(), "stdout") if self.child.stdout else None

    @property
    def pid(self):
        return self.child.pid

    def wait(self, limit=LIMIT):
        """Exit status; everything it said has then been collected."""
        status = self.child.wait(limit)
        self.stderr.rest(limit)
        return status

    def errors(self):
        return bytes(self.stderr.data).decode(errors="replace")

    def end(self):
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        for stream, pipe in ((self.stderr, self.child.stderr), (self.stdout, self.child.stdout)):
            if stream:
                stream.thread.join(LIMIT)
                pipe.close()


class Vm(Process):
    """`ferry run`, `receive` or `restore` with the console on a socket pair."""

    def __init__(self, lab, command, *args, name=None, namespace=None, ferry=FERRY, fds=()):
        self.name = name or lab.new_name()
        ours, theirs = socket.socketpair()
        self.socket = ours
        argv = [ferry, command, *lab.walls(command, *args), *args, "--name", self.name,
                "--console", f"fd:{theirs.fileno()}"]
        if namespace:  # a Namespaces.Side
            argv = namespace.enter + argv
        super().__init__(argv, env=lab.env, pass_fds=(theirs.fileno(), *fds),
                         stdout=subprocess.DEVNULL)
        theirs.close()
        self.jailed = "--jail" in argv
        self.lab = lab
        self.console = Stream(ours.fileno(), f"console of {self.name}")

    @property
    def pid(self):
        """The VM's; the process that was started stays outside its jail."""
        children = f"/proc/{self.child.pid}/task/{self.child.pid}/children"
        while self.jailed and self.child.poll() is None:
            with open(children) as f:
                vm = f.read().split()
            if vm:
                return int(vm[0])
            time.sleep(0.01)
        return self.child.pid

    def type(self, text):
        self.socket.sendall(text.encode())

    def wait_for(self, pattern, start=0, limit=LIMIT):
        try:
            return self.console.wait(pattern, start, limit)
        except AssertionError as e:
            raise AssertionError(f"{e}; stderr: {self.errors()}") from None

    def prompt(self):
        self.wait_for(PROMPT)

    def command(self, line, start=None):
        """Types a line at the shell's prompt; its output without the echoed line."""
        start = self.console.size() if start is None else start
        self.type(line + "\n")
        echoed = self.wait_for(re.compile(re.escape(line.encode()) + rb"\r\n"), start)
        done = self.wait_for(PROMPT, echoed.end())
        return bytes(self.console.data[echoed.end():done.start()]).decode().replace("\r\n", "\n")

    def ferry(self, command, *args, **options):
        return self.lab.ferry(command, self.name, *args, **options)

    def end(self):
        super().end()
        self.console.thread.join(LIMIT)
        self.socket.close()


class Result:
    def __init__(self, argv, status, stdout, stderr):
        self.argv, self.status, self.stdout, self.stderr = argv, status, stdout, stderr

    def json(self):
        return json.loads(self.stdout)

    def __str__(self):
        return f"{self.argv[1:]}: status {self.status}\nstdout: {self.stdout}\nstderr: {self.stderr}"


class Namespaces:
    """Two network namespaces joined by a veth pair: 10.77.0.1 and 10.77.0.2. They live as long as
    the processes in them."""

    class Side:
        def __init__(self, index):
            self.index, self.address = index, f"10.77.0.{index + 1}"
            self.link = f"ferry{index}"
            self.holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 1d"],
                                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            self.holder.stdout.readline()  # now it is in its namespace
            self.enter = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--"]

        def run(self, *argv):
            subprocess.run([*self.enter, *argv], check=True, capture_output=True)

    def __init__(self):
        for tool in ("unshare", "nsenter", "ip"):
            if not shutil.which(tool):
                raise unittest.SkipTest(f"{tool} is missing (packages util-linux, iproute2)")
        if os.geteuid():
            raise unittest.SkipTest("network namespaces need root")
        self.sides = []
        atexit.register(self.close)
        try:
            for index in range(2):
                self.sides.append(self.Side(index))
            self.link()
        except BaseException:
            self.close()
            raise

    def link(self):
        a, b = self.sides
        a.run("ip", "link", "add", a.link, "type", "veth", "peer", "name", b.link,
              "netns", str(b.holder.pid))
        for side in self.sides:
            side.run("ip", "addr", "add", f"{side.address}/24", "dev", side.link)
            side.run("ip", "link", "set", "lo", "up")
            side.run("ip", "link", "set", side.link, "up")

    def close(self):
        atexit.unregister(self.close)
        for side in self.sides:
            side.holder.kill()
            side.holder.wait()
            side.holder.stdout.close()


def run_root():
    """The folder of this run's labs. Those of runs that were killed go: their owner is in the name."""
    stem = os.path.join(tempfile.gettempdir(), "ferry-test-")
    for left in glob.glob(stem + "*"):
        owner = left[len(stem):]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            shutil.rmtree(left, ignore_errors=True)
    root = stem + str(os.getpid())
    if not os.path.isdir(root):
        os.mkdir(root)
        os.chmod(root, 0o755)
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


class Lab:
    """A directory of its own for everything a test class makes, and what it started."""

    def __init__(self):
        if not os.path.exists(FERRY):
            raise unittest.SkipTest(f"{FERRY} is missing: build with meson")
        self.dir = tempfile.mkdtemp(dir=run_root())
        self.run_dir = os.path.join(self.dir, "run")
        self.tmp = os.path.join(self.dir, "tmp")
        os.mkdir(self.tmp)
        self.env = {**os.environ, "FERRY_RUN_DIR": self.run_dir, "TMPDIR": self.tmp}
        self.started = []
        self.names = 0
        atexit.register(self.close)
        if JAIL:
            self.jail()

    def new_name(self):
        self.names += 1
        return f"vm{self.names}"

    def path(self, name):
        return os.path.join(self.dir, name)

    def walls(self, command=None, *args):
        """Options that confine a VM, when the whole run is to be confined."""
        if command not in ("run", "receive", "restore") or "--help" in args:
            return []
        more = ["--seccomp", SECCOMP] if SECCOMP and "--seccomp" not in args else []
        if JAIL and "--jail" not in args:
            more += ["--jail", self.jail()]
        return more

    def jail(self):
        """Our directory as a jail, in which our paths mean what they mean outside."""
        root = os.path.realpath(self.dir)
        link = root + root
        if not os.path.lexists(link):
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink("/", link)
            os.chown(root, JAIL_UID, JAIL_GID)
            os.chmod(root, 0o755)
            for path in (*glob.glob(os.path.join(BUILD, "guest", "bare", "*.elf")),
                         *glob.glob(os.path.join(GUEST, "*.*")), os.path.join(GUEST, "vmlinux")):
                self.bring(os.path.abspath(path), root + os.path.abspath(path))
        return f"{root},uid={JAIL_UID},gid={JAIL_GID}"

    def bring(self, path, to):
        if not os.path.isfile(path):
            return
        os.makedirs(os.path.dirname(to), exist_ok=True)
        try:
            os.link(os.path.realpath(path), to)
        except OSError:  # another file system
            shutil.copyfile(path, to)

    def start(self, process):
        self.started.append(process)
        return process

    def vm(self, command, *args, **options):
        return self.start(Vm(self, command, *args, **options))

    def linux(self, *args, kernel="vmlinux", append=None, initrd=True, **options):
        more = ["--initrd", guest_file("initramfs.cpio")] if initrd else []
        return self.vm("run", "--kernel", guest_file(kernel), *more,
                       "--append", guest_cmdline() if append is None else append, *args, **options)

    def ferry(self, *args, limit=LIMIT, env=None, enter=(), cwd=None):
        walls = self.walls(*args) if not enter else []  # another user cannot have that jail
        args = (*args[:1], *walls, *args[1:])
        done = subprocess.run([*enter, FERRY, *args], env=env or self.env, cwd=cwd, timeout=limit,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace")
        return Result([FERRY, *args], done.returncode, done.stdout, done.stderr)

    def sockets(self):
        return sorted(os.listdir(self.run_dir)) if os.path.isdir(self.run_dir) else []

    def close(self):
        atexit.unregister(self.close)
        for process in reversed(self.started):
            process.end()
        self.started = []
        shutil.rmtree(self.dir)


class LabTest(unittest.TestCase):
    """A test with a Lab for each test method."""

    def setUp(self):
        self.lab = Lab()
        self.addCleanup(self.lab.close)

    def assertStatus(self, result, status):
        self.assertEqual(result.status, status, str(result))
        return result

    def assertEnds(self, vm, status, text=""):
        """The VM ends by itself with this status, and says why."""
        self.assertEqual(vm.wait(), status, vm.errors())
        self.assertIn(text, vm.errors())
        self.assertEqual([], [s for s in self.lab.sockets() if s.startswith(vm.name + ".")])



if __name__ == "__main__":
    raise SystemExit("a library: run scripts/test, or python3 -m unittest discover tests/linux")

# SPDX-License-Identifier: Apache-2.0
"""Ferry and its peers behind one face: start a guest, watch its output, look at its memory.

Every process started here is killed by its pid: each Machine is a context manager.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time

from rows import Absent

BUILD = os.environ["FERRY_BUILD"]
GUEST = os.environ["FERRY_GUEST"]
FERRY = os.path.join(BUILD, "ferry")
PAGE = 4096


def program(path, hint):
    if not os.access(path, os.X_OK):
        raise Absent(f"{path} is missing: {hint}")
    return path


def bench_program(name):
    return program(os.path.join(BUILD, "tests", "bench", name), "ninja -C build")


def bare_guest(name):
    path = os.path.join(BUILD, "guest", "bare", f"{name}.elf")
    if not os.path.exists(path):
        raise Absent(f"{path} is missing: ninja -C build")
    return path


def linux_guest(name):
    path = os.path.join(GUEST, name)
    if not os.path.exists(path):
        raise Absent(f"{path} is missing: guest/build")
    return path


def tsc_khz():
    done = subprocess.run([bench_program("bench_kvm_run"), "--tsc-khz"], capture_output=True,
                          text=True, check=True)
    return int(done.stdout)


def guest_values(console):
    """What a bare guest reported on its console: {(name, index): value}."""
    found = re.findall(rb"value (\w+)\[(\d+)\] = (\d+)", console)
    return {(name.decode(), int(index)): int(value) for name, index, value in found}


class Failed(Exception):
    pass


class Machine:
    """One running VMM. `began` is CLOCK_MONOTONIC just before its exec, in ns."""

    def __init__(self, argv, ram_mib, mark_pattern, extra_fds=()):
        self.ram_mib = ram_mib
        self.console = b""
        self.errors = b""
        self.arrived = []  # (monotonic ns, bytes of console so far)
        self.mark_pattern = mark_pattern
        self.mark_ns = None
        self.directory = None
        stamp_read, stamp_write = os.pipe()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        with contextlib.ExitStack() as stack:
            for fd in (stamp_write, out_write, err_write, *extra_fds):
                stack.callback(os.close, fd)
            self.child = subprocess.Popen(
                [bench_program("bench_exec"), str(stamp_write), *argv], stdin=subprocess.DEVNULL,
                stdout=out_write, stderr=err_write, pass_fds=(stamp_write, *extra_fds),
                start_new_session=True)
        self.pid = self.child.pid
        self.argv = argv
        self.out, self.err = out_read, err_read
        self.mark_fd = None
        stamp = os.read(stamp_read, 8)
        os.close(stamp_read)
        self.began = struct.unpack("=Q", stamp)[0] if len(stamp) == 8 else time.monotonic_ns()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.child.wait()
        for fd in (self.out, self.err, self.mark_fd):
            if fd is not None:
                os.close(fd)
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self, timeout):
        """One turn of reading whatever the VMM says. False: all its pipes are closed."""
        fds = [fd for fd in (self.out, self.err, self.mark_fd) if fd is not None]
        if not fds:
            return False
        ready, _, _ = select.select(fds, [], [], timeout)
        now = time.monotonic_ns()
        for fd in ready:
            data = os.read(fd, 65536)
            if not data:
                os.close(fd)
                if fd == self.out:
                    self.out = None
                elif fd == self.err:
                    self.err = None
                else:
                    self.mark_fd = None
            elif fd == self.out:
                self.console += data
                self.arrived.append((now, len(self.console)))
            elif fd == self.err:
                self.errors += data
                if self.mark_pattern and self.mark_ns is None and self.mark_pattern in self.errors:
                    self.mark_ns = now
            elif self.mark_ns is None:
                self.mark_ns = now
        return True

    def _until(self, done, what, timeout):
        limit = time.monotonic() + timeout
        while not done():
            left = limit - time.monotonic()
            if left <= 0 or not self._read(left):
                why = f"nothing after {timeout} s" if left <= 0 else "it ended"
                raise Failed(f"{os.path.basename(self.argv[0])}: waited for {what}: {why}; "
                             f"console {self.console[-200:]!r}, stderr {self.errors[-300:]!r}")

    def wait_mark(self, timeout=60):
        """ns from exec to the guest's mark, as seen from outside."""
        self._until(lambda: self.mark_ns is not None, "the guest's first instruction", timeout)
        return self.mark_ns - self.began

    def wait_console(self, text, timeout):
        """ns from exec to the arrival of `text` on the guest's console."""
        wanted = text.encode()
        self._until(lambda: wanted in self.console, f"'{text}'", timeout)
        end = self.console.index(wanted) + len(wanted)
        return next(ns for ns, length in self.arrived if length >= end) - self.began

    def values(self):
        return guest_values(self.console)

    def cpu_ns(self, vcpus=True):
        """CPU time of the process's threads so far; without those of vCPUs where asked."""
        total = 0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            base = f"/proc/{self.pid}/task/{task}"
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"{base}/comm") as f:
                    vcpu = f.read().startswith(("vcpu", "CPU "))
                if vcpus or not vcpu:
                    with open(f"{base}/schedstat") as f:
                        total += int(f.read().split()[0])
        return total

    def wait_end(self, timeout):
        self._until(lambda: self.out is None and self.err is None, "its end", timeout)
        return self.child.wait()

    # --- memory

    def _mappings(self):
        """(start, end, PSS in KiB) of each mapping."""
        found = []
        with open(f"/proc/{self.pid}/smaps") as f:
            for line in f:
                head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
                if head:
                    found.append([int(head[1], 16), int(head[2], 16), 0])
                elif line.startswith("Pss:"):
                    found[-1][2] = int(line.split()[1])
        return found

    def pss_beyond_ram_kib(self):
        """PSS of all mappings but those big enough to be the guest's memory."""
        mappings = self._mappings()
        ram = [m for m in mappings if m[1] - m[0] >= self.ram_mib << 20]
        if not ram:
            raise Failed(f"{self.argv[0]}: no mapping is as large as {self.ram_mib} MiB of RAM")
        return sum(m[2] for m in mappings) - sum(m[2] for m in ram)

    def guest_memory(self, probe_gpa, probe):
        """Opens guest memory below 3 GiB; `probe` are bytes known to lie at `probe_gpa`."""
        memory = open(f"/proc/{self.pid}/mem", "r+b", buffering=0)
        for start, end, _ in self._mappings():
            if end - start < self.ram_mib << 20:
                continue
            for base in range(start, min(start + (4 << 20), end - (self.ram_mib << 20) + 1), PAGE):
                memory.seek(base + probe_gpa)
                if memory.read(len(probe)) == probe:
                    return GuestMemory(memory, base)
        memory.close()
        raise Failed(f"{self.argv[0]}: guest memory not found")


class GuestMemory:
    def __init__(self, memory, base):
        self.memory, self.base = memory, base

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.memory.close()

    def read_u64(self, gpa):
        self.memory.seek(self.base + gpa)
        return struct.unpack("<Q", self.memory.read(8))[0]

    def write_u64(self, gpa, value):
        self.memory.seek(self.base + gpa)
        self.memory.write(struct.pack("<Q", value))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- Ferry


class Ferry:
    name = "ferry"
    serial = 0  # of machines, for their names

    @staticmethod
    def version():
        program(FERRY, "ninja -C build")
        return [FERRY, "version"]

    def __init__(self, transport=None):
        self.transport = transport  # of virtio devices, else Ferry's default

    def exits(self, machine):
        """Exits of all vCPUs to the VMM so far."""
        done = subprocess.run([FERRY, "info", machine.name, "--json"], capture_output=True,
                              text=True, timeout=60, check=False)
        if done.returncode:
            raise Failed(f"ferry info: status {done.returncode}: {done.stderr[-300:]}")
        return sum(vcpu["exits"] for vcpu in json.loads(done.stdout)["vcpus"])

    def _name(self):
        Ferry.serial += 1
        return f"bench-{os.getpid()}-{Ferry.serial}"

    # `acpi`: Ferry always has tables; what counts is whether the guest's command line uses them.
    # `disks`: read-only images (`cached`: through the page cache); `tap`: name of a tap device;
    # `enter`: command to start it under; `stays`: when its guest has ended, so that it can still be
    # asked. `more`: further options.
    def start(self, kernel, initrd=None, append="", memory=128, cpus=1, mark=False, acpi=False,
              disks=(), tap=None, enter=(), stays=False, cached=False, more=()):
        name = self._name()
        argv = [program(FERRY, "ninja -C build"), "run", "-n", name, "-k", kernel, "-a", append,
                "-c", str(cpus), "-m", f"{memory}M", "--console", "stdio"]
        if initrd:
            argv += ["-i", initrd]
        argv += ["--mark"] if mark else [] if stays else ["--debug-exit"]
        for disk in disks:
            argv += ["--disk", f"{disk},ro" + (",cached" if cached else "")]
        if disks or tap:
            argv += ["--backing", "thp"]  # QEMU asks for huge pages, too
        if tap:
            argv += ["--net", f"tap={tap}"]
        if self.transport:
            argv += ["--transport", self.transport]
        argv += more
        machine = Machine([*enter, *argv], memory, b"first guest instruction" if mark else None)
        machine.name = name
        return machine

    def receive(self, memory, kernel, mode="precopy", host="127.0.0.1", enter=(), more=()):
        """A machine that waits for a guest; .address is where to send it. The guest brings all."""
        name, port = self._name(), free_port()
        address = f"tcp:{host}:{port}"
        argv = [program(FERRY, "ninja -C build"), "receive", "--listen", address, "-n", name,
                "--console", "stdio", "--backing", "thp"]  # QEMU asks for huge pages, too
        machine = Machine([*enter, *argv, *more], memory, None)
        machine.name, machine.address = name, address
        try:
            wait_listening(machine, port)
        except BaseException:
            machine.__exit__()
            raise
        return machine

    def migrate(self, source, target, downtime_ms, mode="precopy", more=()):
        """Moves the guest; what Ferry reports."""
        argv = [FERRY, "migrate", source.name, target.address, "--mode", mode,
                "--downtime-ms", str(downtime_ms), "--json", "--quiet", *more]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise Failed(f"ferry migrate: status {done.returncode}: {done.stderr[-300:]}")
        report = json.loads(done.stdout)
        result = {"total_ms": report["total_us"] / 1e3, "requests": report["requests"],
                  "downtime_ms": report["downtime_us"]["total"] / 1e3, "rounds": report["rounds"],
                  "wire_mib": report["wire_bytes"] / 2**20}
        if "latency_us" in report:
            result["p50"], result["p99"] = (report["latency_us"][p] for p in ("p50", "p99"))
        return result


def wait_for(condition, what, timeout=120):
    limit = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > limit:
            raise Failed(f"waited {timeout} s for {what}")
        time.sleep(0.01)


def wait_listening(machine, port, timeout=30):
    """Until somebody listens on the TCP port; a connect to find out would be taken as a stream."""
    wanted = f":{port:04X}"
    limit = time.monotonic() + timeout
    while True:
        for table in (f"/proc/{machine.pid}/net/tcp", f"/proc/{machine.pid}/net/tcp6"):
            with contextlib.suppress(FileNotFoundError), open(table) as f:
                for line in f.readlines()[1:]:
                    fields = line.split()
                    if fields[1].endswith(wanted) and fields[3] == "0A":
                        return
        if machine.child.poll() is not None or time.monotonic() > limit:
            machine._read(0)
            raise Failed(f"{machine.argv[0]} does not listen on port {port}: "
                         f"{machine.errors[-300:]!r}")
        machine._read(0.01)


# --- QEMU, its microvm machine

# What it takes to start on hosts whose KVM is a software back end: writing MSR 0x10a fails there,
# the emulator lacks cmpxchg16b, and guests see PCID wrongly. Ferry hides the same by default.
QEMU_CPU = "host,-arch-capabilities,-cx16,-pcid"


class Qemu:
    name = "qemu"
    BINARY = "qemu-system-x86_64"

    @classmethod
    def version(cls):
        if not shutil.which(cls.BINARY):
            raise Absent(f"no {cls.BINARY}: scripts/install --with bench")
        return [cls.BINARY, "--version"]

    def _argv(self, directory, kernel, initrd, append, memory, cpus, acpi=False):
        self.version()
        argv = [self.BINARY, "-M", f"microvm,accel=kvm,acpi={'on' if acpi else 'off'},pit=on,"
                "pic=on,rtc=on,isa-serial=on",
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-name", "bench,debug-threads=on", "-global", "virtio-mmio.force-legacy=false",
                "-cpu", QEMU_CPU, "-smp", str(cpus), "-m", f"{memory}M",
                "-chardev", "file,id=console,path=/dev/stdout", "-serial", "chardev:console",
                "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
                "-qmp", f"unix:{directory}/qmp,server=on,wait=off"]
        argv += ["-kernel", kernel, "-append", append]
        if initrd:
            argv += ["-initrd", initrd]
        return argv

    def _start(self, argv, directory, memory, mark=False):
        fds = ()
        if mark:
            mark_read, mark_write = os.pipe()
            fds = (mark_write,)
            argv += ["-chardev", f"file,id=mark,path=/proc/self/fd/{mark_write}",
                     "-device", "isa-debugcon,iobase=0xe84,chardev=mark"]
        machine = Machine(argv, memory, None, fds)
        machine.directory = directory
        if mark:
            machine.mark_fd = mark_read
        return machine

    def start(self, kernel, initrd=None, append="", memory=128, cpus=1, mark=False, acpi=False,
              disks=(), tap=None, enter=(), stays=False, cached=False):
        directory = tempfile.mkdtemp(prefix="ferry-bench-")
        argv = self._argv(directory, kernel, initrd, append, memory, cpus, acpi)
        for i, disk in enumerate(disks):
            argv += ["-drive", f"file={disk},if=none,id=disk{i},format=raw,"
                     f"cache={'writeback' if cached else 'none'},aio=io_uring,readonly=on,"
                     "file.locking=off", "-device", f"virtio-blk-device,drive=disk{i}"]
        if tap:
            argv += ["-netdev", f"tap,id=net0,ifname={tap},script=no,downscript=no,vhost=off",
                     "-device", "virtio-net-device,netdev=net0"]
        return self._start([*enter, *argv], directory, memory, mark)

    def receive(self, memory, kernel, mode="precopy", host="127.0.0.1", enter=(), more=()):
        directory, port = tempfile.mkdtemp(prefix="ferry-bench-"), free_port()
        argv = self._argv(directory, kernel, None, "", memory, 1) + ["-incoming", "defer"]
        machine = self._start([*enter, *argv, *more], directory, memory)
        machine.address = f"tcp:{host}:{port}"
        try:
            with Qmp(directory) as qmp:
                if mode == "postcopy":
                    qmp.call("migrate-set-capabilities", POSTCOPY)
                qmp.call("migrate-incoming", {"uri": machine.address})
            wait_listening(machine, port)
        except BaseException:
            machine.__exit__()
            raise
        return machine

    def migrate(self, source, target, downtime_ms, mode="precopy", more=()):
        with Qmp(source.directory) as qmp:
            qmp.call("migrate-set-parameters", {"downtime-limit": downtime_ms,
                                                "max-bandwidth": 100 << 30})
            if mode == "postcopy":
                qmp.call("migrate-set-capabilities", POSTCOPY)
            qmp.call("migrate", {"uri": target.address})
            if mode == "postcopy":
                qmp.call("migrate-start-postcopy")
            limit = time.monotonic() + 300
            while True:
                info = qmp.call("query-migrate")
                if info.get("status") == "completed":
                    ram = info["ram"]
                    return {"total_ms": info["total-time"], "downtime_ms": info["downtime"],
                            "requests": ram["postcopy-requests"], "rounds": ram["dirty-sync-count"],
                            "wire_mib": ram["transferred"] / 2**20}
                if info.get("status") in ("failed", "cancelled") or time.monotonic() > limit:
                    raise Failed(f"QEMU migration: {info}")
                time.sleep(0.005)


POSTCOPY = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}


class Qmp:
    def __init__(self, directory):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        limit = time.monotonic() + 30
        while True:
            try:
                self.socket.connect(os.path.join(directory, "qmp"))
                break
            except (FileNotFoundError, ConnectionRefusedError):  # it has only just started
                if time.monotonic() > limit:
                    raise
                time.sleep(0.01)
        self.file = self.socket.makefile("rw")
        self.file.readline()  # greeting
        self.call("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()

    def call(self, command, arguments=None):
        message = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()
        while True:
            reply = json.loads(self.file.readline())
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise Failed(f"QMP {command}: {reply['error']['desc']}")

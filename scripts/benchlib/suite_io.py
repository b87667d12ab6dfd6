# SPDX-License-Identifier: Apache-2.0
"""scripts/bench io: disk and network, alone, from a bare-metal driver, and from Linux."""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import socket
import subprocess
import threading

from rows import Absent, Metric, Row, add
from suite_boot import khz
from vmms import Failed, Ferry, Qemu, bare_guest, bench_program, linux_guest

IMAGE_MIB = 256
KIB_SEQUENTIAL = 256
# name: (depth, KiB of a request, how many in a run of about a second, through the page cache)
LOADS = {"4 KiB random, QD 1": (1, 4, 10000, False), "4 KiB random, QD 32": (32, 4, 60000, False),
         f"{KIB_SEQUENTIAL} KiB, QD 4": (4, KIB_SEQUENTIAL, 4000, False),
         "cached, QD 1": (1, 4, 20000, True), "cached, QD 32": (32, 4, 200000, True)}
MODEL_SECONDS = 1


@functools.lru_cache(maxsize=1)
def image():
    """A file of random bytes that all contestants read."""
    path = os.path.join(os.environ["FERRY_CACHE"], "bench-disk.img")
    if not os.path.exists(path) or os.path.getsize(path) != IMAGE_MIB << 20:
        with open(path + ".new", "wb") as f:
            for _ in range(IMAGE_MIB):
                f.write(os.urandom(1 << 20))
            os.fsync(f.fileno())
        os.rename(path + ".new", path)
    return path


# --- the device model alone


def device_model(what, depth, *options):
    done = subprocess.run([bench_program("bench_virtio_blk"), what, image(), str(depth),
                           str(MODEL_SECONDS), *options], capture_output=True, text=True,
                          timeout=60, check=True)
    found = dict(re.findall(r"(\w+) ([\d.]+)\n", done.stdout))
    return {"rate": float(found["rate"]), "cpu": float(found["cpu_us"])}


# --- a driver in ring 3


def ring3(vmm, depth, kib, count, cached):
    append = f"acpi=off n={count} depth={depth} kib={kib} tsc_khz={khz()}"
    if vmm.name == "ferry" and vmm.transport == "pci":
        append = append.replace("acpi=off ", "")
    with vmm.start(bare_guest("disk"), append=append, disks=[image()], stays=True,
                   cached=cached) as machine:
        machine.wait_console("sync 1", 60)
        cpu = machine.cpu_ns(vcpus=False)
        exits = vmm.exits(machine) if vmm.name == "ferry" else None
        machine.wait_console("sync 2", 120)
        cpu = machine.cpu_ns(vcpus=False) - cpu
        exits = vmm.exits(machine) - exits if exits is not None else None
        machine.wait_console("value tsc_khz[0]", 60)
        values = machine.values()
    seconds = values[("tsc_delta", 0)] / khz() / 1e3
    result = {"iops": count / seconds, "mib": count * kib / 1024 / seconds,
              "cpu": cpu / 1e3 / count,
              "kick": values[("tsc_delta", 1)] / max(1, values[("count", 1)]) / khz() * 1e3,
              "kicks": values[("count", 1)] / count,
              "idle": values[("tsc_delta", 2)] / values[("count", 2)] / khz() * 1e3}
    if exits is not None:
        result["exits"] = exits / count
    return result


# --- Linux


def linux_start(vmm, script, **devices):
    acpi = vmm.name == "ferry" and vmm.transport == "pci"
    with open(linux_guest("cmdline")) as f:
        append = f.read().strip() + ("" if acpi else " acpi=off")
    append += f' "ferry.run={script}"'
    return vmm.start(linux_guest("vmlinux"), linux_guest("initramfs.cpio"), append, memory=256,
                     acpi=acpi, **devices)


FIO = ("fio --readonly --direct=1 --time_based --gtod_reduce=1 --minimal --eta=never --name=x "
       "--filename=$D")
FIO_LOADS = {"iops1": "--ioengine=psync --rw=randread --bs=4k --runtime=5",
             "iops32": "--ioengine=libaio --rw=randread --bs=4k --iodepth=32 --runtime=5",
             "mib": f"--ioengine=libaio --rw=read --bs={KIB_SEQUENTIAL}k --iodepth=4 --runtime=5"}
FIO_BANDWIDTH, FIO_IOPS = 6, 7  # fields of fio's terse output, version 3
# What a request costs is counted over so many of dd, less a dd of none.
DD = "dd if=$D of=/dev/null bs=4k iflag=direct"
DD_RUNS = {"dd0": 0, "dd": 500}


def fio_script():
    # Linux may find the windows of QEMU's microvm in the opposite order: tell them by their size.
    words = ["D=/dev/vdb; T=/dev/vda; S=$(blockdev --getsz $T)",
             f"if [ $S = {IMAGE_MIB << 11} ]; then D=/dev/vda; T=/dev/vdb; fi",
             "mount -o ro $T /tools; fio --version"]
    for name, count in DD_RUNS.items():
        words.append(f"echo begin {name}; {DD} count={count} 2>/dev/null; echo end {name}")
    for name, load in FIO_LOADS.items():
        words.append(f"{FIO} {load} --output=/tmp/{name}")
    words.append("cat " + " ".join(f"/tmp/{name}" for name in FIO_LOADS))
    return "; ".join(words)


def linux_disk(vmm):
    def spent():
        return machine.cpu_ns(vcpus=False), vmm.exits(machine) if vmm.name == "ferry" else 0

    cost = {}
    with linux_start(vmm, fio_script(), disks=[linux_guest("tools.ext4"), image()]) as machine:
        for name in DD_RUNS:
            machine.wait_console(f"begin {name}\r\n", 300)
            begun = spent()
            machine.wait_console(f"end {name}\r\n", 300)
            cost[name] = [after - before for before, after in zip(begun, spent())]
        machine.wait_console("ferry-guest: exit 0", 600)
        terse = re.findall(rb"3;fio-[^\r\n]*", machine.console)
    if len(terse) != len(FIO_LOADS):
        raise Failed(f"fio said {machine.console[-400:]!r}")
    cpu, exits = (more - none for more, none in zip(cost["dd"], cost["dd0"]))
    values = {"cpu": cpu / 1e3 / DD_RUNS["dd"]}
    if vmm.name == "ferry":
        values["exits"] = exits / DD_RUNS["dd"]
    for name, line in zip(FIO_LOADS, terse):
        fields = line.decode().split(";")
        values[name] = float(fields[FIO_IOPS])
        if name == "mib":
            values[name] = float(fields[FIO_BANDWIDTH]) / 1024
    return values


# --- Linux, network: a tap in a namespace of its own, where the other side lives, too

HOST, GUEST, PORT, ECHO_PORT = "10.78.0.1", "10.78.0.2", 5201, 7000


class Network:
    """A network namespace with a tap, an iperf3 server and an echo server; ends with its `with`."""

    def __enter__(self):
        for tool in ("unshare", "nsenter", "ip", "iperf3"):
            if not shutil.which(tool):
                raise Absent(f"no {tool}: scripts/install --with bench")
        if os.geteuid():
            raise Absent("a tap needs root")
        self.stack = contextlib.ExitStack()
        holder = self._start(["unshare", "--net", "sh", "-c", "echo; exec sleep 1d"],
                             stdout=subprocess.PIPE)
        holder.stdout.readline()  # now it is in its namespace
        self.enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
        for words in ("tuntap add dev tap0 mode tap vnet_hdr", f"addr add {HOST}/24 dev tap0",
                      "link set lo up", "link set tap0 up"):
            subprocess.run([*self.enter, "ip", *words.split()], check=True, capture_output=True)
        self._start([*self.enter, "iperf3", "-s", "-B", HOST], stdout=subprocess.DEVNULL)
        self.echo = self._listen(holder.pid)
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.echo.close()
        self.stack.close()

    def _start(self, argv, **options):
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, **options)
        self.stack.callback(child.wait)
        self.stack.callback(child.kill)
        return child

    @staticmethod
    def _listen(pid):
        """A socket that listens in that process's network namespace; a thread goes there for it."""
        found = []

        def make():
            with open(f"/proc/{pid}/ns/net") as ns:
                network_enter(ns.fileno())
            found.append(socket.create_server((HOST, ECHO_PORT)))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return found[0]

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.echo.accept()
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with peer:
                    while data := peer.recv(65536):
                        peer.sendall(data)


def network_enter(fd):  # os.setns came with Python 3.12
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, 0x40000000):  # CLONE_NEWNET
        raise Failed(f"setns: {os.strerror(ctypes.get_errno())}")


ROUNDS = 300


def net_script():
    return "; ".join([
        "mount -o ro /dev/vda /tools", f"ip addr add {GUEST}/24 dev eth0", "ip link set eth0 up",
        f"ping -c 2 {HOST} >/dev/null", f"sock pingpong tcp:{HOST}:{ECHO_PORT} {ROUNDS}",
        f"echo begin out; iperf3 -c {HOST} -t 5 -f k >/tmp/out; echo end out",
        f"echo begin in; iperf3 -R -c {HOST} -t 5 -f k >/tmp/in; echo end in",
        "grep receiver /tmp/out; grep receiver /tmp/in"])


def linux_net(vmm):
    values = {}
    with Network() as network, linux_start(vmm, net_script(), disks=[linux_guest("tools.ext4")],
                                           tap="tap0", enter=network.enter) as machine:
        cpu = {}
        for name in ("out", "in"):
            for mark in ("begin", "end"):
                machine.wait_console(f"{mark} {name}\r\n", 300)
                cpu[mark, name] = machine.cpu_ns(vcpus=False)
        machine.wait_console("ferry-guest: exit 0", 120)
        text = machine.console.decode(errors="replace")
    trip = re.search(r"median ([\d.]+) us", text)
    moved = re.findall(r"([\d.]+) (K|M|G)Bytes +([\d.]+) Kbits/sec.*receiver", text)
    if not trip or len(moved) != 2:
        raise Failed(f"the guest said {text[-400:]!r}")
    values["trip"] = float(trip[1])
    for name, (amount, unit, rate) in zip(("out", "in"), moved):
        mib = float(amount) * {"K": 1 / 1024, "M": 1, "G": 1024}[unit]
        values[name] = float(rate) / 1000
        values[f"{name}_cpu"] = (cpu["end", name] - cpu["begin", name]) / 1e6 / mib
    return values


# --- rows


def register():
    mmio, pci, qemu = Ferry(), Ferry("pci"), Qemu()
    vmms = {"ferry": mmio, "ferry, pci": pci, "qemu": qemu}

    def each(measure, *args):
        return {name: functools.partial(measure, vmm, *args) for name, vmm in vmms.items()}

    for depth, options in ((1, ()), (32, ()), (32, ("packed",)), (1, ("cached",)),
                           (32, ("cached",))):
        name = f"device model, QD {depth}" + "".join(f", {option}" for option in options)
        goal = None if "cached" in options else ("io_uring", 0.9)
        add(Row("io", name, "4 KiB random reads through the block device without a VM, "
                "beside an io_uring that does nothing else",
                {"ferry": functools.partial(device_model, "device", depth, *options),
                 "io_uring": functools.partial(device_model, "bare", depth, *options)},
                [Metric("rate", name, "1/s", goal_ratio_least=goal),
                 Metric("cpu", f"{name}, CPU", "us")], runs=7))
    for load, (depth, kib, count, cached) in LOADS.items():
        name = f"ring 3, {load}"
        amount = Metric("mib", name, "MiB/s", goal_ratio_least=("qemu", 1.2))
        if kib == 4:
            amount = Metric("iops", name, "1/s", goal_ratio_least=("qemu", 1.2))
        add(Row("io", name, "reads by a bare-metal driver in ring 3 that polls", each(
            ring3, depth, kib, count, cached),
            [amount, Metric("cpu", f"{name}, CPU of the VMM", "us"),
             Metric("exits", f"{name}, exits per request", "", goal=1),
             Metric("kicks", f"{name}, doorbells per request", ""),
             Metric("kick", f"{name}, a doorbell that counts", "us"),
             Metric("idle", f"{name}, a doorbell with nothing behind it", "us")], runs=7))
    add(Row("io", "Linux, disk", "fio in the Linux guest: 4 KiB random reads and sequential ones",
            each(linux_disk),
            [Metric("iops1", "fio 4 KiB random, QD 1", "1/s", goal_ratio_least=("qemu", 1.2)),
             Metric("iops32", "fio 4 KiB random, QD 32", "1/s", goal_ratio_least=("qemu", 1.2)),
             Metric("mib", f"fio sequential, {KIB_SEQUENTIAL} KiB, QD 4", "MiB/s",
                    goal_ratio_least=("qemu", 1.0)),
             Metric("exits", "dd 4 KiB, exits per request", "", goal=1),
             Metric("cpu", "dd 4 KiB, CPU of the VMM", "us")], runs=3, warmup=0))
    add(Row("io", "Linux, net", "TCP between the Linux guest and its host through a tap",
            each(linux_net),
            [Metric("trip", "TCP round trip of 1 byte", "us", goal_ratio=("qemu", 1.0)),
             Metric("out", "iperf3, guest to host", "Mbit/s", goal_ratio_least=("qemu", 1.0)),
             Metric("out_cpu", "guest to host, CPU of the VMM", "ms/MiB"),
             Metric("in", "iperf3, host to guest", "Mbit/s", goal_ratio_least=("qemu", 1.0)),
             Metric("in_cpu", "host to guest, CPU of the VMM", "ms/MiB")], runs=3, warmup=0))

# SPDX-License-Identifier: Apache-2.0
"""scripts/bench api: what the control API costs, and how fast it answers beside a busy guest."""

import contextlib
import functools
import os
import subprocess
import tempfile
import time

from rows import Metric, Row, add
from vmms import FERRY, Failed, Ferry, bare_guest, bench_program, program

CALLS = 2000
MEMORY_LIMIT_S = 10


def figures(*argv):
    """What tests/bench/bench_http.c prints: ns by name, as ms."""
    done = subprocess.run([bench_program("bench_http"), *argv], capture_output=True, text=True,
                          timeout=120, check=False)
    if done.returncode:
        raise Failed(f"bench_http {argv[0]}: status {done.returncode}: {done.stderr[-300:]}")
    return {name: int(ns) / 1e6 for name, ns in (line.split() for line in done.stdout.splitlines())}


def ready(command):
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "api")
        return figures("ready", path, *command(path))


def ferry_waiting(path):
    return [program(FERRY, "ninja -C build"), "--api-sock", path, "--control", "false"]


def empty_server(path):
    return [bench_program("bench_http"), "serve", path]


@contextlib.contextmanager
def busy_guest():
    """A guest that runs flat out on one vCPU; the path of its API's socket."""
    vmm = Ferry()
    with vmm.start(bare_guest("spin"), stays=True) as machine:
        machine.wait_console("sync 1", 60)
        yield os.path.join(os.environ["FERRY_RUN_DIR"], machine.name + ".sock")


def call_ferry(path):
    with busy_guest() as api:
        return figures("ask", api, path, str(CALLS))


def call_empty():
    """The same beside the same guest, so that both have the same processor to share."""
    with busy_guest(), tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "socket")
        server = subprocess.Popen(empty_server(path))
        try:
            while not os.path.exists(path):
                if server.poll() is not None:
                    raise Failed("bench_http serve ended")
                time.sleep(0.001)
            return figures("ask", path, "/", str(CALLS))
        finally:
            server.kill()
            server.wait()


@contextlib.contextmanager
def start(vmm, guest, control, filters, devices, **options):
    with tempfile.TemporaryDirectory() as directory:
        disk = os.path.join(directory, "disk")
        with open(disk, "wb") as f:
            f.truncate(1 << 20)
        more = ["--control", "true" if control else "false", "--seccomp", "on" if filters else "off"]
        if devices:
            more += ["--disk", disk, "--balloon", "target=0", "--rng",
                     "--vsock", f"cid=3,path={directory}/vsock"]
        with vmm.start(bare_guest(guest), more=more, **options) as machine:
            yield machine


def memory(control, filters, devices):
    """As `boot memory` has it, here with the API having answered once."""
    vmm = Ferry()
    with start(vmm, "halt", control, filters, devices) as machine:
        machine.wait_console("sync 1", 60)
        if control:
            vmm.exits(machine)
        last = None
        limit = time.monotonic() + MEMORY_LIMIT_S
        while time.monotonic() < limit:
            now = machine.pss_beyond_ram_kib()
            if now == last:
                return {"pss": now / 1024}
            last = now
            time.sleep(0.1)
        raise Failed("its memory does not settle")


def first_instruction(control, filters, devices):
    with start(Ferry(), "first", control, filters, devices, mark=True) as machine:
        return {"first": machine.wait_mark() / 1e6}


def register():
    add(Row("api", "ready", "exec of a VMM that waits for its configuration, until its API's socket "
            "takes a connection, and until GET / is answered",
            {"ferry": functools.partial(ready, ferry_waiting),
             "empty server": functools.partial(ready, empty_server)},
            [Metric("connected", "exec to API socket ready", "ms", goal=3),
             Metric("answered", "exec to the first answer", "ms")], runs=20, warmup=2))
    for path in ("/", "/info"):
        add(Row("api", f"call {path}", f"GET {path}, {CALLS} times on one connection, while a guest "
                "runs flat out on one vCPU",
                {"ferry": functools.partial(call_ferry, path), "empty server": call_empty},
                [Metric("p50", f"GET {path}, median", "ms"),
                 Metric("p99", f"GET {path}, 99th percentile", "ms", goal=1)], runs=5))
    add(Row("api", "memory", "the VMM's memory (PSS) beyond the guest's RAM, with the API and disk, "
            "vsock, balloon and rng",
            {"ferry": functools.partial(memory, True, True, True),
             "no filters": functools.partial(memory, True, False, True),
             "no API": functools.partial(memory, False, True, True),
             "no API, no devices": functools.partial(memory, False, True, False)},
            [Metric("pss", "VMM memory beyond guest RAM", "MiB", goal=5)], runs=3))
    add(Row("api", "first instruction", "exec of the VMM to the first instruction of a 128 MiB "
            "guest's kernel image, seen from outside, with the same API and devices",
            {"ferry": functools.partial(first_instruction, True, True, True),
             "no filters": functools.partial(first_instruction, True, False, True),
             "no API": functools.partial(first_instruction, False, True, True),
             "no API, no devices": functools.partial(first_instruction, False, True, False)},
            [Metric("first", "exec to first guest instruction", "ms", goal=8)],
            runs=20, warmup=2))

# SPDX-License-Identifier: Apache-2.0
"""scripts/bench boot: how fast a guest starts, what the VMM weighs, what an exit costs."""

import functools
import subprocess
import time

from rows import Metric, Row, add
from vmms import (Failed, Ferry, Qemu, bare_guest, bench_program, guest_values, linux_guest,
                  tsc_khz)

EXITS = 5000
EXITS_RING = {"ring 0": 0, "ring 3": 3}
USERSPACE_LINE = "ferry-guest: userspace"


def first_instruction(vmm):
    with vmm.start(bare_guest("first"), mark=True) as machine:
        return {"first": machine.wait_mark() / 1e6}


def memory_beyond_ram(vmm):
    """Waits until the guest idles, then until two looks 100 ms apart agree."""
    with vmm.start(bare_guest("halt")) as machine:
        machine.wait_console("sync 1", 60)
        last = None
        for _ in range(100):
            now = machine.pss_beyond_ram_kib()
            if now == last:
                return {"pss": now / 1024}
            last = now
            time.sleep(0.1)
        raise Failed("its memory does not settle")


def userspace(vmm, cpus, acpi):
    with open(linux_guest("cmdline")) as f:
        append = f.read().strip() + ("" if acpi else " acpi=off")
    kernel, initrd = linux_guest("vmlinux"), linux_guest("initramfs.cpio")
    with vmm.start(kernel, initrd, append, cpus=cpus, acpi=acpi) as machine:
        return {"userspace": machine.wait_console(USERSPACE_LINE, 180) / 1e9}


@functools.lru_cache(maxsize=1)
def khz():
    return tsc_khz()


def exits_append(ring):
    return f"n={EXITS} ring={ring} tsc_khz={khz()}"


def round_trip(values):
    return {"exit": values[("tsc_delta", 0)] / values[("count", 0)] / khz() * 1e3}


def exits(vmm, ring):
    with vmm.start(bare_guest("exits"), append=exits_append(ring)) as machine:
        machine.wait_console("value tsc_khz[0]", 60)
        return round_trip(machine.values())


def exits_bare(ring):
    """The same guest under a KVM_RUN loop that does nothing else."""
    done = subprocess.run([bench_program("bench_kvm_run"), bare_guest("exits"), exits_append(ring)],
                          capture_output=True, timeout=60, check=True)
    return round_trip(guest_values(done.stdout))


def register():
    ferry, qemu = Ferry(), Qemu()

    def both(measure, *args):
        return {vmm.name: functools.partial(measure, vmm, *args) for vmm in (ferry, qemu)}

    add(Row("boot", "first instruction", "exec of the VMM to the first instruction of a 128 MiB "
            "guest's kernel image, seen from outside", both(first_instruction),
            [Metric("first", "exec to first guest instruction", "ms", goal=5,
                    goal_ratio=("qemu", 1 / 8))], runs=20, warmup=2))
    add(Row("boot", "memory", "the VMM's memory (PSS) beyond the guest's RAM, one vCPU that sleeps",
            both(memory_beyond_ram),
            [Metric("pss", "VMM memory beyond guest RAM", "MiB", goal=3)], runs=5))
    for cpus, acpi in ((1, False), (2, False), (1, True)):
        name = f"{cpus} vCPU" + (", ACPI" if acpi else "")
        add(Row("boot", f"userspace, {name}", "exec of the VMM to the first user process of "
                "the Linux guest, 128 MiB, the same kernel, initramfs and command line",
                both(userspace, cpus, acpi),
                [Metric("userspace", f"boot to userspace, {name}", "s",
                        goal_ratio=("qemu", 0.8))], runs=3))
    for title, ring in EXITS_RING.items():
        contestants = both(exits, ring)
        contestants["KVM_RUN loop"] = functools.partial(exits_bare, ring)
        add(Row("boot", f"exit, {title}", f"an `out` from {title} to a port nobody owns and back, "
                f"{EXITS} of them, measured by the guest's TSC", contestants,
                [Metric("exit", f"exit round trip from {title}", "us",
                        goal_ratio=("KVM_RUN loop", 1.15))], runs=10))

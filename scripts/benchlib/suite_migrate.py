# SPDX-License-Identifier: Apache-2.0
"""scripts/bench migrate: live migration over loopback TCP, seen by the VMM and by the guest."""

import functools
import struct
import time

from rows import Metric, Row, add
from suite_boot import khz
from vmms import Failed, Ferry, Qemu, bare_guest

MEMORY_MIB = 512
DOWNTIME_LIMIT_MS = 300
# The guest looks at the TSC all the time, so the longest gap between two looks is the longest time
# it did not run. `idle` still touches a page now and then.
GUESTS = {
    "idle": {"mib": 1, "rate": 10},
    "dirtying": {"mib": 256, "rate": 20000},
}


def append(guest):
    return " ".join(f"{word}={value}" for word, value in GUESTS[guest].items()) + f" tsc_khz={khz()}"


def image_probe(path):
    """(gpa, bytes) of the start of the guest's text, to find guest memory in a process."""
    with open(path, "rb") as f:
        header = f.read(64)
        offset, entry_size = struct.unpack_from("<Q", header, 32)[0], struct.unpack_from("<H", header, 54)[0]
        f.seek(offset)
        segment = f.read(entry_size)
        file_offset, _, gpa = struct.unpack_from("<QQQ", segment, 8)
        f.seek(file_offset)
        return gpa, f.read(256)


def wait_for(condition, what, timeout=120):
    limit = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > limit:
            raise Failed(f"waited {timeout} s for {what}")
        time.sleep(0.01)


def migrate(vmm, guest):
    kernel = bare_guest("dirty")
    probe = image_probe(kernel)
    with vmm.start(kernel, append=append(guest), memory=MEMORY_MIB) as source:
        source.wait_console("sync 1", 60)
        gap = source.values()[("gap", 0)]
        pages = GUESTS[guest]["mib"] * 256
        with source.guest_memory(*probe) as memory:
            # struct ucall_gap: longest, longest_at, total, reset. `idle` would take 26 s for a round.
            wait_for(lambda: memory.read_u64(gap + 16)[0] >= min(pages, 100000 if guest != "idle" else 1),
                     "the guest to touch its memory")
            memory.write_u64(gap + 24, 1)
            wait_for(lambda: memory.read_u64(gap + 24)[0] == 0, "the guest to forget its longest gap")
        target = vmm.receive(MEMORY_MIB, kernel) if isinstance(vmm, Qemu) else vmm.receive(MEMORY_MIB)
        with target:
            result = vmm.migrate(source, target, DOWNTIME_LIMIT_MS)
            with target.guest_memory(*probe) as memory:
                before = memory.read_u64(gap + 16)[0]
                wait_for(lambda: memory.read_u64(gap + 16)[0] > before, "the guest to go on at its new place")
                longest = memory.read_u64(gap)[0]
            result["gap_ms"] = longest / khz()
            return result


def register():
    vmms = (Ferry(), Qemu())
    for guest in GUESTS:
        add(Row("migrate", guest, f"pre-copy of a {MEMORY_MIB} MiB guest ({guest}: {append_text(guest)}) over "
                f"loopback TCP, downtime limit {DOWNTIME_LIMIT_MS} ms",
                {vmm.name: functools.partial(migrate, vmm, guest) for vmm in vmms},
                [Metric("gap_ms", f"{guest}: longest time the guest did not run", "ms"),
                 Metric("downtime_ms", f"{guest}: downtime the VMM reports", "ms"),
                 Metric("total_ms", f"{guest}: total time the VMM reports", "ms")], runs=5))


def append_text(guest):
    return f"{GUESTS[guest]['mib']} MiB, {GUESTS[guest]['rate']} pages/s"

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
# Offsets in struct ucall_gap, guest/bare/ucall_abi.h.
GAP_LONGEST, GAP_TOTAL, GAP_RESET = 0, 16, 24
# The guest looks at the TSC all the time, so the longest gap between two looks is the longest time
# it did not run. `idle` still touches a page now and then. The migration begins once `touched`
# pages have been written.
GUESTS = {
    "idle": {"mib": 1, "rate": 10, "touched": 1},
    "dirtying": {"mib": 256, "rate": 20000, "touched": 256 * 256},
}


def append(guest):
    return "mib={mib} rate={rate} tsc_khz={khz}".format(khz=khz(), **GUESTS[guest])


def image_probe(path):
    """(gpa, bytes) of the start of the guest's text, to find guest memory in a process."""
    with open(path, "rb") as f:
        header = f.read(64)
        f.seek(struct.unpack_from("<Q", header, 32)[0])  # program headers, the first is the text
        file_offset, _, gpa = struct.unpack_from("<QQQ", f.read(56), 8)
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
        with source.guest_memory(*probe) as memory:
            wait_for(lambda: memory.read_u64(gap + GAP_TOTAL) >= GUESTS[guest]["touched"],
                     "the guest to touch its memory")
            memory.write_u64(gap + GAP_RESET, 1)
            wait_for(lambda: memory.read_u64(gap + GAP_RESET) == 0,
                     "the guest to forget its longest gap")
        with vmm.receive(MEMORY_MIB, kernel) as target:
            result = vmm.migrate(source, target, DOWNTIME_LIMIT_MS)
            with target.guest_memory(*probe) as memory:
                before = memory.read_u64(gap + GAP_TOTAL)
                wait_for(lambda: memory.read_u64(gap + GAP_TOTAL) > before,
                         "the guest to go on at its new place")
                longest = memory.read_u64(gap + GAP_LONGEST)
            result["gap_ms"] = longest / khz()
            return result


def register():
    vmms = (Ferry(), Qemu())
    for guest in GUESTS:
        what = GUESTS[guest]
        add(Row("migrate", guest, f"pre-copy of a {MEMORY_MIB} MiB guest that dirties "
                f"{what['rate']} pages/s of {what['mib']} MiB, over loopback TCP, downtime limit "
                f"{DOWNTIME_LIMIT_MS} ms",
                {vmm.name: functools.partial(migrate, vmm, guest) for vmm in vmms},
                [Metric("gap_ms", f"{guest}: longest time the guest did not run", "ms"),
                 Metric("downtime_ms", f"{guest}: downtime the VMM reports", "ms"),
                 Metric("total_ms", f"{guest}: total time the VMM reports", "ms")], runs=5))

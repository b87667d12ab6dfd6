// SPDX-License-Identifier: Apache-2.0
#pragma once

// The contract between the bare-metal test guests and the `ucall` device of a VMM. Included by both
// sides; plain C, needs only <stdint.h>.
//
// A call: the guest fills a `struct ucall` (64-byte aligned, wholly below 4 GiB, in RAM) and
// executes a 4-byte `out` of the structure's guest-physical address to UCALL_PORT. The host reads
// `nr` and `args`, acts, and writes `result` before the instruction completes. Guest virtual =
// guest physical. Any vCPU may call at any time, from ring 0 or from ring 3 (I/O bitmap); the
// caller is the vCPU that exits.
//
// Detection: a 4-byte `in` from UCALL_PORT gives UCALL_MAGIC when the device is there (a VMM
// without it gives all ones, and the guest falls back to COM1 and UCALL_EXIT_PORT). Accesses of
// other sizes: reads give all ones, writes are ignored.
//
// Hostile guests: an address that is misaligned, outside RAM, or an `nr` the host does not know is
// a guest error that the host reports; it must not harm the host. For an unknown `nr` with a
// readable structure the host writes result = UCALL_NONE. Strings and buffers are guest-physical
// and as untrusted as the rest; the host reads at most the limits below.

#include <stdint.h>

#include "ucall_abi_ports.h"

#define UCALL_NONE       UINT64_MAX // "no such value" in `result`
#define UCALL_STRING_MAX 256u       // bytes the host reads at most of a NUL-terminated string
#define UCALL_PRINT_MAX  4096u      // bytes of one UCALL_PRINT

struct ucall {
    uint64_t nr; // enum ucall_nr
    uint64_t args[6];
    uint64_t result; // written by the host for every call; 0 unless stated otherwise
};

enum ucall_nr {
    // A point in the guest's life: args[0] stage number, args[1] a value of the guest's choice. The
    // host may keep the vCPU in the exit as long as it likes (snapshot, migrate here: the structure
    // is in RAM and the pending `out` completes on the next KVM_RUN). result: 0, or a number a test
    // wants the guest to get.
    UCALL_SYNC = 1,
    // A failed check: args[0] file name (string), [1] line, [2] expression (string), [3] and [4]
    // the two compared values (0 for a plain assertion). The guest then parks this vCPU for good
    // (cli; hlt).
    UCALL_ASSERT = 2,
    // The guest has finished: args[0] status, 0 = pass. The vCPU is parked afterwards if it is
    // resumed.
    UCALL_DONE = 3,
    // Text: args[0] address, args[1] length in bytes (<= UCALL_PRINT_MAX), not NUL-terminated.
    UCALL_PRINT = 4,
    // Guest tells host a value: args[0] enum ucall_value, [1] value, [2] index (0 for single
    // values).
    UCALL_VALUE = 5,
    // Guest asks for a parameter: args[0] enum ucall_param. result: its value, UCALL_NONE if the
    // host has none (the guest then looks at its command line, then takes its own default).
    UCALL_GET = 6,
    // Pause this vCPU until the host resumes it; the guest goes on behind the `out`. args[0] free.
    UCALL_STOP = 7,
    // Unexpected exception: args[0] vector, [1] error code, [2] RIP, [3] CR2, [4] guest CPU index,
    // [5] CS. The guest then parks this vCPU for good.
    UCALL_ABORT = 8,
};

// Parameters: X(enum suffix, command line word). Numbers only; the same names work for UCALL_GET
// and as `name=value` on the command line (decimal or 0x, suffix K/M/G). Append only.
#define UCALL_PARAMS(X)                                                                        \
    X(CPUS, cpus)             /* vCPUs to use; default: as many as the firmware tables list */ \
    X(PAGES, pages)           /* 4 KiB pages to work on, all vCPUs together */                 \
    X(BASE, base)             /* lowest guest-physical address to take pages from */           \
    X(LOOPS, loops)           /* how often; 0 = for ever where that makes sense */             \
    X(N, n)                   /* count of whatever the guest counts */                         \
    X(PERIOD_US, period_us)   /* least time per loop, microseconds */                          \
    X(RATE, rate)             /* pages per second */                                           \
    X(MIB, mib)               /* memory to work on, MiB */                                     \
    X(RING, ring)             /* 0 or 3: where to run the loop */                              \
    X(IRQS, irqs)             /* 0: interrupts masked (cli), 1: enabled */                     \
    X(WRITE, write)           /* 1: writes, 0: reads */                                        \
    X(PORT, port)             /* I/O port to use */                                            \
    X(TSC_KHZ, tsc_khz)       /* TSC frequency if the guest cannot find it out */              \
    X(INSN, insn)             /* which instruction (guest `badinsn`) */                        \
    X(DEADLINE, tsc_deadline) /* 0: do not use the TSC-deadline timer */                       \
    X(SEED, seed)             /* pattern seed */                                               \
    X(CASE, case)             /* what to try (guest `hostile`: enum hostile_case) */           \
    X(DEVICE, device)         /* virtio device to use: its id (virtio 1.2, 5) */               \
    X(QUEUE, queue)           /* of that device */                                             \
    X(PACKED, packed)         /* 1: packed rings, 0: split rings */                            \
    X(EVENTS, events)         /* 1: event indexes, 0: flags */                                 \
    X(DEPTH, depth)           /* requests at a time */                                         \
    X(KIB, kib)               /* size of a request, KiB */                                     \
    X(DOORBELLS, doorbells)   /* how many to ring */                                           \
    X(NOISE, noise)           /* memory to fill with noise before anything else, MiB */

enum ucall_param {
#define UCALL_PARAM_ENUM(suffix, word) UCALL_P_##suffix,
    UCALL_PARAMS(UCALL_PARAM_ENUM)
#undef UCALL_PARAM_ENUM
        UCALL_P_COUNT
};

// Values: X(enum suffix, name for reports, meaning of value[index]). Append only.
#define UCALL_VALUES(X)                                                                            \
    X(CPUS, cpus)               /* vCPUs running */                                                \
    X(CPU_COUNT, cpu_count)     /* [cpu] how far this CPU counted */                               \
    X(CPU_IPIS, cpu_ipis)       /* [cpu] IPIs received */                                          \
    X(CPU_APIC_ID, cpu_apic_id) /* [cpu] local APIC id */                                          \
    X(TSC_DELTA, tsc_delta)     /* TSC cycles of the measured loop */                              \
    X(TSC_KHZ, tsc_khz)         /* TSC frequency as the guest knows it, 0 unknown */               \
    X(COUNT, count)             /* operations done */                                              \
    X(RANGES, ranges)           /* number of ranges announced by the three below */                \
    X(RANGE_BASE, range_base)   /* [range] first guest-physical address */                         \
    X(RANGE_PAGES, range_pages) /* [range] 4 KiB pages */                                          \
    X(RANGE_CPU, range_cpu)     /* [range] its CPU; a CPU's ranges follow in walking order */      \
    X(HEARTBEAT, heartbeat)     /* [cpu] address of a u64 that counts loops */                     \
    X(GAP, gap)                 /* [cpu] address of a struct ucall_gap */                          \
    X(TIMER_IRQS, timer_irqs)   /* local APIC timer interrupts seen */                             \
    X(PIT_IRQS, pit_irqs)       /* PIT interrupts through the I/O APIC seen */                     \
    X(KVMCLOCK, kvmclock)       /* 1: the kvmclock page was checked, 0: the MSR is not offered */  \
    X(SERIAL_BYTES, serial_bytes) /* bytes echoed */                                               \
    X(FPU_SETS, fpu_sets)   /* enum ucall_fpu bits: register sets that were loaded and compared */ \
    X(RAM_BYTES, ram_bytes) /* usable RAM in the boot memory map */                                \
    X(BOOT, boot)           /* 1: 64-bit boot protocol, 2: PVH */                                  \
    X(COUNTER, counter)     /* [cpu] address of a u64 that a spinning CPU increments */            \
    X(AREA_BASE, area_base) /* [area] address of memory that devices may write ... */              \
    X(AREA_BYTES, area_bytes) /* [area] ... and its length: all else stays as it was */            \
    X(WAKE_P50, wake_p50)     /* [cpu] timer to handler, us: median */                             \
    X(WAKE_P99, wake_p99)     /* [cpu] ... 99th percentile */                                      \
    X(WAKE_MAX, wake_max)     /* [cpu] ... worst */                                                \
    X(STEAL_NS, steal_ns)     /* [cpu] KVM's steal time as the guest reads it */

enum ucall_value {
#define UCALL_VALUE_ENUM(suffix, name) UCALL_V_##suffix,
    UCALL_VALUES(UCALL_VALUE_ENUM)
#undef UCALL_VALUE_ENUM
        UCALL_V_COUNT_OF_IDS
};

enum ucall_fpu {
    UCALL_FPU_X87 = 1 << 0,
    UCALL_FPU_SSE = 1 << 1,
    UCALL_FPU_AVX = 1 << 2,
    UCALL_FPU_AVX512 = 1 << 3,
};

// In guest memory, written by guest `dirty`, read by the host at any time. Cycles are TSC cycles.
struct ucall_gap {
    uint64_t longest;    // longest distance between two neighbouring looks at the TSC
    uint64_t longest_at; // TSC at the end of that gap
    uint64_t total;      // pages dirtied so far
    uint64_t reset;      // the host writes nonzero: the guest zeroes `longest` and then `reset`
};

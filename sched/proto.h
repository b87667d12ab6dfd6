// SPDX-License-Identifier: Apache-2.0
// What a VM and the scheduler say to each other: messages on a Unix SEQPACKET socket, and one page
// of shared memory per VM that makes the turns themselves free of messages.
//
//     VM                                   daemon
//      | -- REGISTER (weight, cap, tids) -> |  the tids must be threads of the peer's process
//      | <- REGISTERED + page, doorbell --- |  two descriptors, SCM_RIGHTS
//      |   doorbell ----------------------> |  the page is mapped: turns may begin
//      |                                    |
//      |   slot.grant = WAIT, signal        |  a turn ends: the thread leaves KVM_RUN,
//      |   slot.state = WANTS, doorbell --> |  says that it wants another and sleeps on `grant`
//      |   slot.grant = RUN, futex wake <-- |  its next turn
//      |                                    |
//      | -- SET / STATUS / TRACE ---------> |  also from `ferry sched` and `ferry set`
//      | <- OK, ERROR, DOCUMENT + memfd --- |
//      | -- (closes the socket) ----------> |  that is all there is to unregistering
//
// Who speaks is who sends (SCM_CREDENTIALS), with the rights of who connected (SO_PEERCRED), if
// those are less.
//
// A daemon that dies closes the socket: the VM maps zeroes over its page, and zero is FREE.
// Messages have a fixed size by their type; either side checks the other's before use.
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#define SCHED_SOCKET "/run/ferry/sched.sock"

enum {
    SCHED_MAGIC = 0x68635346, // "FSch"
    SCHED_VERSION = 1,
    SCHED_NAME_MAX = 64, // with its NUL
    SCHED_VCPUS_MAX = 64,
    SCHED_PCPUS_MAX = 1024,
    SCHED_MASK_WORDS = SCHED_PCPUS_MAX / 64,
    SCHED_TEXT_MAX = 256,
};

enum sched_msg_type {
    SCHED_REGISTER = 1,
    SCHED_REGISTERED,
    SCHED_SET,
    SCHED_STATUS,
    SCHED_TRACE,
    SCHED_OK,
    SCHED_ERROR,
    SCHED_DOCUMENT, // a memfd: JSON text (STATUS) or a struct sched_trace_head (TRACE)
    // From then on the connection, whoever holds it, may register VMs of its process and set
    // their shares, and that is all. Answered by OK.
    SCHED_CONFINE,
    SCHED_TYPES,
};

struct sched_head {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
};

static inline struct sched_head sched_head(unsigned type)
{
    return (struct sched_head) {SCHED_MAGIC, SCHED_VERSION, (uint16_t)type};
}

// pCPUs by number, one bit each. All zero: no preference.
struct sched_mask {
    uint64_t bits[SCHED_MASK_WORDS];
};

enum { SCHED_HAS_WEIGHT = 1, SCHED_HAS_CAP = 2, SCHED_HAS_AFFINITY = 4 };

// Signed, so that a refusal can say what was asked for.
struct sched_share {
    uint32_t has; // SCHED_HAS_...; the rest keeps its value (REGISTER: its default)
    int32_t weight;
    int32_t cap;            // percent of one pCPU, 0 = none
    uint32_t reserved;      // 0
    struct sched_mask hard; // may run only there
    struct sched_mask soft; // rather there
};

struct sched_register {
    struct sched_head head;
    char name[SCHED_NAME_MAX];
    struct sched_share share;
    uint32_t nr_vcpus;
    uint32_t signal; // real-time signal whose handler makes the thread look at its slot
    int32_t tids[SCHED_VCPUS_MAX];
};

struct sched_registered {
    struct sched_head head;
    uint32_t slice_us;
    uint32_t reserved;
};

struct sched_set {
    struct sched_head head;
    char name[SCHED_NAME_MAX]; // empty: the VM of this connection
    struct sched_share share;
};

struct sched_ask { // STATUS, TRACE
    struct sched_head head;
    uint32_t last_ms; // TRACE: how far back, 0 = all there is
    uint32_t reserved;
};

struct sched_error {
    struct sched_head head;
    int32_t code; // -errno
    char text[SCHED_TEXT_MAX];
};

union sched_msg {
    struct sched_head head;
    struct sched_register reg;
    struct sched_registered registered;
    struct sched_set set;
    struct sched_ask ask;
    struct sched_error error;
};

// --- the trace: this head, `nr_names` names, `nr_records` of sched/record.h,
// oldest first, vCPUs by their index

struct sched_trace_head {
    uint32_t magic, version;
    uint64_t now_ns, slice_ns;
    uint32_t nr_pcpus, nr_names, nr_records, reserved;
    int32_t cpus[64]; // the host's number of each pCPU
};

struct sched_trace_name {
    uint32_t vm;
    char name[SCHED_NAME_MAX];
};

// --- the page

// Zero lets a thread run, so that a page of zeroes is a VM without a scheduler.
enum sched_grant {
    GRANT_FREE = 0,
    GRANT_RUN,
    GRANT_WAIT,   // ring when you want a turn
    GRANT_QUEUED, // your turn comes; no need to ring
};
enum sched_want { WANT_RUNNING = 0, WANT_TURN, WANT_NOTHING };

// Either side writes only its own words; the daemon believes none of the VM's: what a thread really
// does it reads from the kernel.
struct sched_slot {
    _Alignas(64) _Atomic uint32_t grant; // futex; daemon
    _Atomic uint32_t pcpu;               // daemon: of the last turn
    _Atomic uint64_t wait_ns;           // daemon: waited for turns so far; what steal time grows by
    _Alignas(64) _Atomic uint32_t want; // VM
};

struct sched_page {
    uint32_t magic, nr_slots;
    struct sched_slot slots[SCHED_VCPUS_MAX];
};

enum { SCHED_PAGE_BYTES = 12288 };
_Static_assert(sizeof(struct sched_page) <= SCHED_PAGE_BYTES, "slots fit their mapping");
_Static_assert(sizeof(struct sched_slot) == 128, "two cache lines, one for each writer");

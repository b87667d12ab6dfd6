// SPDX-License-Identifier: Apache-2.0
// The format of guests in motion: a migration stream is a sequence of records. docs/formats.md
// explains it; everything here is pure parsing and building.
//
//   record := header (16 bytes), meta (meta_len), data (data_len)        all little endian
//   header := u16 type, u16 flags, u32 meta_len, u32 data_len, u32 crc
//   crc    := CRC-32C of the header's first 12 bytes and meta
//   data   := only after PAGES (4 KiB pages, each with its sum in meta), STATE, BLOCKS and LATE
//             (crc in meta)
//
//   source                                                   destination
//     |  main connection                                          |
//     | HELLO(main, id, versions) ------------------------------> |
//     | <------------------------------- HELLO(chosen version, id)|
//     | MACHINE(RAM, cpus, CPUID, json) ------------------------> | checks, builds the VM
//     | <--------------------------------------------------- READY|
//     |   page connections, if MACHINE says so: HELLO(stream, i)->|
//     |     and from then on there: PAGES ... ROUND(pass) ------> |
//     |   demand connection (post-copy): HELLO(demand, id) -----> |
//     | PAGES ... ROUND ----------------------------------------> | while the guest runs,
//     | <--------------------------------------------------- ROUND| again and again
//     | DISCARD ... ROUND --------------------------------------> | (post-copy)
//     | <--------------------------------------------------- ROUND|
//     | = guest paused =                                          |
//     | PAGES ... (pre-copy) | DISCARD, ABSENT ... (post-copy) -> |
//     | STATE, PREPARE -----------------------------------------> | loads
//     | <------------------------------------------------ PREPARED|
//     | COMMIT -------------------------------------------------> | = guest runs =
//     | <------------------------------------------------- RUNNING|
//     |   post-copy only:                                         |
//     | PAGES, LATE, ROUND ... (pushed) ------------------------> |
//     | <----------------------- ROUND for each, when it is placed|
//     |   demand: <------------------------------------- WANT, ASK|
//     |   demand: PAGES, LATE ----------------------------------> |
//     | END ----------------------------------------------------> |
//     | <---------------------------------------- FAULTS, COMPLETE|
//     | BYE ----------------------------------------------------> |
//     |                                                           |
//     |   post-copy broke off, over new connections:              |
//     | HELLO(recover, id) -------------------------------------> |
//     | <---------------------- HELLO, DISCARD, ABSENT ..., READY |
//     |   demand: HELLO(demand, id) ----------------------------> | = guest runs again =
//     | PAGES ... as before                                       |
//     |                                                           |
//     | ABORT(text): either side, at any time before COMMIT       |
//     |   query connection, when the link broke after PREPARE:    |
//     | HELLO(query, id) ---------------------------------------> |
//     | <------------------------------------- ANSWER(yes|no|...) |
#pragma once

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "vmm/error.h"
#include "vmm/util.h"

// A side speaks every version in [WIRE_OLDEST, WIRE_VERSION]: the current and the previous one.
// Version 2: ROUND is echoed after COMMIT as well, FAULTS comes before COMPLETE, and a post-copy
// that broke off goes on over new connections (RECOVER); PACKED carries pages in fewer bytes,
// MEMORY hands all of them over within a host.
enum { WIRE_VERSION = 2, WIRE_OLDEST = 1 };

enum wire_type {
    WIRE_HELLO = 1,
    WIRE_MACHINE,
    WIRE_READY,
    WIRE_PAGES,
    WIRE_ROUND,
    WIRE_DISCARD,
    WIRE_STATE,
    WIRE_PREPARE,
    WIRE_PREPARED,
    WIRE_COMMIT,
    WIRE_RUNNING,
    WIRE_WANT,
    WIRE_END,
    WIRE_COMPLETE,
    WIRE_BYE,
    WIRE_ABORT,
    WIRE_ANSWER,
    WIRE_FAULTS,
    WIRE_PACKED,
    WIRE_MEMORY,
    WIRE_DISKS,
    WIRE_BLOCKS,
    WIRE_KEPT,
    WIRE_ABSENT,
    WIRE_LATE,
    WIRE_ASK,
    WIRE_TYPES,
};

enum {
    WIRE_HEADER_LEN = 16,
    WIRE_BATCH_PAGES = 512,         // data pages in a PAGES record, at most (2 MiB)
    WIRE_RUNS_MAX = 512,            // runs in a PAGES record, at most
    WIRE_WANT_MAX = 256,            // pages in a WANT record, at most
    WIRE_DISCARD_WORDS = 64 * 1024, // bitmap words in a DISCARD record, at most (4 Mi pages)
    WIRE_JSON_MAX = 64 * 1024,
    WIRE_CPUID_MAX = 256,
    WIRE_STATE_MAX = 16 * 1024 * 1024,
    WIRE_TEXT_MAX = 400,
    WIRE_STREAMS_MAX = 16, // page connections, at most
    WIRE_ID_LEN = 16,
    WIRE_DISKS_MAX = 32,            // that go with a guest
    WIRE_EXTENTS_MAX = 512,         // in a BLOCKS record
    WIRE_BLOCKS_DATA = 1024 * 1024, // bytes of data in one, at most
    WIRE_LATE_MAX = 16,             // blocks in a LATE record
};

#define WIRE_MAGIC "FERRYMIG" // 8 bytes, no terminator on the wire

struct wire_header {
    uint16_t type, flags;
    uint32_t meta_len, data_len, crc;
};

enum wire_connection { WIRE_MAIN = 1, WIRE_DEMAND, WIRE_QUERY, WIRE_RECOVER, WIRE_STREAM };

struct wire_hello {
    char magic[8];
    uint16_t version, oldest; // the answer has the chosen version in both
    uint16_t kind;            // enum wire_connection
    uint16_t stream;          // WIRE_STREAM: which of MACHINE's; else 0
    uint8_t id[WIRE_ID_LEN];
};

enum {
    WIRE_MACHINE_POSTCOPY = 1,  // a demand connection will follow
    WIRE_MACHINE_SHARED = 2,    // same host: MEMORY will follow, and no pages
    WIRE_MACHINE_DISKS = 0x100, // DISKS follows: they go with the guest (migrate/blockmove.h)
};

struct wire_machine {  // then regions, CPUID entries, JSON
    uint64_t ram_size; // bytes
    uint32_t cpus;
    uint32_t nr_regions;
    uint32_t nr_cpuid;
    uint32_t json_len; // without terminator
    uint32_t flags;
    uint32_t streams; // page connections that follow: 0, or 2 to WIRE_STREAMS_MAX
};

struct wire_region {
    uint64_t gpa, size;
};

enum wire_run_kind { WIRE_RUN_ZERO, WIRE_RUN_DATA };

struct wire_pages { // then wire_run[nr_runs], u32 sum[nr_data], `pad` zero bytes
    uint32_t nr_runs;
    uint32_t nr_data; // pages of data that follow meta
    uint32_t pad;     // < 4096: lets a file keep its page data page-aligned
    uint32_t reserved;
};

struct wire_run {   // runs are in ascending order and do not overlap
    uint64_t first; // page index
    uint32_t count; // pages, >= 1
    uint32_t kind;  // enum wire_run_kind
};

enum wire_packed_kind {
    WIRE_PACKED_RAW,   // 4096 bytes
    WIRE_PACKED_LZ4,   // an LZ4 block
    WIRE_PACKED_DELTA, // an LZ4 block of the page XOR what came of it last
};

struct wire_packed_page {
    uint64_t page;
    uint16_t len, kind; // 1 to 4096 bytes of data; enum wire_packed_kind
    uint32_t sum;       // of the page
};

struct wire_packed { // then wire_packed_page[nr]; data has theirs, one after the other
    uint32_t nr;     // 1 to WIRE_BATCH_PAGES
    uint32_t reserved;
};

struct wire_memory { // then one byte, with a descriptor of guest memory (SCM_RIGHTS)
    uint64_t size;   // bytes
};

// Echoed when everything before it has been dealt with, and what came before the ROUND of this pass
// on every page connection. There it is not echoed, and passes count from 1 on.
struct wire_round {
    uint32_t round; // completed
    uint32_t pass;
    uint64_t data_pages; // sent so far
};

// Then u64 words[]: a set bit = this page is not valid at the destination. From the destination,
// when it recovers: all that it lacks.
struct wire_discard {
    uint64_t first; // page index, a multiple of 64
    uint64_t pages;
};

enum { WIRE_DISK_OVERLAY = 1 };

struct wire_disk {     // DISKS: one for each disk that goes with the guest
    uint32_t instance; // of the device
    uint32_t flags;
    uint64_t size;      // bytes
    uint64_t base_size; // of an overlay: of what lies under it, which stays
    uint32_t base_sum;
    uint32_t reserved;
    uint8_t since[WIRE_ID_LEN]; // the move since which its changes are known; zeroes: none
};

// From the destination, before READY: of those in DISKS it has what left by the move `since`.
struct wire_kept {
    uint32_t disks; // a bit each
    uint32_t flags;
};

// It can run the guest before all blocks are there; who does not know the flag sends or sees 0.
enum { WIRE_KEPT_LATE = 1 };

// Then u64 words[]: a set bit = this block is not at the destination. Before PREPARE with
// WIRE_PREPARE_BLOCKS, and from the destination, when it recovers.
struct wire_absent {
    uint32_t disk; // place in DISKS
    uint32_t reserved;
    uint64_t first; // block, a multiple of 64
    uint64_t blocks;
};

// Then wire_extent[nr]; the data of those that have some follow. After COMMIT: what those blocks
// are; where no extent is they stay as they are.
struct wire_late {
    uint32_t disk;
    uint32_t nr;
    uint32_t sum;    // CRC-32C of all data
    uint32_t blocks; // 1 to WIRE_LATE_MAX
    uint64_t first;
};

struct wire_ask { // then u64 block[nr]: somebody waits for them
    uint32_t nr;  // 1 to WIRE_WANT_MAX
    uint32_t disk;
};

struct wire_blocks { // then wire_extent[nr]; the data of those that have some follow
    uint32_t disk;   // place in DISKS
    uint32_t nr;
    uint32_t sum; // CRC-32C of all data
    uint32_t reserved;
};

struct wire_extent {
    uint64_t offset; // bytes of the disk
    uint32_t len;
    uint32_t kind; // enum wire_run_kind
};

struct wire_state {
    uint32_t len; // = data_len
    uint32_t crc; // CRC-32C of the blob
};

enum { WIRE_PREPARE_POSTCOPY = 1, WIRE_PREPARE_STAY_PAUSED = 2, WIRE_PREPARE_BLOCKS = 4 };

struct wire_prepare {
    uint32_t flags;
    uint32_t pass;  // the last one of the page connections, which are closed then
    uint64_t stale; // pages marked by DISCARD, to be sent after COMMIT
};

struct wire_times { // PREPARED, RUNNING, COMPLETE: the destination's figures
    uint64_t load_ns, resume_ns;
    uint64_t faults;    // userfaults taken
    uint64_t requested; // pages asked for
};

// Bucket i of latencies: up to 4 us exactly, then four buckets an octave (wire_latency_bucket).
enum { WIRE_LATENCY_BUCKETS = 64 };

struct wire_faults { // how long the guest waited for pages it asked for, the destination's clock
    uint64_t count[WIRE_LATENCY_BUCKETS];
    uint64_t total_ns, max_ns;
};

struct wire_commit {
    uint8_t id[WIRE_ID_LEN];
};

struct wire_want { // then u64 page[nr]
    uint32_t nr;
    uint32_t reserved;
};

struct wire_end {
    uint64_t data_pages, zero_pages; // of all PAGES records before
};

enum wire_answer_kind { WIRE_ANSWER_YES = 1, WIRE_ANSWER_NO, WIRE_ANSWER_UNKNOWN };

struct wire_answer {
    uint32_t answer;
    uint32_t reserved;
};

// --- endpoints: where records are read from and written to

struct wire {
    const char *name; // for messages: "migration link to tcp:...", "snapshot a.ferry"
    // All of the bytes or an error; may change the iovec array. -ENODATA: ended early.
    int (*readv)(struct wire *w, struct iovec *iov, unsigned nr, struct error *err);
    int (*writev)(struct wire *w, struct iovec *iov, unsigned nr, struct error *err);
    uint64_t in, out; // bytes so far
};

int wire_read(struct wire *w, void *data, size_t len, struct error *err);

// Reading from memory (tests, fuzzers).
struct wire_mem {
    struct wire wire;
    const uint8_t *data;
    size_t len;
};
void wire_mem_init(struct wire_mem *m, const void *data, size_t len);

// Writes one record. `data` may be NULL with nr_data 0; its iovecs may be changed. At most
// WIRE_RUNS_MAX + 2 of them.
int wire_put(struct wire *w, enum wire_type type, unsigned flags, const void *meta, size_t meta_len,
             struct iovec *data, unsigned nr_data, struct error *err);

// A record's header and checked meta; its data is still unread in the endpoint.
struct wire_record {
    struct wire_header header;
    uint8_t *meta; // grows to the limit of the type, never beyond
    size_t cap;
    uint64_t offset; // where it began in its stream
};

int wire_get(struct wire *w, struct wire_record *record, struct error *err);
void wire_record_free(struct wire_record *record);
// wire_get, then -EPROTO unless it is of `type`. ABORT becomes -EREMOTEIO (which no
// socket call gives) with the peer's text.
int wire_expect(struct wire *w, struct wire_record *record, enum wire_type type, struct error *err);
// The error an unexpected record is.
int wire_unexpected(const struct wire *w, const struct wire_record *record, const char *expected,
                    struct error *err);

const char *wire_type_name(unsigned type);

unsigned wire_latency_bucket(uint64_t ns);
// The least latency of the bucket, us.
uint64_t wire_latency_us(unsigned bucket);
// What `percent` of all latencies stay below, us; 0 without any.
uint64_t wire_latency_percentile(const struct wire_faults *faults, double percent);

// --- pure parts

// Lengths are within the limits of the type; unknown types and flags are errors.
int wire_header_check(const struct wire_header *h, struct error *err);
uint32_t wire_header_crc(const struct wire_header *h, const void *meta);

// Picks the newest version both speak. -EPROTONOSUPPORT names both ranges.
int wire_version_choose(unsigned mine_oldest, unsigned mine_newest, unsigned peer_oldest,
                        unsigned peer_newest, unsigned *version, struct error *err);

int wire_hello_parse(const struct wire_record *record, struct wire_hello *hello, struct error *err);
void wire_hello_fill(struct wire_hello *hello, enum wire_connection kind,
                     const uint8_t id[WIRE_ID_LEN]);

// A machine description, checked for itself: regions are page-aligned, in order, add up.
struct machine {
    uint64_t ram_size;
    uint32_t cpus;
    uint32_t nr_regions;
    uint32_t flags;
    uint32_t streams;
    struct wire_region regions[2];
    struct kvm_cpuid2 *cpuid;
    char *json;
};

int machine_parse(const struct wire_record *record, struct machine *machine, struct error *err);
// Builds the meta of a MACHINE record (malloc'd).
int machine_encode(const struct machine *machine, void **meta, size_t *len, struct error *err);
void machine_free(struct machine *machine);

// Views into a PAGES record, checked against the guest's number of pages: runs ascend, lie inside,
// counts and lengths agree.
struct wire_pages_view {
    struct wire_pages head;
    const uint8_t *runs; // struct wire_run[nr_runs], unaligned
    const uint8_t *sums; // u32[nr_data], unaligned
};

int wire_pages_parse(const struct wire_record *record, uint64_t ram_pages,
                     struct wire_pages_view *view, struct error *err);
struct wire_run wire_pages_run(const struct wire_pages_view *view, unsigned index);
uint32_t wire_pages_sum(const struct wire_pages_view *view, unsigned index);

// Copies the entries out (room for WIRE_BATCH_PAGES): pages exist, lengths add up to the data's.
int wire_packed_parse(const struct wire_record *record, uint64_t ram_pages,
                      struct wire_packed_page *entries, unsigned *nr, struct error *err);

// A bitmap of all pages, as DISCARD records.
int wire_discard_put(struct wire *w, const uint64_t *bitmap, uint64_t pages, struct error *err);
// ORs the record's bits into `stale` (a bitmap of ram_pages bits).
int wire_discard_parse(const struct wire_record *record, uint64_t ram_pages, uint64_t *stale,
                       struct error *err);

// Copies the page indexes out; *nr <= WIRE_WANT_MAX, each < ram_pages.
int wire_want_parse(const struct wire_record *record, uint64_t ram_pages, uint64_t *pages,
                    unsigned *nr, struct error *err);

// Records whose meta is one fixed struct (ROUND, STATE, PREPARE, ...): copies it.
void wire_fixed(const struct wire_record *record, void *out, size_t len);

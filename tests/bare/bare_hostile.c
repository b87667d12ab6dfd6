// SPDX-License-Identifier: Apache-2.0
// A guest whose driver is malicious (guest/bare/guests/hostile.c), one attack after the other, on
// both transports and both ring formats. Whatever it does:
//  - the VM goes on, can be paused, saved, loaded elsewhere or resumed, and stopped;
//  - the attacked device is lost until its reset at most, another one is not;
//  - guest memory that no descriptor offered, and the disk, keep their bytes;
//  - the log gets one line for each offence, and a flood of them the rate limit's share;
//  - the process does not grow.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "devices/virtio_balloon.h"
#include "devices/virtio_blk.h"
#include "devices/virtio_console.h"
#include "devices/virtio_net.h"
#include "devices/virtio_rng.h"
#include "devices/virtio_vsock.h"
#include "guest/bare/hostile_cases.h"
#include "tests/bare/bare.h"
#include "vmm/util.h"

enum { MEMORY = 32 * 1024 * 1024, GROWTH_MAX = 64 * 1024 * 1024, LINES_A_SECOND = 11 };

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

static const struct hostile {
    const char *name;
    uint32_t device;
    unsigned rings;
    int lines;
} cases[] = {
#define CASE(NAME, name, device, rings, lines) [HOSTILE_##NAME] = {#name, device, rings, lines},
    HOSTILE_CASES(CASE)
#undef CASE
};

struct setting { // of one run
    enum hostile_case what;
    uint32_t device;
    unsigned queue; // that the device reads at once
    bool packed, pci;
};

enum { PEERS_MAX = 4 };

struct rig {
    struct setting setting;
    char disk[64];
    int log;
    struct virtio_blk_config blk;
    struct virtio_rng_config rng;
    union {
        struct virtio_attach attach;
        struct virtio_net_config net;
        struct virtio_console_config console;
        struct virtio_vsock_config vsock;
        struct virtio_balloon_config balloon;
    } other;
    int peers[PEERS_MAX]; // host's ends of sockets; a thread takes what the guest sends
    atomic_uint nr_peers;
    atomic_uint bad_frames; // reached the network though their header says what cannot be
    atomic_bool done;
    pthread_t reader;
    struct bare_device devices[3]; // disk, entropy, and the attacked one if it is another
    struct bare_config config;
};

// --- what there is before, and what has to be left of it

static void disk_create(struct rig *r)
{
    uint8_t sector[BLK_SECTOR];
    snprintf(r->disk, sizeof(r->disk), "/tmp/ferry-hostile-XXXXXX");
    int fd = mkstemp(r->disk);
    ck_assert_int_ge(fd, 0);
    for (unsigned i = 0; i < HOSTILE_SECTORS; i++) {
        memset(sector, HOSTILE_SECTOR(i), sizeof(sector));
        if (write_all(fd, sector, sizeof(sector)))
            ck_abort_msg("%s: %s", r->disk, strerror(errno));
    }
    close(fd);
}

static void disk_check(struct rig *r)
{
    uint8_t sector[BLK_SECTOR], wanted[BLK_SECTOR];
    int fd = open(r->disk, O_RDONLY);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(lseek(fd, 0, SEEK_END), HOSTILE_SECTORS * BLK_SECTOR);
    for (unsigned i = 0; i < HOSTILE_SECTORS; i++) {
        memset(wanted, HOSTILE_SECTOR(i), sizeof(wanted));
        bool scratch = i >= HOSTILE_SCRATCH && i < HOSTILE_SCRATCH + 8;
        if (pread(fd, sector, sizeof(sector), (off_t)i * BLK_SECTOR) != BLK_SECTOR ||
            (!scratch && memcmp(sector, wanted, sizeof(sector))))
            ck_abort_msg("sector %u changed", i);
    }
    close(fd);
}

static void canaries_plant(struct bare *b)
{
    memset(ram_at(&b->vm->ram, HOSTILE_ARENA, MEMORY - HOSTILE_ARENA), HOSTILE_CANARY,
           MEMORY - HOSTILE_ARENA);
}

// Wipes what the guest called writable, then all bytes must be canaries.
static void canaries_check(struct bare *b)
{
    unsigned areas = 0;
    for (; areas < VM_MAX_VCPUS && bare_has_value(b, UCALL_V_AREA_BYTES, areas); areas++) {
        uint64_t at = bare_value(b, UCALL_V_AREA_BASE, areas);
        uint64_t bytes = bare_value(b, UCALL_V_AREA_BYTES, areas);
        void *p = ram_at(&b->vm->ram, at, bytes);
        ck_assert_msg(p && at >= HOSTILE_ARENA, "area at 0x%llx", (unsigned long long)at);
        memset(p, HOSTILE_CANARY, bytes);
    }
    ck_assert_uint_ge(areas, 10);
    const size_t size = MEMORY - HOSTILE_ARENA;
    const uint8_t *all = ram_at(&b->vm->ram, HOSTILE_ARENA, size);
    if (all[0] == HOSTILE_CANARY && !memcmp(all, all + 1, size - 1))
        return; // byte by byte it takes longer than the attack, above all with sanitizers
    for (size_t i = 0; i < size; i++)
        if (all[i] != HOSTILE_CANARY)
            ck_abort_msg("guest memory at 0x%zx was written: 0x%02x", i + HOSTILE_ARENA, all[i]);
}

static unsigned log_lines(const struct rig *r, char text[4096])
{
    unsigned lines = 0;
    ssize_t n = pread(r->log, text, 4095, 0);
    text[n > 0 ? n : 0] = 0;
    for (const char *p = text; (p = strchr(p, '\n')); p++)
        lines++;
    return lines;
}

static void log_check(const struct rig *r, uint64_t ns)
{
    char text[4096];
    unsigned lines = log_lines(r, text);
    int wanted = cases[r->setting.what].lines;
    if (wanted == HOSTILE_FLOOD)
        ck_assert_msg(lines && lines <= LINES_A_SECOND * (ns / 1000000000u + 2), "%u lines: %s",
                      lines, text);
    else
        ck_assert_msg((int)lines == wanted, "%u lines, expected %d: %s", lines, wanted, text);
}

static uint64_t resident(void)
{
    char text[128] = "";
    unsigned long total = 0, pages = 0;
    int fd = open("/proc/self/statm", O_RDONLY);
    ck_assert(fd >= 0 && read(fd, text, sizeof(text) - 1) > 0);
    close(fd);
    ck_assert_int_eq(sscanf(text, "%lu %lu", &total, &pages), 2);
    return (uint64_t)pages * PAGE_SIZE;
}

// --- a run

// The device's end of a new socket.
static int socket_new(struct rig *r, int type)
{
    int ends[2];
    ck_assert_uint_lt(r->nr_peers, PEERS_MAX);
    ck_assert_int_eq(socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), 0);
    r->peers[r->nr_peers] = ends[0];
    r->nr_peers++;
    return ends[1];
}

// What no network may get to see from this guest, which is offered neither checksums nor segments.
static bool frame_is_bad(const uint8_t *frame, ssize_t len)
{
    enum { HEADER = 12, ETHERNET_MIN = 14, FRAME_MAX = 64 * 1024 + ETHERNET_MIN };
    return len < HEADER + ETHERNET_MIN || len > HEADER + FRAME_MAX || frame[0] || frame[1];
}

static void *reader_main(void *arg)
{
    enum { STEP_MS = 10 }; // only bounds how late a new peer or the end is seen
    static __thread uint8_t data[64 * 1024];
    struct rig *r = arg;
    bool gone[PEERS_MAX] = {false};
    while (!r->done) {
        struct pollfd fds[PEERS_MAX];
        unsigned nr = r->nr_peers;
        for (unsigned i = 0; i < nr; i++)
            fds[i] = (struct pollfd) {.fd = gone[i] ? -1 : r->peers[i], .events = POLLIN};
        poll(fds, nr, STEP_MS);
        for (unsigned i = 0; i < nr; i++) {
            ssize_t n;
            while ((n = recv(r->peers[i], data, sizeof(data), MSG_TRUNC)) > 0)
                if (r->setting.device == VIRTIO_ID_NET && frame_is_bad(data, n))
                    r->bad_frames++;
            gone[i] |= !n;
        }
    }
    return NULL;
}

// Fills in r->other, for a VM that is made next.
static const struct device_class *other_make(struct rig *r)
{
    const struct device_class *class = NULL;
    struct error err = {0};
    char text[128];
    int ret = 0;
    memset(&r->other, 0, sizeof(r->other));
    switch (r->setting.device) {
    case VIRTIO_ID_NET:
        r->other.net.kind = NET_PACKETS;
        r->other.net.fds[0] = socket_new(r, SOCK_SEQPACKET);
        class = &virtio_net_class;
        break;
    case VIRTIO_ID_CONSOLE:
        snprintf(text, sizeof(text), "fd:%d", socket_new(r, SOCK_STREAM));
        ret = virtio_console_parse(text, &r->other.console, &err);
        class = &virtio_console_class;
        break;
    case VIRTIO_ID_VSOCK:
        r->other.vsock.cid = VSOCK_CID_MIN;
        snprintf(r->other.vsock.path, sizeof(r->other.vsock.path), "%s.vsock", r->disk);
        class = &virtio_vsock_class;
        break;
    case VIRTIO_ID_BALLOON:
        class = &virtio_balloon_class;
        break;
    }
    ck_assert_msg(!ret, "%s", err.text);
    r->other.attach.packed = r->setting.packed;
    return class;
}

static void rig_init(struct rig *r, const struct setting *s)
{
    const struct hostile *c = &cases[s->what];
    memset(r, 0, sizeof(*r));
    r->setting = *s;
    disk_create(r);
    r->log = memfd_create("log", MFD_CLOEXEC);
    ck_assert_int_ge(r->log, 0);
    r->blk = (struct virtio_blk_config) {.attach = {.packed = s->packed}, .queues = 1};
    memcpy(r->blk.path, r->disk, sizeof(r->disk));
    r->rng = (struct virtio_rng_config) {.attach = {.packed = s->packed}};
    r->devices[0] = (struct bare_device) {&virtio_blk_class, &r->blk.attach};
    r->devices[1] = (struct bare_device) {&virtio_rng_class, &r->rng.attach};
    r->devices[2] = (struct bare_device) {other_make(r), &r->other.attach};
    ck_assert_int_eq(pthread_create(&r->reader, NULL, reader_main, r), 0);
    r->config = (struct bare_config) {.guest = "hostile",
                                      .cpus = strstr(c->name, "flip_") ? 2 : 1,
                                      .memory = MEMORY,
                                      .hold = true,
                                      .devices = r->devices,
                                      .nr_devices = r->devices[2].class ? 3 : 2,
                                      .pci = s->pci,
                                      .log_fd = r->log,
                                      .params = {{UCALL_P_CASE, s->what},
                                                 {UCALL_P_DEVICE, s->device},
                                                 {UCALL_P_PACKED, s->packed},
                                                 {UCALL_P_EVENTS, s->pci},
                                                 {UCALL_P_QUEUE, s->queue}},
                                      .nr_params = 5};
}

// The guest goes on in a new VM.
static void move(struct bare *from, struct bare *to, struct rig *r, struct stream_mem *blob)
{
    struct bare_config config = r->config;
    config.guest = NULL;
    other_make(r);
    r->blk.attach.arrives = r->rng.attach.arrives = r->other.attach.arrives = true;
    bare_create(to, &config);
    bare_load(to, from, blob);
    memcpy(to->values, from->values, sizeof(to->values));
    bare_end(from);
    bare_run(to);
}

static void attack(const struct setting *s)
{
    struct rig r;
    struct bare vm[2], *b = &vm[0];
    struct stream_mem blob;
    rig_init(&r, s);
    uint64_t before = resident(), begin = time_ns();
    bare_create(b, &r.config);
    canaries_plant(b);
    bare_run(b);
    bare_wait_syncs(b, 1); // HOSTILE_ATTACKED
    bare_pause(b);
    bare_save(b, &blob);
    if (s->packed) {
        move(b, &vm[1], &r, &blob);
        b = &vm[1];
    } else {
        bare_resume(b);
    }
    stream_mem_free(&blob);
    bare_wait_done(b);
    uint64_t grown = resident() - before;
    bare_loop_end(b);
    log_check(&r, time_ns() - begin);
    canaries_check(b);
    bare_end(b);
    disk_check(&r);
    ck_assert_msg(SANITIZED || grown < 2ull * MEMORY + GROWTH_MAX, "grew by %llu KiB",
                  (unsigned long long)grown / 1024);
    r.done = true;
    pthread_join(r.reader, NULL);
    ck_assert_uint_eq(r.bad_frames, 0);
    for (unsigned i = 0; i < r.nr_peers; i++)
        close(r.peers[i]);
    close(r.log);
    unlink(r.disk);
}

static void attacks(enum hostile_case what, uint32_t device, unsigned queue)
{
    for (unsigned i = 0; i < 4; i++) {
        const struct setting s = {what, device, queue, i & 1, i & 2};
        // The shared core behind all devices needs each setting once.
        bool core = !cases[what].device && device != VIRTIO_ID_BLK && (what + device) % 4 != i;
        if (cases[what].rings & (s.packed ? HOSTILE_PACKED : HOSTILE_SPLIT) &&
            (!core || bare_long()))
            attack(&s);
    }
}

START_TEST(attack_is_survived)
{
    static const struct {
        uint32_t id;
        unsigned queue;
    } devices[] = {{VIRTIO_ID_BLK, 0},     {VIRTIO_ID_RNG, 0},   {VIRTIO_ID_NET, 1},
                   {VIRTIO_ID_CONSOLE, 1}, {VIRTIO_ID_VSOCK, 1}, {VIRTIO_ID_BALLOON, 0}};
    enum hostile_case what = (enum hostile_case)_i;
    for (unsigned i = 0; i < ARRAY_SIZE(devices); i++)
        if (!cases[what].device || cases[what].device == devices[i].id)
            attacks(what, devices[i].id, devices[i].queue);
}
END_TEST

// HOSTILE_CASE in the environment: that one alone (tests/bare/guards).
static void add_tests(TCase *tc)
{
    const char *only = getenv("HOSTILE_CASE");
    for (int i = 0; i < HOSTILE_COUNT; i++)
        if (!only || !strcmp(only, cases[i].name))
            tcase_add_loop_test(tc, attack_is_survived, i, i + 1);
}

int main(void)
{
    return bare_main("bare_hostile", add_tests);
}

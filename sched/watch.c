// SPDX-License-Identifier: Apache-2.0
#include "sched/watch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/perf_event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vmm/util.h"

enum {
    RING_BYTES = 4096,
    MAP_BYTES = 4096 + RING_BYTES,
    SURE_NS = 50000000,    // awake for so long without a record: the kernel's own count must grow
    COUNT_NS = 1000000000, // it is taken so often
};

// CPU time in ns, or -errno when the thread is gone.
static int64_t schedstat_read(const struct sched_watch *w)
{
    char text[96];
    ssize_t n = pread(w->schedstat_fd, text, sizeof(text) - 1, 0);
    if (n <= 0)
        return n < 0 ? -errno : -ESRCH;
    text[n] = 0;
    return (int64_t)strtoull(text, NULL, 10);
}

static int proc_open(const struct sched_watch *w, const char *file)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task/%d/%s", (int)w->pid, (int)w->tid, file);
    return open(path, O_RDONLY | O_CLOEXEC);
}

// The tracepoint that tells a thread's going to sleep from its being preempted; 0: not to be had.
static uint64_t switch_tracepoint(void)
{
    char text[32];
    autoclose int fd =
        open("/sys/kernel/tracing/events/sched/sched_switch/id", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (n <= 0)
        return 0;
    text[n] = 0;
    return strtoull(text, NULL, 10);
}

// A ring that is only written to, for its waking somebody, is one that overwrites itself.
static int ring_open(const struct sched_watch *w, struct perf_event_attr *attr, bool read,
                     struct sched_watch_ring *ring)
{
    attr->size = sizeof(*attr);
    attr->sample_type = PERF_SAMPLE_TIME;
    attr->sample_id_all = attr->use_clockid = 1;
    attr->clockid = CLOCK_MONOTONIC;
    autoclose int fd =
        (int)syscall(SYS_perf_event_open, attr, w->tid, -1, -1, PERF_FLAG_FD_CLOEXEC);
    if (fd < 0)
        return -errno;
    void *p = mmap(NULL, MAP_BYTES, PROT_READ | (read ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return -errno;
    *ring = (struct sched_watch_ring) {take_fd(&fd), p};
    return 0;
}

static void ring_close(struct sched_watch_ring *ring)
{
    if (ring->fd < 0)
        return;
    munmap(ring->map, MAP_BYTES);
    close(ring->fd);
    ring->fd = -1;
}

static void ring_wakes(const struct sched_watch_ring *ring, bool on)
{
    ioctl(ring->fd, PERF_EVENT_IOC_PAUSE_OUTPUT, !on);
}

static int log_open(struct sched_watch *w)
{
    struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE,
                                   .config = PERF_COUNT_SW_DUMMY,
                                   .context_switch = 1,
                                   .watermark = 1,
                                   .wakeup_watermark = RING_BYTES};
    return ring_open(w, &attr, true, &w->log);
}

// Preempted threads are of no interest to whom it wakes; without the tracepoint they wake it, too.
static int out_open(struct sched_watch *w)
{
    struct perf_event_attr tracepoint = {.type = PERF_TYPE_TRACEPOINT,
                                         .config = switch_tracepoint(),
                                         .sample_period = 1,
                                         .wakeup_events = 1};
    struct perf_event_attr any = {.type = PERF_TYPE_SOFTWARE,
                                  .config = PERF_COUNT_SW_CONTEXT_SWITCHES,
                                  .sample_period = 1,
                                  .wakeup_events = 1};
    if (tracepoint.config && !ring_open(w, &tracepoint, false, &w->out)) {
        if (!ioctl(w->out.fd, PERF_EVENT_IOC_SET_FILTER, "prev_state & 255"))
            return 0;
        ring_close(&w->out);
    }
    return ring_open(w, &any, false, &w->out);
}

static int in_open(struct sched_watch *w)
{
    struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE,
                                   .config = PERF_COUNT_SW_DUMMY,
                                   .context_switch = 1,
                                   .watermark = 1,
                                   .wakeup_watermark = 1};
    return ring_open(w, &attr, false, &w->in);
}

static void rings_close(struct sched_watch *w)
{
    ring_close(&w->log);
    ring_close(&w->out);
    ring_close(&w->in);
}

int sched_watch_open(struct sched_watch *w, pid_t pid, pid_t tid, bool perf, struct error *err)
{
    *w = SCHED_WATCH_NONE;
    w->pid = pid;
    w->tid = tid;
    w->schedstat_fd = proc_open(w, "schedstat");
    w->stat_fd = w->schedstat_fd < 0 ? -1 : proc_open(w, "stat");
    if (w->schedstat_fd < 0 || w->stat_fd < 0) {
        int code = errno == ENOENT ? -ESRCH : -errno;
        sched_watch_close(w);
        return error_set(err, code, "thread %d of process %d: %s", (int)tid, (int)pid,
                         code == -ESRCH ? "there is none" : strerror(-code));
    }
    if (perf && (log_open(w) || out_open(w) || in_open(w)))
        rings_close(w);
    w->wakes = WAKES_OUT;
    if (w->in.fd >= 0)
        ring_wakes(&w->in, false);
    // Until its first record, it is taken for one that runs unless it sleeps.
    w->since_ns = time_ns();
    int64_t ran = schedstat_read(w);
    w->base_ns = w->seen_ns = ran > 0 ? (uint64_t)ran : 0;
    w->asleep = sched_watch_sleeps(w);
    w->on_cpu = !w->asleep;
    w->fresh = true;
    return 0;
}

void sched_watch_close(struct sched_watch *w)
{
    rings_close(w);
    if (w->schedstat_fd >= 0)
        close(w->schedstat_fd);
    if (w->stat_fd >= 0)
        close(w->stat_fd);
    w->schedstat_fd = w->stat_fd = -1;
}

int sched_watch_anchor(void)
{
    struct perf_event_attr attr = {.type = PERF_TYPE_TRACEPOINT,
                                   .size = sizeof(attr),
                                   .config = switch_tracepoint(),
                                   .disabled = 1};
    return attr.config ? (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC)
                       : -1;
}

// --- by records

static void schedstat_take(struct sched_watch *w)
{
    int64_t ran = schedstat_read(w);
    if (ran > 0 && (uint64_t)ran > w->base_ns)
        w->base_ns = (uint64_t)ran;
}

static void record_take(struct sched_watch *w, uint16_t misc, uint64_t at)
{
    bool in = !(misc & PERF_RECORD_MISC_SWITCH_OUT);
    if (w->fresh && !in) {
        schedstat_take(w);
        w->fresh = false;
    } else if (w->on_cpu && !w->fresh && at > w->since_ns) {
        w->base_ns += at - w->since_ns;
    }
    w->on_cpu = in;
    w->asleep = !in && !(misc & PERF_RECORD_MISC_SWITCH_OUT_PREEMPT);
    w->since_ns = at;
}

// A record may lie across the end of the ring.
static void ring_copy(const struct perf_event_mmap_page *page, uint64_t at, void *to, size_t size)
{
    const char *data = (const char *)page + MAP_BYTES - RING_BYTES;
    for (size_t i = 0; i < size; i++)
        ((char *)to)[i] = data[(at + i) % RING_BYTES];
}

// True when records were lost.
static bool records_take(struct sched_watch *w)
{
    struct perf_event_mmap_page *page = w->log.map;
    uint64_t head = __atomic_load_n(&page->data_head, __ATOMIC_ACQUIRE), at = page->data_tail;
    bool lost = false;
    while (at < head) {
        struct perf_event_header h;
        uint64_t time;
        ring_copy(page, at, &h, sizeof(h));
        if (h.type == PERF_RECORD_SWITCH) {
            ring_copy(page, at + sizeof(h), &time, sizeof(time));
            record_take(w, h.misc, time);
        }
        lost |= h.type == PERF_RECORD_LOST;
        if (h.size < sizeof(h))
            break;
        at += h.size;
    }
    __atomic_store_n(&page->data_tail, head, __ATOMIC_RELEASE);
    return lost;
}

bool sched_watch_sleeps(const struct sched_watch *w)
{
    // "tid (name) S ..."; the name may hold anything, so from its last bracket on.
    char text[256];
    ssize_t n = pread(w->stat_fd, text, sizeof(text) - 1, 0);
    if (n <= 0)
        return true;
    text[n] = 0;
    const char *state = strrchr(text, ')');
    return !state || !state[1] || state[2] != 'R';
}

static void proc_look(struct sched_watch *w, uint64_t now_ns)
{
    int64_t ran = schedstat_read(w);
    if (ran < 0) {
        w->on_cpu = false;
        w->asleep = true;
        return;
    }
    bool advanced = (uint64_t)ran > w->seen_ns;
    w->seen_ns = w->base_ns = (uint64_t)ran;
    w->since_ns = now_ns;
    // The figure of one that runs grows at the kernel's tick; one that stands still may sleep.
    w->asleep = !advanced && sched_watch_sleeps(w);
    w->on_cpu = advanced;
}

// Records are lost when nobody reads them for long. If the last one kept says that the thread is
// not asleep, it would seem to be awake for ever, and if it says that it came on a CPU, all that
// time would be charged to it: a thread that sleeps makes no record that could tell. But its CPU
// time stands still.
static void doubt(struct sched_watch *w, uint64_t now_ns)
{
    int64_t ran = schedstat_read(w);
    bool still = ran < 0 || (uint64_t)ran == w->seen_ns;
    w->sure_ns = now_ns;
    w->seen_ns = ran < 0 ? w->seen_ns : (uint64_t)ran;
    if (!still || !sched_watch_sleeps(w))
        return;
    w->base_ns = w->seen_ns;
    w->asleep = w->fresh = true;
    w->on_cpu = false;
}

// A record of coming on a CPU is made when the switch is over, which Linux counts to whom it is
// for: some microseconds each. So now and then the kernel's own count is taken, which is exact
// while the thread is on no CPU.
static void recount(struct sched_watch *w, uint64_t now_ns)
{
    const uint64_t since_ns = w->since_ns;
    int64_t ran = schedstat_read(w);
    if (records_take(w))
        w->fresh = true;
    if (ran <= 0 || w->fresh || w->on_cpu || w->since_ns != since_ns)
        return; // it has run meanwhile: another time
    w->base_ns = (uint64_t)ran;
    w->sure_ns = now_ns;
}

static bool awake_long(const struct sched_watch *w, uint64_t now_ns)
{
    return !w->asleep && now_ns > w->since_ns + SURE_NS && now_ns > w->sure_ns + SURE_NS;
}

void sched_watch_read(struct sched_watch *w, uint64_t now_ns)
{
    if (sched_watch_polls(w)) {
        proc_look(w, now_ns);
        return;
    }
    if (records_take(w))
        w->fresh = true;
    if (w->fresh)
        schedstat_take(w);
    if (awake_long(w, now_ns))
        doubt(w, now_ns);
    else if (!w->on_cpu && !w->fresh && now_ns > w->sure_ns + COUNT_NS)
        recount(w, now_ns);
}

uint64_t sched_watch_cpu(const struct sched_watch *w, uint64_t now_ns)
{
    bool runs = !sched_watch_polls(w) && w->on_cpu && !w->fresh && now_ns > w->since_ns;
    return w->base_ns + (runs ? now_ns - w->since_ns : 0);
}

void sched_watch_listen(struct sched_watch *w, enum sched_watch_wakes wakes)
{
    if (sched_watch_polls(w) || w->wakes == wakes)
        return;
    if ((w->wakes != WAKES_NEVER) != (wakes != WAKES_NEVER))
        ring_wakes(&w->out, wakes != WAKES_NEVER);
    if ((w->wakes == WAKES_OUT_IN) != (wakes == WAKES_OUT_IN))
        ring_wakes(&w->in, wakes == WAKES_OUT_IN);
    w->wakes = wakes;
}

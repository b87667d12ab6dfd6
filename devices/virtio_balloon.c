// SPDX-License-Identifier: Apache-2.0
#include "devices/virtio_balloon.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/timerfd.h>

#include "vmm/util.h"
#include "vmm/vm.h"

enum {
    QUEUE_SIZE = 128, // Linux wants at least 32 for reporting
    PFNS = 256,       // numbers read, sorted and merged at once; Linux sends as many in a request
    STATS_READ = 64,  // entries looked at in one buffer
};

// What one turn of the loop does at most; the queue then rings for itself. Giving memory back costs
// up to 40 us a run, and time for each page that is there.
enum { TURN_RUNS = 256, TURN_PFNS = 16 * PFNS, TURN_CHAINS = 64 };
#define TURN_BYTES (64 * MiB)

#define F_STATS          (1ull << 1) // 5.5.3
#define F_DEFLATE_ON_OOM (1ull << 2)
#define F_HINT           (1ull << 3)
#define F_POISON         (1ull << 4)
#define F_REPORTING      (1ull << 5)

struct balloon_space { // 5.5.4, little endian
    uint32_t num_pages;
    uint32_t actual;
    uint32_t hint_cmd;
    uint32_t poison;
};
_Static_assert(sizeof(struct balloon_space) == 16, "virtio 1.2, 5.5.4");

enum stat_tag { // 5.5.6.3
    STAT_SWAP_IN,
    STAT_SWAP_OUT,
    STAT_MAJOR_FAULTS,
    STAT_MINOR_FAULTS,
    STAT_FREE,
    STAT_TOTAL,
    STAT_AVAILABLE,
    STAT_CACHES,
    STAT_HUGE_ALLOCATIONS,
    STAT_HUGE_FAILURES,
    STATS,
};

struct __attribute__((packed)) stat_entry {
    uint16_t tag;
    uint64_t value;
};

enum role { INFLATE, DEFLATE, STATISTICS, HINT, REPORT, ROLES, NO_ROLE = ROLES };

// Values of hint_cmd; commands to begin count from HINT_FIRST on (5.5.6.4).
enum { HINT_STOP = 0, HINT_DONE = 1, HINT_FIRST = 2 };

enum hint_state {
    HINT_IDLE,   // nobody asks
    HINT_ASKED,  // the command is in config space, the driver has not begun
    HINT_ACTIVE, // the driver answered with the command's number: what it names counts
    HINT_ENDED,  // it said that it has named everything
};

// A chain that took more than one turn: the next one goes on at `pos`.
struct work {
    struct virtqueue_chain chain;
    bool busy;
    uint64_t pos; // bytes of pfns, or of the memory that the segments name
};

// What may still be done in this turn.
struct budget {
    unsigned runs, pfns;
    uint64_t bytes;
};

struct virtio_balloon {
    struct virtio v; // first
    struct virtio_balloon_config config;
    struct balloon_space space; // also in v.config
    struct virtio_bell *timer;
    struct work inflate, report;
    struct virtqueue_chain chain; // of the other queues

    // The driver's buffer, until we ask for new numbers: [stats_at], while held. The other one is
    // to take the next.
    struct virtqueue_chain stats_chains[2];
    unsigned stats_at;
    bool stats_held;
    uint16_t stats_known; // a bit for each tag
    uint64_t stats[STATS];
    uint64_t stats_serial; // counts what was said

    struct ram_balloon balloon;
    uint64_t taken; // bytes that a migration wants beyond config.target

    struct ram_hinter hinter;
    enum hint_state hint_state;
    uint32_t hint_next;       // the next command's number
    uint32_t hint_said;       // the driver's last; shown
    _Atomic uint64_t *hinted; // the migration's, while it asks

    uint64_t inflated, reported, hinted_bytes, kept; // shown
    struct log_limit limit;
};

static struct virtio_balloon *balloon_of(struct virtio *v)
{
    return container_of(v, struct virtio_balloon, v);
}

static struct virtio_balloon *balloon_dev(struct device *dev)
{
    return container_of(dev, struct virtio_balloon, v.dev);
}

static void space_publish(struct virtio_balloon *b)
{
    memcpy(b->v.config, &b->space, sizeof(b->space));
}

// --- which queue is what
//
// A queue's number is fixed (5.5.2), but Linux, as QEMU, leaves no gap where a feature was not
// accepted. An enabled queue whose fixed role was not accepted says that the driver counts so.

static bool role_accepted(const struct virtio *v, enum role role)
{
    static const uint64_t needs[] = {
        [STATISTICS] = F_STATS, [HINT] = F_HINT, [REPORT] = F_REPORTING};
    return !needs[role] || v->accepted & needs[role];
}

static enum role queue_role(const struct virtio *v, unsigned queue)
{
    bool gaps = true;
    for (unsigned i = 0; i < ROLES; i++)
        gaps &= !v->queues[i].enabled || role_accepted(v, i);
    if (gaps)
        return role_accepted(v, queue) ? (enum role)queue : NO_ROLE;
    for (enum role role = INFLATE; role < ROLES; role++)
        if (role_accepted(v, role) && !queue--)
            return role;
    return NO_ROLE;
}

static int role_queue(const struct virtio *v, enum role role)
{
    for (unsigned i = 0; i < ROLES; i++)
        if (queue_role(v, i) == role)
            return (int)i;
    return -1;
}

// --- giving memory back

static bool poisoned(const struct virtio_balloon *b)
{
    return b->v.accepted & F_POISON && b->space.poison;
}

static void give_back(struct virtio_balloon *b, uint64_t gpa, uint64_t len, uint64_t *counter)
{
    struct error err;
    uint64_t given;
    if (ram_discard(&b->v.dev.vm->ram, gpa, len, &given, &err))
        log_limited(&b->v.dev.vm->log, &b->limit, LOG_WARN, "balloon: %s", err.text);
    *counter += given;
    b->kept += len - given;
}

static int pfn_compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

// Sorts and joins; the same page twice is one page.
static void pfns_give_back(struct virtio_balloon *b, uint32_t *pfns, unsigned n,
                           struct budget *left)
{
    qsort(pfns, n, sizeof(pfns[0]), pfn_compare);
    for (unsigned i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && pfns[end] - pfns[end - 1] <= 1; end++)
            ;
        uint64_t pages = pfns[end - 1] - pfns[i] + 1ull;
        give_back(b, pfns[i] * PAGE_SIZE, pages * PAGE_SIZE, &b->inflated);
        left->runs -= left->runs > 0;
    }
}

// True: done with the chain. Before it is, the driver may not use its pages again.
static bool inflate_some(struct virtio_balloon *b, struct work *w, struct budget *left)
{
    uint32_t pfns[PFNS];
    while (left->runs && left->pfns) {
        size_t got = chain_read(&w->chain, w->pos, pfns, sizeof(pfns));
        unsigned n = (unsigned)(got / sizeof(pfns[0]));
        if (!n)
            return true;
        pfns_give_back(b, pfns, n, left);
        left->pfns -= n < left->pfns ? n : left->pfns;
        w->pos += n * sizeof(pfns[0]);
    }
    return false;
}

// The memory that a chain's writable segments name, from w->pos on, as far as the budget goes.
static bool report_some(struct virtio_balloon *b, struct work *w, struct budget *left)
{
    uint64_t before = 0;
    if (poisoned(b))
        return true;
    for (unsigned i = 0; i < w->chain.nr_in; i++) {
        uint64_t gpa = w->chain.gpa[w->chain.nr_out + i];
        uint64_t len = w->chain.iov[w->chain.nr_out + i].iov_len;
        while (w->pos - before < len) {
            if (!left->runs || !left->bytes)
                return false;
            uint64_t at = w->pos - before, n = len - at;
            n = n < left->bytes ? n : left->bytes;
            give_back(b, gpa + at, n, &b->reported);
            w->pos += n;
            left->bytes -= n;
            left->runs--;
        }
        before += len;
    }
    return true;
}

// False: the turn is over, and there is more to do.
static bool work_run(struct virtio_balloon *b, unsigned queue, struct work *w,
                     bool (*some)(struct virtio_balloon *, struct work *, struct budget *))
{
    struct budget left = {.runs = TURN_RUNS, .pfns = TURN_PFNS, .bytes = TURN_BYTES};
    for (unsigned chains = 0; chains < TURN_CHAINS; chains++) {
        if (!w->busy && !virtio_next(&b->v, queue, &w->chain))
            return true;
        w->pos = w->busy ? w->pos : 0;
        w->busy = !some(b, w, &left);
        if (w->busy)
            return false;
        virtio_push(&b->v, queue, &w->chain, 0);
    }
    return false;
}

// What leaves the balloon comes back by being touched: nothing to do but to say so.
static bool deflate_run(struct virtio_balloon *b, unsigned queue)
{
    for (unsigned chains = 0; chains < TURN_CHAINS; chains++) {
        if (!virtio_next(&b->v, queue, &b->chain))
            return true;
        virtio_push(&b->v, queue, &b->chain, 0);
    }
    return false;
}

// --- statistics: the driver's buffer stays here; giving it back asks for new numbers

static void stats_read(struct virtio_balloon *b)
{
    struct stat_entry entries[STATS_READ];
    size_t got = chain_read(&b->stats_chains[b->stats_at], 0, entries, sizeof(entries));
    b->stats_known = 0;
    for (size_t i = 0; i < got / sizeof(entries[0]); i++) {
        if (entries[i].tag >= STATS)
            continue;
        b->stats[entries[i].tag] = entries[i].value;
        b->stats_known |= (uint16_t)(1u << entries[i].tag);
    }
    b->stats_serial++;
}

static bool stats_run(struct virtio_balloon *b, unsigned queue)
{
    for (unsigned chains = 0; chains < TURN_CHAINS; chains++) {
        if (!virtio_next(&b->v, queue, &b->stats_chains[!b->stats_at]))
            return true;
        if (b->stats_held) // only one is of use; a driver that has more gets the older back
            virtio_push(&b->v, queue, &b->stats_chains[b->stats_at], 0);
        b->stats_at = !b->stats_at;
        b->stats_held = true;
        stats_read(b);
    }
    return false;
}

static void stats_timer_set(struct virtio_balloon *b)
{
    time_t s = (time_t)b->config.stats;
    struct itimerspec when = {.it_value.tv_sec = s, .it_interval.tv_sec = s};
    timerfd_settime(b->timer->fd, 0, &when, NULL);
}

static void stats_due(struct virtio *v, struct virtio_bell *bell)
{
    struct virtio_balloon *b = balloon_of(v);
    uint64_t ticks;
    int queue = role_queue(v, STATISTICS);
    if (read(bell->fd, &ticks, sizeof(ticks)) != sizeof(ticks) || !b->stats_held || !v->active ||
        queue < 0)
        return;
    b->stats_held = false;
    virtio_push(v, (unsigned)queue, &b->stats_chains[b->stats_at], 0);
    virtio_signal(v, (unsigned)queue);
}

// --- what a migration takes

// Config space shows what the user and a migration want together.
static void target_show(struct virtio_balloon *b)
{
    uint64_t most = b->v.dev.vm->ram.size, want = b->config.target;
    want += b->taken < most - want ? b->taken : most - want;
    uint32_t pages = (uint32_t)(want / PAGE_SIZE);
    if (pages == b->space.num_pages)
        return;
    b->space.num_pages = pages;
    space_publish(b);
    virtio_config_changed(&b->v);
}

static uint64_t said(const struct virtio_balloon *b, enum stat_tag tag)
{
    return b->stats_known & 1u << tag ? b->stats[tag] : UINT64_MAX;
}

static bool balloon_look(struct ram_balloon *balloon, struct ram_guest_says *says)
{
    struct virtio_balloon *b = container_of(balloon, struct virtio_balloon, balloon);
    pthread_mutex_lock(&b->v.dev.lock);
    bool listens = b->v.active && b->v.status & VIRTIO_DRIVER_OK && b->v.accepted & F_STATS;
    *says = (struct ram_guest_says) {.serial = b->stats_serial,
                                     .free = said(b, STAT_FREE),
                                     .available = said(b, STAT_AVAILABLE),
                                     .swapped_out = said(b, STAT_SWAP_OUT),
                                     .major_faults = said(b, STAT_MAJOR_FAULTS),
                                     .held = b->space.actual * PAGE_SIZE,
                                     .wanted = b->config.target};
    pthread_mutex_unlock(&b->v.dev.lock);
    return listens;
}

// The loop's thread gives the driver its buffer back.
static void balloon_ask(struct ram_balloon *balloon)
{
    struct virtio_balloon *b = container_of(balloon, struct virtio_balloon, balloon);
    pthread_mutex_lock(&b->v.dev.lock);
    struct itimerspec when = {.it_value.tv_nsec = 1, .it_interval.tv_sec = (time_t)b->config.stats};
    timerfd_settime(b->timer->fd, 0, &when, NULL);
    pthread_mutex_unlock(&b->v.dev.lock);
}

static void balloon_take(struct ram_balloon *balloon, uint64_t bytes)
{
    struct virtio_balloon *b = container_of(balloon, struct virtio_balloon, balloon);
    pthread_mutex_lock(&b->v.dev.lock);
    b->taken = bytes;
    target_show(b);
    pthread_mutex_unlock(&b->v.dev.lock);
}

// --- hints

static void hint_command(struct virtio_balloon *b, uint32_t command)
{
    b->space.hint_cmd = command;
    space_publish(b);
    virtio_config_changed(&b->v);
}

static bool hint_start(struct ram_hinter *h, _Atomic uint64_t *bitmap)
{
    struct virtio_balloon *b = container_of(h, struct virtio_balloon, hinter);
    pthread_mutex_lock(&b->v.dev.lock);
    bool can = b->v.active && b->v.status & VIRTIO_DRIVER_OK && b->v.accepted & F_HINT &&
               !poisoned(b) && !b->hinted;
    if (can) {
        b->hinted = bitmap;
        b->hint_state = HINT_ASKED;
        hint_command(b, b->hint_next);
        b->hint_next = b->hint_next == UINT32_MAX ? HINT_FIRST : b->hint_next + 1;
    }
    pthread_mutex_unlock(&b->v.dev.lock);
    return can;
}

static uint64_t hint_progress(struct ram_hinter *h)
{
    struct virtio_balloon *b = container_of(h, struct virtio_balloon, hinter);
    pthread_mutex_lock(&b->v.dev.lock);
    bool busy = b->hint_state == HINT_ASKED || b->hint_state == HINT_ACTIVE;
    uint64_t progress = busy ? b->hinted_bytes + b->hint_state : 0;
    pthread_mutex_unlock(&b->v.dev.lock);
    return progress;
}

// DONE: the driver may use again what it held back while it named it.
static void hint_end(struct ram_hinter *h)
{
    struct virtio_balloon *b = container_of(h, struct virtio_balloon, hinter);
    pthread_mutex_lock(&b->v.dev.lock);
    b->hinted = NULL;
    b->hint_state = HINT_IDLE;
    if (b->space.hint_cmd >= HINT_FIRST) // a reset has ended it already
        hint_command(b, HINT_DONE);
    pthread_mutex_unlock(&b->v.dev.lock);
}

// What the driver says before and after the pages. Only the number that config space shows now
// begins; anything else is old, or an end.
static void hint_says(struct virtio_balloon *b, uint32_t command)
{
    b->hint_said = command;
    if (command == b->space.hint_cmd && b->hint_state == HINT_ASKED)
        b->hint_state = HINT_ACTIVE;
    else if (command != b->space.hint_cmd && b->hint_state == HINT_ACTIVE)
        b->hint_state = HINT_ENDED;
}

static void hint_page_range(struct virtio_balloon *b, uint64_t gpa, uint64_t len)
{
    uint64_t first;
    uint64_t start = align_up(gpa, PAGE_SIZE), end = align_down(gpa + len, PAGE_SIZE);
    if (start >= end || !ram_gpa_page(&b->v.dev.vm->ram, start, &first))
        return;
    uint64_t last = first + (end - start) / PAGE_SIZE;
    for (uint64_t page = first; page < last;) {
        uint64_t bits = 64 - page % 64 < last - page ? 64 - page % 64 : last - page;
        atomic_fetch_or(&b->hinted[page / 64], (UINT64_MAX >> (64 - bits)) << page % 64);
        page += bits;
    }
    b->hinted_bytes += end - start;
}

static void hint_take(struct virtio_balloon *b)
{
    const struct virtqueue_chain *c = &b->chain;
    uint32_t command = HINT_STOP;
    if (c->nr_out) {
        chain_read(c, 0, &command, sizeof(command));
        hint_says(b, command);
    }
    for (unsigned i = 0; i < c->nr_in && b->hint_state == HINT_ACTIVE; i++)
        hint_page_range(b, c->gpa[c->nr_out + i], c->iov[c->nr_out + i].iov_len);
}

static bool hint_run(struct virtio_balloon *b, unsigned queue)
{
    uint64_t bytes = 0;
    for (unsigned chains = 0; chains < TURN_CHAINS && bytes < 16 * TURN_BYTES; chains++) {
        if (!virtio_next(&b->v, queue, &b->chain))
            return true;
        hint_take(b);
        bytes += b->chain.in_len;
        virtio_push(&b->v, queue, &b->chain, 0);
    }
    return false;
}

// --- the device

static bool balloon_run(struct virtio *v, unsigned queue)
{
    struct virtio_balloon *b = balloon_of(v);
    bool done = true;
    switch (queue_role(v, queue)) {
    case INFLATE:
        done = work_run(b, queue, &b->inflate, inflate_some);
        break;
    case DEFLATE:
        done = deflate_run(b, queue);
        break;
    case STATISTICS:
        done = stats_run(b, queue);
        break;
    case HINT:
        done = hint_run(b, queue);
        break;
    case REPORT:
        done = work_run(b, queue, &b->report, report_some);
        break;
    default: // of a feature that was not accepted: what it offers is never taken
        return false;
    }
    virtio_signal(v, queue);
    if (!done)
        virtio_ring(v, queue);
    return done;
}

static void balloon_reset(struct virtio *v)
{
    struct virtio_balloon *b = balloon_of(v);
    b->inflate.busy = b->report.busy = b->stats_held = false;
    b->stats_known = 0;
    b->hint_state = b->hint_state == HINT_IDLE ? HINT_IDLE : HINT_ENDED;
    b->space.actual = b->space.poison = 0;
    b->space.hint_cmd = HINT_STOP;
    space_publish(b);
}

static void balloon_config_write(struct virtio *v, uint32_t offset, unsigned size, uint64_t value)
{
    struct virtio_balloon *b = balloon_of(v);
    if (size != 4)
        return;
    if (offset == offsetof(struct balloon_space, actual))
        b->space.actual = (uint32_t)value;
    else if (offset == offsetof(struct balloon_space, poison) && v->accepted & F_POISON)
        b->space.poison = (uint32_t)value;
    space_publish(b);
}

static const struct virtio_ops balloon_ops = {.id = VIRTIO_ID_BALLOON,
                                              .run = balloon_run,
                                              .reset = balloon_reset,
                                              .config_write = balloon_config_write};

static uint64_t balloon_features(const struct virtio_balloon_config *c)
{
    return F_STATS | (c->deflate_on_oom ? F_DEFLATE_ON_OOM : 0) |
           (c->hinting || c->reporting ? F_POISON : 0) | (c->hinting ? F_HINT : 0) |
           (c->reporting ? F_REPORTING : 0);
}

static int target_check(const struct vm *vm, uint64_t target, struct error *err)
{
    if (target > vm->ram.size)
        return error_set(err, -ERANGE, "target of %llu MiB: the VM has %llu MiB of memory",
                         (unsigned long long)(target / MiB),
                         (unsigned long long)(vm->ram.size / MiB));
    return 0;
}

static int balloon_realize(struct device *dev, const void *config, struct error *err)
{
    struct virtio_balloon *b = balloon_dev(dev);
    b->config = *(const struct virtio_balloon_config *)config;
    b->hint_next = HINT_FIRST;
    b->space.num_pages = (uint32_t)(b->config.target / PAGE_SIZE);
    space_publish(b);
    int ret = target_check(dev->vm, b->config.target, err);
    if (ret)
        return ret;
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "timerfd_create");
    b->timer = virtio_bell_new(&b->v, fd, 0, stats_due, err);
    if (!b->timer)
        return err ? err->code : -ENOMEM;
    stats_timer_set(b);
    const struct virtio_setup setup = {.ops = &balloon_ops,
                                       .attach = &b->config.attach,
                                       .features = balloon_features(&b->config),
                                       .nr_queues = ROLES,
                                       .queue_size = QUEUE_SIZE,
                                       .config_len = sizeof(struct balloon_space)};
    ret = virtio_realize(&b->v, &setup, err);
    if (ret) {
        virtio_bell_close(b->timer);
        return ret;
    }
    b->hinter = (struct ram_hinter) {hint_start, hint_progress, hint_end};
    b->balloon = (struct ram_balloon) {balloon_look, balloon_ask, balloon_take};
    if (!dev->vm->ram.hinter)
        dev->vm->ram.hinter = &b->hinter;
    if (!dev->vm->ram.balloon)
        dev->vm->ram.balloon = &b->balloon;
    return 0;
}

static void balloon_unrealize(struct device *dev)
{
    struct virtio_balloon *b = balloon_dev(dev);
    if (dev->vm->ram.hinter == &b->hinter)
        dev->vm->ram.hinter = NULL;
    if (dev->vm->ram.balloon == &b->balloon)
        dev->vm->ram.balloon = NULL;
    virtio_bell_close(b->timer);
    virtio_unrealize(&b->v);
}

// --- saved state
//
// A chain in the middle of its work is saved with its queue and begun anew; a hinting that was
// under way has ended with the migration that asked.

static const struct state_field balloon_fields[] = {
    VIRTIO_STATE_FIELDS(struct virtio_balloon),
    STATE_FIELD_INT(struct virtio_balloon, space.num_pages, 1),
    STATE_FIELD_INT(struct virtio_balloon, space.actual, 1),
    STATE_FIELD_INT(struct virtio_balloon, space.hint_cmd, 1),
    STATE_FIELD_INT(struct virtio_balloon, space.poison, 1),
    STATE_FIELD_INT(struct virtio_balloon, hint_next, 1),
    STATE_FIELD_INT(struct virtio_balloon, config.stats, 1),
};

static int balloon_load(void *object, uint16_t version, struct error *err)
{
    struct virtio_balloon *b = object;
    uint64_t target = b->space.num_pages * PAGE_SIZE;
    int ret = target_check(b->v.dev.vm, target, err);
    if (!ret && b->config.stats > BALLOON_STATS_MAX)
        ret = error_set(err, -EBADMSG, "saved interval of %u s: at most %d", b->config.stats,
                        BALLOON_STATS_MAX);
    if (!ret && b->hint_next < HINT_FIRST)
        ret = error_set(err, -EBADMSG, "saved hint command %u: expected at least %d", b->hint_next,
                        HINT_FIRST);
    if (ret) {
        b->space = (struct balloon_space) {0};
        b->config.target = b->taken = 0;
        b->config.stats = 0;
        b->hint_next = HINT_FIRST;
        return ret;
    }
    pthread_mutex_lock(&b->v.dev.lock);
    b->inflate.busy = b->report.busy = b->stats_held = false;
    b->stats_known = 0;
    b->hint_state = HINT_IDLE;
    b->config.target = target;
    b->taken = 0;
    space_publish(b);
    stats_timer_set(b);
    pthread_mutex_unlock(&b->v.dev.lock);
    return virtio_load(&b->v, version, err);
}

static void balloon_resume(struct device *dev)
{
    struct virtio_balloon *b = balloon_dev(dev);
    virtio_resume(dev);
    pthread_mutex_lock(&dev->lock);
    if (!b->hinted && b->space.hint_cmd >= HINT_FIRST)
        hint_command(b, HINT_DONE);
    pthread_mutex_unlock(&dev->lock);
}

static const struct state_table balloon_state = {
    .name = "virtio-balloon",
    .version = 1,
    .oldest = 1,
    .nr_fields = ARRAY_SIZE(balloon_fields),
    .fields = balloon_fields,
    .save = virtio_save,
    .load = balloon_load,
};

// --- for the person outside

static void show_number(json_t *out, const char *name, uint64_t value)
{
    // JSON's integers are signed here; a guest may say anything.
    json_object_set_new(out, name, json_integer(value > INT64_MAX ? INT64_MAX : (json_int_t)value));
}

static void balloon_show(struct device *dev, json_t *out)
{
    static const char *const names[STATS] = {
        "swap_in", "swap_out",  "major_faults", "minor_faults",        "free", // enum stat_tag
        "total",   "available", "caches",       "hugetlb_allocations", "hugetlb_failures"};
    struct virtio_balloon *b = balloon_dev(dev);
    pthread_mutex_lock(&dev->lock);
    json_t *stats = json_object();
    for (unsigned i = 0; i < STATS; i++)
        if (b->stats_known & 1u << i)
            show_number(stats, names[i], b->stats[i]);
    show_number(out, "target_bytes", b->config.target);
    show_number(out, "migration_bytes", b->space.num_pages * PAGE_SIZE - b->config.target);
    show_number(out, "actual_bytes", b->space.actual * PAGE_SIZE);
    show_number(out, "inflated_bytes", b->inflated);
    show_number(out, "reported_bytes", b->reported);
    show_number(out, "hinted_bytes", b->hinted_bytes);
    show_number(out, "kept_bytes", b->kept);
    show_number(out, "hint_command", b->space.hint_cmd);
    show_number(out, "hint_answer", b->hint_said);
    show_number(out, "stats_seconds", b->config.stats);
    json_object_set_new(out, "deflate_on_oom", json_boolean(b->v.accepted & F_DEFLATE_ON_OOM));
    json_object_set_new(out, "reporting",
                        json_boolean(b->v.accepted & F_REPORTING && !poisoned(b)));
    json_object_set_new(out, "hinting", json_boolean(b->v.accepted & F_HINT && !poisoned(b)));
    json_object_set_new(out, "guest", stats);
    pthread_mutex_unlock(&dev->lock);
}

static int target_parse(const char *text, uint64_t *target, struct error *err)
{
    if (size_parse(text, MiB, target) || *target % PAGE_SIZE || *target / PAGE_SIZE > UINT32_MAX)
        return error_set(err, -EINVAL,
                         "target '%.40s': expected a size in multiples of 4 KiB, e.g. 128M", text);
    return 0;
}

static int stats_parse(const char *text, uint32_t *seconds, struct error *err)
{
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || n > BALLOON_STATS_MAX)
        return error_set(err, -EINVAL, "stats '%.40s': expected 0 to %d seconds", text,
                         BALLOON_STATS_MAX);
    *seconds = (uint32_t)n;
    return 0;
}

static int balloon_set(struct device *dev, const char *key, const char *value, struct error *err)
{
    struct virtio_balloon *b = balloon_dev(dev);
    uint64_t target = b->config.target;
    uint32_t stats = b->config.stats;
    int ret = !strcmp(key, "target")  ? target_parse(value, &target, err)
              : !strcmp(key, "stats") ? stats_parse(value, &stats, err)
                                      : -ENOENT;
    if (!ret)
        ret = target_check(dev->vm, target, err);
    if (ret)
        return ret;
    pthread_mutex_lock(&dev->lock);
    b->config.target = target;
    target_show(b);
    if (stats != b->config.stats) {
        b->config.stats = stats;
        stats_timer_set(b);
    }
    pthread_mutex_unlock(&dev->lock);
    return 0;
}

const struct device_class virtio_balloon_class = {
    .name = "virtio-balloon",
    .size = sizeof(struct virtio_balloon),
    .realize = balloon_realize,
    .reset = virtio_device_reset,
    .quiesce = virtio_quiesce,
    .resume = balloon_resume,
    .unrealize = balloon_unrealize,
    .state = &balloon_state,
    .show = balloon_show,
    .set = balloon_set,
};

// --- the option's text

static int switch_parse(const char *name, const char *text, bool *on, struct error *err)
{
    *on = !strcmp(text, "on");
    if (!*on && strcmp(text, "off"))
        return error_set(err, -EINVAL, "%s=%.40s: expected on or off", name, text);
    return 0;
}

static int word_parse(const char *word, struct virtio_balloon_config *c, struct error *err)
{
    const char *value = strchr(word, '=');
    size_t len = value ? (size_t)(value++ - word) : strlen(word);
    const struct {
        const char *name;
        bool *on;
    } switches[] = {{"deflate-on-oom", &c->deflate_on_oom},
                    {"reporting", &c->reporting},
                    {"hinting", &c->hinting}};
    if (!strcmp(word, "packed")) {
        c->attach.packed = true;
        return 0;
    }
    if (value && len == strlen("target") && !memcmp(word, "target", len))
        return target_parse(value, &c->target, err);
    if (value && len == strlen("stats") && !memcmp(word, "stats", len))
        return stats_parse(value, &c->stats, err);
    for (size_t i = 0; value && i < ARRAY_SIZE(switches); i++)
        if (len == strlen(switches[i].name) && !memcmp(word, switches[i].name, len))
            return switch_parse(switches[i].name, value, switches[i].on, err);
    return error_set(err, -EINVAL,
                     "'%.40s': expected target=SIZE, deflate-on-oom=on|off, stats=SECONDS, "
                     "reporting=on|off, hinting=on|off or packed",
                     word);
}

int virtio_balloon_parse(const char *text, struct virtio_balloon_config *c, struct error *err)
{
    *c =
        (struct virtio_balloon_config) {.deflate_on_oom = true, .reporting = true, .hinting = true};
    autofree char *copy = strdup(text);
    if (!copy)
        return error_set(err, -ENOMEM, "no memory");
    int ret = 0;
    for (char *word = copy, *next; word && *copy && !ret; word = next) {
        next = strchr(word, ',');
        if (next)
            *next++ = 0;
        ret = word_parse(word, c, err);
    }
    return ret;
}

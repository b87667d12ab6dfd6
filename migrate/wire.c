// SPDX-License-Identifier: Apache-2.0
#include "migrate/wire.h"

#include <errno.h>
#include <string.h>

#include "migrate/crc32c.h"
#include "vmm/bitmap.h"
#include "vmm/ram.h"
#include "vmm/vm.h"

_Static_assert(sizeof(struct wire_header) == WIRE_HEADER_LEN, "header has no padding");
_Static_assert(sizeof(struct wire_hello) == 32 && sizeof(struct wire_machine) == 32, "no padding");
_Static_assert(sizeof(struct wire_run) == 16 && sizeof(struct wire_pages) == 16, "no padding");
_Static_assert(sizeof(struct wire_packed_page) == 16 && sizeof(struct wire_packed) == 8,
               "no padding");
_Static_assert(sizeof(struct wire_disk) == 48 && sizeof(struct wire_blocks) == 16 &&
                   sizeof(struct wire_extent) == 16 && sizeof(struct wire_absent) == 24 &&
                   sizeof(struct wire_late) == 24,
               "no padding");
_Static_assert(sizeof(struct kvm_cpuid_entry2) == 40, "CPUID entries travel as KVM has them");

// What a record of each type may be, checked before anything is allocated or read.
struct wire_limit {
    const char *name;
    uint32_t meta_min, meta_max, data_max;
};

#define FIXED(name, T)                \
    {                                 \
        name, sizeof(T), sizeof(T), 0 \
    }

static const struct wire_limit limits[WIRE_TYPES] = {
    [WIRE_HELLO] = FIXED("hello", struct wire_hello),
    [WIRE_MACHINE] = {"machine", sizeof(struct wire_machine) + sizeof(struct wire_region) + 1,
                      sizeof(struct wire_machine) + 2 * sizeof(struct wire_region) +
                          WIRE_CPUID_MAX * sizeof(struct kvm_cpuid_entry2) + WIRE_JSON_MAX,
                      0},
    [WIRE_READY] = {"ready", 0, 0, 0},
    [WIRE_PAGES] = {"pages", sizeof(struct wire_pages) + sizeof(struct wire_run),
                    sizeof(struct wire_pages) + WIRE_RUNS_MAX * sizeof(struct wire_run) +
                        WIRE_BATCH_PAGES * sizeof(uint32_t) + PAGE_SIZE,
                    WIRE_BATCH_PAGES *PAGE_SIZE},
    [WIRE_ROUND] = FIXED("round", struct wire_round),
    [WIRE_DISCARD] = {"discard", sizeof(struct wire_discard) + sizeof(uint64_t),
                      sizeof(struct wire_discard) + WIRE_DISCARD_WORDS * sizeof(uint64_t), 0},
    [WIRE_STATE] = {"state", sizeof(struct wire_state), sizeof(struct wire_state), WIRE_STATE_MAX},
    [WIRE_PREPARE] = FIXED("prepare", struct wire_prepare),
    [WIRE_PREPARED] = FIXED("prepared", struct wire_times),
    [WIRE_COMMIT] = FIXED("commit", struct wire_commit),
    [WIRE_RUNNING] = FIXED("running", struct wire_times),
    [WIRE_WANT] = {"want", sizeof(struct wire_want) + sizeof(uint64_t),
                   sizeof(struct wire_want) + WIRE_WANT_MAX * sizeof(uint64_t), 0},
    [WIRE_END] = FIXED("end", struct wire_end),
    [WIRE_COMPLETE] = FIXED("complete", struct wire_times),
    [WIRE_BYE] = {"bye", 0, 0, 0},
    [WIRE_ABORT] = {"abort", 0, WIRE_TEXT_MAX, 0},
    [WIRE_ANSWER] = FIXED("answer", struct wire_answer),
    [WIRE_PACKED] = {"packed", sizeof(struct wire_packed) + sizeof(struct wire_packed_page),
                     sizeof(struct wire_packed) +
                         WIRE_BATCH_PAGES * sizeof(struct wire_packed_page),
                     WIRE_BATCH_PAGES *PAGE_SIZE},
    [WIRE_MEMORY] = FIXED("memory", struct wire_memory),
    [WIRE_FAULTS] = FIXED("faults", struct wire_faults),
    [WIRE_DISKS] = {"disks", sizeof(struct wire_disk), WIRE_DISKS_MAX * sizeof(struct wire_disk),
                    0},
    [WIRE_KEPT] = FIXED("kept", struct wire_kept),
    [WIRE_BLOCKS] = {"blocks", sizeof(struct wire_blocks) + sizeof(struct wire_extent),
                     sizeof(struct wire_blocks) + WIRE_EXTENTS_MAX * sizeof(struct wire_extent),
                     WIRE_BLOCKS_DATA},
    [WIRE_ABSENT] = {"absent", sizeof(struct wire_absent) + sizeof(uint64_t),
                     sizeof(struct wire_absent) + WIRE_DISCARD_WORDS * sizeof(uint64_t), 0},
    [WIRE_LATE] = {"late", sizeof(struct wire_late),
                   sizeof(struct wire_late) + WIRE_EXTENTS_MAX * sizeof(struct wire_extent),
                   WIRE_BLOCKS_DATA},
    [WIRE_ASK] = {"ask", sizeof(struct wire_ask) + sizeof(uint64_t),
                  sizeof(struct wire_ask) + WIRE_WANT_MAX * sizeof(uint64_t), 0},
};

const char *wire_type_name(unsigned type)
{
    return type < WIRE_TYPES && limits[type].name ? limits[type].name : "unknown";
}

// --- latencies

unsigned wire_latency_bucket(uint64_t ns)
{
    uint64_t us = ns / 1000;
    if (us < 4)
        return (unsigned)us;
    unsigned octave = 63 - (unsigned)__builtin_clzll(us);
    unsigned bucket = 4 * (octave - 1) + (unsigned)(us >> (octave - 2) & 3);
    return bucket < WIRE_LATENCY_BUCKETS ? bucket : WIRE_LATENCY_BUCKETS - 1;
}

uint64_t wire_latency_us(unsigned bucket)
{
    return bucket < 4 ? bucket : (4ull + bucket % 4) << (bucket / 4 - 1);
}

uint64_t wire_latency_percentile(const struct wire_faults *faults, double percent)
{
    uint64_t all = 0, sum = 0;
    for (unsigned i = 0; i < WIRE_LATENCY_BUCKETS; i++)
        all += faults->count[i];
    for (unsigned i = 0; i < WIRE_LATENCY_BUCKETS; i++) {
        sum += faults->count[i];
        if (all && (double)sum * 100 >= percent * (double)all)
            return wire_latency_us(i + 1);
    }
    return 0;
}

// --- endpoints

int wire_read(struct wire *w, void *data, size_t len, struct error *err)
{
    struct iovec iov = {data, len};
    return len ? w->readv(w, &iov, 1, err) : 0;
}

static int mem_readv(struct wire *w, struct iovec *iov, unsigned nr, struct error *err)
{
    struct wire_mem *m = container_of(w, struct wire_mem, wire);
    for (unsigned i = 0; i < nr; i++) {
        if (iov[i].iov_len > m->len - w->in)
            return error_set(err, -ENODATA, "%s: ends after %zu bytes, %zu more expected", w->name,
                             m->len, iov[i].iov_len - (size_t)(m->len - w->in));
        memcpy(iov[i].iov_base, m->data + w->in, iov[i].iov_len);
        w->in += iov[i].iov_len;
    }
    return 0;
}

void wire_mem_init(struct wire_mem *m, const void *data, size_t len)
{
    *m = (struct wire_mem) {
        .wire = {.name = "memory", .readv = mem_readv}, .data = data, .len = len};
}

uint32_t wire_header_crc(const struct wire_header *h, const void *meta)
{
    return crc32c(crc32c(0, h, offsetof(struct wire_header, crc)), meta, h->meta_len);
}

int wire_header_check(const struct wire_header *h, struct error *err)
{
    if (h->type >= WIRE_TYPES || !limits[h->type].name)
        return error_set(err, -EPROTO, "record type %u is not known", h->type);
    const struct wire_limit *l = &limits[h->type];
    if (h->flags)
        return error_set(err, -EPROTO, "%s record: flags 0x%x, expected 0", l->name, h->flags);
    if (h->meta_len < l->meta_min || h->meta_len > l->meta_max)
        return error_set(err, -EPROTO, "%s record: length %u, expected %u to %u", l->name,
                         h->meta_len, l->meta_min, l->meta_max);
    if (h->data_len > l->data_max)
        return error_set(err, -EPROTO, "%s record: %u bytes of data, at most %u", l->name,
                         h->data_len, l->data_max);
    return 0;
}

int wire_put(struct wire *w, enum wire_type type, unsigned flags, const void *meta, size_t meta_len,
             struct iovec *data, unsigned nr_data, struct error *err)
{
    struct iovec iov[WIRE_RUNS_MAX + 4];
    struct wire_header h = {
        .type = (uint16_t)type, .flags = (uint16_t)flags, .meta_len = (uint32_t)meta_len};
    unsigned n = 0;
    iov[n++] = (struct iovec) {&h, sizeof(h)};
    if (meta_len)
        iov[n++] = (struct iovec) {(void *)(uintptr_t)meta, meta_len};
    if (nr_data > ARRAY_SIZE(iov) - n)
        return error_set(err, -EINVAL, "%s record: %u pieces of data", wire_type_name(type),
                         nr_data);
    for (unsigned i = 0; i < nr_data; i++) {
        h.data_len += (uint32_t)data[i].iov_len;
        iov[n++] = data[i];
    }
    h.crc = wire_header_crc(&h, meta);
    return w->writev(w, iov, n, err);
}

int wire_get(struct wire *w, struct wire_record *record, struct error *err)
{
    struct wire_header *h = &record->header;
    record->offset = w->in;
    int ret = wire_read(w, h, sizeof(*h), err);
    if (ret)
        return ret;
    ret = wire_header_check(h, err);
    if (ret) {
        error_prefix(err, "%s at byte %llu", w->name, (unsigned long long)record->offset);
        return ret;
    }
    if (h->meta_len > record->cap) {
        uint8_t *bigger = realloc(record->meta, h->meta_len);
        if (!bigger)
            return error_set(err, -ENOMEM, "%s: no memory for a record of %u bytes", w->name,
                             h->meta_len);
        record->meta = bigger;
        record->cap = h->meta_len;
    }
    ret = wire_read(w, record->meta, h->meta_len, err);
    if (ret)
        return ret;
    uint32_t crc = wire_header_crc(h, record->meta);
    if (crc != h->crc)
        return error_set(err, -EBADMSG,
                         "%s at byte %llu: %s record damaged (checksum %08x, not %08x)", w->name,
                         (unsigned long long)record->offset, wire_type_name(h->type), crc, h->crc);
    return 0;
}

void wire_record_free(struct wire_record *record)
{
    free(record->meta);
    *record = (struct wire_record) {0};
}

int wire_unexpected(const struct wire *w, const struct wire_record *record, const char *expected,
                    struct error *err)
{
    if (record->header.type == WIRE_ABORT) {
        char text[WIRE_TEXT_MAX + 1];
        for (uint32_t i = 0; i < record->header.meta_len; i++) {
            char c = (char)record->meta[i];
            text[i] = c >= ' ' && c <= '~' ? c : '?'; // it goes to a terminal
        }
        text[record->header.meta_len] = 0;
        return error_set(err, -EREMOTEIO, "the other side gave up: %s", text);
    }
    return error_set(err, -EPROTO, "%s at byte %llu: %s record, expected %s", w->name,
                     (unsigned long long)record->offset, wire_type_name(record->header.type),
                     expected);
}

int wire_expect(struct wire *w, struct wire_record *record, enum wire_type type, struct error *err)
{
    int ret = wire_get(w, record, err);
    if (ret)
        return ret;
    if (record->header.type != type)
        return wire_unexpected(w, record, wire_type_name(type), err);
    return 0;
}

// --- hello

int wire_version_choose(unsigned mine_oldest, unsigned mine_newest, unsigned peer_oldest,
                        unsigned peer_newest, unsigned *version, struct error *err)
{
    unsigned newest = mine_newest < peer_newest ? mine_newest : peer_newest;
    unsigned oldest = mine_oldest > peer_oldest ? mine_oldest : peer_oldest;
    if (newest < oldest || !newest)
        return error_set(err, -EPROTONOSUPPORT,
                         "format versions %u to %u offered, this ferry speaks %u to %u",
                         peer_oldest, peer_newest, mine_oldest, mine_newest);
    *version = newest;
    return 0;
}

int wire_hello_parse(const struct wire_record *record, struct wire_hello *hello, struct error *err)
{
    wire_fixed(record, hello, sizeof(*hello));
    if (memcmp(hello->magic, WIRE_MAGIC, sizeof(hello->magic)))
        return error_set(err, -EPROTO, "not a ferry migration: wrong magic in the hello record");
    if (hello->kind < WIRE_MAIN || hello->kind > WIRE_STREAM)
        return error_set(err, -EPROTO, "hello record: connection kind %u is not known",
                         hello->kind);
    if (hello->oldest > hello->version)
        return error_set(err, -EPROTO, "hello record: versions %u to %u", hello->oldest,
                         hello->version);
    return 0;
}

void wire_hello_fill(struct wire_hello *hello, enum wire_connection kind,
                     const uint8_t id[WIRE_ID_LEN])
{
    *hello = (struct wire_hello) {
        .version = WIRE_VERSION, .oldest = WIRE_OLDEST, .kind = (uint16_t)kind};
    memcpy(hello->magic, WIRE_MAGIC, sizeof(hello->magic));
    memcpy(hello->id, id, WIRE_ID_LEN);
}

// --- machine

static int regions_check(const struct machine *m, struct error *err)
{
    uint64_t sum = 0, end = 0;
    for (uint32_t i = 0; i < m->nr_regions; i++) {
        const struct wire_region *r = &m->regions[i];
        if ((r->gpa | r->size) % PAGE_SIZE || !r->size || r->gpa < end ||
            !range_within(r->gpa, r->size, 2 * RAM_MAX))
            return error_set(err, -EPROTO,
                             "machine record: memory region 0x%llx+0x%llx is not valid",
                             (unsigned long long)r->gpa, (unsigned long long)r->size);
        end = r->gpa + r->size;
        sum += r->size;
    }
    if (sum != m->ram_size || sum < RAM_MIN || sum > RAM_MAX)
        return error_set(err, -EPROTO, "machine record: %llu bytes of memory, regions have %llu",
                         (unsigned long long)m->ram_size, (unsigned long long)sum);
    return 0;
}

int machine_parse(const struct wire_record *record, struct machine *machine, struct error *err)
{
    struct wire_machine head;
    *machine = (struct machine) {0};
    wire_fixed(record, &head, sizeof(head));
    if (head.nr_regions < 1 || head.nr_regions > ARRAY_SIZE(machine->regions))
        return error_set(err, -EPROTO, "machine record: %u memory regions, expected 1 or 2",
                         head.nr_regions);
    if (head.nr_cpuid > WIRE_CPUID_MAX || head.json_len > WIRE_JSON_MAX)
        return error_set(err, -EPROTO, "machine record: %u CPUID entries, description of %u bytes",
                         head.nr_cpuid, head.json_len);
    size_t regions = head.nr_regions * sizeof(struct wire_region);
    size_t cpuid = head.nr_cpuid * sizeof(struct kvm_cpuid_entry2);
    if (record->header.meta_len != sizeof(head) + regions + cpuid + head.json_len)
        return error_set(err, -EPROTO, "machine record: length %u does not match its contents",
                         record->header.meta_len);
    if (head.cpus < 1 || head.cpus > VM_MAX_VCPUS)
        return error_set(err, -EPROTO, "machine record: %u CPUs, expected 1 to %d", head.cpus,
                         VM_MAX_VCPUS);
    if (head.flags & ~(uint32_t)(WIRE_MACHINE_POSTCOPY | WIRE_MACHINE_SHARED | WIRE_MACHINE_DISKS))
        return error_set(err, -EPROTO, "machine record: flags 0x%x are not known", head.flags);
    if (head.streams == 1 || head.streams > WIRE_STREAMS_MAX ||
        (head.streams && head.flags & WIRE_MACHINE_SHARED))
        return error_set(err, -EPROTO,
                         "machine record: %u page connections, expected 0, or 2 to %d where memory "
                         "is copied",
                         head.streams, WIRE_STREAMS_MAX);

    const uint8_t *p = record->meta + sizeof(head);
    const char *json = (const char *)p + regions + cpuid;
    if (memchr(json, 0, head.json_len))
        return error_set(err, -EPROTO, "machine record: zero byte inside the description");
    machine->ram_size = head.ram_size;
    machine->cpus = head.cpus;
    machine->nr_regions = head.nr_regions;
    machine->flags = head.flags;
    machine->streams = head.streams;
    memcpy(machine->regions, p, regions);
    int ret = regions_check(machine, err);
    if (ret)
        return ret;
    machine->cpuid = calloc(1, sizeof(*machine->cpuid) + cpuid);
    machine->json = strndup(json, head.json_len);
    if (!machine->cpuid || !machine->json) {
        machine_free(machine);
        return error_set(err, -ENOMEM, "machine record: no memory");
    }
    machine->cpuid->nent = head.nr_cpuid;
    memcpy(machine->cpuid->entries, p + regions, cpuid);
    return 0;
}

int machine_encode(const struct machine *machine, void **meta, size_t *len, struct error *err)
{
    size_t regions = machine->nr_regions * sizeof(struct wire_region);
    size_t cpuid = machine->cpuid->nent * sizeof(struct kvm_cpuid_entry2);
    size_t json = strlen(machine->json);
    if (machine->cpuid->nent > WIRE_CPUID_MAX || json > WIRE_JSON_MAX)
        return error_set(err, -E2BIG, "machine description: %u CPUID entries, %zu bytes of text",
                         machine->cpuid->nent, json);
    struct wire_machine head = {.ram_size = machine->ram_size,
                                .cpus = machine->cpus,
                                .nr_regions = machine->nr_regions,
                                .nr_cpuid = machine->cpuid->nent,
                                .json_len = (uint32_t)json,
                                .flags = machine->flags,
                                .streams = machine->streams};
    *len = sizeof(head) + regions + cpuid + json;
    uint8_t *p = malloc(*len);
    *meta = p;
    if (!p)
        return error_set(err, -ENOMEM, "machine description: no memory");
    memcpy(p, &head, sizeof(head));
    memcpy(p + sizeof(head), machine->regions, regions);
    memcpy(p + sizeof(head) + regions, machine->cpuid->entries, cpuid);
    memcpy(p + sizeof(head) + regions + cpuid, machine->json, json);
    return 0;
}

void machine_free(struct machine *machine)
{
    free(machine->cpuid);
    free(machine->json);
    *machine = (struct machine) {0};
}

// --- pages

struct wire_run wire_pages_run(const struct wire_pages_view *view, unsigned index)
{
    struct wire_run run;
    memcpy(&run, view->runs + index * sizeof(run), sizeof(run));
    return run;
}

uint32_t wire_pages_sum(const struct wire_pages_view *view, unsigned index)
{
    uint32_t sum;
    memcpy(&sum, view->sums + index * sizeof(sum), sizeof(sum));
    return sum;
}

int wire_pages_parse(const struct wire_record *record, uint64_t ram_pages,
                     struct wire_pages_view *view, struct error *err)
{
    struct wire_pages *head = &view->head;
    wire_fixed(record, head, sizeof(*head));
    if (!head->nr_runs || head->nr_runs > WIRE_RUNS_MAX || head->nr_data > WIRE_BATCH_PAGES ||
        head->pad >= PAGE_SIZE || head->reserved)
        return error_set(err, -EPROTO,
                         "pages record: %u runs, %u pages of data, %u bytes of padding",
                         head->nr_runs, head->nr_data, head->pad);
    size_t runs = head->nr_runs * sizeof(struct wire_run);
    size_t sums = head->nr_data * sizeof(uint32_t);
    if (record->header.meta_len != sizeof(*head) + runs + sums + head->pad ||
        record->header.data_len != head->nr_data * PAGE_SIZE)
        return error_set(
            err, -EPROTO, "pages record: lengths %u + %u do not match %u runs, %u pages",
            record->header.meta_len, record->header.data_len, head->nr_runs, head->nr_data);
    view->runs = record->meta + sizeof(*head);
    view->sums = view->runs + runs;

    uint64_t next = 0, data = 0;
    for (unsigned i = 0; i < head->nr_runs; i++) {
        struct wire_run run = wire_pages_run(view, i);
        if (!run.count || run.first < next || !range_within(run.first, run.count, ram_pages))
            return error_set(err, -EPROTO, "pages record: run %llu+%u, guest has %llu pages",
                             (unsigned long long)run.first, run.count,
                             (unsigned long long)ram_pages);
        if (run.kind > WIRE_RUN_DATA)
            return error_set(err, -EPROTO, "pages record: run kind %u is not known", run.kind);
        next = run.first + run.count;
        data += run.kind == WIRE_RUN_DATA ? run.count : 0;
    }
    if (data != head->nr_data)
        return error_set(err, -EPROTO, "pages record: runs have %llu pages of data, header says %u",
                         (unsigned long long)data, head->nr_data);
    return 0;
}

int wire_packed_parse(const struct wire_record *record, uint64_t ram_pages,
                      struct wire_packed_page *entries, unsigned *nr, struct error *err)
{
    struct wire_packed head;
    uint64_t len = 0;
    wire_fixed(record, &head, sizeof(head));
    if (!head.nr || head.nr > WIRE_BATCH_PAGES || head.reserved ||
        record->header.meta_len != sizeof(head) + head.nr * sizeof(*entries))
        return error_set(err, -EPROTO, "packed record: %u pages in %u bytes", head.nr,
                         record->header.meta_len);
    memcpy(entries, record->meta + sizeof(head), head.nr * sizeof(*entries));
    for (unsigned i = 0; i < head.nr; i++) {
        const struct wire_packed_page *e = &entries[i];
        if (e->page >= ram_pages || e->kind > WIRE_PACKED_DELTA || !e->len || e->len > PAGE_SIZE ||
            (e->kind == WIRE_PACKED_RAW && e->len != PAGE_SIZE))
            return error_set(err, -EPROTO, "packed record: page %llu of %llu, kind %u, %u bytes",
                             (unsigned long long)e->page, (unsigned long long)ram_pages, e->kind,
                             e->len);
        len += e->len;
    }
    if (len != record->header.data_len)
        return error_set(err, -EPROTO, "packed record: %u bytes of data, its pages have %llu",
                         record->header.data_len, (unsigned long long)len);
    *nr = head.nr;
    return 0;
}

int wire_discard_put(struct wire *w, const uint64_t *bitmap, uint64_t pages, struct error *err)
{
    const uint64_t most = WIRE_DISCARD_WORDS * 64ull;
    autofree uint8_t *meta =
        malloc(sizeof(struct wire_discard) + WIRE_DISCARD_WORDS * sizeof(uint64_t));
    if (!meta)
        return error_set(err, -ENOMEM, "no memory for a list of pages");
    int ret = 0;
    for (uint64_t first = 0; !ret && first < pages; first += most) {
        uint64_t n = pages - first < most ? pages - first : most;
        struct wire_discard head = {.first = first, .pages = n};
        memcpy(meta, &head, sizeof(head));
        memcpy(meta + sizeof(head), bitmap + first / 64, bitmap_words(n) * 8);
        ret = wire_put(w, WIRE_DISCARD, 0, meta, sizeof(head) + bitmap_words(n) * 8, NULL, 0, err);
    }
    return ret;
}

int wire_discard_parse(const struct wire_record *record, uint64_t ram_pages, uint64_t *stale,
                       struct error *err)
{
    struct wire_discard head;
    wire_fixed(record, &head, sizeof(head));
    if (head.first % 64 || !head.pages || !range_within(head.first, head.pages, ram_pages) ||
        record->header.meta_len != sizeof(head) + align_up(head.pages, 64) / 8)
        return error_set(err, -EPROTO, "discard record: pages %llu+%llu, guest has %llu",
                         (unsigned long long)head.first, (unsigned long long)head.pages,
                         (unsigned long long)ram_pages);
    for (uint64_t i = 0; i < bitmap_words(head.pages); i++) {
        uint64_t word;
        memcpy(&word, record->meta + sizeof(head) + i * 8, 8);
        uint64_t valid = head.pages - i * 64;
        if (valid < 64 && word >> valid)
            return error_set(err, -EPROTO, "discard record: bits beyond its %llu pages",
                             (unsigned long long)head.pages);
        stale[head.first / 64 + i] |= word;
    }
    return 0;
}

int wire_want_parse(const struct wire_record *record, uint64_t ram_pages, uint64_t *pages,
                    unsigned *nr, struct error *err)
{
    struct wire_want head;
    wire_fixed(record, &head, sizeof(head));
    if (!head.nr || head.nr > WIRE_WANT_MAX || head.reserved ||
        record->header.meta_len != sizeof(head) + head.nr * sizeof(uint64_t))
        return error_set(err, -EPROTO, "want record: %u pages in %u bytes", head.nr,
                         record->header.meta_len);
    memcpy(pages, record->meta + sizeof(head), head.nr * sizeof(uint64_t));
    for (unsigned i = 0; i < head.nr; i++)
        if (pages[i] >= ram_pages)
            return error_set(err, -EPROTO, "want record: page %llu, guest has %llu",
                             (unsigned long long)pages[i], (unsigned long long)ram_pages);
    *nr = head.nr;
    return 0;
}

void wire_fixed(const struct wire_record *record, void *out, size_t len)
{
    memcpy(out, record->meta, len); // wire_header_check has seen that meta is at least this long
}

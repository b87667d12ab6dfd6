// SPDX-License-Identifier: Apache-2.0
#include "tests/bare/bare.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "devices/console.h"
#include "devices/virtio_mmio.h"
#include "devices/virtio_pci.h"
#include "vmm/util.h"

#define CHECK(call)                                  \
    do {                                             \
        struct error err = {0};                      \
        if (call)                                    \
            ck_abort_msg("%s: %s", #call, err.text); \
    } while (0)

// --- what the guest tells

static void note_value(struct bare *b, const struct ucall_message *m)
{
    if (m->args[0] >= UCALL_V_COUNT_OF_IDS || m->args[2] >= VM_MAX_VCPUS)
        return;
    b->values[m->args[0]][m->args[2]] = (struct bare_value) {m->args[1], true};
}

static void note_print(struct bare *b, const char *text)
{
    size_t len = strlen(text), room = sizeof(b->output) - 1 - b->output_len;
    len = len < room ? len : room;
    memcpy(b->output + b->output_len, text, len);
    b->output_len += len;
}

static void note_sync(struct bare *b, const struct ucall_message *m)
{
    b->syncs++;
    b->stage = m->args[0];
    b->stage_value = m->args[1];
    b->stage_cpu = m->cpu;
}

// In the vCPU's thread. True: dealt with.
static bool ucall_handle(void *arg, struct ucall_message *m)
{
    struct bare *b = arg;
    pthread_mutex_lock(&b->lock);
    if (m->nr == UCALL_VALUE)
        note_value(b, m);
    else if (m->nr == UCALL_PRINT)
        note_print(b, m->text);
    else if (m->nr == UCALL_SYNC)
        note_sync(b, m);
    pthread_cond_broadcast(&b->changed);
    pthread_mutex_unlock(&b->lock);
    if (m->nr == UCALL_SYNC && b->config.hold)
        ucall_hold(m->vm);
    return m->nr == UCALL_VALUE || m->nr == UCALL_PRINT || m->nr == UCALL_SYNC;
}

static void stopped(struct vm *vm, void *arg)
{
    struct bare *b = arg;
    pthread_mutex_lock(&b->lock);
    b->stopped = true;
    pthread_cond_broadcast(&b->changed);
    pthread_mutex_unlock(&b->lock);
}

// --- life

static void console_create(struct bare *b)
{
    int pair[2];
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), 0);
    b->console_fd = pair[0];
    const struct console_config config = {.kind = CONSOLE_FD, .fd = pair[1], .escape = -1};
    CHECK(console_open(&b->console, &config, b->loop, &err));
}

static void guest_load(struct bare *b)
{
    const char *dir = getenv("BARE_GUESTS");
    if (!dir)
        ck_abort_msg("BARE_GUESTS must name the folder of the guest images (build/guest/bare)");
    char path[512];
    snprintf(path, sizeof(path), "%s/%s.%s", dir, b->config.guest,
             strcmp(b->config.guest, "real") ? "elf" : "bin");
    const struct boot_config boot = {.kernel = path,
                                     .cmdline = b->cmdline,
                                     .protocol = b->config.protocol,
                                     .rsdp = b->board.rsdp};
    struct boot_entry entry;
    CHECK(boot_load(&b->vm->ram, &boot, &entry, &err));
    CHECK(vm_set_entry(b->vm, &entry, &err));
}

static void devices_add(struct bare *b)
{
    struct acpi_virtio_mmio windows[VIRTIO_MMIO_MAX];
    unsigned nr = b->config.nr_devices;
    size_t len = (size_t)snprintf(b->cmdline, sizeof(b->cmdline), "%s",
                                  b->config.cmdline ? b->config.cmdline : "");
    ck_assert_uint_le(nr, VIRTIO_MMIO_MAX);
    for (unsigned i = 0; i < nr; i++) {
        const struct bare_device *d = &b->config.devices[i];
        windows[i] = virtio_mmio_window(i);
        const struct virtio_mmio_place place = {.base = windows[i].base, .gsi = windows[i].gsi};
        const struct virtio_pci_place slot = {.host = b->board.pci, .slot = i + 1};
        d->config->transport = b->config.pci ? &virtio_pci_transport : &virtio_mmio_transport;
        d->config->place = b->config.pci ? (const void *)&slot : &place;
        CHECK(device_add(b->vm, d->class, d->config, NULL, &err));
    }
    if (!b->config.pci && nr)
        CHECK(virtio_mmio_cmdline(windows, nr, b->cmdline + len, sizeof(b->cmdline) - len, &err));
}

void bare_create(struct bare *b, const struct bare_config *config)
{
    memset(b, 0, sizeof(*b));
    b->config = *config;
    pthread_mutex_init(&b->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&b->changed, &attr);
    pthread_condattr_destroy(&attr);

    CHECK(loop_create(&b->loop, &err));
    console_create(b);
    const struct vm_config vm = {
        .name = config->guest,
        .cpus = config->cpus ? config->cpus : 1,
        .ram = {.size = config->memory ? config->memory : 32 * MiB,
                .backing = config->backing,
                .log = config->log,
                .ring_entries = 1024}, // KVM holds 64 to 600 of them in reserve
        .log_level = LOG_WARN};
    CHECK(vm_create(&b->vm, &vm, b->loop, &err));
    b->vm->on_stop = stopped;
    b->vm->on_stop_arg = b;
    if (config->log_fd)
        b->vm->log.fd = config->log_fd;
    struct ucall_config ucall = {.handle = ucall_handle, .arg = b};
    for (unsigned i = 0; i < config->nr_params; i++) {
        ucall.params[config->params[i].id] = config->params[i].value;
        ucall.params_set |= 1ull << config->params[i].id;
    }
    const struct board_config board = {
        .console = b->console, .debug_exit = true, .ucall = &ucall, .pci = config->pci};
    CHECK(board_create(b->vm, &board, &b->board, &err));
    devices_add(b);
    if (config->guest)
        guest_load(b);
}

static void *loop_main(void *arg)
{
    struct bare *b = arg;
    CHECK(loop_run(b->loop, &err));
    return NULL;
}

void bare_run(struct bare *b)
{
    if (b->config.nr_devices && !b->loop_runs) {
        b->loop_runs = true;
        ck_assert_int_eq(pthread_create(&b->loop_thread, NULL, loop_main, b), 0);
    }
    CHECK(vm_start(b->vm, &err));
    vm_resume(b->vm);
}

void bare_loop_end(struct bare *b)
{
    if (!b->loop_runs)
        return;
    loop_stop(b->loop);
    pthread_join(b->loop_thread, NULL);
    b->loop_runs = false;
}

void bare_end(struct bare *b)
{
    bare_loop_end(b);
    vm_destroy(b->vm);
    for (unsigned i = 0; i < 4; i++) // polls that devices cancelled end, and free what they watched
        CHECK(loop_turn(b->loop, false, &err));
    loop_destroy(b->loop);
    console_close(b->console);
    close(b->console_fd);
    pthread_cond_destroy(&b->changed);
    pthread_mutex_destroy(&b->lock);
}

void bare_pause(struct bare *b)
{
    CHECK(vm_pause(b->vm, &err));
    ck_assert(vm_paused(b->vm));
}

void bare_resume(struct bare *b)
{
    vm_resume(b->vm);
}

void bare_save(struct bare *b, struct stream_mem *blob)
{
    stream_mem_writer(blob, "saved state", STATE_BLOB_MAX);
    CHECK(vm_save(b->vm, &blob->stream, &err));
}

void bare_load(struct bare *b, const struct bare *from, const struct stream_mem *blob)
{
    ck_assert_uint_eq(b->vm->ram.size, from->vm->ram.size);
    ram_for_each_region (&b->vm->ram, r)
        memcpy(r->hva, ram_at(&from->vm->ram, r->gpa, r->size), r->size);
    struct stream_mem in;
    stream_mem_reader(&in, "saved state", blob->data, blob->len);
    CHECK(vm_load(b->vm, &in.stream, &err));
}

// --- waiting

static void wait_step(struct bare *b, const struct timespec *limit, const char *what)
{
    if (pthread_cond_timedwait(&b->changed, &b->lock, limit) != ETIMEDOUT)
        return;
    pthread_mutex_unlock(&b->lock);
    ck_abort_msg("guest %s: no %s within %d s; %u syncs, the last with stage %llu; output: %s",
                 b->config.guest ? b->config.guest : "(loaded)", what, BARE_WAIT_SECONDS, b->syncs,
                 (unsigned long long)b->stage, b->output);
}

static struct timespec wait_limit(void)
{
    struct timespec limit;
    clock_gettime(CLOCK_MONOTONIC, &limit);
    limit.tv_sec += BARE_WAIT_SECONDS;
    return limit;
}

void bare_wait_syncs(struct bare *b, unsigned count)
{
    const struct timespec limit = wait_limit();
    pthread_mutex_lock(&b->lock);
    while (b->syncs < count && !b->stopped)
        wait_step(b, &limit, "sync");
    bool enough = b->syncs >= count;
    pthread_mutex_unlock(&b->lock);
    if (!enough)
        ck_abort_msg("guest %s stopped after %u of %u syncs: %s: %s", b->config.guest, b->syncs,
                     count, vm_stop_name(b->vm->stop.kind), b->vm->stop.text);
}

const struct vm_stop *bare_wait_stop(struct bare *b)
{
    const struct timespec limit = wait_limit();
    pthread_mutex_lock(&b->lock);
    while (!b->stopped)
        wait_step(b, &limit, "end");
    pthread_mutex_unlock(&b->lock);
    ck_assert(vm_stopped(b->vm));
    return &b->vm->stop;
}

void bare_wait_done(struct bare *b)
{
    const struct vm_stop *stop = bare_wait_stop(b);
    if (stop->kind != VM_STOP_DEBUG_EXIT || stop->value)
        ck_abort_msg("guest %s: %s: %s", b->config.guest ? b->config.guest : "(loaded)",
                     vm_stop_name(stop->kind), stop->text);
}

bool bare_has_value(struct bare *b, enum ucall_value id, unsigned index)
{
    pthread_mutex_lock(&b->lock);
    bool present = b->values[id][index].present;
    pthread_mutex_unlock(&b->lock);
    return present;
}

uint64_t bare_value(struct bare *b, enum ucall_value id, unsigned index)
{
    pthread_mutex_lock(&b->lock);
    struct bare_value v = b->values[id][index];
    pthread_mutex_unlock(&b->lock);
    if (!v.present)
        ck_abort_msg("guest %s never told %s[%u]", b->config.guest, ucall_value_name(id), index);
    return v.value;
}

const char *bare_serial(struct bare *b)
{
    ssize_t n;
    while (b->serial_len < sizeof(b->serial) - 1 &&
           (n = read(b->console_fd, b->serial + b->serial_len,
                     sizeof(b->serial) - 1 - b->serial_len)) > 0)
        b->serial_len += (size_t)n;
    return b->serial;
}

uint64_t bare_u64(struct bare *b, uint64_t gpa)
{
    const uint64_t *p = ram_at(&b->vm->ram, gpa, sizeof(*p));
    ck_assert_msg(p && gpa % sizeof(*p) == 0, "guest address %#llx", (unsigned long long)gpa);
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

uint64_t bare_wait_change(struct bare *b, uint64_t gpa, uint64_t old)
{
    const uint64_t end = time_ns() + BARE_WAIT_SECONDS * 1000000000ull;
    for (;;) {
        uint64_t now = bare_u64(b, gpa);
        if (now != old)
            return now;
        if (time_ns() > end || vm_stopped(b->vm))
            ck_abort_msg("guest %s: %#llx stays %llu; VM %s %s", b->config.guest,
                         (unsigned long long)gpa, (unsigned long long)old,
                         vm_stop_name(b->vm->stop.kind), b->vm->stop.text);
        sched_yield(); // the guest's memory is all there is to watch: no event comes
    }
}

bool bare_has_log(enum ram_log log)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    bool has = log == RAM_LOG_BITMAP ||
               (fd >= 0 && ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) > 0);
    if (fd >= 0)
        close(fd);
    return has;
}

bool bare_long(void)
{
    const char *text = getenv("FERRY_LONG");
    return text && *text && strcmp(text, "0");
}

int bare_main(const char *name, void (*add_tests)(TCase *))
{
    if (access("/dev/kvm", R_OK | W_OK)) {
        printf("skipped: /dev/kvm: %s\n", strerror(errno));
        return 77;
    }
    Suite *suite = suite_create(name);
    TCase *tc = tcase_create(name);
    tcase_set_timeout(tc, 2 * BARE_WAIT_SECONDS);
    add_tests(tc);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

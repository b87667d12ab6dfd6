// SPDX-License-Identifier: Apache-2.0
// Pausing, resuming, stopping: no kick is lost, nothing is left behind.
#include "tests/bare/bare.h"

#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "vmm/util.h"
#include "vmm/vcpu.h"

// --- pause storms

// Counters do not move while paused and do move afterwards.
static void spin_round(struct bare *b, unsigned cpus, uint64_t *seen)
{
    bare_pause(b);
    for (unsigned i = 0; i < cpus; i++)
        seen[i] = bare_u64(b, bare_value(b, UCALL_V_COUNTER, i));
    bare_pause(b); // again: does nothing
    for (unsigned i = 0; i < cpus; i++)
        ck_assert_uint_eq(bare_u64(b, bare_value(b, UCALL_V_COUNTER, i)), seen[i]);
    bare_resume(b);
}

static void spin_storm(unsigned cpus, uint64_t ring, unsigned rounds)
{
    struct bare b;
    const struct bare_config config = {
        .guest = "spin", .cpus = cpus, .params = {{UCALL_P_RING, ring}}, .nr_params = 1};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_syncs(&b, 1);
    uint64_t seen[VM_MAX_VCPUS];
    for (unsigned n = 0; n < rounds; n++)
        spin_round(&b, cpus, seen);
    for (unsigned i = 0; i < cpus; i++)
        bare_wait_change(&b, bare_value(&b, UCALL_V_COUNTER, i), seen[i]);
    bare_end(&b);
}

START_TEST(storm_on_ring3)
{
    spin_storm(1, 3, 2000);
    spin_storm(4, 3, 500);
}
END_TEST

START_TEST(storm_on_ring0)
{
    spin_storm(2, 0, 1000);
}
END_TEST

START_TEST(storm_on_halted)
{
    // _i: interrupts masked (sleeps for good) or enabled.
    struct bare b;
    const struct bare_config config = {
        .guest = "halt", .cpus = 4, .params = {{UCALL_P_IRQS, (uint64_t)_i}}, .nr_params = 1};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_syncs(&b, 1);
    for (unsigned n = 0; n < 1000; n++) {
        bare_pause(&b);
        bare_resume(&b);
    }
    ck_assert(!vm_stopped(b.vm));
    bare_end(&b);
}
END_TEST

// Application processors that nobody started wait inside KVM_RUN in yet another state.
START_TEST(storm_on_processors_never_started)
{
    struct bare b;
    const struct bare_config config = {.guest = "spin",
                                       .cpus = 8,
                                       .params = {{UCALL_P_RING, 3}, {UCALL_P_CPUS, 1}},
                                       .nr_params = 2};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_syncs(&b, 1);
    uint64_t seen[VM_MAX_VCPUS];
    for (unsigned n = 0; n < 500; n++)
        spin_round(&b, 1, seen);
    bare_wait_change(&b, bare_value(&b, UCALL_V_COUNTER, 0), seen[0]);
    bare_end(&b);
}
END_TEST

// Exits and kicks meet: the guest does nothing but port accesses, and each must happen once.
START_TEST(storm_on_exits)
{
    struct bare b;
    const struct bare_config config = {
        .guest = "exits", .params = {{UCALL_P_N, 100000}, {UCALL_P_WRITE, 1}}, .nr_params = 2};
    bare_create(&b, &config);
    bare_run(&b);
    for (uint64_t before = 0;; before = atomic_load(&b.vm->vcpus[0].exits)) {
        // Some progress each time, or the pauses would leave the guest no time.
        while (atomic_load(&b.vm->vcpus[0].exits) < before + 20 && !vm_stopped(b.vm))
            sched_yield();
        struct error err;
        int ret = vm_pause(b.vm, &err);
        if (ret == -ESHUTDOWN)
            break;
        ck_assert_msg(!ret, "%s", err.text);
        bare_resume(&b);
    }
    bare_wait_done(&b);
    ck_assert_uint_eq(bare_value(&b, UCALL_V_COUNT, 0), 100000);
    ck_assert_uint_ge(atomic_load(&b.vm->vcpus[0].exits), 100000);
    bare_end(&b);
}
END_TEST

START_TEST(resume_of_a_running_guest_does_nothing)
{
    struct bare b;
    const struct bare_config config = {
        .guest = "spin", .cpus = 2, .params = {{UCALL_P_RING, 3}}, .nr_params = 1};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_syncs(&b, 1);
    bare_resume(&b); // would wait for ever if it touched a vCPU that never leaves the guest
    ck_assert(!vm_paused(b.vm));
    uint64_t seen[2];
    spin_round(&b, 2, seen);
    bare_end(&b);
}
END_TEST

struct stopper {
    struct bare *b;
    unsigned number;
};

static void *stop_it(void *arg)
{
    struct stopper *s = arg;
    vm_request_stop(s->b->vm, VM_STOP_HOST, s->number, "thread %u", s->number);
    return NULL;
}

// Stops come from everywhere while the VM is being paused; exactly one counts, and it stays.
START_TEST(stops_race_with_pause)
{
    for (unsigned round = 0; round < 50; round++) {
        struct bare b;
        const struct bare_config config = {
            .guest = "spin", .cpus = 2, .params = {{UCALL_P_RING, 3}}, .nr_params = 1};
        bare_create(&b, &config);
        bare_run(&b);
        bare_wait_syncs(&b, 1);
        pthread_t threads[2];
        struct stopper stoppers[2] = {{&b, 1}, {&b, 2}};
        for (unsigned i = 0; i < 2; i++)
            ck_assert_int_eq(pthread_create(&threads[i], NULL, stop_it, &stoppers[i]), 0);
        struct error err;
        while (!vm_pause(b.vm, &err))
            vm_resume(b.vm);
        ck_assert(vm_stopped(b.vm));
        for (unsigned i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        const struct vm_stop *stop = bare_wait_stop(&b);
        ck_assert(stop->value == 1 || stop->value == 2);
        ck_assert_int_eq(stop->text[7], '0' + (int)stop->value);
        bare_end(&b);
    }
}
END_TEST

// --- leaks

static unsigned entries(const char *path)
{
    unsigned n = 0;
    DIR *dir = opendir(path);
    ck_assert_ptr_nonnull(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static long status_kib(const char *key)
{
    long kib = -1;
    char line[256];
    FILE *f = fopen("/proc/self/status", "re");
    ck_assert_ptr_nonnull(f);
    while (fgets(line, sizeof(line), f))
        if (!strncmp(line, key, strlen(key)))
            sscanf(line + strlen(key), ": %ld", &kib);
    fclose(f);
    return kib;
}

// A joined thread is still listed for a moment, until the kernel has buried it.
static void threads_wait(unsigned expected)
{
    const uint64_t end = time_ns() + BARE_WAIT_SECONDS * 1000000000ull;
    while (entries("/proc/self/task") != expected) {
        ck_assert_msg(time_ns() < end, "%u threads are left",
                      entries("/proc/self/task") - expected);
        sched_yield();
    }
}

static void cycle(unsigned cpus)
{
    struct bare b;
    const struct bare_config config = {.guest = "hello", .cpus = cpus, .memory = RAM_MIN};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_done(&b);
    bare_end(&b);
}

START_TEST(cycles_leak_nothing)
{
    unsigned rounds = bare_long() ? 1000 : 50;
    for (unsigned i = 0; i < 5; i++)
        cycle(1 + i % 4); // what the C library keeps for itself is there now
    unsigned fds = entries("/proc/self/fd"), tasks = 2 + 1; // ".", "..", this thread
#ifdef __SANITIZE_THREAD__
    tasks += 2; // its own
#endif
    long kib = status_kib("VmRSS"), size = status_kib("VmSize");
    for (unsigned i = 0; i < rounds; i++)
        cycle(1 + i % 4);
    ck_assert_uint_eq(entries("/proc/self/fd"), fds);
    threads_wait(tasks);
    long grown = status_kib("VmRSS") - kib, mapped = status_kib("VmSize") - size;
    printf("%u cycles: RSS %+ld KiB, address space %+ld KiB\n", rounds, grown, mapped);
    // A guest's pages or one VM's tables leaked a cycle would be far more.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    ck_assert_int_lt(grown, 1024);
    ck_assert_int_lt(mapped, 64 * 1024);
#endif
}
END_TEST

START_TEST(create_without_start_leaks_nothing)
{
    unsigned fds = entries("/proc/self/fd");
    for (unsigned i = 0; i < 20; i++) {
        struct bare b;
        const struct bare_config config = {.guest = "hello", .cpus = 2};
        bare_create(&b, &config);
        bare_end(&b);
    }
    ck_assert_uint_eq(entries("/proc/self/fd"), fds);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, storm_on_ring3);
    tcase_add_test(tc, storm_on_ring0);
    tcase_add_loop_test(tc, storm_on_halted, 0, 2);
    tcase_add_test(tc, storm_on_processors_never_started);
    tcase_add_test(tc, storm_on_exits);
    tcase_add_test(tc, resume_of_a_running_guest_does_nothing);
    tcase_add_test(tc, stops_race_with_pause);
    tcase_add_test(tc, cycles_leak_nothing);
    tcase_add_test(tc, create_without_start_leaks_nothing);
}

int main(void)
{
    return bare_main("bare_pause", add_tests);
}

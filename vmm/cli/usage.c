// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/usage.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "vmm/util.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

static uint64_t vcpu_time(const struct vcpu *vcpu)
{
    clockid_t clock;
    struct timespec t;
    if (!vcpu->started || pthread_getcpuclockid(vcpu->thread, &clock) || clock_gettime(clock, &t))
        return 0;
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t vcpus_time(const struct vm *vm)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        sum += vcpu_time(&vm->vcpus[i]);
    return sum;
}

static void usage_read(struct loop_timer *timer)
{
    struct usage *u = container_of(timer, struct usage, timer);
    uint64_t now = time_ns(), cpu = vcpus_time(u->vm);
    uint64_t passed = now - u->at_ns;
    if (!passed || cpu < u->vcpu_ns)
        return;
    u->permille = (uint32_t)((cpu - u->vcpu_ns) * 1000 / passed);
    if (u->permille > u->peak_permille)
        u->peak_permille = u->permille;
    if (u->permille >= USAGE_IDLE_PERMILLE)
        u->busy_at_ns = now;
    u->at_ns = now;
    u->vcpu_ns = cpu;
}

int usage_start(struct usage *u, struct vm *vm, struct error *err)
{
    const uint64_t period = USAGE_PERIOD_S * 1000000000ull;
    bool goes = u->vm; // the timer does: of the guest that this one takes the place of
    u->vm = vm;
    u->at_ns = u->start_ns = time_ns();
    u->busy_at_ns = u->start_ns;
    u->vcpu_ns = vcpus_time(vm);
    u->permille = u->peak_permille = 0;
    if (goes)
        return 0;
    int ret = loop_timer_init(vm->loop, &u->timer, usage_read, err);
    if (ret)
        u->vm = NULL;
    else
        loop_timer_set(&u->timer, period, period);
    return ret;
}

void usage_stop(struct usage *u)
{
    if (u->vm)
        loop_timer_close(&u->timer);
    u->vm = NULL;
}

int usage_open(struct usage *u, struct error *err)
{
    if (u->statm_fd >= 0)
        return 0;
    u->statm_fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    return u->statm_fd < 0 ? error_errno(err, "/proc/self/statm") : 0;
}

void usage_close(struct usage *u)
{
    if (u->statm_fd >= 0)
        close(u->statm_fd);
    u->statm_fd = -1;
}

static uint64_t resident_bytes(int statm_fd)
{
    char text[128];
    unsigned long long size, resident;
    ssize_t n = pread(statm_fd, text, sizeof(text) - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    return sscanf(text, "%llu %llu", &size, &resident) == 2 ? resident * PAGE_SIZE : 0;
}

void usage_show(struct usage *u, json_t *out)
{
    if (!u->vm)
        return;
    uint64_t now = time_ns();
    json_object_set_new(out, "uptime_s",
                        json_integer((json_int_t)((now - u->start_ns) / 1000000000)));
    json_object_set_new(out, "idle_s",
                        json_integer((json_int_t)((now - u->busy_at_ns) / 1000000000)));
    json_object_set_new(out, "cpu_permille", json_integer(u->permille));
    json_object_set_new(out, "peak_cpu_permille", json_integer(u->peak_permille));
    json_object_set_new(out, "resident_bytes",
                        json_integer((json_int_t)resident_bytes(u->statm_fd)));
    for (unsigned i = 0; i < u->vm->nr_vcpus; i++)
        json_object_set_new(json_array_get(json_object_get(out, "vcpus"), i), "cpu_ns",
                            json_integer((json_int_t)vcpu_time(&u->vm->vcpus[i])));
}

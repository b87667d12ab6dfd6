// SPDX-License-Identifier: Apache-2.0
// A running guest is saved, loaded into a new VM of the same process, and goes on there.
#include "tests/bare/bare.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "vmm/util.h"
#include "vmm/vcpu.h"

// The guest goes on in `to`; `from` is gone. `blob` is what was saved.
static void move(struct bare *from, struct bare *to, struct stream_mem *blob)
{
    struct bare_config config = from->config;
    config.guest = NULL;
    bare_pause(from);
    bare_save(from, blob);
    bare_create(to, &config);
    bare_load(to, from, blob);
    bare_end(from);
}

// --- what a blob holds, by section

struct part {
    char name[32];
    uint32_t instance;
    const uint8_t *body;
    size_t len;
};

static bool part_next(const struct stream_mem *blob, size_t *pos, struct part *part)
{
    const uint8_t *p = blob->data + *pos;
    if (*pos + 4 >= blob->len) // the checksum is left
        return false;
    uint8_t name_len = *p++;
    memcpy(part->name, p, name_len);
    part->name[name_len] = 0;
    p += name_len;
    uint32_t len;
    memcpy(&part->instance, p, 4);
    memcpy(&len, p + 6, 4);
    part->body = p + 10;
    part->len = len;
    *pos = (size_t)(part->body + len - blob->data);
    return true;
}

// Bytes that time itself changes while nothing runs: TSC (MSR 0x10: a host that cannot offset it
// shows its own), the count of the local APIC's timer and the PIT's time stamps.
static bool is_time(const struct part *part, size_t at)
{
    if (!strcmp(part->name, "vcpu")) {
        for (size_t back = 0; back < 16 && back <= at; back++) {
            uint64_t index;
            if (at - back + 16 > part->len)
                continue;
            memcpy(&index, part->body + at - back, 8);
            if (index == 0x10 && back >= 8)
                return true;
        }
    }
    return !strcmp(part->name, "pit");
}

static unsigned parts_compare(const struct stream_mem *a, const struct stream_mem *b)
{
    size_t at_a = 12, at_b = 12; // length, magic, count
    struct part x, y;
    unsigned parts = 0;
    while (part_next(a, &at_a, &x)) {
        ck_assert(part_next(b, &at_b, &y));
        ck_assert_str_eq(x.name, y.name);
        ck_assert_uint_eq(x.instance, y.instance);
        ck_assert_uint_eq(x.len, y.len);
        for (size_t i = 0; i < x.len; i++)
            ck_assert_msg(x.body[i] == y.body[i] || is_time(&x, i),
                          "%s[%u]: byte %zu of %zu was %#x, is %#x", x.name, x.instance, i, x.len,
                          x.body[i], y.body[i]);
        parts++;
    }
    ck_assert(!part_next(b, &at_b, &y));
    return parts;
}

// --- tests

START_TEST(saved_state_survives_a_load)
{
    struct bare a, b;
    struct stream_mem first, second;
    const struct bare_config config = {.guest = "fpu",
                                       .cpus = 3,
                                       .hold = true,
                                       .params = {{UCALL_P_LOOPS, 0}, {UCALL_P_SEED, 99}},
                                       .nr_params = 2};
    bare_create(&a, &config);
    bare_run(&a);
    bare_wait_syncs(&a, 3); // each CPU holds full registers
    move(&a, &b, &first);
    struct error err;
    ck_assert_msg(!vm_start(b.vm, &err), "%s", err.text);
    bare_pause(&b);
    bare_save(&b, &second);
    // irqchip, pit, clock, three vCPUs and at least the serial port
    ck_assert_uint_ge(parts_compare(&first, &second), 7);
    stream_mem_free(&first);
    stream_mem_free(&second);
    bare_end(&b);
}
END_TEST

// The guest compares all its vector registers after each SYNC.
START_TEST(vector_registers_move)
{
    unsigned cpus = _i ? 4 : 1, moves = 6;
    struct bare vm[2];
    const struct bare_config config = {.guest = "fpu",
                                       .cpus = cpus,
                                       .hold = true,
                                       .params = {{UCALL_P_LOOPS, moves}, {UCALL_P_SEED, 7}},
                                       .nr_params = 2};
    bare_create(&vm[0], &config);
    bare_run(&vm[0]);
    struct bare *b = &vm[0];
    for (unsigned n = 0; n < moves; n++) {
        bare_wait_syncs(b, cpus);
        ck_assert_uint_eq(b->stage, n + 1);
        if (!n)
            ck_assert_uint_ge(bare_value(b, UCALL_V_FPU_SETS, 0), UCALL_FPU_X87 | UCALL_FPU_SSE);
        struct bare *next = &vm[(n + 1) % 2];
        struct stream_mem blob;
        move(b, next, &blob);
        stream_mem_free(&blob);
        bare_run(next);
        b = next;
    }
    bare_wait_done(b);
    bare_end(b);
}
END_TEST

// Anywhere, not only at a SYNC: sleeping, spinning, in the middle of port accesses.
START_TEST(spinning_guest_moves)
{
    struct bare vm[2];
    const struct bare_config config = {
        .guest = "spin", .cpus = 3, .params = {{UCALL_P_RING, (uint64_t)_i}}, .nr_params = 1};
    bare_create(&vm[0], &config);
    bare_run(&vm[0]);
    bare_wait_syncs(&vm[0], 1);
    uint64_t counters[3], seen[3] = {0};
    for (unsigned i = 0; i < 3; i++)
        counters[i] = bare_value(&vm[0], UCALL_V_COUNTER, i);
    for (unsigned n = 0; n < 10; n++) {
        struct bare *b = &vm[n % 2], *next = &vm[(n + 1) % 2];
        for (unsigned i = 0; i < 3; i++) {
            uint64_t now = bare_wait_change(b, counters[i], seen[i]);
            ck_assert_uint_gt(now, seen[i]);
        }
        struct stream_mem blob;
        move(b, next, &blob);
        stream_mem_free(&blob);
        for (unsigned i = 0; i < 3; i++)
            seen[i] = bare_u64(next, counters[i]);
        bare_run(next);
    }
    for (unsigned i = 0; i < 3; i++)
        bare_wait_change(&vm[0], counters[i], seen[i]);
    bare_end(&vm[0]);
}
END_TEST

START_TEST(port_accesses_happen_once)
{
    // The guest counts the answers it gets; each `in` of the ucall port gives the magic number
    // once.
    struct bare vm[2];
    const struct bare_config config = {
        .guest = "exits",
        .params = {{UCALL_P_N, 30000}, {UCALL_P_PORT, 0x80}, {UCALL_P_WRITE, (uint64_t)_i}},
        .nr_params = 3};
    bare_create(&vm[0], &config);
    bare_run(&vm[0]);
    unsigned at = 0, moves = 0;
    uint64_t exits = 0;
    for (;;) {
        struct error err;
        // Some progress each time, or the moves would leave the guest no time.
        while (atomic_load(&vm[at].vm->vcpus[0].exits) < 1000 && !vm_stopped(vm[at].vm))
            sched_yield();
        if (vm_pause(vm[at].vm, &err))
            break;
        exits += atomic_load(&vm[at].vm->vcpus[0].exits);
        struct stream_mem blob;
        move(&vm[at], &vm[1 - at], &blob);
        stream_mem_free(&blob);
        at = 1 - at;
        moves++;
        bare_run(&vm[at]);
    }
    bare_wait_done(&vm[at]);
    exits += atomic_load(&vm[at].vm->vcpus[0].exits);
    ck_assert_uint_eq(bare_value(&vm[at], UCALL_V_COUNT, 0), 30000);
    ck_assert_uint_ge(exits, 30000);
    ck_assert_uint_gt(moves, 0);
    bare_end(&vm[at]);
}
END_TEST

// Local APIC timer, PIT, IPIs: what is armed or pending when the guest is saved still comes.
START_TEST(interrupts_survive_moves)
{
    struct bare vm[2];
    const struct bare_config config = {.guest = _i ? "smp" : "timer",
                                       .cpus = _i ? 4 : 1,
                                       .params = {{UCALL_P_N, 20}},
                                       .nr_params = 1};
    bare_create(&vm[0], &config);
    bare_run(&vm[0]);
    unsigned at = 0;
    for (;;) {
        struct error err;
        if (vm_pause(vm[at].vm, &err))
            break;
        struct stream_mem blob;
        move(&vm[at], &vm[1 - at], &blob);
        stream_mem_free(&blob);
        at = 1 - at;
        bare_run(&vm[at]);
        // Most of its exits stay in the kernel: time is all that lets it get on. Any length is
        // right.
        const struct timespec slice = {.tv_nsec = 3000000};
        nanosleep(&slice, NULL);
    }
    bare_wait_done(&vm[at]);
    bare_end(&vm[at]);
}
END_TEST

START_TEST(clock_stands_still_while_paused)
{
    struct bare a, b;
    struct stream_mem blob;
    const struct bare_config config = {.guest = "halt"};
    bare_create(&a, &config);
    bare_run(&a);
    bare_wait_syncs(&a, 1);
    bare_pause(&a);
    uint64_t clock = a.vm->paused_clock_ns;
    ck_assert_uint_gt(clock, 0);
    bare_pause(&a);
    ck_assert_uint_eq(a.vm->paused_clock_ns, clock);
    move(&a, &b, &blob);
    ck_assert_uint_eq(b.vm->paused_clock_ns, clock);
    // Started but still paused, and paused again: the loaded clock stays.
    struct error err;
    ck_assert(!vm_start(b.vm, &err));
    bare_pause(&b);
    ck_assert_uint_eq(b.vm->paused_clock_ns, clock);
    bare_resume(&b);
    bare_pause(&b);
    ck_assert_uint_gt(b.vm->paused_clock_ns, clock);
    // Far less than what a new start from zero, or another host's clock, would show.
    ck_assert_uint_lt(b.vm->paused_clock_ns - clock, BARE_WAIT_SECONDS * 1000000000ull);
    stream_mem_free(&blob);
    bare_end(&b);
}
END_TEST

START_TEST(save_needs_a_paused_machine)
{
    struct bare b;
    struct stream_mem blob;
    struct error err;
    const struct bare_config config = {.guest = "halt"};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_syncs(&b, 1);
    stream_mem_writer(&blob, "blob", STATE_BLOB_MAX);
    ck_assert_int_eq(vm_save(b.vm, &blob.stream, &err), -EBUSY);
    ck_assert_uint_eq(blob.len, 0);
    bare_end(&b);
}
END_TEST

START_TEST(load_into_another_shape_is_refused)
{
    struct bare a, b;
    struct stream_mem blob, in;
    struct error err;
    struct bare_config config = {.guest = "halt", .cpus = 2};
    bare_create(&a, &config);
    bare_run(&a);
    bare_wait_syncs(&a, 1);
    bare_pause(&a);
    bare_save(&a, &blob);
    config.guest = NULL;
    static const struct {
        unsigned cpus;
        int code;
    } shapes[] = {{1, -ENODEV}, {3, -ENODATA}};
    for (unsigned i = 0; i < 2; i++) {
        config.cpus = shapes[i].cpus;
        bare_create(&b, &config);
        stream_mem_reader(&in, "blob", blob.data, blob.len);
        ck_assert_int_eq(vm_load(b.vm, &in.stream, &err), shapes[i].code);
        ck_assert_ptr_nonnull(strstr(err.text, "vcpu["));
        bare_end(&b);
    }
    stream_mem_free(&blob);
    bare_end(&a);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, saved_state_survives_a_load);
    tcase_add_loop_test(tc, vector_registers_move, 0, 2);
    tcase_add_loop_test(tc, spinning_guest_moves, 0, 2);
    tcase_add_loop_test(tc, port_accesses_happen_once, 0, 2);
    tcase_add_loop_test(tc, interrupts_survive_moves, 0, 2);
    tcase_add_test(tc, clock_stands_still_while_paused);
    tcase_add_test(tc, save_needs_a_paused_machine);
    tcase_add_test(tc, load_into_another_shape_is_refused);
}

int main(void)
{
    return bare_main("bare_state", add_tests);
}

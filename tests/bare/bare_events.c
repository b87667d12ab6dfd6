// SPDX-License-Identifier: Apache-2.0
// ioeventfd, irqfd, interrupt lines and MSI, shown by guests that only count.
#include "tests/bare/bare.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>

#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vcpu.h"

static uint64_t eventfd_take(int fd)
{
    uint64_t count = 0;
    return read(fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

// Port writes go to the event instead of to us: the guest's n accesses are n counts and no exits.
START_TEST(ioeventfd_takes_port_writes)
{
    enum { N = 5000, PORT = 0x80 };
    autoclose int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    ck_assert_int_ge(fd, 0);
    struct bare b;
    struct error err;
    const struct bare_config config = {.guest = "exits",
                                       .params = {{UCALL_P_N, N},
                                                  {UCALL_P_PORT, PORT},
                                                  {UCALL_P_WRITE, 1},
                                                  {UCALL_P_RING, _i ? 3 : 0}},
                                       .nr_params = 4};
    bare_create(&b, &config);
    unsigned len = _i ? 1 : 0; // 0 = any
    ck_assert_msg(!vm_ioeventfd(b.vm, true, PORT, len, fd, true, &err), "%s", err.text);
    ck_assert_int_eq(vm_ioeventfd(b.vm, true, PORT, len, fd, true, &err), -EEXIST);
    bare_run(&b);
    bare_wait_done(&b);
    ck_assert_uint_eq(eventfd_take(fd), N);
    ck_assert_uint_lt(atomic_load(&b.vm->vcpus[0].exits), N / 2);
    ck_assert_msg(!vm_ioeventfd(b.vm, true, PORT, len, fd, false, &err), "%s", err.text);
    ck_assert_int_eq(vm_ioeventfd(b.vm, true, PORT, len, fd, false, &err), -ENOENT);
    bare_end(&b);
}
END_TEST

enum { IRQ_LINE = 5, VECTOR_MESSAGE = 0x71 }; // guest/bare/guests/irqs.c

static void raise_line(struct bare *b, int fd)
{
    ck_assert_int_eq(vm_irq_set(b->vm, IRQ_LINE, 1), 0);
    ck_assert_int_eq(vm_irq_set(b->vm, IRQ_LINE, 0), 0);
}

static void raise_irqfd(struct bare *b, int fd)
{
    uint64_t one = 1;
    ck_assert_int_eq(write(fd, &one, sizeof(one)), sizeof(one));
}

// One at a time, each counted once before the next: none is lost, none comes twice.
static void interrupts(void (*raise)(struct bare *b, int fd), uint64_t n)
{
    autoclose int fd = eventfd(0, EFD_CLOEXEC);
    struct bare b;
    struct error err;
    const struct bare_config config = {.guest = "irqs", .params = {{UCALL_P_N, n}}, .nr_params = 1};
    bare_create(&b, &config);
    ck_assert_msg(!vm_irqfd(b.vm, IRQ_LINE, fd, -1, &err), "%s", err.text);
    ck_assert_int_eq(vm_irqfd(b.vm, IRQ_LINE, fd, -1, &err), -EBUSY);
    bare_run(&b);
    bare_wait_syncs(&b, 1);
    uint64_t lines = bare_value(&b, UCALL_V_COUNTER, 0),
             messages = bare_value(&b, UCALL_V_COUNTER, 1);
    for (uint64_t i = 0; i < n; i++) {
        raise(&b, fd);
        ck_assert_uint_eq(bare_wait_change(&b, lines, i), i + 1);
        ck_assert_uint_eq(bare_u64(&b, messages), i);
        ck_assert_int_eq(vm_msi(b.vm, LAYOUT_LAPIC, VECTOR_MESSAGE), 0); // to APIC id 0
        if (i < n - 1)
            ck_assert_uint_eq(bare_wait_change(&b, messages, i), i + 1);
    }
    bare_wait_done(&b);
    bare_end(&b);
}

START_TEST(lines_reach_the_guest)
{
    interrupts(raise_line, 500);
}
END_TEST

START_TEST(irqfd_reaches_the_guest)
{
    interrupts(raise_irqfd, 500);
}
END_TEST

// What is raised while the guest is paused comes when it goes on, in another VM too.
START_TEST(pending_interrupt_moves)
{
    struct bare a, b;
    struct error err;
    struct stream_mem blob;
    struct bare_config config = {.guest = "irqs", .params = {{UCALL_P_N, 1}}, .nr_params = 1};
    bare_create(&a, &config);
    bare_run(&a);
    bare_wait_syncs(&a, 1);
    bare_pause(&a);
    raise_line(&a, -1);
    ck_assert_int_eq(vm_msi(a.vm, LAYOUT_LAPIC, VECTOR_MESSAGE), 0);
    bare_save(&a, &blob);
    config.guest = NULL;
    bare_create(&b, &config);
    bare_load(&b, &a, &blob);
    stream_mem_free(&blob);
    bare_end(&a);
    bare_run(&b);
    bare_wait_done(&b);
    ck_assert_int_ne(vm_irqfd(b.vm, IRQ_LINE, -1, -1, &err), 0);
    bare_end(&b);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_loop_test(tc, ioeventfd_takes_port_writes, 0, 2);
    tcase_add_test(tc, lines_reach_the_guest);
    tcase_add_test(tc, irqfd_reaches_the_guest);
    tcase_add_test(tc, pending_interrupt_moves);
}

int main(void)
{
    return bare_main("bare_events", add_tests);
}

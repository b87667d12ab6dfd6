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

// The guest `serial` waits for IRQ 4 and reads COM1 then: bytes that wait in the UART unseen are
// echoed as soon as the line rises, whoever raises it.
static void line_test(void (*raise)(struct bare *b, int fd))
{
    autoclose int fd = eventfd(0, EFD_CLOEXEC);
    struct bare b;
    struct error err;
    const struct bare_config config = {.guest = "timer", .params = {{UCALL_P_N, 3}}, .nr_params = 1};
    bare_create(&b, &config);
    ck_assert_msg(!vm_irqfd(b.vm, 0, fd, -1, &err), "%s", err.text);
    bare_run(&b);
    while (!vm_stopped(b.vm))
        raise(&b, fd);
    bare_wait_done(&b);
    bare_end(&b);
}

static void raise_eventfd(struct bare *b, int fd)
{
    uint64_t one = 1;
    ck_assert_int_eq(write(fd, &one, sizeof(one)), sizeof(one));
}

START_TEST(lines_flooded_by_irqfd)
{
    line_test(raise_eventfd);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_loop_test(tc, ioeventfd_takes_port_writes, 0, 2);
    tcase_add_test(tc, lines_flooded_by_irqfd);
}

int main(void)
{
    return bare_main("bare_events", add_tests);
}

// SPDX-License-Identifier: Apache-2.0
// Every way a guest ends is told apart, by kind, exit status and text.
#include "tests/bare/bare.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "vmm/exit_status.h"
#include "vmm/util.h"

static void ends(const struct bare_config *config, enum vm_stop_kind kind, int status,
                 const char *text)
{
    struct bare b;
    bare_create(&b, config);
    bare_run(&b);
    const struct vm_stop *stop = bare_wait_stop(&b);
    ck_assert_msg(stop->kind == kind, "%s: ended as \"%s\" (%s), expected \"%s\"", config->guest,
                  vm_stop_name(stop->kind), stop->text, vm_stop_name(kind));
    ck_assert_int_eq(vm_stop_status(stop), status);
    ck_assert_msg(strstr(stop->text, text) != NULL, "\"%s\" has no \"%s\"", stop->text, text);
    bare_end(&b);
}

START_TEST(poweroff)
{
    const struct bare_config config = {.guest = "poweroff"};
    ends(&config, VM_STOP_POWEROFF, EXIT_OK, "powered off");
}
END_TEST

START_TEST(reset)
{
    const struct bare_config config = {.guest = "reset"};
    ends(&config, VM_STOP_RESET, EXIT_GUEST_REBOOT, "reset");
}
END_TEST

START_TEST(triple_fault)
{
    const struct bare_config config = {.guest = "triple"};
    ends(&config, VM_STOP_TRIPLE_FAULT, EXIT_GUEST_TRIPLE_FAULT, "triple fault");
}
END_TEST

START_TEST(debug_exit)
{
    const struct bare_config config = {.guest = "real", .protocol = BOOT_REAL};
    ends(&config, VM_STOP_DEBUG_EXIT, EXIT_OK, "value 0");
}
END_TEST

START_TEST(guest_exception)
{
    // n, ring, vector, error code: guest/bare/guests/fault.c
    static const struct {
        uint64_t n, ring;
        const char *text;
    } faults[] = {
        {0, 0, "exception 14: error code 0x2"},
        {0, 3, "exception 14: error code 0x6"},
        {1, 0, "exception 6"},
        {1, 3, "exception 6"},
        {2, 3, "exception 13: error code 0x0"},
    };
    const struct bare_config config = {
        .guest = "fault",
        .params = {{UCALL_P_N, faults[_i].n}, {UCALL_P_RING, faults[_i].ring}},
        .nr_params = 2};
    ends(&config, VM_STOP_PANIC, EXIT_GUEST_PANIC, faults[_i].text);
}
END_TEST

START_TEST(guest_assertion)
{
    // More memory than there is: `incr` asserts that it got its pages.
    const struct bare_config config = {
        .guest = "incr", .params = {{UCALL_P_PAGES, 1 << 20}}, .nr_params = 1};
    ends(&config, VM_STOP_PANIC, EXIT_GUEST_PANIC, "assertion failed");
}
END_TEST

START_TEST(host_stops_a_running_guest)
{
    struct bare b;
    const struct bare_config config = {
        .guest = "spin", .cpus = 2, .params = {{UCALL_P_RING, 3}}, .nr_params = 1};
    bare_create(&b, &config);
    bare_run(&b);
    bare_wait_syncs(&b, 1);
    vm_request_stop(b.vm, VM_STOP_HOST, 0, "the test ends it");
    vm_request_stop(b.vm, VM_STOP_ERROR, 1, "too late");
    const struct vm_stop *stop = bare_wait_stop(&b);
    ck_assert_int_eq(stop->kind, VM_STOP_HOST);
    ck_assert_str_eq(stop->text, "the test ends it");
    ck_assert_int_eq(vm_stop_status(stop), EXIT_STOPPED);
    struct error err;
    ck_assert_int_eq(vm_pause(b.vm, &err), -ESHUTDOWN);
    ck_assert(vm_stopped(b.vm));
    bare_end(&b);
}
END_TEST

START_TEST(stop_before_start_is_kept)
{
    struct bare b;
    const struct bare_config config = {.guest = "spin"};
    bare_create(&b, &config);
    vm_request_stop(b.vm, VM_STOP_HOST, 0, "early");
    bare_run(&b);
    ck_assert_int_eq(bare_wait_stop(&b)->kind, VM_STOP_HOST);
    ck_assert_uint_eq(b.syncs, 0);
    bare_end(&b);
}
END_TEST

// An instruction the host's KVM lacks ends in a diagnosis; where it has it, the guest passes.
START_TEST(missing_instruction)
{
    static const struct {
        const char *bytes, *name, *remedy;
    } insns[] = {
        {"f3 48 0f b8 c7", "popcnt", "clearcpuid=popcnt"},
        {"48 0f c7 0f", "cmpxchg", "-cx16"},
        {"9b", "fwait", "guest/build"},
    };
    struct bare b;
    const struct bare_config config = {
        .guest = "badinsn", .params = {{UCALL_P_INSN, (uint64_t)_i}}, .nr_params = 1};
    bare_create(&b, &config);
    bare_run(&b);
    const struct vm_stop *stop = bare_wait_stop(&b);
    if (stop->kind == VM_STOP_DEBUG_EXIT && !stop->value) {
        printf("this host runs %s at ring 0\n", insns[_i].name);
        bare_end(&b);
        return;
    }
    ck_assert_int_eq(stop->kind, VM_STOP_EMULATION);
    ck_assert_int_eq(vm_stop_status(stop), EXIT_GUEST_EMULATION);
    char rip[64];
    snprintf(rip, sizeof(rip), "rip %016llx", (unsigned long long)b.stage_value);
    const char *expected[] = {
        "vCPU 0", rip, "ring 0", "rax ", "cr3 ", insns[_i].bytes, insns[_i].name, insns[_i].remedy};
    for (size_t i = 0; i < ARRAY_SIZE(expected); i++)
        ck_assert_msg(strstr(stop->text, expected[i]) != NULL, "no \"%s\" in: %s", expected[i],
                      stop->text);
    bare_end(&b);
}
END_TEST

static void add_tests(TCase *tc)
{
    tcase_add_test(tc, poweroff);
    tcase_add_test(tc, reset);
    tcase_add_test(tc, triple_fault);
    tcase_add_test(tc, debug_exit);
    tcase_add_loop_test(tc, guest_exception, 0, 5);
    tcase_add_test(tc, guest_assertion);
    tcase_add_test(tc, host_stops_a_running_guest);
    tcase_add_test(tc, stop_before_start_is_kept);
    tcase_add_loop_test(tc, missing_instruction, 0, 3);
}

int main(void)
{
    return bare_main("bare_ends", add_tests);
}

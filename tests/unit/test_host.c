// SPDX-License-Identifier: Apache-2.0
// The verdicts of `ferry check`: each lack is named, told whom it concerns, and has a remedy.
#include <check.h>
#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/host.h"
#include "vmm/util.h"

static struct host_finding findings[HOST_FINDINGS_MAX];

// A host with everything.
static struct host_facts good(void)
{
    struct host_facts f = {.kernel = "6.1.0",
                           .machine = "x86_64",
                           .cpu_model = "Test CPU",
                           .cpu_virtualization = true,
                           .kvm_path = "/dev/kvm",
                           .kvm_api = KVM_API_VERSION,
                           .backend = "kvm_amd",
                           .nested = 1,
                           .uffd_features = 0x1ffff,
                           .thp = "madvise",
                           .hugetlb_total = 8,
                           .hugetlb_free = 8,
                           .memlock = 64 * MiB,
                           .nofile = 1024,
                           .nofile_max = 4096,
                           .memory_total = 8 * GiB,
                           .memory_available = 4 * GiB,
                           .cpus = 4,
                           .clocksource = "tsc",
                           .tsc_constant = true};
    for (size_t i = 0; host_cap_number(i) >= 0; i++)
        f.caps[i] = 64;
    return f;
}

static const struct host_finding *finding(const struct host_facts *f, const char *name)
{
    size_t nr = host_judge(f, findings);
    for (size_t i = 0; i < nr; i++) {
        if (!strcmp(findings[i].name, name))
            return &findings[i];
    }
    ck_abort_msg("no finding \"%s\"", name);
}

static bool can_run(const struct host_facts *f)
{
    return host_can_run(findings, host_judge(f, findings));
}

static void expect(const struct host_facts *f, const char *name, enum host_status status,
                   const char *remedy, bool runs)
{
    const struct host_finding *g = finding(f, name);
    ck_assert_msg(g->status == status, "%s: %s", name, g->value);
    ck_assert_msg(strstr(g->remedy, remedy) != NULL, "%s: \"%s\" lacks \"%s\"", name, g->remedy,
                  remedy);
    ck_assert_int_eq(can_run(f), runs);
}

START_TEST(all_well)
{
    struct host_facts f = good();
    size_t nr = host_judge(&f, findings);
    ck_assert_uint_gt(nr, 40);
    ck_assert_uint_lt(nr, HOST_FINDINGS_MAX);
    for (size_t i = 0; i < nr; i++) {
        ck_assert_msg(findings[i].status == HOST_OK, "%s: %s", findings[i].name,
                      findings[i].remedy);
        ck_assert_str_eq(findings[i].remedy, "");
        ck_assert_str_ne(findings[i].value, "");
        for (size_t k = 0; k < i; k++)
            ck_assert_str_ne(findings[i].name, findings[k].name);
    }
    ck_assert(host_can_run(findings, nr));
}
END_TEST

START_TEST(kvm_device)
{
    struct host_facts f = good();
    f.kvm = HOST_KVM_NO_ACCESS;
    f.kvm_errno = EACCES;
    expect(&f, "device", HOST_LACK, "usermod -aG kvm", false);
    f.kvm = HOST_KVM_ABSENT;
    f.kvm_errno = ENOENT;
    expect(&f, "device", HOST_LACK, "modprobe", false);
    f.cpu_virtualization = false;
    expect(&f, "device", HOST_LACK, "firmware", false);
    f.is_guest = true;
    expect(&f, "device", HOST_LACK, "nested", false);
    f = good();
    f.kvm = HOST_KVM_NOT_DEVICE;
    f.kvm_errno = ENOTTY;
    expect(&f, "device", HOST_LACK, "10:232", false);
    f = good();
    f.kvm = HOST_KVM_BUSY;
    f.kvm_errno = EBUSY;
    expect(&f, "device", HOST_LACK, "another hypervisor", false);
    f = good();
    f.kvm_api = 11;
    expect(&f, "API version", HOST_LACK, "12", false);
    f = good();
    f.software_backend = true;
    f.backend = "kvm_pvm";
    expect(&f, "back end", HOST_WARN, "emulated", true);
}
END_TEST

START_TEST(each_capability)
{
    // Without any one of them there is exactly one more finding that is not ok; whether guests run
    // is what its own row says.
    for (size_t i = 0; host_cap_number(i) >= 0; i++) {
        struct host_facts f = good();
        f.caps[i] = 0;
        size_t nr = host_judge(&f, findings), bad = 0;
        for (size_t k = 0; k < nr; k++) {
            if (findings[k].status == HOST_OK)
                continue;
            bad++;
            ck_assert_str_ne(findings[k].remedy, "");
            ck_assert_int_eq(host_can_run(findings, nr),
                             !(findings[k].required && findings[k].status == HOST_LACK));
        }
        ck_assert_uint_eq(bad, 1);
    }
    struct host_facts f = good();
    for (size_t i = 0; host_cap_number(i) >= 0; i++) {
        if (host_cap_number(i) == KVM_CAP_IRQCHIP)
            f.caps[i] = 0;
    }
    expect(&f, "interrupt controllers", HOST_LACK, "kernel", false);
}
END_TEST

START_TEST(the_rest)
{
    struct host_facts f = good();
    f.uffd_errno = EPERM;
    expect(&f, "userfaultfd", HOST_LACK, "unprivileged_userfaultfd", true);
    f.uffd_errno = ENOSYS;
    expect(&f, "userfaultfd", HOST_LACK, "CONFIG_USERFAULTFD", true);
    f = good();
    f.uffd_features = 1 << 5;
    expect(&f, "userfaultfd: shared memory", HOST_OK, "", true);
    expect(&f, "userfaultfd: write-protect", HOST_WARN, "kernel", true);
    f = good();
    f.uring_errno = EPERM;
    expect(&f, "io_uring", HOST_LACK, "io_uring_disabled", false);
    f.uring_errno = ENOMEM;
    expect(&f, "io_uring", HOST_LACK, "ulimit -l", false);
    f = good();
    f.tun_errno = ENOENT;
    expect(&f, "/dev/net/tun", HOST_WARN, "modprobe tun", true);
    f.tun_errno = EACCES;
    expect(&f, "/dev/net/tun", HOST_WARN, "rights", true);
    f = good();
    strcpy(f.thp, "never");
    expect(&f, "transparent huge pages", HOST_WARN, "madvise", true);
    f.hugetlb_free = 0;
    expect(&f, "2 MiB pages", HOST_WARN, "nr_hugepages", true);
    f.overcommit = 2;
    expect(&f, "overcommit", HOST_WARN, "overcommit_memory=0", true);
    f.memlock = 64 * KiB;
    expect(&f, "locked-memory limit", HOST_WARN, "ulimit -l", true);
    f.memlock = UINT64_MAX;
    expect(&f, "locked-memory limit", HOST_OK, "", true);
    f.nofile = 64;
    expect(&f, "open-files limit", HOST_WARN, "ulimit -n", true);
    f.memory_available = 10 * MiB;
    expect(&f, "memory free", HOST_WARN, "guests", true);
    strcpy(f.clocksource, "hpet");
    expect(&f, "clock source", HOST_WARN, "TSC", true);
    strcpy(f.machine, "aarch64");
    expect(&f, "machine", HOST_LACK, "x86-64", false);
}
END_TEST

START_TEST(probe_tells_apart)
{
    struct host_facts f;
    host_probe(&f, "/nonexistent/kvm");
    ck_assert_int_eq(f.kvm, HOST_KVM_ABSENT);
    ck_assert_int_eq(f.kvm_errno, ENOENT);
    // Something that opens but is not KVM.
    host_probe(&f, "/dev/null");
    ck_assert_int_eq(f.kvm, HOST_KVM_NOT_DEVICE);
    ck_assert_str_ne(f.kernel, "");
    ck_assert_uint_gt(f.memory_total, 0);
    ck_assert_int_gt(f.cpus, 0);
    ck_assert_int_eq(f.software_backend, host_is_software_backend());
    ck_assert(!can_run(&f));
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("host");
    tcase_add_test(tc, all_well);
    tcase_add_test(tc, kvm_device);
    tcase_add_test(tc, each_capability);
    tcase_add_test(tc, the_rest);
    tcase_add_test(tc, probe_tells_apart);
    Suite *suite = suite_create("host");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

// SPDX-License-Identifier: Apache-2.0
// ACPI: every table reached from the RSDP, its checksum and contents; the DSDT by iasl, when it is
// installed: disassembled, compiled again, compared byte by byte. And the AML encoder's edges.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "devices/acpi.h"
#include "devices/aml.h"
#include "vmm/layout.h"

static const struct acpi_virtio_mmio virtio[] = {
    {LAYOUT_VIRTIO_MMIO, 0x1000, GSI_VIRTIO},
    {LAYOUT_VIRTIO_MMIO + 0x1000, 0x1000, GSI_VIRTIO + 1},
    {LAYOUT_VIRTIO_MMIO + 0x2000, 0x1000, GSI_MAX - 1},
};

static void ram_make(struct ram *ram)
{
    struct error err = {0};
    struct ram_config config = {.size = RAM_MIN, .backing = RAM_ANONYMOUS};
    ck_assert_msg(ram_create(ram, &config, &err) == 0, "%s", err.text);
    memset(ram_at(ram, LAYOUT_ACPI, 0x20000), 0xa5, 0x20000);
}

static uint64_t get(const uint8_t *p, unsigned bytes)
{
    uint64_t value = 0;
    memcpy(&value, p, bytes);
    return value;
}

static unsigned sum(const uint8_t *p, size_t len)
{
    uint8_t total = 0;
    while (len--)
        total = (uint8_t)(total + *p++);
    return total;
}

static const uint8_t *table_at(const struct ram *ram, uint64_t gpa, const char *signature)
{
    ck_assert_uint_ge(gpa, LAYOUT_ACPI);
    ck_assert_uint_eq(gpa % 8, 0);
    const uint8_t *h = ram_at(ram, gpa, 36);
    ck_assert_ptr_nonnull(h);
    ck_assert_msg(!memcmp(h, signature, 4), "%.4s instead of %s", (const char *)h, signature);
    size_t length = get(h + 4, 4);
    ck_assert_uint_le(gpa + length, LAYOUT_ACPI_END);
    ck_assert_uint_eq(sum(h, length), 0);
    return h;
}

struct tables {
    const uint8_t *fadt, *madt, *dsdt;
    const uint8_t *mcfg; // NULL: none
};

static struct tables tables_walk(const struct ram *ram, uint64_t rsdp)
{
    const uint8_t *r = ram_at(ram, rsdp, 36);
    ck_assert_uint_eq(rsdp % 16, 0);
    ck_assert_int_eq(memcmp(r, "RSD PTR ", 8), 0);
    ck_assert_uint_eq(r[15], 2);
    ck_assert_uint_eq(sum(r, 20), 0);
    ck_assert_uint_eq(sum(r, get(r + 20, 4)), 0);
    const uint8_t *x = table_at(ram, get(r + 24, 8), "XSDT");
    bool pci = get(x + 4, 4) == 36 + 3 * 8;
    ck_assert_uint_eq(get(x + 4, 4), pci ? 60 : 52);
    struct tables t = {.fadt = table_at(ram, get(x + 36, 8), "FACP"),
                       .madt = table_at(ram, get(x + 44, 8), "APIC"),
                       .mcfg = pci ? table_at(ram, get(x + 52, 8), "MCFG") : NULL};
    ck_assert_uint_eq(get(t.fadt + 40, 4), get(t.fadt + 140, 8));
    t.dsdt = table_at(ram, get(t.fadt + 140, 8), "DSDT");
    return t;
}

static void madt_check(const uint8_t *madt, unsigned cpus)
{
    ck_assert_uint_eq(get(madt + 36, 4), LAYOUT_LAPIC);
    const uint8_t *p = madt + 44, *end = madt + get(madt + 4, 4);
    unsigned seen = 0, ioapics = 0, nmis = 0;
    while (p < end) {
        if (p[0] == 0) {
            ck_assert_uint_eq(p[1], 8);
            ck_assert_uint_eq(p[2], seen);
            ck_assert_uint_eq(p[3], seen);
            ck_assert_uint_eq(get(p + 4, 4), 1);
            ck_assert_uint_lt(seen++, 255);
        } else if (p[0] == 9) {
            ck_assert_uint_eq(p[1], 16);
            ck_assert_uint_eq(get(p + 4, 4), seen);
            ck_assert_uint_eq(get(p + 8, 4), 1);
            ck_assert_uint_eq(get(p + 12, 4), seen);
            ck_assert_uint_ge(seen++, 255);
        } else if (p[0] == 1) {
            ioapics++;
            ck_assert_uint_eq(p[1], 12);
            ck_assert_uint_eq(get(p + 4, 4), LAYOUT_IOAPIC);
            ck_assert_uint_eq(get(p + 8, 4), 0);
        } else {
            nmis++;
            ck_assert_uint_eq(p[0], 4);
            ck_assert_uint_eq(p[1], 6);
            ck_assert_uint_eq(p[2], 0xff);
            ck_assert_uint_eq(p[5], 1);
        }
        p += p[1];
    }
    ck_assert_ptr_eq(p, end);
    ck_assert_uint_eq(seen, cpus);
    ck_assert_uint_eq(ioapics, 1);
    ck_assert_uint_eq(nmis, 1);
}

static void gas_check(const uint8_t *gas, uint16_t port)
{
    ck_assert_uint_eq(get(gas, 4), 0x01000801); // system I/O, 8 bits, byte access
    ck_assert_uint_eq(get(gas + 4, 8), port);
}

static unsigned occurrences(const uint8_t *table, const void *what, size_t len)
{
    unsigned n = 0;
    size_t length = get(table + 4, 4);
    for (size_t i = 36; i + len <= length; i++)
        n += !memcmp(table + i, what, len);
    return n;
}

START_TEST(tables)
{
    unsigned cpus = (unsigned)_i;
    struct ram ram;
    struct error err = {0};
    ram_make(&ram);
    struct acpi_config config = {.cpus = cpus, .virtio = virtio, .nr_virtio = ARRAY_SIZE(virtio)};
    uint64_t rsdp;
    ck_assert_msg(acpi_build(&ram, &config, &rsdp, &err) == 0, "%s", err.text);
    struct tables t = tables_walk(&ram, rsdp);
    madt_check(t.madt, cpus);

    ck_assert_uint_eq(get(t.fadt + 4, 4), 276);
    ck_assert_uint_eq(t.fadt[8], 6);
    ck_assert(get(t.fadt + 112, 4) & 1 << 20); // hardware-reduced
    ck_assert(get(t.fadt + 112, 4) & 1 << 10); // reset register
    ck_assert_uint_eq(get(t.fadt + 109, 2), 4);
    gas_check(t.fadt + 116, PORT_I8042_CMD);
    ck_assert_uint_eq(t.fadt[128], 0xfe);
    gas_check(t.fadt + 244, PORT_SLEEP);
    gas_check(t.fadt + 256, PORT_SLEEP_STAT);

    ck_assert_uint_eq(occurrences(t.dsdt, "ACPI0007", 9), 0); // the MADT has them
    ck_assert_uint_eq(occurrences(t.dsdt, "LNRO0005", 9), ARRAY_SIZE(virtio));
    ck_assert_uint_eq(occurrences(t.dsdt, "QEMU0001", 9), 1);
    ck_assert_uint_eq(occurrences(t.dsdt, "ACPI0013", 9), 1);
    // The area after the ACPI one is not ours.
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, LAYOUT_ACPI_END, 1), 0xa5);
    ram_destroy(&ram);
}
END_TEST

START_TEST(pci_tables)
{
    struct ram ram;
    struct error err = {0};
    ram_make(&ram);
    const struct acpi_config config = {.cpus = 2, .pci = true};
    uint64_t rsdp;
    ck_assert_msg(acpi_build(&ram, &config, &rsdp, &err) == 0, "%s", err.text);
    struct tables t = tables_walk(&ram, rsdp);
    ck_assert_ptr_nonnull(t.mcfg);
    ck_assert_uint_eq(get(t.mcfg + 4, 4), 60);
    ck_assert_uint_eq(get(t.mcfg + 44, 8), LAYOUT_ECAM);
    ck_assert_uint_eq(get(t.mcfg + 52, 4), 0);                  // segment 0, bus 0 to 0
    static const uint8_t id[] = {0x0c, 0x41, 0xd0, 0x0a, 0x03}; // PNP0A03
    ck_assert_uint_eq(occurrences(t.dsdt, id, sizeof(id)), 1);
    const uint32_t window[] = {LAYOUT_PCI_MMIO, (uint32_t)LAYOUT_PCI_END - 1, 0,
                               (uint32_t)(LAYOUT_PCI_END - LAYOUT_PCI_MMIO)};
    ck_assert_uint_eq(occurrences(t.dsdt, window, sizeof(window)), 1);
    ck_assert_uint_eq(occurrences(t.dsdt, "LNRO0005", 9), 0);
    ram_destroy(&ram);
}
END_TEST

START_TEST(generation_id)
{
    struct ram ram;
    struct error err = {0};
    uint64_t rsdp;
    ram_make(&ram);
    for (int present = 0; present < 2; present++) {
        const struct acpi_config config = {.cpus = 1, .vmgenid = present};
        ck_assert_msg(acpi_build(&ram, &config, &rsdp, &err) == 0, "%s", err.text);
        const uint8_t *dsdt = tables_walk(&ram, rsdp).dsdt;
        ck_assert_uint_eq(occurrences(dsdt, "VM_Gen_Counter", 15), present ? 2 : 0); // _CID, _DDN
        // Name (ADDR, Package () {low, high}), and Notify (VGEN, 0x80) with the event's bit.
        const uint8_t package[] = {8, 'A', 'D', 'D', 'R', 0x12, 8, 2, 0x0c, 0x00, 0xf0, 0x0e, 0, 0};
        ck_assert_uint_eq(LAYOUT_VMGENID, 0xef000);
        ck_assert_uint_eq(occurrences(dsdt, package, sizeof(package)), present);
        const uint8_t notify[] = {0x7b, 0x60, 0x0a, ACPI_EVENT_VMGENID, 0, 0x86, 'V',
                                  'G',  'E',  'N'};
        ck_assert_uint_eq(occurrences(dsdt, notify, sizeof(notify)), present);
    }
    ram_destroy(&ram);
}
END_TEST

static void file_write(const char *path, const void *data, size_t len)
{
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(data, 1, len, f), len);
    ck_assert_int_eq(fclose(f), 0);
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st, (void)kind, (void)ftw;
    return remove(path);
}

static bool iasl_installed(void)
{
    return system("command -v iasl >/dev/null 2>&1") == 0;
}

// Disassembles and compiles again: iasl knows the grammar, the predefined names and their types.
static void iasl_round_trip(const uint8_t *dsdt)
{
    char dir[] = "/tmp/ferry-acpi-XXXXXX", path[64], command[512];
    ck_assert_ptr_nonnull(mkdtemp(dir));
    size_t length = get(dsdt + 4, 4);
    snprintf(path, sizeof(path), "%s/dsdt.aml", dir);
    file_write(path, dsdt, length);
    snprintf(command, sizeof(command),
             "cd %s && iasl -d dsdt.aml >log 2>&1 && iasl -we -p again dsdt.dsl >>log 2>&1 && "
             "grep -q '0 Errors, 0 Warnings' log || { cat log dsdt.dsl; exit 1; }",
             dir);
    ck_assert_int_eq(system(command), 0);

    snprintf(path, sizeof(path), "%s/again.aml", dir);
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    uint8_t *again = malloc(length + 1);
    ck_assert_uint_eq(fread(again, 1, length + 1, f), length);
    fclose(f);
    ck_assert_mem_eq(again + 36, dsdt + 36, length - 36);
    free(again);
    ck_assert_int_eq(nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS), 0);
}

START_TEST(dsdt_by_iasl)
{
    static const unsigned counts[] = {1, 2, 64, 300};
    struct ram ram;
    struct error err = {0};
    ram_make(&ram);
    struct acpi_config config = {
        .cpus = counts[_i], .virtio = virtio, .nr_virtio = _i ? ARRAY_SIZE(virtio) : 0};
    config.pci = _i % 2;
    config.vmgenid = _i / 2;
    uint64_t rsdp;
    ck_assert_msg(acpi_build(&ram, &config, &rsdp, &err) == 0, "%s", err.text);
    iasl_round_trip(tables_walk(&ram, rsdp).dsdt);
    ram_destroy(&ram);
}
END_TEST

START_TEST(limits)
{
    struct ram ram;
    struct error err = {0};
    uint64_t rsdp = 1;
    ram_make(&ram);
    struct acpi_config config = {.cpus = 300};
    ck_assert_int_eq(acpi_build(&ram, &config, &rsdp, &err), 0);
    madt_check(tables_walk(&ram, rsdp).madt, 300); // ids from 255 on as x2APIC entries
    config.cpus = 0;
    ck_assert_int_eq(acpi_build(&ram, &config, &rsdp, &err), -EINVAL);
    struct acpi_virtio_mmio many[256];
    for (unsigned i = 0; i < ARRAY_SIZE(many); i++)
        many[i] = (struct acpi_virtio_mmio) {.base = LAYOUT_VIRTIO_MMIO, .len = 4096, .gsi = 16};
    config = (struct acpi_config) {.cpus = 4096, .virtio = many, .nr_virtio = ARRAY_SIZE(many)};
    ck_assert_int_eq(acpi_build(&ram, &config, &rsdp, &err), -ENOSPC); // 64 KiB do not hold these
    ck_assert_ptr_nonnull(strstr(err.text, "4096 CPUs"));
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, LAYOUT_ACPI_END, 1), 0xa5);

    config = (struct acpi_config) {.cpus = 1};
    static const struct acpi_virtio_mmio bad[] = {
        {4 * GiB, 0x1000, 16},
        {4 * GiB - 0x800, 0x1000, 16},
        {UINT64_MAX, 0x1000, 16},
        {LAYOUT_VIRTIO_MMIO, 0, 16},
        {LAYOUT_VIRTIO_MMIO, 0x1000, GSI_MAX},
    };
    config.nr_virtio = 1;
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        config.virtio = &bad[i];
        ck_assert_int_eq(acpi_build(&ram, &config, &rsdp, &err), -EINVAL);
    }
    config.nr_virtio = 100000;
    ck_assert_int_eq(acpi_build(&ram, &config, &rsdp, &err), -EINVAL);
    struct ram none = {.memfd = -1, .vm_fd = -1};
    config.nr_virtio = 0;
    ck_assert_int_eq(acpi_build(&none, &config, &rsdp, &err), -EFAULT);
    ram_destroy(&ram);
}
END_TEST

static void aml_is(const struct aml *aml, const char *bytes, size_t len)
{
    ck_assert(!aml->overflow);
    ck_assert_uint_eq(aml->len, len);
    ck_assert_mem_eq(aml->data, bytes, len);
}

START_TEST(aml_encodings)
{
    static uint8_t buffer[1 << 21];
    struct aml aml;
    aml_init(&aml, buffer, sizeof(buffer));
    static const uint64_t ints[] = {0, 1, 2, 255, 256, 65535, 65536, UINT32_MAX, 1ull << 32};
    for (unsigned i = 0; i < ARRAY_SIZE(ints); i++)
        aml_int(&aml, ints[i]);
    static const char expected[] = "\x00\x01\x0a\x02\x0a\xff\x0b\x00\x01\x0b\xff\xff"
                                   "\x0c\x00\x00\x01\x00\x0c\xff\xff\xff\xff"
                                   "\x0e\x00\x00\x00\x00\x01\x00\x00\x00";
    aml_is(&aml, expected, sizeof(expected) - 1);

    aml_init(&aml, buffer, sizeof(buffer));
    aml_path(&aml, "\\_SB.A.BCDE");
    aml_is(&aml, "\\\x2f\x03_SB_A___BCDE", 15);
    aml_init(&aml, buffer, sizeof(buffer));
    aml_path(&aml, "_SB.PWRB");
    aml_is(&aml, "\x2e_SB_PWRB", 9);
    aml_init(&aml, buffer, sizeof(buffer));
    aml_eisa_id(&aml, "PNP0A3F");
    aml_is(&aml, "\x0c\x41\xd0\x0a\x3f", 5);

    // PkgLength at each change of its own size: total lengths 63, 65 (one more byte), 2^12 ...
    static const struct {
        size_t body;
        unsigned own;
    } sizes[] = {{0, 1}, {62, 1}, {63, 2}, {4093, 2}, {4094, 3}, {1048572, 3}, {1048573, 4}};
    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        aml_init(&aml, buffer, sizeof(buffer));
        size_t mark = aml_if(&aml);
        static const uint8_t fill[1 << 20];
        aml_bytes(&aml, fill, sizes[i].body);
        aml_end(&aml, mark);
        ck_assert_uint_eq(aml.len, 1 + sizes[i].own + sizes[i].body);
        size_t length = buffer[1] & (sizes[i].own == 1 ? 0x3f : 0xf);
        ck_assert_uint_eq(buffer[1] >> 6, sizes[i].own - 1);
        for (unsigned b = 1; b < sizes[i].own; b++)
            length |= (size_t)buffer[1 + b] << (8 * b - 4);
        ck_assert_uint_eq(length, sizes[i].own + sizes[i].body);
    }
}
END_TEST

START_TEST(aml_bounded)
{
    // Whatever the room, nothing is written beyond it and the lack of it shows.
    uint8_t buffer[128];
    for (size_t cap = 0; cap < 64; cap++) {
        memset(buffer, 0xa5, sizeof(buffer));
        struct aml aml;
        aml_init(&aml, buffer, cap);
        size_t scope = aml_scope(&aml, "_SB");
        size_t device = aml_device(&aml, "DEV");
        aml_name_string(&aml, "_HID", "ACPI0007");
        size_t crs = aml_resources(&aml);
        aml_resource_io(&aml, 0x70, 2);
        aml_resources_end(&aml, crs);
        aml_end(&aml, device);
        aml_end(&aml, scope);
        ck_assert_uint_eq(aml.overflow, cap < 47);
        ck_assert_uint_le(aml.len, cap);
        for (size_t i = cap; i < sizeof(buffer); i++)
            ck_assert_uint_eq(buffer[i], 0xa5);
    }
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("acpi");
    tcase_add_loop_test(tc, tables, 1, 65);
    tcase_add_test(tc, pci_tables);
    tcase_add_test(tc, generation_id);
    tcase_add_test(tc, limits);
    tcase_add_test(tc, aml_encodings);
    tcase_add_test(tc, aml_bounded);
    if (iasl_installed())
        tcase_add_loop_test(tc, dsdt_by_iasl, 0, 4);
    else
        printf("iasl (package acpica-tools) is not installed: the DSDT is not compiled again\n");
    Suite *suite = suite_create("acpi");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

// SPDX-License-Identifier: Apache-2.0
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vmm/layout.h"
#include "vmm/ram.h"
#include "vmm/util.h"

static void create(struct ram *ram, uint64_t size, enum ram_backing backing)
{
    struct error err;
    const struct ram_config config = {.size = size, .backing = backing};
    ck_assert_msg(!ram_create(ram, &config, &err), "%s", err.text);
}

static int try_create(const struct ram_config *config, struct error *err)
{
    struct ram ram;
    int ret = ram_create(&ram, config, err);
    ram_destroy(&ram);
    ram_destroy(&ram); // harmless
    return ret;
}

START_TEST(sizes)
{
    static const uint64_t good[] = {16 * MiB,       16 * MiB + 4096,          3 * GiB,
                                    3 * GiB + 4096, 3 * GiB + 4 * MiB + 4096, 64 * GiB,
#ifndef __SANITIZE_THREAD__ // whose shadow leaves no such room
                                    RAM_MAX,
#endif
                                    1024 * GiB};
    for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
        struct ram ram;
        create(&ram, good[i], RAM_ANONYMOUS);
        ck_assert_uint_eq(ram.pages, good[i] / PAGE_SIZE);
        ck_assert_uint_eq(ram.nr_regions, good[i] > LAYOUT_RAM_LOW_MAX ? 2 : 1);
        uint64_t sum = 0;
        ram_for_each_region (&ram, r) {
            ck_assert_uint_eq((uintptr_t)r->hva % (2 * MiB), 0);
            ck_assert_uint_eq(r->gpa % (2 * MiB), 0);
            sum += r->size;
        }
        ck_assert_uint_eq(sum, good[i]);
        // First and last byte can be used.
        uint64_t last = ram_page_gpa(&ram, ram.pages - 1) + PAGE_SIZE - 1;
        uint8_t byte = 0x5a, back = 0;
        ck_assert_int_eq(ram_write(&ram, 0, &byte, 1), 0);
        ck_assert_int_eq(ram_write(&ram, last, &byte, 1), 0);
        ck_assert_int_eq(ram_read(&ram, last, &back, 1), 0);
        ck_assert_uint_eq(back, 0x5a);
        ck_assert_int_eq(ram_read(&ram, last + 1, &back, 1), -EFAULT);
        ram_destroy(&ram);
    }
}
END_TEST

START_TEST(bad_sizes)
{
    static const uint64_t bad[] = {0,
                                   1,
                                   16 * MiB - 4096,
                                   16 * MiB + 1,
                                   RAM_MAX + 1,
                                   1 << 30 | 0x200,
                                   RAM_MAX + 4096,
                                   UINT64_MAX,
                                   UINT64_MAX & ~4095ull};
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        struct error err;
        const struct ram_config config = {.size = bad[i]};
        ck_assert_int_eq(try_create(&config, &err), -EINVAL);
        ck_assert_ptr_nonnull(strstr(err.text, "expected"));
    }
}
END_TEST

START_TEST(accessor_edges)
{
    struct ram ram;
    create(&ram, LAYOUT_RAM_LOW_MAX + 64 * MiB, RAM_ANONYMOUS);
    const uint64_t low = LAYOUT_RAM_LOW_MAX, high = LAYOUT_RAM_HIGH, end = high + 64 * MiB;
    static const uint64_t huge[] = {UINT64_MAX, UINT64_MAX - 1, 1ull << 63};
    ck_assert_ptr_eq(ram_at(&ram, 0, 1), ram.regions[0].hva);
    ck_assert_ptr_nonnull(ram_at(&ram, 0, low));
    ck_assert_ptr_null(ram_at(&ram, 0, low + 1));
    ck_assert_ptr_nonnull(ram_at(&ram, low - 1, 1));
    ck_assert_ptr_null(ram_at(&ram, low - 1, 2)); // into the hole
    ck_assert_ptr_null(ram_at(&ram, low, 1));
    ck_assert_ptr_null(ram_at(&ram, LAYOUT_LAPIC, 4));
    ck_assert_ptr_null(ram_at(&ram, high - 1, 1));
    ck_assert_ptr_null(ram_at(&ram, high - 1, 2)); // out of the hole
    ck_assert_ptr_eq(ram_at(&ram, high, 64 * MiB), ram.regions[1].hva);
    ck_assert_ptr_null(ram_at(&ram, high, 64 * MiB + 1));
    ck_assert_ptr_null(ram_at(&ram, end, 1));
    // Although both regions lie back to back in this process, nothing reaches from one to the
    // other.
    ck_assert_ptr_null(ram_at(&ram, low - PAGE_SIZE, high - low + 2 * PAGE_SIZE));
    for (size_t i = 0; i < ARRAY_SIZE(huge); i++) { // wraps
        ck_assert_ptr_null(ram_at(&ram, huge[i], 1));
        ck_assert_ptr_null(ram_at(&ram, 1, huge[i]));
        ck_assert_ptr_null(ram_at(&ram, high + 1, huge[i]));
        ck_assert_ptr_null(ram_at(&ram, huge[i], huge[i]));
    }
    // Nothing at all is anywhere inside RAM, and nowhere else.
    uint8_t byte = 1;
    ck_assert(ram_contains(&ram, 0, 0));
    ck_assert_int_eq(ram_read(&ram, 5, &byte, 0), 0);
    ck_assert_uint_eq(byte, 1);
    ck_assert(!ram_contains(&ram, low + 1, 0));
    ck_assert(!ram_contains(&ram, UINT64_MAX, 0));
    ram_destroy(&ram);
}
END_TEST

START_TEST(page_indexes_are_inverse)
{
    static const uint64_t memory[] = {16 * MiB + 4096, LAYOUT_RAM_LOW_MAX,
                                      LAYOUT_RAM_LOW_MAX + 4096, LAYOUT_RAM_LOW_MAX + 1 * GiB};
    for (size_t i = 0; i < ARRAY_SIZE(memory); i++) {
        struct ram ram;
        uint64_t back, last_gpa = 0;
        create(&ram, memory[i], RAM_ANONYMOUS);
        for (uint64_t page = 0; page < ram.pages; page++) {
            uint64_t gpa = ram_page_gpa(&ram, page);
            ck_assert(page == 0 || gpa > last_gpa);
            last_gpa = gpa;
            if (page % 997 && page > 2 && ram.pages - page > 2 &&
                page / 2 != LAYOUT_RAM_LOW_MAX / PAGE_SIZE / 2)
                continue;
            ck_assert(ram_gpa_page(&ram, gpa, &back) && back == page);
            ck_assert(ram_gpa_page(&ram, gpa + PAGE_SIZE - 1, &back) && back == page);
            ck_assert_ptr_eq(ram_at(&ram, gpa, PAGE_SIZE), ram_page(&ram, page));
            ck_assert(ram_hva_page(&ram, (char *)ram_page(&ram, page) + 7, &back) && back == page);
        }
        ck_assert(!ram_gpa_page(&ram, LAYOUT_RAM_LOW_MAX, &back));
        ck_assert(!ram_gpa_page(&ram, UINT64_MAX, &back));
        ck_assert(!ram_hva_page(&ram, NULL, &back));
        ck_assert(!ram_hva_page(&ram, ram.map - 1, &back));
        ck_assert(!ram_hva_page(&ram, ram.map + ram.size, &back));
        ram_destroy(&ram);
    }
}
END_TEST

START_TEST(memfd_is_shared)
{
    struct ram ram;
    create(&ram, 16 * MiB, RAM_MEMFD);
    ck_assert_int_ge(ram.memfd, 0);
    uint32_t value = 0xfeedface, seen = 0;
    ck_assert_int_eq(ram_write(&ram, 5 * MiB, &value, sizeof(value)), 0);
    ck_assert_int_eq(pread(ram.memfd, &seen, sizeof(seen), 5 * MiB), sizeof(seen));
    ck_assert_uint_eq(seen, value);
    int fd = ram.memfd;
    ram_destroy(&ram);
    ck_assert_int_eq(fcntl(fd, F_GETFD), -1);
}
END_TEST

START_TEST(hugetlb_or_a_clear_error)
{
    struct error err;
    struct ram_config config = {.size = 16 * MiB + 4096, .backing = RAM_HUGETLB};
    ck_assert_int_eq(try_create(&config, &err), -EINVAL); // not whole huge pages
    config.size = 1ull << 40; // more than any test machine has as huge pages
    ck_assert_int_lt(try_create(&config, &err), 0);
}
END_TEST

START_TEST(numa_policies)
{
    static const struct {
        const char *text;
        bool good;
    } policies[] = {
        {"bind:0", true},      {"interleave:0", true},
        {"preferred:0", true}, {"bind:0-0", true},
        {"bind:0,0", true},    {"bind:", false},
        {"bind", false},       {"", false},
        {"local:0", false},    {"bind:a", false},
        {"bind:0,", false},    {"bind:,0", false},
        {"bind:1-0", false},   {"bind:-1", false},
        {"bind:0-", false},    {"bind:0x0", false},
        {"bind:1024", false},  {"bind:99999999999999999999", false},
        {"bind:0 ", false},    {"bind:0-1023-2", false},
        {"BIND:0", false},
    };
    for (size_t i = 0; i < ARRAY_SIZE(policies); i++) {
        struct error err;
        const struct ram_config config = {.size = RAM_MIN, .numa = policies[i].text};
        int ret = try_create(&config, &err);
        // A kernel without NUMA has no mbind; the text is checked before it is asked.
        if (policies[i].good)
            ck_assert_msg(!ret || ret == -ENOSYS, "%s: %s", policies[i].text, err.text);
        else
            ck_assert_msg(ret == -EINVAL, "'%s' was taken", policies[i].text);
    }
}
END_TEST

START_TEST(thp_is_a_wish)
{
    struct error err;
    const struct ram_config config = {.size = 32 * MiB, .thp = true};
    ck_assert_msg(!try_create(&config, &err), "%s", err.text);
}
END_TEST

// --- dirty log; needs KVM for its half

static int kvm_vm(void)
{
    autoclose int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    return kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
}

static unsigned popcount(const uint64_t *bitmap, size_t words)
{
    unsigned n = 0;
    for (size_t i = 0; i < words; i++)
        n += (unsigned)__builtin_popcountll(bitmap[i]);
    return n;
}

START_TEST(own_writes_are_logged)
{
    struct ram ram;
    struct ram_dirty user = {0};
    struct error err;
    autoclose int vm = kvm_vm();
    if (vm < 0)
        return; // the pure tests have run
    create(&ram, LAYOUT_RAM_LOW_MAX + 16 * MiB + 3 * PAGE_SIZE, RAM_ANONYMOUS);
    ck_assert_int_eq(ram_attach(&ram, vm, &err), 0);
    size_t words = ram_bitmap_words(&ram);
    autofree uint64_t *bitmap = calloc(words, 8);
    uint64_t fresh;
    ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, &fresh, &err), -EINVAL);
    ram_mark_dirty(&ram, 0, PAGE_SIZE); // before the start: does not count
    ck_assert_msg(!ram_dirty_start(&ram, &user, &err), "%s", err.text);
    ck_assert_int_eq(ram_dirty_start(&ram, &user, &err), -EBUSY);
    ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(fresh, 0);

    const uint64_t high_first = LAYOUT_RAM_LOW_MAX / PAGE_SIZE;
    ram_mark_dirty(&ram, 5 * PAGE_SIZE + 4095, 2);                 // 5 and 6
    ram_mark_dirty(&ram, 8 * PAGE_SIZE, 0);                        // nothing
    ram_mark_dirty(&ram, LAYOUT_RAM_LOW_MAX - 1, 1);               // the last below the hole
    ram_mark_dirty(&ram, LAYOUT_RAM_LOW_MAX - 1, 2);               // not RAM
    ram_mark_dirty(&ram, LAYOUT_RAM_HIGH, 1);                      // the first above
    ram_mark_dirty(&ram, ram_page_gpa(&ram, ram.pages - 1), 4096); // the very last
    ram_mark_dirty(&ram, LAYOUT_LAPIC, 4);
    ram_mark_dirty(&ram, UINT64_MAX, 2);
    ram_mark_dirty(&ram, 0, UINT64_MAX);
    bitmap[0] = 1ull << 5; // already known
    ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(fresh, 4);
    ck_assert_uint_eq(popcount(bitmap, words), 5);
    ck_assert_uint_eq(bitmap[0], 3ull << 5);
    ck_assert_uint_eq(bitmap[(high_first - 1) / 64] >> 63, 1);
    ck_assert_uint_eq(bitmap[high_first / 64] & 1, 1);
    ck_assert_uint_eq(bitmap[(ram.pages - 1) / 64] >> (ram.pages - 1) % 64, 1);
    // Told once only.
    memset(bitmap, 0, words * 8);
    ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(popcount(bitmap, words), 0);

    ram_mark_dirty(&ram, 0, 1);
    ck_assert_int_eq(ram_dirty_stop(&ram, &user, &err), 0);
    ck_assert_int_eq(ram_dirty_start(&ram, &user, &err), 0); // and the old mark is gone
    ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(fresh, 0);
    ram_destroy(&ram);
}
END_TEST

// Each user is told of everything since its own start and once, whoever asks KVM first.
START_TEST(users_do_not_take_from_each_other)
{
    struct ram ram;
    struct ram_dirty one = {0}, two = {0};
    struct error err;
    uint64_t bitmap[RAM_MIN / PAGE_SIZE / 64] = {0}, fresh;
    autoclose int vm = kvm_vm();
    if (vm < 0)
        return;
    create(&ram, RAM_MIN, RAM_ANONYMOUS);
    ck_assert_int_eq(ram_attach(&ram, vm, &err), 0);
    ck_assert_int_eq(ram_dirty_start(&ram, &one, &err), 0);
    ram_mark_dirty(&ram, 1 * PAGE_SIZE, 1);
    ck_assert_int_eq(ram_dirty_start(&ram, &two, &err), 0);
    ram_mark_dirty(&ram, 2 * PAGE_SIZE, 1);
    ck_assert_int_eq(ram_dirty_sync(&ram, &two, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(bitmap[0], 4);
    ck_assert_uint_eq(fresh, 1);
    ram_mark_dirty(&ram, 3 * PAGE_SIZE, 1);
    ck_assert_int_eq(ram_dirty_stop(&ram, &two, &err), 0);
    ck_assert_int_eq(ram_dirty_sync(&ram, &two, bitmap, &fresh, &err), -EINVAL);
    bitmap[0] = 0;
    ck_assert_int_eq(ram_dirty_sync(&ram, &one, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(bitmap[0], 0xe);
    ck_assert_uint_eq(fresh, 3);
    ck_assert_int_eq(ram_dirty_start(&ram, &two, &err), 0);
    ck_assert_int_eq(ram_dirty_stop(&ram, &one, &err), 0); // the log goes on for the other
    ram_mark_dirty(&ram, 5 * PAGE_SIZE, 1);
    bitmap[0] = 0;
    ck_assert_int_eq(ram_dirty_sync(&ram, &two, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(bitmap[0], 1 << 5);
    ram_destroy(&ram); // with a user left
    ck_assert_ptr_null(two.pending);
}
END_TEST

// --- giving memory back

static unsigned resident(const struct ram *ram, uint64_t gpa, uint64_t len)
{
    unsigned char map[1024];
    unsigned n = 0;
    ck_assert_int_eq(mincore(ram_at(ram, gpa, len), len, map), 0);
    for (uint64_t i = 0; i < len / PAGE_SIZE; i++)
        n += map[i] & 1;
    return n;
}

static const enum ram_backing backings[] = {RAM_ANONYMOUS, RAM_MEMFD};

START_TEST(discards)
{
    struct ram ram;
    struct error err;
    uint64_t given;
    const uint64_t low = LAYOUT_RAM_LOW_MAX, high = LAYOUT_RAM_HIGH;
    create(&ram, low + 16 * MiB, backings[_i]);
    madvise(ram.map, ram.size, MADV_NOHUGEPAGE);
    memset(ram_at(&ram, 0, MiB), 1, MiB);
    memset(ram_at(&ram, low - MiB, MiB), 1, MiB);
    memset(ram_at(&ram, high, MiB), 1, MiB);
    ck_assert_int_eq(ram_discard(&ram, PAGE_SIZE, 2 * PAGE_SIZE, &given, &err), 0);
    ck_assert_uint_eq(given, 2 * PAGE_SIZE);
    ck_assert_uint_eq(resident(&ram, 0, MiB), 254);
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, PAGE_SIZE, 1), 0);
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, PAGE_SIZE - 1, 1), 1);
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, 3 * PAGE_SIZE, 1), 1);
    // Whole pages within the range only.
    static const struct {
        uint64_t gpa, len, given;
    } parts[] = {{4 * PAGE_SIZE + 1, PAGE_SIZE, 0},
                 {4 * PAGE_SIZE, PAGE_SIZE - 1, 0},
                 {4 * PAGE_SIZE, 0, 0},
                 {4 * PAGE_SIZE + 7, 2 * PAGE_SIZE, PAGE_SIZE},
                 {6 * PAGE_SIZE - 1, PAGE_SIZE + 2, PAGE_SIZE}};
    for (unsigned i = 0; i < ARRAY_SIZE(parts); i++) {
        ck_assert_int_eq(ram_discard(&ram, parts[i].gpa, parts[i].len, &given, &err), 0);
        ck_assert_msg(given == parts[i].given, "row %u", i);
    }
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, 4 * PAGE_SIZE, 1), 1);
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, 5 * PAGE_SIZE, 1), 0);
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, 6 * PAGE_SIZE, 1), 0);
    ck_assert_uint_eq(*(uint8_t *)ram_at(&ram, 7 * PAGE_SIZE, 1), 1);
    // Both sides of the hole, which lie back to back here.
    ck_assert_int_eq(ram_discard(&ram, low - PAGE_SIZE, PAGE_SIZE, &given, &err), 0);
    ck_assert_int_eq(ram_discard(&ram, high, PAGE_SIZE, &given, &err), 0);
    ck_assert_uint_eq(resident(&ram, low - MiB, MiB), 255);
    ck_assert_uint_eq(resident(&ram, high, MiB), 255);
    static const struct {
        uint64_t gpa, len;
    } outside[] = {{LAYOUT_RAM_LOW_MAX - PAGE_SIZE, 2 * PAGE_SIZE},
                   {LAYOUT_RAM_LOW_MAX, PAGE_SIZE},
                   {LAYOUT_RAM_HIGH + 16 * MiB, PAGE_SIZE},
                   {LAYOUT_RAM_HIGH + 16 * MiB - PAGE_SIZE, PAGE_SIZE + 1},
                   {UINT64_MAX - PAGE_SIZE + 1, PAGE_SIZE},
                   {PAGE_SIZE, UINT64_MAX},
                   {0, LAYOUT_RAM_HIGH + PAGE_SIZE}};
    for (unsigned i = 0; i < ARRAY_SIZE(outside); i++) {
        ck_assert_int_eq(ram_discard(&ram, outside[i].gpa, outside[i].len, &given, &err), -EFAULT);
        ck_assert_uint_eq(given, 0);
    }
    ck_assert_uint_eq(resident(&ram, low - MiB, MiB), 255);
    ram_destroy(&ram);
}
END_TEST

START_TEST(discards_can_be_blocked)
{
    struct ram ram;
    struct error err;
    uint64_t given;
    create(&ram, RAM_MIN, backings[_i]);
    memset(ram_at(&ram, 0, MiB), 1, MiB);
    ram_discard_block(&ram);
    ram_discard_block(&ram); // counted
    ram_discard_unblock(&ram);
    ck_assert_int_eq(ram_discard(&ram, 0, MiB, &given, &err), 0);
    ck_assert_uint_eq(given, 0);
    ck_assert_uint_eq(resident(&ram, 0, MiB), 256);
    ck_assert_int_eq(ram_drop(&ram, 0, 1, &err), 0); // for those who block
    ck_assert_uint_eq(resident(&ram, 0, MiB), 255);
    ram_discard_unblock(&ram);
    ck_assert_int_eq(ram_discard(&ram, 0, MiB, &given, &err), 0);
    ck_assert_uint_eq(given, MiB);
    ck_assert_uint_eq(resident(&ram, 0, MiB), 0);
    ram_destroy(&ram);
}
END_TEST

START_TEST(discards_count_as_written)
{
    struct ram ram;
    struct ram_dirty user = {0};
    struct error err;
    uint64_t given, bitmap[RAM_MIN / PAGE_SIZE / 64] = {0};
    autoclose int vm = kvm_vm();
    if (vm < 0)
        return;
    create(&ram, RAM_MIN, RAM_ANONYMOUS);
    ck_assert_int_eq(ram_attach(&ram, vm, &err), 0);
    ck_assert_int_eq(ram_dirty_start(&ram, &user, &err), 0);
    ck_assert_int_eq(ram_discard(&ram, 64 * PAGE_SIZE + 1, 3 * PAGE_SIZE, &given, &err), 0);
    ram_discard_block(&ram);
    ck_assert_int_eq(ram_discard(&ram, 128 * PAGE_SIZE, PAGE_SIZE, &given, &err), 0);
    ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, NULL, &err), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(bitmap); i++)
        ck_assert_uint_eq(bitmap[i], i == 1 ? 6 : 0);
    ram_destroy(&ram);
}
END_TEST

// Huge pages go whole or not at all. A machine without any has nothing to test.
START_TEST(discards_of_huge_pages)
{
    struct ram ram;
    struct error err;
    uint64_t given;
    const struct ram_config config = {.size = RAM_MIN, .backing = RAM_HUGETLB};
    if (ram_create(&ram, &config, &err))
        return;
    memset(ram.map, 1, 6 * MiB);
    ck_assert_int_eq(ram_discard(&ram, 0, 2 * MiB - PAGE_SIZE, &given, &err), 0);
    ck_assert_uint_eq(given, 0);
    ck_assert_int_eq(ram_discard(&ram, PAGE_SIZE, 4 * MiB, &given, &err), 0);
    ck_assert_uint_eq(given, 2 * MiB);
    ck_assert_uint_eq(ram.map[2 * MiB - 1], 1);
    ck_assert_uint_eq(ram.map[2 * MiB], 0);
    ck_assert_uint_eq(ram.map[4 * MiB], 1);
    ram_destroy(&ram);
}
END_TEST

struct marker {
    struct ram *ram;
    unsigned step, times;
};

static void *mark_all(void *arg)
{
    struct marker *m = arg;
    for (unsigned n = 0; n < m->times; n++)
        for (uint64_t page = m->step; page < m->ram->pages; page += 2)
            ram_mark_dirty(m->ram, page * PAGE_SIZE, 1);
    return NULL;
}

// Marks from several threads, in the same words, while syncs go on: none is lost.
START_TEST(marks_race_with_syncs)
{
    struct ram ram;
    struct ram_dirty user = {0};
    struct error err;
    autoclose int vm = kvm_vm();
    if (vm < 0)
        return;
    create(&ram, RAM_MIN, RAM_ANONYMOUS);
    ck_assert_int_eq(ram_attach(&ram, vm, &err), 0);
    ck_assert_int_eq(ram_dirty_start(&ram, &user, &err), 0);
    autofree uint64_t *bitmap = calloc(ram_bitmap_words(&ram), 8);
    pthread_t threads[2];
    struct marker markers[2] = {{&ram, 0, 20}, {&ram, 1, 20}};
    for (unsigned i = 0; i < 2; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, mark_all, &markers[i]), 0);
    uint64_t sum = 0, fresh;
    for (unsigned n = 0; n < 50; n++) {
        ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, &fresh, &err), 0);
        sum += fresh;
    }
    for (unsigned i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    ck_assert_int_eq(ram_dirty_sync(&ram, &user, bitmap, &fresh, &err), 0);
    ck_assert_uint_eq(sum + fresh, ram.pages);
    ck_assert_uint_eq(popcount(bitmap, ram_bitmap_words(&ram)), ram.pages);
    ram_destroy(&ram);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("ram");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, sizes);
    tcase_add_test(tc, bad_sizes);
    tcase_add_test(tc, accessor_edges);
    tcase_add_test(tc, page_indexes_are_inverse);
    tcase_add_test(tc, memfd_is_shared);
    tcase_add_test(tc, hugetlb_or_a_clear_error);
    tcase_add_test(tc, numa_policies);
    tcase_add_test(tc, thp_is_a_wish);
    tcase_add_test(tc, own_writes_are_logged);
    tcase_add_loop_test(tc, discards, 0, 2);
    tcase_add_loop_test(tc, discards_can_be_blocked, 0, 2);
    tcase_add_test(tc, discards_count_as_written);
    tcase_add_test(tc, discards_of_huge_pages);
    tcase_add_test(tc, marks_race_with_syncs);
    tcase_add_test(tc, users_do_not_take_from_each_other);
    Suite *suite = suite_create("ram");
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

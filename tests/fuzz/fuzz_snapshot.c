// SPDX-License-Identifier: Apache-2.0
// A hostile snapshot file, checked as `verify` does. Its checksums are made right first (header,
// records, state, pages), so that the checks behind them are reached.
#include <string.h>

#include "migrate/crc32c.h"
#include "migrate/snapshot.h"
#include "vmm/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void sums_repair(uint8_t *meta, uint32_t len, const uint8_t *data, uint32_t data_len)
{
    struct wire_pages head;
    memcpy(&head, meta, sizeof(head));
    size_t sums = sizeof(head) + head.nr_runs * sizeof(struct wire_run);
    if (head.nr_runs > WIRE_RUNS_MAX || head.nr_data > WIRE_BATCH_PAGES ||
        sums + head.nr_data * sizeof(uint32_t) > len || head.nr_data * PAGE_SIZE > data_len)
        return;
    for (uint32_t i = 0; i < head.nr_data; i++) {
        uint32_t sum = page_sum(data + i * PAGE_SIZE);
        memcpy(meta + sums + i * sizeof(sum), &sum, sizeof(sum));
    }
}

static size_t record_repair(uint8_t *record, size_t size)
{
    struct wire_header h;
    memcpy(&h, record, sizeof(h));
    if (wire_header_check(&h, NULL) || size - sizeof(h) < (size_t)h.meta_len + h.data_len)
        return 0;
    uint8_t *meta = record + sizeof(h), *data = meta + h.meta_len;
    if (h.type == WIRE_PAGES)
        sums_repair(meta, h.meta_len, data, h.data_len);
    if (h.type == WIRE_STATE) {
        struct wire_state state = {h.data_len, crc32c(0, data, h.data_len)};
        memcpy(meta, &state, sizeof(state));
    }
    h.crc = wire_header_crc(&h, meta);
    memcpy(record, &h, sizeof(h));
    return sizeof(h) + h.meta_len + h.data_len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct snapshot_header header;
    struct snapshot_report report;
    struct wire_mem mem;
    struct error err;
    if (size < sizeof(header))
        return 0;
    uint8_t *copy = malloc(size);
    memcpy(copy, data, size);
    memcpy(&header, copy, sizeof(header));
    header.crc = crc32c(0, &header, offsetof(struct snapshot_header, crc));
    memcpy(copy, &header, sizeof(header));
    for (size_t at = sizeof(header); size - at >= sizeof(struct wire_header);) {
        size_t len = record_repair(copy + at, size - at);
        if (!len)
            break;
        at += len;
    }
    wire_mem_init(&mem, copy, size);
    snapshot_verify(&mem.wire, &report, &err);
    free(copy);
    return 0;
}

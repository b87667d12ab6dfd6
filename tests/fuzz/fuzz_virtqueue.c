// SPDX-License-Identifier: Apache-2.0
// Rings, descriptors and saved state of a queue, all from the input. The device inverts what it
// reads; whatever it is given, it stays within guest memory and within bounds.
#include <stdlib.h>
#include <string.h>

#include "devices/virtqueue.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { AREA = 64 * 1024, ROUNDS = 64 };

static struct ram *fuzz_ram(void)
{
    static struct ram ram; // of the fuzzer's process, made once
    struct ram_config config = {.size = 16 * MiB};
    if (!ram.size && ram_create(&ram, &config, NULL))
        abort();
    return &ram;
}

static void queue_use(struct virtqueue *vq, struct ram *ram)
{
    struct virtqueue_chain *held = calloc(4, sizeof(*held));
    unsigned nr = 0;
    for (unsigned i = 0; i < ROUNDS; i++) {
        virtqueue_kicks(vq, false);
        if (nr < 4 && virtqueue_next(vq, &held[nr], NULL) == 1) {
            uint8_t bytes[256];
            size_t n = chain_read(&held[nr], 0, bytes, sizeof(bytes));
            for (size_t k = 0; k < n; k++)
                bytes[k] = (uint8_t)~bytes[k];
            chain_write(ram, &held[nr], i, bytes, n);
            nr++;
        }
        if (nr == 4 && i % 2) { // what one packet took
            struct virtqueue_used group[4];
            for (unsigned k = 0; k < nr; k++)
                group[k] = (struct virtqueue_used) {&held[k], i + k};
            virtqueue_push_group(vq, group, nr);
            nr = 0;
        } else if (nr == 4 || (nr && i % 3 == 0)) {
            virtqueue_push(vq, &held[--nr], i);
        }
        virtqueue_should_signal(vq);
        virtqueue_kicks(vq, true);
        if (vq->in_flight > vq->size)
            abort();
    }
    struct stream_mem mem, in;
    struct error err;
    stream_mem_writer(&mem, "queue", 1 << 20);
    if (virtqueue_save(vq, &mem.stream, &err))
        abort();
    stream_mem_reader(&in, "queue", mem.data, mem.len);
    if (vq->enabled && virtqueue_load(vq, &in.stream, &err))
        abort(); // what we saved ourselves always loads
    stream_mem_free(&mem);
    free(held);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct ram *ram = fuzz_ram();
    struct virtqueue vq;
    if (size < 32)
        return 0;
    uint8_t *area = ram_at(ram, 0, AREA);
    memset(area, 0, AREA);
    virtqueue_init(&vq, ram, VQ_SIZE_MAX);
    vq.packed = data[0] & 1;
    vq.event_idx = data[0] & 2;
    vq.indirect = data[0] & 4;
    vq.size = (uint16_t)(data[1] + 1);
    if (data[0] & 8) { // the whole queue from the input
        struct stream_mem in;
        memcpy(area, data, size < AREA ? size : AREA);
        stream_mem_reader(&in, "input", data + 1, size - 1);
        virtqueue_load(&vq, &in.stream, NULL);
    } else {
        memcpy(&vq.desc_gpa, data + 2, 3);
        memcpy(&vq.driver_gpa, data + 5, 3);
        memcpy(&vq.device_gpa, data + 8, 3);
        memcpy(area, data + 11, size - 11 < AREA ? size - 11 : AREA);
        virtqueue_enable(&vq, NULL);
    }
    queue_use(&vq, ram);
    virtqueue_reset(&vq);
    return 0;
}

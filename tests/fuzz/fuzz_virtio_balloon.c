// SPDX-License-Identifier: Apache-2.0
// Balloon requests. From outside come settings, a migration that asks for hints, and times when
// nothing may be given back: u8 what, u8 value.
#include "devices/virtio_balloon.h"

#include <stdio.h>

#include "tests/fuzz/fuzz_virtio.h"

static struct device_class class; // the balloon's, and it remembers its devices
static struct device *devices[2]; // by transport
static _Atomic uint64_t *hints[2];
static bool blocked[2];

static int realize(struct device *dev, const void *config, struct error *err)
{
    devices[fuzz_transport] = dev;
    return virtio_balloon_class.realize(dev, config, err);
}

static void *config(void)
{
    struct virtio_balloon_config *c = calloc(1, sizeof(*c));
    struct error err;
    if (!c || virtio_balloon_parse("target=1M", c, &err))
        abort();
    class = virtio_balloon_class;
    class.realize = realize;
    return c;
}

static void setting(struct device *dev, const char *key, unsigned value)
{
    char text[16];
    struct error err;
    snprintf(text, sizeof(text), "%u", value);
    virtio_balloon_class.set(dev, key, text, &err);
}

static void hints_turn(struct ram *ram, _Atomic uint64_t **bitmap)
{
    if (*bitmap) {
        ram->hinter->progress(ram->hinter);
        ram->hinter->end(ram->hinter);
        free((void *)*bitmap);
        *bitmap = NULL;
        return;
    }
    *bitmap = calloc(ram_bitmap_words(ram), sizeof(**bitmap));
    if (!*bitmap)
        abort();
    if (ram->hinter->start(ram->hinter, *bitmap))
        return;
    free((void *)*bitmap);
    *bitmap = NULL;
}

static void outside(const uint8_t *data, size_t size)
{
    struct device *dev = devices[fuzz_transport];
    for (; size >= 2; data += 2, size -= 2) {
        json_t *out = json_object();
        switch (data[0] % 5) {
        case 0:
            setting(dev, "target", data[1]);
            break;
        case 1:
            setting(dev, "stats", data[1] & 1);
            break;
        case 2:
            hints_turn(&dev->vm->ram, &hints[fuzz_transport]);
            break;
        case 3:
            blocked[fuzz_transport] = !blocked[fuzz_transport];
            (blocked[fuzz_transport] ? ram_discard_block : ram_discard_unblock)(&dev->vm->ram);
            break;
        default:
            virtio_balloon_class.show(dev, out);
        }
        json_decref(out);
    }
}

FUZZ_VIRTIO(&class, config, outside)

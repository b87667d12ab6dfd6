// SPDX-License-Identifier: Apache-2.0
#include <errno.h>

#include "devices/platform.h"
#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vm.h"

// Status, commands and answers: Intel 8242 data sheet, IBM PS/2 hardware reference.
enum { STATUS_OUTPUT_FULL = 0x01, STATUS_SYSTEM = 0x04, STATUS_COMMAND = 0x08 };
enum { STATUS_UNLOCKED = 0x10 };
enum {
    CMD_READ_CONFIG = 0x20,
    CMD_WRITE_CONFIG = 0x60,
    CMD_TEST_AUX = 0xa9,
    CMD_SELF_TEST = 0xaa,
    CMD_TEST_KEYBOARD = 0xab,
    CMD_READ_OUTPUT = 0xd0,
    CMD_WRITE_OUTPUT = 0xd1,
    CMD_LOOP_KEYBOARD = 0xd2,
    CMD_LOOP_AUX = 0xd3,
    CMD_WRITE_AUX = 0xd4,
    CMD_RESET = 0xfe,
};
enum { SELF_TEST_PASSED = 0x55, CLOCK_STUCK_LOW = 0x01 };
enum { OUTPUT_NO_RESET = 0x01, OUTPUT_A20 = 0x02 };

struct i8042 {
    struct device dev;
    uint8_t config;
    uint8_t answer, full; // output buffer
    uint8_t command;      // that waits for a data byte, 0 = none
};

static struct i8042 *i8042_of(void *dev)
{
    return container_of((struct device *)dev, struct i8042, dev);
}

static void answer(struct i8042 *k, uint8_t byte)
{
    k->answer = byte;
    k->full = 1;
}

static void reset_machine(struct i8042 *k)
{
    vm_request_stop(k->dev.vm, VM_STOP_RESET, 0,
                    "the guest reset the machine (keyboard controller)");
}

static void command(struct i8042 *k, uint8_t byte)
{
    k->command = 0;
    switch (byte) {
    case CMD_READ_CONFIG:
        answer(k, k->config);
        break;
    case CMD_SELF_TEST:
        answer(k, SELF_TEST_PASSED);
        break;
    case CMD_TEST_AUX:
    case CMD_TEST_KEYBOARD:
        answer(k, CLOCK_STUCK_LOW);
        break;
    case CMD_READ_OUTPUT:
        answer(k, OUTPUT_NO_RESET | OUTPUT_A20);
        break;
    case CMD_WRITE_CONFIG:
    case CMD_WRITE_OUTPUT:
    case CMD_LOOP_KEYBOARD:
    case CMD_LOOP_AUX:
    case CMD_WRITE_AUX:
        k->command = byte;
        break;
    case CMD_RESET:
        reset_machine(k);
        break;
    default:
        break;
    }
}

static void data(struct i8042 *k, uint8_t byte)
{
    uint8_t waiting = k->command;
    k->command = 0;
    if (waiting == CMD_WRITE_CONFIG)
        k->config = byte;
    else if (waiting == CMD_WRITE_OUTPUT && !(byte & OUTPUT_NO_RESET))
        reset_machine(k);
    else if (waiting == CMD_LOOP_KEYBOARD)
        answer(k, byte);
    else if (waiting == CMD_LOOP_AUX)
        answer(k, (uint8_t)~byte); // there is no auxiliary port, and a prompt wrong answer says so
}

static uint64_t data_read(void *dev, uint64_t offset, unsigned size)
{
    struct i8042 *k = i8042_of(dev);
    k->full = 0;
    return k->answer;
}

static void data_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    data(i8042_of(dev), (uint8_t)value);
}

// The input buffer is never full: whoever waits for it to drain goes on at once.
static uint64_t command_read(void *dev, uint64_t offset, unsigned size)
{
    const struct i8042 *k = i8042_of(dev);
    return STATUS_SYSTEM | STATUS_UNLOCKED | (k->full ? STATUS_OUTPUT_FULL : 0) |
           (k->command ? STATUS_COMMAND : 0);
}

static void command_write(void *dev, uint64_t offset, unsigned size, uint64_t value)
{
    command(i8042_of(dev), (uint8_t)value);
}

static const struct bus_ops data_ops = {data_read, data_write};
static const struct bus_ops command_ops = {command_read, command_write};

static void i8042_reset(struct device *dev)
{
    struct i8042 *k = i8042_of(dev);
    k->config = k->answer = k->full = k->command = 0;
}

static int i8042_realize(struct device *dev, const void *config, struct error *err)
{
    struct bus_range d = {PORT_I8042_DATA, 1, "i8042", &data_ops, dev, &dev->lock};
    struct bus_range c = {PORT_I8042_CMD, 1, "i8042", &command_ops, dev, &dev->lock};
    int ret = bus_add(&dev->vm->pio, &d, err);
    return ret ? ret : bus_add(&dev->vm->pio, &c, err);
}

static int i8042_load(void *object, uint16_t version, struct error *err)
{
    const struct i8042 *k = object;
    if (k->full > 1)
        return error_set(err, -EINVAL, "i8042: saved full is %u, expected 0 or 1", k->full);
    return 0;
}

static const struct state_field i8042_fields[] = {
    STATE_FIELD_INT(struct i8042, config, 1),
    STATE_FIELD_INT(struct i8042, answer, 1),
    STATE_FIELD_INT(struct i8042, full, 1),
    STATE_FIELD_INT(struct i8042, command, 1),
};

static const struct state_table i8042_state = {.name = "i8042",
                                               .version = 1,
                                               .oldest = 1,
                                               .nr_fields = ARRAY_SIZE(i8042_fields),
                                               .fields = i8042_fields,
                                               .load = i8042_load};

const struct device_class i8042_class = {.name = "i8042",
                                         .size = sizeof(struct i8042),
                                         .realize = i8042_realize,
                                         .reset = i8042_reset,
                                         .state = &i8042_state};

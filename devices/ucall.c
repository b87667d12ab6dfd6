// SPDX-License-Identifier: Apache-2.0
#include "devices/ucall.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vmm/layout.h"
#include "vmm/util.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

_Static_assert(PORT_UCALL == UCALL_PORT && PORT_MARK == UCALL_FIRST_PORT, "same ports");
_Static_assert(UCALL_P_COUNT <= 64, "params_set is one word");

enum { CALL_ALIGN = 64, ESCAPED = 4 /* bytes of \xNN */, HOLD_STEP_NS = 1000000 };

struct ucall_device {
    struct device dev;
    struct ucall_config config;
    struct log_limit limit, bad_limit;
};

static const char *const value_names[] = {
#define NAME(suffix, name) [UCALL_V_##suffix] = #name,
    UCALL_VALUES(NAME)
#undef NAME
};

const char *ucall_value_name(uint64_t id)
{
    return id < ARRAY_SIZE(value_names) ? value_names[id] : NULL;
}

// --- text from the guest

// Makes bytes harmless for terminals and logs. `out` has room for ESCAPED * len + 1.
static void text_clean(char *out, const uint8_t *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        uint8_t b = bytes[i];
        if ((b >= ' ' && b < 0x7f) || b == '\n' || b == '\t')
            *out++ = (char)b;
        else
            out += sprintf(out, "\\x%02x", b);
    }
    *out = 0;
}

// A zero-terminated string at `gpa`, cleaned, at most UCALL_STRING_MAX bytes or to the end of RAM.
static void string_read(const struct ram *ram, uint64_t gpa,
                        char out[ESCAPED * UCALL_STRING_MAX + 1])
{
    uint8_t bytes[UCALL_STRING_MAX];
    size_t len = 0;
    while (len < sizeof(bytes) && gpa <= UINT64_MAX - len &&
           !ram_read(ram, gpa + len, bytes + len, 1) && bytes[len])
        len++;
    text_clean(out, bytes, len);
}

struct strings { // storage behind the pointers of a message
    char file[ESCAPED * UCALL_STRING_MAX + 1];
    char expression[ESCAPED * UCALL_STRING_MAX + 1];
};

static char *print_read(struct ucall_message *m)
{
    uint8_t bytes[UCALL_PRINT_MAX];
    uint64_t len = m->args[1];
    if (len > sizeof(bytes) || ram_read(&m->vm->ram, m->args[0], bytes, len))
        return NULL;
    char *text = malloc(ESCAPED * (size_t)len + 1);
    if (text)
        text_clean(text, bytes, len);
    return text;
}

// --- defaults

static void log_print(struct ucall_device *u, const struct ucall_message *m)
{
    const char *line = m->text;
    while (*line) {
        size_t len = strcspn(line, "\n");
        if (len)
            log_limited(&m->vm->log, &u->limit, LOG_INFO, "guest: %.*s", (int)len, line);
        line += len + (line[len] == '\n');
    }
}

static void log_value(struct ucall_device *u, const struct ucall_message *m)
{
    const char *name = ucall_value_name(m->args[0]);
    log_limited(&m->vm->log, &u->limit, LOG_INFO, "guest: value %s[%llu] = %llu",
                name ? name : "(unknown)", (unsigned long long)m->args[2],
                (unsigned long long)m->args[1]);
}

static void stop_failed(const struct ucall_message *m)
{
    if (m->nr == UCALL_ASSERT)
        vm_request_stop(m->vm, VM_STOP_PANIC, 0,
                        "guest assertion failed: %s:%llu: %s (0x%llx, 0x%llx)", m->file,
                        (unsigned long long)m->args[1], m->expression,
                        (unsigned long long)m->args[3], (unsigned long long)m->args[4]);
    else
        vm_request_stop(m->vm, VM_STOP_PANIC, 0,
                        "guest exception %llu: error code 0x%llx, RIP 0x%llx, CR2 0x%llx, "
                        "guest CPU %llu, CS 0x%llx",
                        (unsigned long long)m->args[0], (unsigned long long)m->args[1],
                        (unsigned long long)m->args[2], (unsigned long long)m->args[3],
                        (unsigned long long)m->args[4], (unsigned long long)m->args[5]);
}

static void default_handle(struct ucall_device *u, struct ucall_message *m)
{
    switch (m->nr) {
    case UCALL_SYNC:
        log_limited(&m->vm->log, &u->limit, LOG_INFO, "guest: sync %llu %llu",
                    (unsigned long long)m->args[0], (unsigned long long)m->args[1]);
        break;
    case UCALL_ASSERT:
    case UCALL_ABORT:
        stop_failed(m);
        break;
    case UCALL_DONE:
        vm_request_stop(m->vm, VM_STOP_DEBUG_EXIT, (uint32_t)m->args[0],
                        "the guest is done, status %llu", (unsigned long long)m->args[0]);
        break;
    case UCALL_PRINT:
        log_print(u, m);
        break;
    case UCALL_VALUE:
        log_value(u, m);
        break;
    case UCALL_GET:
        if (m->args[0] < UCALL_P_COUNT && u->config.params_set >> m->args[0] & 1)
            m->result = u->config.params[m->args[0]];
        break;
    case UCALL_STOP:
        ucall_hold(m->vm);
        break;
    default:
        log_limited(&m->vm->log, &u->bad_limit, LOG_WARN, "guest: unknown ucall %llu",
                    (unsigned long long)m->nr);
    }
}

void ucall_hold(struct vm *vm)
{
    // vm_pause and vm_request_stop kick the vCPU's thread, which ends a nap early.
    struct timespec nap = {.tv_nsec = HOLD_STEP_NS};
    while (!atomic_load(&vm->pause) && !atomic_load(&vm->quit))
        nanosleep(&nap, NULL);
}

// --- the port

static unsigned calling_cpu(const struct vm *vm)
{
    for (unsigned i = 0; i < vm->nr_vcpus; i++)
        if (vm->vcpus[i].started && pthread_equal(vm->vcpus[i].thread, pthread_self()))
            return i;
    return UINT_MAX;
}

static bool message_read(struct vm *vm, uint64_t gpa, struct ucall_message *m)
{
    struct ucall call;
    if (gpa % CALL_ALIGN || ram_read(&vm->ram, gpa, &call, sizeof(call)))
        return false;
    *m = (struct ucall_message) {.vm = vm,
                                 .cpu = calling_cpu(vm),
                                 .gpa = gpa,
                                 .nr = call.nr,
                                 .text = "",
                                 .file = "",
                                 .expression = ""};
    memcpy(m->args, call.args, sizeof(m->args));
    if (m->nr < UCALL_SYNC || m->nr > UCALL_ABORT || m->nr == UCALL_GET)
        m->result = UCALL_NONE;
    return true;
}

static void dispatch(struct ucall_device *u, struct ucall_message *m)
{
    if (!u->config.handle || !u->config.handle(u->config.arg, m))
        default_handle(u, m);
}

static void dispatch_print(struct ucall_device *u, struct ucall_message *m)
{
    autofree char *text = print_read(m);
    if (!text) {
        m->result = UCALL_NONE;
        log_limited(&m->vm->log, &u->bad_limit, LOG_WARN,
                    "guest: ucall print of %llu bytes at 0x%llx: expected at most %u bytes in RAM",
                    (unsigned long long)m->args[1], (unsigned long long)m->args[0],
                    UCALL_PRINT_MAX);
        return;
    }
    m->text = text;
    dispatch(u, m);
    m->text = "";
}

static void ucall_write(void *dev, uint64_t offset, unsigned size, uint64_t gpa)
{
    struct ucall_device *u = container_of((struct device *)dev, struct ucall_device, dev);
    struct vm *vm = u->dev.vm;
    struct ucall_message m;
    if (size != 4)
        return;
    gpa = (uint32_t)gpa;
    if (!message_read(vm, gpa, &m)) {
        log_limited(&vm->log, &u->bad_limit, LOG_WARN,
                    "guest: ucall at 0x%llx: expected a multiple of %d in RAM",
                    (unsigned long long)gpa, CALL_ALIGN);
        return;
    }
    if (m.nr == UCALL_PRINT) {
        dispatch_print(u, &m);
    } else if (m.nr == UCALL_ASSERT) {
        struct strings s;
        string_read(&vm->ram, m.args[0], s.file);
        string_read(&vm->ram, m.args[2], s.expression);
        m.file = s.file;
        m.expression = s.expression;
        dispatch(u, &m);
    } else {
        dispatch(u, &m);
    }
    ram_write(&vm->ram, gpa + offsetof(struct ucall, result), &m.result, sizeof(m.result));
}

static uint64_t ucall_read(void *dev, uint64_t offset, unsigned size)
{
    return size == 4 ? UCALL_MAGIC : ~0ull;
}

static const struct bus_ops ucall_ops = {ucall_read, ucall_write};

static int ucall_realize(struct device *dev, const void *config, struct error *err)
{
    struct ucall_device *u = container_of(dev, struct ucall_device, dev);
    if (config)
        u->config = *(const struct ucall_config *)config;
    // No lock: a call may hold its vCPU for long.
    struct bus_range range = {PORT_UCALL, 4, "ucall", &ucall_ops, dev, NULL};
    return bus_add(&dev->vm->pio, &range, err);
}

const struct device_class ucall_class = {
    .name = "ucall", .size = sizeof(struct ucall_device), .realize = ucall_realize};

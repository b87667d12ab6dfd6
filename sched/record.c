// SPDX-License-Identifier: Apache-2.0
#include "sched/record.h"

#include <errno.h>
#include <stdlib.h>

int record_init(struct record_log *log, size_t size)
{
    *log = (struct record_log) {.ring = calloc(size, sizeof(struct record)), .size = size};
    return log->ring ? 0 : -ENOMEM;
}

void record_free(struct record_log *log)
{
    free(log->ring);
    *log = (struct record_log) {0};
}

void record_event(void *arg, const struct credit_event *event)
{
    struct record_log *log = arg;
    log->ring[log->nr++ % log->size] = (struct record) {
        .at_ns = event->at_ns,
        .credit_ns = event->vcpu->credit_ns,
        .was_ns = event->vcpu->was_ns,
        .vm = event->vm->id,
        .vcpu = event->vcpu->id,
        .kind = (uint8_t)event->kind,
        .pcpu = event->pcpu,
        .from = event->from,
        .class = (uint8_t)event->vcpu->class,
        .state = (uint8_t)event->vcpu->state,
    };
}

size_t record_count(const struct record_log *log)
{
    return log->nr < log->size ? log->nr : log->size;
}

const struct record *record_at(const struct record_log *log, size_t i)
{
    return &log->ring[(log->nr - record_count(log) + i) % log->size];
}

static json_t *record_one(const struct record *r)
{
    json_t *object = json_object();
    json_object_set_new(object, "at_ns", json_integer((json_int_t)r->at_ns));
    json_object_set_new(object, "event", json_string(credit_event_name(r->kind)));
    json_object_set_new(object, "vm", json_integer(r->vm));
    json_object_set_new(object, "vcpu", json_integer(r->vcpu));
    json_object_set_new(object, "pcpu", json_integer(r->pcpu));
    if (r->kind == CREDIT_EV_MIGRATE)
        json_object_set_new(object, "from", json_integer(r->from));
    json_object_set_new(object, "credit", json_real((double)r->credit_ns / CREDIT_NS));
    if (r->kind == CREDIT_EV_CREDIT)
        json_object_set_new(object, "was", json_real((double)r->was_ns / CREDIT_NS));
    json_object_set_new(object, "class", json_string(credit_class_name(r->class)));
    json_object_set_new(object, "state", json_string(credit_state_name(r->state)));
    return object;
}

json_t *record_json(const struct record_log *log, uint64_t from_ns, uint64_t to_ns)
{
    json_t *array = json_array();
    for (size_t i = 0; i < record_count(log); i++) {
        const struct record *r = record_at(log, i);
        if (r->at_ns >= from_ns && r->at_ns < to_ns)
            json_array_append_new(array, record_one(r));
    }
    return array;
}

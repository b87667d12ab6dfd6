// SPDX-License-Identifier: Apache-2.0
// What the scheduler tells: its state, and its newest decisions. Users see their own VMs; root sees
// all.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "sched/client.h"
#include "sched/daemon_internal.h"
#include "vmm/bitmap.h"
#include "vmm/probe.h"
#include "vmm/util.h"

static void probe(const struct credit_event *e)
{
    uint32_t vm = e->vm->id;
    switch (e->kind) {
    case CREDIT_EV_RUN:
        FERRY_PROBE4(sched_run, vm, e->vcpu->id, e->pcpu, e->vcpu->credit_ns);
        break;
    case CREDIT_EV_STOP:
        FERRY_PROBE4(sched_stop, vm, e->vcpu->id, e->pcpu, e->vcpu->state);
        break;
    case CREDIT_EV_WAKE:
        FERRY_PROBE4(sched_wake, vm, e->vcpu->id, e->pcpu, e->vcpu->class);
        break;
    case CREDIT_EV_BLOCK:
        FERRY_PROBE3(sched_block, vm, e->vcpu->id, e->vcpu->credit_ns);
        break;
    case CREDIT_EV_MIGRATE:
        FERRY_PROBE4(sched_migrate, vm, e->vcpu->id, e->from, e->pcpu);
        break;
    default:
        break;
    }
}

void trace_hear(void *arg, const struct credit_event *e)
{
    struct sched_daemon *d = arg;
    probe(e);
    record_event(&d->trace, e);
}

void trace_name_set(struct sched_daemon *d, const struct sched_vm *vm)
{
    struct sched_trace_name *name = &d->names[vm->id % TRACE_NAMES];
    name->vm = vm->id;
    strcpy(name->name, vm->name);
}

struct sched_mask report_mask(const struct sched_daemon *d, uint64_t pcpus)
{
    struct sched_mask mask = {0};
    for (unsigned p = 0; p < d->credit.params.nr_pcpus; p++)
        if (pcpus >> p & 1)
            bitmap_set(mask.bits, (unsigned)d->cpus[p]);
    return mask;
}

// --- status

static json_t *integer(uint64_t value)
{
    return json_integer((json_int_t)value);
}

static uint64_t waited(const struct sched_vcpu *v, uint64_t now)
{
    bool waits = v->credit.state == CREDIT_QUEUED || v->credit.state == CREDIT_PARKED;
    return v->credit.wait_ns + (waits && now > v->credit.since_ns ? now - v->credit.since_ns : 0);
}

static json_t *vcpu_status(const struct sched_daemon *d, const struct sched_vcpu *v, uint64_t now)
{
    const struct credit_vcpu *c = &v->credit;
    return json_pack(
        "{s:i, s:i, s:s, s:s, s:i, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:b, s:s}", "index",
        (int)v->index, "tid", (int)v->watch.tid, "state", credit_state_name(c->state), "class",
        credit_class_name(c->class), "pcpu", d->cpus[c->pcpu], "credit", (json_int_t)credit_of(c),
        "cpu_ns", integer(v->charged_ns), "run_ns", integer(c->run_ns), "wait_ns",
        integer(waited(v, now)), "wakes", integer(c->wakes + v->briefs), "switches",
        integer(c->switches), "migrations", integer(c->migrations), "obeys", (int)!v->offender,
        "noticed_by", sched_watch_polls(&v->watch) ? "polls" : "records");
}

static json_t *vm_status(const struct sched_daemon *d, const struct sched_vm *vm, uint64_t now)
{
    const struct credit_vm_config *c = &vm->credit.config;
    char hard[SCHED_TEXT_MAX], soft[SCHED_TEXT_MAX];
    json_t *vcpus = json_array();
    for (unsigned i = 0; i < vm->nr; i++)
        if (vm->vcpus[i].present)
            json_array_append_new(vcpus, vcpu_status(d, &vm->vcpus[i], now));
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:s, s:s, s:o, s:o, s:o}", "name", vm->name,
                     "id", (int)vm->id, "pid", (int)vm->pid, "uid", (int)vm->uid, "weight",
                     (int)c->weight, "cap", (int)c->cap, "affinity",
                     sched_mask_text(&vm->share.hard, hard), "soft_affinity",
                     sched_mask_text(&vm->share.soft, soft), "run_ns", integer(vm->credit.run_ns),
                     "offences", integer(vm->offences), "vcpus", vcpus);
}

static bool may_see(const struct sched_vm *vm, uid_t uid)
{
    return !uid || vm->uid == uid;
}

static json_t *pcpu_status(const struct sched_daemon *d, unsigned p, uid_t uid, uint64_t now)
{
    const struct credit_pcpu *pcpu = &d->credit.pcpus[p];
    const struct sched_vcpu *v = d->holder[p];
    unsigned queued = 0;
    for (unsigned i = 0; i < CREDIT_CLASSES; i++)
        queued += pcpu->nr_queued[i];
    uint64_t idle = pcpu->idle_ns;
    if (!pcpu->current && now > pcpu->idle_since_ns)
        idle += now - pcpu->idle_since_ns;
    json_t *json = json_pack("{s:i, s:i, s:o}", "pcpu", d->cpus[p], "queued", (int)queued,
                             "idle_ns", integer(idle));
    if (v && may_see(v->vm, uid))
        json_object_set_new(json, "runs",
                            json_pack("{s:s, s:i}", "vm", v->vm->name, "vcpu", (int)v->index));
    return json;
}

json_t *report_status(struct sched_daemon *d, uid_t uid)
{
    uint64_t now = now_of(d);
    const struct credit_params *params = &d->credit.params;
    json_t *pcpus = json_array(), *vms = json_array();
    for (struct sched_vm *vm = d->vms; vm; vm = vm->next) {
        for (unsigned i = 0; i < vm->nr; i++)
            vcpu_look(d, &vm->vcpus[i], now);
        if (may_see(vm, uid))
            json_array_append_new(vms, vm_status(d, vm, now));
    }
    for (unsigned p = 0; p < params->nr_pcpus; p++)
        json_array_append_new(pcpus, pcpu_status(d, p, uid, now));
    return json_pack(
        "{s:s, s:o, s:o, s:o, s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "version",
        FERRY_VERSION, "time_ns", integer(now), "uptime_ns", integer(now - d->start_ns), "slice_ns",
        integer(params->slice_ns), "ratelimit_ns", integer(params->ratelimit_ns), "placement",
        params->placement == CREDIT_BY_WEIGHT ? "weight" : "length", "turns", integer(d->turns),
        "kicks", integer(d->kicks), "offences", integer(d->offences), "loops", integer(d->loops),
        "busy_ns", integer(d->busy_ns), "pcpus", pcpus, "vms", vms);
}

// --- trace

// Events of VMs that this user may not see are left out; of those that are gone, all but root's.
static bool trace_visible(struct sched_daemon *d, uint32_t id, uid_t uid)
{
    if (!uid)
        return true;
    for (const struct sched_vm *vm = d->vms; vm; vm = vm->next)
        if (vm->id == id)
            return may_see(vm, uid);
    return false;
}

static size_t trace_first(const struct sched_daemon *d, uint32_t last_ms, uint64_t now)
{
    uint64_t from = last_ms && now > last_ms * 1000000ull ? now - last_ms * 1000000ull : 0;
    size_t first = 0;
    while (first < record_count(&d->trace) && record_at(&d->trace, first)->at_ns < from)
        first++;
    return first;
}

// Records as they are: turning them into text takes long, and is left to who asks.
int report_trace(struct sched_daemon *d, uid_t uid, uint32_t last_ms, int fd)
{
    struct sched_trace_head head = {.magic = SCHED_MAGIC,
                                    .version = SCHED_VERSION,
                                    .now_ns = now_of(d),
                                    .slice_ns = d->credit.params.slice_ns,
                                    .nr_pcpus = d->credit.params.nr_pcpus};
    memcpy(head.cpus, d->cpus, sizeof(head.cpus));
    struct sched_trace_name names[TRACE_NAMES];
    for (unsigned i = 0; i < TRACE_NAMES; i++)
        if (d->names[i].vm && trace_visible(d, d->names[i].vm, uid))
            names[head.nr_names++] = d->names[i];
    size_t first = trace_first(d, last_ms, head.now_ns), count = record_count(&d->trace);
    autofree struct record *records = calloc(count - first + 1, sizeof(records[0]));
    if (!records)
        return -ENOMEM;
    uint32_t seen = 0; // the VM of the last record, whose answer is known
    bool visible = false;
    for (size_t i = first; i < count; i++) {
        const struct record *r = record_at(&d->trace, i);
        visible = r->vm == seen ? visible : trace_visible(d, r->vm, uid);
        seen = r->vm;
        if (visible)
            records[head.nr_records++] = *r;
    }
    int ret = write_all(fd, &head, sizeof(head));
    if (!ret)
        ret = write_all(fd, names, head.nr_names * sizeof(names[0]));
    return ret ? ret : write_all(fd, records, head.nr_records * sizeof(records[0]));
}

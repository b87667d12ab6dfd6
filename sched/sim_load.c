// SPDX-License-Identifier: Apache-2.0
#include "sched/sim_load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/util.h"

#define US 1000ull
#define MS 1000000ull

enum { DURATION_MAX_S = 24 * 3600 };

// One object of the file: which keys it may have, and where they go.
struct key {
    const char *name;
    uint64_t *number; // one of these three
    uint64_t *set;
    char *text;
    double least, most; // of the number
    uint64_t unit;      // what is stored for 1
    size_t text_size;
};

static int read_number(json_t *value, const struct key *key, struct error *err)
{
    double n = json_number_value(value);
    if (!json_is_number(value) || !(n >= key->least && n <= key->most))
        return error_set(err, -EINVAL, "%s: must be a number from %g to %g", key->name, key->least,
                         key->most);
    *key->number = (uint64_t)(n * (double)key->unit + 0.5);
    return 0;
}

static int read_text(json_t *value, const struct key *key, struct error *err)
{
    if (!json_is_string(value) || json_string_length(value) >= key->text_size ||
        !json_string_length(value))
        return error_set(err, -EINVAL, "%s: must be a text of 1 to %zu characters", key->name,
                         key->text_size - 1);
    memcpy(key->text, json_string_value(value), json_string_length(value) + 1);
    return 0;
}

static int read_set(json_t *value, const struct key *key, struct error *err)
{
    size_t i;
    json_t *p;
    *key->set = 0;
    json_array_foreach(value, i, p)
    {
        if (!json_is_integer(p) || json_integer_value(p) < 0 ||
            json_integer_value(p) >= CREDIT_PCPUS_MAX)
            break;
        *key->set |= 1ull << json_integer_value(p);
    }
    if (!json_is_array(value) || !i || i < json_array_size(value))
        return error_set(err, -EINVAL, "%s: must be an array of pCPU numbers below %d", key->name,
                         CREDIT_PCPUS_MAX);
    return 0;
}

static int read_object(json_t *object, const struct key *keys, size_t nr, struct error *err)
{
    const char *name;
    json_t *value;
    if (!json_is_object(object))
        return error_set(err, -EINVAL, "must be an object");
    json_object_foreach(object, name, value)
    {
        size_t i = 0;
        while (i < nr && strcmp(name, keys[i].name))
            i++;
        if (i == nr)
            return error_set(err, -EINVAL, "unknown key '%.40s'", name);
        int ret = keys[i].number ? read_number(value, &keys[i], err)
                  : keys[i].set  ? read_set(value, &keys[i], err)
                  : keys[i].text ? read_text(value, &keys[i], err)
                                 : 0;
        if (ret)
            return ret;
    }
    return 0;
}

static int behaviour_parse(const char *name, enum sim_behaviour *behaviour, struct error *err)
{
    static const char *const names[] = {"hog", "periodic", "burst"};
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (!strcmp(name, names[i])) {
            *behaviour = (enum sim_behaviour)i;
            return 0;
        }
    return error_set(err, -EINVAL, "behaviour '%.20s': must be hog, periodic or burst", name);
}

static int load_vm(struct sim_vm_config *vm, json_t *json, struct error *err)
{
    const double end = DURATION_MAX_S * 1000.0;
    char behaviour[16] = "hog";
    uint64_t weight = CREDIT_WEIGHT_DEFAULT, cap = 0, vcpus = 1;
    const struct key keys[] = {
        {"name", .text = vm->name, .text_size = sizeof(vm->name)},
        {"weight", &weight, .least = CREDIT_WEIGHT_MIN, .most = CREDIT_WEIGHT_MAX, .unit = 1},
        {"cap", &cap, .least = 0, .most = CREDIT_CAP_MAX, .unit = 1},
        {"vcpus", &vcpus, .least = 1, .most = SIM_VCPUS_MAX, .unit = 1},
        {"affinity", .set = &vm->credit.hard},
        {"soft_affinity", .set = &vm->credit.soft},
        {"behaviour", .text = behaviour, .text_size = sizeof(behaviour)},
        {"period_ms", &vm->period_ns, .least = 0.001, .most = end, .unit = MS},
        {"run_us", &vm->run_ns, .least = 1, .most = end * 1000, .unit = US},
        {"start_ms", &vm->start_ns, .least = 0, .most = end, .unit = MS},
        {"end_ms", &vm->end_ns, .least = 0, .most = end, .unit = MS},
    };
    vm->credit.hard = CREDIT_ANY_PCPU;
    int ret = read_object(json, keys, ARRAY_SIZE(keys), err);
    if (!ret)
        ret = behaviour_parse(behaviour, &vm->behaviour, err);
    vm->credit.weight = (unsigned)weight;
    vm->credit.cap = (unsigned)cap;
    vm->nr_vcpus = (unsigned)vcpus;
    return ret;
}

static int load_vms(struct sim_workload *w, json_t *vms, struct error *err)
{
    size_t i;
    json_t *vm;
    if (!json_is_array(vms) || !json_array_size(vms) || json_array_size(vms) > SIM_VMS_MAX)
        return error_set(err, -EINVAL, "vms: must be an array of 1 to %d VMs", SIM_VMS_MAX);
    w->config.vms = calloc(json_array_size(vms), sizeof(*w->config.vms));
    if (!w->config.vms)
        return error_set(err, -ENOMEM, "no memory for the workload");
    json_array_foreach(vms, i, vm)
    {
        snprintf(w->config.vms[i].name, SIM_NAME_MAX, "vm%zu", i + 1);
        if (load_vm(&w->config.vms[i], vm, err))
            return error_prefix(err, "vms[%zu]", i);
        w->config.nr_vms++;
    }
    return 0;
}

static int load_host(struct sim_workload *w, json_t *json, struct error *err)
{
    struct sim_config *config = &w->config;
    struct credit_params *params = &config->params;
    char placement[16] = "length", weights[16] = "vcpu";
    uint64_t pcpus = 1, nodes = 1;
    const double end = DURATION_MAX_S * 1000.0;
    const struct key keys[] = {
        {"title", .text = w->title, .text_size = sizeof(w->title)},
        {"pcpus", &pcpus, .least = 1, .most = CREDIT_PCPUS_MAX, .unit = 1},
        {"nodes", &nodes, .least = 1, .most = CREDIT_PCPUS_MAX, .unit = 1},
        {"duration_ms", &config->duration_ns, .least = 1, .most = end, .unit = MS},
        {"seed", &config->seed, .least = 0, .most = 1e15, .unit = 1},
        {"switch_us", &config->switch_ns, .least = 0, .most = 1000, .unit = US},
        {"slice_ms", &params->slice_ns, .least = 1, .most = CREDIT_SLICE_MAX_MS, .unit = MS},
        {"tick_ms", &params->tick_ns, .least = 0.1, .most = CREDIT_SLICE_MAX_MS, .unit = MS},
        {"ratelimit_us", &params->ratelimit_ns, .least = 0, .most = 1e6, .unit = US},
        {"placement", .text = placement, .text_size = sizeof(placement)},
        {"weight_of", .text = weights, .text_size = sizeof(weights)},
        {"draw_from_ms", &w->draw_from_ns, .least = 0, .most = end, .unit = MS},
        {"draw_to_ms", &w->draw_to_ns, .least = 0, .most = end, .unit = MS},
        {"vms"},
    };
    *params = credit_params_default(1);
    config->duration_ns = 10000 * MS;
    config->scheduler = SIM_CREDIT_CAP;
    int ret = read_object(json, keys, ARRAY_SIZE(keys), err);
    if (ret)
        return ret;
    if (strcmp(weights, "vcpu") && strcmp(weights, "vm"))
        return error_set(err, -EINVAL, "weight_of '%s': must be vcpu or vm", weights);
    params->weight_per_vm = !strcmp(weights, "vm");
    params->nr_pcpus = (unsigned)pcpus;
    for (unsigned p = 0; p < pcpus; p++)
        params->node[p] = (uint8_t)(p * nodes / pcpus);
    return sim_placement_parse(placement, &params->placement, err);
}

int sim_load_json(struct sim_workload *w, json_t *json, struct error *err)
{
    *w = (struct sim_workload) {0};
    int ret = load_host(w, json, err);
    if (!ret)
        ret = load_vms(w, json_object_get(json, "vms"), err);
    if (ret)
        sim_workload_free(w);
    return ret;
}

int sim_load(struct sim_workload *w, const char *path, struct error *err)
{
    json_error_t why;
    json_t *json = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    *w = (struct sim_workload) {0};
    if (!json)
        return error_set(err, -EINVAL, "workload %s: line %d: %s", path, why.line, why.text);
    int ret = sim_load_json(w, json, err);
    json_decref(json);
    return ret ? error_prefix(err, "workload %s", path) : 0;
}

void sim_workload_free(struct sim_workload *w)
{
    free(w->config.vms);
    w->config.vms = NULL;
}

// --- Results

static json_t *count(uint64_t value)
{
    return json_integer((json_int_t)value);
}

static double us(uint64_t ns)
{
    return (double)ns / 1000;
}

static json_t *vm_result(const struct sim *sim, const struct sim_vm *vm)
{
    uint64_t switches = 0, migrations = 0, wait = 0, park = 0;
    for (unsigned i = 0; i < vm->config->nr_vcpus; i++) {
        const struct credit_vcpu *v = &vm->vcpus[i].credit;
        switches += v->switches;
        migrations += v->migrations;
        wait += v->wait_ns;
        park += v->park_ns;
    }
    json_t *out = json_object();
    json_object_set_new(out, "name", json_string(vm->config->name));
    json_object_set_new(out, "weight", count(vm->config->credit.weight));
    json_object_set_new(out, "cap", count(vm->config->credit.cap));
    json_object_set_new(out, "vcpus", count(vm->config->nr_vcpus));
    json_object_set_new(out, "share", json_real(sim_share(sim, vm)));
    json_object_set_new(out, "ideal", json_real(vm->ideal));
    json_object_set_new(out, "wait_ms", json_real(us(wait) / 1000));
    json_object_set_new(out, "parked_ms", json_real(us(park) / 1000));
    json_object_set_new(out, "switches", count(switches));
    json_object_set_new(out, "migrations", count(migrations));
    json_object_set_new(out, "wakes", count(vm->waits.nr));
    json_object_set_new(out, "wake_p50_us", json_real(us(sim_percentile(&vm->waits, 50))));
    json_object_set_new(out, "wake_p99_us", json_real(us(sim_percentile(&vm->waits, 99))));
    json_object_set_new(out, "wake_max_us", json_real(us(vm->waits.most_ns)));
    return out;
}

json_t *sim_result(const struct sim *sim)
{
    json_t *vms = json_array(), *out = json_object();
    uint64_t idle = 0;
    for (unsigned i = 0; i < sim->config.nr_vms; i++)
        json_array_append_new(vms, vm_result(sim, &sim->vms[i]));
    for (unsigned p = 0; p < sim->credit.params.nr_pcpus; p++) {
        const struct credit_pcpu *pcpu = &sim->credit.pcpus[p];
        idle += pcpu->idle_ns + (pcpu->current ? 0 : sim->now - pcpu->idle_since_ns);
    }
    json_object_set_new(out, "scheduler", json_string(sim_scheduler_name(sim->config.scheduler)));
    json_object_set_new(out, "placement",
                        json_string(sim_placement_name(sim->config.params.placement)));
    json_object_set_new(out, "pcpus", count(sim->credit.params.nr_pcpus));
    json_object_set_new(out, "slice_ms", json_real(us(sim->config.params.slice_ns) / 1000));
    json_object_set_new(out, "duration_ms", json_real(us(sim->now) / 1000));
    json_object_set_new(out, "idle_ms", json_real(us(idle) / 1000));
    json_object_set_new(out, "jain", json_real(sim_jain(sim)));
    json_object_set_new(out, "vms", vms);
    return out;
}

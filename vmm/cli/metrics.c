// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/metrics.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "vmm/histogram.h"
#include "vmm/life.h"
#include "vmm/util.h"

// Label values are quoted; these three need an escape (Prometheus' exposition formats, text).
static void label_print(FILE *out, const char *text)
{
    for (; *text; text++)
        if (*text == '"' || *text == '\\')
            fprintf(out, "\\%c", *text);
        else if (*text == '\n')
            fprintf(out, "\\n");
        else
            fputc(*text, out);
}

static void vm_label(FILE *out, json_t *info)
{
    fprintf(out, "{vm=\"");
    label_print(out, json_string_value(json_object_get(info, "name")) ?: "");
    fprintf(out, "\"");
}

static void head(FILE *out, const char *name, const char *type, const char *help)
{
    fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void gauge(FILE *out, json_t *info, const char *key, const char *name, double unit,
                  const char *help)
{
    json_t *value = json_object_get(info, key);
    if (!value)
        return;
    head(out, name, "gauge", help);
    fprintf(out, "%s", name);
    vm_label(out, info);
    fprintf(out, "} %.15g\n", (double)json_integer_value(value) * unit);
}

static void vcpus(FILE *out, json_t *info, const char *key, const char *name, double unit,
                  const char *help)
{
    size_t i;
    json_t *vcpu;
    head(out, name, "counter", help);
    json_array_foreach(json_object_get(info, "vcpus"), i, vcpu)
    {
        fprintf(out, "%s", name);
        vm_label(out, info);
        fprintf(out, ",vcpu=\"%zu\"} %.15g\n", i,
                (double)json_integer_value(json_object_get(vcpu, key)) * unit);
    }
}

static void states(FILE *out, json_t *info)
{
    const char *now = json_string_value(json_object_get(info, "state")) ?: "";
    head(out, "ferry_vm_state", "gauge", "1 for the state the VM is in");
    for (unsigned i = 0; i < LIFE_STATES; i++) {
        fprintf(out, "ferry_vm_state");
        vm_label(out, info);
        fprintf(out, ",state=\"%s\"} %d\n", life_name(i), !strcmp(now, life_name(i)));
    }
}

json_t *metrics_flat(json_t *figures)
{
    json_t *flat = json_object(), *value, *inner;
    const char *key, *inner_key;
    char name[96];
    json_object_foreach(figures, key, value)
    {
        json_object_set(flat, key, value);
        if (!strcmp(key, "latency"))
            continue; // histograms have a place of their own
        json_object_foreach(value, inner_key, inner)
        {
            snprintf(name, sizeof(name), "%s_%s", key, inner_key);
            json_object_set(flat, name, inner);
        }
    }
    return flat;
}

// --- histograms

// Its buckets cumulative, as the format wants them. `labels`: names and values in turn, up to NULL;
// may be NULL.
static void histogram_print(FILE *out, json_t *info, const char *name, const char *const *labels,
                            json_t *histogram)
{
    char names[256] = "";
    size_t len = 0;
    for (; labels && labels[0]; labels += 2)
        len +=
            (size_t)snprintf(names + len, sizeof(names) - len, ",%s=\"%s\"", labels[0], labels[1]);
    json_int_t count = 0;
    json_t *buckets = json_object_get(histogram, "le_ns");
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
        char bound[24] = "+Inf";
        if (i < HISTOGRAM_BUCKETS - 1)
            snprintf(bound, sizeof(bound), "%llu", (unsigned long long)histogram_bound_ns(i));
        count += json_integer_value(json_object_get(buckets, bound));
        fprintf(out, "%s_bucket", name);
        vm_label(out, info);
        if (i < HISTOGRAM_BUCKETS - 1)
            fprintf(out, "%s,le=\"%.15g\"} %lld\n", names, (double)histogram_bound_ns(i) * 1e-9,
                    (long long)count);
        else
            fprintf(out, "%s,le=\"+Inf\"} %lld\n", names, (long long)count);
    }
    fprintf(out, "%s_sum", name);
    vm_label(out, info);
    fprintf(out, "%s} %.15g\n%s_count", names,
            (double)json_integer_value(json_object_get(histogram, "sum_ns")) * 1e-9, name);
    vm_label(out, info);
    fprintf(out, "%s} %lld\n", names, (long long)count);
}

static void histograms(FILE *out, json_t *info)
{
    size_t i;
    const char *device, *kind;
    json_t *figures, *histogram;
    static const char disk[] = "ferry_disk_request_seconds", exit[] = "ferry_vcpu_exit_seconds",
                      api[] = "ferry_api_request_seconds";
    head(out, disk, "histogram", "from the guest's queue until the answer");
    json_object_foreach(json_object_get(info, "devices"), device, figures)
    {
        json_object_foreach(json_object_get(figures, "latency"), kind, histogram)
        {
            const char *const labels[] = {"device", device, "op", kind, NULL};
            histogram_print(out, info, disk, labels, histogram);
        }
    }
    head(out, exit, "histogram", "how long Ferry worked on an exit, of one in sixteen");
    json_array_foreach(json_object_get(info, "vcpus"), i, figures)
    {
        char number[24];
        snprintf(number, sizeof(number), "%zu", i);
        const char *const labels[] = {"vcpu", number, NULL};
        histogram_print(out, info, exit, labels, json_object_get(figures, "handling"));
    }
    head(out, api, "histogram", "from the whole request until the answer");
    histogram_print(out, info, api, NULL, json_object_get(info, "api_latency"));
}

// --- devices

// Whether an earlier device has this figure: its head is printed once for all.
static bool seen_before(json_t *devices, const char *device, const char *key)
{
    const char *name;
    json_t *figures;
    json_object_foreach(devices, name, figures)
    {
        if (!strcmp(name, device))
            return false;
        if (json_is_integer(json_object_get(figures, key)))
            return true;
    }
    return false;
}

static void metric_name(char *name, size_t size, const char *key)
{
    snprintf(name, size, "ferry_device_%s", key);
    for (char *p = name; *p; p++)
        *p = isalnum((unsigned char)*p) ? *p : '_';
}

// All lines of one metric stand together, as the format wants it.
static void device_metric(FILE *out, json_t *info, json_t *devices, const char *key)
{
    char name[96];
    const char *device;
    json_t *figures;
    metric_name(name, sizeof(name), key);
    head(out, name, "untyped", "as `ferry info` shows it for the device");
    json_object_foreach(devices, device, figures)
    {
        json_t *value = json_object_get(figures, key);
        if (!json_is_integer(value))
            continue;
        fprintf(out, "%s", name);
        vm_label(out, info);
        fprintf(out, ",device=\"%s\"} %lld\n", device, (long long)json_integer_value(value));
    }
}

static void devices_print(FILE *out, json_t *info)
{
    json_t *devices = json_object();
    const char *device, *key;
    json_t *figures, *value;
    json_object_foreach(json_object_get(info, "devices"), device, figures)
        json_object_set_new(devices, device, metrics_flat(figures));
    json_object_foreach(devices, device, figures)
    {
        json_object_foreach(figures, key, value)
        {
            if (json_is_integer(value) && !seen_before(devices, device, key))
                device_metric(out, info, devices, key);
        }
    }
    json_decref(devices);
}

char *metrics_text(json_t *info)
{
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    states(out, info);
    gauge(out, info, "memory_bytes", "ferry_vm_memory_bytes", 1, "memory of the guest");
    gauge(out, info, "resident_bytes", "ferry_vm_resident_bytes", 1,
          "resident memory of the VM's process, with the guest's");
    gauge(out, info, "uptime_s", "ferry_vm_uptime_seconds", 1, "since the VM began to run here");
    gauge(out, info, "idle_s", "ferry_vm_idle_seconds", 1, "since its vCPUs were last busy");
    gauge(out, info, "cpu_permille", "ferry_vm_cpu_ratio", 0.001,
          "CPUs used in the last period of ten seconds");
    vcpus(out, info, "exits", "ferry_vcpu_exits_total", 1, "exits of the vCPU to user space");
    vcpus(out, info, "cpu_ns", "ferry_vcpu_cpu_seconds_total", 1e-9,
          "CPU time of the vCPU's thread");
    histograms(out, info);
    devices_print(out, info);
    fclose(out);
    return text;
}

// SPDX-License-Identifier: Apache-2.0
// What a configuration that came over the API means: options of the machine.
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "devices/virtio_balloon.h"
#include "devices/virtio_blk.h"
#include "devices/virtio_net.h"
#include "devices/virtio_vsock.h"
#include "vmm/cli/api.h"
#include "vmm/cli/session.h"

// --- schemas

static const struct schema_field bucket_fields[] = {
    {"size", SCHEMA_INTEGER, .required = true},
    {"refill_time", SCHEMA_INTEGER, .required = true, .max = UINT32_MAX},
    {"one_time_burst", SCHEMA_INTEGER},
    {NULL},
};
const struct schema_field api_limiter_fields[] = {
    {"bandwidth", SCHEMA_OBJECT, .fields = bucket_fields},
    {"ops", SCHEMA_OBJECT, .fields = bucket_fields},
    {NULL},
};
static const struct schema_field boot_fields[] = {
    {"kernel_image_path", SCHEMA_STRING, .required = true, .min = 1},
    {"initrd_path", SCHEMA_STRING, .min = 1},
    {"boot_args", SCHEMA_STRING},
    {NULL},
};
static const char *const huge_pages[] = {"None", "Transparent", "2M", NULL};
static const char *const templates[] = {"None", NULL};
static const struct schema_field machine_fields[] = {
    {"vcpu_count", SCHEMA_INTEGER, .required = true, .min = 1, .max = VM_MAX_VCPUS},
    {"mem_size_mib", SCHEMA_INTEGER, .required = true, .min = RAM_MIN / MiB, .max = RAM_MAX / MiB},
    {"smt", SCHEMA_BOOL},
    {"ht_enabled", SCHEMA_BOOL}, // its name before Firecracker 1.0; clients still send it
    {"track_dirty_pages", SCHEMA_BOOL},
    {"huge_pages", SCHEMA_STRING, .choices = huge_pages},
    {"cpu_template", SCHEMA_STRING, .choices = templates},
    {NULL},
};
static const char *const cache_types[] = {"Unsafe", "Writeback", NULL};
static const char *const engines[] = {"Sync", "Async", NULL};
static const struct schema_field drive_fields[] = {
    {"drive_id", SCHEMA_STRING, .required = true, .min = 1, .max = 64},
    {"path_on_host", SCHEMA_STRING, .required = true, .min = 1, .max = BLK_PATH_MAX - 1},
    {"is_root_device", SCHEMA_BOOL, .required = true},
    {"partuuid", SCHEMA_STRING, .max = 64},
    {"is_read_only", SCHEMA_BOOL},
    {"cache_type", SCHEMA_STRING, .choices = cache_types},
    {"io_engine", SCHEMA_STRING, .choices = engines},
    {"rate_limiter", SCHEMA_OBJECT, .fields = api_limiter_fields},
    {NULL},
};
static const struct schema_field net_fields[] = {
    {"iface_id", SCHEMA_STRING, .required = true, .min = 1, .max = 64},
    {"host_dev_name", SCHEMA_STRING, .required = true, .min = 1, .max = IFNAMSIZ - 1},
    {"guest_mac", SCHEMA_STRING, .max = 17},
    {"mtu", SCHEMA_INTEGER, .min = 68, .max = 65535},
    {"rx_rate_limiter", SCHEMA_OBJECT, .fields = api_limiter_fields},
    {"tx_rate_limiter", SCHEMA_OBJECT, .fields = api_limiter_fields},
    {NULL},
};
static const struct schema_field vsock_fields[] = {
    {"guest_cid", SCHEMA_INTEGER, .required = true, .min = 3, .max = UINT32_MAX - 1},
    {"uds_path", SCHEMA_STRING, .required = true, .min = 1, .max = VSOCK_PATH_MAX},
    {"vsock_id", SCHEMA_STRING},
    {NULL},
};
static const struct schema_field balloon_fields[] = {
    {"amount_mib", SCHEMA_INTEGER, .required = true, .max = RAM_MAX / MiB},
    {"deflate_on_oom", SCHEMA_BOOL, .required = true},
    {"stats_polling_interval_s", SCHEMA_INTEGER, .max = BALLOON_STATS_MAX},
    {"free_page_hinting", SCHEMA_BOOL},
    {"free_page_reporting", SCHEMA_BOOL},
    {NULL},
};
static const struct schema_field entropy_fields[] = {{NULL}};
static const struct schema_field serial_fields[] = {{"serial_out_path", SCHEMA_STRING, .min = 1},
                                                    {NULL}};
static const char *const log_levels[] = {"Error", "Warning", "Info", "Debug", "Trace", "Off", NULL};
static const struct schema_field logger_fields[] = {
    {"log_path", SCHEMA_STRING, .min = 1},
    {"level", SCHEMA_STRING, .choices = log_levels},
    {"show_level", SCHEMA_BOOL},
    {"show_log_origin", SCHEMA_BOOL},
    {"module", SCHEMA_STRING},
    {NULL},
};
static const struct schema_field metrics_fields[] = {
    {"metrics_path", SCHEMA_STRING, .required = true, .min = 1}, {NULL}};

const struct api_section api_sections[] = {
    {"boot-source", NULL, boot_fields},
    {"machine-config", NULL, machine_fields},
    {"drives", "drive_id", drive_fields},
    {"network-interfaces", "iface_id", net_fields},
    {"vsock", NULL, vsock_fields},
    {"balloon", NULL, balloon_fields},
    {"entropy", NULL, entropy_fields},
    {"serial", NULL, serial_fields},
    {"logger", NULL, logger_fields},
    {"metrics", NULL, metrics_fields},
    {NULL},
};

// --- small readers; a schema has seen to the types

static const char *text_of(json_t *object, const char *key)
{
    return json_string_value(json_object_get(object, key));
}

static bool is_true(json_t *object, const char *key)
{
    return json_is_true(json_object_get(object, key));
}

static uint64_t number_of(json_t *object, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(object, key));
}

static struct rate_bucket_config bucket_of(json_t *json)
{
    struct rate_bucket_config b = {.size = number_of(json, "size"),
                                   .one_time_burst = number_of(json, "one_time_burst"),
                                   .refill_ms = (uint32_t)number_of(json, "refill_time")};
    if (!b.size || !b.refill_ms) // either of them 0: no limit
        b = (struct rate_bucket_config) {0};
    return b;
}

static struct rate_limit_config limiter_of(json_t *json)
{
    return (struct rate_limit_config) {.bytes = bucket_of(json_object_get(json, "bandwidth")),
                                       .ops = bucket_of(json_object_get(json, "ops"))};
}

// --- checks beyond a schema

static int readable(const char *what, const char *path, int mode, struct error *err)
{
    return !path || !access(path, mode) ? 0 : error_errno(err, "%s '%s'", what, path);
}

static int mac_parse(const char *text, uint8_t mac[6])
{
    char end;
    unsigned b[6];
    if (!text)
        return 0;
    if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x%c", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &end) !=
            6 ||
        b[0] & 1)
        return -EINVAL;
    for (unsigned i = 0; i < 6; i++)
        mac[i] = (uint8_t)b[i];
    return 0;
}

int api_section_check(const char *section, json_t *body, struct error *err)
{
    uint8_t mac[6];
    int ret = 0;
    if (!strcmp(section, "boot-source")) {
        ret = readable("kernel_image_path", text_of(body, "kernel_image_path"), R_OK, err);
        if (!ret)
            ret = readable("initrd_path", text_of(body, "initrd_path"), R_OK, err);
    } else if (!strcmp(section, "drives")) {
        ret = readable("path_on_host", text_of(body, "path_on_host"),
                       is_true(body, "is_read_only") ? R_OK : R_OK | W_OK, err);
    } else if (!strcmp(section, "network-interfaces") &&
               mac_parse(text_of(body, "guest_mac"), mac)) {
        ret = error_set(err, -EINVAL,
                        "guest_mac '%s': expected a unicast address like "
                        "06:00:ac:10:00:02",
                        text_of(body, "guest_mac"));
    } else if (!strcmp(section, "machine-config") &&
               (is_true(body, "smt") || is_true(body, "ht_enabled"))) {
        ret = error_set(err, -ENOTSUP, "%s true: vCPUs of one core are not offered",
                        is_true(body, "smt") ? "smt" : "ht_enabled");
    }
    return ret;
}

// --- devices

static int device_new(struct session *s, const char *kind, const char *id, size_t size,
                      const void *config, struct error *err)
{
    const struct virtio_kind *k = virtio_kind_find(kind);
    void *copy = calloc(1, k->config_size);
    if (!copy)
        return error_set(err, -ENOMEM, "no memory for a device");
    memcpy(copy, config, size);
    return options_add_device(s->options, k, "", id, copy, err);
}

static int drive_add(struct session *s, json_t *drive, struct error *err)
{
    struct virtio_blk_config c = {.queues = 1,
                                  .read_only = is_true(drive, "is_read_only"),
                                  .limit = limiter_of(json_object_get(drive, "rate_limiter"))};
    snprintf(c.path, sizeof(c.path), "%s", text_of(drive, "path_on_host"));
    snprintf(c.serial, sizeof(c.serial), "%s", text_of(drive, "drive_id"));
    return device_new(s, "disk", text_of(drive, "drive_id"), sizeof(c), &c, err);
}

static int drives_add(struct session *s, json_t *drives, bool root, struct error *err)
{
    size_t i;
    json_t *drive;
    int ret = 0;
    json_array_foreach(drives, i, drive) if (!ret && is_true(drive, "is_root_device") == root) ret =
        drive_add(s, drive, err);
    return ret;
}

static int nets_add(struct session *s, json_t *nets, struct error *err)
{
    size_t i;
    json_t *net;
    int ret = 0;
    json_array_foreach(nets, i, net)
    {
        struct virtio_net_config c = {.kind = NET_TAP,
                                      .mtu = (uint16_t)number_of(net, "mtu"),
                                      .receive =
                                          limiter_of(json_object_get(net, "rx_rate_limiter")),
                                      .send = limiter_of(json_object_get(net, "tx_rate_limiter"))};
        snprintf(c.tap, sizeof(c.tap), "%s", text_of(net, "host_dev_name"));
        mac_parse(text_of(net, "guest_mac"), c.mac);
        ret = ret ? ret : device_new(s, "net", text_of(net, "iface_id"), sizeof(c), &c, err);
    }
    return ret;
}

static int vsock_add(struct session *s, json_t *vsock, struct error *err)
{
    struct virtio_vsock_config c = {.cid = number_of(vsock, "guest_cid")};
    if (!vsock)
        return 0;
    snprintf(c.path, sizeof(c.path), "%s", text_of(vsock, "uds_path"));
    return device_new(s, "vsock", "vsock", sizeof(c), &c, err);
}

// --- the rest of the machine

static int option(struct session *s, const char *name, const char *value, struct error *err)
{
    return value ? options_set(s->options, FOR_RUN, name, value, err) : 0;
}

// The API's first disk comes behind those of the command line.
static char first_drive(const struct vm_options *o)
{
    char letter = 'a';
    for (unsigned i = 0; i < o->nr_devices; i++)
        letter += o->devices[i].given && !strcmp(o->devices[i].kind->name, "disk");
    return letter <= 'z' ? letter : 'z';
}

// The guest's command line; a root device is named in it, as microVM clients expect.
static int boot_args(struct session *s, json_t *boot, json_t *drives, struct error *err)
{
    size_t i;
    json_t *drive;
    autofree char *args = NULL;
    const char *given = text_of(boot, "boot_args");
    char root[128] = "", first[] = "/dev/vda";
    first[sizeof(first) - 2] = first_drive(s->options);
    json_array_foreach(drives, i, drive) if (is_true(drive, "is_root_device"))
        snprintf(root, sizeof(root), " root=%s%s %s", text_of(drive, "partuuid") ? "PARTUUID=" : "",
                 text_of(drive, "partuuid") ?: first, is_true(drive, "is_read_only") ? "ro" : "rw");
    if (asprintf(&args, "%s%s", given ? given : "console=ttyS0 reboot=k panic=1", root) < 0)
        return error_set(err, -ENOMEM, "no memory for the command line");
    return option(s, "append", args, err);
}

// As text: it travels with the guest, see devices/virtio_kinds.h.
static int balloon_add(struct session *s, json_t *balloon, struct error *err)
{
    char text[128];
    if (!balloon)
        return 0;
    snprintf(text, sizeof(text),
             "target=%lluM,stats=%llu,deflate-on-oom=%s,reporting=%s,hinting=%s",
             (unsigned long long)number_of(balloon, "amount_mib"),
             (unsigned long long)number_of(balloon, "stats_polling_interval_s"),
             is_true(balloon, "deflate_on_oom") ? "on" : "off",
             is_true(balloon, "free_page_reporting") ? "on" : "off",
             is_true(balloon, "free_page_hinting") ? "on" : "off");
    return option(s, "balloon", text, err);
}

static int machine_config(struct session *s, json_t *machine, struct error *err)
{
    char text[32];
    if (!machine)
        return 0;
    const char *huge = text_of(machine, "huge_pages");
    snprintf(text, sizeof(text), "%llu", (unsigned long long)number_of(machine, "vcpu_count"));
    int ret = option(s, "cpus", text, err);
    snprintf(text, sizeof(text), "%lluM", (unsigned long long)number_of(machine, "mem_size_mib"));
    if (!ret)
        ret = option(s, "memory", text, err);
    if (!ret && huge && strcmp(huge, "None"))
        ret = option(s, "backing", strcmp(huge, "2M") ? "thp" : "hugetlb", err);
    return ret;
}

static int serial_config(struct session *s, json_t *serial, struct error *err)
{
    char text[SCHEMA_TEXT_MAX + 8];
    const char *path = text_of(serial, "serial_out_path");
    if (!path)
        return 0;
    snprintf(text, sizeof(text), "file:%s", path);
    return option(s, "console", text, err);
}

static int logger_config(struct session *s, json_t *logger, struct error *err)
{
    static const char *const levels[][2] = {{"Error", "error"}, {"Warning", "warn"},
                                            {"Info", "info"},   {"Debug", "debug"},
                                            {"Trace", "debug"}, {"Off", "error"}};
    const char *level = text_of(logger, "level");
    for (size_t i = 0; level && i < ARRAY_SIZE(levels); i++)
        if (!strcmp(level, levels[i][0]))
            return option(s, "log", levels[i][1], err);
    return 0;
}

int api_machine(struct session *s, json_t *config, struct error *err)
{
    json_t *boot = json_object_get(config, "boot-source");
    json_t *drives = json_object_get(config, "drives");
    for (unsigned i = s->options->nr_devices; i > 0; i--)
        if (!s->options->devices[i - 1].given) // of an earlier attempt
            options_remove_device(s->options, i - 1);
    int ret = machine_config(s, json_object_get(config, "machine-config"), err);
    if (!ret && boot)
        ret = option(s, "kernel", text_of(boot, "kernel_image_path"), err);
    if (!ret && boot)
        ret = option(s, "initrd", text_of(boot, "initrd_path"), err);
    if (!ret && boot)
        ret = boot_args(s, boot, drives, err);
    if (!ret)
        ret = drives_add(s, drives, true, err);
    if (!ret)
        ret = drives_add(s, drives, false, err);
    if (!ret)
        ret = nets_add(s, json_object_get(config, "network-interfaces"), err);
    if (!ret)
        ret = vsock_add(s, json_object_get(config, "vsock"), err);
    if (!ret)
        ret = balloon_add(s, json_object_get(config, "balloon"), err);
    if (!ret && json_object_get(config, "entropy"))
        ret = option(s, "rng", "true", err);
    if (!ret)
        ret = serial_config(s, json_object_get(config, "serial"), err);
    if (!ret)
        ret = logger_config(s, json_object_get(config, "logger"), err);
    return ret;
}

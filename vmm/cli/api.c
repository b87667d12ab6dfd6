// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/api.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "devices/platform.h"
#include "devices/virtio_net.h"
#include "migrate/snapshot.h"
#include "vmm/cli/api_pair.h"
#include "vmm/cli/hinting.h"
#include "vmm/cli/new_mac.h"
#include "vmm/cli/session.h"

struct api {
    struct session *session;
    json_t *config; // sections as they were said
    struct hinting hinting;
    struct api_pair *pair; // of the last snapshot
};

enum {
    LIVE = LIFE_BIT(LIFE_RUNNING) | LIFE_BIT(LIFE_PAUSED),
    BEFORE = LIFE_BIT(LIFE_CREATED),
    FILE_MAX = 1024 * 1024, // of a configuration file
};

static void reply(struct control_request *req, int ret, const struct error *err)
{
    if (ret)
        control_reply_error(req, err);
    else
        control_reply_ok(req, NULL);
}

// --- the configuration

static const struct api_section *section_find(const char *name)
{
    for (const struct api_section *s = api_sections; s->name; s++)
        if (!strcmp(s->name, name))
            return s;
    return NULL;
}

// The place of the element of that id; the list's end if there is none.
static size_t element_find(json_t *list, const char *key, const char *id)
{
    size_t i;
    json_t *element;
    json_array_foreach(
        list, i,
        element) if (!strcmp(json_string_value(json_object_get(element, key)), id)) return i;
    return json_array_size(list);
}

static int root_check(const struct api *api, json_t *drive, struct error *err)
{
    size_t i;
    json_t *other;
    const char *id = json_string_value(json_object_get(drive, "drive_id"));
    if (!json_is_true(json_object_get(drive, "is_root_device")))
        return 0;
    json_array_foreach(
        json_object_get(api->config, "drives"), i,
        other) if (json_is_true(json_object_get(other, "is_root_device")) &&
                   strcmp(
                       json_string_value(json_object_get(other, "drive_id")),
                       id)) return error_set(err, -EEXIST, "drive '%s' is the root device already",
                                             json_string_value(json_object_get(other, "drive_id")));
    return 0;
}

static int element_put(struct api *api, const struct api_section *s, json_t *body,
                       struct error *err)
{
    json_t *list = json_object_get(api->config, s->name);
    if (!list) {
        list = json_array();
        json_object_set_new(api->config, s->name, list);
    }
    const char *id = json_string_value(json_object_get(body, s->id));
    size_t at = element_find(list, s->id, id);
    if (at < json_array_size(list))
        json_array_set(list, at, body);
    else if (at < SCHEMA_LIST_MAX)
        json_array_append(list, body);
    else
        return error_set(err, -E2BIG, "at most %d %s", SCHEMA_LIST_MAX, s->name);
    return 0;
}

// `body` is as the section's schema says.
static int section_put(struct api *api, const struct api_section *s, json_t *body,
                       struct error *err)
{
    int ret = api_section_check(s->name, body, err);
    if (!ret && !strcmp(s->name, "drives"))
        ret = root_check(api, body, err);
    if (!ret && s->id)
        ret = element_put(api, s, body, err);
    else if (!ret)
        json_object_set(api->config, s->name, body);
    return ret;
}

static int section_load(struct api *api, const char *name, json_t *value, struct error *err)
{
    const struct api_section *s = section_find(name);
    size_t i;
    json_t *element;
    if (!s)
        return error_set(err, -EINVAL, "unknown field '%.80s'", name);
    if (json_is_null(value))
        return 0;
    if (!s->id) {
        int ret = schema_check(value, s->fields, err);
        return ret ? ret : section_put(api, s, value, err);
    }
    if (!json_is_array(value))
        return error_set(err, -EINVAL, "expected a list");
    json_array_foreach(value, i, element)
    {
        int ret = schema_check(element, s->fields, err);
        ret = ret ? ret : section_put(api, s, element, err);
        if (ret)
            return error_prefix(err, "[%zu]", i);
    }
    return 0;
}

static int configure(struct api *api, json_t *root, struct error *err)
{
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value)
    {
        if (section_load(api, key, value, err))
            return error_prefix(err, "%s", key);
    }
    return 0;
}

static int configure_file(struct api *api, const char *path, struct error *err)
{
    json_error_t jerr;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &jerr);
    if (!root)
        return error_set(err, jerr.line < 0 ? -ENOENT : -EINVAL, "%s:%d:%d: %s", path, jerr.line,
                         jerr.column, jerr.text);
    int ret = json_is_object(root) ? configure(api, root, err)
                                   : error_set(err, -EINVAL, "expected a JSON object");
    json_decref(root);
    return ret ? error_prefix(err, "%s", path) : 0;
}

// --- before the start

static int start_instance(struct api *api, struct error *err)
{
    enum life_state state = life_get(&api->session->life);
    if (state != LIFE_CREATED) // before anything of the machine is described anew
        return error_set(err, -EPERM, "InstanceStart: not possible while the VM is %s",
                         life_name(state));
    if (!json_object_get(api->config, "boot-source"))
        return error_set(err, -EINVAL, "no kernel: PUT /boot-source first");
    int ret = api_machine(api->session, api->config, err);
    return ret ? ret : session_start(api->session, err);
}

#define PUT_SECTION(fn, section)                                                   \
    static void fn(struct control_request *req, json_t *args, void *context)       \
    {                                                                              \
        struct error err;                                                          \
        reply(req, section_put(context, section_find(section), args, &err), &err); \
    }
PUT_SECTION(put_boot, "boot-source")
PUT_SECTION(put_machine, "machine-config")
PUT_SECTION(put_vsock, "vsock")
PUT_SECTION(put_balloon, "balloon")
PUT_SECTION(put_entropy, "entropy")
PUT_SECTION(put_serial, "serial")
PUT_SECTION(put_logger, "logger")
PUT_SECTION(put_metrics, "metrics")
#undef PUT_SECTION

// The id stands in the path and in the body.
static void put_element(struct control_request *req, json_t *args, void *context,
                        const char *section)
{
    struct error err;
    const struct api_section *s = section_find(section);
    const char *id = json_string_value(json_object_get(args, s->id));
    int ret = strcmp(id, control_id(req))
                  ? error_set(&err, -EINVAL, "%s '%s' in the body, '%s' in the path", s->id, id,
                              control_id(req))
                  : section_put(context, s, args, &err);
    reply(req, ret, &err);
}

static void put_drive(struct control_request *req, json_t *args, void *context)
{
    put_element(req, args, context, "drives");
}

static void put_net(struct control_request *req, json_t *args, void *context)
{
    put_element(req, args, context, "network-interfaces");
}

// A partial change of /machine-config: the fields that are there.
static void patch_machine(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    struct error err;
    json_t *now = json_object_get(api->config, "machine-config");
    json_t *merged =
        now ? json_copy(now) : json_pack("{s:i, s:i}", "vcpu_count", 1, "mem_size_mib", 128);
    json_object_update(merged, args);
    reply(req, section_put(api, section_find("machine-config"), merged, &err), &err);
    json_decref(merged);
}

// --- what is there

static const char *instance_state(struct api *api)
{
    enum life_state state = life_get(&api->session->life);
    return state == LIFE_CREATED || state == LIFE_STARTING ? "Not started"
           : state == LIFE_PAUSED                          ? "Paused"
                                                           : "Running";
}

static void get_root(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    control_reply_ok(req, json_pack("{s:s, s:s, s:s, s:s}", "id", api->session->options->name,
                                    "state", instance_state(api), "vmm_version", FERRY_VERSION,
                                    "app_name", "Ferry"));
}

static void get_version(struct control_request *req, json_t *args, void *context)
{
    // The name is what clients look for; the version is ours.
    control_reply_ok(req, json_pack("{s:s}", "firecracker_version", FERRY_VERSION));
}

static json_t *machine_now(const struct api *api)
{
    json_t *machine = json_object_get(api->config, "machine-config");
    const struct vm_options *o = api->session->options;
    json_t *now = json_pack("{s:i, s:I, s:b, s:b, s:s}", "vcpu_count", (int)o->vm.cpus,
                            "mem_size_mib", (json_int_t)(o->vm.ram.size / MiB), "smt", 0,
                            "track_dirty_pages", 0, "huge_pages", "None");
    if (machine)
        json_object_update(now, machine);
    return now;
}

static void get_machine(struct control_request *req, json_t *args, void *context)
{
    control_reply_ok(req, machine_now(context));
}

static void get_config(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    json_t *all = json_copy(api->config);
    json_object_set_new(all, "machine-config", machine_now(api));
    control_reply_ok(req, all);
}

// --- devices of a VM that lives

static struct device *device_of(const struct api *api, const char *kind, const char *id,
                                struct error *err)
{
    const struct vm_options *o = api->session->options;
    for (unsigned i = 0; i < o->nr_devices; i++)
        if (!strcmp(o->devices[i].kind->name, kind) &&
            (!id || (o->devices[i].id && !strcmp(o->devices[i].id, id))))
            return api->session->devices[i];
    error_set(err, -ENOENT, "%s %s: the VM has none", kind, id ? id : "device");
    return NULL;
}

static int device_set(struct device *dev, const char *key, const char *value, struct error *err)
{
    return dev->class->set(dev, key, value, err);
}

// "SIZE/BURST/REFILL_MS", see devices/rate_limit.h.
static int bucket_set(struct device *dev, const char *key, json_t *bucket, struct error *err)
{
    char text[80];
    if (!json_is_object(bucket))
        return 0;
    snprintf(text, sizeof(text), "%lld/%lld/%lld",
             (long long)json_integer_value(json_object_get(bucket, "size")),
             (long long)json_integer_value(json_object_get(bucket, "one_time_burst")),
             (long long)json_integer_value(json_object_get(bucket, "refill_time")));
    return device_set(dev, key, text, err);
}

static int limiter_set(struct device *dev, const char *prefix, json_t *limiter, struct error *err)
{
    char key[32];
    snprintf(key, sizeof(key), "%sbytes-bucket", prefix);
    int ret = bucket_set(dev, key, json_object_get(limiter, "bandwidth"), err);
    snprintf(key, sizeof(key), "%sops-bucket", prefix);
    return ret ? ret : bucket_set(dev, key, json_object_get(limiter, "ops"), err);
}

// Another path would be another disk under the guest's feet; the same one may have a new size.
static int drive_change(struct api *api, json_t *args, struct error *err)
{
    const char *id = json_string_value(json_object_get(args, "drive_id"));
    const char *path = json_string_value(json_object_get(args, "path_on_host"));
    json_t *drives = json_object_get(api->config, "drives");
    json_t *drive = json_array_get(drives, element_find(drives, "drive_id", id));
    struct device *dev = device_of(api, "disk", id, err);
    if (!dev)
        return err->code;
    if (path && strcmp(path, json_string_value(json_object_get(drive, "path_on_host"))))
        return error_set(err, -ENOTSUP, "path_on_host '%s': a running drive keeps its file '%s'",
                         path, json_string_value(json_object_get(drive, "path_on_host")));
    int ret = limiter_set(dev, "", json_object_get(args, "rate_limiter"), err);
    return ret || !path ? ret : device_set(dev, "size", "host", err);
}

static void patch_drive(struct control_request *req, json_t *args, void *context)
{
    struct error err = {0};
    const char *id = json_string_value(json_object_get(args, "drive_id"));
    int ret = strcmp(id, control_id(req))
                  ? error_set(&err, -EINVAL, "drive_id '%s' in the body, '%s' in the path", id,
                              control_id(req))
                  : drive_change(context, args, &err);
    reply(req, ret, &err);
}

static void patch_net(struct control_request *req, json_t *args, void *context)
{
    struct error err = {0};
    struct device *dev = device_of(context, "net", control_id(req), &err);
    int ret =
        dev ? limiter_set(dev, "rx-", json_object_get(args, "rx_rate_limiter"), &err) : err.code;
    if (!ret)
        ret = limiter_set(dev, "tx-", json_object_get(args, "tx_rate_limiter"), &err);
    reply(req, ret, &err);
}

// --- balloon

static void balloon_put(struct control_request *req, struct api *api, json_t *args,
                        const char *field, const char *key, const char *unit)
{
    struct error err = {0};
    char text[32];
    struct device *dev = device_of(api, "balloon", NULL, &err);
    json_t *value = json_object_get(args, field);
    snprintf(text, sizeof(text), "%lld%s", (long long)json_integer_value(value), unit);
    int ret = dev ? device_set(dev, key, text, &err) : err.code;
    if (!ret)
        json_object_set(json_object_get(api->config, "balloon"), field, value);
    reply(req, ret, &err);
}

static void patch_balloon(struct control_request *req, json_t *args, void *context)
{
    balloon_put(req, context, args, "amount_mib", "target", "M");
}

static void patch_balloon_stats(struct control_request *req, json_t *args, void *context)
{
    balloon_put(req, context, args, "stats_polling_interval_s", "stats", "");
}

static void get_balloon(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    struct error err = {0};
    json_t *balloon = json_object_get(api->config, "balloon");
    if (balloon)
        control_reply_ok(req, json_copy(balloon));
    else
        reply(req, error_set(&err, -ENOENT, "the VM has no balloon"), &err);
}

static void get_balloon_stats(struct control_request *req, json_t *args, void *context)
{
    struct error err = {0};
    struct device *dev = device_of(context, "balloon", NULL, &err);
    if (!dev) {
        reply(req, err.code, &err);
        return;
    }
    static const char *const names[][2] = {{"free", "free_memory"},
                                           {"total", "total_memory"},
                                           {"available", "available_memory"},
                                           {"caches", "disk_caches"}};
    json_t *shown = json_object();
    dev->class->show(dev, shown);
    json_t *guest = json_object_get(shown, "guest");
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (json_object_get(guest, names[i][0])) {
            json_object_set(guest, names[i][1], json_object_get(guest, names[i][0]));
            json_object_del(guest, names[i][0]);
        }
    json_int_t target = json_integer_value(json_object_get(shown, "target_bytes"));
    json_int_t actual = json_integer_value(json_object_get(shown, "actual_bytes"));
    json_t *stats =
        json_pack("{s:I, s:I, s:I, s:I}", "target_pages", target / (json_int_t)PAGE_SIZE,
                  "actual_pages", actual / (json_int_t)PAGE_SIZE, "target_mib",
                  target / (json_int_t)MiB, "actual_mib", actual / (json_int_t)MiB);
    json_object_update_missing(stats, guest);
    json_decref(shown);
    control_reply_ok(req, stats);
}

static void patch_hinting_start(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    struct error err = {0};
    json_t *acknowledge = json_object_get(args, "acknowledge_on_stop");
    reply(req, hinting_start(&api->hinting, api->session->vm, !json_is_false(acknowledge), &err),
          &err);
}

static void patch_hinting_stop(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    struct error err = {0};
    struct device *dev = device_of(api, "balloon", NULL, &err);
    if (dev)
        hinting_stop(&api->hinting);
    reply(req, dev ? 0 : err.code, &err);
}

static void get_hinting(struct control_request *req, json_t *args, void *context)
{
    struct error err = {0};
    struct device *dev = device_of(context, "balloon", NULL, &err);
    if (!dev) {
        reply(req, err.code, &err);
        return;
    }
    json_t *shown = json_object();
    dev->class->show(dev, shown);
    json_t *status = json_object();
    json_object_set(status, "host_cmd", json_object_get(shown, "hint_command"));
    json_object_set(status, "guest_cmd", json_object_get(shown, "hint_answer"));
    json_decref(shown);
    control_reply_ok(req, status);
}

void api_vm_gone(struct api *api)
{
    if (api)
        hinting_end(&api->hinting);
}

// --- actions

static int metrics_write(struct api *api, struct error *err)
{
    const char *path =
        json_string_value(json_object_get(json_object_get(api->config, "metrics"), "metrics_path"));
    struct session *s = api->session;
    if (!path)
        return error_set(err, -EINVAL, "no metrics_path: PUT /metrics first");
    autofree char *text = NULL;
    json_t *metrics = session_info(s);
    text = json_dumps(metrics, JSON_COMPACT);
    json_decref(metrics);
    autoclose int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_errno(err, "metrics_path '%s'", path);
    int ret = write_all(fd, text, strlen(text));
    if (!ret)
        ret = write_all(fd, "\n", 1);
    return ret ? error_set(err, ret, "metrics_path '%s': %s", path, strerror(-ret)) : 0;
}

static int running(struct api *api, struct error *err)
{
    enum life_state state = life_get(&api->session->life);
    return state == LIFE_RUNNING
               ? 0
               : error_set(err, -EPERM, "the VM is %s, expected running", life_name(state));
}

static void put_action(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    struct error err = {0};
    const char *action = json_string_value(json_object_get(args, "action_type"));
    int ret;
    if (!strcmp(action, "InstanceStart")) {
        ret = start_instance(api, &err);
    } else if (!strcmp(action, "FlushMetrics")) {
        ret = metrics_write(api, &err);
    } else {
        ret = running(api, &err);
        if (!ret)
            power_button(api->session->board.power);
    }
    reply(req, ret, &err);
}

// --- snapshots

static void put_snapshot_create(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    struct error err = {0};
    struct snapshot_params params;
    const char *type = json_string_value(json_object_get(args, "snapshot_type"));
    const char *path = json_string_value(json_object_get(args, "snapshot_path"));
    const char *memory = json_string_value(json_object_get(args, "mem_file_path"));
    snapshot_params_default(&params, memory ? memory : path);
    api_pair_free(api->pair); // nobody uses it: this route is for a VM that is not being saved
    api->pair = NULL;
    if (memory && api_pair_new(&api->pair, path, api->config, &err)) {
        reply(req, err.code, &err);
        return;
    }
    if (memory) {
        params.taken = api_pair_write;
        params.taken_context = api->pair;
    }
    control_silence(req);
    params.log = type && !strcmp(type, "Diff");
    // Over the last one's own file goes what needs no other.
    params.diff = params.log && migrate_commands_based(api->session->migrate, params.path);
    json_t *machine = json_object_get(api->config, "machine-config");
    params.log |= json_is_true(json_object_get(machine, "track_dirty_pages"));
    migrate_commands_snapshot(api->session->migrate, &params, req);
}

static const char *memory_path(json_t *args)
{
    json_t *backend = json_object_get(args, "mem_backend");
    const char *path = json_string_value(json_object_get(backend, "backend_path"));
    return path ? path : json_string_value(json_object_get(args, "mem_file_path"));
}

static int load_mode(json_t *args, enum lazy_mode *mode, struct error *err)
{
    bool lazy = json_is_true(json_object_get(args, "lazy"));
    bool map = json_is_true(json_object_get(args, "map"));
    *mode = map ? LAZY_MAP : lazy ? LAZY_FAULT : LAZY_NONE;
    return lazy && map ? error_set(err, -EINVAL, "lazy or map, not both") : 0;
}

// Of the two files: the configuration, and `*path` becomes the one with the guest. Of one: `memory`
// may be a configuration by itself.
static int pair_configure(struct api *api, const char **path, const char *memory, struct error *err)
{
    json_t *config;
    int ret = api_pair_read(*path, memory, &config, err);
    if (!ret && !config)
        return memory ? configure_file(api, memory, err) : 0;
    if (!ret)
        ret = configure(api, config, err);
    json_decref(config);
    *path = memory;
    return ret;
}

// What Firecracker's clients say, and a new address: each names an interface of the configuration.
static int net_override(struct api *api, json_t *override, struct error *err)
{
    json_t *nets = json_object_get(api->config, "network-interfaces");
    const char *id = json_string_value(json_object_get(override, "iface_id"));
    json_t *net = json_array_get(nets, element_find(nets, "iface_id", id));
    const char *mac = json_string_value(json_object_get(override, "guest_mac"));
    uint8_t bytes[6];
    char text[18];
    if (!net)
        return error_set(err, -ENOENT, "iface_id '%s': the configuration has none", id);
    int ret = !mac                  ? 0
              : strcmp(mac, "auto") ? virtio_net_parse_mac(mac, bytes, err)
                                    : virtio_net_draw_mac(bytes, err);
    if (ret)
        return ret;
    if (json_is_string(json_object_get(override, "host_dev_name")))
        json_object_set(net, "host_dev_name", json_object_get(override, "host_dev_name"));
    if (!mac)
        return 0;
    snprintf(text, sizeof(text), "%02x:%02x:%02x:%02x:%02x:%02x", bytes[0], bytes[1], bytes[2],
             bytes[3], bytes[4], bytes[5]);
    json_object_set_new(net, "guest_mac", json_string(text));
    return 0;
}

static int net_overrides(struct api *api, json_t *list, struct error *err)
{
    size_t i;
    json_t *override;
    json_array_foreach(list, i, override)
    {
        if (net_override(api, override, err))
            return error_prefix(err, "network_overrides[%zu]", i);
    }
    return 0;
}

// Which of the network devices that is.
static unsigned net_number(const struct vm_options *o, const char *id)
{
    unsigned n = 0;
    for (unsigned i = 0; i < o->nr_devices; i++) {
        if (strcmp(o->devices[i].kind->name, "net"))
            continue;
        if (o->devices[i].id && !strcmp(o->devices[i].id, id))
            break;
        n++;
    }
    return n;
}

// The address that a loaded device brings gives way to the one above.
static int macs_renew(struct api *api, json_t *list, struct error *err)
{
    json_t *nets = json_object_get(api->config, "network-interfaces"), *override;
    struct vm_options *o = api->session->options;
    size_t i;
    char text[64];
    json_array_foreach(list, i, override)
    {
        const char *id = json_string_value(json_object_get(override, "iface_id"));
        json_t *net = json_array_get(nets, element_find(nets, "iface_id", id));
        if (!json_is_string(json_object_get(override, "guest_mac")))
            continue;
        snprintf(text, sizeof(text), "net%u=%s", net_number(o, id),
                 json_string_value(json_object_get(net, "guest_mac")));
        if (new_mac_apply(o, text, err))
            return error_prefix(err, "network_overrides[%zu]", i);
    }
    return 0;
}

static int snapshot_take(struct api *api, json_t *args, struct error *err)
{
    struct session *s = api->session;
    struct snapshot_report report;
    const char *path = json_string_value(json_object_get(args, "snapshot_path"));
    const char *memory = memory_path(args);
    json_t *overrides = json_object_get(args, "network_overrides");
    enum lazy_mode mode;
    int ret = load_mode(args, &mode, err);
    if (ret)
        return ret;
    ret = pair_configure(api, &path, memory, err);
    json_object_del(api->config, "boot-source"); // what boots is in the snapshot
    if (!ret)
        ret = net_overrides(api, overrides, err);
    if (!ret)
        ret = api_machine(s, api->config, err);
    if (!ret)
        ret = macs_renew(api, overrides, err);
    if (!ret)
        ret = session_load(s, path, mode, &report, err);
    bool track = json_is_true(json_object_get(args, "track_dirty_pages")) ||
                 json_is_true(json_object_get(args, "enable_diff_snapshots"));
    if (!ret && s->migrate)
        ret = migrate_commands_base(s->migrate, path, report.id, track, err);
    if (!ret && json_is_true(json_object_get(args, "resume_vm"))) {
        life_move(&s->life, LIFE_RUNNING, NULL);
        vm_resume(s->vm);
    }
    return ret;
}

static void put_snapshot_load(struct control_request *req, json_t *args, void *context)
{
    struct api *api = context;
    struct error err = {0};
    json_t *before = json_deep_copy(api->config);
    int ret = snapshot_take(api, args, &err);
    if (ret && life_get(&api->session->life) == LIFE_CREATED) { // it was not loaded
        json_t *tried = api->config;
        api->config = before;
        before = tried;
    }
    json_decref(before);
    reply(req, ret, &err);
}

// --- routes

static const char *const actions[] = {"InstanceStart", "SendCtrlAltDel", "FlushMetrics", NULL};
static const struct schema_field action_fields[] = {
    {"action_type", SCHEMA_STRING, .required = true, .choices = actions}, {NULL}};
static const struct schema_field machine_patch_fields[] = {
    {"vcpu_count", SCHEMA_INTEGER, .min = 1, .max = VM_MAX_VCPUS},
    {"mem_size_mib", SCHEMA_INTEGER, .min = RAM_MIN / MiB, .max = RAM_MAX / MiB},
    {"smt", SCHEMA_BOOL},
    {"ht_enabled", SCHEMA_BOOL},
    {"track_dirty_pages", SCHEMA_BOOL},
    {NULL},
};
static const struct schema_field patch_drive_fields[] = {
    {"drive_id", SCHEMA_STRING, .required = true, .min = 1, .max = 64},
    {"path_on_host", SCHEMA_STRING, .min = 1},
    {"rate_limiter", SCHEMA_OBJECT, .fields = api_limiter_fields},
    {NULL},
};
static const struct schema_field patch_net_fields[] = {
    {"iface_id", SCHEMA_STRING, .required = true, .min = 1, .max = 64},
    {"rx_rate_limiter", SCHEMA_OBJECT, .fields = api_limiter_fields},
    {"tx_rate_limiter", SCHEMA_OBJECT, .fields = api_limiter_fields},
    {NULL},
};
static const struct schema_field patch_balloon_fields[] = {
    {"amount_mib", SCHEMA_INTEGER, .required = true, .max = RAM_MAX / MiB}, {NULL}};
static const struct schema_field patch_stats_fields[] = {
    {"stats_polling_interval_s", SCHEMA_INTEGER, .required = true, .max = 24 * 3600}, {NULL}};
static const struct schema_field any_fields[] = {{NULL}}; // no field, but a body may be there
static const struct schema_field hinting_fields[] = {{"acknowledge_on_stop", SCHEMA_BOOL}, {NULL}};
static const char *const snapshot_types[] = {"Full", "Diff", NULL};
static const struct schema_field create_fields[] = {
    {"snapshot_path", SCHEMA_STRING, .required = true, .min = 1},
    {"mem_file_path", SCHEMA_STRING, .min = 1},
    {"snapshot_type", SCHEMA_STRING, .choices = snapshot_types},
    {NULL},
};
static const char *const backends[] = {"File", NULL};
static const struct schema_field backend_fields[] = {
    {"backend_type", SCHEMA_STRING, .required = true, .choices = backends},
    {"backend_path", SCHEMA_STRING, .required = true, .min = 1},
    {NULL},
};
static const struct schema_field override_fields[] = {
    {"iface_id", SCHEMA_STRING, .required = true, .min = 1, .max = 64},
    {"host_dev_name", SCHEMA_STRING, .min = 1, .max = IFNAMSIZ - 1},
    {"guest_mac", SCHEMA_STRING, .min = 1, .max = 17},
    {NULL},
};
static const struct schema_field load_fields[] = {
    {"snapshot_path", SCHEMA_STRING, .required = true, .min = 1},
    {"mem_file_path", SCHEMA_STRING, .min = 1},
    {"mem_backend", SCHEMA_OBJECT, .fields = backend_fields},
    {"resume_vm", SCHEMA_BOOL},
    {"track_dirty_pages", SCHEMA_BOOL},
    {"enable_diff_snapshots", SCHEMA_BOOL},
    {"network_overrides", SCHEMA_LIST, .fields = override_fields},
    {"lazy", SCHEMA_BOOL},
    {"map", SCHEMA_BOOL},
    {NULL},
};

// A route takes its section's fields, or fields of its own.
static const struct {
    const char *section;
    struct control_route route;
} routes[] = {
    {NULL, {"GET", "/", "who this is", 0, NULL, get_root, .at_once = true}},
    {NULL, {"GET", "/version", "version", 0, NULL, get_version, .at_once = true}},
    {NULL,
     {"GET", "/vm/config", "everything that was configured", 0, NULL, get_config, .at_once = true}},
    {NULL, {"GET", "/machine-config", "vCPUs and memory", 0, NULL, get_machine, .at_once = true}},
    {"machine-config", {"PUT", "/machine-config", "vCPUs and memory", BEFORE, NULL, put_machine}},
    {NULL, {"PATCH", "/machine-config", "some of it", BEFORE, machine_patch_fields, patch_machine}},
    {"boot-source",
     {"PUT", "/boot-source", "kernel, initrd, command line", BEFORE, NULL, put_boot}},
    {"drives", {"PUT", "/drives/{drive_id}", "a disk", BEFORE, NULL, put_drive}},
    {NULL,
     {"PATCH", "/drives/{drive_id}", "limits, new size", LIVE, patch_drive_fields, patch_drive}},
    {"network-interfaces",
     {"PUT", "/network-interfaces/{iface_id}", "a network device", BEFORE, NULL, put_net}},
    {NULL,
     {"PATCH", "/network-interfaces/{iface_id}", "limits", LIVE, patch_net_fields, patch_net}},
    {"vsock", {"PUT", "/vsock", "sockets between guest and host", BEFORE, NULL, put_vsock}},
    {"balloon", {"PUT", "/balloon", "a memory balloon", BEFORE, NULL, put_balloon}},
    {NULL, {"GET", "/balloon", "as configured", 0, NULL, get_balloon, .at_once = true}},
    {NULL, {"PATCH", "/balloon", "a new target", LIVE, patch_balloon_fields, patch_balloon}},
    {NULL, {"GET", "/balloon/statistics", "what the guest says", LIVE, NULL, get_balloon_stats}},
    {NULL,
     {"PATCH", "/balloon/statistics", "how often it is asked", LIVE, patch_stats_fields,
      patch_balloon_stats}},
    {NULL,
     {"PATCH", "/balloon/hinting/start", "takes the guest's free pages back",
      LIFE_BIT(LIFE_RUNNING), hinting_fields, patch_hinting_start}},
    {NULL, {"GET", "/balloon/hinting/status", "who said what last", LIVE, NULL, get_hinting}},
    {NULL,
     {"PATCH", "/balloon/hinting/stop", "the guest may use its free pages again", LIVE, any_fields,
      patch_hinting_stop}},
    {"entropy", {"PUT", "/entropy", "an entropy device", BEFORE, NULL, put_entropy}},
    {"serial", {"PUT", "/serial", "where COM1 writes", BEFORE, NULL, put_serial}},
    {"logger", {"PUT", "/logger", "how much is logged", BEFORE, NULL, put_logger}},
    {"metrics", {"PUT", "/metrics", "a file for FlushMetrics", BEFORE, NULL, put_metrics}},
    {NULL, {"PUT", "/actions", "start, metrics, power button", 0, action_fields, put_action}},
    {NULL,
     {"PUT", "/snapshot/create", "of a paused VM", LIFE_BIT(LIFE_PAUSED), create_fields,
      put_snapshot_create}},
    {NULL, {"PUT", "/snapshot/load", "instead of a start", BEFORE, load_fields, put_snapshot_load}},
};

int api_routes_add(struct api *api, struct control *control, struct error *err)
{
    int ret = 0;
    for (size_t i = 0; i < ARRAY_SIZE(routes) && !ret; i++) {
        struct control_route route = routes[i].route;
        if (routes[i].section)
            route.fields = section_find(routes[i].section)->fields;
        ret = control_add(control, &route, 1, api, err);
    }
    return ret;
}

int api_create(struct api **out, struct session *session, struct error *err)
{
    struct api *api = calloc(1, sizeof(*api));
    if (!api)
        return error_set(err, -ENOMEM, "no memory for the API");
    api->session = session;
    api->config = json_object();
    for (unsigned i = 0; i < session->options->nr_devices; i++)
        session->options->devices[i].given = true;
    *out = api;
    return 0;
}

int api_take_file(struct session *session, const char *path, struct error *err)
{
    int ret = session->api ? 0 : api_create(&session->api, session, err);
    if (!ret)
        ret = configure_file(session->api, path, err);
    if (!ret && !json_object_get(session->api->config, "boot-source"))
        ret = error_set(err, -EINVAL, "%s: no boot-source", path);
    return ret ? ret : api_machine(session, session->api->config, err);
}

void api_destroy(struct api *api)
{
    if (!api)
        return;
    api_pair_free(api->pair);
    json_decref(api->config);
    free(api);
}

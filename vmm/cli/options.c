// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "devices/virtio_console.h"
#include "sched/client.h"

enum { OPTIONS_MAX = 64, CONFIG_FILE_MAX = 1024 * 1024 };

struct option_row {
    const char *name;
    char brief;        // short form, 0 = none
    unsigned commands; // FOR_...
    bool machine;      // part of what the guest sees: travels with a migration
    const char *arg;   // NULL: a switch
    const char *help;
    int (*set)(struct vm_options *o, const char *value, struct error *err);
    size_t text; // offset of the char * that keeps the value as given, 0 = not kept
    const struct virtio_kind *kind; // a virtio device; then `set` is NULL
};

static int set_text(char **slot, const char *value, struct error *err)
{
    char *copy = strdup(value);
    if (!copy)
        return error_set(err, -ENOMEM, "no memory for '%.40s'", value);
    free(*slot);
    *slot = copy;
    return 0;
}

static int set_bool(bool *slot, const char *value, struct error *err)
{
    if (strcmp(value, "true") && strcmp(value, "false"))
        return error_set(err, -EINVAL, "'%s': expected true or false", value);
    *slot = !strcmp(value, "true");
    return 0;
}

static int set_nothing(struct vm_options *o, const char *value, struct error *err)
{
    return 0; // its text is kept; that is all
}

static int set_insecure(struct vm_options *o, const char *value, struct error *err)
{
    return set_bool(&o->insecure, value, err);
}

static int set_cpus(struct vm_options *o, const char *value, struct error *err)
{
    char *end;
    errno = 0;
    unsigned long n = strtoul(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || errno || !n || n > VM_MAX_VCPUS)
        return error_set(err, -EINVAL, "'%s': expected a number of vCPUs from 1 to %d", value,
                         VM_MAX_VCPUS);
    o->vm.cpus = (unsigned)n;
    return 0;
}

static int set_memory(struct vm_options *o, const char *value, struct error *err)
{
    uint64_t bytes;
    if (size_parse(value, MiB, &bytes) || bytes < RAM_MIN || bytes > RAM_MAX)
        return error_set(err, -EINVAL,
                         "'%s': expected a size from %lluM to %lluG, e.g. 128M or 2G (a plain "
                         "number counts MiB)",
                         value, RAM_MIN / MiB, RAM_MAX / GiB);
    if (bytes % PAGE_SIZE)
        return error_set(err, -EINVAL, "'%s': expected a multiple of 4 KiB", value);
    o->vm.ram.size = bytes;
    return 0;
}

static int set_backing(struct vm_options *o, const char *value, struct error *err)
{
    static const struct {
        const char *name;
        enum ram_backing backing;
        bool thp;
    } kinds[] = {{"anonymous", RAM_ANONYMOUS, false},
                 {"thp", RAM_ANONYMOUS, true},
                 {"memfd", RAM_MEMFD, false},
                 {"hugetlb", RAM_HUGETLB, false}};
    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        if (strcmp(value, kinds[i].name))
            continue;
        o->vm.ram.backing = kinds[i].backing;
        o->vm.ram.thp = kinds[i].thp;
        return 0;
    }
    return error_set(err, -EINVAL, "'%s': expected anonymous, thp, memfd or hugetlb", value);
}

static int set_cpu(struct vm_options *o, const char *value, struct error *err)
{
    return cpu_model_parse(value, &o->vm.cpu, err);
}

static int set_boot(struct vm_options *o, const char *value, struct error *err)
{
    return boot_protocol_parse(value, &o->boot.protocol, err);
}

static int set_console(struct vm_options *o, const char *value, struct error *err)
{
    o->console_given = true;
    return console_parse(value, &o->console, err);
}

static int set_log(struct vm_options *o, const char *value, struct error *err)
{
    static const char *const levels[] = {"error", "warn", "info", "debug"};
    for (size_t i = 0; i < ARRAY_SIZE(levels); i++)
        if (!strcmp(value, levels[i])) {
            o->vm.log_level = (enum log_level)i;
            return 0;
        }
    return error_set(err, -EINVAL, "'%s': expected error, warn, info or debug", value);
}

static int set_stop_timeout(struct vm_options *o, const char *value, struct error *err)
{
    char *end;
    errno = 0;
    unsigned long n = strtoul(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || errno || n > STOP_TIMEOUT_MAX_S)
        return error_set(err, -EINVAL, "'%s': expected seconds, 0 to %d", value,
                         STOP_TIMEOUT_MAX_S);
    o->stop_timeout_s = (unsigned)n;
    return 0;
}

static int set_json(struct vm_options *o, const char *value, struct error *err)
{
    bool json = false;
    int ret = set_bool(&json, value, err);
    o->vm.log_format = json ? LOG_JSON : LOG_TEXT;
    return ret;
}

static int set_on_reboot(struct vm_options *o, const char *value, struct error *err)
{
    if (strcmp(value, "stop") && strcmp(value, "reset"))
        return error_set(err, -EINVAL, "'%s': expected stop or reset", value);
    o->reboots = !strcmp(value, "reset");
    return 0;
}

static int set_log_format(struct vm_options *o, const char *value, struct error *err)
{
    if (strcmp(value, "text") && strcmp(value, "json"))
        return error_set(err, -EINVAL, "'%s': expected text or json", value);
    o->vm.log_format = strcmp(value, "json") ? LOG_TEXT : LOG_JSON;
    return 0;
}

#define SWITCH(member)                                                                  \
    static int set_##member(struct vm_options *o, const char *value, struct error *err) \
    {                                                                                   \
        return set_bool(&o->member, value, err);                                        \
    }
SWITCH(dry_run)
SWITCH(mark)
SWITCH(ucall)
SWITCH(debug_exit)
SWITCH(control)
SWITCH(vmgenid)
SWITCH(lazy)
SWITCH(map)
SWITCH(disks)
#undef SWITCH

static int set_transport(struct vm_options *o, const char *value, struct error *err)
{
    if (strcmp(value, "mmio") && strcmp(value, "pci"))
        return error_set(err, -EINVAL, "'%s': expected mmio or pci", value);
    o->pci = !strcmp(value, "pci");
    return 0;
}

static unsigned devices_of(const struct vm_options *o, const struct virtio_kind *kind)
{
    unsigned n = 0;
    for (unsigned i = 0; i < o->nr_devices; i++)
        n += o->devices[i].kind == kind;
    return n;
}

void options_remove_device(struct vm_options *o, unsigned i)
{
    free(o->devices[i].text);
    free(o->devices[i].id);
    free(o->devices[i].config);
    o->nr_devices--;
    memmove(&o->devices[i], &o->devices[i + 1], (o->nr_devices - i) * sizeof(o->devices[0]));
}

static void devices_remove(struct vm_options *o, const struct virtio_kind *kind)
{
    for (unsigned i = o->nr_devices; i > 0; i--)
        if (o->devices[i - 1].kind == kind)
            options_remove_device(o, i - 1);
}

static int device_room(const struct vm_options *o, const struct virtio_kind *kind,
                       struct error *err)
{
    if (devices_of(o, kind) == kind->max)
        return error_set(err, -E2BIG, "at most %u of this kind", kind->max);
    if (o->nr_devices == VIRTIO_DEVICES_MAX)
        return error_set(err, -E2BIG, "at most %d devices in all", VIRTIO_DEVICES_MAX);
    return 0;
}

// Behind those of its kind and of the kinds before; see devices/virtio_kinds.h.
int options_add_device(struct vm_options *o, const struct virtio_kind *kind, const char *text,
                       const char *id, struct virtio_attach *config, struct error *err)
{
    struct device_option new = {.kind = kind, .config = config};
    int ret = device_room(o, kind, err);
    if (!ret)
        ret = set_text(&new.text, text, err);
    if (!ret && id)
        ret = set_text(&new.id, id, err);
    if (ret) {
        free(new.text);
        free(config);
        return ret;
    }
    unsigned i = o->nr_devices++;
    for (; i > 0 && o->devices[i - 1].kind > kind; i--)
        o->devices[i] = o->devices[i - 1];
    o->devices[i] = new;
    return 0;
}

static int set_device(struct vm_options *o, const struct virtio_kind *kind, const char *value,
                      struct error *err)
{
    bool wanted = true;
    if (!kind->parse) { // a switch: said again, it is still one device
        int ret = set_bool(&wanted, value, err);
        if (ret)
            return ret;
        devices_remove(o, kind);
        if (!wanted)
            return 0;
        value = "";
    }
    struct virtio_attach *config = calloc(1, kind->config_size);
    int ret = !config       ? error_set(err, -ENOMEM, "no memory for a device")
              : kind->parse ? kind->parse(value, config, err)
                            : 0;
    if (ret) {
        free(config);
        return ret;
    }
    ret = options_add_device(o, kind, value, NULL, config, err);
    return ret && *value ? error_prefix(err, "'%s'", value) : ret;
}

static int set_trace(struct vm_options *o, const char *value, struct error *err)
{
    return set_bool(&o->vm.trace, value, err);
}

static int set_seccomp(struct vm_options *o, const char *value, struct error *err)
{
    return seccomp_mode_parse(value, &o->vm.seccomp, err);
}

static int set_weight(struct vm_options *o, const char *value, struct error *err)
{
    return sched_weight_parse(value, &o->share, err);
}

static int set_cap(struct vm_options *o, const char *value, struct error *err)
{
    return sched_cap_parse(value, &o->share, err);
}

static int set_affinity(struct vm_options *o, const char *value, struct error *err)
{
    return sched_affinity_parse(value, &o->share, err);
}

static int set_jail(struct vm_options *o, const char *value, struct error *err)
{
    return jail_parse(value, &o->jail, err);
}

static int set_config(struct vm_options *o, const char *value, struct error *err)
{
    return options_load(o, FOR_RUN, value, err);
}

#define TEXT(member) offsetof(struct vm_options, member)

static const struct option_row rows[] = {
    {"kernel", 'k', FOR_RUN, false, "FILE", "vmlinux, bzImage, PVH or multiboot ELF, raw image",
     set_nothing, TEXT(kernel)},
    {"initrd", 'i', FOR_RUN, false, "FILE", "initial RAM disk", set_nothing, TEXT(initrd)},
    {"append", 'a', FOR_RUN, false, "TEXT", "kernel command line", set_nothing, TEXT(append)},
    {"boot", 'b', FOR_RUN, false, "PROTOCOL",
     "auto (default), linux64, pvh, bzimage (the guest unpacks itself), multiboot, real", set_boot,
     0},
    {"cpus", 'c', FOR_RUN, true, "N", "vCPUs, 1 to 64 (default 1)", set_cpus, 0},
    {"memory", 'm', FOR_RUN, true, "SIZE", "guest memory, e.g. 128M, 2G (default 128M)", set_memory,
     TEXT(memory)},
    {"cpu", 'C', FOR_RUN, true, "MODEL", "host, or host,-FLAG,... to hide features", set_cpu,
     TEXT(cpu)},
    {"backing", 'B', FOR_ALL, false, "KIND",
     "guest memory from: anonymous (default), thp, memfd, hugetlb", set_backing, 0},
    {"numa", 'N', FOR_ALL, false, "POLICY", "bind:NODES, interleave:NODES or preferred:NODE",
     set_nothing, TEXT(numa)},
    {"console", 'o', FOR_ALL, false, "WHERE",
     "stdio[,escape=KEY] (default), file:PATH[,append], pty[,link=PATH], unix:PATH, fd:N, null",
     set_console, 0},
    {NULL}, // here come the virtio devices
    {"transport", 0, FOR_RUN, true, "KIND", "how the guest finds them: mmio (default) or pci",
     set_transport, 0},
    {"vmgenid", 0, FOR_RUN, true, "BOOL",
     "a generation id that tells the guest of a restore: true (default) or false", set_vmgenid, 0},
    {"name", 'n', FOR_ALL, false, "NAME",
     "name of the VM and its control socket (default ferry-PID)", set_nothing, TEXT(name)},
    {"listen", 'l', FOR_RECEIVE, false, "ADDRESS", "tcp:HOST:PORT to wait on", set_nothing,
     TEXT(listen)},
    {"tls", 0, FOR_RECEIVE, false, "DIR",
     "take guests over TLS only: DIR has ca.pem, cert.pem and key.pem", set_nothing, TEXT(tls)},
    {"tls-ca", 0, FOR_RECEIVE, false, "FILE", "the CA that signed the other side's certificate",
     set_nothing, TEXT(tls_ca)},
    {"tls-cert", 0, FOR_RECEIVE, false, "FILE", "this side's certificate", set_nothing,
     TEXT(tls_cert)},
    {"tls-key", 0, FOR_RECEIVE, false, "FILE", "its private key", set_nothing, TEXT(tls_key)},
    {"psk", 0, FOR_RECEIVE, false, "FILE",
     "the same with a key that both sides share: one line, NAME:HEX DIGITS", set_nothing,
     TEXT(psk)},
    {"insecure", 0, FOR_RECEIVE, false, NULL,
     "take guests in clear from other hosts, whoever sends them", set_insecure, 0},
    {"api-sock", 0, FOR_ALL, false, "PATH",
     "a further socket for the API; a run without kernel waits there to be configured", set_nothing,
     TEXT(api_sock)},
    {"config-file", 0, FOR_RUN, false, "FILE", "a VM as microVM tools describe it, started at once",
     set_nothing, TEXT(config_file)},
    {"id", 0, FOR_RUN, false, "NAME", "the same as --name", set_nothing, TEXT(name)},
    {"metrics-listen", 0, FOR_ALL, false, "ADDRESS",
     "[tcp:][HOST:]PORT where Prometheus gets /metrics, and nobody anything else (HOST: 127.0.0.1)",
     set_nothing, TEXT(metrics_listen)},
    {"checkpoints", 0, FOR_RUN | FOR_RESTORE, false, "DIR[,...]",
     "save the guest to DIR now and then, go on from there if this process dies: DIR"
     "[,mtbf=SPAN|,interval=SPAN][,keep=N][,hourly=N][,restarts=N]",
     set_nothing, TEXT(checkpoints)},
    {"newest", 0, FOR_RESTORE, false, "DIR", "restore the newest whole checkpoint in DIR",
     set_nothing, TEXT(newest)},
    {"lazy", 0, FOR_RESTORE, false, NULL,
     "start at once: pages are read, checked and unpacked when they are touched; what was touched "
     "first is kept in FILE.ws and fetched ahead the next time",
     set_lazy, 0},
    {"map", 0, FOR_RESTORE, false, NULL,
     "start at once: map FILE (of the mapped layout); VMs share its pages until they write; "
     "unchecked (ferry snapshot verify)",
     set_map, 0},
    {"disks", 0, FOR_RESTORE, false, NULL,
     "use the disks that FILE names, with a copy of each overlay that was saved with it "
     "(FILE.diskN."
     "NAME); it is trusted to name the right files",
     set_disks, 0},
    {"new-mac", 0, FOR_RESTORE, false, "[DEV=]MAC",
     "give network devices other addresses than they had: auto (one is drawn for each), or MAC, "
     "for "
     "net0, or DEVICE=MAC,... ; the guest takes it when its driver begins anew",
     set_nothing, TEXT(new_mac)},
    {"control", 0, FOR_ALL, false, "BOOL", "open the control socket: true (default) or false",
     set_control, 0},
    {"stop-timeout", 0, FOR_ALL, false, "SECONDS",
     "SIGTERM presses the power button and leaves the guest so long to end (default 10; 0: none)",
     set_stop_timeout, 0},
    {"on-reboot", 0, FOR_RUN, false, "WHAT",
     "a guest that reboots, or whose processor faults three times over: stop (default) or reset",
     set_on_reboot, 0},
    {"trace", 't', FOR_ALL, false, NULL, "print each exit, and a table of them at the end",
     set_trace, 0},
    {"log", 0, FOR_ALL, false, "LEVEL", "error, warn, info (default), debug", set_log, 0},
    {"log-format", 0, FOR_ALL, false, "KIND",
     "text (default) or json; with priorities where stderr is systemd's journal", set_log_format,
     0},
    {"sched", 0, FOR_ALL, false, "SOCKET",
     "the scheduler to be scheduled by: auto (default: " SCHED_SOCKET " if it is there), off",
     set_nothing, TEXT(sched)},
    {"weight", 0, FOR_ALL, false, "N", "its weight there, 1 to 65535 (default 256)", set_weight, 0},
    {"cap", 0, FOR_ALL, false, "PERCENT", "at most that of one pCPU (default 0: no limit)", set_cap,
     0},
    {"affinity", 0, FOR_ALL, false, "PCPUS",
     "run only on these, e.g. 0-3,8; soft:0-3 for rather there; or both, with a /", set_affinity,
     0},
    {"jail", 0, FOR_RUN, false, "DIR[,...]",
     "see only the folder DIR: DIR[,uid=N,gid=N][,net=keep|own][,cgroup=PATH[,FILE=VALUE]...]",
     set_jail, 0},
    {"seccomp", 0, FOR_ALL, false, "MODE",
     "filter the system calls of each thread: on (default), off, or log what a filter would stop",
     set_seccomp, 0},
    {"json", 'j', FOR_ALL, false, NULL, "the same as --log-format json", set_json, 0},
    {"ucall", 0, FOR_RUN, true, NULL, "answer the test guests of guest/bare", set_ucall, 0},
    {"debug-exit", 0, FOR_RUN, true, NULL, "let the guest end the VM through port 0xf4",
     set_debug_exit, 0},
    {"mark", 0, FOR_RUN, false, NULL, "print when the guest writes to port 0xe84 first", set_mark,
     0},
    {"dry-run", 0, FOR_RUN, false, NULL, "check everything, print the configuration, start nothing",
     set_dry_run, 0},
    {"config", 0, FOR_RUN, false, "FILE", "JSON object with these options' names as keys",
     set_config, 0},
};

void options_init(struct vm_options *o)
{
    *o = (struct vm_options) {.control = true, .vmgenid = true, .stop_timeout_s = STOP_TIMEOUT_S};
    o->vm.cpus = 1;
    o->vm.ram.size = 128 * MiB;
    o->vm.log_level = LOG_INFO;
    o->vm.seccomp = SECCOMP_DEFAULT;
    console_parse("stdio", &o->console, NULL);
}

void options_free(struct vm_options *o)
{
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        if (!rows[i].text)
            continue;
        char **text = (char **)((char *)o + rows[i].text);
        free(*text);
        *text = NULL; // two options may share it
    }
    while (o->nr_devices)
        options_remove_device(o, o->nr_devices - 1);
    *o = (struct vm_options) {0};
}

// Every option: the rows above, with those of the virtio devices in their place.
struct option_table {
    struct option_row rows[OPTIONS_MAX];
    unsigned nr;
};

static void options_table(struct option_table *t)
{
    t->nr = 0;
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        if (rows[i].name) {
            t->rows[t->nr++] = rows[i];
            continue;
        }
        const struct virtio_kind *kind;
        for (unsigned k = 0; (kind = virtio_kind_at(k)); k++)
            t->rows[t->nr++] = (struct option_row) {.name = kind->name,
                                                    .brief = kind->brief,
                                                    .commands = kind->machine ? FOR_RUN : FOR_ALL,
                                                    .machine = kind->machine,
                                                    .arg = kind->arg,
                                                    .help = kind->help,
                                                    .kind = kind};
    }
}
_Static_assert(ARRAY_SIZE(rows) + VIRTIO_KINDS_MAX <= OPTIONS_MAX - 1, "room for every option");

static int row_apply(struct vm_options *o, const struct option_row *row, const char *value,
                     struct error *err)
{
    int ret = row->kind ? set_device(o, row->kind, value, err) : row->set(o, value, err);
    if (!ret && row->text)
        ret = set_text((char **)((char *)o + row->text), value, err);
    return ret;
}

int options_set(struct vm_options *o, unsigned command, const char *name, const char *value,
                struct error *err)
{
    struct option_table table;
    options_table(&table);
    for (unsigned i = 0; i < table.nr; i++)
        if (!strcmp(table.rows[i].name, name) && (table.rows[i].commands & command)) {
            int ret = row_apply(o, &table.rows[i], value, err);
            return ret ? error_prefix(err, "%s", name) : 0;
        }
    return error_set(err, -EINVAL, "unknown option '%s'", name);
}

// --- command line

enum { HELP_INDENT = 27, HELP_WIDTH = 100 };

// A long text goes on below itself, broken before a space or a bracket.
static void help_text(const char *text)
{
    enum { ROOM = HELP_WIDTH - HELP_INDENT };
    while (strlen(text) > ROOM) {
        size_t cut = ROOM;
        while (cut > 1 && text[cut] != ' ' && text[cut] != '[')
            cut--;
        if (cut == 1)
            cut = ROOM;
        printf("%.*s\n%*s", (int)cut, text, HELP_INDENT, "");
        text += cut + (text[cut] == ' ');
    }
    printf("%s\n", text);
}

static void help(const struct option_table *t, unsigned command, const char *usage)
{
    printf("usage: %s\n\n", usage);
    for (const struct option_row *row = t->rows; row < t->rows + t->nr; row++) {
        if (!(row->commands & command))
            continue;
        char left[40], brief[8] = "    ";
        snprintf(left, sizeof(left), "--%s%s%s", row->name, row->arg ? " " : "",
                 row->arg ? row->arg : "");
        if (row->brief)
            snprintf(brief, sizeof(brief), "-%c, ", row->brief);
        printf("  %s%-20s ", brief, left);
        help_text(row->help);
    }
    printf("  -h, %-20s %s\n", "--help", "this text");
}

static unsigned getopt_tables(const struct option_table *t, unsigned command, struct option *longs,
                              char *shorts)
{
    unsigned n = 0;
    *shorts++ = ':'; // we word the errors ourselves
    for (unsigned i = 0; i < t->nr; i++) {
        const struct option_row *row = &t->rows[i];
        if (!(row->commands & command))
            continue;
        longs[n++] = (struct option) {row->name, row->arg ? required_argument : no_argument, NULL,
                                      256 + (int)i};
        if (row->brief) {
            *shorts++ = row->brief;
            if (row->arg)
                *shorts++ = ':';
        }
    }
    longs[n++] = (struct option) {"help", no_argument, NULL, 'h'};
    *shorts++ = 'h';
    *shorts = 0;
    longs[n] = (struct option) {0};
    return n;
}

static const struct option_row *row_of(const struct option_table *t, int c)
{
    if (c >= 256)
        return &t->rows[c - 256];
    for (unsigned i = 0; i < t->nr; i++)
        if (t->rows[i].brief == c)
            return &t->rows[i];
    return NULL;
}

static unsigned terminal_readers(const struct virtio_attach *config)
{
    const struct virtio_console_config *c = (const void *)config;
    unsigned n = 0;
    for (unsigned i = 0; i < c->nr_ports; i++)
        n += c->ports[i].present && c->ports[i].where.kind == CONSOLE_STDIO;
    return n;
}

// The terminal has one reader. A --vconsole on it takes it from a --console that was not asked for.
static int options_settle(struct vm_options *o, struct error *err)
{
    unsigned readers = 0;
    for (unsigned i = 0; i < o->nr_devices; i++)
        if (o->devices[i].kind->class == &virtio_console_class)
            readers += terminal_readers(o->devices[i].config);
    if (readers && !o->console_given)
        console_parse("null", &o->console, NULL);
    else
        readers += o->console.kind == CONSOLE_STDIO;
    return readers <= 1 ? 0
                        : error_set(err, -EINVAL,
                                    "%u consoles and ports on stdio: it can serve one", readers);
}

int options_parse(struct vm_options *o, unsigned command, int argc, char **argv, const char *usage,
                  char **positional, int max, struct error *err)
{
    struct option longs[OPTIONS_MAX];
    char shorts[2 * OPTIONS_MAX];
    struct option_table table;
    options_table(&table);
    getopt_tables(&table, command, longs, shorts);
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
        if (c == 'h') {
            help(&table, command, usage);
            return 1;
        }
        if (c == ':')
            return error_set(err, -EINVAL, "%s needs a value (ferry %s --help)", argv[optind - 1],
                             argv[0]);
        if (c == '?' && optopt >= 256)
            return error_set(err, -EINVAL, "%s: this option takes no value", argv[optind - 1]);
        if (c == '?')
            return error_set(err, -EINVAL, "unknown option '%s' (ferry %s --help)",
                             argv[optind - 1], argv[0]);
        const struct option_row *row = row_of(&table, c);
        int ret = row_apply(o, row, row->arg ? optarg : "true", err);
        if (ret)
            return error_prefix(err, "--%s", row->name);
    }
    for (int i = 0; optind < argc; i++, optind++) {
        if (i >= max)
            return error_set(err, -EINVAL, "unexpected argument '%s' (ferry %s --help)",
                             argv[optind], argv[0]);
        positional[i] = argv[optind];
    }
    return options_settle(o, err);
}

// --- JSON

static int json_option(struct vm_options *o, unsigned command, const char *key, json_t *value,
                       struct error *err)
{
    char number[32];
    size_t i;
    json_t *element;
    if (json_is_array(value)) { // an option that may be repeated
        int ret = 0;
        json_array_foreach(value, i, element)
        {
            if (!json_is_string(element))
                return error_set(err, -EINVAL, "%s: expected an array of strings", key);
            ret = ret ? ret : options_set(o, command, key, json_string_value(element), err);
        }
        return ret;
    }
    if (json_is_string(value))
        return options_set(o, command, key, json_string_value(value), err);
    if (json_is_boolean(value))
        return options_set(o, command, key, json_is_true(value) ? "true" : "false", err);
    if (json_is_integer(value)) {
        snprintf(number, sizeof(number), "%lld", (long long)json_integer_value(value));
        return options_set(o, command, key, number, err);
    }
    return error_set(err, -EINVAL, "%s: expected a string, an integer, true or false", key);
}

int options_load(struct vm_options *o, unsigned command, const char *path, struct error *err)
{
    json_error_t jerr;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &jerr);
    if (!root)
        return jerr.line < 0 ? error_set(err, -ENOENT, "%s: %s", path, jerr.text)
                             : error_set(err, -EINVAL, "%s:%d:%d: %s", path, jerr.line, jerr.column,
                                         jerr.text);
    int ret = 0;
    const char *key;
    json_t *value;
    if (!json_is_object(root))
        ret = error_set(err, -EINVAL, "expected a JSON object");
    json_object_foreach(root, key, value)
    {
        if (!strcmp(key, "config"))
            ret = error_set(err, -EINVAL, "a config file cannot name another");
        if (!ret)
            ret = json_option(o, command, key, value, err);
    }
    json_decref(root);
    return ret ? error_prefix(err, "%s", path) : 0;
}

// The devices of one kind: true for a switch, else their texts.
static json_t *devices_json(const struct vm_options *o, const struct virtio_kind *kind)
{
    if (!kind->parse)
        return json_true();
    json_t *texts = json_array();
    for (unsigned i = 0; i < o->nr_devices; i++)
        if (o->devices[i].kind == kind)
            json_array_append_new(texts, json_string(o->devices[i].text));
    return texts;
}

static void devices_describe(const struct vm_options *o, bool machine, json_t *json)
{
    for (unsigned i = 0; i < o->nr_devices; i++) {
        const struct virtio_kind *kind = o->devices[i].kind;
        if (kind->machine == machine && (!i || o->devices[i - 1].kind != kind))
            json_object_set_new(json, kind->name, devices_json(o, kind));
    }
}

static json_t *machine_json(const struct vm_options *o)
{
    json_t *json =
        json_pack("{s:i, s:s, s:s, s:b, s:b, s:b, s:s}", "cpus", (int)o->vm.cpus, "memory",
                  o->memory ? o->memory : "128M", "cpu", o->cpu ? o->cpu : "host", "ucall",
                  (int)o->ucall, "debug-exit", (int)o->debug_exit, "vmgenid", (int)o->vmgenid,
                  "transport", o->pci ? "pci" : "mmio");
    devices_describe(o, true, json);
    return json;
}

char *options_describe(const struct vm_options *o)
{
    json_t *json = machine_json(o);
    char *text = json_dumps(json, JSON_COMPACT);
    json_decref(json);
    return text;
}

static const struct option_row *machine_row(const struct option_table *t, const char *name)
{
    for (unsigned i = 0; i < t->nr; i++)
        if (t->rows[i].machine && !strcmp(t->rows[i].name, name))
            return &t->rows[i];
    return NULL;
}

int options_machine(struct vm_options *o, const char *text, struct error *err)
{
    struct option_table table;
    options_table(&table);
    json_error_t jerr;
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, &jerr);
    if (!json_is_object(root)) {
        json_decref(root);
        return error_set(err, -EBADMSG, "machine description is not a JSON object: %.200s", text);
    }
    for (unsigned i = 0; i < table.nr; i++) // of a machine that was described before
        if (table.rows[i].machine && table.rows[i].kind)
            devices_remove(o, table.rows[i].kind);
    int ret = 0;
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value)
    {
        if (!ret && !machine_row(&table, key))
            ret = error_set(err, -ENOTSUP, "'%s' is not known here", key);
        if (!ret)
            ret = json_option(o, FOR_RUN, key, value, err);
    }
    json_decref(root);
    return ret ? error_prefix(err, "machine description") : 0;
}

json_t *options_json(const struct vm_options *o)
{
    json_t *json = machine_json(o);
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        const char *text = rows[i].text ? *(char *const *)((const char *)o + rows[i].text) : NULL;
        if (text)
            json_object_set_new(json, rows[i].name, json_string(text));
    }
    devices_describe(o, false, json);
    json_object_set_new(json, "boot", json_string(boot_protocol_name(o->boot.protocol)));
    json_object_set_new(json, "on-reboot", json_string(o->reboots ? "reset" : "stop"));
    return json;
}

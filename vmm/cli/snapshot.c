// SPDX-License-Identifier: Apache-2.0
// ferry snapshot: create, and what is done with the files.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "migrate/snapshot.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/jail.h"
#include "vmm/cli/registry.h"
#include "vmm/control.h"
#include "vmm/util.h"

static const char usage[] =
    "ferry snapshot [create] NAME FILE [--diff] [--parent FILE] [--layout packed|mapped]\n"
    "                      [--compress lz4|none] [--disks] [--json]\n"
    "       ferry snapshot ls [DIR] [--json]\n"
    "       ferry snapshot verify FILE [--json]\n"
    "       ferry snapshot merge FILE -o OUT [--layout packed|mapped] [--compress lz4|none] "
    "[--json]\n"
    "       ferry snapshot rm FILE\n\n"
    "create  saves a VM to FILE. --diff: only what changed since its last snapshot, or since\n"
    "        --parent, a snapshot of this VM in the same directory.\n"
    "        --layout mapped: uncompressed, each page at its place, to be mapped by a restore.\n"
    "        --disks: the overlays as they are at that instant, too, in FILE.disk0, ... (for\n"
    "        `ferry restore FILE --disks`).\n"
    "ls      the snapshots of a directory, children below their parents.\n"
    "verify  reads FILE and its parents and checks every byte.\n"
    "merge   makes one full snapshot of FILE and its parents.\n"
    "rm      removes FILE, its working set and frozen overlays, unless another snapshot needs "
    "it.\n\n"
    "example: ferry snapshot web web.1; ferry snapshot web web.2 --diff; ferry restore web.2";

struct args {
    bool json, diff, disks;
    const char *parent, *out, *layout, *compress;
    char *word[2];
    int words;
};

// `options`: those that the command has, by the characters below.
static int parse(int argc, char **argv, const char *options, int least, int most, struct args *args,
                 struct error *err)
{
    static const struct option longs[] = {
        {"json", no_argument, NULL, 'j'},           {"diff", no_argument, NULL, 'd'},
        {"parent", required_argument, NULL, 'p'},   {"layout", required_argument, NULL, 'l'},
        {"compress", required_argument, NULL, 'c'}, {"disks", no_argument, NULL, 'D'},
        {"help", no_argument, NULL, 'h'},           {0}};
    *args = (struct args) {0};
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, ":o:h", longs, NULL)) != -1) {
        if (c == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        }
        if (c == ':')
            return error_set(err, -EINVAL, "option '%s' needs a value", argv[optind - 1]);
        if (c == '?' || !strchr(options, c))
            return error_set(err, -EINVAL, "unknown option '%s' (ferry snapshot --help)",
                             argv[optind - 1]);
        args->json |= c == 'j';
        args->diff |= c == 'd' || c == 'p';
        args->disks |= c == 'D';
        args->parent = c == 'p' ? optarg : args->parent;
        args->layout = c == 'l' ? optarg : args->layout;
        args->compress = c == 'c' ? optarg : args->compress;
        args->out = c == 'o' ? optarg : args->out;
    }
    args->words = argc - optind;
    if (args->words < least || args->words > most)
        return error_set(err, -EINVAL, "%d arguments, expected %d (ferry snapshot --help)",
                         args->words, most);
    for (int i = 0; i < args->words; i++)
        args->word[i] = argv[optind + i];
    return 0;
}

static int form_take(const struct args *args, struct snapshot_params *p, struct error *err)
{
    if (args->layout && strcmp(args->layout, "mapped") && strcmp(args->layout, "packed"))
        return error_set(err, -EINVAL, "--layout %s: expected packed or mapped", args->layout);
    if (args->compress && strcmp(args->compress, "lz4") && strcmp(args->compress, "none"))
        return error_set(err, -EINVAL, "--compress %s: expected lz4 or none", args->compress);
    if (args->layout && !strcmp(args->layout, "mapped")) {
        p->layout = SNAPFILE_MAPPED;
        p->compress = SNAPFILE_NONE;
    }
    if (args->compress)
        p->compress = !strcmp(args->compress, "lz4") ? SNAPFILE_LZ4 : SNAPFILE_NONE;
    return 0;
}

static int finish(json_t *result, bool json)
{
    if (json) {
        json_dumpf(result, stdout, JSON_INDENT(2));
        printf("\n");
    } else {
        cli_print_members(result);
    }
    json_decref(result);
    return EXIT_OK;
}

// --- create

// The VM's working directory is not ours, nor may its root be.
static json_t *whole_path(const char *name, const char *path)
{
    char whole[PATH_MAX];
    registry_path(name, path, whole);
    return json_string(whole);
}

// What a VM in a jail says of its file is the name there.
static void path_outside(const char *name, json_t *result)
{
    struct jail_config jail;
    char outside[PATH_MAX];
    const char *path = json_string_value(json_object_get(result, "path"));
    if (!path || !registry_jail(name, &jail, NULL, NULL))
        return;
    jail_outside(&jail, path, outside);
    json_object_set_new(result, "path", json_string(outside));
}

static int create(int argc, char **argv, struct error *err)
{
    struct args args;
    struct snapshot_params form;
    char path[108];
    json_t *result = NULL;
    int ret = parse(argc, argv, "jdplcD", 2, 2, &args, err);
    if (ret)
        return ret;
    ret = form_take(&args, &form, err);
    if (!ret)
        ret = control_path(args.word[0], path, sizeof(path), err);
    if (ret)
        return ret;
    json_t *request = json_pack("{s:o}", "path", whole_path(args.word[0], args.word[1]));
    if (args.diff)
        json_object_set_new(request, "diff", json_true());
    if (args.disks)
        json_object_set_new(request, "disks", json_true());
    if (args.parent)
        json_object_set_new(request, "parent", whole_path(args.word[0], args.parent));
    if (args.layout)
        json_object_set_new(request, "layout", json_string(args.layout));
    if (args.compress)
        json_object_set_new(request, "compress", json_string(args.compress));
    ret = control_call(path, "PUT", "/snapshot/file", request, &result, NULL, NULL, err);
    json_decref(request);
    if (!ret)
        path_outside(args.word[0], result);
    if (!ret)
        finish(result ? result : json_object(), args.json);
    return ret;
}

// --- verify, merge, rm

static const char *kind_name(enum snapfile_kind kind)
{
    return kind == SNAPFILE_DIFF ? "diff" : "full";
}

static json_t *report_json(const char *path, const struct snapshot_report *r)
{
    json_t *object = json_pack("{s:s, s:s}", "path", path, "kind", kind_name(r->kind));
    const struct {
        const char *name;
        uint64_t value;
    } counts[] = {{"files", r->depth},
                  {"data_pages", r->data_pages},
                  {"zero_pages", r->zero_pages},
                  {"file_bytes", r->file_bytes},
                  {"state_bytes", r->state_bytes},
                  {"total_us", r->total_ns / 1000}};
    for (size_t i = 0; i < ARRAY_SIZE(counts); i++)
        json_object_set_new(object, counts[i].name, json_integer((json_int_t)counts[i].value));
    return object;
}

static int verify(int argc, char **argv, struct error *err)
{
    struct args args;
    struct snapshot_report report;
    int ret = parse(argc, argv, "j", 1, 1, &args, err);
    if (!ret)
        ret = snapshot_verify(args.word[0], &report, err);
    if (!ret)
        finish(report_json(args.word[0], &report), args.json);
    return ret;
}

static int merge(int argc, char **argv, struct error *err)
{
    struct args args;
    struct snapshot_params params;
    struct snapshot_report report;
    int ret = parse(argc, argv, "jlco", 1, 1, &args, err);
    if (!ret && !args.out)
        ret = error_set(err, -EINVAL, "-o OUT is needed (ferry snapshot --help)");
    if (ret)
        return ret;
    snapshot_params_default(&params, args.out);
    ret = form_take(&args, &params, err);
    if (!ret)
        ret = snapshot_merge(args.word[0], &params, &report, err);
    if (!ret)
        finish(report_json(args.out, &report), args.json);
    return ret;
}

static int rm(int argc, char **argv, struct error *err)
{
    struct args args;
    int ret = parse(argc, argv, "", 1, 1, &args, err);
    return ret ? ret : snapshot_remove(args.word[0], err);
}

// --- ls

struct entry {
    char name[SNAPFILE_NAME_MAX];
    struct snapfile_info info;
    uint64_t disk_bytes;
    char why[ERROR_TEXT_MAX]; // damaged
    const struct entry *parent;
    bool lost; // a diff without it
};

struct list {
    struct entry *entries;
    size_t nr;
};

static int list_add(struct list *l, int dir_fd, const char *dir, const char *name,
                    struct error *err)
{
    char path[PATH_MAX];
    struct entry e = {0};
    struct error why;
    struct stat st;
    if (strlen(name) >= sizeof(e.name) || fstatat(dir_fd, name, &st, 0) || !S_ISREG(st.st_mode) ||
        (size_t)snprintf(path, sizeof(path), "%s/%s", dir, name) >= sizeof(path))
        return 0;
    int ret = snapfile_peek(path, &e.info, &why);
    if (ret && (ret == -EINVAL || ret == -ENODATA || ret == -ENOENT) &&
        strstr(why.text, "not a ferry snapshot"))
        return 0;
    if (ret)
        snprintf(e.why, sizeof(e.why), "%s", why.text);
    strcpy(e.name, name);
    e.disk_bytes = (uint64_t)st.st_blocks * 512;
    struct entry *more = realloc(l->entries, (l->nr + 1) * sizeof(e));
    if (!more)
        return error_set(err, -ENOMEM, "no memory");
    l->entries = more;
    l->entries[l->nr++] = e;
    return 0;
}

static int by_age(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    int64_t d = x->info.created_s - y->info.created_s;
    return d ? (d > 0) - (d < 0) : strcmp(x->name, y->name);
}

static void parents_find(struct list *l)
{
    qsort(l->entries, l->nr, sizeof(l->entries[0]), by_age);
    for (struct entry *e = l->entries; e < l->entries + l->nr; e++) {
        e->lost = e->info.kind == SNAPFILE_DIFF;
        for (const struct entry *p = l->entries; e->lost && p < l->entries + l->nr; p++) {
            if (*p->why || p == e || strcmp(p->name, e->info.parent) ||
                memcmp(p->info.id, e->info.parent_id, sizeof(p->info.id)))
                continue;
            e->parent = p;
            e->lost = false;
        }
    }
}

static int list_read(struct list *l, const char *path, struct error *err)
{
    DIR *dir = opendir(path);
    const struct dirent *d;
    int ret = 0;
    if (!dir)
        return error_errno(err, "directory %s", path);
    while (!ret && (d = readdir(dir)))
        ret = list_add(l, dirfd(dir), path, d->d_name, err);
    closedir(dir);
    if (!ret && l->nr)
        parents_find(l);
    return ret;
}

static json_t *entry_json(const struct entry *e)
{
    const struct snapfile_info *i = &e->info;
    if (*e->why)
        return json_pack("{s:s, s:s, s:s}", "name", e->name, "state", "damaged", "why", e->why);
    char id[2 * SNAPFILE_ID_LEN + 1];
    for (unsigned k = 0; k < SNAPFILE_ID_LEN; k++)
        snprintf(id + 2 * k, 3, "%02x", i->id[k]);
    json_t *object = json_pack("{s:s, s:s, s:s, s:s, s:s, s:s}", "name", e->name, "state",
                               e->lost ? "orphan" : "ok", "id", id, "kind", kind_name(i->kind),
                               "layout", i->layout == SNAPFILE_MAPPED ? "mapped" : "packed",
                               "compress", i->compress == SNAPFILE_LZ4 ? "lz4" : "none");
    json_object_set_new(object, "parent", *i->parent ? json_string(i->parent) : json_null());
    json_object_set_new(object, "created_s", json_integer(i->created_s));
    json_object_set_new(object, "memory_bytes", json_integer((json_int_t)(i->pages * PAGE_SIZE)));
    json_object_set_new(object, "data_pages", json_integer((json_int_t)i->data_pages));
    json_object_set_new(object, "zero_pages", json_integer((json_int_t)i->zero_pages));
    json_object_set_new(object, "file_bytes", json_integer((json_int_t)i->file_bytes));
    json_object_set_new(object, "disk_bytes", json_integer((json_int_t)e->disk_bytes));
    return object;
}

static void entry_print(const struct entry *e, unsigned indent)
{
    const struct snapfile_info *i = &e->info;
    char age[CLI_DURATION], name[SNAPFILE_NAME_MAX + 2 * SNAPFILE_DEPTH_MAX];
    snprintf(name, sizeof(name), "%*s%s", (int)(2 * indent), "", e->name);
    if (*e->why) {
        printf("%-28s damaged: %s\n", name, e->why);
        return;
    }
    cli_duration(time(NULL) - i->created_s, age);
    printf("%-28s %-4s %-6s %-4s %6s %9llu %9llu %9llu", name, kind_name(i->kind),
           i->layout == SNAPFILE_MAPPED ? "mapped" : "packed",
           i->compress == SNAPFILE_LZ4 ? "lz4" : "none", age,
           (unsigned long long)(i->pages * PAGE_SIZE >> 20),
           (unsigned long long)(i->data_pages * PAGE_SIZE >> 10),
           (unsigned long long)(e->disk_bytes >> 10));
    if (e->lost)
        printf("  its parent %s is missing", i->parent);
    printf("\n");
}

// Those below `parent`. A circle has no top, so nobody comes by it.
static void tree_print(const struct list *l, const struct entry *parent, unsigned indent)
{
    for (const struct entry *e = l->entries; e < l->entries + l->nr; e++) {
        if (e->parent != parent)
            continue;
        entry_print(e, indent);
        if (indent < SNAPFILE_DEPTH_MAX)
            tree_print(l, e, indent + 1);
    }
}

static int ls(int argc, char **argv, struct error *err)
{
    struct args args;
    struct list l = {0};
    int ret = parse(argc, argv, "j", 0, 1, &args, err);
    if (!ret)
        ret = list_read(&l, args.words ? args.word[0] : ".", err);
    if (!ret && args.json) {
        json_t *all = json_array();
        for (size_t i = 0; i < l.nr; i++)
            json_array_append_new(all, entry_json(&l.entries[i]));
        finish(json_pack("{s:o}", "snapshots", all), true);
    } else if (!ret && l.nr) {
        printf("%-28s %-4s %-6s %-4s %6s %9s %9s %9s\n", "NAME", "KIND", "LAYOUT", "LZ", "AGE",
               "MEM-MIB", "DATA-KIB", "DISK-KIB");
        tree_print(&l, NULL, 0);
    }
    free(l.entries);
    return ret;
}

int cli_snapshot(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv, struct error *err);
    } commands[] = {
        {"create", create}, {"ls", ls}, {"verify", verify}, {"merge", merge}, {"rm", rm}};
    struct error err = {0};
    int ret = 0;
    for (size_t i = 0; argc > 1 && i < ARRAY_SIZE(commands); i++) {
        if (strcmp(argv[1], commands[i].name))
            continue;
        ret = commands[i].run(argc - 1, argv + 1, &err);
        return ret < 0 ? cli_fail(&err) : EXIT_OK;
    }
    ret = create(argc, argv, &err);
    return ret < 0 ? cli_fail(&err) : EXIT_OK;
}

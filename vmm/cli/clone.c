// SPDX-License-Identifier: Apache-2.0
// ferry clone: children of a running VM. The parent is saved to memory (mapped layout) while it
// runs; each child is a `ferry restore --map` of that file, so that all share its pages until they
// write. The file's name goes once all have it open.
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "vmm/cli/cli.h"
#include "vmm/cli/jail.h"
#include "vmm/cli/registry.h"
#include "vmm/control.h"
#include "vmm/util.h"

enum { CLONES_MAX = 256, CLONE_WAIT_S = 60, EXTRA_MAX = 64, BASES_MAX = 32 };

static const char usage[] =
    "ferry clone NAME [--count N] [--name PREFIX] [--dir DIR] [--new-mac] [--json]\n"
    "            [-- RESTORE OPTIONS]\n"
    "       ferry clone --from FILE [--count N] --name PREFIX [--new-mac] [--json]\n"
    "            [-- RESTORE OPTIONS]\n\n"
    "Makes N (default 1) VMs as NAME is at this moment, which goes on: PREFIX1, PREFIX2, ...\n"
    "(default NAME-). They share its memory, as it was, until they write to it; each has a copy "
    "of\n"
    "its disks' overlays, which are all it may write, and a new VM generation id.\n\n"
    "      --dir DIR    where memory and overlays are put (default /dev/shm; of a VM in a jail: "
    "there,\n"
    "                   as are the clones)\n"
    "      --from FILE  clones of a snapshot (of the mapped layout), whose name stays\n"
    "      --new-mac    each network device of each clone has a new address, for its driver's "
    "next\n"
    "                   begin (`restore --new-mac auto`)\n"
    "  -j, --json       what was made, as JSON\n\n"
    "What follows -- goes to each `ferry restore`, with {} for the child's number: the network, "
    "say,\n"
    "which has no default where NAME has one.\n"
    "example: ferry clone web --count 8 --name worker -- --net tap=tap{}";

struct clone {
    unsigned count;
    const char *prefix, *dir, *from, *parent;
    bool json, new_mac;
    char **extra;
    int nr_extra;
    struct jail_config jail; // the parent's; dir empty: none
    char *jail_text;
    json_t *bases;
    int folder_fd;                         // of a folder that others may write to
    char folder[PATH_MAX], file[PATH_MAX]; // file: what the children map
    json_t *saved;                         // the parent's report
    char default_prefix[80];
};

struct child {
    pid_t pid;
    unsigned number;
    char name[80], log[PATH_MAX], socket[108];
};

static int clone_option(struct clone *c, int option, struct error *err)
{
    char *end;
    unsigned long count;
    switch (option) {
    case 'c':
        count = strtoul(optarg, &end, 10);
        if (*end || end == optarg || !count || count > CLONES_MAX)
            return error_set(err, -EINVAL, "--count %s: expected 1 to %d", optarg, CLONES_MAX);
        c->count = (unsigned)count;
        return 0;
    case 'n':
        c->prefix = optarg;
        return 0;
    case 'd':
        c->dir = optarg;
        return 0;
    case 'f':
        c->from = optarg;
        return 0;
    case 'j':
        c->json = true;
        return 0;
    case 'm':
        c->new_mac = true;
        return 0;
    case ':':
        return error_set(err, -EINVAL, "an option lacks its value (ferry clone --help)");
    default:
        return error_set(err, -EINVAL, "unknown option (ferry clone --help)");
    }
}

static int clone_parse(struct clone *c, int argc, char **argv, struct error *err)
{
    static const struct option longs[] = {
        {"count", required_argument, NULL, 'c'}, {"name", required_argument, NULL, 'n'},
        {"dir", required_argument, NULL, 'd'},   {"from", required_argument, NULL, 'f'},
        {"json", no_argument, NULL, 'j'},        {"new-mac", no_argument, NULL, 'm'},
        {"help", no_argument, NULL, 'h'},        {0}};
    int words = 0, option;
    while (words < argc && strcmp(argv[words], "--"))
        words++;
    c->extra = argv + words + 1;
    c->nr_extra = words < argc ? argc - words - 1 : 0;
    opterr = 0;
    optind = 0;
    while ((option = getopt_long(words, argv, ":jh", longs, NULL)) != -1) {
        if (option == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        }
        int ret = clone_option(c, option, err);
        if (ret)
            return ret;
    }
    if (words - optind != !c->from || (c->from && !c->prefix) || c->nr_extra > EXTRA_MAX)
        return error_set(err, -EINVAL,
                         "expected NAME, or --from FILE and --name (ferry clone "
                         "--help)");
    c->parent = c->from ? NULL : argv[optind];
    if (c->parent && registry_jail(c->parent, &c->jail, &c->jail_text, &c->bases)) {
        if (!c->jail_text)
            return error_set(err, -ENOMEM, "no memory");
        if (json_array_size(c->bases) > BASES_MAX)
            return error_set(err, -E2BIG, "%s has more than %d images", c->parent, BASES_MAX);
    } else if (!c->dir) {
        c->dir = "/dev/shm";
    }
    if (!c->prefix) {
        snprintf(c->default_prefix, sizeof(c->default_prefix), "%.60s-", c->parent);
        c->prefix = c->default_prefix;
    }
    return 0;
}

// --- the parent

static int parent_save(struct clone *c, struct error *err)
{
    char path[108];
    int ret = control_path(c->parent, path, sizeof(path), err);
    if (ret)
        return ret;
    if ((size_t)snprintf(c->folder, sizeof(c->folder), "%s/ferry-clone-XXXXXX", c->dir) >=
            sizeof(c->folder) - 16 ||
        !mkdtemp(c->folder))
        return error_errno(err, "--dir %s", c->dir);
    snprintf(c->file, sizeof(c->file), "%.*s/memory", PATH_MAX - 16, c->folder);
    json_t *request = json_pack("{s:s, s:s, s:b}", "path", c->file, "layout", "mapped", "disks", 1);
    ret = control_call(path, "PUT", "/snapshot/file", request, &c->saved, NULL, NULL, err);
    json_decref(request);
    if (ret)
        rmdir(c->folder);
    return ret;
}

// A parent in a jail saves itself there, and its children are in the same one.
static int jailed_save(struct clone *c, struct error *err)
{
    char path[108], inside[PATH_MAX];
    const char *dir = c->dir ? c->dir : c->jail.dir;
    if (!jail_inside(&c->jail, dir, inside))
        return error_set(err, -EINVAL, "--dir %s: %s is in the jail %s: expected a folder there",
                         dir, c->parent, c->jail.dir);
    int ret = control_path(c->parent, path, sizeof(path), err);
    if (!ret)
        ret = jail_folder(&c->jail, dir, "ferry-clone", &c->folder_fd, c->folder, err);
    if (ret)
        return ret;
    snprintf(c->file, sizeof(c->file), "%.*s/memory", PATH_MAX - 16, c->folder);
    jail_inside(&c->jail, c->file, inside);
    json_t *request = json_pack("{s:s, s:s, s:b}", "path", inside, "layout", "mapped", "disks", 1);
    ret = control_call(path, "PUT", "/snapshot/file", request, &c->saved, NULL, NULL, err);
    json_decref(request);
    if (ret)
        rmdir(c->folder);
    return ret;
}

// The children have it open. The folder stays if their overlays are in it.
static void parent_forget(struct clone *c)
{
    char name[PATH_MAX + 16];
    if (!*c->folder)
        return;
    int at = c->folder_fd > 0 ? c->folder_fd : open(c->folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
    unlinkat(at, "memory", 0);
    for (unsigned i = 0; i < 32; i++) { // the frozen overlays, which every child has copied
        snprintf(name, sizeof(name), "memory.disk%u", i);
        unlinkat(at, name, 0);
    }
    close(at);
    rmdir(c->folder);
}

// --- the children

// "tap={}" of child 3 is "tap=3". The process is short: nobody frees it.
static char *numbered(char *text, unsigned number)
{
    const char *at = strstr(text, "{}");
    char *out;
    return at && asprintf(&out, "%.*s%u%s", (int)(at - text), text, number, at + 2) > 0 ? out
                                                                                        : text;
}

static int child_spawn(struct clone *c, struct child *child, struct error *err)
{
    static char program[] = "/proc/self/exe", new_mac[] = "--new-mac", drawn[] = "auto";
    char *argv[EXTRA_MAX + 2 * BASES_MAX + 16] = {"ferry",     "restore",   c->file,
                                                  "--map",     "--disks",   "--name",
                                                  child->name, "--console", "null"};
    unsigned n = 9;
    if (c->new_mac) {
        argv[n++] = new_mac;
        argv[n++] = drawn;
    }
    if (c->jail_text) {
        size_t k;
        json_t *base;
        argv[n++] = "--jail";
        argv[n++] = c->jail_text;
        json_array_foreach(c->bases, k, base)
        {
            argv[n++] = "--base";
            argv[n++] = (char *)(uintptr_t)json_string_value(base);
        }
    }
    for (int i = 0; i < c->nr_extra; i++)
        argv[n++] = numbered(c->extra[i], child->number);
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attr;
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attr);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 1, child->log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&files, 1, 2);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSID);
    int ret = posix_spawn(&child->pid, program, &files, &attr, argv, environ);
    posix_spawnattr_destroy(&attr);
    posix_spawn_file_actions_destroy(&files);
    return ret ? error_set(err, -ret, "cannot start %s: %s", child->name, strerror(ret)) : 0;
}

// Its last line says why.
static int child_died(const struct child *child, struct error *err)
{
    char text[1024] = "";
    autoclose int fd = open(child->log, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
    text[n < 0 ? 0 : n] = 0;
    text[strcspn(text, "\n")] = 0;
    return error_set(err, -ECHILD, "%s did not start: %s", child->name, text);
}

// Until its socket answers.
static int child_wait(const struct child *child, uint64_t limit, struct error *err)
{
    json_t *info = NULL;
    int status, ret;
    for (;;) { // the socket has its name a moment before anybody listens on it
        ret = access(child->socket, F_OK)
                  ? -ENOENT
                  : control_call(child->socket, "GET", "/info", NULL, &info, NULL, NULL, err);
        if (ret != -ENOENT && ret != -ECONNREFUSED)
            break;
        if (waitpid(child->pid, &status, WNOHANG) == child->pid)
            return child_died(child, err);
        if (time_ns() > limit)
            return error_set(err, -ETIMEDOUT, "%s does not start (%s)", child->name, child->log);
        poll(NULL, 0, 1);
    }
    json_decref(info);
    return ret && waitpid(child->pid, &status, WNOHANG) == child->pid ? child_died(child, err)
                                                                      : ret;
}

static int child_name(const struct clone *c, struct child *child, unsigned i, struct error *err)
{
    struct stat st;
    child->number = i + 1;
    if ((size_t)snprintf(child->name, sizeof(child->name), "%s%u", c->prefix, i + 1) >=
        sizeof(child->name))
        return error_set(err, -ENAMETOOLONG, "--name %s: too long", c->prefix);
    int ret = control_path(child->name, child->socket, sizeof(child->socket), err);
    if (!ret && !stat(child->socket, &st))
        ret = error_set(err, -EEXIST, "there is a VM %s (choose another --name)", child->name);
    size_t stem = strlen(child->socket) - (ret ? 0 : strlen(".sock"));
    snprintf(child->log, sizeof(child->log), "%.*s.log", (int)stem, child->socket);
    return ret;
}

// All or none.
static int children_make(struct clone *c, struct child *children, struct error *err)
{
    unsigned made = 0;
    int ret = 0;
    for (; made < c->count && !ret; made++)
        ret = child_spawn(c, &children[made], err);
    uint64_t limit = time_ns() + CLONE_WAIT_S * 1000000000ull;
    for (unsigned i = 0; i < c->count && !ret; i++)
        ret = child_wait(&children[i], limit, err);
    for (unsigned i = 0; ret && i < made; i++)
        if (children[i].pid > 0)
            kill(children[i].pid, SIGKILL);
    return ret;
}

static int clone_run(struct clone *c, struct child *children, struct error *err)
{
    uint64_t start = time_ns();
    int ret = 0;
    for (unsigned i = 0; i < c->count && !ret; i++)
        ret = child_name(c, &children[i], i, err);
    if (!ret && c->parent)
        ret = *c->jail.dir ? jailed_save(c, err) : parent_save(c, err);
    else if (!ret && !realpath(c->from, c->file))
        ret = error_errno(err, "%s", c->from);
    if (ret)
        return ret;
    uint64_t saved = time_ns();
    ret = children_make(c, children, err);
    parent_forget(c);
    if (ret)
        return ret;
    json_t *result = json_object(), *names = json_array();
    for (unsigned i = 0; i < c->count; i++)
        json_array_append_new(names, json_string(children[i].name));
    json_object_set_new(result, "clones", names);
    if (c->saved)
        json_object_set(result, "pause_us", json_object_get(c->saved, "pause_us"));
    json_object_set_new(result, "save_us", json_integer((json_int_t)((saved - start) / 1000)));
    json_object_set_new(result, "total_us", json_integer((json_int_t)((time_ns() - start) / 1000)));
    if (c->json) {
        json_dumpf(result, stdout, JSON_INDENT(2));
        printf("\n");
    } else {
        cli_print_members(result);
    }
    json_decref(result);
    return 0;
}

int cli_clone(int argc, char **argv)
{
    struct clone c = {.count = 1};
    struct error err = {0};
    int ret = clone_parse(&c, argc, argv, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    autofree struct child *children = calloc(c.count, sizeof(*children));
    ret = children ? clone_run(&c, children, &err) : error_set(&err, -ENOMEM, "no memory");
    json_decref(c.saved);
    json_decref(c.bases);
    free(c.jail_text);
    return ret ? cli_fail(&err) : EXIT_OK;
}

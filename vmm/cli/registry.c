// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/registry.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "devices/virtio_vsock.h"
#include "vmm/cli/session.h"

enum { RECORD_MAX = 64 * 1024, PATH_SIZE = 108 };

// NAME.json beside NAME.sock.
static int record_path(const char *name, char path[PATH_SIZE], struct error *err)
{
    int ret = control_path(name, path, PATH_SIZE, err);
    if (!ret)
        strcpy(strrchr(path, '.'), ".json"); // as long as ".sock"
    return ret;
}

// When a process started, in the kernel's ticks: a pid that was given to another has another.
// 0: there is no such process.
static unsigned long long start_ticks(pid_t pid)
{
    char path[48], text[1024];
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (n <= 0)
        return 0;
    text[n] = 0;
    // Field 2, the name in parentheses, may hold anything: count from its end. 3 is the state.
    char *p = strrchr(text, ')');
    char state = p ? p[2] : 'X';
    for (int field = 2; p && field < 22; field++)
        p = strchr(p + 1, ' ');
    return p && state != 'Z' && state != 'X' ? strtoull(p, NULL, 10) : 0;
}

// --- writing

static void file_add(json_t *files, const char *path)
{
    char *whole = path && *path ? realpath(path, NULL) : NULL;
    if (whole)
        json_array_append_new(files, json_string(whole));
    free(whole);
}

static json_t *record_of(const struct session *s)
{
    const struct vm_options *o = s->options;
    json_t *files = json_array();
    file_add(files, o->api_sock);
    for (unsigned i = 0; i < o->nr_devices; i++)
        if (o->devices[i].kind->class == &virtio_vsock_class) {
            const struct virtio_vsock_config *c = (const void *)o->devices[i].config;
            file_add(files, c->path);
        }
    json_t *record =
        json_pack("{s:s, s:i, s:I, s:i, s:I, s:o}", "name", o->name, "pid", (int)getpid(),
                  "start_ticks", (json_int_t)start_ticks(getpid()), "cpus", (int)o->vm.cpus,
                  "memory_bytes", (json_int_t)o->vm.ram.size, "files", files);
    if (o->jail_text) {
        json_object_set_new(record, "jail", json_string(o->jail_text));
        json_object_set_new(record, "shared", json_string(o->jail.shared));
        json_object_set_new(record, "bases", outside_bases(o));
    }
    if (o->supervisor)
        json_object_set_new(record, "supervisor",
                            json_pack("{s:i, s:I}", "pid", (int)o->supervisor, "start_ticks",
                                      (json_int_t)start_ticks(o->supervisor)));
    return record;
}

int registry_write(const struct session *s, struct error *err)
{
    char path[PATH_SIZE], temporary[PATH_SIZE + 8];
    int ret = record_path(s->options->name, path, err);
    if (ret)
        return ret;
    snprintf(temporary, sizeof(temporary), "%s.tmp", path);
    json_t *record = record_of(s);
    autofree char *text = json_dumps(record, JSON_COMPACT);
    autoclose int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    // In one call: a guest that is restored waits for it.
    if (fd < 0 || !text || write_all(fd, text, strlen(text)) || rename(temporary, path))
        ret = error_errno(err, "record of VM %s", path);
    json_decref(record);
    return ret;
}

void registry_remove(const char *name)
{
    char path[PATH_SIZE];
    if (!record_path(name, path, NULL))
        unlink(path);
}

// --- reading

static json_t *record_read(const char *path)
{
    autofree char *text = malloc(RECORD_MAX);
    autoclose int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    ssize_t n = text && fd >= 0 ? read(fd, text, RECORD_MAX) : -1;
    json_t *record = n > 0 ? json_loadb(text, (size_t)n, 0, NULL) : NULL;
    if (json_is_object(record))
        return record;
    json_decref(record);
    return json_object();
}

// Who listens on a VM's socket; 0: nobody.
static pid_t listener(const char *name)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    struct ucred peer = {0};
    socklen_t len = sizeof(peer);
    if (control_path(name, addr.sun_path, sizeof(addr.sun_path), NULL))
        return 0;
    autoclose int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof(addr)) ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len))
        return 0;
    return peer.pid;
}

// The process that a record, or a part of it, tells of; 0: it is gone.
static pid_t process_of(const json_t *record)
{
    pid_t pid = (pid_t)json_integer_value(json_object_get(record, "pid"));
    unsigned long long ticks =
        (unsigned long long)json_integer_value(json_object_get(record, "start_ticks"));
    return pid > 0 && ticks && start_ticks(pid) == ticks ? pid : 0;
}

static void entry_read(struct registry_entry *e, const char *name)
{
    char path[PATH_SIZE];
    *e = (struct registry_entry) {.fate = REGISTRY_DEAD};
    snprintf(e->name, sizeof(e->name), "%s", name);
    e->record = record_path(name, path, NULL) ? json_object() : record_read(path);
    e->pid = (pid_t)json_integer_value(json_object_get(e->record, "pid"));
    e->supervisor = process_of(json_object_get(e->record, "supervisor"));
    if (process_of(e->record)) {
        e->fate = REGISTRY_ALIVE;
        return;
    }
    pid_t pid = listener(name); // one that wrote no record, or just now
    if (pid) {
        e->pid = pid;
        e->fate = REGISTRY_ALIVE;
    }
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct registry_entry *)a)->name,
                  ((const struct registry_entry *)b)->name);
}

static int entry_add(struct registry *r, const char *file)
{
    char name[64];
    const char *dot = strrchr(file, '.');
    if (!dot || (strcmp(dot, ".sock") && strcmp(dot, ".json")) || dot == file ||
        dot - file >= (ptrdiff_t)sizeof(name))
        return 0;
    memcpy(name, file, (size_t)(dot - file));
    name[dot - file] = 0;
    if (registry_find(r, name))
        return 0;
    struct registry_entry *grown = realloc(r->entries, (r->nr + 1) * sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    r->entries = grown;
    entry_read(&grown[r->nr++], name);
    return 0;
}

int registry_scan(struct registry *r, struct error *err)
{
    char path[PATH_SIZE];
    *r = (struct registry) {0};
    int ret = control_path("x", path, sizeof(path), err);
    if (ret)
        return ret;
    *strrchr(path, '/') = 0;
    DIR *dir = opendir(path);
    if (!dir)
        return error_errno(err, "%s", path);
    struct dirent *d;
    while (!ret && (d = readdir(dir)))
        ret = entry_add(r, d->d_name);
    closedir(dir);
    if (ret) {
        registry_free(r);
        return error_set(err, ret, "no memory for the list of VMs");
    }
    if (r->nr)
        qsort(r->entries, r->nr, sizeof(*r->entries), by_name);
    return 0;
}

bool registry_jail(const char *name, struct jail_config *config, char **text, json_t **bases)
{
    char path[PATH_SIZE];
    json_t *record = record_path(name, path, NULL) ? json_object() : record_read(path);
    const char *jail = json_string_value(json_object_get(record, "jail"));
    const char *shared = json_string_value(json_object_get(record, "shared"));
    bool is = jail && !jail_parse(jail, config, NULL);
    if (is)
        snprintf(config->shared, sizeof(config->shared), "%s", shared ? shared : "");
    if (is && text)
        *text = strdup(jail);
    if (is && bases)
        *bases = json_incref(json_object_get(record, "bases"));
    json_decref(record);
    return is;
}

void registry_path(const char *name, const char *path, char whole[PATH_MAX])
{
    struct jail_config jail;
    autofree char *cwd = *path == '/' ? NULL : getcwd(NULL, 0);
    char named[PATH_MAX];
    snprintf(named, sizeof(named), "%s%s%s", cwd ? cwd : "", cwd ? "/" : "", path);
    if (registry_jail(name, &jail, NULL, NULL))
        jail_inside(&jail, named, whole);
    else
        memcpy(whole, named, sizeof(named));
}

void registry_free(struct registry *r)
{
    for (size_t i = 0; i < r->nr; i++)
        json_decref(r->entries[i].record);
    free(r->entries);
    *r = (struct registry) {0};
}

const struct registry_entry *registry_find(const struct registry *r, const char *name)
{
    for (size_t i = 0; i < r->nr; i++)
        if (!strcmp(r->entries[i].name, name))
            return &r->entries[i];
    return NULL;
}

// --- what is left of a dead one

// Only sockets, and our own two files: a record is no leave to remove anything else.
static void leftover_add(json_t *list, const char *path, bool ours)
{
    struct stat st;
    if (!path || lstat(path, &st) || !(S_ISSOCK(st.st_mode) || (ours && S_ISREG(st.st_mode))))
        return;
    json_array_append_new(
        list, json_pack("{s:s, s:I}", "path", path, "bytes", (json_int_t)st.st_blocks * 512));
}

json_t *registry_leftovers(const struct registry_entry *e)
{
    json_t *list = json_array(), *file;
    char path[PATH_SIZE];
    size_t i;
    if (e->fate != REGISTRY_DEAD)
        return list;
    if (!control_path(e->name, path, sizeof(path), NULL))
        leftover_add(list, path, true);
    if (!record_path(e->name, path, NULL))
        leftover_add(list, path, true);
    json_array_foreach(json_object_get(e->record, "files"), i, file)
        leftover_add(list, json_string_value(file), false);
    return list;
}

unsigned registry_clean(const struct registry_entry *e)
{
    json_t *list = registry_leftovers(e), *file;
    unsigned removed = 0;
    size_t i;
    json_array_foreach(list, i, file) removed +=
        !unlink(json_string_value(json_object_get(file, "path")));
    json_decref(list);
    return removed;
}

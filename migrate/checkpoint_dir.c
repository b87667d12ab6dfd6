// SPDX-License-Identifier: Apache-2.0
#include "migrate/checkpoint_dir.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "vmm/util.h"

static bool name_parse(const char *name, uint32_t *number)
{
    static const char prefix[] = "checkpoint-";
    if (strncmp(name, prefix, sizeof(prefix) - 1))
        return false;
    const char *digits = name + sizeof(prefix) - 1;
    size_t len = strspn(digits, "0123456789");
    if (len < 6 || len > 9 || strcmp(digits + len, ".snap"))
        return false;
    *number = (uint32_t)strtoul(digits, NULL, 10);
    return true;
}

static void name_make(uint32_t number, char name[CHECKPOINT_NAME_MAX])
{
    snprintf(name, CHECKPOINT_NAME_MAX, "checkpoint-%06u.snap", number);
}

static int by_number(const void *a, const void *b)
{
    const struct checkpoint_file *x = a, *y = b;
    return (x->number > y->number) - (x->number < y->number);
}

static int entry_add(struct checkpoint_dir *dir, const char *name, unsigned *room,
                     struct error *err)
{
    uint32_t number;
    if (!name_parse(name, &number))
        return 0;
    if (dir->nr == CHECKPOINT_FILES_MAX)
        return error_set(err, -E2BIG, "%s: more than %d checkpoints", dir->path,
                         CHECKPOINT_FILES_MAX);
    if (dir->nr == *room) {
        *room = *room ? 2 * *room : 64;
        struct checkpoint_file *more = realloc(dir->files, *room * sizeof(*more));
        if (!more)
            return error_set(err, -ENOMEM, "no memory for a list of checkpoints");
        dir->files = more;
    }
    struct checkpoint_file *file = &dir->files[dir->nr];
    char path[PATH_MAX];
    *file = (struct checkpoint_file) {.number = number};
    snprintf(file->name, sizeof(file->name), "%s", name);
    int ret = checkpoint_dir_file(dir, file, path, err);
    if (ret)
        return ret;
    file->readable = !snapfile_peek(path, &file->info, NULL);
    dir->nr++;
    return 0;
}

int checkpoint_dir_read(struct checkpoint_dir *dir, const char *path, struct error *err)
{
    unsigned room = 0;
    *dir = (struct checkpoint_dir) {0};
    if ((size_t)snprintf(dir->path, sizeof(dir->path), "%s", path) >= sizeof(dir->path))
        return error_set(err, -ENAMETOOLONG, "%.100s...: name too long", path);
    DIR *stream = opendir(path);
    if (!stream)
        return error_errno(err, "checkpoints in %s", path);
    int ret = 0;
    struct dirent *entry;
    while (!ret && (entry = readdir(stream)))
        ret = entry_add(dir, entry->d_name, &room, err);
    closedir(stream);
    if (ret)
        checkpoint_dir_free(dir);
    else if (dir->nr)
        qsort(dir->files, dir->nr, sizeof(dir->files[0]), by_number);
    return ret;
}

void checkpoint_dir_free(struct checkpoint_dir *dir)
{
    free(dir->files);
    dir->files = NULL;
    dir->nr = 0;
}

static int path_make(const struct checkpoint_dir *dir, const char *name, char *path,
                     struct error *err)
{
    if ((size_t)snprintf(path, PATH_MAX, "%s/%s", dir->path, name) >= PATH_MAX)
        return error_set(err, -ENAMETOOLONG, "%.100s...: name too long", dir->path);
    return 0;
}

int checkpoint_dir_file(const struct checkpoint_dir *dir, const struct checkpoint_file *file,
                        char *path, struct error *err)
{
    return path_make(dir, file->name, path, err);
}

int checkpoint_dir_next(const struct checkpoint_dir *dir, char *path, struct error *err)
{
    uint32_t number = dir->nr ? dir->files[dir->nr - 1].number + 1 : 1;
    char name[CHECKPOINT_NAME_MAX];
    if (number > CHECKPOINT_NUMBER_MAX)
        return error_set(err, -EOVERFLOW, "%s: numbers end at %d", dir->path,
                         CHECKPOINT_NUMBER_MAX);
    name_make(number, name);
    return path_make(dir, name, path, err);
}

// --- what may go

static int32_t parent_find(const struct checkpoint_item *items, const struct checkpoint_dir *dir,
                           unsigned nr, const struct checkpoint_file *file)
{
    uint32_t number;
    if (file->info.kind != SNAPFILE_DIFF || !name_parse(file->info.parent, &number))
        return -1;
    for (unsigned i = nr; i > 0; i--)
        if (items[i - 1].number == number)
            return (int32_t)i - 1;
    return -1;
}

// Its frozen overlays (migrate/disks.h) go with it; what a guest made of one, FILE.diskN.NAME, may
// be in use.
static bool file_remove(const char *path)
{
    if (snapfile_remove(path, NULL))
        return false;
    char disk[PATH_MAX];
    for (unsigned i = 0; i < CHECKPOINT_DISKS; i++)
        if ((size_t)snprintf(disk, sizeof(disk), "%s.disk%u", path, i) < sizeof(disk))
            unlink(disk);
    if ((size_t)snprintf(disk, sizeof(disk), "%s.ws", path) < sizeof(disk))
        unlink(disk); // of a lazy restore
    return true;
}

// "checkpoint-000007.snap.disk0", of a checkpoint that is not there.
static bool is_orphan(const struct checkpoint_dir *dir, const char *name)
{
    const char *tail = strstr(name, ".snap.disk");
    char of[CHECKPOINT_NAME_MAX];
    uint32_t number;
    size_t len = tail ? (size_t)(tail - name) + 5 : sizeof(of);
    if (len >= sizeof(of) || !tail[10] || tail[10 + strspn(tail + 10, "0123456789")])
        return false;
    memcpy(of, name, len);
    of[len] = 0;
    if (!name_parse(of, &number))
        return false;
    for (unsigned i = 0; i < dir->nr; i++)
        if (dir->files[i].number == number)
            return false;
    return true;
}

// What a process that was killed had no time to remove.
static void orphans_remove(const struct checkpoint_dir *dir)
{
    char path[PATH_MAX];
    struct dirent *entry;
    DIR *stream = opendir(dir->path);
    while (stream && (entry = readdir(stream))) {
        char *tail = strstr(entry->d_name, ".snap.tmp-"); // of a merge
        if (is_orphan(dir, entry->d_name) && !path_make(dir, entry->d_name, path, NULL))
            unlink(path);
        if (tail && !strncmp(entry->d_name, "checkpoint-", 11)) {
            tail[5] = 0;
            if (!path_make(dir, entry->d_name, path, NULL))
                snapfile_clean(path);
        }
    }
    if (stream)
        closedir(stream);
}

// What is damaged is left for somebody to look at. To be freed; NULL: no memory.
static struct checkpoint_item *items_judge(const struct checkpoint_dir *dir,
                                           const struct checkpoint_settings *settings, int64_t now,
                                           unsigned *nr)
{
    struct checkpoint_item *items = calloc(dir->nr + 1, sizeof(*items));
    *nr = 0;
    for (unsigned i = 0; items && i < dir->nr; i++) {
        const struct checkpoint_file *file = &dir->files[i];
        if (!file->readable)
            continue;
        items[*nr] = (struct checkpoint_item) {.number = file->number,
                                               .created = file->info.created_s,
                                               .parent = parent_find(items, dir, *nr, file)};
        ++*nr;
    }
    if (items)
        checkpoint_policy_keep(settings, items, *nr, now);
    return items;
}

unsigned checkpoint_dir_prune(const struct checkpoint_dir *dir,
                              const struct checkpoint_settings *settings, int64_t now)
{
    unsigned nr, removed = 0;
    autofree struct checkpoint_item *items = items_judge(dir, settings, now, &nr);
    if (!items)
        return 0;
    orphans_remove(dir);
    for (unsigned i = nr; i > 0; i--) { // a diff before what it needs
        char name[CHECKPOINT_NAME_MAX], path[PATH_MAX];
        name_make(items[i - 1].number, name);
        if (!items[i - 1].keep && !path_make(dir, name, path, NULL))
            removed += file_remove(path);
    }
    return removed;
}

static const struct checkpoint_file *file_of(const struct checkpoint_dir *dir, uint32_t number)
{
    for (unsigned i = 0; i < dir->nr; i++)
        if (dir->files[i].number == number)
            return &dir->files[i];
    return NULL;
}

bool checkpoint_dir_merge(const struct checkpoint_dir *dir,
                          const struct checkpoint_settings *settings, int64_t now,
                          struct checkpoint_merge *merge)
{
    unsigned nr;
    autofree struct checkpoint_item *items = items_judge(dir, settings, now, &nr);
    *merge = (struct checkpoint_merge) {0};
    int32_t i = items ? checkpoint_policy_merge(settings, items, nr, &merge->files) : -1;
    if (i < 0)
        return false;
    for (int32_t newest = (int32_t)nr - 1; newest >= 0; newest = items[newest].parent)
        merge->current |= newest == i;
    for (int32_t of = i; of >= 0; of = items[of].parent)
        if (items[of].parent >= 0)
            merge->diff_bytes += file_of(dir, items[of].number)->info.file_bytes;
        else if (file_of(dir, items[of].number)->info.kind != SNAPFILE_FULL)
            return false; // what it needs is not there
    return !checkpoint_dir_file(dir, file_of(dir, items[i].number), merge->path, NULL);
}

// --- finding one

static int none(const struct checkpoint_dir *dir, const char *what, struct error *err)
{
    return error_set(err, -ENOENT, "%s: no %s among %u files", dir->path, what, dir->nr);
}

int checkpoint_dir_find(const struct checkpoint_dir *dir, const char *which, char *path,
                        struct error *err)
{
    if (!strcmp(which, "newest"))
        return dir->nr ? checkpoint_dir_file(dir, &dir->files[dir->nr - 1], path, err)
                       : none(dir, "checkpoint", err);
    char *end;
    unsigned long number = strtoul(which, &end, 10);
    bool is_number = *which >= '0' && *which <= '9' && !*end;
    for (unsigned i = 0; i < dir->nr; i++)
        if (is_number ? dir->files[i].number == number : !strcmp(dir->files[i].name, which))
            return checkpoint_dir_file(dir, &dir->files[i], path, err);
    char what[64];
    snprintf(what, sizeof(what), "checkpoint '%.40s'", which);
    return none(dir, what, err);
}

static int check(const char *path, struct error *err)
{
    struct snapfile *file;
    int ret = snapfile_open(&file, path, err);
    if (ret)
        return ret;
    ret = snapfile_verify(file, 0, err);
    snapfile_close(file);
    return ret;
}

int checkpoint_dir_newest(const struct checkpoint_dir *dir, uint32_t after, char *path,
                          void (*damaged)(void *context, const char *name, const struct error *why),
                          void *context, struct error *err)
{
    for (unsigned i = dir->nr; i > 0 && dir->files[i - 1].number > after; i--) {
        struct error why;
        int ret = checkpoint_dir_file(dir, &dir->files[i - 1], path, &why);
        if (!ret)
            ret = check(path, &why);
        if (!ret)
            return 0;
        if (damaged)
            damaged(context, dir->files[i - 1].name, &why);
    }
    return none(dir, "whole checkpoint", err);
}

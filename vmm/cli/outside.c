// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/outside.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "devices/virtio_blk.h"
#include "vmm/cli/supervise.h"
#include "vmm/util.h"

static const struct virtio_blk_config *disk_of(const struct device_option *d)
{
    return d->kind->class == &virtio_blk_class ? (const void *)d->config : NULL;
}

static char *name_whole(const char *cwd, const char *path)
{
    char *whole;
    return asprintf(&whole, "%s%s%s", *path == '/' ? "" : cwd, *path == '/' ? "" : "/", path) < 0
               ? NULL
               : whole;
}

static int file_open(struct outside *o, const char *path, int mode, struct error *err)
{
    if (o->nr == OUTSIDE_MAX)
        return error_set(err, -E2BIG, "jail: more than %d images", OUTSIDE_MAX);
    int fd = open(path, mode | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return error_errno(err, "%s", path);
    fcntl(fd, F_SETFL, mode); // as a device opens it
    char *whole = name_whole(o->cwd, path);
    if (!whole) {
        close(fd);
        return error_set(err, -ENOMEM, "no memory for the name of an image");
    }
    o->files[o->nr++] = (struct outside_file) {whole, fd};
    return 0;
}

static int bases_open(struct outside *o, const char *lines, struct error *err)
{
    autofree char *copy = strdup(lines);
    char *save = NULL;
    int ret = copy ? 0 : error_set(err, -ENOMEM, "no memory");
    for (char *path = copy ? strtok_r(copy, "\n", &save) : NULL; path && !ret;
         path = strtok_r(NULL, "\n", &save))
        ret = file_open(o, path, O_RDONLY, err);
    return ret;
}

int outside_open(struct outside *o, const struct vm_options *options, struct error *err)
{
    int ret = 0;
    o->cwd = getcwd(NULL, 0);
    if (!o->cwd)
        return error_errno(err, "working directory");
    for (unsigned i = 0; i < options->nr_devices && !ret; i++) {
        const struct virtio_blk_config *c = disk_of(&options->devices[i]);
        if (c && *c->overlay && !c->read_only && !access(c->overlay, F_OK))
            ret = file_open(o, c->overlay, O_RDWR, err);
    }
    if (!ret && options->bases)
        ret = bases_open(o, options->bases, err);
    return ret;
}

int outside_fd(const struct outside *o, const char *path)
{
    if (!o->cwd)
        return 0;
    autofree char *whole = name_whole(o->cwd, path);
    for (unsigned i = 0; whole && i < o->nr; i++)
        if (!strcmp(o->files[i].path, whole))
            return o->files[i].fd;
    return 0;
}

json_t *outside_disks(const struct outside *o, json_t *texts)
{
    json_t *all = json_array(), *text;
    size_t i;
    json_array_foreach(texts, i, text)
    {
        struct virtio_blk_config c;
        const char *given = json_string_value(text);
        autofree char *whole = name_whole(o->cwd, given);
        int fd = virtio_blk_parse(given, &c, NULL) || !*c.overlay ? 0 : outside_fd(o, c.overlay);
        json_t *entry = json_pack("{s:s}", "text", whole ? whole : given);
        if (fd)
            json_object_set_new(entry, "fd", json_integer(fd));
        json_array_append_new(all, entry);
    }
    return all;
}

int outside_checkpoints(struct vm_options *options, struct error *err)
{
    json_t *body;
    unsigned restarts;
    char inside[PATH_MAX];
    int ret = supervise_parse(options->checkpoints, &body, &restarts, err);
    if (ret)
        return ret;
    const char *dir = json_string_value(json_object_get(body, "dir"));
    if (!jail_inside(&options->jail, dir, inside))
        snprintf(options->jail.shared, sizeof(options->jail.shared), "%s", dir);
    json_decref(body);
    return 0;
}

void outside_close(struct outside *o)
{
    while (o->nr) {
        o->nr--;
        free(o->files[o->nr].path);
        close(o->files[o->nr].fd);
    }
    free(o->cwd);
    o->cwd = NULL;
}

json_t *outside_bases(const struct vm_options *options)
{
    json_t *bases = json_array();
    autofree char *given = options->bases ? strdup(options->bases) : NULL;
    char *save = NULL;
    for (char *path = given ? strtok_r(given, "\n", &save) : NULL; path;
         path = strtok_r(NULL, "\n", &save))
        json_array_append_new(bases, json_string(path));
    for (unsigned i = 0; i < options->nr_devices; i++) {
        const struct virtio_blk_config *c = disk_of(&options->devices[i]);
        autofree char *cwd = c && *c->path != '/' ? getcwd(NULL, 0) : NULL;
        autofree char *whole =
            c && (c->read_only || *c->overlay) ? name_whole(cwd ? cwd : "", c->path) : NULL;
        if (whole)
            json_array_append_new(bases, json_string(whole));
    }
    return bases;
}

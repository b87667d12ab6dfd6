// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/api_pair.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "migrate/snapfile.h"
#include "vmm/util.h"

enum { VERSION = 1, FILE_MAX = 1024 * 1024 };

struct api_pair {
    char path[PATH_MAX];
    json_t *config;
};

static void id_text(const uint8_t id[SNAPFILE_ID_LEN], char text[2 * SNAPFILE_ID_LEN + 1])
{
    for (unsigned i = 0; i < SNAPFILE_ID_LEN; i++)
        snprintf(text + 2 * i, 3, "%02x", id[i]);
}

int api_pair_new(struct api_pair **out, const char *path, json_t *config, struct error *err)
{
    struct api_pair *pair = calloc(1, sizeof(*pair));
    if (!pair)
        return error_set(err, -ENOMEM, "no memory");
    if ((size_t)snprintf(pair->path, sizeof(pair->path), "%s", path) >= sizeof(pair->path) - 8) {
        free(pair);
        return error_set(err, -ENAMETOOLONG, "snapshot_path '%.60s...': too long", path);
    }
    pair->config = json_deep_copy(config);
    *out = pair;
    return 0;
}

void api_pair_free(struct api_pair *pair)
{
    if (!pair)
        return;
    json_decref(pair->config);
    free(pair);
}

int api_pair_write(void *context, const struct snapshot_report *report, struct error *err)
{
    const struct api_pair *pair = context;
    char id[2 * SNAPFILE_ID_LEN + 1], temporary[PATH_MAX];
    id_text(report->id, id);
    snprintf(temporary, sizeof(temporary), "%.*s.tmp", PATH_MAX - 8, pair->path);
    json_t *root =
        json_pack("{s:i, s:s, s:O}", "ferry-snapshot", VERSION, "id", id, "config", pair->config);
    autoclose int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int ret = 0;
    if (fd < 0 || !root || json_dumpfd(root, fd, JSON_INDENT(2)) || fsync(fd) ||
        rename(temporary, pair->path)) {
        ret = error_errno(err, "snapshot_path '%s'", pair->path);
        if (fd >= 0)
            unlink(temporary);
    }
    json_decref(root);
    return ret;
}

// --- reading

static int text_read(const char *path, char **text, size_t *len, struct error *err)
{
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    *text = malloc(FILE_MAX);
    *len = 0;
    if (fd < 0 || !*text)
        return error_errno(err, "snapshot_path '%s'", path);
    for (ssize_t n; *len < FILE_MAX; *len += (size_t)n) {
        n = read(fd, *text + *len, FILE_MAX - *len);
        if (n < 0)
            return error_errno(err, "snapshot_path '%s'", path);
        if (!n || (*len + (size_t)n >= 8 && !memcmp(*text, SNAPFILE_MAGIC, 8))) {
            *len += (size_t)n;
            break;
        }
    }
    return 0;
}

static int memory_check(const char *path, const char *id, const char *memory, struct error *err)
{
    struct snapfile_info info;
    char is[2 * SNAPFILE_ID_LEN + 1];
    if (!memory)
        return error_set(err, -EINVAL,
                         "snapshot_path '%s' is one of two files: mem_backend names the other",
                         path);
    int ret = snapfile_peek(memory, &info, err);
    if (ret)
        return ret;
    id_text(info.id, is);
    return strcmp(id, is) ? error_set(err, -EINVAL,
                                      "'%s' and '%s' do not belong together: snapshot %s, memory "
                                      "of %s",
                                      path, memory, id, is)
                          : 0;
}

int api_pair_read(const char *path, const char *memory, json_t **config, struct error *err)
{
    autofree char *text = NULL;
    size_t len;
    json_error_t jerr;
    const char *id;
    int version;
    json_t *of;
    *config = NULL;
    int ret = text_read(path, &text, &len, err);
    if (ret || (len >= 8 && !memcmp(text, SNAPFILE_MAGIC, 8)))
        return ret;
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &jerr);
    if (!root ||
        json_unpack(root, "{s:i, s:s, s:o}", "ferry-snapshot", &version, "id", &id, "config",
                    &of) ||
        !json_is_object(of))
        ret = error_set(err, -EINVAL, "snapshot_path '%s': not a ferry snapshot", path);
    else if (version != VERSION)
        ret = error_set(err, -EPROTONOSUPPORT, "snapshot_path '%s': version %d: expected %d", path,
                        version, VERSION);
    else
        ret = memory_check(path, id, memory, err);
    if (!ret)
        *config = json_incref(of);
    json_decref(root);
    return ret;
}

// SPDX-License-Identifier: Apache-2.0
//
// Writes a "newc" cpio archive (kernel: Documentation/driver-api/early-userspace/buffer-format)
// from a list on standard input, so that device nodes need no root. One entry per line, paths
// without a leading slash and without spaces:
//   dir PATH MODE
//   file PATH MODE SOURCE
//   link PATH TARGET
//   node PATH MODE MAJOR MINOR          (character device)
// Times, owners and inode numbers are fixed: equal input gives equal output.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_LEN = 512, TYPE_DIR = 0040000, TYPE_FILE = 0100000, TYPE_LINK = 0120000 };
enum { TYPE_CHAR = 0020000 };

struct entry {
    const char *path;
    unsigned int mode, major, minor;
    const char *data;
    size_t size;
};

static void pad(size_t written)
{
    static const char zero[4] = {0};
    fwrite(zero, 1, (4 - written % 4) % 4, stdout);
}

static void entry_write(const struct entry *entry, unsigned int inode)
{
    size_t name_size = strlen(entry->path) + 1;
    int header = printf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", inode,
                        entry->mode, 0u, 0u, 1u, 0u, (unsigned int)entry->size, 0u, 0u,
                        entry->major, entry->minor, (unsigned int)name_size, 0u);
    fwrite(entry->path, 1, name_size, stdout);
    pad((size_t)header + name_size);
    fwrite(entry->data, 1, entry->size, stdout);
    pad(entry->size);
}

static char *file_load(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        return NULL;
    long length = ftell(file);
    rewind(file);
    char *data = length < 0 ? NULL : malloc((size_t)length + 1);
    if (data && fread(data, 1, (size_t)length, file) != (size_t)length) {
        free(data);
        data = NULL;
    }
    fclose(file);
    *size = (size_t)length;
    return data;
}

// Returns 0, or -1 when the line is not understood or its source cannot be read.
static int line_write(const char *line, unsigned int inode)
{
    char kind[8], path[PATH_LEN], last[PATH_LEN];
    struct entry entry = {.path = path, .data = ""};

    if (sscanf(line, "%7s %511s", kind, path) != 2)
        return -1;
    if (!strcmp(kind, "dir") && sscanf(line, "%*s %*s %o", &entry.mode) == 1) {
        entry.mode |= TYPE_DIR;
    } else if (!strcmp(kind, "node") &&
               sscanf(line, "%*s %*s %o %u %u", &entry.mode, &entry.major, &entry.minor) == 3) {
        entry.mode |= TYPE_CHAR;
    } else if (!strcmp(kind, "link") && sscanf(line, "%*s %*s %511s", last) == 1) {
        entry.mode = TYPE_LINK | 0777;
        entry.data = last;
        entry.size = strlen(last);
    } else if (!strcmp(kind, "file") && sscanf(line, "%*s %*s %o %511s", &entry.mode, last) == 2) {
        char *data = file_load(last, &entry.size);
        if (!data)
            return -1;
        entry.mode |= TYPE_FILE;
        entry.data = data;
        entry_write(&entry, inode);
        free(data);
        return 0;
    } else {
        return -1;
    }
    entry_write(&entry, inode);
    return 0;
}

int main(void)
{
    char line[2 * PATH_LEN + 64];
    unsigned int inode = 1;

    while (fgets(line, sizeof(line), stdin)) {
        if (line[0] == '\n' || line[0] == '#')
            continue;
        if (line_write(line, inode++)) {
            fprintf(stderr, "mkcpio: bad line or unreadable source: %s", line);
            return 1;
        }
    }
    entry_write(&(struct entry) {.path = "TRAILER!!!", .data = ""}, inode);
    return fflush(stdout) || ferror(stdout);
}

// SPDX-License-Identifier: Apache-2.0
#include "sched/threads.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vmm/util.h"

// "NSpid:" of a status file: the number in each namespace, ours first, its own last. Returns how
// many there are, 0 when the thread is gone.
static unsigned nspid_read(const char *path, int32_t *innermost)
{
    char text[4096];
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (n <= 0)
        return 0;
    text[n] = 0;
    // The kernel writes a newline within a name as "\n", so that no name looks like this.
    char *at = strstr(text, "\nNSpid:");
    unsigned nr = 0;
    for (at = at ? at + 7 : text + n; *at == '\t'; nr++)
        *innermost = (int32_t)strtol(at, &at, 10);
    return nr;
}

// One thread of the process: those of `tids` that are it are found.
static void thread_match(int32_t inner, int32_t outer, const int32_t *tids, int32_t *found,
                         unsigned nr)
{
    for (unsigned i = 0; i < nr; i++)
        if (tids[i] == inner)
            found[i] = outer;
}

static int threads_find(pid_t pid, const int32_t *tids, int32_t *found, unsigned nr)
{
    char path[64];
    int looks = 0;
    struct dirent *entry;
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    DIR *dir = opendir(path);
    while (dir && looks < THREADS_LOOKS_MAX && (entry = readdir(dir))) {
        int32_t inner, outer = (int32_t)atoi(entry->d_name);
        if (outer <= 0)
            continue;
        snprintf(path, sizeof(path), "/proc/%d/task/%d/status", (int)pid, (int)outer);
        looks++;
        if (nspid_read(path, &inner) > 1)
            thread_match(inner, outer, tids, found, nr);
    }
    if (dir)
        closedir(dir);
    return looks;
}

int threads_translate(pid_t pid, int32_t *tids, unsigned nr, struct error *err)
{
    char path[64];
    int32_t inner;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    if (nspid_read(path, &inner) < 2)
        return 0;
    autofree int32_t *found = calloc(nr, sizeof(*found));
    if (!found)
        return error_set(err, -ENOMEM, "no memory for %u threads", nr);
    int looks = threads_find(pid, tids, found, nr);
    for (unsigned i = 0; i < nr; i++)
        if (!found[i])
            return error_set(err, -ESRCH,
                             "thread %d, in the PID namespace of process %d: there is none among "
                             "%d",
                             tids[i], (int)pid, looks);
    memcpy(tids, found, nr * sizeof(*tids));
    return looks;
}

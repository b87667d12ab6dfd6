// SPDX-License-Identifier: Apache-2.0
#include "vmm/listen.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum { TAIL = 7, NAME_MAX_LEN = sizeof(((struct sockaddr_un *)0)->sun_path) - 1, TRIES = 16 };

// A name in the same folder that nobody else draws. False: the folder's name leaves no room.
static bool name_beside(const char *path, struct sockaddr_un *out)
{
    const char *slash = strrchr(path, '/');
    size_t dir = slash ? (size_t)(slash + 1 - path) : 0, keep = strlen(path);
    uint32_t number = 0;
    if (keep > NAME_MAX_LEN - TAIL)
        keep = NAME_MAX_LEN - TAIL;
    if (keep < dir || getrandom(&number, sizeof(number), 0) != sizeof(number))
        return false;
    *out = (struct sockaddr_un) {.sun_family = AF_UNIX};
    snprintf(out->sun_path, sizeof(out->sun_path), "%.*s.%06x", (int)keep, path, number & 0xffffff);
    return true;
}

// Over nothing that is there. Not each file system can do that in one step.
static int name_give(const char *from, const char *to)
{
    if (!renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE))
        return 0;
    if (errno != EINVAL)
        return -1;
    return link(from, to) ? -1 : unlink(from);
}

static int result(int failed)
{
    if (failed && errno == EEXIST)
        errno = EADDRINUSE; // as bind has it
    return failed ? -errno : 0;
}

int listen_unix(int fd, const struct sockaddr_un *addr, int backlog)
{
    struct sockaddr_un first;
    int failed = -1;
    errno = EADDRINUSE;
    for (unsigned i = 0; failed && errno == EADDRINUSE && i < TRIES; i++) {
        if (!name_beside(addr->sun_path, &first))
            return result(bind(fd, (const struct sockaddr *)addr, sizeof(*addr)) ||
                          listen(fd, backlog));
        failed = bind(fd, (struct sockaddr *)&first, sizeof(first));
    }
    if (failed)
        return result(failed);
    if (!listen(fd, backlog) && !name_give(first.sun_path, addr->sun_path))
        return 0;
    int ret = result(-1);
    unlink(first.sun_path);
    errno = -ret;
    return ret;
}

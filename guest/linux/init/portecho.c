// SPDX-License-Identifier: Apache-2.0
//
// Sends back what comes from a port of the virtio console (or any device like it), across
// disconnects of the host's side.
#include "ferryt.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { HUNG_UP_WAIT_NS = 20000000 };

static bool all_write(int fd, const char *buf, ssize_t len)
{
    while (len > 0) {
        ssize_t n = write(fd, buf, (size_t)len);
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            return false;
        if (n > 0) {
            buf += n;
            len -= n;
        }
    }
    return true;
}

int portecho_main(int argc, char **argv)
{
    static char buf[32768];

    if (argc < 2) {
        fprintf(stderr, "usage: portecho DEVICE [BYTES]\n");
        return 2;
    }
    long left = argc > 2 ? number_parse("BYTES", argv[2], 1, 1l << 40) : -1, sent = 0;
    int fd = open(argv[1], O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        printf("portecho: %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    printf("portecho: open\n");
    fflush(stdout);
    while (left < 0 || sent < left) {
        struct pollfd polled = {.fd = fd, .events = POLLIN};
        if (poll(&polled, 1, -1) < 0 && errno != EINTR)
            break;
        // Without data, a hang-up means that nobody is connected at the host; poll says so at once.
        if (!(polled.revents & POLLIN)) {
            nanosleep(&(struct timespec) {.tv_nsec = HUNG_UP_WAIT_NS}, NULL);
            continue;
        }
        ssize_t n = read(fd, buf, sizeof(buf));
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            break;
        if (n > 0 && !all_write(fd, buf, n))
            break;
        sent += n > 0 ? n : 0;
    }
    bool done = left >= 0 && sent >= left;
    if (!done)
        printf("portecho: %s: %s\n", argv[1], strerror(errno));
    printf("portecho: %ld bytes\n", sent);
    return !done;
}

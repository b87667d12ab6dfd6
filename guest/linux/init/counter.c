// SPDX-License-Identifier: Apache-2.0
//
// A process whose life is visible on the console: it counts, and answers what is typed. Whoever
// moves the machine elsewhere can check that no byte is lost or doubled and that it is still the
// same process (its pid, its count).
#include "ferryt.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINE_MAX_LEN = 256 };

static long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void out(const char *text, int len)
{
    while (len > 0) {
        ssize_t n = write(STDOUT_FILENO, text, (size_t)len);
        if (n < 0 && errno != EINTR)
            exit(1);
        if (n > 0) {
            text += n;
            len -= (int)n;
        }
    }
}

// Echoes each whole line of what was typed; keeps the rest. Returns 0 at end of input.
static int input_echo(char *line, int *len)
{
    char reply[LINE_MAX_LEN + 16];
    ssize_t n = read(STDIN_FILENO, line + *len, (size_t)(LINE_MAX_LEN - *len));
    if (n <= 0)
        return n < 0 && errno == EINTR;

    *len += (int)n;
    for (;;) {
        char *end = memchr(line, '\n', (size_t)*len);
        int used = end ? (int)(end - line) : *len;
        if (!end && *len < LINE_MAX_LEN)
            return 1;
        out(reply, snprintf(reply, sizeof(reply), "echo: %.*s\n", used, line));
        if (end)
            used++;
        memmove(line, line + used, (size_t)(*len - used));
        *len -= used;
    }
}

int counter_main(int argc, char **argv)
{
    long interval = argc > 1 ? number_parse("INTERVAL_MS", argv[1], 1, 3600000) : 200;
    long last = argc > 2 ? number_parse("LAST", argv[2], 0, 999999999) : -1;
    char text[64], line[LINE_MAX_LEN];
    int len = 0;
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    long due = now_ms();

    out(text, snprintf(text, sizeof(text), "counter: pid %d\n", (int)getpid()));
    for (long count = 0; last < 0 || count <= last;) {
        long wait = due - now_ms();
        if (wait > 0) {
            if (poll(&in, 1, (int)wait) > 0 && !input_echo(line, &len))
                in.fd = -1;
            continue;
        }
        out(text, snprintf(text, sizeof(text), "count %06ld\n", count++));
        due += interval;
        // After a long stop (a migration, a restore) do not count the missed time in a burst.
        if (due < now_ms())
            due = now_ms() + interval;
    }
    return 0;
}

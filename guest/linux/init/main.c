// SPDX-License-Identifier: Apache-2.0
#include "ferryt.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct applet {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *usage;
} applets[] = {
    {"init", init_main, ""},
    {"vectest", vectest_main, "[PROCESSES] [ROUNDS]"},
    {"counter", counter_main, "[INTERVAL_MS] [LAST]"},
    {"info", info_main, ""},
    {"dirty", dirty_main, "SIZE_MIB RATE_MIB_PER_S [SECONDS]"},
    {"verify", verify_main, "[-c] write|read|discard|zero PATH ..."},
    {"sock", sock_main, "serve|connect|pingpong tcp:[HOST:]PORT|vsock:[CID:]PORT ..."},
    {"memhog", memhog_main, "MIB"},
    {"portecho", portecho_main, "DEVICE [BYTES]"},
    {"offload", offload_main, "INTERFACE [tx|rx|sg|tso|gso|gro on|off] [queues N]..."},
};

long number_parse(const char *what, const char *text, long min, long max)
{
    char *end;

    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < min || value > max) {
        fprintf(stderr, "%s is '%s', expected a number from %ld to %ld\n", what, text, min, max);
        exit(2);
    }
    return value;
}

long file_read(const char *path, char *buf, long size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    long len = 0, n;
    while (len < size - 1 && (n = read(fd, buf + len, (size_t)(size - 1 - len))) > 0)
        len += n;
    buf[len] = '\0';
    close(fd);
    return len;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(base_name(argv[0]), "ferryt")) {
        argc--;
        argv++;
    }
    for (size_t i = 0; argc && i < sizeof(applets) / sizeof(applets[0]); i++)
        if (!strcmp(base_name(argv[0]), applets[i].name))
            return applets[i].run(argc, argv);

    fprintf(stderr, "usage:\n");
    for (size_t i = 1; i < sizeof(applets) / sizeof(applets[0]); i++)
        fprintf(stderr, "  %s %s\n", applets[i].name, applets[i].usage);
    return 2;
}

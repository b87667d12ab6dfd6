// SPDX-License-Identifier: Apache-2.0
//
// Shows and sets what a network device does for the kernel, and how many queues it uses.
#include "ferryt.h"

#include <errno.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

static const struct {
    const char *name;
    uint32_t get, set;
} switches[] = {
    {"tx", ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM}, {"rx", ETHTOOL_GRXCSUM, ETHTOOL_SRXCSUM},
    {"sg", ETHTOOL_GSG, ETHTOOL_SSG},         {"tso", ETHTOOL_GTSO, ETHTOOL_STSO},
    {"gso", ETHTOOL_GGSO, ETHTOOL_SGSO},      {"gro", ETHTOOL_GGRO, ETHTOOL_SGRO},
};
enum { SWITCHES = sizeof(switches) / sizeof(switches[0]) };

static int ask(int fd, const char *name, void *command)
{
    struct ifreq request = {.ifr_data = command};

    snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
    return ioctl(fd, SIOCETHTOOL, &request);
}

static int queues_set(int fd, const char *name, const char *value)
{
    struct ethtool_channels channels = {.cmd = ETHTOOL_GCHANNELS};

    if (ask(fd, name, &channels))
        return -1;
    channels.cmd = ETHTOOL_SCHANNELS;
    channels.combined_count = (uint32_t)number_parse("queues", value, 1, 256);
    return ask(fd, name, &channels);
}

static int switch_set(int fd, const char *name, const char *word, const char *value)
{
    if (!strcmp(word, "queues"))
        return queues_set(fd, name, value);
    for (int i = 0; i < SWITCHES; i++) {
        if (!strcmp(word, switches[i].name)) {
            struct ethtool_value command = {switches[i].set, !strcmp(value, "on")};
            return ask(fd, name, &command);
        }
    }
    errno = EINVAL;
    return -1;
}

static void show(int fd, const char *name)
{
    struct ethtool_channels channels = {.cmd = ETHTOOL_GCHANNELS};

    printf("offload: %s", name);
    for (int i = 0; i < SWITCHES; i++) {
        struct ethtool_value command = {switches[i].get, 0};
        if (!ask(fd, name, &command))
            printf(" %s %s", switches[i].name, command.data ? "on" : "off");
    }
    if (!ask(fd, name, &channels))
        printf(" queues %u of %u", channels.combined_count, channels.max_combined);
    printf("\n");
}

int offload_main(int argc, char **argv)
{
    if (argc < 2 || argc % 2) {
        fprintf(stderr, "usage: offload INTERFACE [tx|rx|sg|tso|gso|gro on|off] [queues N]...\n");
        return 2;
    }
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), status = 0;
    for (int i = 2; i < argc; i += 2) {
        if (switch_set(fd, argv[1], argv[i], argv[i + 1])) {
            printf("offload: %s %s: %s\n", argv[i], argv[i + 1], strerror(errno));
            status = 1;
        }
    }
    show(fd, argv[1]);
    return status;
}

// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/new_mac.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "devices/virtio_net.h"
#include "vmm/util.h"

// The `n`th network device; NULL: none.
static struct virtio_net_config *net_at(struct vm_options *o, unsigned long n)
{
    for (unsigned i = 0; i < o->nr_devices; i++)
        if (!strcmp(o->devices[i].kind->name, "net") && !n--)
            return (struct virtio_net_config *)(void *)o->devices[i].config;
    return NULL;
}

static bool is_free(struct vm_options *o, const uint8_t mac[6])
{
    struct virtio_net_config *c;
    for (unsigned long n = 0; (c = net_at(o, n)); n++)
        if (!memcmp(c->new_mac, mac, 6))
            return false;
    return true;
}

static int address_take(struct vm_options *o, struct virtio_net_config *c, const char *text,
                        struct error *err)
{
    uint8_t mac[6] = {0};
    int ret =
        strcmp(text, "auto") ? virtio_net_parse_mac(text, mac, err) : virtio_net_draw_mac(mac, err);
    if (!ret && !is_free(o, mac))
        ret = error_set(err, -EINVAL, "'%s': another device has it", text);
    if (!ret)
        memcpy(c->new_mac, mac, sizeof(mac));
    return ret;
}

static int word_apply(struct vm_options *o, const char *word, struct error *err)
{
    const char *equals = strchr(word, '=');
    unsigned long n = 0;
    if (equals) {
        char *end;
        n = strncmp(word, "net", 3) || word[3] < '0' || word[3] > '9' ? ULONG_MAX
                                                                      : strtoul(word + 3, &end, 10);
        if (n != ULONG_MAX && end != equals)
            n = ULONG_MAX;
    }
    struct virtio_net_config *c = net_at(o, n);
    if (!c)
        return error_set(err, -EINVAL, "'%s': no such network device (expected --net for it)",
                         word);
    return address_take(o, c, equals ? equals + 1 : word, err);
}

static int all_draw(struct vm_options *o, struct error *err)
{
    struct virtio_net_config *c;
    int ret = 0;
    for (unsigned long n = 0; !ret && (c = net_at(o, n)); n++)
        ret = address_take(o, c, "auto", err);
    return ret;
}

int new_mac_apply(struct vm_options *o, const char *text, struct error *err)
{
    int ret = 0;
    if (!strcmp(text, "auto"))
        return all_draw(o, err);
    autofree char *words = strdup(text);
    if (!words)
        return error_set(err, -ENOMEM, "no memory");
    for (char *rest = words, *word; !ret && (word = strsep(&rest, ","));)
        ret = word_apply(o, word, err);
    return ret ? error_prefix(err, "new-mac") : 0;
}

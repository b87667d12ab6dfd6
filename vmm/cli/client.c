// SPDX-License-Identifier: Apache-2.0
// Commands that talk to a running VM: info, set, pause, resume, stop.
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/cli/cli.h"
#include "vmm/control.h"
#include "vmm/util.h"

struct client_args {
    bool json, powerbutton;
    char *positional[2];
    int rest; // index of the first argument after those
};

// Options that several of these commands share; `wanted` positional arguments are required, and
// with `more` at least one follows them.
static int parse(int argc, char **argv, const char *usage, int wanted, bool more,
                 struct client_args *args, struct error *err)
{
    static const struct option longs[] = {{"json", no_argument, NULL, 'j'},
                                          {"powerbutton", no_argument, NULL, 'p'},
                                          {"follow", no_argument, NULL, 'f'},
                                          {"help", no_argument, NULL, 'h'},
                                          {0}};
    *args = (struct client_args) {0};
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, ":jh", longs, NULL)) != -1) {
        if (c == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        }
        if (c == 'j')
            args->json = true;
        else if (c == 'p' && !strcmp(argv[0], "stop"))
            args->powerbutton = true;
        else if (c == 'f' && !strcmp(argv[0], "events"))
            continue; // they always do; said so in other tools
        else
            return error_set(err, -EINVAL, "unknown option '%s'; usage: %s", argv[optind - 1],
                             usage);
    }
    args->rest = optind + wanted;
    if (more ? argc <= args->rest : argc != args->rest)
        return error_set(err, -EINVAL, "%d arguments, expected %s%d; usage: %.*s", argc - optind,
                         more ? "more than " : "", wanted, (int)strcspn(usage, "\n"), usage);
    for (int i = 0; i < wanted; i++)
        args->positional[i] = argv[optind + i];
    return 0;
}

void cli_print_members(json_t *object)
{
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        autofree char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
        printf("%-14s %s\n", key, json_is_string(value) ? json_string_value(value) : text);
    }
}

static int call(const char *method, const char *route, json_t *request,
                const struct client_args *args)
{
    struct error err;
    char path[108];
    json_t *result = NULL;
    int ret = control_path(args->positional[0], path, sizeof(path), &err);
    if (!ret)
        ret = control_call(path, method, route, request, &result, NULL, NULL, &err);
    json_decref(request);
    if (ret)
        return cli_fail(&err);
    if (args->json) {
        json_t *empty = result ? NULL : json_object();
        json_dumpf(result ? result : empty, stdout, JSON_INDENT(2));
        json_decref(empty);
        printf("\n");
    } else if (result) {
        cli_print_members(result);
    }
    json_decref(result);
    return EXIT_OK;
}

static int state_set(int argc, char **argv, const char *usage, const char *state)
{
    struct client_args args;
    struct error err;
    int ret = parse(argc, argv, usage, 1, false, &args, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    return call("PATCH", "/vm", json_pack("{s:s}", "state", state), &args);
}

int cli_info(int argc, char **argv)
{
    struct client_args args;
    struct error err;
    int ret = parse(argc, argv,
                    "ferry info NAME [--json]\n\n"
                    "What a VM is and does: state, vCPUs, memory, each device.\n"
                    "example: ferry info web --json",
                    1, false, &args, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    return call("GET", "/info", NULL, &args);
}

int cli_pause(int argc, char **argv)
{
    return state_set(argc, argv,
                     "ferry pause NAME [--json]\n\n"
                     "The vCPUs stand still, the devices too, until `ferry resume`.\n"
                     "example: ferry pause web",
                     "Paused");
}

int cli_resume(int argc, char **argv)
{
    return state_set(argc, argv,
                     "ferry resume NAME [--json]\n\n"
                     "A paused VM goes on.\n"
                     "example: ferry resume web",
                     "Resumed");
}

int cli_stop(int argc, char **argv)
{
    struct client_args args;
    struct error err;
    int ret = parse(argc, argv,
                    "ferry stop NAME [--powerbutton] [--json]\n\n"
                    "Ends a VM at once, or with --powerbutton asks its guest to power off.\n"
                    "example: ferry stop web --powerbutton",
                    1, false, &args, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    return call("PUT", "/stop", json_pack("{s:b}", "powerbutton", (int)args.powerbutton), &args);
}

int cli_reset(int argc, char **argv)
{
    struct client_args args;
    struct error err;
    int ret =
        parse(argc, argv,
              "ferry reset NAME [--json]\n\n"
              "Starts the guest again from its kernel, at once, as a reset button does: what "
              "it has not\nflushed is lost. Process, name, sockets and console stay. A paused "
              "VM stays paused.\n"
              "example: ferry reset web",
              1, false, &args, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    return call("PUT", "/reset", NULL, &args);
}

int cli_set(int argc, char **argv)
{
    struct client_args args;
    struct error err;
    static const char usage[] =
        "ferry set NAME KEY=VALUE... [--json]\n\n"
        "  memory=SIZE       what the guest may keep; its balloon takes the rest\n"
        "  weight=N cap=PERCENT affinity=PCPUS  what the host's scheduler gives it\n"
        "  DEVICE.KEY=VALUE  of a device that `ferry info NAME` lists\n"
        "example: ferry set web memory=256M disk0.size=2G disk0.bps=50M";
    int ret = parse(argc, argv, usage, 1, true, &args, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    json_t *request = json_object();
    for (int i = args.rest; i < argc; i++) {
        const char *equals = strchr(argv[i], '=');
        size_t len = equals ? (size_t)(equals - argv[i]) : 0;
        if (!len || json_object_setn_new(request, argv[i], len, json_string(equals + 1))) {
            json_decref(request);
            error_set(&err, -EINVAL, "'%s': expected KEY=VALUE", argv[i]);
            return cli_fail(&err);
        }
    }
    return call("PATCH", "/devices", json_pack("{s:o}", "settings", request), &args);
}

static void event_print(json_t *event, void *arg)
{
    const struct client_args *args = arg;
    autofree char *text = json_dumps(event, JSON_COMPACT);
    if (args->json || strcmp(json_string_value(json_object_get(event, "type")) ?: "", "state"))
        printf("%s\n", text);
    else
        printf("%s -> %s\n", json_string_value(json_object_get(event, "from")),
               json_string_value(json_object_get(event, "to")));
    fflush(stdout);
}

int cli_events(int argc, char **argv)
{
    struct client_args args;
    struct error err;
    char path[108];
    int ret = parse(argc, argv,
                    "ferry events NAME [--json] [--follow]\n\n"
                    "Prints each change of a VM's state as it happens, until the VM ends.\n"
                    "example: ferry events web --json",
                    1, false, &args, &err);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    ret = control_path(args.positional[0], path, sizeof(path), &err);
    if (!ret)
        ret = control_call(path, "GET", "/events", NULL, NULL, event_print, &args, &err);
    return !ret || ret == -ECONNRESET ? EXIT_OK
                                      : cli_fail(&err); // its end is the end of the events
}

// SPDX-License-Identifier: Apache-2.0
// ferry migrate: asks a running VM to leave, and shows how it goes.
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "migrate/tls.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/migrate_page.h"
#include "vmm/control.h"
#include "vmm/util.h"

static const char migrate_usage[] =
    "ferry migrate NAME tcp:HOST:PORT [OPTIONS]\n\n"
    "Moves the running VM to a host where `ferry receive` waits. On any failure before the "
    "hand-over\n"
    "the guest goes on here.\n\n"
    "      --mode MODE        precopy (default), postcopy, hybrid, local (to unix:PATH:\n"
    "                         memory is handed over, for a new ferry under a running guest)\n"
    "      --downtime-ms N    longest pause to aim at (default 300)\n"
    "      --bandwidth SIZE   bytes a second at most, e.g. 100M\n"
    "      --max-rounds N     pre-copy rounds before --on-stall applies\n"
    "      --on-stall WHAT    continue, cancel, switch (pause longer), postcopy, throttle\n"
    "      --compress WHEN    pre-copy: auto (default: while it pays), always, none\n"
    "      --delta-cache SIZE copies of sent pages, for those that change little (default 64M)\n"
    "      --connections N    pre-copy: over so many connections, 1 (default) to 16\n"
    "      --balloon WHAT     what the guest need not keep is taken from it before and while it "
    "moves,\n"
    "                         and given back there: auto, at most SIZE, off (default)\n"
    "      --prepaging HOW    post-copy: none, push, forward, bubble, multi-bubble (default)\n"
    "      --disk             the disks that it writes go with the guest, into the files that the\n"
    "                         other side names (ferry receive --disk FILE); with post-copy\n"
    "                         blocks follow it as memory does\n"
    "      --tls DIR          over TLS: DIR has ca.pem, cert.pem and key.pem (or by themselves:\n"
    "                         --tls-ca, --tls-cert, --tls-key FILE)\n"
    "      --tls-name NAME    whom the other side's certificate must name (default HOST)\n"
    "      --psk FILE         over TLS with a key that both sides share: one line, NAME:HEX "
    "DIGITS\n"
    "      --insecure         in clear to another host\n"
    "      --report FILE      the report as a page with plots (HTML)\n"
    "  -j, --json             the report as JSON\n"
    "  -q, --quiet            no progress\n\n"
    "ferry migrate status NAME         the migration under way, or how the last one ended\n"
    "ferry migrate cancel NAME         end it; the guest goes on here\n"
    "ferry migrate set NAME OPTIONS    change --downtime-ms and --bandwidth while it works\n"
    "ferry migrate pause NAME          post-copy: break the link; both sides stand still\n"
    "ferry migrate recover NAME tcp:HOST:PORT [OPTIONS]\n"
    "                                  post-copy whose link broke: go on over a new one, with TLS\n"
    "                                  as before or as the options say\n"
    "ferry migrate force-resume NAME   the hand-over was never answered: run the guest here (you\n"
    "                                  know that it does not run there)\n\n"
    "example: ferry migrate web tcp:10.0.0.2:7000 --tls /etc/ferry/tls --downtime-ms 30";

// What comes before NAME. Without: the migration itself.
static const struct migrate_verb {
    const char *word, *method, *route;
    bool target; // needs tcp:HOST:PORT after NAME
} verbs[] = {
    {"status", "GET", "/migration", false},
    {"cancel", "DELETE", "/migration", false},
    {"set", "PATCH", "/migration", false},
    {"pause", "PUT", "/migration/pause", false},
    {"recover", "PUT", "/migration/recover", true},
    {"force-resume", "PUT", "/migration/force-resume", false},
};
static const struct migrate_verb migrate_verb = {NULL, "PUT", "/migration", true};

struct migrate_args {
    json_t *request;
    bool json, quiet;
    const struct migrate_verb *verb;
    const char *report;
    struct tls_files tls;
};

enum { OPTION_TLS = 0x100, OPTION_TLS_PART, OPTION_TLS_NAME = OPTION_TLS_PART + TLS_PARTS };
enum { OPTION_INSECURE = OPTION_TLS_NAME + 1, OPTION_DISK };

static int put_number(json_t *request, const char *key, const char *text, uint64_t unit,
                      struct error *err)
{
    uint64_t value;
    if (size_parse(text, unit, &value) || value > INT64_MAX)
        return error_set(err, -EINVAL, "--%s '%s': expected a number", key, text);
    char name[32];
    snprintf(name, sizeof(name), "%s", key);
    for (char *p = name; *p; p++)
        *p = *p == '-' ? '_' : *p;
    json_object_set_new(request, name, json_integer((json_int_t)value));
    return 0;
}

static int migrate_option(struct migrate_args *a, int c, struct error *err)
{
    switch (c) {
    case 'm':
        json_object_set_new(a->request, "mode", json_string(optarg));
        return 0;
    case 's':
        json_object_set_new(a->request, "on_stall", json_string(optarg));
        return 0;
    case 'c':
        json_object_set_new(a->request, "compress", json_string(optarg));
        return 0;
    case 'D':
        return put_number(a->request, "delta-cache", optarg, 1, err);
    case 'n':
        return put_number(a->request, "connections", optarg, 1, err);
    case 'B':
        json_object_set_new(a->request, "balloon", json_string(optarg));
        return 0;
    case 'R':
        a->report = optarg;
        json_object_set_new(a->request, "history", json_true());
        return 0;
    case 'p':
        json_object_set_new(a->request, "prepaging", json_string(optarg));
        return 0;
    case 'd':
        return put_number(a->request, "downtime-ms", optarg, 1, err);
    case 'b':
        return put_number(a->request, "bandwidth", optarg, 1, err);
    case 'r':
        return put_number(a->request, "max-rounds", optarg, 1, err);
    case OPTION_TLS:
        a->tls.dir = optarg;
        return 0;
    case OPTION_TLS_PART + TLS_CA:
    case OPTION_TLS_PART + TLS_CERT:
    case OPTION_TLS_PART + TLS_KEY:
    case OPTION_TLS_PART + TLS_PSK:
        a->tls.file[c - OPTION_TLS_PART] = optarg;
        return 0;
    case OPTION_TLS_NAME:
        json_object_set_new(a->request, "tls_name", json_string(optarg));
        return 0;
    case OPTION_INSECURE:
        json_object_set_new(a->request, "insecure", json_true());
        return 0;
    case OPTION_DISK:
        json_object_set_new(a->request, "disk", json_true());
        return 0;
    case 'j':
        a->json = true;
        return 0;
    case 'q':
        a->quiet = true;
        return 0;
    case 1: // as options, as they were before there were verbs
    case 2:
        a->verb = &verbs[c - 1];
        return 0;
    case 3:
        a->verb = &verbs[ARRAY_SIZE(verbs) - 1];
        return 0;
    default:
        return error_set(err, -EINVAL, "unknown option (ferry migrate --help)");
    }
}

static int migrate_parse(struct migrate_args *a, int argc, char **argv, struct error *err)
{
    static const struct option longs[] = {
        {"mode", required_argument, NULL, 'm'},
        {"downtime-ms", required_argument, NULL, 'd'},
        {"bandwidth", required_argument, NULL, 'b'},
        {"max-rounds", required_argument, NULL, 'r'},
        {"on-stall", required_argument, NULL, 's'},
        {"compress", required_argument, NULL, 'c'},
        {"delta-cache", required_argument, NULL, 'D'},
        {"connections", required_argument, NULL, 'n'},
        {"balloon", required_argument, NULL, 'B'},
        {"report", required_argument, NULL, 'R'},
        {"prepaging", required_argument, NULL, 'p'},
        {"tls", required_argument, NULL, OPTION_TLS},
        {"tls-ca", required_argument, NULL, OPTION_TLS_PART + TLS_CA},
        {"tls-cert", required_argument, NULL, OPTION_TLS_PART + TLS_CERT},
        {"tls-key", required_argument, NULL, OPTION_TLS_PART + TLS_KEY},
        {"psk", required_argument, NULL, OPTION_TLS_PART + TLS_PSK},
        {"tls-name", required_argument, NULL, OPTION_TLS_NAME},
        {"insecure", no_argument, NULL, OPTION_INSECURE},
        {"disk", no_argument, NULL, OPTION_DISK},
        {"json", no_argument, NULL, 'j'},
        {"quiet", no_argument, NULL, 'q'},
        {"help", no_argument, NULL, 'h'},
        {"status", no_argument, NULL, 1},
        {"cancel", no_argument, NULL, 2},
        {"force-resume", no_argument, NULL, 3},
        {0}};
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, ":jqh", longs, NULL)) != -1) {
        if (c == 'h') {
            printf("usage: %s\n", migrate_usage);
            return 1;
        }
        if (c == ':' || c == '?')
            return error_set(err, -EINVAL, "%s '%s' (ferry migrate --help)",
                             c == ':' ? "no value for" : "unknown option", argv[optind - 1]);
        int ret = migrate_option(a, c, err);
        if (ret)
            return ret;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(verbs) && optind < argc; i++)
        if (!a->verb && !strcmp(argv[optind], verbs[i].word))
            a->verb = &verbs[i];
    if (a->verb && optind < argc && !strcmp(argv[optind], a->verb->word))
        optind++;
    if (!a->verb)
        a->verb = &migrate_verb;
    if (argc - optind != (a->verb->target ? 2 : 1))
        return error_set(err, -EINVAL, "expected NAME%s (ferry migrate --help)",
                         a->verb->target ? " and tcp:HOST:PORT" : "");
    if (a->verb->target)
        json_object_set_new(a->request, "to", json_string(argv[optind + 1]));
    return 0;
}

// What the files hold goes to the VM's process, which may not see them. It is looked at here first,
// where its name is known.
static int put_tls(const struct migrate_args *a, struct error *err)
{
    static const char *const keys[TLS_PARTS] = {"tls_ca", "tls_cert", "tls_key", "psk"};
    struct tls_texts texts;
    struct tls *tls = NULL;
    int ret = tls_texts_read(&texts, &a->tls, err);
    if (!ret && tls_texts_given(&texts))
        ret = tls_create(&tls, &texts, NULL, err);
    tls_free(tls);
    for (unsigned i = 0; i < TLS_PARTS && !ret; i++)
        if (texts.text[i] && json_object_set_new(a->request, keys[i], json_string(texts.text[i])))
            ret = error_set(err, -EINVAL, "%s: not a text", texts.name[i]);
    tls_texts_free(&texts);
    return ret;
}

static json_int_t event_number(json_t *event, const char *key)
{
    return json_integer_value(json_object_get(event, key));
}

static void show_progress(json_t *event, void *arg)
{
    const struct migrate_args *a = arg;
    if (a->quiet || a->json)
        return;
    json_int_t all = event_number(event, "round_bytes"),
               left = event_number(event, "remaining_bytes");
    fprintf(stderr, "%-10s round %2lld %3lld %%  left %6lld MiB  %6.1f MiB/s  dirty %6.1f MiB/s",
            json_string_value(json_object_get(event, "phase")) ?: "?",
            (long long)event_number(event, "round"),
            (long long)(all > 0 && left <= all ? (all - left) * 100 / all : 0),
            (long long)(left >> 20), (double)event_number(event, "bandwidth") / (1 << 20),
            (double)event_number(event, "dirty_rate") / (1 << 20));
    if (event_number(event, "disk_bytes"))
        fprintf(stderr, "  disks %lld of %lld MiB",
                (long long)(event_number(event, "disk_sent_bytes") >> 20),
                (long long)(event_number(event, "disk_bytes") >> 20));
    if (event_number(event, "throttle_percent"))
        fprintf(stderr, "  held %lld %%", (long long)event_number(event, "throttle_percent"));
    if (event_number(event, "balloon_bytes"))
        fprintf(stderr, "  balloon %lld MiB",
                (long long)event_number(event, "balloon_bytes") >> 20);
    if (json_object_get(event, "expected_downtime_us"))
        fprintf(stderr, "  downtime %.1f ms",
                (double)event_number(event, "expected_downtime_us") / 1000);
    if (json_object_get(event, "time_left_us"))
        fprintf(stderr, "  %.1f s to go", (double)event_number(event, "time_left_us") / 1e6);
    fputc('\n', stderr);
}

static void print_report(json_t *report, int indent)
{
    const char *key;
    json_t *value;
    json_object_foreach(report, key, value)
    {
        if (json_is_object(value)) {
            printf("%*s%s\n", indent, "", key);
            print_report(value, indent + 2);
        } else {
            autofree char *text = json_dumps(value, JSON_ENCODE_ANY);
            printf("%*s%-*s %s\n", indent, "", 20 - indent, key,
                   json_is_string(value) ? json_string_value(value) : text);
        }
    }
}

int cli_migrate(int argc, char **argv)
{
    struct migrate_args args = {.request = json_object()};
    struct error err = {0};
    char path[108];
    json_t *report = NULL;
    int ret = migrate_parse(&args, argc, argv, &err);
    if (!ret)
        ret = put_tls(&args, &err);
    if (!ret)
        ret = control_path(argv[optind], path, sizeof(path), &err);
    if (!ret)
        ret = control_call(path, args.verb->method, args.verb->route,
                           json_object_size(args.request) ? args.request : NULL, &report,
                           show_progress, &args, &err);
    json_decref(args.request);
    if (ret)
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    if (args.report)
        ret = migrate_page_write(args.report, argv[optind], report, &err);
    json_object_del(report, "history"); // the page has it
    if (args.json) {
        json_dumpf(report, stdout, JSON_INDENT(2));
        printf("\n");
    } else {
        print_report(report, 0);
    }
    json_decref(report);
    return ret ? cli_fail(&err) : EXIT_OK;
}

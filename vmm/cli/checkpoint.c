// SPDX-License-Identifier: Apache-2.0
// ferry checkpoint: a VM that is saved every now and then.
#include "vmm/cli/checkpoint.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "migrate/checkpoint.h"
#include "vmm/cli/cli.h"
#include "vmm/util.h"

static const char usage[] =
    "ferry checkpoint NAME [--mtbf SPAN | --interval SPAN | --failure-log FILE] [OPTIONS]\n"
    "       ferry checkpoint NAME --stop | --explain\n"
    "       ferry checkpoint ls NAME | DIR\n"
    "       ferry checkpoint --explain | --simulate [OPTIONS]\n\n"
    "Saves the guest of VM NAME now and then: as often as costs it least when it fails each MTBF.\n"
    "`ferry rollback NAME` goes back; `ferry run --checkpoints DIR` also starts again by "
    "itself.\n\n"
    "      --mtbf SPAN        time between failures, e.g. 24h, 30d\n"
    "      --failure-log FILE measure that from a log of failures (default: of this VM's crashes)\n"
    "      --interval SPAN    time between checkpoints, instead of the best one\n"
    "      --daly             Daly's form of the interval instead of Young's\n"
    "      --dir DIR          where they go (default /var/lib/ferry/checkpoints/NAME)\n"
    "      --keep N           how many of the newest can be gone back to (default 5)\n"
    "      --hourly N         beside them, one of each of the last N hours (default 0)\n"
    "      --chain N          files from a full one to its last diff (default 16; 1: only full "
    "ones)\n"
    "      --stop             no more of them\n"
    "      --explain          what one costs, how often to take one, what is lost\n"
    "      --simulate         the policy against random failures\n"
    "      --cost SPAN        guest time a checkpoint costs, e.g. 100ms (without NAME)\n"
    "      --write-time SPAN  until a checkpoint is safe (without NAME)\n"
    "      --restore-time SPAN  from a failure until the guest runs again\n"
    "      --failures N       failures at each simulated interval (default 1000)\n"
    "      --seed N           of the random numbers (default 1)\n"
    "      --svg FILE         draw the simulation\n"
    "  -j, --json             figures as JSON\n\n"
    "examples: ferry checkpoint web --mtbf 24h\n"
    "          ferry checkpoint --simulate --mtbf 24h --cost 100ms --svg loss.svg";

enum { EXPLAIN = 1, SIMULATE, STOP, LIST };

struct command {
    struct checkpoint_args args;
    int action;
};

static int span_option(const char *name, double *slot, struct error *err)
{
    if (duration_parse(optarg, slot))
        return error_set(err, -EINVAL, "--%s '%.60s': expected a time, e.g. 250ms, 10s, 1h30m, 24h",
                         name, optarg);
    return 0;
}

static int number_option(const char *name, uint64_t min, uint64_t max, uint64_t *slot,
                         struct error *err)
{
    char *end;
    errno = 0;
    uint64_t n = strtoull(optarg, &end, 10);
    if (*optarg < '0' || *optarg > '9' || *end || errno || n < min || n > max)
        return error_set(err, -EINVAL, "--%s '%.60s': expected a number, %llu to %llu", name,
                         optarg, (unsigned long long)min, (unsigned long long)max);
    *slot = n;
    return 0;
}

static int count_option(const char *name, uint64_t min, uint64_t max, unsigned *slot,
                        struct error *err)
{
    uint64_t n = 0;
    int ret = number_option(name, min, max, &n, err);
    if (!ret)
        *slot = (unsigned)n;
    return ret;
}

static const struct option longs[] = {{"explain", no_argument, NULL, EXPLAIN},
                                      {"simulate", no_argument, NULL, SIMULATE},
                                      {"stop", no_argument, NULL, STOP},
                                      {"dir", required_argument, NULL, 'o'},
                                      {"keep", required_argument, NULL, 'k'},
                                      {"hourly", required_argument, NULL, 'y'},
                                      {"chain", required_argument, NULL, 'l'},
                                      {"mtbf", required_argument, NULL, 'm'},
                                      {"failure-log", required_argument, NULL, 'f'},
                                      {"interval", required_argument, NULL, 'i'},
                                      {"daly", no_argument, NULL, 'd'},
                                      {"cost", required_argument, NULL, 'c'},
                                      {"write-time", required_argument, NULL, 'w'},
                                      {"restore-time", required_argument, NULL, 'r'},
                                      {"failures", required_argument, NULL, 'n'},
                                      {"seed", required_argument, NULL, 's'},
                                      {"svg", required_argument, NULL, 'v'},
                                      {"json", no_argument, NULL, 'j'},
                                      {"help", no_argument, NULL, 'h'},
                                      {0}};

static int take(struct command *c, int option, struct error *err)
{
    struct checkpoint_args *a = &c->args;
    switch (option) {
    case EXPLAIN:
    case SIMULATE:
    case STOP:
        if (c->action)
            return error_set(err, -EINVAL, "--explain, --simulate, --stop: one of them");
        c->action = option;
        return 0;
    case 'm':
        a->mtbf = optarg;
        return span_option("mtbf", &a->settings.mtbf, err);
    case 'f':
        a->failure_log = optarg;
        return 0;
    case 'i':
        a->interval = optarg;
        return span_option("interval", &a->settings.interval, err);
    case 'd':
        a->settings.form = YOUNG_DALY;
        return 0;
    case 'c':
        return span_option("cost", &a->cost, err);
    case 'w':
        return span_option("write-time", &a->write_time, err);
    case 'r':
        a->restore_time = optarg;
        return span_option("restore-time", &a->settings.restart, err);
    case 'n':
        return count_option("failures", 1, 1000 * 1000, &a->failures, err);
    case 's':
        return number_option("seed", 0, INT64_MAX, &a->seed, err);
    case 'o':
        a->dir = optarg;
        return 0;
    case 'k':
        return count_option("keep", 1, CHECKPOINT_KEEP_MAX, &a->settings.keep, err);
    case 'y':
        return count_option("hourly", 0, CHECKPOINT_KEEP_MAX, &a->settings.hourly, err);
    case 'l':
        return count_option("chain", 1, CHECKPOINT_CHAIN_MAX, &a->settings.chain, err);
    case 'v':
        a->svg = optarg;
        return 0;
    default:
        a->json = true;
        return 0;
    }
}

static int arguments(struct command *c, int nr, char **words, struct error *err)
{
    struct checkpoint_args *a = &c->args;
    if (a->mtbf && a->failure_log)
        return error_set(err, -EINVAL, "--mtbf and --failure-log: one of them");
    if (nr == 2 && !strcmp(words[0], "ls") && !c->action) {
        c->action = LIST;
        a->vm = words[1];
        return 0;
    }
    if (nr > 1 || (nr && c->action == SIMULATE))
        return error_set(err, -EINVAL, "'%.60s' is too much (ferry checkpoint --help)",
                         words[nr - 1]);
    if (!nr && c->action != EXPLAIN && c->action != SIMULATE)
        return error_set(err, -EINVAL, "NAME is needed (ferry checkpoint --help)");
    a->vm = nr ? words[0] : NULL;
    if (a->vm && (a->cost > 0 || a->write_time > 0))
        return error_set(err, -EINVAL, "--cost, --write-time: of a VM they are measured");
    return 0;
}

static int parse(struct command *c, int argc, char **argv, struct error *err)
{
    opterr = 0;
    optind = 0;
    int option, ret;
    while ((option = getopt_long(argc, argv, ":jh", longs, NULL)) != -1) {
        if (option == 'h') {
            printf("usage: %s\n", usage);
            return 1;
        }
        if (option == ':' || option == '?')
            return error_set(err, -EINVAL, "%s '%s' (ferry checkpoint --help)",
                             option == ':' ? "no value for" : "unknown option", argv[optind - 1]);
        ret = take(c, option, err);
        if (ret)
            return ret;
    }
    return arguments(c, argc - optind, argv + optind, err);
}

static int act(struct command *c, struct error *err)
{
    struct checkpoint_args *a = &c->args;
    switch (c->action) {
    case LIST:
        return checkpoint_list(a->vm, a->json, err);
    case STOP:
        return checkpoint_end(a, err);
    case EXPLAIN:
        return a->vm ? checkpoint_explain_vm(a, err) : checkpoint_explain(a, err);
    case SIMULATE:
        return checkpoint_simulate(a, err);
    default:
        return checkpoint_begin(a, err);
    }
}

int cli_checkpoint(int argc, char **argv)
{
    struct command c = {.args = {.failures = 1000, .seed = 1}};
    struct error err = {0};
    checkpoint_settings_default(&c.args.settings);
    int ret = parse(&c, argc, argv, &err);
    if (!ret && c.args.failure_log)
        ret = checkpoint_failure_read(c.args.failure_log, &c.args.settings.mtbf, &err);
    if (!ret)
        ret = checkpoint_settings_check(&c.args.settings, &err);
    if (!ret)
        ret = act(&c, &err);
    return ret < 0 ? cli_fail(&err) : EXIT_OK;
}

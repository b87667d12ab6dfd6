// SPDX-License-Identifier: Apache-2.0
// ferry checkpoint: a VM that is saved every now and then.
#include "vmm/cli/checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "vmm/cli/cli.h"
#include "vmm/util.h"

static const char usage[] =
    "ferry checkpoint --explain | --simulate [OPTIONS]\n\n"
    "      --explain          what a checkpoint costs, how often to take one, what is lost\n"
    "      --simulate         the policy against random failures\n"
    "      --mtbf SPAN        time between failures, e.g. 24h, 30d\n"
    "      --failure-log FILE measure that from a log of failures\n"
    "      --interval SPAN    time between checkpoints, instead of the best one\n"
    "      --daly             Daly's form of the interval instead of Young's\n"
    "      --cost SPAN        guest time a checkpoint costs, e.g. 100ms\n"
    "      --write-time SPAN  until a checkpoint is safe\n"
    "      --restore-time SPAN  from a failure until the guest runs again\n"
    "      --failures N       failures at each simulated interval (default 1000)\n"
    "      --seed N           of the random numbers (default 1)\n"
    "      --svg FILE         draw the simulation\n"
    "  -j, --json             figures as JSON\n\n"
    "example: ferry checkpoint --simulate --mtbf 24h --cost 100ms --svg loss.svg";

enum { EXPLAIN = 1, SIMULATE };

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

static const struct option longs[] = {{"explain", no_argument, NULL, EXPLAIN},
                                      {"simulate", no_argument, NULL, SIMULATE},
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
    uint64_t n = 0;
    int ret;
    switch (option) {
    case EXPLAIN:
    case SIMULATE:
        if (c->action)
            return error_set(err, -EINVAL, "--explain or --simulate: one of them");
        c->action = option;
        return 0;
    case 'm':
        a->mtbf_given = true;
        return span_option("mtbf", &a->settings.mtbf, err);
    case 'f':
        a->failure_log = optarg;
        return 0;
    case 'i':
        return span_option("interval", &a->settings.interval, err);
    case 'd':
        a->settings.form = YOUNG_DALY;
        return 0;
    case 'c':
        return span_option("cost", &a->cost, err);
    case 'w':
        return span_option("write-time", &a->write_time, err);
    case 'r':
        return span_option("restore-time", &a->settings.restart, err);
    case 'n':
        ret = number_option("failures", 1, 1000 * 1000, &n, err);
        a->failures = (unsigned)n;
        return ret;
    case 's':
        return number_option("seed", 0, INT64_MAX, &a->seed, err);
    case 'v':
        a->svg = optarg;
        return 0;
    default:
        a->json = true;
        return 0;
    }
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
    if (optind != argc)
        return error_set(err, -EINVAL, "'%.60s' is too much (ferry checkpoint --help)",
                         argv[optind]);
    if (c->args.mtbf_given && c->args.failure_log)
        return error_set(err, -EINVAL, "--mtbf and --failure-log: one of them");
    return 0;
}

static int mtbf_measure(struct checkpoint_args *a, struct error *err)
{
    autofree char *text = malloc(FAILURES_LOG_MAX + 1);
    struct failures failures;
    if (!text)
        return error_set(err, -ENOMEM, "no memory for a failure log");
    autoclose int fd = open(a->failure_log, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "failure log %s", a->failure_log);
    size_t len = 0;
    ssize_t n;
    while ((n = read(fd, text + len, FAILURES_LOG_MAX + 1 - len)) > 0)
        len += (size_t)n;
    if (n < 0)
        return error_errno(err, "failure log %s", a->failure_log);
    int ret = failures_parse(text, len, time(NULL), &failures, err);
    if (ret)
        return error_prefix(err, "failure log %s", a->failure_log);
    a->settings.mtbf = failures_mtbf(&failures);
    return 0;
}

int cli_checkpoint(int argc, char **argv)
{
    struct command c = {.args = {.failures = 1000, .seed = 1}};
    struct error err = {0};
    checkpoint_settings_default(&c.args.settings);
    int ret = parse(&c, argc, argv, &err);
    if (!ret && c.args.failure_log)
        ret = mtbf_measure(&c.args, &err);
    if (!ret)
        ret = checkpoint_settings_check(&c.args.settings, &err);
    if (!ret && !c.action)
        ret = error_set(&err, -EINVAL,
                        "--explain or --simulate is needed (ferry checkpoint "
                        "--help)");
    if (!ret)
        ret = c.action == EXPLAIN ? checkpoint_explain(&c.args, &err)
                                  : checkpoint_simulate(&c.args, &err);
    return ret < 0 ? cli_fail(&err) : EXIT_OK;
}

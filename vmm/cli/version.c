// SPDX-License-Identifier: Apache-2.0
// `ferry version`: which Ferry, built how, with what.
#include <getopt.h>
#include <jansson.h>
#include <lz4.h>
#include <lzma.h>
#include <stdio.h>
#include <zlib.h>
#include <zstd.h>

#include "vmm/cli/cli.h"
#include "vmm/util.h"

#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif

struct fact {
    const char *name, *value;
};

// Names a build's unusual parts; "none" for an ordinary one.
static const char *build_features(void)
{
#if defined(__SANITIZE_ADDRESS__)
    return "address sanitizer";
#elif defined(__SANITIZE_THREAD__)
    return "thread sanitizer";
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
    return "address sanitizer";
#elif __has_feature(thread_sanitizer)
    return "thread sanitizer";
#else
    return "none";
#endif
#else
    return "none";
#endif
}

static void help(void)
{
    printf("Says which Ferry this is and what it was built with.\n\n"
           "usage: ferry version [--json]\n\n"
           "  -j, --json   one JSON object\n"
           "  -h, --help   this text\n\n"
           "examples:\n"
           "  ferry version\n"
           "  ferry version --json | jq -r .version\n");
}

static int print_json(const struct fact *facts, size_t nr)
{
    json_t *object = json_object();
    for (size_t i = 0; i < nr; i++)
        json_object_set_new(object, facts[i].name, json_string(facts[i].value));
    int ret = json_dumpf(object, stdout, JSON_INDENT(2));
    json_decref(object);
    putchar('\n');
    return ret;
}

int cli_version(int argc, char **argv)
{
    static const struct option options[] = {
        {"json", no_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {0}};
    bool json = false;
    int opt;
    opterr = 0;
    optind = 0;
    while ((opt = getopt_long(argc, argv, "jh", options, NULL)) != -1) {
        if (opt == 'h') {
            help();
            return EXIT_OK;
        }
        if (opt != 'j') {
            fprintf(stderr, "ferry: version: bad option '%s' (ferry version --help)\n",
                    argv[optind - 1]);
            return EXIT_USAGE;
        }
        json = true;
    }
    if (optind < argc) {
        fprintf(stderr, "ferry: version: unexpected argument '%s'\n", argv[optind]);
        return EXIT_USAGE;
    }

    const struct fact facts[] = {
        {"version", FERRY_VERSION},
        {"compiler", COMPILER},
        {"sanitizer", build_features()},
        {"jansson", jansson_version_str()},
        {"liburing", FERRY_LIBURING_VERSION}, // 2.3 cannot say it at run time
        {"zlib", zlibVersion()},
        {"liblzma", lzma_version_string()},
        {"lz4", LZ4_versionString()},
        {"zstd", ZSTD_versionString()},
    };
    int failed = 0;
    if (json) {
        failed = print_json(facts, ARRAY_SIZE(facts));
    } else {
        printf("ferry %s\n", FERRY_VERSION);
        for (size_t i = 1; i < ARRAY_SIZE(facts); i++)
            printf("  %-10s %s\n", facts[i].name, facts[i].value);
    }
    return failed || fflush(stdout) ? EXIT_FAILED : EXIT_OK;
}

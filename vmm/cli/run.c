// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "vmm/cli/api.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/session.h"

static const char usage[] =
    "ferry run --kernel FILE [OPTIONS]\n"
    "       ferry [run] --api-sock PATH [OPTIONS]\n\n"
    "Boots a guest. The console's escape key is Ctrl-] (then q quits, p presses the power "
    "button).\n"
    "example: ferry run -k vmlinux -i initramfs.cpio -c 2 -m 256M -a \"console=ttyS0 quiet\"";

static int dry_run(struct session *s)
{
    json_t *json = options_json(s->options);
    json_dumpf(json, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(json);
    return EXIT_OK;
}

int cli_run(int argc, char **argv)
{
    struct vm_options options;
    struct session session;
    struct error err = {0};
    options_init(&options);
    int ret = options_parse(&options, FOR_RUN, argc, argv, usage, NULL, 0, &err);
    if (!ret && !options.kernel && !options.api_sock && !options.config_file)
        ret = error_set(&err, -EINVAL,
                        "--kernel FILE is needed, or --config-file FILE, or --api-sock PATH "
                        "(ferry run --help)");
    if (!ret)
        ret = session_default_name(&options, &err);
    if (ret) {
        options_free(&options);
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    }

    int status;
    ret = *options.jail.dir && !options.dry_run ? jail_begin(&options, &status, &err) : 0;
    if (ret) {
        options_free(&options);
        return ret > 0 ? status : cli_fail(&err);
    }
    ret = session_init(&session, &options, &err);
    if (!ret && options.config_file)
        ret = api_take_file(&session, options.config_file, &err);
    if (!ret && options.kernel)
        ret = session_build(&session, &err);
    if (!ret && options.dry_run) {
        status = dry_run(&session);
    } else {
        if (!ret)
            ret = session_listen(&session, &err);
        if (!ret && options.kernel)
            ret = session_start(&session, &err);
        if (!ret)
            ret = session_serve(&session, &err);
        if (!ret)
            status = session_run(&session);
    }
    session_destroy(&session);
    options_free(&options);
    return ret ? cli_fail(&err) : status;
}

// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>

#include "vmm/cli/api.h"
#include "vmm/cli/arrival.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/session.h"
#include "vmm/cli/supervise.h"
#include "vmm/util.h"

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

static int checkpoints_begin(struct session *s, const char *from, struct error *err)
{
    autofree char *copy = from ? strdup(from) : NULL;
    return session_checkpoints(s, copy ? dirname(copy) : NULL, err);
}

// `checkpoint`: a name in the jail, or NULL.
static int boot(struct session *s, const char *checkpoint, struct error *err)
{
    struct vm_options *o = s->options;
    int ret = o->config_file ? api_take_file(s, o->config_file, err) : 0;
    if (!ret && o->kernel)
        ret = session_build(s, err);
    if (!ret && o->dry_run)
        return dry_run(s);
    if (!ret)
        ret = session_listen(s, err);
    s->from = checkpoint;
    if (!ret && o->kernel)
        ret = session_start(s, err);
    if (!ret)
        ret = session_serve(s, err);
    if (!ret)
        ret = checkpoints_begin(s, checkpoint, err);
    return ret ? ret : session_run(s);
}

// In a jail the guest is built from the command line, as it was at first, and made what it was at
// the checkpoint inside: what the file says about this host's files is not looked at.
static int go(struct session *s, const char *checkpoint, struct error *err)
{
    char inside[PATH_MAX];
    if (!checkpoint || !*s->options->jail.dir)
        return checkpoint ? arrival_restore(s, checkpoint, true, err) : boot(s, NULL, err);
    jail_inside(&s->options->jail, checkpoint, inside);
    return boot(s, inside, err);
}

static int run(void *context, const char *checkpoint, pid_t supervisor)
{
    struct vm_options *options = context;
    struct session session;
    struct error err = {0};
    int status;
    options->supervisor = supervisor;
    int ret = options->dry_run ? 0 : session_jail(options, &status, &err);
    if (ret) { // outside, and its VM has ended
        options_free(options);
        return ret > 0 ? status : cli_fail(&err);
    }
    ret = session_init(&session, options, &err);
    if (!ret)
        ret = go(&session, checkpoint, &err);
    session_destroy(&session);
    options_free(options);
    return ret < 0 ? cli_fail(&err) : ret;
}

int cli_run(int argc, char **argv)
{
    struct vm_options options;
    struct error err = {0};
    int status;
    options_init(&options);
    int ret = options_parse(&options, FOR_RUN, argc, argv, usage, NULL, 0, &err);
    if (!ret && !options.kernel && !options.api_sock && !options.config_file)
        ret = error_set(&err, -EINVAL,
                        "--kernel FILE is needed, or --config-file FILE, or --api-sock PATH "
                        "(ferry run --help)");
    if (!ret && *options.jail.dir && options.checkpoints)
        ret = outside_checkpoints(&options, &err);
    if (!ret)
        ret = session_default_name(&options, &err);
    if (ret) {
        options_free(&options);
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    }

    if (!options.checkpoints || options.dry_run)
        return run(&options, NULL, 0);
    ret = supervise_vm(options.checkpoints, options.name, run, &options, &status, &err);
    options_free(&options);
    return ret ? cli_fail(&err) : status;
}

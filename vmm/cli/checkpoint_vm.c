// SPDX-License-Identifier: Apache-2.0
// ferry checkpoint NAME, ferry checkpoint ls and ferry rollback: what a VM does with checkpoints.
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "migrate/checkpoint_dir.h"
#include "vmm/cli/checkpoint.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/jail.h"
#include "vmm/cli/registry.h"
#include "vmm/control.h"
#include "vmm/util.h"

static int call(const char *name, const char *method, const char *route, json_t *body,
                json_t **result, struct error *err)
{
    char path[108];
    json_t *ignored = NULL;
    int ret = control_path(name, path, sizeof(path), err);
    if (!ret)
        ret = control_call(path, method, route, body, result ? result : &ignored, NULL, NULL, err);
    json_decref(body);
    json_decref(ignored);
    return ret;
}

// Where a VM's checkpoints go unless it is said.
static int default_dir(const char *name, char path[PATH_MAX], struct error *err)
{
    struct jail_config jail;
    if (registry_jail(name, &jail, NULL, NULL)) {
        jail_outside(&jail, JAIL_SHARED, path);
        return 0;
    }
    const char *state = getenv("FERRY_STATE_DIR"), *xdg = getenv("XDG_STATE_HOME"),
               *home = getenv("HOME");
    int len;
    if (state && *state == '/')
        len = snprintf(path, PATH_MAX, "%s/%s", state, name);
    else if (!geteuid())
        len = snprintf(path, PATH_MAX, "/var/lib/ferry/checkpoints/%s", name);
    else if (xdg && *xdg == '/')
        len = snprintf(path, PATH_MAX, "%s/ferry/checkpoints/%s", xdg, name);
    else
        len = snprintf(path, PATH_MAX, "%s/.local/state/ferry/checkpoints/%s", home ? home : "",
                       name);
    return len < PATH_MAX ? 0 : error_set(err, -ENAMETOOLONG, "the directory's name is too long");
}

static void absolute(const char *path, char whole[PATH_MAX])
{
    autofree char *cwd = *path == '/' ? NULL : getcwd(NULL, 0);
    snprintf(whole, PATH_MAX, "%s%s%s", cwd ? cwd : "", cwd ? "/" : "", path);
}

static json_t *body_of(const struct checkpoint_args *a, const char *dir)
{
    char log[PATH_MAX];
    registry_path(a->vm, dir, log);
    json_t *body = json_pack("{s:s, s:i, s:i, s:i}", "dir", log, "keep", (int)a->settings.keep,
                             "hourly", (int)a->settings.hourly, "chain", (int)a->settings.chain);
    if (a->interval)
        json_object_set_new(body, "interval", json_string(a->interval));
    if (a->mtbf)
        json_object_set_new(body, "mtbf", json_string(a->mtbf));
    if (a->restore_time)
        json_object_set_new(body, "restore_time", json_string(a->restore_time));
    if (a->settings.form == YOUNG_DALY)
        json_object_set_new(body, "daly", json_true());
    if (a->failure_log) {
        registry_path(a->vm, a->failure_log, log);
        json_object_set_new(body, "failure_log", json_string(log));
    }
    return body;
}

int checkpoint_begin(const struct checkpoint_args *args, struct error *err)
{
    char dir[PATH_MAX];
    int ret = args->dir ? 0 : default_dir(args->vm, dir, err);
    if (args->dir)
        absolute(args->dir, dir);
    if (!ret)
        ret = call(args->vm, "PUT", "/checkpoint", body_of(args, dir), NULL, err);
    if (!ret && args->json)
        printf("{\"dir\": \"%s\"}\n", dir);
    else if (!ret)
        printf("checkpoints of %s go to %s\n", args->vm, dir);
    return ret;
}

int checkpoint_end(const struct checkpoint_args *args, struct error *err)
{
    return call(args->vm, "DELETE", "/checkpoint", NULL, NULL, err);
}

// --- explain

static double figure(json_t *json, const char *key)
{
    return json_number_value(json_object_get(json, key));
}

static const char *span(double seconds, char text[FAILURES_TEXT_MAX])
{
    duration_format(seconds, text);
    return text;
}

static void print_counts(json_t *status)
{
    json_t *last = json_object_get(status, "last");
    const char *error = json_string_value(json_object_get(status, "error"));
    char text[FAILURES_TEXT_MAX];
    printf("\n  %-14s %10lld   in %s, %lld removed, %lld merged, %lld failed\n", "made",
           (long long)json_integer_value(json_object_get(status, "made")),
           json_string_value(json_object_get(status, "dir")),
           (long long)json_integer_value(json_object_get(status, "removed")),
           (long long)json_integer_value(json_object_get(status, "merged")),
           (long long)json_integer_value(json_object_get(status, "failed")));
    printf("  %-14s %10s\n", "next in", span(figure(status, "next_s"), text));
    if (last)
        printf("  %-14s %10s   %s, the guest lost %.1f ms, %lld KiB\n", "last",
               json_is_true(json_object_get(last, "full")) ? "full" : "diff",
               json_string_value(json_object_get(last, "name")),
               (figure(last, "pause_us") + figure(last, "fault_us")) / 1000,
               (long long)json_integer_value(json_object_get(last, "bytes")) / 1024);
    if (error)
        printf("  %-14s %s\n", "error", error);
}

int checkpoint_explain_vm(const struct checkpoint_args *args, struct error *err)
{
    json_t *status = NULL;
    int ret = call(args->vm, "GET", "/checkpoint", NULL, &status, err);
    if (ret)
        return ret;
    if (args->json) {
        json_dumpf(status, stdout, JSON_INDENT(2));
        printf("\n");
    } else {
        json_t *model = json_object_get(status, "model");
        const struct young_model m = {figure(model, "cost_s"), figure(model, "write_time_s"),
                                      figure(model, "restore_time_s"), figure(model, "mtbf_s")};
        const char *form = json_string_value(json_object_get(model, "form"));
        checkpoint_model_print(&m, form && !strcmp(form, "daly") ? YOUNG_DALY : YOUNG_SQUARE_ROOT,
                               figure(model, "interval_s"),
                               json_is_true(json_object_get(status, "fixed")),
                               json_is_true(json_object_get(model, "measured")));
        print_counts(status);
    }
    json_decref(status);
    return 0;
}

// --- ls

// The directory, or that of the VM of this name.
static int dir_of(const char *what, char dir[PATH_MAX], struct error *err)
{
    struct stat st;
    if (strchr(what, '/') || (!stat(what, &st) && S_ISDIR(st.st_mode))) {
        absolute(what, dir);
        return 0;
    }
    json_t *status = NULL;
    struct error why;
    if (call(what, "GET", "/checkpoint", NULL, &status, &why)) // ended, or takes none now
        return default_dir(what, dir, err);
    struct jail_config jail;
    const char *said = json_string_value(json_object_get(status, "dir")) ?: "";
    if (registry_jail(what, &jail, NULL, NULL))
        jail_outside(&jail, said, dir);
    else
        snprintf(dir, PATH_MAX, "%s", said);
    json_decref(status);
    return 0;
}

static json_t *file_json(const struct checkpoint_file *f)
{
    const struct snapfile_info *i = &f->info;
    json_t *json = json_pack("{s:s, s:i, s:b}", "name", f->name, "number", (int)f->number,
                             "readable", (int)f->readable);
    if (f->readable)
        json_object_update_new(json, json_pack("{s:s, s:I, s:I, s:I, s:I}", "kind",
                                               i->kind == SNAPFILE_DIFF ? "diff" : "full",
                                               "created", (json_int_t)i->created_s, "bytes",
                                               (json_int_t)i->file_bytes, "data_pages",
                                               (json_int_t)i->data_pages, "memory_bytes",
                                               (json_int_t)(i->pages * PAGE_SIZE)));
    if (f->readable && i->kind == SNAPFILE_DIFF)
        json_object_set_new(json, "parent", json_string(i->parent));
    return json;
}

static void file_print(const struct checkpoint_file *f)
{
    const struct snapfile_info *i = &f->info;
    struct tm tm;
    time_t created = i->created_s;
    char when[32] = "?";
    if (!f->readable) {
        printf("%-26s damaged\n", f->name);
        return;
    }
    if (localtime_r(&created, &tm))
        strftime(when, sizeof(when), "%F %T", &tm);
    printf("%-26s %-19s  %-4s %10llu %8llu KiB  %s\n", f->name, when,
           i->kind == SNAPFILE_DIFF ? "diff" : "full", (unsigned long long)i->data_pages,
           (unsigned long long)i->file_bytes / 1024, i->kind == SNAPFILE_DIFF ? i->parent : "");
}

int checkpoint_list(const char *what, bool json, struct error *err)
{
    char path[PATH_MAX];
    struct checkpoint_dir dir;
    int ret = dir_of(what, path, err);
    if (!ret)
        ret = checkpoint_dir_read(&dir, path, err);
    if (ret)
        return ret;
    json_t *files = json_array();
    if (!json)
        printf("%-26s %-19s  %-4s %10s %12s  %s\n", "CHECKPOINT", "MADE", "KIND", "PAGES", "SIZE",
               "OF");
    for (unsigned i = 0; i < dir.nr; i++) {
        if (json)
            json_array_append_new(files, file_json(&dir.files[i]));
        else
            file_print(&dir.files[i]);
    }
    if (json) {
        json_t *all = json_pack("{s:s, s:O}", "dir", dir.path, "checkpoints", files);
        json_dumpf(all, stdout, JSON_INDENT(2));
        printf("\n");
        json_decref(all);
    }
    json_decref(files);
    checkpoint_dir_free(&dir);
    return 0;
}

// --- rollback

static const char rollback_usage[] =
    "ferry rollback NAME [CHECKPOINT] [--json]\n\n"
    "The guest of VM NAME becomes what it was at CHECKPOINT: a number or a name of `ferry\n"
    "checkpoint ls NAME`, or a snapshot file's path; without it, the newest. Every byte is "
    "checked\n"
    "first. Name, console, disks and sockets of the VM stay; what the guest did since is gone.\n"
    "example: ferry rollback web 12";

static int rollback_find(const char *vm, const char *which, char path[PATH_MAX], struct error *err)
{
    struct checkpoint_dir dir;
    char where[PATH_MAX];
    if (strchr(which, '/')) {
        absolute(which, path);
        return 0;
    }
    int ret = dir_of(vm, where, err);
    if (!ret)
        ret = checkpoint_dir_read(&dir, where, err);
    if (ret)
        return ret;
    ret = checkpoint_dir_find(&dir, which, path, err);
    checkpoint_dir_free(&dir);
    return ret;
}

static int rollback(const char *vm, const char *which, bool json, struct error *err)
{
    char path[PATH_MAX], inside[PATH_MAX];
    int ret = rollback_find(vm, which, path, err);
    if (ret)
        return ret;
    registry_path(vm, path, inside);
    ret = call(vm, "PUT", "/rollback", json_pack("{s:s}", "path", inside), NULL, err);
    if (!ret && json)
        printf("{\"path\": \"%s\"}\n", path);
    else if (!ret)
        printf("%s is as it was at %s\n", vm, path);
    return ret;
}

int cli_rollback(int argc, char **argv)
{
    static const struct option longs[] = {
        {"json", no_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {0}};
    struct error err;
    bool json = false;
    int c;
    opterr = 0;
    optind = 0;
    while ((c = getopt_long(argc, argv, ":jh", longs, NULL)) != -1) {
        if (c == 'h') {
            printf("usage: %s\n", rollback_usage);
            return EXIT_OK;
        }
        json |= c == 'j';
        if (c != 'j') {
            error_set(&err, -EINVAL, "unknown option '%s' (ferry rollback --help)",
                      argv[optind - 1]);
            return cli_fail(&err);
        }
    }
    int given = argc - optind;
    if (given < 1 || given > 2) {
        error_set(&err, -EINVAL, "%d arguments: expected NAME [CHECKPOINT] (ferry rollback --help)",
                  given);
        return cli_fail(&err);
    }
    int ret = rollback(argv[optind], given == 2 ? argv[optind + 1] : "newest", json, &err);
    return ret ? cli_fail(&err) : EXIT_OK;
}

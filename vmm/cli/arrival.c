// SPDX-License-Identifier: Apache-2.0
// ferry receive and ferry restore: a VM that comes from a stream or a file.
#include "vmm/cli/arrival.h"

#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>

#include "devices/platform.h"
#include "migrate/channel.h"
#include "migrate/checkpoint_dir.h"
#include "migrate/receive.h"
#include "migrate/snapshot.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/new_mac.h"
#include "vmm/cli/session.h"
#include "vmm/cli/supervise.h"

struct arrival {
    struct session *session;
    struct receive *receive;
    struct tls *tls;
    pthread_t thread;
    struct loop_call done_call;
    bool started, done;
    struct vm *vm; // what receive_run gave
    int ret;
    struct error err;
};

// --- the receiving thread asks the loop's thread to build, announce and drop the VM

struct errand {
    struct loop_call call;
    struct arrival *arrival;
    int (*fn)(struct errand *errand);
    const char *json;
    struct vm *vm;
    struct error *err;
    int ret;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool finished;
};

static void errand_run(void *arg)
{
    struct errand *e = arg;
    int ret = e->fn(e);
    pthread_mutex_lock(&e->lock);
    e->ret = ret;
    e->finished = true;
    pthread_cond_signal(&e->changed);
    pthread_mutex_unlock(&e->lock);
}

static int errand_wait(struct errand *e)
{
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->changed, NULL);
    e->call = (struct loop_call) {errand_run, e, NULL};
    loop_call(e->arrival->session->loop, &e->call);
    pthread_mutex_lock(&e->lock);
    while (!e->finished)
        pthread_cond_wait(&e->changed, &e->lock);
    pthread_mutex_unlock(&e->lock);
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
    return e->ret;
}

static int build(struct errand *e)
{
    struct migrate_hooks *hooks = &e->arrival->session->hooks;
    return hooks->create_vm(hooks->context, e->json, &e->vm, e->err);
}

static int create_vm(void *context, const char *json, struct vm **vm, struct error *err)
{
    struct errand e = {.arrival = context, .fn = build, .json = json, .err = err};
    int ret = errand_wait(&e);
    *vm = e.vm;
    return ret;
}

static int drop(struct errand *e)
{
    session_vm_drop(e->arrival->session);
    return 0;
}

static void destroy_vm(void *context, struct vm *vm)
{
    struct errand e = {.arrival = context, .fn = drop};
    errand_wait(&e);
}

static int announce(struct errand *e)
{
    struct session *s = e->arrival->session;
    struct error err;
    log_write(&s->vm->log, LOG_INFO, "arrived, runs here");
    session_arrived(s);
    // A guest that runs is worth more than its control socket. (One in a jail has it already.)
    if (!s->outside.cwd && (session_listen(s, &err) || session_serve(s, &err)))
        log_write(&s->vm->log, LOG_ERROR, "no control socket: %s", err.text);
    return session_confine(s, e->err);
}

static void arrived(void *context, struct vm *vm)
{
    struct error err;
    struct errand e = {.arrival = context, .fn = announce, .err = &err};
    if (errand_wait(&e))
        vm_request_stop(vm, VM_STOP_ERROR, 0, "%s", err.text);
}

// In the receiving thread: the loop's may stand still for want of a page.
static void severed(void *context, struct vm *vm, const struct error *why)
{
    struct arrival *a = context;
    life_move(&a->session->life, why ? LIFE_PAUSED : LIFE_RUNNING, NULL);
    if (why)
        log_write(&vm->log, LOG_ERROR,
                  "%s; the guest stands still until the source comes back (there: ferry migrate "
                  "recover)",
                  why->text);
    else
        log_write(&vm->log, LOG_INFO, "the source is back, the guest goes on");
}

// --- the receiving thread

static void receive_done(void *arg)
{
    struct arrival *a = arg;
    a->done = true;
    if (a->ret && a->vm)
        log_write(&a->vm->log, LOG_ERROR,
                  "%s; the guest is kept, paused, without the pages that never came", a->err.text);
    else if (a->ret)
        loop_stop(a->session->loop);
}

static void *receive_main(void *arg)
{
    struct arrival *a = arg;
    struct receive_report report;
    seccomp_enter_or_abort(SECCOMP_WORKER, a->session->options->vm.seccomp);
    a->ret = receive_run(a->receive, &a->vm, &report, &a->err);
    a->done_call = (struct loop_call) {receive_done, a, NULL};
    loop_call(a->session->loop, &a->done_call);
    return NULL;
}

void arrival_cancel(struct arrival *a)
{
    if (a->receive)
        receive_cancel(a->receive);
}

void arrival_settle(struct arrival *a)
{
    arrival_cancel(a);
    while (a->started && !a->done)
        if (loop_turn(a->session->loop, true, NULL))
            break;
    if (a->started)
        pthread_join(a->thread, NULL);
    a->started = false;
    receive_free(a->receive); // before the VM goes whose pages it may still serve
    a->receive = NULL;
}

// The files are read here, before the process shuts itself off from them.
static int arrival_tls(struct arrival *a, const struct vm_options *o, struct error *err)
{
    const struct tls_files files = {.dir = o->tls,
                                    .file = {[TLS_CA] = o->tls_ca,
                                             [TLS_CERT] = o->tls_cert,
                                             [TLS_KEY] = o->tls_key,
                                             [TLS_PSK] = o->psk}};
    struct tls_texts texts;
    int ret = tls_texts_read(&texts, &files, err);
    if (!ret && tls_texts_given(&texts))
        ret = tls_create(&a->tls, &texts, NULL, err);
    tls_texts_free(&texts);
    return ret;
}

static struct channel_security security_of(const struct arrival *a)
{
    return (struct channel_security) {a->tls, a->session->options->insecure};
}

static int arrival_start(struct arrival *a, int listen_fd, const struct migrate_hooks *hooks,
                         struct error *err)
{
    struct receive_params params;
    receive_params_default(&params);
    params.security = security_of(a);
    int ret = receive_create(&a->receive, listen_fd, hooks, &params, err);
    if (ret)
        return ret;
    a->session->arrival = a;
    ret = pthread_create(&a->thread, NULL, receive_main, a);
    if (ret)
        return error_set(err, -ret, "cannot start the receiving thread");
    a->started = true;
    return 0;
}

// Whoever is in a jail has its sockets before, and answers that it is starting.
static int jailed_before(struct session *s, struct error *err)
{
    int ret = session_enter(s, err);
    if (!ret)
        ret = life_move(&s->life, LIFE_STARTING, err);
    return ret ? ret : session_serve(s, err);
}

static int receive_session(struct session *s, struct arrival *a, struct error *err)
{
    autoclose int listen_fd = -1;
    char bound[128];
    int ret = channel_listen(s->options->listen, &listen_fd, bound, sizeof(bound), err);
    if (ret)
        return ret;
    a->session = s;
    const struct channel_security security = security_of(a);
    ret = channel_listen_check(listen_fd, s->options->listen, &security, err);
    if (ret)
        return ret;
    session_hooks(s, &s->hooks);
    const struct migrate_hooks hooks = {.context = a,
                                        .describe = s->hooks.describe,
                                        .create_vm = create_vm,
                                        .destroy_vm = destroy_vm,
                                        .arrived = arrived,
                                        .severed = severed};
    ret = *s->options->jail.dir ? jailed_before(s, err) : 0;
    if (!ret)
        ret = arrival_start(a, listen_fd, &hooks, err);
    if (ret)
        return ret;
    fprintf(stderr, "ferry: waiting for a guest on %s\n", bound);
    ret = session_run(s);
    if (!a->ret || a->vm)
        return ret;
    *err = a->err;
    return a->ret;
}

static const char receive_usage[] =
    "ferry receive --listen tcp:HOST:PORT [OPTIONS]\n\n"
    "Waits for one VM, takes it over and runs it here. The guest's hardware comes with it.\n"
    "example: ferry receive --listen tcp:0.0.0.0:7000 --tls /etc/ferry/tls --name web "
    "--console unix:/tmp/web.console";

int cli_receive(int argc, char **argv)
{
    struct vm_options options;
    struct session session;
    struct arrival arrival = {0};
    struct error err = {0};
    int status;
    options_init(&options);
    int ret = options_parse(&options, FOR_RECEIVE, argc, argv, receive_usage, NULL, 0, &err);
    if (!ret && !options.listen)
        ret = error_set(&err, -EINVAL, "--listen ADDRESS is needed (ferry receive --help)");
    if (!ret)
        ret = session_default_name(&options, &err);
    if (ret) {
        options_free(&options);
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    }
    ret = session_jail(&options, &status, &err);
    if (!ret)
        ret = arrival_tls(&arrival, &options, &err);
    if (ret) { // outside a jail: its VM has ended
        tls_free(arrival.tls);
        options_free(&options);
        return ret > 0 ? status : cli_fail(&err);
    }
    ret = session_init(&session, &options, &err);
    if (!ret)
        ret = receive_session(&session, &arrival, &err);
    if (arrival.receive)
        arrival_settle(&arrival);
    tls_free(arrival.tls);
    session_destroy(&session);
    options_free(&options);
    return ret < 0 ? cli_fail(&err) : ret;
}

// --- restore

static const char restore_usage[] =
    "ferry restore FILE | --newest DIR [OPTIONS]\n\n"
    "Continues the guest that `ferry snapshot` saved to FILE, or the newest whole one that\n"
    "`ferry checkpoint` saved to DIR. Its hardware comes with it.\n"
    "example: ferry restore web.snapshot --name web2";

// The guest is saved again where it was saved before.
static int checkpoints_go_on(struct session *s, const char *path, bool continues, struct error *err)
{
    autofree char *whole = continues ? realpath(path, NULL) : NULL;
    if (continues && !whole)
        return error_errno(err, "%s", path);
    return session_checkpoints(s, continues ? dirname(whole) : NULL, err);
}

static int restore_load(struct session *s, const char *path, struct snapshot_report *report,
                        struct error *err)
{
    const struct vm_options *o = s->options;
    struct snapshot_load_params params = {.path = path,
                                          .mode = o->map    ? LAZY_MAP
                                                  : o->lazy ? LAZY_FAULT
                                                            : LAZY_NONE,
                                          .name = o->disks ? o->name : NULL};
    lazy_params_default(&params.lazy, path);
    if (o->map && o->lazy)
        return error_set(err, -EINVAL, "--lazy or --map, not both");
    return snapshot_load_as(&params, &s->hooks, &s->vm, &s->lazy, report, err);
}

// Disks go back with the guest, whatever they were when it was first run.
static int disks_go_back(struct session *s, const char *path, struct error *err)
{
    struct snapfile *file;
    int ret = snapfile_open(&file, path, err);
    if (ret)
        return ret;
    session_disks_forget(s, file);
    snapfile_close(file);
    s->options->disks = true;
    return 0;
}

// Everything that a file says, and the file itself, is looked for inside.
static int jailed_path(struct session *s, const char **path, char inside[PATH_MAX],
                       struct error *err)
{
    autofree char *whole = realpath(*path, NULL);
    if (!whole)
        return error_errno(err, "%s", *path);
    if (!jail_inside(&s->options->jail, whole, inside))
        return error_set(err, -EINVAL, "%s: not in the jail %s", whole, s->options->jail.dir);
    *path = inside;
    return session_enter(s, err);
}

int arrival_restore(struct session *s, const char *path, bool continues, struct error *err)
{
    char inside[PATH_MAX];
    int entered = *s->options->jail.dir ? jailed_path(s, &path, inside, err) : 0;
    if (entered)
        return entered;
    int before = continues ? disks_go_back(s, path, err) : 0;
    if (before)
        return before;
    session_hooks(s, &s->hooks);
    struct snapshot_report report;
    uint64_t start = time_ns();
    s->restored = true;
    int ret = restore_load(s, path, &report, err);
    if (!ret && s->board.vmgenid) // the file may be restored many times
        ret = vmgenid_renew(s->board.vmgenid, s->board.power, err);
    if (!ret && !s->outside.cwd)
        ret = session_listen(s, err);
    if (ret)
        return ret;
    vm_resume(s->vm);
    uint64_t now = time_ns(); // whoever knows when we were started subtracts: scripts/bench
    log_write(&s->vm->log, LOG_DEBUG, "restored from %s in %llu us, runs since %llu ns", path,
              (unsigned long long)(now - start) / 1000, (unsigned long long)now);
    session_arrived(s);
    ret = session_serve(s, err);
    if (!ret && s->migrate) {
        autofree char *whole = realpath(path, NULL); // the next diff is of this one
        ret = migrate_commands_base(s->migrate, whole ? whole : path, report.id, false, err);
    }
    if (!ret)
        ret = checkpoints_go_on(s, path, continues, err);
    return ret ? ret : session_run(s);
}

// Each one that is damaged is named.
static void passed_over(void *context, const char *name, const struct error *why)
{
    fprintf(stderr, "ferry: %s is passed over: %s\n", name, why->text);
}

static int newest(const char *path, char found[PATH_MAX], struct error *err)
{
    struct checkpoint_dir dir;
    int ret = checkpoint_dir_read(&dir, path, err);
    if (ret)
        return ret;
    ret = checkpoint_dir_newest(&dir, 0, found, passed_over, NULL, err);
    checkpoint_dir_free(&dir);
    return ret;
}

struct restore {
    struct vm_options *options;
    const char *path;
};

static int restore_run(void *context, const char *checkpoint, pid_t supervisor)
{
    const struct restore *r = context;
    struct session session;
    struct error err = {0};
    bool continues = checkpoint || r->options->newest;
    int status;
    r->options->supervisor = supervisor;
    int ret = session_jail(r->options, &status, &err);
    if (ret) { // outside a jail: its VM has ended
        options_free(r->options);
        return ret > 0 ? status : cli_fail(&err);
    }
    ret = session_init(&session, r->options, &err);
    if (!ret && r->options->new_mac && !checkpoint) // which has the address that it got
        ret = new_mac_apply(r->options, r->options->new_mac, &err);
    if (!ret)
        ret = arrival_restore(&session, checkpoint ? checkpoint : r->path, continues, &err);
    session_destroy(&session);
    options_free(r->options);
    return ret < 0 ? cli_fail(&err) : ret;
}

static int restore_shared(struct vm_options *o, struct error *err)
{
    char whole[PATH_MAX], inside[PATH_MAX];
    if (o->checkpoints)
        return outside_checkpoints(o, err);
    if (!realpath(o->newest, whole))
        return error_errno(err, "--newest %s", o->newest);
    if (!jail_inside(&o->jail, whole, inside))
        snprintf(o->jail.shared, sizeof(o->jail.shared), "%s", whole);
    return 0;
}

int cli_restore(int argc, char **argv)
{
    struct vm_options options;
    struct error err = {0};
    char *path = NULL, found[PATH_MAX];
    int status;
    options_init(&options);
    int ret = options_parse(&options, FOR_RESTORE, argc, argv, restore_usage, &path, 1, &err);
    if (!ret && !path == !options.newest)
        ret = error_set(&err, -EINVAL, "FILE or --newest DIR is needed (ferry restore --help)");
    if (!ret && *options.jail.dir && (options.checkpoints || options.newest))
        ret = restore_shared(&options, &err);
    if (!ret && options.newest)
        ret = newest(options.newest, found, &err);
    if (!ret)
        ret = session_default_name(&options, &err);
    if (ret) {
        options_free(&options);
        return ret > 0 ? EXIT_OK : cli_fail(&err);
    }
    struct restore restore = {&options, path ? path : found};
    if (!options.checkpoints)
        return restore_run(&restore, NULL, 0);
    ret = supervise_vm(options.checkpoints, options.name, restore_run, &restore, &status, &err);
    options_free(&options);
    return ret ? cli_fail(&err) : status;
}

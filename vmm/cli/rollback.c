// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/rollback.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "devices/platform.h"
#include "migrate/snapshot.h"
#include "vmm/cli/session.h"
#include "vmm/util.h"

struct rollback {
    struct session *session;
    struct control_request *req;
    struct snapshot_back *back;
    int (*work)(struct snapshot_back *back, struct error *err); // the thread's
    pthread_t thread;
    struct loop_call done;
    enum life_state before;
    json_t *policy; // of the checkpoints that were taken; NULL: none were
    int ret;        // of `work`
    struct error err;
};

static int guest_state(struct session *s, struct snapshot_back *back, struct error *err)
{
    int ret = snapshot_back_state(back, err);
    if (!ret && s->board.vmgenid)
        ret = vmgenid_renew(s->board.vmgenid, s->board.power, err);
    return ret;
}

int rollback_start_from(struct session *s, const char *path, struct error *err)
{
    struct snapshot_back *back;
    session_hooks(s, &s->hooks);
    int ret = snapshot_back_open(&back, path, s->vm, &s->hooks, err);
    if (ret)
        return ret;
    ret = snapshot_back_clear(back, err);
    if (!ret)
        ret = snapshot_back_fill(back, err);
    if (!ret)
        ret = guest_state(s, back, err);
    snapshot_back_close(back);
    return ret;
}

// --- the thread

static void *rollback_main(void *arg)
{
    struct rollback *r = arg;
    seccomp_enter_or_abort(SECCOMP_WORKER, r->session->options->vm.seccomp);
    r->ret = r->work(r->back, &r->err);
    loop_call(r->session->loop, &r->done);
    return NULL;
}

static int verify(struct snapshot_back *back, struct error *err)
{
    return snapshot_back_verify(back, err);
}

static int work_begin(struct rollback *r, int (*work)(struct snapshot_back *, struct error *),
                      void (*done)(void *arg), struct error *err)
{
    r->work = work;
    r->done = (struct loop_call) {done, r, NULL};
    int ret = pthread_create(&r->thread, NULL, rollback_main, r);
    return ret ? error_set(err, -ret, "cannot start a thread: %s", strerror(ret)) : 0;
}

// --- the loop's thread

static void finish(struct rollback *r, int ret, const struct error *err)
{
    struct session *s = r->session;
    struct error none;
    if (r->policy && !vm_stopped(s->vm) &&
        checkpoint_commands_start(s->checkpoints, r->policy, &none))
        log_write(&s->vm->log, LOG_ERROR, "no more checkpoints: %s", none.text);
    json_decref(r->policy);
    snapshot_back_close(r->back);
    s->rollback = NULL;
    if (ret)
        control_reply_error(r->req, err);
    else
        control_reply_ok(r->req, NULL);
    free(r);
}

static void guest_lost(struct rollback *r, struct error *err)
{
    error_prefix(err, "the guest is lost");
    vm_request_stop(r->session->vm, VM_STOP_ERROR, 0, "%s", err->text);
    finish(r, err->code, err);
}

static void filled(void *arg)
{
    struct rollback *r = arg;
    struct session *s = r->session;
    pthread_join(r->thread, NULL);
    int ret = r->ret;
    if (!ret && vm_stopped(s->vm))
        ret = error_set(&r->err, -ECANCELED, "the VM has been stopped meanwhile");
    if (!ret)
        ret = guest_state(s, r->back, &r->err);
    if (ret) {
        guest_lost(r, &r->err);
        return;
    }
    life_move(&s->life, r->before, NULL);
    if (r->before == LIFE_RUNNING)
        vm_resume(s->vm);
    finish(r, 0, NULL);
}

// The guest that is there stands still, and goes.
static int guest_leave(struct rollback *r, struct error *err)
{
    struct session *s = r->session;
    r->before = life_get(&s->life);
    if (r->before != LIFE_RUNNING && r->before != LIFE_PAUSED)
        return error_set(err, -EPERM, "rollback: the VM is %s by now", life_name(r->before));
    int ret = life_move(&s->life, LIFE_STARTING, err);
    if (ret)
        return ret;
    ret = vm_pause(s->vm, err);
    if (ret) {
        life_move(&s->life, r->before, NULL);
        if (r->before == LIFE_RUNNING)
            vm_resume(s->vm);
    }
    return ret;
}

static void verified(void *arg)
{
    struct rollback *r = arg;
    struct session *s = r->session;
    pthread_join(r->thread, NULL);
    int ret = r->ret;
    if (!ret) {
        r->policy = json_incref(checkpoint_commands_body(s->checkpoints));
        checkpoint_commands_stop(s->checkpoints); // one may be under way: that is given up
        ret = guest_leave(r, &r->err);
    }
    if (ret) {
        finish(r, ret, &r->err);
        return;
    }
    lazy_free(s->lazy); // what it would still fetch is of the guest that was
    s->lazy = NULL;
    if (snapshot_back_clear(r->back, &r->err) || work_begin(r, snapshot_back_fill, filled, &r->err))
        guest_lost(r, &r->err);
}

int rollback_begin(struct session *s, const char *path, struct control_request *req,
                   struct error *err)
{
    if (s->rollback)
        return error_set(err, -EBUSY, "another rollback is under way");
    // What still comes from there would come into the guest that is put in its place.
    if (atomic_load(&s->vm->ram.missing) && !s->lazy)
        return error_set(err, -EBUSY,
                         "rollback: a part of the guest is still at the host it came "
                         "from: wait for the migration's end");
    struct rollback *r = calloc(1, sizeof(*r));
    if (!r)
        return error_set(err, -ENOMEM, "no memory");
    r->session = s;
    r->req = req;
    int ret = snapshot_back_open(&r->back, path, s->vm, &s->hooks, err);
    if (!ret)
        ret = work_begin(r, verify, verified, err);
    if (ret) {
        snapshot_back_close(r->back);
        free(r);
        return ret;
    }
    s->rollback = r;
    return 0;
}

void rollback_settle(struct session *s)
{
    while (s->rollback)
        if (loop_turn(s->loop, true, NULL))
            break;
}

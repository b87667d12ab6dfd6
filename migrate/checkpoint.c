// SPDX-License-Identifier: Apache-2.0
#include "migrate/checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>

#include "migrate/checkpoint_dir.h"
#include "migrate/snapshot.h"
#include "vmm/util.h"

enum { AGAIN_NS = 500 * 1000 * 1000 }; // how soon to ask a guest again that could not be saved

struct checkpointer {
    char dir[PATH_MAX], failure_log[PATH_MAX];
    bool mtbf_measured;
    int lock_fd;
    const struct checkpoint_saver *saver;
    pthread_t thread;
    // Merges old files while the guest runs and newer ones are made. The checkpointer's thread
    // starts and joins it.
    pthread_t merger;
    bool merger_started;
    struct checkpoint_merge merge; // what it does
    atomic_bool give_up;
    bool merge_failed; // the last one

    pthread_mutex_t lock; // guards what follows
    bool merging;
    pthread_cond_t changed;
    bool quit;
    struct checkpoint_policy policy;
    uint64_t due; // time_ns
    char parent[CHECKPOINT_NAME_MAX];
    struct checkpoint_status status; // its counters, last and error
};

// --- the log of failures

static int log_read(const char *path, struct failures *failures, struct error *err)
{
    autofree char *text = malloc(FAILURES_LOG_MAX + 1);
    if (!text)
        return error_set(err, -ENOMEM, "no memory for a failure log");
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_errno(err, "failure log %s", path);
    size_t len = 0;
    ssize_t n;
    while ((n = read(fd, text + len, FAILURES_LOG_MAX + 1 - len)) > 0)
        len += (size_t)n;
    if (n < 0)
        return error_errno(err, "failure log %s", path);
    int ret = failures_parse(text, len, time(NULL), failures, err);
    return ret ? error_prefix(err, "failure log %s", path) : 0;
}

int checkpoint_failure_read(const char *path, double *mtbf, struct error *err)
{
    struct failures failures;
    int ret = log_read(path, &failures, err);
    if (!ret)
        *mtbf = failures_mtbf(&failures);
    return ret;
}

static int directory_make(const char *path, struct error *err)
{
    char copy[PATH_MAX];
    snprintf(copy, sizeof(copy), "%s", path);
    for (char *p = copy + 1; *p; p++)
        if (*p == '/') {
            *p = 0;
            mkdir(copy, 0700);
            *p = '/';
        }
    if (mkdir(copy, 0700) && errno != EEXIST)
        return error_errno(err, "checkpoints in %s", path);
    return 0;
}

// The folder may be that of a VM in a jail, whose user can put anything there: only a link of our
// own is followed, and what is made is that user's to read.
static int log_open(const char *dir, const char *path, int *fd, struct error *err)
{
    struct stat where, st;
    bool our_link = !lstat(dir, &where) && S_ISLNK(where.st_mode) && where.st_uid == geteuid();
    autoclose int folder =
        open(dir, O_RDONLY | O_DIRECTORY | (our_link ? 0 : O_NOFOLLOW) | O_CLOEXEC);
    if (folder < 0 || fstat(folder, &where))
        return error_errno(err, "%s", dir);
    *fd = openat(folder, "failures",
                 O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    if (*fd < 0 || fstat(*fd, &st))
        return error_errno(err, "%s", path);
    if (!S_ISREG(st.st_mode) || st.st_nlink != 1)
        return error_set(err, -EINVAL, "%s: expected a file with one name", path);
    if (!st.st_size && st.st_uid != where.st_uid && fchown(*fd, where.st_uid, where.st_gid))
        return error_errno(err, "%s", path);
    return 0;
}

int checkpoint_failure_note(const char *dir, int64_t at, const char *what, struct error *err)
{
    char path[PATH_MAX], line[64];
    autoclose int fd = -1;
    if ((size_t)snprintf(path, sizeof(path), "%s/failures", dir) >= sizeof(path))
        return error_set(err, -ENAMETOOLONG, "%.100s...: name too long", dir);
    int ret = log_open(dir, path, &fd, err);
    if (ret)
        return ret;
    int len = snprintf(line, sizeof(line), "%lld%s%s\n", (long long)at, *what ? " " : "", what);
    return write(fd, line, (size_t)len) == len ? 0 : error_errno(err, "%s", path);
}

// A log that cannot be read says nothing: what was known before stays.
static void mtbf_measure(struct checkpointer *c)
{
    double mtbf;
    struct error err = {0};
    if (!c->mtbf_measured)
        return;
    if (checkpoint_failure_read(c->failure_log, &mtbf, &err)) {
        if (err.code != -ENOENT)
            log_write(c->saver->log, LOG_WARN, "%s", err.text);
        return;
    }
    pthread_mutex_lock(&c->lock);
    c->policy.settings.mtbf = mtbf > 1 ? mtbf : 1;
    if (c->policy.settings.restart > c->policy.settings.mtbf)
        c->policy.settings.restart = c->policy.settings.mtbf;
    pthread_mutex_unlock(&c->lock);
}

// --- one checkpoint

static void made_one(struct checkpointer *c, const char *path,
                     const struct checkpoint_measure *made, uint64_t start)
{
    pthread_mutex_lock(&c->lock);
    c->due = checkpoint_policy_done(&c->policy, made, start);
    snprintf(c->parent, sizeof(c->parent), "%s", strrchr(path, '/') + 1);
    snprintf(c->status.newest, sizeof(c->status.newest), "%s", c->parent);
    c->status.made++;
    c->status.bytes += made->bytes;
    c->status.last = *made;
    c->status.error = (struct error) {0};
    pthread_mutex_unlock(&c->lock);
    log_write(c->saver->log, LOG_DEBUG, "%s: %s, %llu bytes, guest lost %llu us", path,
              made->full ? "full" : "diff", (unsigned long long)made->bytes,
              (unsigned long long)(made->pause_ns + made->fault_ns) / 1000);
}

static void failed_one(struct checkpointer *c, const struct error *err)
{
    pthread_mutex_lock(&c->lock);
    bool quit = c->quit, first = !c->policy.failed;
    if (err->code == -EAGAIN) {
        c->due = time_ns() + AGAIN_NS;
    } else if (!quit) {
        c->due = checkpoint_policy_failed(&c->policy, time_ns());
        c->status.failed++;
        c->status.error = *err;
    }
    pthread_mutex_unlock(&c->lock);
    if (err->code != -EAGAIN && !quit && first)
        log_write(c->saver->log, LOG_ERROR, "checkpoint: %s; trying again", err->text);
}

// --- merging

static void merged(struct checkpointer *c, const struct snapshot_report *report)
{
    pthread_mutex_lock(&c->lock);
    c->status.merged += c->merge.files - 1;
    if (c->merge.current)
        checkpoint_policy_merged(&c->policy, c->merge.files, c->merge.diff_bytes,
                                 report->stored_bytes);
    pthread_mutex_unlock(&c->lock);
    log_write(c->saver->log, LOG_DEBUG, "%s: %u checkpoints merged in %llu ms", c->merge.path,
              c->merge.files, (unsigned long long)report->total_ns / 1000000);
}

static void *merger_main(void *arg)
{
    struct checkpointer *c = arg;
    struct snapshot_report report;
    struct error err = {0};
    seccomp_enter_or_abort(SECCOMP_WORKER, c->saver->seccomp);
    int ret = snapshot_settle(c->merge.path, &c->give_up, &report, &err);
    if (!ret)
        merged(c, &report);
    else if (ret != -ECANCELED && !c->merge_failed)
        log_write(c->saver->log, LOG_WARN, "merging checkpoints: %s; trying again", err.text);
    c->merge_failed = ret;
    pthread_mutex_lock(&c->lock);
    c->merging = false;
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

static void merger_join(struct checkpointer *c)
{
    if (c->merger_started)
        pthread_join(c->merger, NULL);
    c->merger_started = false;
}

static bool merger_works(struct checkpointer *c)
{
    pthread_mutex_lock(&c->lock);
    bool works = c->merging;
    pthread_mutex_unlock(&c->lock);
    return works;
}

static void merge_begin(struct checkpointer *c, const struct checkpoint_dir *dir)
{
    if (merger_works(c))
        return;
    merger_join(c);
    if (!checkpoint_dir_merge(dir, &c->policy.settings, time(NULL), &c->merge))
        return;
    pthread_mutex_lock(&c->lock);
    c->merging = true;
    pthread_mutex_unlock(&c->lock);
    c->merger_started = !pthread_create(&c->merger, NULL, merger_main, c);
    if (c->merger_started)
        return;
    pthread_mutex_lock(&c->lock);
    c->merging = false;
    pthread_mutex_unlock(&c->lock);
}

// What is not kept goes; what is kept only for others becomes less.
static void prune(struct checkpointer *c)
{
    struct checkpoint_dir dir;
    if (checkpoint_dir_read(&dir, c->dir, NULL))
        return;
    unsigned removed = checkpoint_dir_prune(&dir, &c->policy.settings, time(NULL));
    pthread_mutex_lock(&c->lock);
    c->status.removed += removed;
    pthread_mutex_unlock(&c->lock);
    merge_begin(c, &dir);
    checkpoint_dir_free(&dir);
}

static void take_one(struct checkpointer *c)
{
    struct checkpoint_dir dir;
    struct checkpoint_measure made = {0};
    struct error err = {0};
    char path[PATH_MAX];
    int ret = checkpoint_dir_read(&dir, c->dir, &err);
    if (!ret) {
        ret = checkpoint_dir_next(&dir, path, &err);
        checkpoint_dir_free(&dir);
    }
    pthread_mutex_lock(&c->lock);
    bool full = checkpoint_policy_full(&c->policy);
    pthread_mutex_unlock(&c->lock);
    uint64_t start = time_ns();
    if (!ret)
        ret = c->saver->save(c->saver->context, path, full ? NULL : c->parent, &made, &err);
    if (ret) {
        failed_one(c, &err);
        return;
    }
    made_one(c, path, &made, start);
    prune(c);
    mtbf_measure(c);
}

static bool wait_until_due(struct checkpointer *c)
{
    pthread_mutex_lock(&c->lock);
    while (!c->quit && time_ns() < c->due) {
        struct timespec at = {(time_t)(c->due / 1000000000), (long)(c->due % 1000000000)};
        pthread_cond_timedwait(&c->changed, &c->lock, &at);
    }
    bool quit = c->quit;
    pthread_mutex_unlock(&c->lock);
    return !quit;
}

static void *checkpointer_main(void *arg)
{
    struct checkpointer *c = arg;
    seccomp_enter_or_abort(SECCOMP_WORKER, c->saver->seccomp);
    while (wait_until_due(c))
        take_one(c);
    atomic_store(&c->give_up, true);
    merger_join(c);
    return NULL;
}

// --- its life

// The kernel lets go of it when this process ends, however that is.
static int directory_lock(struct checkpointer *c, struct error *err)
{
    char path[PATH_MAX];
    if ((size_t)snprintf(path, sizeof(path), "%s/lock", c->dir) >= sizeof(path))
        return error_set(err, -ENAMETOOLONG, "%.100s...: name too long", c->dir);
    c->lock_fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (c->lock_fd < 0)
        return error_errno(err, "%s", path);
    if (!flock(c->lock_fd, LOCK_EX | LOCK_NB))
        return 0;
    return errno == EWOULDBLOCK
               ? error_set(err, -EBUSY, "%s: another VM takes its checkpoints there", c->dir)
               : error_errno(err, "locking %s", path);
}

static int names_take(struct checkpointer *c, const struct checkpoint_params *p, struct error *err)
{
    size_t dir = (size_t)snprintf(c->dir, sizeof(c->dir), "%s", p->dir);
    size_t log =
        p->failure_log
            ? (size_t)snprintf(c->failure_log, sizeof(c->failure_log), "%s", p->failure_log)
            : (size_t)snprintf(c->failure_log, sizeof(c->failure_log), "%s/failures", p->dir);
    if (!dir || dir >= sizeof(c->dir) || log >= sizeof(c->failure_log))
        return error_set(err, -EINVAL, "directory '%.100s': name empty or too long", p->dir);
    return 0;
}

static int prepare(struct checkpointer *c, const struct checkpoint_params *p, struct error *err)
{
    double mtbf;
    c->mtbf_measured = !p->mtbf_given;
    checkpoint_policy_init(&c->policy, &p->settings);
    int ret = names_take(c, p, err);
    if (!ret && p->failure_log) // asked for by name: it must be right
        ret = checkpoint_failure_read(p->failure_log, &mtbf, err);
    if (!ret)
        ret = checkpoint_settings_check(&p->settings, err);
    if (!ret)
        ret = directory_make(c->dir, err);
    return ret ? ret : directory_lock(c, err);
}

int checkpointer_start(struct checkpointer **out, const struct checkpoint_params *params,
                       const struct checkpoint_saver *saver, struct error *err)
{
    struct checkpointer *c = calloc(1, sizeof(*c));
    if (!c)
        return error_set(err, -ENOMEM, "no memory for checkpoints");
    pthread_condattr_t attr;
    c->saver = saver;
    c->lock_fd = -1;
    pthread_mutex_init(&c->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&c->changed, &attr);
    pthread_condattr_destroy(&attr);
    int ret = prepare(c, params, err);
    if (!ret) {
        mtbf_measure(c);
        c->due = time_ns(); // nothing is safe before the first
        ret = -pthread_create(&c->thread, NULL, checkpointer_main, c);
        if (ret)
            error_set(err, ret, "cannot start a thread: %s", strerror(-ret));
    }
    if (ret) {
        if (c->lock_fd >= 0)
            close(c->lock_fd);
        free(c);
        return ret;
    }
    *out = c;
    return 0;
}

void checkpointer_stop(struct checkpointer *c)
{
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    c->quit = true;
    pthread_cond_signal(&c->changed);
    pthread_mutex_unlock(&c->lock);
    c->saver->cancel(c->saver->context);
    pthread_join(c->thread, NULL);
    close(c->lock_fd);
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

void checkpointer_status(struct checkpointer *c, struct checkpoint_status *status)
{
    pthread_mutex_lock(&c->lock);
    *status = c->status;
    snprintf(status->dir, sizeof(status->dir), "%s", c->dir);
    status->settings = c->policy.settings;
    status->measured = c->status.made > 0;
    checkpoint_policy_model(&c->policy, &status->model);
    status->interval = checkpoint_policy_interval(&c->policy);
    uint64_t now = time_ns();
    status->next = c->due > now ? (double)(c->due - now) / 1e9 : 0;
    pthread_mutex_unlock(&c->lock);
}

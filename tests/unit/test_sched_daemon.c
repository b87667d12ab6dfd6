// SPDX-License-Identifier: Apache-2.0
// The scheduler's daemon with VMs that are no VMs: processes whose threads burn CPU time, and take
// turns as vCPUs do. What is compared is CPU time within one run; whatever else the host does takes
// from all alike.
#include <check.h>
#include <errno.h>
#include <jansson.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sched/broker.h"
#include "sched/client.h"
#include "sched/daemon.h"
#include "vmm/util.h"

enum { THREADS = 4, VMS = 8, WAIT_S = 120, SLICE_MS = 10 };

static char dir[64], sock[80];
static const struct log quiet = {.name = "sched", .level = LOG_ERROR, .fd = STDERR_FILENO};

static bool is_long(void)
{
    return getenv("FERRY_LONG") && *getenv("FERRY_LONG");
}

// --- a VM: what it is like, and what it tells, in memory that survives it

struct vm_like {
    const char *share[3]; // weight, cap, affinity; NULL = default
    unsigned nr;
    unsigned burn_us, sleep_us; // 0, 0: burns for ever
    bool ignores;               // its signals and turns
    int broker;                 // 0: none
    bool own_pids;              // a PID namespace of its own
};

struct vm_told {
    _Atomic pid_t pid;
    _Atomic uint64_t cpu_ns[THREADS];
    _Atomic uint64_t waited_ns[THREADS];
    _Atomic uint64_t laps;       // of sleepers
    _Atomic uint64_t attached;   // times
    _Atomic uint64_t longest_ns; // in which a thread that could run did not
    _Atomic int error;
    atomic_bool end;
};

struct fake {
    struct vm_told *told;
    pid_t pid;
};

static __thread volatile uint32_t look;

static void on_kick(int sig)
{
    look = 1;
}

struct burner {
    struct sched_client *_Atomic *client;
    const struct vm_like *like;
    struct vm_told *told;
    unsigned i;
    _Atomic pid_t tid;
    pthread_t thread;
    uint64_t ran_ns; // when it ran last
};

static uint64_t thread_cpu(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void ran(struct burner *b)
{
    uint64_t now = time_ns(), gap = now - b->ran_ns;
    if (gap > atomic_load(&b->told->longest_ns))
        atomic_store(&b->told->longest_ns, gap);
    b->ran_ns = now;
}

static void burn(struct burner *b, uint64_t until_cpu)
{
    while (!look && !atomic_load(&b->told->end)) {
        ran(b);
        uint64_t cpu = thread_cpu();
        atomic_store(&b->told->cpu_ns[b->i], cpu);
        if (until_cpu && cpu >= until_cpu)
            return;
    }
}

static void *burner_main(void *arg)
{
    struct burner *b = arg;
    atomic_store(&b->tid, (pid_t)syscall(SYS_gettid));
    sigset_t none;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
    while (!atomic_load(b->client))
        usleep(1000);
    struct sched_client *c = atomic_load(b->client);
    b->ran_ns = time_ns();
    while (!atomic_load(&b->told->end)) {
        look = 0;
        if (!b->like->ignores && !sched_client_take(c, b->i, (const uint32_t *)&look))
            continue;
        atomic_fetch_add(&b->told->waited_ns[b->i], sched_client_waited(c, b->i));
        burn(b, b->like->burn_us ? thread_cpu() + b->like->burn_us * 1000ull : 0);
        if (b->like->sleep_us) {
            usleep(b->like->sleep_us);
            atomic_fetch_add(&b->told->laps, 1);
        }
    }
    return NULL;
}

static void on_change(void *arg, int code, const char *why)
{
    struct vm_told *told = arg;
    if (!code)
        atomic_fetch_add(&told->attached, 1);
}

static int fake_share(const struct vm_like *like, struct sched_share *share, struct error *err)
{
    static const char *const keys[] = {"weight", "cap", "affinity"};
    int ret = 0;
    for (unsigned i = 0; i < 3 && !ret; i++)
        if (like->share[i])
            ret = sched_share_parse(keys[i], like->share[i], share, err);
    return ret;
}

static void fake_main(const char *name, const struct vm_like *like, struct vm_told *told)
{
    static struct sched_client *_Atomic client;
    static struct burner burners[THREADS];
    pid_t tids[THREADS];
    struct error err;
    struct sigaction action = {.sa_handler = on_kick};
    sigaction(SIGRTMIN, &action, NULL);
    for (unsigned i = 0; i < like->nr; i++) {
        burners[i] = (struct burner) {&client, like, told, i};
        pthread_create(&burners[i].thread, NULL, burner_main, &burners[i]);
        while (!(tids[i] = atomic_load(&burners[i].tid)))
            usleep(100);
    }
    struct sched_client_config config = {.socket = sock,
                                         .name = name,
                                         .nr = like->nr,
                                         .tids = tids,
                                         .signal = SIGRTMIN,
                                         .broker = like->broker ? like->broker : -1,
                                         .changed = on_change,
                                         .arg = told};
    struct sched_client *c;
    int ret = fake_share(like, &config.share, &err);
    if (!ret)
        ret = sched_client_create(&c, &config, &err);
    if (!ret)
        ret = sched_client_watch(c, &err);
    if (ret) {
        fprintf(stderr, "%s: %s\n", name, err.text);
        atomic_store(&told->error, ret);
        _exit(1);
    }
    atomic_store(&client, c);
    atomic_store(&told->pid, getpid());
    for (unsigned i = 0; i < like->nr; i++)
        pthread_join(burners[i].thread, NULL);
    sched_client_destroy(c);
    _exit(0);
}

// Its threads have other numbers there than here.
static void enclosed_main(const char *name, const struct vm_like *like, struct vm_told *told)
{
    int status = 0;
    pid_t inner = unshare(CLONE_NEWPID) ? -1 : fork();
    if (!inner)
        fake_main(name, like, told);
    _exit(inner < 0 || waitpid(inner, &status, 0) != inner || status ? 1 : 0);
}

static void fake_start(struct fake *f, const char *name, const struct vm_like *like)
{
    f->told =
        mmap(NULL, sizeof(*f->told), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(f->told, MAP_FAILED);
    f->pid = fork();
    if (!f->pid && like->own_pids)
        enclosed_main(name, like, f->told);
    if (!f->pid)
        fake_main(name, like, f->told);
    ck_assert_int_gt(f->pid, 0);
}

static uint64_t cpu_of(const struct fake *f)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < THREADS; i++)
        sum += atomic_load(&f->told->cpu_ns[i]);
    return sum;
}

static void fake_end(struct fake *f)
{
    atomic_store(&f->told->end, true);
    kill(f->pid, SIGCONT);
    int status;
    ck_assert_int_eq(waitpid(f->pid, &status, 0), f->pid);
    ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "VM ended with %#x", status);
}

static void fake_kill(struct fake *f)
{
    kill(f->pid, SIGKILL);
    ck_assert_int_eq(waitpid(f->pid, NULL, 0), f->pid);
}

// --- waiting for what must come; the limit only ends what hangs

#define WAIT_FOR(what)                                                                    \
    do {                                                                                  \
        uint64_t give_up = time_ns() + WAIT_S * 1000000000ull;                            \
        while (!(what)) {                                                                 \
            ck_assert_msg(time_ns() < give_up, "%s did not come in %d s", #what, WAIT_S); \
            usleep(1000);                                                                 \
        }                                                                                 \
    } while (0)

static void wait_attached(const struct fake *f, unsigned nr, uint64_t times)
{
    for (unsigned i = 0; i < nr; i++)
        WAIT_FOR(atomic_load(&f[i].told->attached) >= times);
}

// Until all of them together have had so much CPU time; what each had goes to `got`.
static uint64_t measure(const struct fake *f, unsigned nr, uint64_t cpu_ns, uint64_t *got)
{
    uint64_t before[VMS], sum, start = time_ns();
    for (unsigned i = 0; i < nr; i++)
        before[i] = cpu_of(&f[i]);
    WAIT_FOR(({
        sum = 0;
        for (unsigned i = 0; i < nr; i++)
            sum += got[i] = cpu_of(&f[i]) - before[i];
        sum >= cpu_ns;
    }));
    return time_ns() - start;
}

// --- the daemon, a process of its own

static int own_cpu(unsigned n)
{
    cpu_set_t set;
    ck_assert(!sched_getaffinity(0, sizeof(set), &set));
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &set) && !n--)
            return cpu;
    return -1;
}

static bool answers(void)
{
    const struct sched_ask ask = {.head = sched_head(SCHED_STATUS)};
    struct error err;
    int fd;
    if (sched_call(sock, &ask, sizeof(ask), SCHED_DOCUMENT, &fd, &err))
        return false;
    close(fd);
    return true;
}

static pid_t daemon_with(struct sched_daemon_config config)
{
    pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (!pid) {
        struct error err = {0};
        struct sched_daemon *d;
        config.socket = sock;
        config.log = &quiet;
        if (sched_daemon_create(&d, &config, &err) || sched_daemon_run(d, &err))
            fprintf(stderr, "scheduler: %s\n", err.text);
        _exit(1);
    }
    WAIT_FOR(answers());
    return pid;
}

// With one pCPU or with all, and short slices: so short runs say much.
static pid_t daemon_start(bool one)
{
    struct sched_daemon_config config = {.slice_ns = SLICE_MS * 1000000, .tick_ns = 5000000};
    int cpu = own_cpu(0);
    if (one)
        config.pcpus.bits[cpu / 64] = 1ull << cpu % 64;
    return daemon_with(config);
}

static void daemon_kill(pid_t pid)
{
    kill(pid, SIGKILL);
    ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
}

static json_t *status(void)
{
    const struct sched_ask ask = {.head = sched_head(SCHED_STATUS)};
    struct error err;
    int fd;
    ck_assert_msg(!sched_call(sock, &ask, sizeof(ask), SCHED_DOCUMENT, &fd, &err), "%s", err.text);
    json_t *json = json_loadfd(fd, 0, NULL);
    close(fd);
    ck_assert_ptr_nonnull(json);
    return json;
}

static size_t vms_there(void)
{
    json_t *json = status();
    size_t n = json_array_size(json_object_get(json, "vms"));
    json_decref(json);
    return n;
}

static void setup(void)
{
    strcpy(dir, "/tmp/ferry-sched-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(sock, sizeof(sock), "%s/sock", dir);
}

static void teardown(void)
{
    unlink(sock);
    rmdir(dir);
}

// --- shares

static void check_shares(const struct vm_like *likes, const unsigned *parts, unsigned nr, bool one)
{
    struct fake f[VMS];
    uint64_t got[VMS], sum = 0;
    unsigned whole = 0;
    char name[16];
    pid_t d = daemon_start(one);
    for (unsigned i = 0; i < nr; i++) {
        snprintf(name, sizeof(name), "vm%u", i);
        fake_start(&f[i], name, &likes[i]);
        whole += parts[i];
    }
    wait_attached(f, nr, 1);
    measure(f, nr, 300000000, got); // until all are in
    measure(f, nr, is_long() ? 20000000000ull : 800000000ull, got);
    for (unsigned i = 0; i < nr; i++)
        sum += got[i];
    for (unsigned i = 0; i < nr; i++) {
        double share = (double)got[i] / (double)sum, due = (double)parts[i] / whole;
        printf("  vm%u: %.4f of the CPU time, due %.4f\n", i, share, due);
        ck_assert_msg(share > due - 0.03 && share < due + 0.03, "vm%u: %.4f, due %.4f", i, share,
                      due);
        fake_end(&f[i]);
    }
    daemon_kill(d);
}

START_TEST(shares_two)
{
    check_shares((struct vm_like[]) {{.share = {"256"}, .nr = 1}, {.share = {"512"}, .nr = 1}},
                 (unsigned[]) {1, 2}, 2, true);
}
END_TEST

START_TEST(shares_three)
{
    check_shares((struct vm_like[]) {{.share = {"256"}, .nr = 1},
                                     {.share = {"512"}, .nr = 1},
                                     {.share = {"1024"}, .nr = 1}},
                 (unsigned[]) {1, 2, 4}, 3, true);
}
END_TEST

// --- VMs that see little: no socket, own numbers

START_TEST(enclosed)
{
    struct fake f[3];
    uint64_t got[3];
    struct error err;
    int broker;
    if (geteuid())
        return; // a PID namespace needs root
    pid_t d = daemon_start(true);
    ck_assert_msg(!sched_broker_start(sock, &broker, &err), "%s", err.text);
    fake_start(&f[0], "pids", &(struct vm_like) {.nr = 2, .own_pids = true});
    fake_start(&f[1], "both", &(struct vm_like) {.nr = 1, .own_pids = true, .broker = broker});
    fake_start(&f[2], "plain", &(struct vm_like) {.nr = 1});
    wait_attached(f, 3, 1);
    for (unsigned round = 0; round < 2; round++) {
        measure(f, 3, 300000000, got);
        measure(f, 3, 800000000, got);
        double sum = (double)(got[0] + got[1] + got[2]);
        printf("  shares %.3f %.3f %.3f, due 0.5 0.25 0.25\n", (double)got[0] / sum,
               (double)got[1] / sum, (double)got[2] / sum);
        ck_assert((double)got[0] / sum > 0.45 && (double)got[1] / sum > 0.2);
        if (round)
            break;
        daemon_kill(d);
        d = daemon_start(true);
        wait_attached(f, 3, 2);
    }
    for (unsigned i = 0; i < 3; i++)
        fake_end(&f[i]);
    close(broker);
    daemon_kill(d);
}
END_TEST

static int raw(void)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    strcpy(addr.sun_path, sock);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    ck_assert_msg(!connect(fd, (struct sockaddr *)&addr, sizeof(addr)), "%s", strerror(errno));
    return fd;
}

static struct sched_register reg_good(const char *name)
{
    struct sched_register reg = {
        .head = sched_head(SCHED_REGISTER), .nr_vcpus = 1, .signal = (uint32_t)SIGRTMIN};
    strcpy(reg.name, name);
    reg.tids[0] = (int32_t)getpid();
    return reg;
}

// --- what a broker hands in is for one VM's share alone

static void ask(int fd, const void *msg, size_t size, const char *refusal)
{
    union sched_msg answer = {0};
    ck_assert_int_eq(send(fd, msg, size, MSG_NOSIGNAL), (ssize_t)size);
    ck_assert_int_gt(recv(fd, &answer, sizeof(answer), 0), 0);
    if (!refusal)
        ck_assert_uint_ne(answer.head.type, SCHED_ERROR);
    else
        ck_assert_msg(answer.head.type == SCHED_ERROR && strstr(answer.error.text, refusal),
                      "type %u: '%s', expected '%s'", answer.head.type, answer.error.text, refusal);
}

START_TEST(confined)
{
    struct fake f;
    struct error err;
    const struct sched_share share = {.has = SCHED_HAS_WEIGHT, .weight = 9};
    struct sched_set set = {.head = sched_head(SCHED_SET), .share = share};
    const struct sched_ask status = {.head = sched_head(SCHED_STATUS)};
    struct sched_register reg = reg_good("mine");
    pid_t d = daemon_start(true);
    signal(SIGRTMIN, on_kick);
    fake_start(&f, "other", &(struct vm_like) {.nr = 1});
    wait_attached(&f, 1, 1);
    int fd = sched_connect_confined(sock, &err);
    ck_assert_msg(fd >= 0, "%s", err.text);
    strcpy(set.name, "other");
    ask(fd, &set, sizeof(set), "another process's");
    ask(fd, &status, sizeof(status), "own share alone");
    ask(fd, &reg, sizeof(reg), NULL);
    strcpy(set.name, "mine");
    ask(fd, &set, sizeof(set), NULL);
    close(fd);
    fake_end(&f);
    daemon_kill(d);
}
END_TEST

// --- what the weights of one user add up to

static void as_user(struct sched_register *reg, const char *name, int32_t weight,
                    const char *refusal, int *fd)
{
    *reg = reg_good(name);
    reg->share = (struct sched_share) {.has = SCHED_HAS_WEIGHT, .weight = weight};
    *fd = raw();
    ask(*fd, reg, sizeof(*reg), refusal);
}

START_TEST(users)
{
    struct sched_register reg;
    int fds[4], status;
    if (geteuid())
        return; // becoming another user needs root
    pid_t d = daemon_with((struct sched_daemon_config) {.mode = 0666, .user_weight = 600});
    ck_assert(!chmod(dir, 0755));
    pid_t user = fork();
    if (!user) {
        struct sched_set set = {.head = sched_head(SCHED_SET),
                                .share = {.has = SCHED_HAS_WEIGHT, .weight = 700}};
        signal(SIGRTMIN, on_kick);
        ck_assert(!setresuid(12345, 12345, 12345));
        as_user(&reg, "much", 601, "may have 600 in all", &fds[0]);
        as_user(&reg, "some", 500, NULL, &fds[1]);
        strcpy(set.name, "some");
        ask(fds[1], &set, sizeof(set), "may have 600 in all");
        set.share.weight = 600;
        ask(fds[0], &set, sizeof(set), NULL);
        _exit(0);
    }
    ck_assert_int_eq(waitpid(user, &status, 0), user);
    ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "the user ended with %#x", status);
    signal(SIGRTMIN, on_kick);
    as_user(&reg, "root", 65535, NULL, &fds[3]);
    close(fds[3]);
    daemon_kill(d);
}
END_TEST

// --- caps: never more than that of the pCPUs' time

START_TEST(capped)
{
    static const char *const caps[] = {"10", "25", "50", "150"};
    struct vm_like like = {.share = {NULL, caps[_i]}, .nr = 2};
    struct fake f;
    uint64_t got;
    pid_t d = daemon_start(false);
    fake_start(&f, "capped", &like);
    wait_attached(&f, 1, 1);
    double cap = atof(caps[_i]) / 100;
    measure(&f, 1, 100000000, &got);
    uint64_t wall = measure(&f, 1, (uint64_t)((is_long() ? 10e9 : 0.6e9) * cap), &got);
    double share = (double)got / (double)wall;
    printf("  cap %s %%: had %.2f %% of one pCPU\n", caps[_i], share * 100);
    ck_assert_msg(share < cap * 1.02 + 0.01, "%.4f of one pCPU, cap %.2f", share, cap);
    fake_end(&f);
    daemon_kill(d);
}
END_TEST

// --- one that sleeps mostly, beside hogs: it is never far from its turn

START_TEST(sleeper)
{
    struct fake f[4];
    uint64_t got[4];
    pid_t d = daemon_start(true);
    fake_start(&f[0], "sleeper", &(struct vm_like) {.nr = 1, .burn_us = 300, .sleep_us = 5000});
    for (unsigned i = 1; i < 4; i++)
        fake_start(&f[i], (char[]) {'h', (char)('0' + i), 0}, &(struct vm_like) {.nr = 1});
    wait_attached(f, 4, 1);
    uint64_t laps = atomic_load(&f[0].told->laps), waited = atomic_load(&f[0].told->waited_ns[0]);
    uint64_t wall = measure(f, 4, 800000000, got);
    laps = atomic_load(&f[0].told->laps) - laps;
    waited = atomic_load(&f[0].told->waited_ns[0]) - waited;
    printf("  %llu laps in %.2f s, %llu us each; waited for turns %llu us a lap\n",
           (unsigned long long)laps, (double)wall / 1e9, (unsigned long long)(wall / 1000 / laps),
           (unsigned long long)(waited / 1000 / laps));
    // In the queue with the others each lap would take three slices.
    ck_assert_uint_lt(waited / laps, SLICE_MS * 1000000);
    for (unsigned i = 0; i < 4; i++)
        fake_end(&f[i]);
    daemon_kill(d);
}
END_TEST

// --- standing still

// The longest that one of them stood still since the last call.
static uint64_t longest_stall(struct fake *f, unsigned nr)
{
    uint64_t longest = 0;
    for (unsigned i = 0; i < nr; i++) {
        uint64_t one = atomic_exchange(&f[i].told->longest_ns, 0);
        longest = one > longest ? one : longest;
    }
    return longest;
}

static int by_size(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static double middle_ms(uint64_t *values, unsigned nr)
{
    qsort(values, nr, sizeof(*values), by_size);
    return (double)values[nr / 2] / 1e6;
}

// One that sleeps for moments, with turns: now and then it is awake again before the daemon has
// done with its going to sleep. It must not lose its turn over that, and nobody else knows.
START_TEST(moments)
{
    struct fake f;
    uint64_t got;
    struct sched_daemon_config config = {.no_boost = true};
    config.pcpus.bits[own_cpu(0) / 64] = 1ull << own_cpu(0) % 64;
    pid_t d = daemon_with(config);
    fake_start(&f, "moments", &(struct vm_like) {.nr = 1, .burn_us = 50, .sleep_us = 1});
    wait_attached(&f, 1, 1);
    measure(&f, 1, is_long() ? 20000000000ull : 500000000ull, &got);
    fake_end(&f);
    daemon_kill(d);
}
END_TEST

// --- VMs that do not behave

static uint64_t idle_ns(void)
{
    uint64_t sum = 0;
    size_t i;
    json_t *one, *json = status();
    json_array_foreach(json_object_get(json, "pcpus"), i, one)
    {
        sum += (uint64_t)json_integer_value(json_object_get(one, "idle_ns"));
    }
    json_decref(json);
    return sum;
}

START_TEST(stopped_and_killed)
{
    struct fake f[3];
    uint64_t got[3];
    pid_t d = daemon_start(true);
    for (unsigned i = 0; i < 3; i++)
        fake_start(&f[i], (char[]) {'v', (char)('0' + i), 0}, &(struct vm_like) {.nr = 1});
    wait_attached(f, 3, 1);
    measure(f, 3, 200000000, got);
    for (unsigned round = 0; round < 10; round++) {
        kill(f[0].pid, SIGSTOP); // now and then in its turn
        uint64_t idle = idle_ns();
        measure(&f[1], 2, 60000000, got);
        idle = idle_ns() - idle;
        ck_assert_msg(idle < 20000000, "a stopped VM held its turn for %llu us",
                      (unsigned long long)idle / 1000);
        kill(f[0].pid, SIGCONT);
        measure(&f[0], 1, 20000000, got);
    }
    fake_kill(&f[2]);
    measure(f, 2, 300000000, got);
    ck_assert_uint_gt(got[0], 60000000);
    ck_assert_uint_gt(got[1], 60000000);
    WAIT_FOR(vms_there() == 2);
    fake_end(&f[0]);
    fake_end(&f[1]);
    WAIT_FOR(vms_there() == 0);
    daemon_kill(d);
}
END_TEST

START_TEST(disobedient)
{
    enum { WINDOWS = 9 };
    struct fake f[2];
    uint64_t got[2], stall[WINDOWS], had[2] = {0};
    pid_t d = daemon_start(true);
    fake_start(&f[0], "obeys", &(struct vm_like) {.nr = 1});
    fake_start(&f[1], "ignores", &(struct vm_like) {.nr = 1, .ignores = true});
    wait_attached(f, 2, 1);
    measure(f, 2, 500000000, got);
    for (unsigned i = 0; i < WINDOWS; i++) {
        longest_stall(f, 1);
        measure(f, 2, 120000000, got);
        stall[i] = longest_stall(f, 1);
        had[0] += got[0];
        had[1] += got[1];
    }
    const double share = (double)had[0] / (double)(had[0] + had[1]);
    const double middle = middle_ms(stall, WINDOWS);
    printf("  who obeys had %.3f beside one that does not, and waited for %.1f ms\n", share,
           middle);
    ck_assert(share > 0.45);
    // For the other's turn, and a slice and 10 ms for its disobedience.
    ck_assert_double_lt(middle, 2 * SLICE_MS + 10);
    json_t *json = status();
    ck_assert_int_gt(json_integer_value(json_object_get(json, "offences")), 0);
    json_decref(json);
    fake_end(&f[0]);
    fake_end(&f[1]);
    daemon_kill(d);
}
END_TEST

// --- the daemon dies: VMs run on, and find the next one

// With a daemon, waiting for a turn is no more than the slices of the others at a pCPU. Its death
// and the next one's start add two slices at most. (The middle of all rounds, since anybody is kept
// waiting by what else the host does.)
START_TEST(restarts)
{
    enum { WITH, KILLED, BACK, KINDS, ROUNDS = 50 };
    const unsigned rounds = is_long() ? ROUNDS : 5;
    static uint64_t stall[KINDS][ROUNDS];
    struct fake f[VMS];
    uint64_t got[VMS];
    pid_t d = daemon_start(false);
    for (unsigned i = 0; i < VMS; i++)
        fake_start(&f[i], (char[]) {'v', (char)('0' + i), 0}, &(struct vm_like) {.nr = 1});
    wait_attached(f, VMS, 1);
    measure(f, VMS, 100000000, got);
    for (unsigned round = 0; round < rounds; round++) {
        longest_stall(f, VMS);
        measure(f, VMS, 200000000, got);
        stall[WITH][round] = longest_stall(f, VMS);
        daemon_kill(d);
        for (unsigned i = 0; i < VMS; i++) // each by itself: none stands still
            measure(&f[i], 1, 1000000, got);
        stall[KILLED][round] = longest_stall(f, VMS);
        d = daemon_start(false);
        wait_attached(f, VMS, round + 2);
        for (unsigned i = 0; i < VMS; i++)
            measure(&f[i], 1, 1000000, got);
        ck_assert_uint_eq(vms_there(), VMS);
        stall[BACK][round] = longest_stall(f, VMS);
    }
    double middle[KINDS];
    for (unsigned i = 0; i < KINDS; i++)
        middle[i] = middle_ms(stall[i], rounds);
    printf(
        "  longest stall of %d VMs in the middle, and the worst of %u rounds: %.1f, %.1f ms with "
        "a daemon; %.1f, %.1f from its death on; %.1f, %.1f from the next one's start on\n",
        VMS, rounds, middle[WITH], (double)stall[WITH][rounds - 1] / 1e6, middle[KILLED],
        (double)stall[KILLED][rounds - 1] / 1e6, middle[BACK],
        (double)stall[BACK][rounds - 1] / 1e6);
    for (unsigned i = KILLED; i < KINDS; i++)
        ck_assert_double_lt(middle[i], middle[WITH] + 2 * SLICE_MS);
    for (unsigned i = 0; i < VMS; i++)
        fake_end(&f[i]);
    daemon_kill(d);
}
END_TEST

// --- messages

// Sends, and expects an error that says `text`.
static void refused(const void *msg, size_t size, const char *text)
{
    union sched_msg answer = {0};
    int fd = raw();
    ck_assert_int_eq(send(fd, msg, size, MSG_NOSIGNAL), (ssize_t)size);
    ck_assert_int_eq(recv(fd, &answer, sizeof(answer), 0), (ssize_t)sizeof(answer.error));
    ck_assert_uint_eq(answer.head.type, SCHED_ERROR);
    ck_assert_int_lt(answer.error.code, 0);
    ck_assert_msg(strstr(answer.error.text, text), "'%s' does not say '%s'", answer.error.text,
                  text);
    close(fd);
}

START_TEST(malformed)
{
    struct sched_register reg;
    char bytes[4096];
    pid_t d = daemon_start(true);
    signal(SIGRTMIN, on_kick);
    memset(bytes, 0xa5, sizeof(bytes));
    for (size_t size = 1; size < sizeof(bytes); size += size)
        refused(bytes, size, "no message");
#define REFUSED(change, text)             \
    do {                                  \
        reg = reg_good("x");              \
        change;                           \
        refused(&reg, sizeof(reg), text); \
    } while (0)
    REFUSED(reg.head.version = 99, "version 99");
    REFUSED(reg.head.type = SCHED_REGISTERED, "expected");
    REFUSED(reg.head.type = 77, "expected 0");
    REFUSED(reg.name[0] = 0, "name");
    REFUSED(memset(reg.name, 'x', sizeof(reg.name)), "name");
    REFUSED(strcpy(reg.name, "a\nb"), "control character");
    REFUSED(reg.nr_vcpus = 0, "0 vCPUs");
    REFUSED(reg.nr_vcpus = 65, "65 vCPUs");
    REFUSED(reg.nr_vcpus = UINT32_MAX, "vCPUs");
    REFUSED(reg.signal = SIGKILL, "signal 9");
    REFUSED(reg.signal = 65, "signal 65");
    REFUSED(reg.tids[0] = -1, "thread -1");
    REFUSED(reg.tids[0] = (int32_t)getppid(), "there is none");
    REFUSED((reg.nr_vcpus = 2, reg.tids[1] = reg.tids[0]), "a vCPU already");
    REFUSED((reg.share.has = SCHED_HAS_WEIGHT, reg.share.weight = 0), "weight 0");
    REFUSED((reg.share.has = SCHED_HAS_WEIGHT, reg.share.weight = 65536), "weight 65536");
    REFUSED((reg.share.has = SCHED_HAS_CAP, reg.share.cap = -1), "cap -1");
    REFUSED((reg.share.has = SCHED_HAS_AFFINITY, reg.share.hard.bits[15] = 1ull << 63),
            "pCPUs 1023 are not scheduled here");
    REFUSED(reg.share.has = 64, "fields");
    const struct sched_set set = {.head = sched_head(SCHED_SET), .name = "nobody"};
    refused(&set, sizeof(set), "no VM named 'nobody'");
    ck_assert_uint_eq(vms_there(), 0);
    daemon_kill(d);
}
END_TEST

START_TEST(words)
{
    static const struct {
        const char *key, *text, *says;
    } bad[] = {
        {"weight", "0", "1 to 65535"},     {"weight", "65536", "1 to 65535"},
        {"weight", "x", "1 to 65535"},     {"weight", "", "1 to 65535"},
        {"weight", "1 ", "1 to 65535"},    {"cap", "-1", "0 to 6400"},
        {"cap", "6401", "0 to 6400"},      {"affinity", "", "expected pCPUs"},
        {"affinity", "x", "expected"},     {"affinity", "3-1", "expected"},
        {"affinity", "1024", "expected"},  {"affinity", "0,,1", "expected"},
        {"affinity", "soft:", "expected"}, {"colour", "1", "expected weight, cap or affinity"},
    };
    struct error err;
    struct sched_share share = {0};
    char text[SCHED_TEXT_MAX];
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        ck_assert_msg(sched_share_parse(bad[i].key, bad[i].text, &share, &err) == -EINVAL, "%s=%s",
                      bad[i].key, bad[i].text);
        ck_assert_msg(strstr(err.text, bad[i].says), "%s", err.text);
    }
    ck_assert(!sched_share_parse("affinity", "0-3,8/soft:2,900", &share, &err));
    ck_assert_str_eq(sched_mask_text(&share.hard, text), "0-3,8");
    ck_assert_str_eq(sched_mask_text(&share.soft, text), "2,900");
    ck_assert(!sched_share_parse("affinity", "all", &share, &err));
    ck_assert_str_eq(sched_mask_text(&share.hard, text), "all");
}
END_TEST

// Registers one thread, this one; its doorbell.
static int register_here(int fd, const char *name, int *bell)
{
    struct sched_register reg = reg_good(name);
    union sched_msg answer;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
    struct iovec iov = {&answer, sizeof(answer)};
    struct msghdr hdr = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof(control)};
    int fds[2];
    ck_assert_int_eq(send(fd, &reg, sizeof(reg), MSG_NOSIGNAL), (ssize_t)sizeof(reg));
    ck_assert_int_gt(recvmsg(fd, &hdr, 0), 0);
    ck_assert_msg(answer.head.type == SCHED_REGISTERED, "%s", answer.error.text);
    memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&hdr)), sizeof(fds));
    close(fds[0]);
    *bell = fds[1];
    return fd;
}

// The doorbell is the VM's as well, and still there when the VM is not.
START_TEST(late_ring)
{
    const uint64_t one = 1;
    uint64_t rings = 0;
    int bell, other;
    pid_t d = daemon_start(true);
    signal(SIGRTMIN, on_kick);
    close(register_here(raw(), "late", &bell));
    WAIT_FOR(vms_there() == 0);
    int fd = register_here(raw(), "next", &other); // where the first one was in memory
    ck_assert_int_eq(write(bell, &one, sizeof(one)), (ssize_t)sizeof(one));
    ck_assert_uint_eq(vms_there(), 1);
    ck_assert_int_eq(read(bell, &rings, sizeof(rings)), (ssize_t)sizeof(rings)); // nobody took it
    ck_assert_uint_eq(rings, 1);
    close(bell);
    close(other);
    close(fd);
    daemon_kill(d);
}
END_TEST

// CPU time from before a VM's threads take turns is not charged: it would wait for long.
START_TEST(no_debt)
{
    const uint64_t one = 1, burnt = 200000000;
    int bell;
    pid_t d = daemon_start(true);
    signal(SIGRTMIN, on_kick);
    int fd = register_here(raw(), "debt", &bell);
    for (uint64_t end = thread_cpu() + burnt; thread_cpu() < end;)
        ;
    ck_assert_int_eq(write(bell, &one, sizeof(one)), (ssize_t)sizeof(one));
    json_t *json = status();
    json_t *vm = json_array_get(json_object_get(json, "vms"), 0);
    ck_assert_ptr_nonnull(vm);
    ck_assert_uint_lt((uint64_t)json_integer_value(json_object_get(vm, "run_ns")), burnt / 2);
    json_decref(json);
    close(bell);
    close(fd);
    daemon_kill(d);
}
END_TEST

START_TEST(cycles)
{
    struct sched_register reg = reg_good("again");
    union sched_msg answer;
    pid_t d = daemon_start(true);
    signal(SIGRTMIN, on_kick);
    for (unsigned i = 0; i < 1000; i++) {
        int fd = raw();
        do { // the one before may not be gone yet
            ck_assert_int_eq(send(fd, &reg, sizeof(reg), MSG_NOSIGNAL), (ssize_t)sizeof(reg));
            ck_assert_int_gt(recv(fd, &answer, sizeof(answer), 0), 0);
        } while (answer.head.type == SCHED_ERROR &&
                 (answer.error.code == -EEXIST || answer.error.code == -EBUSY ||
                  strstr(answer.error.text, "already")));
        ck_assert_msg(answer.head.type == SCHED_REGISTERED, "%s", answer.error.text);
        close(fd);
    }
    WAIT_FOR(vms_there() == 0);
    daemon_kill(d);
}
END_TEST

START_TEST(crowd)
{
    union sched_msg answer;
    pid_t holders[8];
    unsigned refusals = 0, nr = is_long() ? 10000 : 1000;
    pid_t d = daemon_with((struct sched_daemon_config) {.max_vms = 2});
    for (unsigned i = 0; i < 8; i++) { // each has what one process may; more than 2 + 64 together
        int ready[2];
        ck_assert(!pipe(ready));
        holders[i] = fork();
        if (!holders[i]) {
            for (unsigned k = 0; k < 16; k++)
                raw();
            close(ready[1]);
            pause();
        }
        close(ready[1]);
        ck_assert_int_eq(read(ready[0], &answer, 1), 0);
        close(ready[0]);
    }
    for (unsigned i = 0; i < nr; i++) {
        int fd = raw();
        ck_assert_int_gt(recv(fd, &answer, sizeof(answer), 0), 0);
        ck_assert_uint_eq(answer.head.type, SCHED_ERROR);
        ck_assert(strstr(answer.error.text, "too many connections"));
        refusals++;
        close(fd);
    }
    ck_assert_uint_eq(refusals, nr);
    for (unsigned i = 0; i < 8; i++) {
        kill(holders[i], SIGKILL);
        ck_assert_int_eq(waitpid(holders[i], NULL, 0), holders[i]);
    }
    WAIT_FOR(answers());
    // One process alone does not take the others' place.
    int held[20];
    for (unsigned i = 0; i < 20; i++)
        held[i] = raw();
    ck_assert_int_gt(recv(held[19], &answer, sizeof(answer), 0), 0);
    ck_assert(strstr(answer.error.text, "too many connections"));
    pid_t other = fork();
    if (!other)
        _exit(!answers());
    int status;
    ck_assert_int_eq(waitpid(other, &status, 0), other);
    ck_assert_int_eq(status, 0);
    for (unsigned i = 0; i < 20; i++)
        close(held[i]);
    daemon_kill(d);
}
END_TEST

static Suite *suite(void)
{
    Suite *s = suite_create("sched_daemon");
    TCase *tc = tcase_create("all");
    tcase_set_timeout(tc, is_long() ? 3600 : 300);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, words);
    tcase_add_test(tc, malformed);
    tcase_add_test(tc, late_ring);
    tcase_add_test(tc, no_debt);
    tcase_add_test(tc, cycles);
    tcase_add_test(tc, crowd);
    tcase_add_test(tc, shares_two);
    tcase_add_test(tc, shares_three);
    tcase_add_test(tc, enclosed);
    tcase_add_test(tc, confined);
    tcase_add_test(tc, users);
    tcase_add_loop_test(tc, capped, 0, 4);
    tcase_add_test(tc, sleeper);
    tcase_add_test(tc, moments);
    tcase_add_test(tc, stopped_and_killed);
    tcase_add_test(tc, disobedient);
    tcase_add_test(tc, restarts);
    suite_add_tcase(s, tc);
    return s;
}

int main(void)
{
    SRunner *runner = srunner_create(suite());
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

// SPDX-License-Identifier: Apache-2.0
// For scripts/bench migrate: the floor of a page fault that is served from another process over TCP
// on loopback. A thread touches pages that userfaultfd guards, another asks a peer for each and
// copies what comes: nothing is queued, nothing is checked, nothing is noted.
//
//   bench_fault N [WAY]   N faults; prints, in us: p50 p99 from the fault being read until its page
//                         is placed, and p50 p99 as whoever touched the page has waited
//
// WAY: copy (default; private memory, UFFDIO_COPY), memfd (the same of a memfd), or minor (received
// into the memfd through another mapping, UFFDIO_CONTINUE)
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "migrate/userfault.h"
#include "vmm/error.h"
#include "vmm/util.h"

enum { FAULTS_MAX = 1 << 18, REQUEST_BYTES = 32 }; // a WANT record for one page is about as long

struct floor {
    uint8_t *memory, *second; // second: another mapping of it, or NULL
    bool shared, minor;
    uint64_t faults, *served, *waited; // ns of each
    int uffd, peer;
};

static int fail(const char *what)
{
    perror(what);
    return EXIT_FAILURE;
}

static bool recv_all(int fd, void *to, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = recv(fd, (char *)to + at, len - at, 0);
        if (n <= 0)
            return false;
        at += (size_t)n;
    }
    return true;
}

static int answer(int fd)
{
    static uint8_t page[PAGE_SIZE];
    char request[REQUEST_BYTES];
    thread_prompt();
    while (recv_all(fd, request, sizeof(request)))
        if (send(fd, page, sizeof(page), MSG_NOSIGNAL) != sizeof(page))
            return fail("send");
    return EXIT_SUCCESS;
}

static int connect_pair(int fd[2])
{
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t len = sizeof(addr);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&addr, len) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&addr, &len))
        return -1;
    fd[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd[0] < 0 || connect(fd[0], (struct sockaddr *)&addr, len))
        return -1;
    fd[1] = accept(listener, NULL, NULL);
    for (int i = 0; i < 2; i++)
        setsockopt(fd[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    return fd[1] < 0 ? -1 : close(listener);
}

static void *serve(void *arg)
{
    struct floor *f = arg;
    uint8_t page[PAGE_SIZE];
    char request[REQUEST_BYTES] = {0};
    struct error err;
    thread_prompt();
    for (uint64_t i = 0; i < f->faults; i++) {
        struct uffd_msg msg;
        if (read(f->uffd, &msg, sizeof(msg)) != sizeof(msg))
            exit(fail("read userfaultfd"));
        uint64_t start = time_ns();
        uint8_t *to = (uint8_t *)(uintptr_t)align_down(msg.arg.pagefault.address, PAGE_SIZE);
        uint8_t *into = f->minor ? f->second + (to - f->memory) : page;
        if (send(f->peer, request, sizeof(request), MSG_NOSIGNAL) != sizeof(request) ||
            !recv_all(f->peer, into, PAGE_SIZE))
            exit(fail("the peer"));
        if (f->minor ? uffd_continue(f->uffd, to, PAGE_SIZE, PAGE_SIZE, &err)
                     : uffd_copy(f->uffd, to, page, PAGE_SIZE, &err)) {
            fprintf(stderr, "%s\n", err.text);
            exit(EXIT_FAILURE);
        }
        f->served[i] = time_ns() - start;
    }
    return NULL;
}

static void *map_memory(const struct floor *f, int fd, size_t len)
{
    return mmap(NULL, len, PROT_READ | PROT_WRITE,
                f->shared ? MAP_SHARED | MAP_NORESERVE : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
}

static int measure(struct floor *f)
{
    struct error err;
    size_t len = f->faults * PAGE_SIZE;
    pthread_t thread;
    autoclose int fd = f->shared ? memfd_create("bench_fault", MFD_CLOEXEC) : -1;
    if (f->shared && (fd < 0 || ftruncate(fd, (off_t)len)))
        return fail("memfd");
    f->memory = map_memory(f, fd, len);
    f->second = f->minor ? map_memory(f, fd, len) : NULL;
    f->served = calloc(f->faults, sizeof(*f->served));
    f->waited = calloc(f->faults, sizeof(*f->waited));
    if (f->memory == MAP_FAILED || f->second == MAP_FAILED || !f->served || !f->waited)
        return fail("memory");
    madvise(f->memory, len, MADV_NOHUGEPAGE);
    uint64_t mode = UFFDIO_REGISTER_MODE_MISSING | (f->minor ? UFFDIO_REGISTER_MODE_MINOR : 0ull);
    if (uffd_open(&f->uffd, "bench_fault", f->minor ? UFFD_FEATURE_MINOR_SHMEM : 0, &err) ||
        uffd_register(f->uffd, f->memory, len, mode, 0, &err)) {
        fprintf(stderr, "%s\n", err.text);
        return EXIT_FAILURE;
    }
    fcntl(f->uffd, F_SETFL, 0); // wait in read
    if (pthread_create(&thread, NULL, serve, f))
        return fail("thread");
    for (uint64_t i = 0; i < f->faults; i++) {
        uint64_t start = time_ns();
        *(volatile uint8_t *)(f->memory + i * PAGE_SIZE) = 1;
        f->waited[i] = time_ns() - start;
    }
    pthread_join(thread, NULL);
    return EXIT_SUCCESS;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static double percentile(uint64_t *ns, uint64_t nr, unsigned percent)
{
    qsort(ns, nr, sizeof(*ns), compare);
    return (double)ns[(nr - 1) * percent / 100] / 1e3;
}

int main(int argc, char **argv)
{
    const char *way = argc == 3 ? argv[2] : "copy";
    struct floor f = {.faults = argc == 2 || argc == 3 ? strtoull(argv[1], NULL, 10) : 0,
                      .minor = !strcmp(way, "minor"),
                      .shared = strcmp(way, "copy")};
    int fd[2], status;
    if (!f.faults || f.faults > FAULTS_MAX || (f.shared && !f.minor && strcmp(way, "memfd"))) {
        fprintf(stderr, "usage: bench_fault N [copy|memfd|minor] (at most %d)\n", FAULTS_MAX);
        return 2;
    }
    if (connect_pair(fd))
        return fail("TCP");
    pid_t child = fork();
    if (child < 0)
        return fail("fork");
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setsid(); // a scheduling group of its own, as another VMM has
        close(fd[0]);
        return answer(fd[1]);
    }
    close(fd[1]);
    f.peer = fd[0];
    int ret = measure(&f);
    close(fd[0]);
    waitpid(child, &status, 0);
    if (!ret)
        printf("%.1f %.1f %.1f %.1f\n", percentile(f.served, f.faults, 50),
               percentile(f.served, f.faults, 99), percentile(f.waited, f.faults, 50),
               percentile(f.waited, f.faults, 99));
    return ret;
}

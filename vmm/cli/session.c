// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "devices/platform.h"
#include "devices/ucall.h"
#include "devices/virtio_blk.h"
#include "devices/virtio_net.h"
#include "devices/virtio_pci.h"
#include "migrate/snapshot.h"
#include "sched/broker.h"
#include "vmm/cli/api.h"
#include "vmm/cli/arrival.h"
#include "vmm/cli/cli.h"
#include "vmm/cli/registry.h"
#include "vmm/cli/rollback.h"
#include "vmm/cli/supervise.h"
#include "vmm/http.h"
#include "vmm/starter.h"

static void patience_ends(struct loop_timer *timer)
{
    struct session *s = container_of(timer, struct session, stop_timer);
    vm_request_stop(s->vm, VM_STOP_HOST, 0, "the guest did not end within %u s of its power button",
                    s->stop_s);
}

int session_ask(struct session *s, unsigned timeout_s, struct error *err)
{
    enum life_state state = life_get(&s->life);
    if (state != LIFE_RUNNING)
        return error_set(err, -EPERM, "the VM is %s: only a guest that runs hears its power button",
                         life_name(state));
    if (!power_listened(s->board.power))
        return error_set(err, -ENOTCONN, "the guest does not listen for its power button");
    int ret = s->stop_timer.fn ? 0 : loop_timer_init(s->loop, &s->stop_timer, patience_ends, err);
    if (!ret)
        ret = life_move(&s->life, LIFE_STOPPING, err);
    if (ret)
        return ret;
    s->stop_s = timeout_s;
    loop_timer_set(&s->stop_timer, timeout_s * 1000000000ull, 0);
    power_button(s->board.power);
    return 0;
}

// The first SIGTERM asks a guest that can hear it.
static bool asked_to_end(struct session *s, int signal_number)
{
    struct error err;
    unsigned timeout_s = s->options->stop_timeout_s;
    if (signal_number != SIGTERM || !s->vm || !timeout_s || session_ask(s, timeout_s, &err))
        return false;
    log_write(&s->vm->log, LOG_INFO, "SIGTERM: the guest has %u s to end", timeout_s);
    return true;
}

static void signal_ready(struct loop_watch *watch, uint32_t revents)
{
    struct session *s = container_of(watch, struct session, signals);
    uint8_t number;
    if (read(s->signal_fd, &number, sizeof(number)) != sizeof(number))
        return;
    if (asked_to_end(s, number))
        return;
    if (s->vm)
        vm_request_stop(s->vm, VM_STOP_HOST, 0, "signal: %s", strsignal(number));
    if (s->arrival)
        arrival_cancel(s->arrival);
    if (!s->vm && !s->arrival) // nothing has been started yet
        loop_stop(s->loop);
}

// Not a signalfd: whoever waits for one is woken by every signal of the process, so at each end of
// a vCPU's turn.
static int signal_told;

static void signal_received(int sig)
{
    const int saved = errno;
    const uint8_t number = (uint8_t)sig;
    ssize_t told = write(signal_told, &number, sizeof(number));
    (void)told; // if it does not fit, others were sent that end the VM
    errno = saved;
}

static int signals_watch(struct session *s, struct error *err)
{
    static const int ours[] = {SIGTERM, SIGINT, SIGHUP};
    const struct sigaction action = {.sa_handler = signal_received, .sa_flags = SA_RESTART};
    sigset_t set;
    int ends[2];
    signal(SIGPIPE, SIG_IGN); // a reader that goes away is an error value, not a death
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
        return error_errno(err, "a pipe for signals");
    s->signal_fd = ends[0];
    signal_told = ends[1];
    sigemptyset(&set);
    for (unsigned i = 0; i < ARRAY_SIZE(ours); i++)
        sigaddset(&set, ours[i]);
    sigprocmask(SIG_BLOCK, &set, &s->waiting);
    for (unsigned i = 0; i < ARRAY_SIZE(ours); i++) {
        sigdelset(&s->waiting, ours[i]);
        if (sigaction(ours[i], &action, NULL))
            return error_errno(err, "sigaction");
    }
    s->loop->waiting = &s->waiting;
    return loop_watch(s->loop, &s->signals, s->signal_fd, POLLIN, signal_ready, err);
}

// The loop is gone, and the signals stay blocked: nobody writes any more.
static void signals_close(struct session *s)
{
    if (s->signal_fd < 0)
        return;
    close(s->signal_fd);
    close(signal_told);
}

static void reboot_call(struct session *s);

static void state_changed(enum life_state from, enum life_state to, void *arg)
{
    struct session *s = arg;
    if (s->vm && atomic_load(&s->vm->resetting)) // a reboot that had to wait may go on
        reboot_call(s);
    if (s->control)
        control_broadcast(s->control, json_pack("{s:s, s:s, s:s}", "type", "state", "from",
                                                life_name(from), "to", life_name(to)));
}

// A vCPU that ends the VM tells it from its own thread: life.lock keeps the control alive
// meanwhile.
static void control_publish(struct session *s, struct control *control)
{
    pthread_mutex_lock(&s->life.lock);
    s->control = control;
    pthread_mutex_unlock(&s->life.lock);
}

// passt, which --net user needs, is started by somebody who stays outside of jail and filters.
static int starters_make(struct session *s, struct error *err)
{
    int ret = 0;
    for (unsigned i = 0; i < s->options->nr_devices && !ret; i++) {
        const struct device_option *d = &s->options->devices[i];
        struct virtio_net_config *c = (void *)d->config;
        if (d->kind->class != &virtio_net_class || c->kind != NET_USER)
            continue;
        ret = net_user_starter(&c->user, &c->user.starter, err);
        if (!ret)
            s->starters[s->nr_starters++] = c->user.starter;
    }
    return ret;
}

int session_init(struct session *s, struct vm_options *options, struct error *err)
{
    *s = (struct session) {
        .options = options, .signal_fd = -1, .metrics_fd = -1, .usage.statm_fd = -1};
    life_init(&s->life);
    s->life.changed = state_changed;
    s->life.arg = s;
    int ret = options->dry_run ? 0 : starters_make(s, err);
    if (!ret)
        ret = loop_create(&s->loop, err);
    if (!ret)
        ret = signals_watch(s, err);
    if (ret)
        session_destroy(s);
    return ret;
}

static bool failure(enum vm_stop_kind kind)
{
    return kind == VM_STOP_PANIC || kind == VM_STOP_TRIPLE_FAULT || kind == VM_STOP_EMULATION ||
           kind == VM_STOP_ERROR;
}

static void stopped(struct vm *vm, void *arg)
{
    struct session *s = arg;
    life_move(&s->life, failure(vm->stop.kind) ? LIFE_FAILED : LIFE_STOPPED, NULL);
    loop_stop(vm->loop);
}

// A kernel that is told not to use ACPI finds the windows on its command line.
static int cmdline_make(const struct session *s, char **cmdline, struct error *err)
{
    char windows[VIRTIO_DEVICES_MAX * VIRTIO_MMIO_TEXT + 1] = "";
    const char *append = s->options->append ? s->options->append : "";
    const char *off = strstr(append, "acpi=off");
    bool word = off && (off == append || off[-1] == ' ') && (!off[8] || off[8] == ' ');
    int ret = word && !s->options->pci ? virtio_mmio_cmdline(s->windows, s->options->nr_devices,
                                                             windows, sizeof(windows), err)
                                       : 0;
    if (!ret && asprintf(cmdline, "%s%s", append, windows) < 0)
        ret = error_set(err, -ENOMEM, "no memory for the command line");
    return ret;
}

static int kernel_load(struct session *s, struct error *err)
{
    struct vm_options *o = s->options;
    struct boot_entry entry;
    autofree char *cmdline = NULL;
    int ret = cmdline_make(s, &cmdline, err);
    if (ret)
        return ret;
    o->boot.kernel = o->kernel;
    o->boot.initrd = o->initrd;
    o->boot.cmdline = cmdline;
    o->boot.rsdp = s->board.rsdp;
    if (!s->boot_files)
        ret = boot_open(&s->boot_files, &o->boot, err);
    if (!ret)
        ret = boot_load_files(&s->vm->ram, &o->boot, s->boot_files, &entry, err);
    o->boot.cmdline = NULL;
    return ret ? ret : vm_set_entry(s->vm, &entry, err);
}

static int virtio_add(struct session *s, unsigned i, struct error *err)
{
    const struct device_option *d = &s->options->devices[i];
    const struct virtio_mmio_place window = {.base = s->windows[i].base, .gsi = s->windows[i].gsi};
    const struct virtio_pci_place slot = {.host = s->board.pci, .slot = i + 1};
    d->config->transport = s->options->pci ? &virtio_pci_transport : &virtio_mmio_transport;
    d->config->place = s->options->pci ? (const void *)&slot : &window;
    d->config->arrives = s->restored || !s->options->kernel;
    if (d->kind->class == &virtio_blk_class) {
        struct virtio_blk_config *disk = (void *)d->config;
        disk->comes = s->arrival;
        disk->overwrite = s->options->disk_overwrite;
        disk->fd = outside_fd(&s->outside, disk->path);
    }
    return device_add(s->vm, d->kind->class, d->config, &s->devices[i], err);
}

void session_device_name(const struct session *s, unsigned i, char name[DEVICE_NAME_MAX])
{
    unsigned number = 0;
    const struct device_option *devices = s->options->devices;
    for (unsigned k = 0; k < i; k++)
        number += devices[k].kind == devices[i].kind;
    snprintf(name, DEVICE_NAME_MAX, "%s%u", devices[i].kind->name, number);
}

static void guest_reboots(struct vm *vm, void *arg);

static struct board_config board_of(const struct session *s)
{
    const struct vm_options *o = s->options;
    return (struct board_config) {.console = s->console,
                                  .debug_exit = o->debug_exit,
                                  .virtio = s->windows,
                                  .nr_virtio = o->pci ? 0 : o->nr_devices,
                                  .pci = o->pci,
                                  .vmgenid = o->vmgenid};
}

int session_build(struct session *s, struct error *err)
{
    struct vm_options *o = s->options;
    o->vm.name = o->name;
    o->vm.ram.numa = o->numa;
    int ret = vm_create(&s->vm, &o->vm, s->loop, err);
    if (ret)
        return ret;
    if (s->migrate)
        migrate_commands_vm(s->migrate, s->vm);
    if (s->checkpoints)
        checkpoint_commands_vm(s->checkpoints, s->vm);
    s->vm->on_stop = stopped;
    s->vm->on_stop_arg = s;
    if (!s->console) // it stays open when an arrival fails and the next is awaited
        ret = console_open(&s->console, &o->console, s->loop, err);
    if (ret)
        return ret;
    for (unsigned i = 0; i < o->nr_devices; i++)
        s->windows[i] = virtio_mmio_window(i);
    static const struct ucall_config ucall = {0}; // defaults only
    const struct mark_config mark = {.start_ns = cli_start_ns, .fd = STDERR_FILENO};
    struct board_config board = board_of(s);
    board.ucall = o->ucall ? &ucall : NULL;
    board.mark = o->mark ? &mark : NULL;
    ret = board_create(s->vm, &board, &s->board, err);
    for (unsigned i = 0; i < o->nr_devices && !ret; i++)
        ret = virtio_add(s, i, err);
    if (ret || !o->kernel || s->restored)
        return ret;
    ret = kernel_load(s, err);
    if (ret)
        return ret;
    s->vm->on_reset = o->reboots ? guest_reboots : NULL;
    return vm_power_on_keep(s->vm, err);
}

void session_vm_drop(struct session *s)
{
    if (s->migrate)
        migrate_commands_vm(s->migrate, NULL);
    if (s->tie)
        vm_join(s->vm);
    sched_untie(s->tie);
    s->tie = NULL;
    if (s->checkpoints)
        checkpoint_commands_vm(s->checkpoints, NULL);
    if (s->lazy) { // serves the devices' last requests, too
        vm_pause(s->vm, NULL);
        lazy_free(s->lazy);
        s->lazy = NULL;
    }
    vm_destroy(s->vm);
    s->vm = NULL;
    s->board = (struct board) {0};
    boot_close(s->boot_files);
    s->boot_files = NULL;
}

// --- reset

static int start_again(struct session *s, struct error *err)
{
    const struct board_config board = board_of(s);
    int ret = vm_pause(s->vm, err);
    if (!ret)
        ret = board_reset(s->vm, &board, &s->board, err);
    return ret ? ret : kernel_load(s, err);
}

int session_reset(struct session *s, const char *why, struct error *err)
{
    enum life_state before = life_get(&s->life);
    if (s->vm && !vm_power_on_kept(s->vm))
        return error_set(err, -ENOTSUP,
                         "VM %s came without its kernel, by migration or from a snapshot: there is "
                         "nothing to start it from",
                         s->options->name);
    int ret = life_move(&s->life, LIFE_STARTING, err);
    if (ret)
        return ret;
    ret = start_again(s, err);
    if (ret) {
        vm_request_stop(s->vm, VM_STOP_ERROR, 0, "it cannot start again: %s", err->text);
        return ret;
    }
    log_limited(&s->vm->log, &s->reset_limit, LOG_INFO, "starts again: %s", why);
    life_move(&s->life, before, NULL);
    if (before == LIFE_RUNNING)
        vm_resume(s->vm);
    return 0;
}

// In the loop's thread. A guest that is on its way to another host or into a file waits until that
// has ended (vm_save refuses it); state_changed calls again then.
static void reboot_now(void *arg)
{
    struct session *s = arg;
    struct error err;
    atomic_store(&s->reset_called, false);
    if (!s->vm || !atomic_load(&s->vm->resetting))
        return;
    enum life_state state = life_get(&s->life);
    if (state == LIFE_RUNNING || state == LIFE_PAUSED) {
        session_reset(s, "its guest rebooted", &err);
    } else if (state == LIFE_STOPPING) { // it was asked to end, and that is one way
        pthread_mutex_lock(&s->vm->lock);
        s->vm->on_reset = NULL;
        pthread_mutex_unlock(&s->vm->lock);
        vm_request_stop(s->vm, VM_STOP_RESET, 0, "the guest reset the machine");
    }
}

static void reboot_call(struct session *s)
{
    if (atomic_exchange(&s->reset_called, true))
        return;
    s->reset_call = (struct loop_call) {reboot_now, s, NULL};
    loop_call(s->loop, &s->reset_call);
}

static void guest_reboots(struct vm *vm, void *arg)
{
    reboot_call(arg);
}

static int describe(void *context, struct vm *vm, char **json, struct error *err)
{
    struct session *s = context;
    *json = options_describe(s->options);
    return *json ? 0 : error_set(err, -ENOMEM, "no memory for the machine description");
}

static int create_vm(void *context, const char *json, struct vm **vm, struct error *err)
{
    struct session *s = context;
    int ret = options_machine(s->options, json, err);
    if (!ret)
        ret = session_build(s, err);
    *vm = s->vm;
    return ret;
}

static void destroy_vm(void *context, struct vm *vm)
{
    session_vm_drop(context);
}

static int disks(void *context, struct vm *vm, char **texts, struct error *err)
{
    struct session *s = context;
    json_t *all = options_json(s->options), *list = json_incref(json_object_get(all, "disk"));
    if (s->outside.cwd) {
        json_t *whole = outside_disks(&s->outside, list);
        json_decref(list);
        list = whole;
    }
    *texts = list ? json_dumps(list, JSON_COMPACT) : strdup("[]");
    json_decref(list);
    json_decref(all);
    return *texts ? 0 : error_set(err, -ENOMEM, "no memory for the list of disks");
}

// Disks that the user has named are meant.
static int use_disks(void *context, const char *texts, struct error *err)
{
    struct vm_options *o = ((struct session *)context)->options;
    json_t *list = json_loads(texts, 0, NULL), *text;
    size_t i;
    int ret = 0;
    json_array_foreach(list, i, text)
    {
        if (!ret)
            ret = options_set(o, FOR_RESTORE, "disk", json_string_value(text), err);
    }
    json_decref(list);
    return ret;
}

static bool has_disks(const struct vm_options *o)
{
    bool any = false;
    for (unsigned i = 0; i < o->nr_devices; i++)
        any |= !strcmp(o->devices[i].kind->name, "disk");
    return any;
}

void session_hooks(struct session *s, struct migrate_hooks *hooks)
{
    *hooks = (struct migrate_hooks) {.context = s,
                                     .describe = describe,
                                     .create_vm = create_vm,
                                     .destroy_vm = destroy_vm,
                                     .disks = disks,
                                     .use_disks = has_disks(s->options) ? NULL : use_disks};
}

int session_default_name(struct vm_options *o, struct error *err)
{
    char name[32];
    snprintf(name, sizeof(name), "ferry-%d", (int)getpid());
    return o->name ? 0 : options_set(o, FOR_ALL, "name", name, err);
}

static int migration_add(struct session *s, struct error *err)
{
    session_hooks(s, &s->hooks);
    int ret = migrate_commands_create(&s->migrate, s->control, &s->life, &s->hooks, err);
    if (!ret)
        ret = checkpoint_commands_create(&s->checkpoints, s->control, &s->life, &s->hooks, err);
    if (!ret) {
        migrate_commands_vm(s->migrate, s->vm); // NULL before a start
        checkpoint_commands_vm(s->checkpoints, s->vm);
    }
    return ret;
}

// Behind everything that is opened by a name outside, before the first thread.
static int jail(struct session *s, struct error *err)
{
    const struct jail_config *config = &s->options->jail;
    if (!*config->dir)
        return 0;
    int ret = outside_open(&s->outside, s->options, err);
    return ret ? ret : jail_enter(config, err);
}

int session_enter(struct session *s, struct error *err)
{
    int ret = s->console ? 0 : console_open(&s->console, &s->options->console, s->loop, err);
    return ret ? ret : session_listen(s, err);
}

static int socket_open(struct session *s, const char *path, struct error *err)
{
    struct session_socket *socket = &s->sockets[s->nr_sockets];
    int ret = http_listen(path, &socket->fd, err);
    if (ret)
        return ret;
    strcpy(socket->path, path); // http_listen has seen to its length
    s->nr_sockets++;
    return 0;
}

static int metrics_listen(struct session *s, struct error *err)
{
    if (!s->nr_sockets)
        return error_set(err, -EINVAL, "--metrics-listen needs the API (--control or --api-sock)");
    int ret = http_listen_tcp(s->options->metrics_listen, &s->metrics_fd, err);
    return ret ? error_prefix(err, "--metrics-listen") : 0;
}

int session_listen(struct session *s, struct error *err)
{
    const struct vm_options *o = s->options;
    char path[108];
    int ret = o->control ? control_path(o->name, path, sizeof(path), err) : 0;
    if (!ret && o->control)
        ret = socket_open(s, path, err);
    if (ret == -EADDRINUSE)
        error_set(err, ret, "a VM named %s is running (choose another --name)", o->name);
    if (!ret && o->api_sock)
        ret = socket_open(s, o->api_sock, err);
    if (!ret && o->control)
        ret = registry_write(s, err);
    s->registered = !ret && o->control;
    if (!ret)
        ret = usage_open(&s->usage, err);
    if (!ret && o->metrics_listen)
        ret = metrics_listen(s, err);
    return ret ? ret : jail(s, err);
}

static int sockets_hand_over(struct session *s, struct error *err)
{
    int ret = 0;
    for (; s->nr_sockets && !ret; s->nr_sockets--) {
        struct session_socket *socket = &s->sockets[s->nr_sockets - 1];
        ret = control_take(s->control, socket->fd, socket->path, err);
    }
    return ret;
}

// Until there is a guest.
static int setup_confine(struct session *s, struct error *err)
{
    if (s->setup || s->confined)
        return 0;
    int ret = seccomp_enter(SECCOMP_SETUP, s->options->vm.seccomp, err);
    s->setup = !ret;
    return ret;
}

int session_serve(struct session *s, struct error *err)
{
    struct control *control;
    if (!s->nr_sockets)
        return s->vm ? session_confine(s, err) : 0;
    int ret = control_create(&control, s->loop, &s->life, err);
    if (ret)
        return ret;
    control_publish(s, control);
    ret = session_commands_add(s, err);
    if (!ret && !s->api)
        ret = api_create(&s->api, s, err);
    if (!ret)
        ret = api_routes_add(s->api, s->control, err);
    if (!ret)
        ret = migration_add(s, err);
    if (!ret)
        ret = sockets_hand_over(s, err);
    if (!ret && s->metrics_fd >= 0)
        ret = control_take_reader(s->control, take_fd(&s->metrics_fd), "/metrics/prometheus", err);
    if (ret)
        return ret;
    control_confine(s->control, s->options->vm.seccomp);
    ret = control_start(s->control, err);
    if (ret)
        return ret;
    return s->vm ? session_confine(s, err) : setup_confine(s, err);
}

int session_confine(struct session *s, struct error *err)
{
    int ret = s->confined ? 0 : seccomp_enter(SECCOMP_LOOP, s->options->vm.seccomp, err);
    s->confined = !ret;
    return ret;
}

// The scheduler's socket that the options name, or that is there; NULL: none is looked for.
// *asked: they do name it, or a share.
static const char *scheduler_socket(const struct vm_options *o, bool *asked)
{
    const char *socket = o->sched && strcmp(o->sched, "auto") ? o->sched : SCHED_SOCKET;
    *asked = socket == o->sched || o->share.has;
    bool seen = *asked || o->sched_broker >= 0 || !access(SCHED_SOCKET, F_OK);
    return !strcmp(socket, "off") || !seen ? NULL : socket;
}

int session_jail(struct vm_options *o, int *status, struct error *err)
{
    bool asked;
    int ret = *o->jail.dir ? jail_begin(o, status, err) : 0;
    const char *socket = ret || !*o->jail.dir ? NULL : scheduler_socket(o, &asked);
    return socket ? sched_broker_start(socket, &o->sched_broker, err) : ret;
}

// What was asked for must be had; "auto" takes what there is. `arrived`: it runs, and is not ended
// for that.
static int schedule(struct session *s, bool arrived, struct error *err)
{
    const struct vm_options *o = s->options;
    bool asked;
    const char *socket = scheduler_socket(o, &asked);
    if (!socket || (*o->jail.dir && o->sched_broker < 0))
        return 0;
    return sched_tie(&s->tie, s->vm, socket, o->sched_broker, &o->share, asked && !arrived, err);
}

int session_start(struct session *s, struct error *err)
{
    int ret = life_move(&s->life, LIFE_STARTING, err);
    if (ret)
        return ret;
    if (!s->vm)
        ret = session_build(s, err);
    if (!ret)
        ret = vm_start(s->vm, err);
    if (!ret)
        ret = schedule(s, false, err);
    if (!ret && s->from)
        ret = rollback_start_from(s, s->from, err);
    if (ret) { // back to where it can be configured anew
        session_vm_drop(s);
        life_move(&s->life, LIFE_CREATED, NULL);
        return ret;
    }
    ret = life_move(&s->life, LIFE_RUNNING, err); // first: a short guest has ended a moment later
    if (ret)
        return ret;
    vm_resume(s->vm);
    // What it became is known now. (From a jail the record is out of reach.)
    if (s->registered && !*s->options->jail.dir && registry_write(s, err))
        log_write(&s->vm->log, LOG_WARN, "%s", err->text);
    if (usage_start(&s->usage, s->vm, err))
        log_write(&s->vm->log, LOG_WARN, "%s", err->text);
    return s->control ? session_confine(s, err) : 0; // else session_serve does
}

void session_arrived(struct session *s)
{
    struct error err;
    if (usage_start(&s->usage, s->vm, &err) || schedule(s, true, &err))
        log_write(&s->vm->log, LOG_WARN, "%s", err.text);
    life_move(&s->life, LIFE_STARTING, NULL);
    life_move(&s->life, vm_paused(s->vm) ? LIFE_PAUSED : LIFE_RUNNING, NULL);
}

int session_load(struct session *s, const char *path, enum lazy_mode mode,
                 struct snapshot_report *report, struct error *err)
{
    struct snapshot_load_params params = {.path = path, .mode = mode};
    lazy_params_default(&params.lazy, path);
    int ret = life_move(&s->life, LIFE_STARTING, err);
    if (ret)
        return ret;
    session_hooks(s, &s->hooks);
    s->restored = true;
    ret = snapshot_load_as(&params, &s->hooks, &s->vm, &s->lazy, report, err);
    if (!ret && s->board.vmgenid) // the file may be loaded many times
        ret = vmgenid_renew(s->board.vmgenid, s->board.power, err);
    if (ret) {
        s->restored = false;
        session_vm_drop(s);
        life_move(&s->life, LIFE_CREATED, NULL);
        return ret;
    }
    session_arrived(s);
    return session_confine(s, err);
}

void session_disks_forget(struct session *s, const struct snapfile *file)
{
    struct vm_options *o = s->options;
    size_t len;
    if (!snapfile_section(file, SNAPFILE_DISKS, &len))
        return;
    for (unsigned i = o->nr_devices; i > 0; i--)
        if (!strcmp(o->devices[i - 1].kind->name, "disk"))
            options_remove_device(o, i - 1);
}

int session_checkpoints(struct session *s, const char *from, struct error *err)
{
    json_t *body = NULL;
    unsigned restarts;
    const char *option = s->options->checkpoints;
    struct error unread = {0};
    if (from && checkpoint_policy_read(from, &body, &unread) && unread.code != -ENOENT)
        log_write(&s->vm->log, LOG_WARN, "%s", unread.text);
    if (!body && option) {
        int ret = supervise_parse(option, &body, &restarts, err);
        if (ret)
            return ret;
    }
    if (!body)
        return 0;
    if (s->outside.cwd) {
        char inside[PATH_MAX];
        jail_inside(&s->options->jail, json_string_value(json_object_get(body, "dir")), inside);
        json_object_set_new(body, "dir", json_string(inside));
    }
    int ret = s->checkpoints ? checkpoint_commands_start(s->checkpoints, body, err)
                             : error_set(err, -EINVAL, "checkpoints need --control true");
    json_decref(body);
    return ret;
}

// Said at every level, but for the end that everybody hopes for.
static void report_stop(const struct vm_options *o, const struct vm_stop *stop)
{
    const struct log log = {.name = o->name,
                            .level = LOG_INFO,
                            .fd = STDERR_FILENO,
                            .format = o->vm.log_format,
                            .journal = log_is_journal(STDERR_FILENO)};
    if (stop->kind == VM_STOP_DEBUG_EXIT)
        log_write(&log, LOG_INFO, "debug exit %u", stop->value);
    else if (stop->kind != VM_STOP_POWEROFF || o->vm.log_level >= LOG_INFO)
        log_write(&log, LOG_INFO, "%s%s%s", vm_stop_name(stop->kind), *stop->text ? ": " : "",
                  stop->text);
}

int session_run(struct session *s)
{
    struct error err = {0};
    thread_prompt();
    int ret = loop_run(s->loop, &err);
    if (ret && s->vm)
        vm_request_stop(s->vm, VM_STOP_ERROR, 0, "%s", err.text);
    if (s->arrival)
        arrival_settle(s->arrival);
    rollback_settle(s);
    if (!s->vm) // an arrival that failed: its error says why; or ended before anything began
        return s->arrival ? EXIT_FAILED : EXIT_OK;
    if (s->control)
        control_loop_only(s->control);
    vm_join(s->vm); // what the vCPUs' threads use is taken from here on
    struct vm_stop stop = s->vm->stop;
    // The terminal is as it was before anything more is said.
    struct trace *trace = s->vm->trace;
    s->vm->trace = NULL;
    session_drop(s);
    console_release(s->console); // the loop, which may still hold its polls, frees it
    s->console = NULL;
    report_stop(s->options, &stop);
    if (trace)
        trace_table(trace, stderr);
    trace_destroy(trace);
    return vm_stop_status(&stop);
}

void session_drop(struct session *s)
{
    for (; s->nr_sockets; s->nr_sockets--) { // never served
        close(s->sockets[s->nr_sockets - 1].fd);
        unlink(s->sockets[s->nr_sockets - 1].path);
    }
    checkpoint_commands_destroy(s->checkpoints);
    s->checkpoints = NULL;
    migrate_commands_destroy(s->migrate);
    s->migrate = NULL;
    usage_stop(&s->usage);
    api_vm_gone(s->api);
    if (s->stop_timer.fn)
        loop_timer_close(&s->stop_timer);
    s->stop_timer.fn = NULL;
    struct control *control = s->control;
    control_publish(s, NULL); // nobody broadcasts into it any more
    if (s->registered)        // else the record of that name is another's
        registry_remove(s->options->name);
    s->registered = false;
    control_destroy(control);
    session_vm_drop(s);
}

void session_destroy(struct session *s)
{
    session_drop(s);
    loop_destroy(s->loop);
    signals_close(s);
    while (s->nr_starters)
        starter_destroy(s->starters[--s->nr_starters]);
    outside_close(&s->outside);
    console_close(s->console); // after the loop, which may still hold its polls
    api_destroy(s->api);
    usage_close(&s->usage);
    if (s->metrics_fd >= 0)
        close(s->metrics_fd);
    life_destroy(&s->life);
    *s = (struct session) {.signal_fd = -1, .metrics_fd = -1, .usage.statm_fd = -1};
}

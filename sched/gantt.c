// SPDX-License-Identifier: Apache-2.0
// Drawn in one pass over the log for each row: the state of each vCPU and pCPU is followed from
// event to event. A log that begins in the middle (its older part was overwritten) shows nothing
// until the first event of each.
#include "sched/gantt.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "sched/shapes.h"
#include "vmm/util.h"

enum {
    LEFT = 86,
    RIGHT = 16,
    WIDTH = 960,
    TOP = 58,
    ROW = 24,
    ROW_GAP = 6,
    WAIT_HEIGHT = 34,
    CREDIT_HEIGHT = 190,
    TITLES = 26, // above each part
    LEGEND_ROW = 18,
    LEGEND_COLUMN = 140,
    VCPUS_MAX = 1000,
    CURVES_MAX = 24, // more cannot be told apart
    TICKS = 8,
};

struct vcpu {
    uint32_t vm, id;
    unsigned shade;
    uint64_t run_ns; // in the span
    bool single;     // its VM's only one
};

struct picture {
    const struct gantt *g;
    struct shapes svg;
    struct vcpu *vcpus; // in the order of ids
    size_t nr_vcpus;
    int64_t credit_least, credit_most;
    bool measured; // these two are known
    unsigned waiting_most;
};

// --- Who is there

static int by_id(const void *a, const void *b)
{
    const struct vcpu *x = a, *y = b;
    if (x->vm != y->vm)
        return x->vm < y->vm ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static struct vcpu *vcpu_find(const struct picture *p, uint32_t vm, uint32_t id)
{
    const struct vcpu key = {.vm = vm, .id = id};
    return bsearch(&key, p->vcpus, p->nr_vcpus, sizeof(key), by_id);
}

static bool drawn(const struct gantt *g, const struct record *r)
{
    return r->at_ns >= g->from_ns && r->at_ns < g->to_ns && r->pcpu < g->nr_pcpus;
}

static int find_vcpus(struct picture *p)
{
    p->vcpus = calloc(VCPUS_MAX, sizeof(*p->vcpus));
    if (!p->vcpus)
        return -ENOMEM;
    for (size_t i = 0; i < record_count(p->g->log); i++) {
        const struct record *r = record_at(p->g->log, i);
        if (r->at_ns >= p->g->to_ns || p->nr_vcpus == VCPUS_MAX || vcpu_find(p, r->vm, r->vcpu))
            continue;
        p->vcpus[p->nr_vcpus++] = (struct vcpu) {.vm = r->vm, .id = r->vcpu};
        qsort(p->vcpus, p->nr_vcpus, sizeof(*p->vcpus), by_id);
    }
    unsigned shade = 0;
    for (size_t i = 0; i < p->nr_vcpus; i++) {
        bool first = !i || p->vcpus[i - 1].vm != p->vcpus[i].vm;
        bool last = i + 1 == p->nr_vcpus || p->vcpus[i + 1].vm != p->vcpus[i].vm;
        shade += first && i;
        p->vcpus[i].shade = shade;
        p->vcpus[i].single = first && last;
    }
    return 0;
}

static void name_of(const struct picture *p, const struct vcpu *v, char *text, size_t size)
{
    const char *name = p->g->name ? p->g->name(p->g->arg, v->vm) : NULL;
    char number[16];
    snprintf(number, sizeof(number), "VM %u", v->vm);
    if (v->single)
        snprintf(text, size, "%.40s", name ? name : number);
    else
        snprintf(text, size, "%.40s/%u", name ? name : number, v->id);
}

// --- Time and place

static double x_of(const struct picture *p, uint64_t at)
{
    const struct gantt *g = p->g;
    at = at < g->from_ns ? g->from_ns : at > g->to_ns ? g->to_ns : at;
    return LEFT +
           (double)(at - g->from_ns) * (WIDTH - LEFT - RIGHT) / (double)(g->to_ns - g->from_ns);
}

static double rows_height(const struct picture *p)
{
    return p->g->nr_pcpus * (ROW + ROW_GAP) - ROW_GAP;
}

static double wait_top(const struct picture *p)
{
    return TOP + rows_height(p) + TITLES + 4;
}

static double credit_top(const struct picture *p)
{
    return wait_top(p) + WAIT_HEIGHT + TITLES + 22;
}

static double height(const struct picture *p)
{
    const unsigned columns = (WIDTH - LEFT) / LEGEND_COLUMN;
    return credit_top(p) + CREDIT_HEIGHT + 34 +
           (double)((p->nr_vcpus + columns - 1) / columns) * LEGEND_ROW;
}

// 1, 2 or 5 times a power of ten: about `TICKS` of them in `span`.
static double nice_step(double span)
{
    double step = 1e-3;
    const double next[] = {2, 2.5, 2};
    for (unsigned i = 0; span / step > TICKS; i++)
        step *= next[i % 3];
    return step;
}

static void draw_axis(struct picture *p)
{
    const struct gantt *g = p->g;
    const double from = (double)(int64_t)(g->from_ns - g->zero_ns) / 1e6;
    const double to = (double)(int64_t)(g->to_ns - g->zero_ns) / 1e6;
    const double step = nice_step(to - from), bottom = credit_top(p) + CREDIT_HEIGHT;
    char text[32];
    for (int64_t i = (int64_t)(from / step) - 1; (double)i * step <= to + step / 1e6; i++) {
        if ((double)i * step < from - step / 1e6)
            continue;
        double x = LEFT + ((double)i * step - from) / (to - from) * (WIDTH - LEFT - RIGHT);
        shape_line(&p->svg, x, TOP - 4, x, bottom, "grid");
        snprintf(text, sizeof(text), "%g", (double)i * step);
        shape_text(&p->svg, x, TOP - 8, "small", "middle", text);
    }
    shape_text(&p->svg, LEFT - 24, TOP - 8, "small", "end", "ms");
}

// --- Who ran where

static void draw_run(struct picture *p, unsigned pcpu, const struct record *r, uint64_t to)
{
    struct vcpu *v = vcpu_find(p, r->vm, r->vcpu);
    const uint64_t from = r->at_ns < p->g->from_ns ? p->g->from_ns : r->at_ns;
    if (!v || to <= from)
        return;
    char name[64], label[128];
    const double x = x_of(p, from), width = x_of(p, to) - x, y = TOP + pcpu * (ROW + ROW_GAP);
    name_of(p, v, name, sizeof(name));
    snprintf(label, sizeof(label), "%s: %.3f ms, %s", name, (double)(to - from) / 1e6,
             credit_class_name(r->class));
    shape_bar(&p->svg, x, y, width < 0.4 ? 0.4 : width, ROW, v->shade,
              r->class == CREDIT_OVER ? 0.55 : 1, label);
    v->run_ns += to - from;
}

static void draw_pcpu(struct picture *p, unsigned pcpu)
{
    const struct gantt *g = p->g;
    const struct record *running = NULL;
    const double y = TOP + pcpu * (ROW + ROW_GAP);
    char text[32];
    snprintf(text, sizeof(text), "pCPU %d", g->cpus ? g->cpus[pcpu] : (int)pcpu);
    shape_text(&p->svg, LEFT - 12, y + ROW * 0.68, "label", "end", text);
    shape_line(&p->svg, LEFT, y + ROW, WIDTH - RIGHT, y + ROW, "frame");
    for (size_t i = 0; i < record_count(g->log); i++) {
        const struct record *r = record_at(g->log, i);
        if (r->at_ns >= g->to_ns)
            break;
        if (r->pcpu != pcpu || (r->kind != CREDIT_EV_RUN && r->kind != CREDIT_EV_STOP))
            continue;
        if (running)
            draw_run(p, pcpu, running, r->at_ns);
        running = r->kind == CREDIT_EV_RUN ? r : NULL;
    }
    if (running)
        draw_run(p, pcpu, running, g->to_ns);
}

// --- How many waited

struct waiting {
    unsigned *state; // of each vCPU
    unsigned nr;
};

// +1, -1 or 0: an event's effect on the number of those that wait (parked ones do not).
static int waiting_change(struct picture *p, struct waiting *w, const struct record *r)
{
    const struct vcpu *v = vcpu_find(p, r->vm, r->vcpu);
    if (!v)
        return 0;
    unsigned state = r->kind == CREDIT_EV_RUN    ? CREDIT_RUNNING
                     : r->kind == CREDIT_EV_WAKE ? CREDIT_QUEUED
                                                 : r->state;
    int change = (state == CREDIT_QUEUED) - (w->state[v - p->vcpus] == CREDIT_QUEUED);
    w->state[v - p->vcpus] = state;
    return change;
}

static double wait_y(const struct picture *p, unsigned nr)
{
    return wait_top(p) + WAIT_HEIGHT * (1 - (double)nr / (p->waiting_most ? p->waiting_most : 1));
}

// Without `draw`, finds the most there were.
static void waiting_pass(struct picture *p, struct waiting *w, bool draw)
{
    memset(w->state, 0, p->nr_vcpus * sizeof(*w->state));
    w->nr = 0;
    uint64_t since = p->g->from_ns;
    for (size_t i = 0; i <= record_count(p->g->log); i++) {
        const struct record *r = i < record_count(p->g->log) ? record_at(p->g->log, i) : NULL;
        if (r && r->at_ns >= p->g->to_ns)
            r = NULL;
        const uint64_t at = r ? r->at_ns : p->g->to_ns;
        if (at > since && at > p->g->from_ns) {
            if (draw && w->nr)
                shape_bar(&p->svg, x_of(p, since), wait_y(p, w->nr), x_of(p, at) - x_of(p, since),
                          wait_top(p) + WAIT_HEIGHT - wait_y(p, w->nr), 9, 0.45, NULL);
            if (w->nr > p->waiting_most)
                p->waiting_most = w->nr;
            since = at;
        }
        if (!r)
            return;
        w->nr += (unsigned)waiting_change(p, w, r);
    }
}

static int draw_waiting(struct picture *p)
{
    struct waiting w = {.state = calloc(p->nr_vcpus + 1, sizeof(unsigned))};
    char text[32];
    if (!w.state)
        return -ENOMEM;
    waiting_pass(p, &w, false);
    waiting_pass(p, &w, true);
    free(w.state);
    shape_text(&p->svg, LEFT, wait_top(p) - 8, "label", "start",
               "vCPUs that wait for a pCPU (parked ones, whose VM has used up its cap, do not)");
    shape_line(&p->svg, LEFT, wait_top(p) + WAIT_HEIGHT, WIDTH - RIGHT, wait_top(p) + WAIT_HEIGHT,
               "frame");
    snprintf(text, sizeof(text), "%u", p->waiting_most);
    shape_text(&p->svg, LEFT - 12, wait_top(p) + 8, "small", "end", text);
    shape_text(&p->svg, LEFT - 12, wait_top(p) + WAIT_HEIGHT, "small", "end", "0");
    return 0;
}

// --- Credits

static double credit_y(const struct picture *p, int64_t ns)
{
    return credit_top(p) + CREDIT_HEIGHT * (double)(p->credit_most - ns) /
                               (double)(p->credit_most - p->credit_least);
}

// The credit at `at` on the line from an event to the next, which is at `to` with `credit_ns`.
static int64_t between(const struct record *last, uint64_t to, int64_t credit_ns, uint64_t at)
{
    double part = (double)(at - last->at_ns) / (double)(to - last->at_ns);
    return last->credit_ns + (int64_t)(part * (double)(credit_ns - last->credit_ns));
}

// Measures the range at first, then draws.
static void curve_point(struct picture *p, uint64_t at, int64_t credit_ns)
{
    if (at < p->g->from_ns)
        return;
    if (!p->measured) {
        p->credit_least = credit_ns < p->credit_least ? credit_ns : p->credit_least;
        p->credit_most = credit_ns > p->credit_most ? credit_ns : p->credit_most;
        return;
    }
    shape_curve_point(&p->svg, x_of(p, at), credit_y(p, credit_ns));
}

// Straight from event to event: credit falls only while the vCPU runs, and both ends of that are
// events. Between the last event and the end of the picture, a running one's is not known.
static void curve(struct picture *p, const struct vcpu *v)
{
    const struct gantt *g = p->g;
    const struct record *last = NULL;
    for (size_t i = 0; i < record_count(g->log); i++) {
        const struct record *r = record_at(g->log, i);
        if (r->at_ns >= g->to_ns)
            break;
        if (r->vm != v->vm || r->vcpu != v->id)
            continue;
        int64_t now = r->kind == CREDIT_EV_CREDIT ? r->was_ns : r->credit_ns;
        if (last && last->at_ns < g->from_ns && r->at_ns > g->from_ns)
            curve_point(p, g->from_ns, between(last, r->at_ns, now, g->from_ns));
        curve_point(p, r->at_ns, now);
        if (r->kind == CREDIT_EV_CREDIT)
            curve_point(p, r->at_ns, r->credit_ns);
        last = r;
    }
    if (last && last->state != CREDIT_RUNNING)
        curve_point(p, g->to_ns, last->credit_ns);
}

static void credit_range(struct picture *p)
{
    p->credit_least = -50 * CREDIT_NS;
    p->credit_most = 50 * CREDIT_NS;
    for (size_t i = 0; i < p->nr_vcpus && i < CURVES_MAX; i++)
        curve(p, &p->vcpus[i]);
    p->measured = true;
}

static void draw_credits(struct picture *p)
{
    const double top = credit_top(p);
    const double span = (double)(p->credit_most - p->credit_least) / CREDIT_NS;
    const double step = nice_step(span * 1.6);
    char text[64];
    shape_text(&p->svg, LEFT, top - 8, "label", "start",
               "credits (10 are one ms of CPU time; below 0 is OVER, paler above)");
    for (int64_t i = (int64_t)((double)p->credit_least / CREDIT_NS / step);
         (double)i * step * CREDIT_NS <= (double)p->credit_most; i++) {
        double y = credit_y(p, (int64_t)((double)i * step * CREDIT_NS));
        shape_line(&p->svg, LEFT, y, WIDTH - RIGHT, y, i ? "grid" : "zero");
        snprintf(text, sizeof(text), "%g", (double)i * step);
        shape_text(&p->svg, LEFT - 12, y + 4, "small", "end", text);
    }
    for (size_t i = 0; i < p->nr_vcpus && i < CURVES_MAX; i++) {
        shape_curve_begin(&p->svg, p->vcpus[i].shade);
        curve(p, &p->vcpus[i]);
        shape_curve_end(&p->svg);
    }
}

static void draw_legend(struct picture *p)
{
    const unsigned columns = (WIDTH - LEFT) / LEGEND_COLUMN;
    const double top = credit_top(p) + CREDIT_HEIGHT + 22;
    const double span = (double)(p->g->to_ns - p->g->from_ns);
    for (size_t i = 0; i < p->nr_vcpus; i++) {
        const double x = LEFT + (double)(i % columns) * LEGEND_COLUMN;
        const double y = top + (double)(i / columns) * LEGEND_ROW;
        char name[64], text[96];
        name_of(p, &p->vcpus[i], name, sizeof(name));
        if (strlen(name) > 13)
            strcpy(name + 12, "~");
        snprintf(text, sizeof(text), "%s %.1f%%", name, 100 * (double)p->vcpus[i].run_ns / span);
        shape_bar(&p->svg, x, y - 9, 10, 10, p->vcpus[i].shade, 1, NULL);
        shape_text(&p->svg, x + 15, y, "label", "start", text);
    }
}

static void draw_accountings(struct picture *p)
{
    uint64_t last = 0;
    for (size_t i = 0; i < record_count(p->g->log); i++) {
        const struct record *r = record_at(p->g->log, i);
        if (r->kind != CREDIT_EV_CREDIT || !drawn(p->g, r) || r->at_ns == last)
            continue;
        last = r->at_ns;
        shape_line(&p->svg, x_of(p, last), TOP, x_of(p, last), credit_top(p) + CREDIT_HEIGHT,
                   "period");
    }
}

static int draw(struct picture *p)
{
    shape_begin(&p->svg, WIDTH, height(p), p->g->title);
    shape_text(&p->svg, LEFT, 22, "head", "start", p->g->title);
    draw_axis(p);
    for (unsigned i = 0; i < p->g->nr_pcpus; i++)
        draw_pcpu(p, i);
    int ret = draw_waiting(p);
    if (ret)
        return ret;
    draw_accountings(p);
    draw_credits(p);
    draw_legend(p);
    shape_end(&p->svg);
    return 0;
}

int gantt_write(const struct gantt *g, FILE *out, struct error *err)
{
    struct picture p = {.g = g, .svg.out = out};
    if (g->to_ns <= g->from_ns)
        return error_set(err, -EINVAL, "nothing to draw: the picture would end before it begins");
    int ret = find_vcpus(&p);
    if (!ret) {
        credit_range(&p);
        ret = draw(&p);
    }
    free(p.vcpus);
    if (ret)
        return error_set(err, ret, "no memory for the picture");
    if (fflush(out) || ferror(out))
        return error_set(err, -EIO, "the picture could not be written");
    return 0;
}

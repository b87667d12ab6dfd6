// SPDX-License-Identifier: Apache-2.0
// The drawing of a trial: how the loss depends on the interval, and what was found.
#include <math.h>
#include <stdio.h>

#include "migrate/checkpoint_trial.h"
#include "vmm/svg.h"
#include "vmm/util.h"

enum { WIDTH = 860, HEIGHT = 520, CURVE = 240 };

static const double spans[] = {0.01,   0.02,   0.05,   0.1,     0.2,     0.5,     1,     2,
                               5,      10,     20,     30,      60,      120,     300,   600,
                               1200,   1800,   3600,   7200,    10800,   21600,   43200, 86400,
                               172800, 432000, 864000, 2592000, 7776000, 31557600};

static void span_text(double value, char *text, size_t size)
{
    static const struct {
        double seconds;
        const char *name;
    } units[] = {{86400, "d"}, {3600, "h"}, {60, "min"}, {1, "s"}, {1e-3, "ms"}};
    size_t i = 0;
    while (i + 1 < ARRAY_SIZE(units) && value < units[i].seconds * (1 - 1e-9))
        i++;
    snprintf(text, size, "%.3g %s", value / units[i].seconds, units[i].name);
}

static void share_text(double value, char *text, size_t size)
{
    snprintf(text, size, "%.4g %%", value * 100);
}

// Twice the least loss and more is seen, but not the steep ends: they would flatten all else.
static double loss_top(const struct trial_sweep *s)
{
    double top = s->points[0].model;
    if (s->points[s->nr_points - 1].model > top)
        top = s->points[s->nr_points - 1].model;
    return fmin(fmin(top, s->chosen_loss * 4.2) * 1.06, 1);
}

static void curves(const struct svg_plot *plot, const struct trial_sweep *s)
{
    const struct young_model *m = &s->params.model;
    double x[CURVE], loss[CURVE], cost[CURVE], again[CURVE];
    for (unsigned i = 0; i < CURVE; i++) {
        x[i] = plot->x.min * pow(plot->x.max / plot->x.min, (double)i / (CURVE - 1));
        loss[i] = young_loss(m, x[i]);
        cost[i] = m->cost / (x[i] + m->cost);
        again[i] = fmax(loss[i] - cost[i], 0);
    }
    svg_plot_curve(plot, x, cost, CURVE, (struct svg_pen) {SVG_PURPLE, 1.5, true});
    svg_plot_curve(plot, x, again, CURVE, (struct svg_pen) {SVG_GREEN, 1.5, true});
    svg_plot_curve(plot, x, loss, CURVE, (struct svg_pen) {SVG_BLUE, 3, false});
}

static void mark(const struct svg_plot *plot, const struct trial_sweep *s)
{
    char interval[FAILURES_TEXT_MAX];
    double x = svg_plot_x(plot, s->chosen), y = svg_plot_y(plot, s->chosen_loss);
    double bottom = plot->top + plot->height;
    duration_format(s->chosen, interval);
    svg_line(plot->svg, x, y - 46, x, bottom, (struct svg_pen) {SVG_ORANGE, 1.5, true});
    svg_plot_dot(plot, s->best, s->best_loss, 9, SVG_ORANGE, true);
    for (unsigned i = 0; i < s->nr_points; i++)
        svg_plot_dot(plot, s->points[i].interval, s->points[i].result.loss, 4.5, SVG_INK, false);
    svg_plot_dot(plot, s->policy.interval, s->policy.loss, 6, SVG_ORANGE, false);
    // Above the optimum there is room: the curve is lowest there.
    svg_text(plot->svg, x, y - 78, (struct svg_font) {15, SVG_ORANGE, SVG_MIDDLE, true, 0},
             "T = %s", interval);
    svg_text(plot->svg, x, y - 58, (struct svg_font) {13, SVG_ORANGE, SVG_MIDDLE, false, 0},
             "%.3g %% expected, %.3g %% measured", s->chosen_loss * 100, s->policy.loss * 100);
}

struct legend {
    double y;
    struct svg *svg;
};

static void legend_line(struct legend *l, double x, struct svg_pen pen, const char *text)
{
    svg_line(l->svg, x, l->y - 4, x + 26, l->y - 4, pen);
    svg_text(l->svg, x + 34, l->y, (struct svg_font) {12, SVG_INK, SVG_START, false, 0}, "%s",
             text);
}

static void legend_dot(struct legend *l, double x, double radius, const char *color, bool hollow,
                       const char *text)
{
    svg_circle(l->svg, x + 13, l->y - 4, radius, color, hollow);
    svg_text(l->svg, x + 34, l->y, (struct svg_font) {12, SVG_INK, SVG_START, false, 0}, "%s",
             text);
}

static void legend(struct svg *svg, double left)
{
    struct legend l = {HEIGHT - 40, svg};
    legend_line(&l, left, (struct svg_pen) {SVG_BLUE, 3, false}, "expected loss");
    legend_line(&l, left + 220, (struct svg_pen) {SVG_PURPLE, 1.5, true}, "of it: checkpoints");
    legend_line(&l, left + 470, (struct svg_pen) {SVG_GREEN, 1.5, true},
                "of it: work done again, restarts");
    l.y += 22;
    legend_dot(&l, left, 4.5, SVG_INK, false, "simulated, this interval");
    legend_dot(&l, left + 220, 6, SVG_ORANGE, false, "simulated, the policy");
    legend_dot(&l, left + 470, 7, SVG_ORANGE, true, "optimum of the model");
}

static void heading(struct svg *svg, const struct trial_sweep *s, double left)
{
    const struct young_model *m = &s->params.model;
    char cost[FAILURES_TEXT_MAX], latency[FAILURES_TEXT_MAX], restart[FAILURES_TEXT_MAX],
        mtbf[FAILURES_TEXT_MAX];
    duration_format(m->cost, cost);
    duration_format(m->latency, latency);
    duration_format(m->restart, restart);
    duration_format(m->mtbf, mtbf);
    svg_text(svg, left, 34, (struct svg_font) {19, SVG_INK, SVG_START, true, 0},
             "How often to take a checkpoint");
    svg_text(
        svg, left, 56, (struct svg_font) {13, SVG_GRAY, SVG_START, false, 0},
        "A failure every %s; a checkpoint costs %s and is safe after %s; a restart takes %s. %u "
        "failures a point.",
        mtbf, cost, latency, restart, s->params.failures);
}

char *trial_plot(const struct trial_sweep *s)
{
    struct svg svg;
    if (svg_begin(&svg, WIDTH, HEIGHT, "Expected loss over the interval between checkpoints"))
        return NULL;
    double low = fmax(s->best / 8.6, s->params.model.latency * 0.93);
    const struct svg_plot plot = {
        .svg = &svg,
        .left = 86,
        .top = 78,
        .width = WIDTH - 86 - 30,
        .height = HEIGHT - 78 - 124,
        .x = {"interval between checkpoints, T", low, s->points[s->nr_points - 1].interval * 1.08,
              true, span_text, spans, ARRAY_SIZE(spans)},
        .y = {"share of time lost", 0, loss_top(s), false, share_text, NULL, 0}};
    heading(&svg, s, plot.left);
    svg_plot_frame(&plot);
    curves(&plot, s);
    mark(&plot, s);
    legend(&svg, plot.left);
    return svg_end(&svg);
}

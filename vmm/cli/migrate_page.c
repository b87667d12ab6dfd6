// SPDX-License-Identifier: Apache-2.0
#include "vmm/cli/migrate_page.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "vmm/util.h"

// A plot's place, in SVG units; the axes begin at (LEFT, TOP + HIGH).
enum { WIDE = 860, HIGH = 220, LEFT = 90, TOP = 30, BELOW = 45, TICKS = 5 };

struct plot {
    FILE *f;
    double x_max, y_max;
};

static double number(json_t *list, size_t row, size_t column)
{
    return json_number_value(json_array_get(json_array_get(list, row), column));
}

static void text(FILE *f, const char *s)
{
    for (; *s; s++)
        switch (*s) {
        case '<':
            fputs("&lt;", f);
            break;
        case '>':
            fputs("&gt;", f);
            break;
        case '&':
            fputs("&amp;", f);
            break;
        default:
            fputc(*s >= ' ' ? *s : '?', f);
        }
}

// "12.5 M": three figures and a power of 1000.
static void figure(char *out, size_t size, double value)
{
    static const char *const units[] = {"", " k", " M", " G", " T"};
    unsigned unit = 0;
    while (value >= 1000 && unit + 1 < ARRAY_SIZE(units)) {
        value /= 1000;
        unit++;
    }
    snprintf(out, size, value < 10 && value != (int)value ? "%.2g%s" : "%.3g%s", value,
             units[unit]);
}

static double px(const struct plot *p, double x)
{
    return LEFT + x / p->x_max * WIDE;
}

static double py(const struct plot *p, double y)
{
    return TOP + HIGH - y / p->y_max * HIGH;
}

static void plot_begin(struct plot *p, const char *title, const char *x_name, const char *y_name)
{
    char label[32];
    p->x_max = p->x_max > 0 ? p->x_max : 1;
    p->y_max = p->y_max > 0 ? p->y_max : 1;
    fprintf(p->f,
            "<h2>%s</h2>\n<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">\n"
            "<text x=\"%d\" y=\"18\" class=\"axis\">%s</text>\n",
            title, LEFT + WIDE + 30, TOP + HIGH + BELOW, title, LEFT, y_name);
    for (int i = 0; i <= TICKS; i++) {
        double y = p->y_max * i / TICKS, x = p->x_max * i / TICKS;
        figure(label, sizeof(label), y);
        fprintf(p->f,
                "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" class=\"grid\"/>"
                "<text x=\"%d\" y=\"%.1f\" class=\"tick\" text-anchor=\"end\">%s</text>\n",
                LEFT, LEFT + WIDE, py(p, y), py(p, y), LEFT - 8, py(p, y) + 4, label);
        figure(label, sizeof(label), x);
        fprintf(p->f, "<text x=\"%.1f\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">%s</text>\n",
                px(p, x), TOP + HIGH + 18, label);
    }
    fprintf(p->f, "<text x=\"%d\" y=\"%d\" class=\"axis\" text-anchor=\"end\">%s</text>\n",
            LEFT + WIDE, TOP + HIGH + 36, x_name);
}

static void plot_end(struct plot *p)
{
    fputs("</svg>\n", p->f);
}

static void bar(struct plot *p, double x, double width, double y, const char *style)
{
    fprintf(p->f, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" class=\"%s\"/>\n",
            px(p, x), py(p, y), width / p->x_max * WIDE, TOP + HIGH - py(p, y), style);
}

static void key(FILE *f, const char *style, const char *what)
{
    fprintf(f,
            "<span class=\"key\"><svg viewBox=\"0 0 10 10\" class=\"mark\"><rect width=\"10\" "
            "height=\"10\" class=\"%s\"/></svg> %s</span>\n",
            style, what);
}

// --- the plots

static void plot_rounds(FILE *f, json_t *rounds)
{
    size_t nr = json_array_size(rounds);
    struct plot p = {.f = f, .x_max = (double)nr};
    if (!nr)
        return;
    for (size_t i = 0; i < nr; i++)
        for (size_t k = 1; k <= 2; k++)
            p.y_max = number(rounds, i, k) > p.y_max ? number(rounds, i, k) : p.y_max;
    plot_begin(&p, "Bytes per round", "round", "bytes");
    for (size_t i = 0; i < nr; i++) {
        bar(&p, (double)i + 0.1, 0.38, number(rounds, i, 1), "sent");
        bar(&p, (double)i + 0.52, 0.38, number(rounds, i, 2), "dirty");
    }
    plot_end(&p);
    key(f, "sent", "sent");
    key(f, "dirty", "written by the guest meanwhile");
}

static double rate(json_t *rounds, size_t i, size_t column)
{
    double us = number(rounds, i, 3);
    return us > 0 ? number(rounds, i, column) * 1e6 / us : 0;
}

static void plot_rates(FILE *f, json_t *rounds)
{
    static const char *const styles[] = {"sent-line", "dirty-line"};
    size_t nr = json_array_size(rounds);
    struct plot p = {.f = f};
    if (!nr)
        return;
    for (size_t i = 0; i < nr; i++) {
        p.x_max = number(rounds, i, 0) / 1e6;
        for (size_t k = 1; k <= 2; k++)
            p.y_max = rate(rounds, i, k) > p.y_max ? rate(rounds, i, k) : p.y_max;
    }
    plot_begin(&p, "Throughput and dirty rate", "seconds", "bytes a second");
    for (size_t k = 1; k <= 2; k++) { // a step for each round: the rates are means over it
        fprintf(f, "<polyline class=\"%s\" points=\"", styles[k - 1]);
        for (size_t i = 0; i < nr; i++) {
            double end = number(rounds, i, 0), start = end - number(rounds, i, 3);
            fprintf(f, "%.2f,%.2f %.2f,%.2f ", px(&p, (start > 0 ? start : 0) / 1e6),
                    py(&p, rate(rounds, i, k)), px(&p, end / 1e6), py(&p, rate(rounds, i, k)));
        }
        fputs("\"/>\n", f);
    }
    plot_end(&p);
    key(f, "sent", "sent");
    key(f, "dirty", "written by the guest");
}

static void plot_faults(FILE *f, json_t *history)
{
    json_t *pushes = json_object_get(history, "pushes"),
           *faults = json_object_get(history, "faults");
    json_t *lists[] = {pushes, faults};
    struct plot p = {.f = f, .y_max = json_number_value(json_object_get(history, "pages"))};
    double start = 1e300;
    for (size_t k = 0; k < 2; k++)
        for (size_t i = 0; i < json_array_size(lists[k]); i++) {
            double at = number(lists[k], i, 0) / 1e6;
            p.x_max = at > p.x_max ? at : p.x_max;
            start = at < start ? at : start;
        }
    if (start > p.x_max)
        return;
    p.x_max -= start;
    plot_begin(&p, "Where the guest faulted, and what was sent before it asked",
               "seconds since the guest runs at its new place", "page");
    for (size_t i = 0; i < json_array_size(pushes); i++) {
        double low = number(pushes, i, 1), high = low + number(pushes, i, 2);
        double x = px(&p, number(pushes, i, 0) / 1e6 - start);
        fprintf(f, "<line x1=\"%.2f\" x2=\"%.2f\" y1=\"%.2f\" y2=\"%.2f\" class=\"push\"/>\n", x, x,
                py(&p, low) + 0.8, py(&p, high) - 0.8);
    }
    for (size_t i = 0; i < json_array_size(faults); i++)
        fprintf(f, "<circle cx=\"%.2f\" cy=\"%.2f\" r=\"1.4\" class=\"%s\"/>\n",
                px(&p, number(faults, i, 0) / 1e6 - start), py(&p, number(faults, i, 1)),
                number(faults, i, 2) > 0 ? "fault" : "late");
    plot_end(&p);
    key(f, "push", "sent unasked: the bubbles");
    key(f, "fault", "fault that crossed the network");
    key(f, "late", "fault on a page under way");
}

static void plot_latency(FILE *f, json_t *latency)
{
    json_t *histogram = json_object_get(latency, "histogram");
    size_t nr = json_array_size(histogram);
    struct plot p = {.f = f, .x_max = (double)nr};
    char label[32];
    if (!nr)
        return;
    for (size_t i = 0; i < nr; i++)
        p.y_max = number(histogram, i, 1) > p.y_max ? number(histogram, i, 1) : p.y_max;
    fprintf(f, "<h2>How long the guest waited for a page</h2>\n<svg viewBox=\"0 0 %d %d\">\n",
            LEFT + WIDE + 30, TOP + HIGH + BELOW);
    for (size_t i = 0; i < nr; i++) {
        bar(&p, (double)i + 0.1, 0.8, number(histogram, i, 1), "late");
        figure(label, sizeof(label), number(histogram, i, 0));
        if (nr < 24 || i % 3 == 0)
            fprintf(f,
                    "<text x=\"%.1f\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">%s</text>\n",
                    px(&p, (double)i + 0.5), TOP + HIGH + 18, label);
        fprintf(
            f, "<text x=\"%.1f\" y=\"%.1f\" class=\"tick\" text-anchor=\"middle\">%.0f</text>\n",
            px(&p, (double)i + 0.5), py(&p, number(histogram, i, 1)) - 4, number(histogram, i, 1));
    }
    fprintf(f,
            "<text x=\"%d\" y=\"%d\" class=\"axis\" text-anchor=\"end\">microseconds, at least"
            "</text>\n",
            LEFT + WIDE, TOP + HIGH + 36);
    plot_end(&p);
}

static void plot_downtime(FILE *f, json_t *parts)
{
    static const char *const names[] = {"stop", "save", "last_pages", "transfer", "load", "resume"};
    double total = json_number_value(json_object_get(parts, "total")), at = 0;
    if (total <= 0)
        return;
    fprintf(f, "<h2>Downtime: %.2f ms</h2>\n<svg viewBox=\"0 0 %d 44\">\n", total / 1000,
            LEFT + WIDE + 30);
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        double us = json_number_value(json_object_get(parts, names[i]));
        fprintf(f, "<rect x=\"%.2f\" y=\"6\" width=\"%.2f\" height=\"32\" class=\"part%u\"/>\n",
                LEFT + at / total * WIDE, us / total * WIDE, i);
        at += us;
    }
    fputs("</svg>\n", f);
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        char style[16], what[64];
        snprintf(style, sizeof(style), "part%u", i);
        snprintf(what, sizeof(what), "%s %.2f ms", names[i],
                 json_number_value(json_object_get(parts, names[i])) / 1000);
        key(f, style, what);
    }
}

static void table(FILE *f, json_t *report)
{
    const char *name;
    json_t *value;
    fputs("<h2>Figures</h2>\n<table>\n", f);
    json_object_foreach(report, name, value)
    {
        if (json_is_object(value) || json_is_array(value))
            continue;
        fputs("<tr><td>", f);
        text(f, name);
        fputs("</td><td>", f);
        autofree char *dump = json_is_string(value) ? NULL : json_dumps(value, JSON_ENCODE_ANY);
        text(f, dump ? dump : json_string_value(value));
        fputs("</td></tr>\n", f);
    }
    fputs("</table>\n", f);
}

static const char head[] =
    "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Migration</title>\n"
    "<style>\n"
    "body{font:15px/1.4 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;"
    "color:#222;background:#fff}\n"
    "h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .3em}svg{width:100%;height:auto}\n"
    "table{border-collapse:collapse}td{padding:.15em 1em .15em 0;border-bottom:1px solid #eee}\n"
    "td+td{text-align:right;font-variant-numeric:tabular-nums}\n"
    ".tick{font-size:11px;fill:#555}.axis{font-size:12px;fill:#333}.grid{stroke:#e4e4e4}\n"
    ".key{margin-right:1.5em;font-size:13px}.mark{width:10px;height:10px}\n"
    ".sent{fill:#2b6cb0}.dirty{fill:#dd8a2e}\n"
    ".sent-line{stroke:#2b6cb0;fill:none;stroke-width:2}\n"
    ".dirty-line{stroke:#dd8a2e;fill:none;stroke-width:2}\n"
    ".push{stroke:#7fb0dd;fill:#7fb0dd;stroke-width:2.4}.fault{fill:#c0262c}.late{fill:#e0a030}\n"
    ".part0{fill:#8a5a9e}.part1{fill:#2b6cb0}.part2{fill:#3a9d8f}.part3{fill:#7aa83a}"
    ".part4{fill:#dd8a2e}.part5{fill:#c0262c}\n"
    "</style></head><body>\n";

int migrate_page_write(const char *path, const char *name, json_t *report, struct error *err)
{
    FILE *f = fopen(path, "we");
    if (!f)
        return error_errno(err, "writing %s", path);
    json_t *history = json_object_get(report, "history");
    fputs(head, f);
    fputs("<h1>Migration of ", f);
    text(f, name);
    fputs("</h1>\n", f);
    plot_downtime(f, json_object_get(report, "downtime_us"));
    plot_rounds(f, json_object_get(history, "rounds"));
    plot_rates(f, json_object_get(history, "rounds"));
    plot_faults(f, history);
    plot_latency(f, json_object_get(report, "latency_us"));
    table(f, report);
    fputs("</body></html>\n", f);
    bool failed = ferror(f);
    if (fclose(f) || failed)
        return error_errno(err, "writing %s", path);
    return 0;
}

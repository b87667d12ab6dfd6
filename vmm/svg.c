// SPDX-License-Identifier: Apache-2.0
#include "vmm/svg.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>

#include "vmm/util.h"

static void escaped(FILE *out, const char *text)
{
    for (; *text; text++) {
        if (*text == '<')
            fputs("&lt;", out);
        else if (*text == '>')
            fputs("&gt;", out);
        else if (*text == '&')
            fputs("&amp;", out);
        else if ((unsigned char)*text >= ' ' || *text == '\t')
            fputc(*text, out);
    }
}

int svg_begin(struct svg *svg, double width, double height, const char *title)
{
    *svg = (struct svg) {0};
    svg->out = open_memstream(&svg->text, &svg->len);
    if (!svg->out)
        return -ENOMEM;
    fprintf(svg->out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%g\" height=\"%g\" viewBox=\"0 0 %g "
            "%g\" font-family=\"Inter, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif\">\n"
            "<title>",
            width, height, width, height);
    escaped(svg->out, title);
    fputs("</title>\n", svg->out);
    svg_rect(svg, 0, 0, width, height, "#ffffff", 1);
    return 0;
}

char *svg_end(struct svg *svg)
{
    fprintf(svg->out, "</svg>\n");
    bool failed = ferror(svg->out);
    if (fclose(svg->out) || failed) {
        free(svg->text);
        svg->text = NULL;
    }
    return svg->text;
}

static void stroke(struct svg *svg, struct svg_pen pen)
{
    fprintf(svg->out, " stroke=\"%s\" stroke-width=\"%g\"%s/>\n", pen.color, pen.width,
            pen.dashed ? " stroke-dasharray=\"5 4\"" : "");
}

void svg_line(struct svg *svg, double x1, double y1, double x2, double y2, struct svg_pen pen)
{
    if (!isfinite(x1 + y1 + x2 + y2))
        return;
    fprintf(svg->out, "<line x1=\"%.2f\" y1=\"%.2f\" x2=\"%.2f\" y2=\"%.2f\"", x1, y1, x2, y2);
    stroke(svg, pen);
}

void svg_rect(struct svg *svg, double x, double y, double width, double height, const char *fill,
              double opacity)
{
    if (!isfinite(x + y + width + height) || width < 0 || height < 0)
        return;
    fprintf(svg->out, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"", x,
            y, width, height, fill);
    if (opacity < 1)
        fprintf(svg->out, " fill-opacity=\"%g\"", opacity);
    fputs("/>\n", svg->out);
}

void svg_circle(struct svg *svg, double x, double y, double radius, const char *color, bool hollow)
{
    if (!isfinite(x + y + radius))
        return;
    fprintf(svg->out,
            "<circle cx=\"%.2f\" cy=\"%.2f\" r=\"%g\" fill=\"%s\" stroke=\"%s\" "
            "stroke-width=\"%g\"/>\n",
            x, y, radius, hollow ? "none" : color, hollow ? color : "#ffffff", hollow ? 2.0 : 1.5);
}

void svg_text(struct svg *svg, double x, double y, struct svg_font font, const char *fmt, ...)
{
    static const char *const anchors[] = {"start", "middle", "end"};
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    if (!isfinite(x + y))
        return;
    fprintf(svg->out, "<text x=\"%.2f\" y=\"%.2f\" font-size=\"%g\" fill=\"%s\" text-anchor=\"%s\"",
            x, y, font.size, font.color, anchors[font.anchor]);
    if (font.bold)
        fputs(" font-weight=\"600\"", svg->out);
    if (font.turn != 0)
        fprintf(svg->out, " transform=\"rotate(%g %.2f %.2f)\"", font.turn, x, y);
    fputc('>', svg->out);
    escaped(svg->out, text);
    fputs("</text>\n", svg->out);
}

// --- plots

static double place(const struct svg_axis *axis, double value)
{
    return axis->logarithmic ? (log(value) - log(axis->min)) / (log(axis->max) - log(axis->min))
                             : (value - axis->min) / (axis->max - axis->min);
}

double svg_plot_x(const struct svg_plot *plot, double value)
{
    return plot->left + plot->width * place(&plot->x, value);
}

double svg_plot_y(const struct svg_plot *plot, double value)
{
    return plot->top + plot->height * (1 - place(&plot->y, value));
}

enum { TICKS_MAX = 32 };

// Multiples of 1, 2 or 5 times a power of ten, about six of them; 1, 2, 5, 10 ... on a logarithmic
// axis, or its decades alone when it is long.
static unsigned ticks_round(const struct svg_axis *axis, double *ticks)
{
    unsigned n = 0;
    if (axis->logarithmic) {
        bool decades = axis->max / axis->min > 2e4;
        for (double power = pow(10, floor(log10(axis->min))); power <= axis->max; power *= 10)
            for (unsigned k = 0; k < (decades ? 1 : 3) && n < TICKS_MAX; k++)
                ticks[n++] = power * (double[]) {1, 2, 5}[k];
        return n;
    }
    double rough = (axis->max - axis->min) / 6, power = pow(10, floor(log10(rough)));
    double step = power * (rough / power > 5   ? 10
                           : rough / power > 2 ? 5
                           : rough / power > 1 ? 2
                                               : 1);
    for (double at = ceil(axis->min / step - 1e-9); at * step <= axis->max * (1 + 1e-9); at++)
        if (n < TICKS_MAX)
            ticks[n++] = at * step + 0.0; // no -0
    return n;
}

static bool inside(const struct svg_axis *axis, double value)
{
    double at = place(axis, value);
    return at >= -1e-6 && at <= 1 + 1e-6;
}

static void tick_text(const struct svg_axis *axis, double value, char text[32])
{
    if (axis->format)
        axis->format(value, text, 32);
    else
        snprintf(text, 32, "%g", value);
}

static const struct svg_pen grid = {"#e5e9ee", 1, false}, edge = {"#9aa5b1", 1, false};

static void ticks_draw(const struct svg_plot *plot, const struct svg_axis *axis, bool upright)
{
    const struct svg_font font = {12, SVG_GRAY, upright ? SVG_END : SVG_MIDDLE, false, 0};
    double own[TICKS_MAX];
    size_t nr = axis->ticks ? axis->nr_ticks : ticks_round(axis, own);
    const double *ticks = axis->ticks ? axis->ticks : own;
    double bottom = plot->top + plot->height, right = plot->left + plot->width;
    for (size_t i = 0; i < nr; i++) {
        char text[32];
        if (!inside(axis, ticks[i]))
            continue;
        tick_text(axis, ticks[i], text);
        if (upright) {
            double y = svg_plot_y(plot, ticks[i]);
            svg_line(plot->svg, plot->left, y, right, y, grid);
            svg_text(plot->svg, plot->left - 8, y + 4, font, "%s", text);
        } else {
            double x = svg_plot_x(plot, ticks[i]);
            svg_line(plot->svg, x, plot->top, x, bottom, grid);
            svg_text(plot->svg, x, bottom + 18, font, "%s", text);
        }
    }
}

void svg_plot_frame(const struct svg_plot *plot)
{
    const struct svg_font label = {13, SVG_INK, SVG_MIDDLE, false, 0};
    struct svg_font turned = label;
    turned.turn = -90;
    double bottom = plot->top + plot->height, right = plot->left + plot->width;
    ticks_draw(plot, &plot->x, false);
    ticks_draw(plot, &plot->y, true);
    svg_line(plot->svg, plot->left, bottom, right, bottom, edge);
    svg_line(plot->svg, plot->left, plot->top, plot->left, bottom, edge);
    svg_text(plot->svg, plot->left + plot->width / 2, bottom + 42, label, "%s", plot->x.label);
    svg_text(plot->svg, plot->left - 58, plot->top + plot->height / 2, turned, "%s", plot->y.label);
}

void svg_plot_curve(const struct svg_plot *plot, const double *x, const double *y, size_t nr,
                    struct svg_pen pen)
{
    bool down = false;
    fputs("<path fill=\"none\" stroke-linejoin=\"round\" d=\"", plot->svg->out);
    for (size_t i = 0; i < nr; i++) {
        bool shown = inside(&plot->x, x[i]) && inside(&plot->y, y[i]);
        if (shown)
            fprintf(plot->svg->out, "%s%.2f %.2f", down ? "L" : "M", svg_plot_x(plot, x[i]),
                    svg_plot_y(plot, y[i]));
        down = shown;
    }
    fputc('"', plot->svg->out);
    stroke(plot->svg, pen);
}

void svg_plot_dot(const struct svg_plot *plot, double x, double y, double radius, const char *color,
                  bool hollow)
{
    if (inside(&plot->x, x) && inside(&plot->y, y))
        svg_circle(plot->svg, svg_plot_x(plot, x), svg_plot_y(plot, y), radius, color, hollow);
}

// SPDX-License-Identifier: Apache-2.0
// Drawings as SVG text: shapes, and plots with axes. Pure. Positions are pixels from the upper left
// corner. Text is escaped; a figure that is no number is left out.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

struct svg {
    FILE *out;
    char *text;
    size_t len;
};

// Begins a drawing on white. svg_end gives its text (the caller's), or NULL if memory ran out.
int svg_begin(struct svg *svg, double width, double height, const char *title); // 0 or -ENOMEM
char *svg_end(struct svg *svg);

// Colours that can be told apart, also without red and green; SVG_GRAY is for what matters less.
#define SVG_BLUE   "#0b6bb8"
#define SVG_ORANGE "#d9600f"
#define SVG_GREEN  "#0a8a62"
#define SVG_PURPLE "#8a4fb0"
#define SVG_GRAY   "#6b7280"
#define SVG_INK    "#1f2933"

enum svg_anchor { SVG_START, SVG_MIDDLE, SVG_END };

struct svg_pen {
    const char *color;
    double width;
    bool dashed;
};

void svg_line(struct svg *svg, double x1, double y1, double x2, double y2, struct svg_pen pen);
void svg_rect(struct svg *svg, double x, double y, double width, double height, const char *fill,
              double opacity);
// Filled, with a white rim; hollow: a ring of that colour.
void svg_circle(struct svg *svg, double x, double y, double radius, const char *color, bool hollow);

struct svg_font {
    double size;
    const char *color;
    enum svg_anchor anchor;
    bool bold;
    double turn; // degrees, clockwise
};
void svg_text(struct svg *svg, double x, double y, struct svg_font font, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));

// --- plots

struct svg_axis {
    const char *label;
    double min, max; // min < max; of a logarithmic one min > 0
    bool logarithmic;
    // A tick's text, at most 32 bytes; NULL: %g.
    void (*format)(double value, char *text, size_t size);
    // Where ticks may be, ascending, instead of round numbers; NULL: those.
    const double *ticks;
    size_t nr_ticks;
};

struct svg_plot {
    struct svg *svg;
    double left, top, width, height; // of the area inside the axes
    struct svg_axis x, y;
};

double svg_plot_x(const struct svg_plot *plot, double value);
double svg_plot_y(const struct svg_plot *plot, double value);
void svg_plot_frame(const struct svg_plot *plot); // axes, grid, ticks and labels
// What lies outside of the axes is left out.
void svg_plot_curve(const struct svg_plot *plot, const double *x, const double *y, size_t nr,
                    struct svg_pen pen);
void svg_plot_dot(const struct svg_plot *plot, double x, double y, double radius, const char *color,
                  bool hollow);

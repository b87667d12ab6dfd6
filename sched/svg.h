// SPDX-License-Identifier: Apache-2.0
// The few shapes that the scheduler's pictures are made of, as SVG text.
#pragma once

#include <stdint.h>
#include <stdio.h>

struct svg {
    FILE *out;
};

// Sizes are in pixels. Style classes are named by what is drawn: see svg.c.
void svg_begin(struct svg *s, double width, double height, const char *title);
void svg_end(struct svg *s);
// `shade` is a number of a palette that repeats; `label` (or NULL) is shown by the pointer.
void svg_bar(struct svg *s, double x, double y, double w, double h, unsigned shade, double opacity,
             const char *label);
void svg_line(struct svg *s, double x1, double y1, double x2, double y2, const char *class);
// `anchor` is start, middle or end; text is escaped.
void svg_text(struct svg *s, double x, double y, const char *class, const char *anchor,
              const char *text);
// A line through points that are given one by one.
void svg_curve_begin(struct svg *s, unsigned shade);
void svg_curve_point(struct svg *s, double x, double y);
void svg_curve_end(struct svg *s);

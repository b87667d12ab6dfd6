// SPDX-License-Identifier: Apache-2.0
// The few shapes that the scheduler's pictures are made of, as SVG text.
#pragma once

#include <stdint.h>
#include <stdio.h>

struct shapes {
    FILE *out;
};

// Sizes are in pixels. Style classes are named by what is drawn: see shapes.c.
void shape_begin(struct shapes *s, double width, double height, const char *title);
void shape_end(struct shapes *s);
// `shade` is a number of a palette that repeats; `label` (or NULL) is shown by the pointer.
void shape_bar(struct shapes *s, double x, double y, double w, double h, unsigned shade,
               double opacity, const char *label);
void shape_line(struct shapes *s, double x1, double y1, double x2, double y2, const char *class);
// `anchor` is start, middle or end; text is escaped.
void shape_text(struct shapes *s, double x, double y, const char *class, const char *anchor,
                const char *text);
// A line through points that are given one by one.
void shape_curve_begin(struct shapes *s, unsigned shade);
void shape_curve_point(struct shapes *s, double x, double y);
void shape_curve_end(struct shapes *s);

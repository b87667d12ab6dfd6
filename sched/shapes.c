// SPDX-License-Identifier: Apache-2.0
#include "sched/shapes.h"

#include "vmm/util.h"

// Colours that differ in lightness too, for those who cannot tell all hues apart.
static const char *const palette[] = {"#2f6fb2", "#e08a2e", "#3f9b6b", "#b5495b", "#7a62a8",
                                      "#8a8f3a", "#3aa5b5", "#c77fb0", "#6b5344", "#5f6f7f"};

static const char *colour(unsigned shade)
{
    return palette[shade % ARRAY_SIZE(palette)];
}

static void escaped(FILE *out, const char *text)
{
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if (*p == '<' || *p == '>' || *p == '&' || *p == '"' || *p < 32 || *p > 126)
            fprintf(out, "&#%d;", *p < 32 || *p > 126 ? '?' : *p);
        else
            fputc(*p, out);
    }
}

void shape_begin(struct shapes *s, double width, double height, const char *title)
{
    fprintf(s->out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
            "viewBox=\"0 0 %.0f %.0f\" font-family=\"Helvetica, Arial, sans-serif\">\n<title>",
            width, height, width, height);
    escaped(s->out, title);
    fprintf(s->out, "</title>\n<style>\n"
                    "rect{shape-rendering:crispEdges}\n"
                    ".head{font-size:15px;font-weight:bold;fill:#222}\n"
                    ".label{font-size:12px;fill:#333}\n"
                    ".small{font-size:10.5px;fill:#666}\n"
                    ".frame{stroke:#bbb;stroke-width:1}\n"
                    ".grid{stroke:#e4e4e4;stroke-width:1}\n"
                    ".zero{stroke:#888;stroke-width:1;stroke-dasharray:4 3}\n"
                    ".period{stroke:#999;stroke-width:.6;stroke-dasharray:1 3}\n"
                    "</style>\n"
                    "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n");
}

void shape_end(struct shapes *s)
{
    fprintf(s->out, "</svg>\n");
}

void shape_bar(struct shapes *s, double x, double y, double w, double h, unsigned shade,
               double opacity, const char *label)
{
    fprintf(s->out, "<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" fill=\"%s\"", x, y,
            w, h, colour(shade));
    if (opacity < 1)
        fprintf(s->out, " fill-opacity=\"%.2f\"", opacity);
    if (!label) {
        fprintf(s->out, "/>\n");
        return;
    }
    fprintf(s->out, "><title>");
    escaped(s->out, label);
    fprintf(s->out, "</title></rect>\n");
}

void shape_line(struct shapes *s, double x1, double y1, double x2, double y2, const char *class)
{
    fprintf(s->out, "<line x1=\"%.2f\" y1=\"%.1f\" x2=\"%.2f\" y2=\"%.1f\" class=\"%s\"/>\n", x1,
            y1, x2, y2, class);
}

void shape_text(struct shapes *s, double x, double y, const char *class, const char *anchor,
                const char *text)
{
    fprintf(s->out, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\" text-anchor=\"%s\">", x, y, class,
            anchor);
    escaped(s->out, text);
    fprintf(s->out, "</text>\n");
}

void shape_curve_begin(struct shapes *s, unsigned shade)
{
    fprintf(s->out,
            "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.4\" stroke-linejoin=\"round\" "
            "points=\"",
            colour(shade));
}

void shape_curve_point(struct shapes *s, double x, double y)
{
    fprintf(s->out, "%.1f,%.1f ", x, y);
}

void shape_curve_end(struct shapes *s)
{
    fprintf(s->out, "\"/>\n");
}

// SPDX-License-Identifier: Apache-2.0
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/svg.h"

static const struct svg_font font = {12, SVG_INK, SVG_START, false, 0};

static unsigned count(const char *text, const char *what)
{
    unsigned n = 0;
    for (; (text = strstr(text, what)); text++)
        n++;
    return n;
}

START_TEST(text_is_escaped)
{
    struct svg svg;
    ck_assert_int_eq(svg_begin(&svg, 100, 50, "a<b>&c"), 0);
    svg_text(&svg, 1, 2, font, "<script>%s & \x1b[0m", "x");
    char *text = svg_end(&svg);
    ck_assert_ptr_nonnull(strstr(text, "<title>a&lt;b&gt;&amp;c</title>"));
    ck_assert_ptr_nonnull(strstr(text, "&lt;script&gt;x &amp; [0m</text>"));
    ck_assert_ptr_null(strstr(text, "<script>"));
    free(text);
}
END_TEST

START_TEST(what_is_no_number_is_left_out)
{
    struct svg svg;
    svg_begin(&svg, 100, 50, "");
    svg_line(&svg, 0, 0, (double)NAN, 1, (struct svg_pen) {SVG_BLUE, 1, false});
    svg_circle(&svg, (double)INFINITY, 0, 1, SVG_BLUE, false);
    svg_text(&svg, (double)NAN, 0, font, "x");
    char *text = svg_end(&svg);
    ck_assert_uint_eq(count(text, "<line") + count(text, "<circle") + count(text, "<text"), 0);
    free(text);
}
END_TEST

static char *plot_draw(struct svg_axis x, struct svg_axis y)
{
    struct svg svg;
    svg_begin(&svg, 300, 200, "");
    const struct svg_plot plot = {&svg, 50, 10, 200, 150, x, y};
    const double xs[] = {-5, 1, 10, 100, 1e6}, ys[] = {1, 1, 2, 3, 4};
    svg_plot_frame(&plot);
    svg_plot_curve(&plot, xs, ys, 5, (struct svg_pen) {SVG_BLUE, 2, false});
    svg_plot_dot(&plot, 10, 2, 3, SVG_INK, false);
    svg_plot_dot(&plot, 10, 200, 3, SVG_INK, false);
    ck_assert_double_eq_tol(svg_plot_x(&plot, x.min), 50, 1e-9);
    ck_assert_double_eq_tol(svg_plot_x(&plot, x.max), 250, 1e-9);
    ck_assert_double_eq_tol(svg_plot_y(&plot, y.min), 160, 1e-9);
    ck_assert_double_eq_tol(svg_plot_y(&plot, y.max), 10, 1e-9);
    return svg_end(&svg);
}

START_TEST(axes_and_curves)
{
    char *text =
        plot_draw((struct svg_axis) {.label = "x", .min = 1, .max = 100, .logarithmic = true},
                  (struct svg_axis) {.label = "y", .min = 0, .max = 6});
    // 1 2 5 10 20 50 100 and 0 1 2 ... 6, each a line of the grid; and two axes.
    ck_assert_uint_eq(count(text, "<line"), 7 + 7 + 2);
    ck_assert_ptr_nonnull(strstr(text, ">50</text>"));
    ck_assert_ptr_nonnull(strstr(text, ">6</text>"));
    ck_assert_uint_eq(count(text, "<circle"), 1);
    // The point left of the axis and the one right of it are not drawn.
    const char *path = strstr(text, " d=\"");
    ck_assert_ptr_nonnull(path);
    ck_assert_uint_eq(count(path, "L"), 2);
    free(text);
}
END_TEST

START_TEST(ticks_are_few_and_round)
{
    static const double spans[][2] = {{0, 1}, {0, 0.003}, {-5, 5}, {1e6, 3e7}, {0.2, 0.9}};
    for (unsigned i = 0; i < sizeof(spans) / sizeof(spans[0]); i++) {
        char *text =
            plot_draw((struct svg_axis) {.label = "x", .min = spans[i][0], .max = spans[i][1]},
                      (struct svg_axis) {.label = "y", .min = 0, .max = 1});
        unsigned lines = count(text, "<line") - 2;
        ck_assert_msg(lines >= 4 && lines <= 20, "%u", lines);
        ck_assert_ptr_null(strstr(text, ">-0<"));
        free(text);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("svg");
    TCase *c = tcase_create("svg");
    tcase_add_test(c, text_is_escaped);
    tcase_add_test(c, what_is_no_number_is_left_out);
    tcase_add_test(c, axes_and_curves);
    tcase_add_test(c, ticks_are_few_and_round);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

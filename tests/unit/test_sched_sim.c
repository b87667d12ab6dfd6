// SPDX-License-Identifier: Apache-2.0
// sched/sim: the workloads of sched/workloads show what they are there to show; what a workload
// must not be; the pictures.
#include <check.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sched/gantt.h"
#include "sched/sim_load.h"
#include "vmm/util.h"

#ifndef WORKLOADS
#error "the build names the directory of the workloads"
#endif

#define MS 1000000ull

static struct sim_workload load(const char *name)
{
    struct sim_workload w;
    struct error err = {0};
    char path[512];
    snprintf(path, sizeof(path), "%s/%s.json", WORKLOADS, name);
    ck_assert_msg(sim_load(&w, path, &err) == 0, "%s", err.text);
    return w;
}

// Runs it and hands back the simulation, which the caller destroys.
static struct sim run(struct sim_workload *w, enum sim_scheduler scheduler, uint64_t slice_ms)
{
    struct sim sim;
    struct error err = {0};
    w->config.scheduler = scheduler;
    if (slice_ms) {
        w->config.params.slice_ns = slice_ms * MS;
        if (w->config.params.tick_ns > slice_ms * MS)
            w->config.params.tick_ns = slice_ms * MS;
    }
    ck_assert_msg(sim_create(&sim, &w->config, &err) == 0, "%s", err.text);
    sim_run(&sim, w->config.duration_ns);
    sim_ideal(&sim);
    return sim;
}

static void check_share(const struct sim *sim, unsigned vm, double expected)
{
    double share = sim_share(sim, &sim->vms[vm]);
    ck_assert_msg(fabs(share - expected) <= 0.01, "VM %s: %.4f pCPUs, not %.4f",
                  sim->config.vms[vm].name, share, expected);
}

START_TEST(two_to_one)
{
    struct sim_workload w = load("two-to-one");
    struct sim sim = run(&w, SIM_CREDIT_CAP, 0);
    check_share(&sim, 0, 2 / 3.0);
    check_share(&sim, 1, 1 / 3.0);
    ck_assert_double_ge(sim_jain(&sim), 0.999);
    sim_destroy(&sim);
    sim = run(&w, SIM_FAIR, 0); // looks at no weights
    check_share(&sim, 0, 0.5);
    check_share(&sim, 1, 0.5);
    sim_destroy(&sim);
    sim_workload_free(&w);
}
END_TEST

START_TEST(three_weights)
{
    struct sim_workload w = load("three-weights");
    struct sim sim = run(&w, SIM_CREDIT_CAP, 0);
    for (unsigned i = 0; i < 3; i++)
        check_share(&sim, i, 2 * (1u << i) / 7.0);
    sim_destroy(&sim);
    sim_workload_free(&w);
}
END_TEST

START_TEST(a_cap_holds_on_an_idle_host)
{
    struct sim_workload w = load("cap-idle-host");
    struct sim sim = run(&w, SIM_CREDIT_CAP, 0);
    check_share(&sim, 0, 0.5);
    sim_destroy(&sim);
    sim = run(&w, SIM_CREDIT, 0); // work-conserving
    check_share(&sim, 0, 1);
    sim_destroy(&sim);
    sim_workload_free(&w);
}
END_TEST

START_TEST(caps_beside_others)
{
    struct sim_workload w = load("caps");
    struct sim sim = run(&w, SIM_CREDIT_CAP, 0);
    check_share(&sim, 0, 0.1);
    check_share(&sim, 1, 0.25);
    check_share(&sim, 2, 0.5);
    check_share(&sim, 3, sim.vms[3].ideal);
    check_share(&sim, 4, sim.vms[4].ideal);
    sim_destroy(&sim);
    sim_workload_free(&w);
}
END_TEST

// A weight is each vCPU's: four of them have 4/5 of two pCPUs; one cannot have more than one. Said
// to be the VM's, it is split: half for each VM.
START_TEST(four_vcpus_against_one)
{
    struct sim_workload w = load("four-against-one");
    struct sim sim = run(&w, SIM_CREDIT_CAP, 0);
    check_share(&sim, 0, 1.6);
    check_share(&sim, 1, 0.4);
    sim_destroy(&sim);
    w.config.params.weight_per_vm = true;
    sim = run(&w, SIM_CREDIT_CAP, 0);
    check_share(&sim, 0, 1);
    check_share(&sim, 1, 1);
    sim_destroy(&sim);
    sim_workload_free(&w);
}
END_TEST

// Without priority for those that wake, a short slice is what they need, and every halving costs
// switches; with it, the slice hardly matters.
START_TEST(slices_and_latency)
{
    static const uint64_t slices[] = {30, 10, 5, 1};
    struct sim_workload w = load("latency");
    uint64_t last = UINT64_MAX, switches = 0;
    for (size_t i = 0; i < ARRAY_SIZE(slices); i++) {
        struct sim sim = run(&w, SIM_PROPORTIONAL, slices[i]);
        uint64_t p99 = sim_percentile(&sim.vms[0].waits, 99), hog = sim.vcpus[1].credit.switches;
        ck_assert(p99 < last || p99 < 5 * MS);
        ck_assert_uint_ge(p99, slices[i] * MS / 2);
        ck_assert_uint_gt(hog, switches);
        last = p99;
        switches = hog;
        sim_destroy(&sim);
        sim = run(&w, SIM_CREDIT, slices[i]);
        ck_assert_uint_le(sim_percentile(&sim.vms[0].waits, 99), 2 * MS);
        check_share(&sim, 0, 0.06);
        sim_destroy(&sim);
    }
    sim_workload_free(&w);
}
END_TEST

// Both rules of placement keep to the shares; they differ in who waits where, so the runs differ.
START_TEST(placement_by_length_or_weight)
{
    struct sim_workload w = load("placement");
    uint64_t runs[2];
    for (int i = 0; i < 2; i++) {
        w.config.params.placement = i ? CREDIT_BY_WEIGHT : CREDIT_BY_LENGTH;
        struct sim sim = run(&w, SIM_CREDIT_CAP, 0);
        runs[i] = sim.vms[0].credit.run_ns;
        // A heavy VM that sleeps has the pCPUs nearly when it wants them; a light one waits.
        ck_assert_uint_lt(sim_percentile(&sim.vms[1].waits, 99), 10 * MS);
        ck_assert_uint_gt(sim_percentile(&sim.vms[2].waits, 99), 20 * MS);
        sim_destroy(&sim);
    }
    ck_assert_uint_ne(runs[0], runs[1]);
    sim_workload_free(&w);
}
END_TEST

START_TEST(the_same_seed_gives_the_same_run)
{
    struct sim_workload w = load("placement");
    json_t *results[3];
    for (unsigned i = 0; i < 3; i++) {
        w.config.seed = 5 + i / 2;
        struct sim sim = run(&w, SIM_CREDIT_CAP, 0);
        results[i] = sim_result(&sim);
        sim_destroy(&sim);
    }
    ck_assert(json_equal(results[0], results[1]));
    ck_assert(!json_equal(results[0], results[2]));
    for (unsigned i = 0; i < 3; i++)
        json_decref(results[i]);
    sim_workload_free(&w);
}
END_TEST

static const struct {
    const char *text, *expected;
} bad[] = {
    {"[]", "object"},
    {"{}", "vms"},
    {"{\"vms\": []}", "vms"},
    {"{\"vms\": [{}], \"pcpu\": 1}", "pcpu"},
    {"{\"vms\": [{}], \"pcpus\": 65}", "pcpus"},
    {"{\"vms\": [{}], \"pcpus\": \"2\"}", "pcpus"},
    {"{\"vms\": [{}], \"slice_ms\": 0.5}", "slice_ms"},
    {"{\"vms\": [{}], \"placement\": \"here\"}", "placement"},
    {"{\"vms\": [{}], \"weight_of\": \"host\"}", "weight_of"},
    {"{\"vms\": [{}, {\"weight\": 0}]}", "vms[1]: weight"},
    {"{\"vms\": [{\"weight\": 65536}]}", "weight"},
    {"{\"vms\": [{\"cap\": -1}]}", "cap"},
    {"{\"vms\": [{\"affinity\": []}]}", "affinity"},
    {"{\"vms\": [{\"affinity\": [64]}]}", "affinity"},
    {"{\"vms\": [{\"affinity\": [\"0\"]}]}", "affinity"},
    {"{\"vms\": [{\"behaviour\": \"sleep\"}]}", "behaviour"},
    {"{\"vms\": [{\"name\": \"\"}]}", "name"},
};

START_TEST(bad_workloads_are_refused)
{
    struct sim_workload w;
    struct error err;
    json_t *json = json_loads(bad[_i].text, 0, NULL);
    ck_assert_ptr_nonnull(json);
    ck_assert_int_eq(sim_load_json(&w, json, &err), -EINVAL);
    ck_assert_msg(strstr(err.text, bad[_i].expected), "%s", err.text);
    json_decref(json);
}
END_TEST

// Fits the keys, but not the host: the simulation says so.
START_TEST(bad_hosts_are_refused)
{
    static const struct {
        const char *text, *expected;
    } hosts[] = {
        {"{\"vms\": [{\"name\": \"x\", \"affinity\": [3]}], \"pcpus\": 2}", "VM x: affinity"},
        {"{\"vms\": [{\"behaviour\": \"periodic\", \"run_us\": 5}]}", "period"},
        {"{\"vms\": [{\"vcpus\": 400}, {\"vcpus\": 101}]}", "101 vCPUs"},
        {"{\"vms\": [{}], \"tick_ms\": 40}", "tick"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(hosts); i++) {
        struct sim_workload w;
        struct sim sim;
        struct error err = {0};
        json_t *json = json_loads(hosts[i].text, 0, NULL);
        ck_assert_msg(sim_load_json(&w, json, &err) == 0, "%s", err.text);
        ck_assert_int_eq(sim_create(&sim, &w.config, &err), -EINVAL);
        ck_assert_msg(strstr(err.text, hosts[i].expected), "%s", err.text);
        sim_workload_free(&w);
        json_decref(json);
    }
}
END_TEST

static size_t count(const char *text, const char *what)
{
    size_t n = 0;
    for (const char *p = text; (p = strstr(p, what)); p++)
        n++;
    return n;
}

static const char *hostile_name(const void *arg, uint32_t vm)
{
    return "<a&\"b\n>";
}

// Well-formed whatever the names are; a bar for each turn, a curve for each vCPU.
START_TEST(pictures)
{
    struct sim_workload w = load("two-to-one");
    struct record_log log;
    struct sim sim;
    struct error err = {0};
    char *text = NULL;
    size_t size;
    ck_assert_int_eq(record_init(&log, 1000), 0);
    w.config.params.trace = record_event;
    w.config.params.trace_arg = &log;
    ck_assert_int_eq(sim_create(&sim, &w.config, &err), 0);
    sim_run(&sim, 300 * MS);
    struct gantt g = {
        .log = &log, .title = "<x>", .to_ns = 300 * MS, .nr_pcpus = 1, .name = hostile_name};
    FILE *out = open_memstream(&text, &size);
    ck_assert_msg(gantt_write(&g, out, &err) == 0, "%s", err.text);
    fclose(out);
    ck_assert_uint_eq(count(text, "<polyline"), 2);
    ck_assert_uint_eq(count(text, "under</title>") + count(text, "over</title>") +
                          count(text, "boost</title>"),
                      sim.vcpus[0].credit.switches + sim.vcpus[1].credit.switches);
    ck_assert_ptr_null(strstr(text, "<a"));
    ck_assert_ptr_null(strstr(text, "<x"));
    ck_assert_ptr_nonnull(strstr(text, "&lt;a&amp;\"b&gt;"));
    free(text);
    g.to_ns = 0;
    ck_assert_int_eq(gantt_write(&g, stderr, &err), -EINVAL);

    json_t *json = record_json(&log, 0, UINT64_MAX);
    ck_assert_uint_eq(json_array_size(json), record_count(&log));
    json_decref(json);
    sim_destroy(&sim);
    record_free(&log);
    sim_workload_free(&w);
}
END_TEST

// The newest stay, the oldest first.
START_TEST(the_record_is_a_ring)
{
    struct record_log log;
    const struct credit_vm vm = {.id = 3};
    const struct credit_vcpu vcpu = {.id = 4, .credit_ns = -5};
    ck_assert_int_eq(record_init(&log, 4), 0);
    for (uint64_t i = 0; i < 10; i++) {
        const struct credit_event event = {CREDIT_EV_RUN, i, &vm, &vcpu, 1, 0};
        record_event(&log, &event);
        ck_assert_uint_eq(record_count(&log), i < 4 ? i + 1 : 4);
    }
    for (size_t i = 0; i < 4; i++)
        ck_assert_uint_eq(record_at(&log, i)->at_ns, 6 + i);
    record_free(&log);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sched_sim");
    TCase *t = tcase_create("sim");
    tcase_set_timeout(t, 100);
    tcase_add_test(t, two_to_one);
    tcase_add_test(t, three_weights);
    tcase_add_test(t, a_cap_holds_on_an_idle_host);
    tcase_add_test(t, caps_beside_others);
    tcase_add_test(t, four_vcpus_against_one);
    tcase_add_test(t, slices_and_latency);
    tcase_add_test(t, placement_by_length_or_weight);
    tcase_add_test(t, the_same_seed_gives_the_same_run);
    tcase_add_loop_test(t, bad_workloads_are_refused, 0, ARRAY_SIZE(bad));
    tcase_add_test(t, bad_hosts_are_refused);
    tcase_add_test(t, pictures);
    tcase_add_test(t, the_record_is_a_ring);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

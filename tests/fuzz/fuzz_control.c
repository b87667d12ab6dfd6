// SPDX-License-Identifier: Apache-2.0
// The API's parser with every route of the program, and the client's parser of answers.
//
//   "PUT /drives/x\n{...}"     a request: method, path, body
//   "AHTTP/1.1 200 ..."        an answer, as it comes from the socket
//   "EHTTP/1.1 200 ..."        the same, for a caller that takes events
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vmm/cli/api.h"
#include "vmm/cli/session.h"
#include "vmm/util.h"

static struct session *session_get(void)
{
    static struct session *s;
    struct error err;
    if (s)
        return s;
    s = calloc(1, sizeof(*s));
    s->options = calloc(1, sizeof(*s->options));
    options_init(s->options);
    life_init(&s->life);
    if (loop_create(&s->loop, &err) || control_create(&s->control, s->loop, &s->life, &err) ||
        session_commands_add(s, &err) || api_create(&s->api, s, &err) ||
        api_routes_add(s->api, s->control, &err) ||
        migrate_commands_create(&s->migrate, s->control, &s->life, &s->hooks, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return s;
}

static void check(bool right, const char *what)
{
    if (right)
        return;
    fprintf(stderr, "%s\n", what);
    abort();
}

// What a PUT of a section is checked for beyond its schema.
static void section(const struct control_wish *wish)
{
    struct error err = {0};
    const char *name = wish->route.path + 1;
    for (const struct api_section *s = api_sections; s->name; s++)
        if (s->fields == wish->route.fields && !strncmp(s->name, name, strlen(s->name)))
            check(!api_section_check(s->name, wish->args, &err) || *err.text,
                  "an error without a reason");
}

static void request(char *text, size_t size)
{
    struct control_wish wish;
    struct error err = {0};
    char *end = memchr(text, '\n', size);
    const char *body = end ? end + 1 : text + size;
    if (end)
        *end = 0;
    char *path = strchr(text, ' ');
    if (!path)
        return;
    *path++ = 0;
    int ret = control_parse(session_get()->control, text, path, body, (size_t)(text + size - body),
                            &wish, &err);
    check(!ret == !!wish.args, "arguments and result do not agree");
    if (ret) {
        check(ret < 0 && *err.text, "an error without a reason");
        return;
    }
    check(wish.route.fn && strlen(wish.id) <= CONTROL_ID_MAX, "no route");
    check(!wish.route.fields || !schema_check(wish.args, wish.route.fields, &err),
          "what was accepted is not as the schema says");
    section(&wish);
    json_decref(wish.args);
}

static void event_take(json_t *event, void *arg)
{
    unsigned *events = arg;
    free(json_dumps(event, JSON_ENCODE_ANY));
    ++*events;
}

static void answer(char *text, size_t size, bool events)
{
    struct error err = {0};
    json_t *result = NULL;
    unsigned seen = 0;
    FILE *in = size ? fmemopen(text, size, "r") : NULL;
    if (!in)
        return;
    int ret = control_answer(in, &result, events ? event_take : NULL, &seen, &err);
    fclose(in);
    check(ret <= 0 && (!ret || *err.text), "an error without a reason");
    check(!ret || !result, "an error with a result");
    json_decref(result);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    memcpy(text, data, size);
    text[size] = 0;
    if (size && (*text == 'A' || *text == 'E'))
        answer(text + 1, size - 1, *text == 'E');
    else
        request(text, size);
    free(text);
    return 0;
}

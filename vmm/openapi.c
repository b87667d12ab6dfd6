// SPDX-License-Identifier: Apache-2.0
// The API describes itself: its routes and schemas as an OpenAPI 3.0 document, made from the very
// tables that requests are checked with.
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "vmm/control.h"
#include "vmm/util.h"

static json_t *object_schema(const struct schema_field *fields);

static void bounds_add(json_t *out, const struct schema_field *f, const char *min, const char *max,
                       int64_t default_max)
{
    json_object_set_new(out, min, json_integer(f->min));
    if (f->max || f->min || default_max)
        json_object_set_new(out, max, json_integer(f->max || f->min ? f->max : default_max));
}

static json_t *field_schema(const struct schema_field *f)
{
    static const char *const types[] = {
        [SCHEMA_STRING] = "string", [SCHEMA_INTEGER] = "integer", [SCHEMA_BOOL] = "boolean",
        [SCHEMA_OBJECT] = "object", [SCHEMA_LIST] = "array",      [SCHEMA_ANY] = NULL};
    if (f->type == SCHEMA_OBJECT && f->fields)
        return object_schema(f->fields);
    json_t *out = json_object();
    if (types[f->type])
        json_object_set_new(out, "type", json_string(types[f->type]));
    if (f->type == SCHEMA_INTEGER) {
        bounds_add(out, f, "minimum", "maximum", 0);
    } else if (f->type == SCHEMA_STRING && !f->choices) {
        json_object_set_new(out, "minLength", json_integer(f->min));
        json_object_set_new(out, "maxLength", json_integer(f->max ? f->max : SCHEMA_TEXT_MAX));
    } else if (f->type == SCHEMA_LIST) {
        json_object_set_new(out, "maxItems", json_integer(f->max ? f->max : SCHEMA_LIST_MAX));
        json_object_set_new(out, "items",
                            f->fields ? object_schema(f->fields)
                                      : json_pack("{s:s}", "type", "string"));
    }
    if (f->choices) {
        json_t *choices = json_array();
        for (const char *const *c = f->choices; *c; c++)
            json_array_append_new(choices, json_string(*c));
        json_object_set_new(out, "enum", choices);
    }
    return out;
}

static json_t *object_schema(const struct schema_field *fields)
{
    json_t *properties = json_object(), *required = json_array();
    for (const struct schema_field *f = fields; f->name; f++) {
        json_object_set_new(properties, f->name, field_schema(f));
        if (f->required)
            json_array_append_new(required, json_string(f->name));
    }
    json_t *out = json_pack("{s:s, s:b, s:o}", "type", "object", "additionalProperties", 0,
                            "properties", properties);
    if (json_array_size(required))
        json_object_set(out, "required", required);
    json_decref(required);
    return out;
}

static json_t *answer(const char *description)
{
    return json_pack("{s:s}", "description", description);
}

static json_t *states_text(unsigned states)
{
    char text[256] = "In any state.";
    if (states)
        snprintf(text, sizeof(text), "Only while the VM is");
    const char *between = " ";
    for (unsigned i = 0; i < LIFE_STATES; i++)
        if (states & LIFE_BIT(i)) {
            size_t len = strlen(text);
            snprintf(text + len, sizeof(text) - len, "%s%s", between, life_name(i));
            between = " or ";
        }
    if (states)
        strncat(text, ".", sizeof(text) - strlen(text) - 1);
    return json_string(text);
}

// "{drive_id}" in a path.
static json_t *parameters(const char *path)
{
    const char *open = strchr(path, '{');
    if (!open)
        return NULL;
    const char *close = strchr(open, '}');
    return json_pack("[{s:s#, s:s, s:b, s:{s:s, s:i, s:i}}]", "name", open + 1,
                     (int)(close - open - 1), "in", "path", "required", 1, "schema", "type",
                     "string", "minLength", 1, "maxLength", 64);
}

static json_t *operation(const struct control_route *r)
{
    json_t *op = json_object();
    json_object_set_new(op, "summary", json_string(r->help));
    json_object_set_new(op, "description", states_text(r->states));
    json_t *params = parameters(r->path);
    if (params)
        json_object_set_new(op, "parameters", params);
    if (r->fields)
        json_object_set_new(op, "requestBody",
                            json_pack("{s:b, s:{s:{s:o}}}", "required", 1, "content",
                                      "application/json", "schema", object_schema(r->fields)));
    json_object_set_new(
        op, "responses",
        json_pack("{s:o, s:o, s:{s:s, s:{s:{s:{s:s}}}}}", "200", answer("done, with JSON"), "204",
                  answer("done"), "400", "description", "not done, and nothing has changed",
                  "content", "application/json", "schema", "$ref", "#/components/schemas/Error"));
    return op;
}

json_t *control_openapi(const struct control_route *routes, unsigned nr)
{
    json_t *paths = json_object();
    for (unsigned i = 0; i < nr; i++) {
        char method[16];
        json_t *path = json_object_get(paths, routes[i].path);
        if (!path) {
            path = json_object();
            json_object_set_new(paths, routes[i].path, path);
        }
        snprintf(method, sizeof(method), "%s", routes[i].method);
        for (char *p = method; *p; p++)
            *p = (char)tolower(*p);
        json_object_set_new(path, method, operation(&routes[i]));
    }
    return json_pack("{s:s, s:{s:s, s:s, s:s}, s:o, s:{s:{s:{s:s, s:{s:{s:s}, s:{s:s}}}}}}",
                     "openapi", "3.0.3", "info", "title", "Ferry", "version", FERRY_VERSION,
                     "description",
                     "The control API of one VM, on a Unix socket. Paths of microVM clients "
                     "(Firecracker's) and Ferry's own.",
                     "paths", paths, "components", "schemas", "Error", "type", "object",
                     "properties", "fault_message", "type", "string", "code", "type", "integer");
}

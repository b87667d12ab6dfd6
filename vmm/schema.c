// SPDX-License-Identifier: Apache-2.0
#include "vmm/schema.h"

#include <errno.h>
#include <string.h>

static const char *type_name(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a fraction";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    default:
        return "null";
    }
}

static int wrong_type(const json_t *value, const char *expected, struct error *err)
{
    return error_set(err, -EINVAL, "expected %s, found %s", expected, type_name(value));
}

static int string_check(const json_t *value, const struct schema_field *f, struct error *err)
{
    if (!json_is_string(value))
        return wrong_type(value, "a string", err);
    size_t len = json_string_length(value);
    size_t max = f->max ? (size_t)f->max : SCHEMA_TEXT_MAX;
    const char *text = json_string_value(value);
    if (strlen(text) != len)
        return error_set(err, -EINVAL, "a string with a zero byte in it");
    if (len < (size_t)f->min || len > max)
        return error_set(err, -EINVAL, "%zu bytes: expected %lld to %zu", len, (long long)f->min,
                         max);
    if (!f->choices)
        return 0;
    char list[200] = "";
    for (const char *const *c = f->choices; *c; c++) {
        if (!strcmp(*c, text))
            return 0;
        size_t used = strlen(list);
        snprintf(list + used, sizeof(list) - used, "%s%s", used ? ", " : "", *c);
    }
    return error_set(err, -EINVAL, "'%.60s': expected one of %s", text, list);
}

static int integer_check(const json_t *value, const struct schema_field *f, struct error *err)
{
    if (!json_is_integer(value))
        return wrong_type(value, "an integer", err);
    long long n = json_integer_value(value);
    long long max = f->max || f->min ? f->max : INT64_MAX;
    if (n < f->min || n > max)
        return error_set(err, -EINVAL, "%lld: expected %lld to %lld", n, (long long)f->min, max);
    return 0;
}

static int object_check(const json_t *object, const struct schema_field *fields, unsigned depth,
                        struct error *err);

static int list_check(const json_t *value, const struct schema_field *f, unsigned depth,
                      struct error *err)
{
    static const struct schema_field text = {.type = SCHEMA_STRING};
    if (!json_is_array(value))
        return wrong_type(value, "a list", err);
    size_t max = f->max ? (size_t)f->max : SCHEMA_LIST_MAX;
    if (json_array_size(value) > max)
        return error_set(err, -EINVAL, "%zu elements: at most %zu", json_array_size(value), max);
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *element = json_array_get(value, i);
        int ret = f->fields ? object_check(element, f->fields, depth, err)
                            : string_check(element, &text, err);
        if (ret)
            return error_prefix(err, "[%zu]", i);
    }
    return 0;
}

static int value_check(const json_t *value, const struct schema_field *f, unsigned depth,
                       struct error *err)
{
    switch (f->type) {
    case SCHEMA_STRING:
        return string_check(value, f, err);
    case SCHEMA_INTEGER:
        return integer_check(value, f, err);
    case SCHEMA_BOOL:
        return json_is_boolean(value) ? 0 : wrong_type(value, "a boolean", err);
    case SCHEMA_OBJECT:
        if (!f->fields)
            return json_is_object(value) ? 0 : wrong_type(value, "an object", err);
        return object_check(value, f->fields, depth, err);
    case SCHEMA_LIST:
        return list_check(value, f, depth, err);
    default:
        return 0;
    }
}

static const struct schema_field *field_find(const struct schema_field *fields, const char *name)
{
    for (; fields->name; fields++)
        if (!strcmp(fields->name, name))
            return fields;
    return NULL;
}

static int object_check(const json_t *object, const struct schema_field *fields, unsigned depth,
                        struct error *err)
{
    const char *key;
    json_t *value;
    if (!json_is_object(object))
        return wrong_type(object, "an object", err);
    if (depth >= SCHEMA_DEPTH_MAX)
        return error_set(err, -EINVAL, "nested too deeply");
    json_object_foreach((json_t *)object, key, value)
    {
        const struct schema_field *f = field_find(fields, key);
        if (!f)
            return error_set(err, -EINVAL, "unknown field '%.80s'", key);
        int ret = json_is_null(value) ? 0 : value_check(value, f, depth + 1, err);
        if (ret)
            return error_prefix(err, "field '%s'", key);
    }
    for (const struct schema_field *f = fields; f->name; f++) {
        value = json_object_get(object, f->name);
        if (f->required && (!value || json_is_null(value)))
            return error_set(err, -EINVAL, "field '%s' is missing", f->name);
    }
    return 0;
}

int schema_check(const json_t *object, const struct schema_field *fields, struct error *err)
{
    return object_check(object, fields, 0, err);
}

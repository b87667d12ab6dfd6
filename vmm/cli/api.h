// SPDX-License-Identifier: Apache-2.0
// The part of the API that existing microVM clients speak: Firecracker's paths and bodies
// (docs/openapi.yaml says which). A VM is described piece by piece, then started.
#pragma once

#include <jansson.h>

#include "vmm/control.h"

struct session;
struct api;

int api_create(struct api **api, struct session *session, struct error *err);
int api_routes_add(struct api *api, struct control *control, struct error *err);
void api_vm_gone(struct api *api); // before its VM is destroyed; NULL is fine
void api_destroy(struct api *api); // NULL is fine

// A whole configuration at once, as --config-file gives it: an object with the sections that
// GET /vm/config shows. Creates session->api and fills the session's options.
int api_take_file(struct session *session, const char *path, struct error *err);

// --- between api.c (routes, what was said) and api_machine.c (what it means)

// Names of the sections that hold one object, and of those that hold a list with an id each.
struct api_section {
    const char *name;
    const char *id; // field that names an element; NULL: one object
    const struct schema_field *fields;
};
extern const struct api_section api_sections[]; // ends with a NULL name
extern const struct schema_field api_limiter_fields[];

// Turns a configuration into options->...; what is wrong is named. Nothing is opened.
int api_machine(struct session *session, json_t *config, struct error *err);
// Checks one section's body beyond its schema: files that are missing, values we do not have.
int api_section_check(const char *section, json_t *body, struct error *err);

// SPDX-License-Identifier: Apache-2.0
// The text of an option: which host side a console has.
#include "devices/console.h"

#include <errno.h>
#include <string.h>

#include "vmm/util.h"

static int key_parse(const char *text, int *key, struct error *err)
{
    if (!strcmp(text, "none"))
        *key = -1;
    else if (text[0] == '^' && text[1] >= 'A' && text[1] <= '_' && !text[2])
        *key = text[1] - 0x40;
    else if (text[0] == '^' && text[1] >= 'a' && text[1] <= 'z' && !text[2])
        *key = text[1] - 0x60;
    else if (text[0] > ' ' && text[0] < 0x7f && !text[1])
        *key = text[0];
    else
        return error_set(err, -EINVAL,
                         "console escape key '%s': expected ^A to ^_, one character, or none",
                         text);
    return 0;
}

static int path_copy(char *path, const char *text, size_t len, const char *kind, struct error *err)
{
    if (!len || len >= CONSOLE_PATH_MAX)
        return error_set(err, -EINVAL, "console %s: path of %zu bytes, expected 1 to %d", kind, len,
                         CONSOLE_PATH_MAX - 1);
    memcpy(path, text, len);
    path[len] = 0;
    return 0;
}

static int option_parse(const char *text, struct console_config *config, struct error *err)
{
    if (config->kind == CONSOLE_STDIO && !strncmp(text, "escape=", 7))
        return key_parse(text + 7, &config->escape, err);
    if (config->kind == CONSOLE_PTY && !strncmp(text, "link=", 5))
        return path_copy(config->path, text + 5, strlen(text + 5), "pty link", err);
    if (config->kind == CONSOLE_FILE && !strcmp(text, "append")) {
        config->append = true;
        return 0;
    }
    return error_set(err, -EINVAL,
                     "console option '%s': expected stdio,escape=KEY, file:PATH,append or "
                     "pty,link=PATH",
                     text);
}

static int fd_parse(const char *text, int *fd, struct error *err)
{
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (errno || end == text || *end || n < 0 || n > 1 << 20)
        return error_set(err, -EINVAL, "console fd '%s': expected the number of an open fd", text);
    *fd = (int)n;
    return 0;
}

int console_parse(const char *text, struct console_config *config, struct error *err)
{
    static const struct {
        const char *word;
        enum console_kind kind;
    } kinds[] = {{"null", CONSOLE_NULL},  {"stdio", CONSOLE_STDIO}, {"pty", CONSOLE_PTY},
                 {"file:", CONSOLE_FILE}, {"unix:", CONSOLE_UNIX},  {"fd:", CONSOLE_FD}};
    *config = (struct console_config) {.fd = -1, .escape = CONSOLE_ESCAPE_DEFAULT};
    // A path may hold commas, but only the last one can begin an option.
    const char *comma = strrchr(text, ',');
    if (comma && !strncmp(text, "file:", 5) && strcmp(comma, ",append"))
        comma = NULL;
    if (comma && (!strncmp(text, "unix:", 5) || !strncmp(text, "fd:", 3)))
        comma = NULL;
    if (!strncmp(text, "pty,", 4) || !strncmp(text, "stdio,", 6))
        comma = strchr(text, ',');
    size_t len = comma ? (size_t)(comma - text) : strlen(text);
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
        size_t n = strlen(kinds[i].word);
        bool takes_value = kinds[i].word[n - 1] == ':';
        if (strncmp(text, kinds[i].word, n) || (!takes_value && len != n))
            continue;
        config->kind = kinds[i].kind;
        int ret = 0;
        if (config->kind == CONSOLE_FD)
            ret = fd_parse(text + n, &config->fd, err);
        else if (takes_value)
            ret = path_copy(config->path, text + n, len - n, kinds[i].word, err);
        return ret || !comma ? ret : option_parse(comma + 1, config, err);
    }
    return error_set(err, -EINVAL,
                     "console '%s': expected stdio, file:PATH, pty, unix:PATH, fd:N or null", text);
}

// SPDX-License-Identifier: Apache-2.0
// TLS 1.3 for migration connections: both sides prove who they are, by certificates of one CA or by
// a key they share. This is the seam to OpenSSL; migrate/channel.c does the waiting.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "vmm/error.h"

enum tls_part { TLS_CA, TLS_CERT, TLS_KEY, TLS_PSK, TLS_PARTS };

// The largest of the texts below, in bytes.
enum { TLS_TEXT_MAX = 32 * 1024 };

// Where the parts come from. `dir` has ca.pem, cert.pem and key.pem; a file given by itself comes
// before that of `dir`. NULL = not given.
struct tls_files {
    const char *dir, *file[TLS_PARTS];
};

// What is in the files: PEM; the shared key is one line "NAME:HEX DIGITS". NULL = not given. `name`
// is what error messages call a part.
struct tls_texts {
    char *text[TLS_PARTS], *name[TLS_PARTS];
};

// Texts are empty when nothing was given. Errors name the file.
int tls_texts_read(struct tls_texts *texts, const struct tls_files *files, struct error *err);
void tls_texts_free(struct tls_texts *texts); // and wipes them
bool tls_texts_given(const struct tls_texts *texts);

// What a side shows and what it accepts. Never changes: any number of threads may use it.
struct tls;

// -EINVAL: CA, certificate and key belong together, or a shared key stands alone. `peer`: the name
// that the certificate of the side connected to must have; NULL: the host of the address.
int tls_create(struct tls **tls, const struct tls_texts *texts, const char *peer,
               struct error *err);
void tls_free(struct tls *tls); // NULL is fine

// One connection. Calls never wait: -EAGAIN says that nothing happened for now, and sets *events to
// what poll must wait for. Two threads may use it at once, one of them reading, one writing.
struct tls_stream;

// `host`: of the side connected to; NULL: none is known, so any name of the CA's will do. Does not
// take over fd.
int tls_stream_create(struct tls_stream **s, const struct tls *tls, int fd, bool server,
                      const char *host, struct error *err);
void tls_stream_free(struct tls_stream *s); // NULL is fine

// Until 0. -EACCES: one side does not accept the other; -EPROTO: that was no TLS.
int tls_handshake(struct tls_stream *s, short *events, struct error *err);
// *n bytes came; 0: the other side has closed.
int tls_read(struct tls_stream *s, void *data, size_t len, size_t *n, short *events,
             struct error *err);
// *n bytes were taken; they are on their way after tls_flush.
int tls_write(struct tls_stream *s, const void *data, size_t len, size_t *n, short *events,
              struct error *err);
int tls_flush(struct tls_stream *s, short *events, struct error *err);

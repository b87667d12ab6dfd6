// SPDX-License-Identifier: Apache-2.0
#include "migrate/tls.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vmm/util.h"

enum {
    PSK_MIN = 16, // bytes; the longest is what OpenSSL takes
    PSK_MAX = 64,
    PSK_NAME_MAX = 64,
    // Encrypted bytes before they are sent: a system call for many records.
    OUT_SIZE = 128 * 1024,
    IN_SIZE = 64 * 1024, // read at once
};

struct tls {
    SSL_CTX *ctx;
    BIO_METHOD *socket;
    char *peer;
    char psk_name[PSK_NAME_MAX + 1]; // empty: certificates
    uint8_t psk[PSK_MAX];
    size_t psk_len;
};

struct tls_stream {
    pthread_mutex_t lock;
    const struct tls *tls;
    SSL *ssl;
    int fd;
    int failure; // errno of the socket
    bool server;
    char subject[64]; // of a certificate that is not accepted
    char why[160];    // what a callback has to say about the failure that follows
    uint8_t *out;     // OUT_SIZE
    size_t out_start, out_end;
};

// --- files

static const char *const part_names[TLS_PARTS] = {"tls_ca", "tls_cert", "tls_key", "psk"};
static const char *const part_files[TLS_PARTS] = {"ca.pem", "cert.pem", "key.pem", NULL};

static int text_read(char **text, const char *path, struct error *err)
{
    autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return error_errno(err, "%s", path);
    char *buffer = malloc(TLS_TEXT_MAX + 1);
    if (!buffer)
        return error_set(err, -ENOMEM, "%s: no memory to read it", path);
    size_t len = 0;
    ssize_t n = 1;
    while (n > 0 && len < TLS_TEXT_MAX + 1) {
        n = read(fd, buffer + len, TLS_TEXT_MAX + 1 - len);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0)
            len += (size_t)n;
    }
    int ret = n < 0 ? error_errno(err, "%s", path)
              : len > TLS_TEXT_MAX
                  ? error_set(err, -EFBIG, "%s: more than %d bytes", path, TLS_TEXT_MAX)
              : memchr(buffer, 0, len) ? error_set(err, -EINVAL, "%s: not a text", path)
                                       : 0;
    if (ret) {
        OPENSSL_cleanse(buffer, len);
        free(buffer);
        return ret;
    }
    buffer[len] = 0;
    *text = buffer;
    return 0;
}

int tls_texts_read(struct tls_texts *texts, const struct tls_files *files, struct error *err)
{
    *texts = (struct tls_texts) {0};
    int ret = 0;
    for (unsigned i = 0; i < TLS_PARTS && !ret; i++) {
        char *path = NULL;
        if (files->file[i])
            path = strdup(files->file[i]);
        else if (!files->dir || !part_files[i])
            continue;
        else if (asprintf(&path, "%s/%s", files->dir, part_files[i]) < 0)
            path = NULL;
        texts->name[i] = path;
        ret = path ? text_read(&texts->text[i], path, err)
                   : error_set(err, -ENOMEM, "no memory for names of files");
    }
    if (ret)
        tls_texts_free(texts);
    return ret;
}

void tls_texts_free(struct tls_texts *texts)
{
    for (unsigned i = 0; i < TLS_PARTS; i++) {
        if (texts->text[i])
            OPENSSL_cleanse(texts->text[i], strlen(texts->text[i]));
        free(texts->text[i]);
        free(texts->name[i]);
    }
    *texts = (struct tls_texts) {0};
}

bool tls_texts_given(const struct tls_texts *texts)
{
    for (unsigned i = 0; i < TLS_PARTS; i++)
        if (texts->text[i])
            return true;
    return false;
}

// --- what a side shows and accepts

static const char *part_name(const struct tls_texts *texts, enum tls_part part)
{
    return texts->name[part] ?: part_names[part];
}

static int no_password(char *buffer, int size, int writing, void *arg)
{
    return -1; // nobody is there to be asked
}

static X509 *next_certificate(BIO *bio)
{
    return PEM_read_bio_X509(bio, NULL, no_password, NULL);
}

// What is behind the last certificate must be nothing.
static bool at_end(void)
{
    unsigned long e = ERR_peek_last_error();
    bool end = ERR_GET_LIB(e) == ERR_LIB_PEM && ERR_GET_REASON(e) == PEM_R_NO_START_LINE;
    ERR_clear_error();
    return end;
}

static int take_ca(struct tls *tls, BIO *bio, const char *name, struct error *err)
{
    X509 *cert;
    unsigned nr = 0;
    bool ok = true;
    while (ok && (cert = next_certificate(bio))) {
        ok = X509_STORE_add_cert(SSL_CTX_get_cert_store(tls->ctx), cert) == 1;
        X509_free(cert);
        nr++;
    }
    if (!ok || !at_end() || !nr)
        return error_set(err, -EINVAL, "%s: expected the CA's certificate as PEM", name);
    return 0;
}

static int take_cert(struct tls *tls, BIO *bio, const char *name, struct error *err)
{
    X509 *cert = next_certificate(bio);
    bool ok = cert && SSL_CTX_use_certificate(tls->ctx, cert) == 1;
    X509_free(cert);
    while (ok && (cert = next_certificate(bio))) {
        ok = SSL_CTX_add0_chain_cert(tls->ctx, cert) == 1;
        if (!ok)
            X509_free(cert);
    }
    if (!ok || !at_end())
        return error_set(err, -EINVAL,
                         "%s: expected a certificate as PEM, then those that lead to the CA", name);
    return 0;
}

static int take_key(struct tls *tls, BIO *bio, const char *name, struct error *err)
{
    EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, no_password, NULL);
    ERR_clear_error();
    if (!key)
        return error_set(err, -EINVAL, "%s: expected a private key as PEM, without a password",
                         name);
    bool ok =
        SSL_CTX_use_PrivateKey(tls->ctx, key) == 1 && SSL_CTX_check_private_key(tls->ctx) == 1;
    EVP_PKEY_free(key);
    ERR_clear_error();
    return ok ? 0 : error_set(err, -EINVAL, "%s: this key is not the certificate's", name);
}

static int take_part(struct tls *tls, const struct tls_texts *texts, enum tls_part part,
                     int (*take)(struct tls *tls, BIO *bio, const char *name, struct error *err),
                     struct error *err)
{
    BIO *bio = BIO_new_mem_buf(texts->text[part], -1);
    if (!bio)
        return error_set(err, -ENOMEM, "no memory for certificates");
    int ret = take(tls, bio, part_name(texts, part), err);
    BIO_free(bio);
    return ret;
}

// Copies what goes to a terminal.
static void copy_shown(char *to, size_t size, const char *from, size_t len)
{
    size_t n = len < size - 1 ? len : size - 1;
    for (size_t i = 0; i < n; i++)
        to[i] = from[i] >= ' ' && from[i] < 0x7f ? from[i] : '?';
    to[n] = 0;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

// "NAME:HEX DIGITS", and perhaps the end of the line.
static int take_psk(struct tls *tls, const char *text, const char *name, struct error *err)
{
    size_t len = strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-");
    const char *p = text + len + 1;
    if (text[len] == ':' && len && len <= PSK_NAME_MAX) {
        memcpy(tls->psk_name, text, len);
        for (; tls->psk_len < PSK_MAX && hex_digit(p[0]) >= 0 && hex_digit(p[1]) >= 0; p += 2)
            tls->psk[tls->psk_len++] = (uint8_t)(hex_digit(p[0]) << 4 | hex_digit(p[1]));
    }
    if (tls->psk_len < PSK_MIN || p[strspn(p, " \t\r\n")])
        return error_set(err, -EINVAL,
                         "%s: expected one line NAME:KEY, the key with %d to %d hexadecimal "
                         "digits (make one: echo \"lab:$(openssl rand -hex 32)\")",
                         name, 2 * PSK_MIN, 2 * PSK_MAX);
    return 0;
}

// A session belongs to what it was made for.
static const unsigned char session_context[] = {'f', 'e', 'r', 'r', 'y'};

// The shared key as what it is to the library: a session that both sides remember.
static SSL_SESSION *psk_session(struct tls_stream *s)
{
    static const unsigned char suite[] = {0x13, 0x01}; // TLS_AES_128_GCM_SHA256
    SSL_SESSION *session = SSL_SESSION_new();
    const SSL_CIPHER *cipher = SSL_CIPHER_find(s->ssl, suite);
    if (session && cipher && SSL_SESSION_set1_master_key(session, s->tls->psk, s->tls->psk_len) &&
        SSL_SESSION_set_cipher(session, cipher) &&
        SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION) &&
        SSL_SESSION_set1_id_context(session, session_context, sizeof(session_context)))
        return session;
    SSL_SESSION_free(session);
    return NULL;
}

static int psk_use(SSL *ssl, const EVP_MD *md, const unsigned char **id, size_t *id_len,
                   SSL_SESSION **session)
{
    struct tls_stream *s = SSL_get_app_data(ssl);
    *id = (const unsigned char *)s->tls->psk_name;
    *id_len = strlen(s->tls->psk_name);
    *session = NULL;
    if (md && EVP_MD_get_type(md) != NID_sha256) // asked for another hash: no key for that
        return 1;
    *session = psk_session(s);
    return *session != NULL;
}

static int psk_find(SSL *ssl, const unsigned char *id, size_t len, SSL_SESSION **session)
{
    struct tls_stream *s = SSL_get_app_data(ssl);
    *session = NULL;
    if (len == strlen(s->tls->psk_name) && !memcmp(id, s->tls->psk_name, len)) {
        *session = psk_session(s);
        return *session != NULL;
    }
    char shown[PSK_NAME_MAX + 1];
    copy_shown(shown, sizeof(shown), (const char *)id, len);
    snprintf(s->why, sizeof(s->why), "its shared key is named '%.40s', here it is '%.40s'", shown,
             s->tls->psk_name);
    return 1; // goes on without, and fails for want of a certificate
}

static int verified(int ok, X509_STORE_CTX *store)
{
    SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
    struct tls_stream *s = SSL_get_app_data(ssl);
    X509 *cert = X509_STORE_CTX_get_current_cert(store);
    char name[256];
    int len = ok || !cert ? -1
                          : X509_NAME_get_text_by_NID(X509_get_subject_name(cert), NID_commonName,
                                                      name, sizeof(name));
    if (len > 0)
        copy_shown(s->subject, sizeof(s->subject), name, (size_t)len);
    return ok;
}

// --- the socket, as the library sees it

static int flush_out(struct tls_stream *s)
{
    while (s->out_start < s->out_end) {
        ssize_t n = send(s->fd, s->out + s->out_start, s->out_end - s->out_start,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n >= 0)
            s->out_start += (size_t)n;
        else if (errno == EAGAIN)
            return -EAGAIN;
        else if (errno != EINTR)
            return s->failure = -errno;
    }
    s->out_start = s->out_end = 0;
    return 0;
}

static int socket_write(BIO *bio, const char *data, size_t len, size_t *written)
{
    struct tls_stream *s = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    if (s->out_end + len > OUT_SIZE && flush_out(s) == -EAGAIN) {
        memmove(s->out, s->out + s->out_start, s->out_end - s->out_start);
        s->out_end -= s->out_start;
        s->out_start = 0;
    }
    if (s->failure)
        return 0;
    if (s->out_end == OUT_SIZE) {
        BIO_set_retry_write(bio);
        return 0;
    }
    *written = len < OUT_SIZE - s->out_end ? len : OUT_SIZE - s->out_end;
    memcpy(s->out + s->out_end, data, *written);
    s->out_end += *written;
    return 1;
}

static int socket_read(BIO *bio, char *data, size_t len, size_t *got)
{
    struct tls_stream *s = BIO_get_data(bio);
    ssize_t n;
    BIO_clear_retry_flags(bio);
    do
        n = recv(s->fd, data, len, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n > 0) {
        *got = (size_t)n;
        return 1;
    }
    if (!n)
        BIO_set_flags(bio, BIO_FLAGS_IN_EOF);
    else if (errno == EAGAIN)
        BIO_set_retry_read(bio);
    else
        s->failure = -errno;
    return 0;
}

static long socket_ctrl(BIO *bio, int command, long number, void *pointer)
{
    return command == BIO_CTRL_FLUSH                                          ? 1
           : command == BIO_CTRL_EOF && BIO_test_flags(bio, BIO_FLAGS_IN_EOF) ? 1
                                                                              : 0;
}

static BIO_METHOD *socket_method(void)
{
    BIO_METHOD *m = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "ferry");
    if (m) {
        BIO_meth_set_write_ex(m, socket_write);
        BIO_meth_set_read_ex(m, socket_read);
        BIO_meth_set_ctrl(m, socket_ctrl);
    }
    return m;
}

// --- both together

static int tls_setup(struct tls *tls, const struct tls_texts *texts, struct error *err)
{
    SSL_CTX *ctx = tls->ctx;
    if (!ctx || !(tls->socket = socket_method()) ||
        !SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION) ||
        !SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"))
        return error_set(err, -ENOMEM, "cannot set TLS up");
    SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(ctx, 0);
    SSL_CTX_set_read_ahead(ctx, 1);
    SSL_CTX_set_default_read_buffer_len(ctx, IN_SIZE);
    // A client with a shared key has no CA: whoever shows a certificate instead is refused.
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, verified);
    if (texts->text[TLS_PSK]) {
        SSL_CTX_set_session_id_context(ctx, session_context, sizeof(session_context));
        SSL_CTX_set_psk_use_session_callback(ctx, psk_use);
        SSL_CTX_set_psk_find_session_callback(ctx, psk_find);
        return take_psk(tls, texts->text[TLS_PSK], part_name(texts, TLS_PSK), err);
    }
    int ret = take_part(tls, texts, TLS_CA, take_ca, err);
    if (!ret)
        ret = take_part(tls, texts, TLS_CERT, take_cert, err);
    return ret ? ret : take_part(tls, texts, TLS_KEY, take_key, err);
}

int tls_create(struct tls **out, const struct tls_texts *texts, const char *peer, struct error *err)
{
    bool certs = texts->text[TLS_CA] || texts->text[TLS_CERT] || texts->text[TLS_KEY];
    bool all = texts->text[TLS_CA] && texts->text[TLS_CERT] && texts->text[TLS_KEY];
    if (certs ? !all || texts->text[TLS_PSK] : !texts->text[TLS_PSK])
        return error_set(err, -EINVAL,
                         "TLS: expected a CA's certificate, a certificate and its key (--tls DIR), "
                         "or a shared key alone (--psk FILE)");
    struct tls *tls = calloc(1, sizeof(*tls));
    // Nothing of this host's configuration: what is agreed on depends on both ferries only.
    if (!tls || !OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, NULL)) {
        free(tls);
        return error_set(err, -ENOMEM, "cannot set TLS up");
    }
    tls->ctx = SSL_CTX_new(TLS_method());
    int ret = tls_setup(tls, texts, err);
    if (!ret && peer && !(tls->peer = strdup(peer)))
        ret = error_set(err, -ENOMEM, "no memory for TLS");
    if (ret) {
        tls_free(tls);
        return ret;
    }
    *out = tls;
    return 0;
}

void tls_free(struct tls *tls)
{
    if (!tls)
        return;
    SSL_CTX_free(tls->ctx);
    BIO_meth_free(tls->socket);
    free(tls->peer);
    OPENSSL_cleanse(tls, sizeof(*tls));
    free(tls);
}

int tls_stream_create(struct tls_stream **out, const struct tls *tls, int fd, bool server,
                      const char *host, struct error *err)
{
    struct tls_stream *s = calloc(1, sizeof(*s));
    BIO *bio = BIO_new(tls->socket);
    if (s) {
        *s = (struct tls_stream) {.tls = tls, .fd = fd, .server = server, .ssl = SSL_new(tls->ctx)};
        pthread_mutex_init(&s->lock, NULL);
        s->out = malloc(OUT_SIZE);
    }
    host = tls->peer ?: host;
    if (!s || !s->out || !s->ssl || !bio ||
        (!server && !*tls->psk_name && host && !SSL_set1_host(s->ssl, host))) {
        BIO_free(bio);
        tls_stream_free(s);
        ERR_clear_error();
        return error_set(err, -ENOMEM, "no memory for a TLS connection");
    }
    BIO_set_data(bio, s);
    BIO_set_init(bio, 1);
    SSL_set_bio(s->ssl, bio, bio);
    SSL_set_app_data(s->ssl, s);
    if (server)
        SSL_set_accept_state(s->ssl);
    else
        SSL_set_connect_state(s->ssl);
    *out = s;
    return 0;
}

void tls_stream_free(struct tls_stream *s)
{
    if (!s)
        return;
    SSL_free(s->ssl);
    free(s->out);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

// --- errors

static int certificate_error(struct tls_stream *s, struct error *err)
{
    const char *subject = s->subject;
    long result = SSL_get_verify_result(s->ssl);
    const char *wanted = SSL_get0_peername(s->ssl) ?: s->tls->peer;
    if (result == X509_V_ERR_HOSTNAME_MISMATCH || result == X509_V_ERR_IP_ADDRESS_MISMATCH)
        return error_set(err, -EACCES,
                         "its certificate '%s' is for another host%s%s (--tls-name NAME says "
                         "which name to expect)",
                         subject, wanted ? " than " : "", wanted ?: "");
    if (*s->tls->psk_name)
        return error_set(err, -EACCES,
                         "it shows a certificate, not the shared key '%s': give both sides the "
                         "same --psk, or both --tls",
                         s->tls->psk_name);
    return error_set(err, -EACCES, "its certificate '%s' is not accepted: %s", subject,
                     X509_verify_cert_error_string(result));
}

static int alert_error(struct tls_stream *s, int alert, struct error *err)
{
    const char *text = SSL_alert_desc_string_long(alert);
    const char *hint = alert == TLS1_AD_UNKNOWN_CA ? ": another CA than its own has signed ours"
                       : alert == SSL_AD_CERTIFICATE_EXPIRED  ? ": ours has run out"
                       : alert == SSL_AD_CERTIFICATE_REQUIRED ? ": it wants one (--tls DIR)"
                       : *s->tls->psk_name ? ": give both sides the same --psk, or both --tls"
                                           : ": is it given --tls with the same CA?";
    return error_set(err, -EACCES, "it refuses, %s%s", text, hint);
}

static int ssl_error(struct tls_stream *s, struct error *err)
{
    unsigned long e = ERR_peek_error();
    int reason = ERR_GET_REASON(e);
    const char *text = ERR_reason_error_string(e);
    if (s->why[0])
        return error_set(err, -EACCES, "%s", s->why);
    if (ERR_GET_LIB(e) != ERR_LIB_SSL)
        return error_set(err, -EPROTO, "TLS: %s", text ?: "failed");
    if (reason > SSL_AD_REASON_OFFSET && reason < SSL_AD_REASON_OFFSET + 256)
        return alert_error(s, reason - SSL_AD_REASON_OFFSET, err);
    switch (reason) {
    case SSL_R_CERTIFICATE_VERIFY_FAILED:
        return certificate_error(s, err);
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
        return error_set(err, -EACCES, "it shows no certificate: it needs --tls DIR as well");
    case SSL_R_BINDER_DOES_NOT_VERIFY:
        return error_set(err, -EACCES, "its key named '%s' is not the same as ours",
                         s->tls->psk_name);
    case SSL_R_NO_SUITABLE_SIGNATURE_ALGORITHM:
    case SSL_R_NO_SHARED_CIPHER:
        return error_set(err, -EACCES, "it does not know %s%s%s", *s->tls->psk_name ? "key '" : "",
                         *s->tls->psk_name ? s->tls->psk_name : "a kind of key that we have",
                         *s->tls->psk_name ? "': give both sides the same --psk" : "");
    case SSL_R_WRONG_VERSION_NUMBER:
    case SSL_R_UNSUPPORTED_PROTOCOL:
    case SSL_R_HTTP_REQUEST:
    case SSL_R_PACKET_LENGTH_TOO_LONG:
        return error_set(err, -EPROTO,
                         "it does not speak TLS 1.3: give both sides --tls DIR or --psk FILE");
    default:
        return error_set(err, -EPROTO, "TLS: %s", text ?: "failed");
    }
}

// After a call of the library that did not succeed. 0: the other side has closed.
static int ssl_failed(struct tls_stream *s, int ret, short *events, struct error *err)
{
    int what = SSL_get_error(s->ssl, ret);
    int result = 0;
    bool eof = what == SSL_ERROR_ZERO_RETURN ||
               (what == SSL_ERROR_SSL &&
                ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING);
    *events = what == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN;
    if (s->failure) {
        errno = -s->failure;
        result = error_errno(err, "the link broke");
    } else if (what == SSL_ERROR_WANT_READ || what == SSL_ERROR_WANT_WRITE) {
        result = -EAGAIN;
    } else if (!eof && what != SSL_ERROR_SYSCALL) {
        result = ssl_error(s, err);
    }
    ERR_clear_error();
    return result;
}

// --- what a channel does

int tls_flush(struct tls_stream *s, short *events, struct error *err)
{
    pthread_mutex_lock(&s->lock);
    *events = POLLOUT;
    int ret = flush_out(s);
    if (ret && ret != -EAGAIN) {
        errno = -ret;
        error_errno(err, "the link broke");
    }
    pthread_mutex_unlock(&s->lock);
    return ret;
}

int tls_handshake(struct tls_stream *s, short *events, struct error *err)
{
    pthread_mutex_lock(&s->lock);
    ERR_clear_error();
    int done = SSL_do_handshake(s->ssl);
    int ret = done == 1 ? 0 : ssl_failed(s, done, events, err);
    if (done != 1 && !ret)
        ret = error_set(err, -ECONNRESET, "it has closed the connection during the TLS handshake");
    if (!ret && *s->tls->psk_name && !SSL_session_reused(s->ssl))
        ret = error_set(err, -EACCES, "it does not show the shared key '%s'", s->tls->psk_name);
    // The library does not answer what is no TLS. Whoever speaks in clear understands this.
    static const uint8_t alert[] = {21, 3, 3, 0, 2, 2, TLS1_AD_PROTOCOL_VERSION};
    if (ret == -EPROTO && !s->out_end && s->server) {
        memcpy(s->out, alert, sizeof(alert));
        s->out_end = sizeof(alert);
    }
    // Also when it failed: the other side gets to know why.
    int flushed = flush_out(s);
    if (flushed == -EAGAIN && (!ret || ret == -EAGAIN)) {
        *events = POLLOUT;
        ret = -EAGAIN;
    }
    pthread_mutex_unlock(&s->lock);
    return ret;
}

int tls_read(struct tls_stream *s, void *data, size_t len, size_t *n, short *events,
             struct error *err)
{
    pthread_mutex_lock(&s->lock);
    ERR_clear_error();
    *n = 0;
    int done = SSL_read_ex(s->ssl, data, len, n);
    int ret = done == 1 ? 0 : ssl_failed(s, done, events, err);
    // A change of keys may have to be answered.
    if (ret == -EAGAIN && flush_out(s) == -EAGAIN)
        *events |= POLLOUT;
    pthread_mutex_unlock(&s->lock);
    return ret;
}

int tls_write(struct tls_stream *s, const void *data, size_t len, size_t *n, short *events,
              struct error *err)
{
    pthread_mutex_lock(&s->lock);
    ERR_clear_error();
    *n = 0;
    int done = SSL_write_ex(s->ssl, data, len, n);
    int ret = done == 1 ? 0 : ssl_failed(s, done, events, err);
    if (done != 1 && !ret)
        ret = error_set(err, -EPIPE, "closed by the other side");
    pthread_mutex_unlock(&s->lock);
    return ret;
}

// SPDX-License-Identifier: Apache-2.0
// Channels over TLS: who is let in and who is not, in which words; what is damaged, cut off or no
// TLS at all; and which addresses may be talked to in clear.
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "migrate/channel.h"
#include "vmm/util.h"

static struct error err;
#define OK(call) ck_assert_msg(!(call), "%s: %s", #call, err.text)

enum {
    TIMEOUT_MS = 20000,
    MEDDLED_MS = 400, // where a wrong length makes a side wait for what never comes
};

// --- certificates, made here

struct identity {
    EVP_PKEY *key;
    X509 *cert;
};

static void extend(X509 *cert, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX ctx;
    X509V3_set_ctx(&ctx, issuer, cert, NULL, NULL, 0);
    X509_EXTENSION *e = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
    ck_assert_ptr_nonnull(e);
    ck_assert_int_eq(X509_add_ext(cert, e, -1), 1);
    X509_EXTENSION_free(e);
}

// Signed by `ca`, or by itself when that is NULL. Valid for `seconds` (or no longer) since an hour.
static struct identity identity_make(const struct identity *ca, const char *name, const char *san,
                                     long seconds)
{
    struct identity id = {EVP_EC_gen("P-256"), X509_new()};
    const struct identity *by = ca ?: &id;
    X509_set_version(id.cert, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(id.cert), ca ? 2 : 1);
    X509_gmtime_adj(X509_getm_notBefore(id.cert), -3600);
    X509_gmtime_adj(X509_getm_notAfter(id.cert), seconds);
    X509_set_pubkey(id.cert, id.key);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(id.cert), "CN", MBSTRING_ASC,
                               (const unsigned char *)name, -1, -1, 0);
    X509_set_issuer_name(id.cert, X509_get_subject_name(by->cert));
    if (!ca)
        extend(id.cert, id.cert, NID_basic_constraints, "critical,CA:TRUE");
    if (san)
        extend(id.cert, by->cert, NID_subject_alt_name, san);
    ck_assert_int_gt(X509_sign(id.cert, by->key, EVP_sha256()), 0);
    return id;
}

static void identity_free(struct identity *id)
{
    EVP_PKEY_free(id->key);
    X509_free(id->cert);
}

static char *pem(X509 *cert, EVP_PKEY *key)
{
    BIO *bio = BIO_new(BIO_s_mem());
    char *data;
    if (cert)
        PEM_write_bio_X509(bio, cert);
    else
        PEM_write_bio_PrivateKey(bio, key, NULL, NULL, 0, NULL, NULL);
    long len = BIO_get_mem_data(bio, &data);
    char *text = strndup(data, (size_t)len);
    BIO_free(bio);
    return text;
}

static struct tls *certified(const struct identity *ca, const struct identity *id, const char *peer)
{
    struct tls_texts texts = {.text = {[TLS_CA] = pem(ca->cert, NULL),
                                       [TLS_CERT] = pem(id->cert, NULL),
                                       [TLS_KEY] = pem(NULL, id->key)}};
    struct tls *tls = NULL;
    OK(tls_create(&tls, &texts, peer, &err));
    tls_texts_free(&texts);
    return tls;
}

static struct tls *shared(const char *line)
{
    const struct tls_texts texts = {.text = {[TLS_PSK] = (char *)line}};
    struct tls *tls = NULL;
    OK(tls_create(&tls, &texts, NULL, &err));
    return tls;
}

#define KEY_1 "000102030405060708090a0b0c0d0e0f"
#define KEY_2 "ff0102030405060708090A0B0C0D0E0F"

// --- two ends

struct server {
    struct channel_security security;
    pthread_t thread;
    int listen_fd, ret;
    char address[128];
    uint64_t bytes; // to take, and to send back
    unsigned limit_ms;
    struct error err;
};

static void pattern(uint8_t *data, size_t len, uint64_t at)
{
    for (size_t i = 0; i < len; i++)
        data[i] = (uint8_t)((at + i) * 2654435761u >> 13);
}

// In pieces as records have them, small and large.
static int send_all(struct channel *c, uint64_t bytes, struct error *e)
{
    static const size_t sizes[] = {20, 300, 4096, 40000, 1, 65536, 200000, 17};
    autofree uint8_t *data = malloc(300000);
    int ret = 0;
    for (uint64_t at = 0, i = 0; at < bytes && !ret; i++) {
        size_t n = sizes[i % ARRAY_SIZE(sizes)];
        n = n < bytes - at ? n : bytes - at;
        pattern(data, n, at);
        struct iovec iov[3] = {{data, n / 3}, {data + n / 3, 0}, {data + n / 3, n - n / 3}};
        ret = c->wire.writev(&c->wire, iov, 3, e);
        at += n;
    }
    return ret;
}

static int take_all(struct channel *c, uint64_t bytes, struct error *e)
{
    autofree uint8_t *data = malloc(100000), *expected = malloc(100000);
    int ret = 0;
    for (uint64_t at = 0; at < bytes && !ret;) {
        size_t n = bytes - at < 100000 ? bytes - at : 100000;
        ret = wire_read(&c->wire, data, n, e);
        pattern(expected, n, at);
        if (!ret && memcmp(data, expected, n))
            ret = error_set(e, -EBADMSG, "other bytes came");
        at += n;
    }
    return ret;
}

static void *server_main(void *arg)
{
    struct server *s = arg;
    struct channel c;
    s->ret = channel_accept(&c, s->listen_fd, -1, TIMEOUT_MS, s->limit_ms, &s->err);
    if (!s->ret)
        s->ret = channel_accept_secure(&c, &s->security, &s->err);
    if (!s->ret)
        s->ret = take_all(&c, s->bytes, &s->err);
    if (!s->ret)
        s->ret = send_all(&c, s->bytes, &s->err);
    channel_close(&c);
    return NULL;
}

static void server_start(struct server *s, const struct tls *tls, uint64_t bytes, unsigned limit_ms)
{
    *s = (struct server) {.security = {tls, false}, .bytes = bytes, .limit_ms = limit_ms};
    OK(channel_listen("tcp:127.0.0.1:0", &s->listen_fd, s->address, sizeof(s->address), &err));
    ck_assert_int_eq(pthread_create(&s->thread, NULL, server_main, s), 0);
}

static int server_join(struct server *s)
{
    pthread_join(s->thread, NULL);
    close(s->listen_fd);
    return s->ret;
}

// Both ways through a connection. What the client's side says is in `err`.
static int exchange(struct tls *server, struct tls *client, uint64_t bytes, struct server *s)
{
    const struct channel_security security = {client, false};
    struct channel c;
    server_start(s, server, bytes, TIMEOUT_MS);
    int ret = channel_connect_secure(&c, s->address, &security, -1, TIMEOUT_MS, &err);
    if (!ret)
        ret = send_all(&c, bytes, &err);
    if (!ret)
        ret = take_all(&c, bytes, &err);
    channel_close(&c);
    server_join(s);
    tls_free(server);
    tls_free(client);
    return ret;
}

static void let_in(struct tls *server, struct tls *client)
{
    struct server s;
    int ret = exchange(server, client, 3000000, &s);
    ck_assert_msg(!ret && !s.ret, "client: %s; server: %s", err.text, s.err.text);
}

// Each side says it so that its user knows what to do; NULL: whatever it says.
static void refused(struct tls *server, struct tls *client, const char *server_says,
                    const char *client_says)
{
    struct server s;
    int ret = exchange(server, client, 100, &s);
    ck_assert(ret && s.ret);
    ck_assert_msg(!server_says || strstr(s.err.text, server_says), "server: %s", s.err.text);
    ck_assert_msg(!client_says || strstr(err.text, client_says), "client: %s", err.text);
}

// --- tests

START_TEST(test_shared_key)
{
    let_in(shared("lab:" KEY_1), shared("lab:" KEY_1 "\n"));
    refused(shared("lab:" KEY_1), shared("lab:" KEY_2), "key named 'lab' is not the same",
            "it refuses");
    refused(shared("lab:" KEY_1), shared("home:" KEY_1), "named 'home', here it is 'lab'",
            "same --psk");
    refused(shared("lab:" KEY_1), NULL, "does not speak TLS", NULL);
    refused(NULL, shared("lab:" KEY_1), NULL, NULL);
}
END_TEST

START_TEST(test_certificates)
{
    struct identity ca = identity_make(NULL, "our-ca", NULL, 3600),
                    other_ca = identity_make(NULL, "other-ca", NULL, 3600),
                    here = identity_make(&ca, "here", "IP:127.0.0.1", 3600),
                    there = identity_make(&ca, "there", "DNS:there.example", 3600),
                    late = identity_make(&ca, "late", "IP:127.0.0.1", -60),
                    stranger = identity_make(&other_ca, "stranger", "IP:127.0.0.1", 3600);
    let_in(certified(&ca, &here, NULL), certified(&ca, &there, NULL));
    // The name is asked of whom one connects to.
    refused(certified(&ca, &there, NULL), certified(&ca, &here, NULL), NULL, "for another host");
    let_in(certified(&ca, &there, NULL), certified(&ca, &here, "there.example"));
    // Client and server that are not, or not any more, of this CA.
    refused(certified(&ca, &here, NULL), certified(&ca, &late, NULL), "expired", NULL);
    refused(certified(&ca, &late, NULL), certified(&ca, &here, NULL), "it refuses", "expired");
    refused(certified(&ca, &here, NULL), certified(&ca, &stranger, NULL),
            "'stranger' is not accepted", NULL);
    refused(certified(&ca, &stranger, NULL), certified(&ca, &here, NULL), "it refuses",
            "'stranger' is not accepted");
    // One with certificates, the other with a key.
    refused(certified(&ca, &here, NULL), shared("lab:" KEY_1), NULL, "same --psk, or both --tls");
    refused(shared("lab:" KEY_1), certified(&ca, &here, NULL), "does not know key 'lab'", NULL);
    struct identity *all[] = {&ca, &other_ca, &here, &there, &late, &stranger};
    for (unsigned i = 0; i < ARRAY_SIZE(all); i++)
        identity_free(all[i]);
}
END_TEST

// A side that proves nothing: it knows the CA, but has no certificate.
START_TEST(test_no_certificate)
{
    struct identity ca = identity_make(NULL, "our-ca", NULL, 3600),
                    here = identity_make(&ca, "here", "IP:127.0.0.1", 3600);
    struct tls *tls = certified(&ca, &here, NULL);
    struct server s;
    struct channel c;
    server_start(&s, tls, 100, TIMEOUT_MS);
    OK(channel_connect(&c, s.address, -1, TIMEOUT_MS, &err));
    SSL_CTX *ctx = SSL_CTX_new(TLS_method());
    SSL *ssl = SSL_new(ctx);
    int flags = fcntl(c.fd, F_GETFL);
    fcntl(c.fd, F_SETFL, flags & ~O_NONBLOCK);
    SSL_set_fd(ssl, c.fd);
    ck_assert_int_eq(SSL_connect(ssl), 1); // the server has its say afterwards
    char byte;
    ck_assert_int_le(SSL_read(ssl, &byte, 1), 0);
    ck_assert_int_ne(server_join(&s), 0);
    ck_assert_msg(strstr(s.err.text, "shows no certificate") != NULL, "%s", s.err.text);
    SSL_free(ssl);
    SSL_CTX_free(ctx);
    channel_close(&c);
    tls_free(tls);
    identity_free(&ca);
    identity_free(&here);
}
END_TEST

START_TEST(test_clear_and_tls)
{
    struct server s;
    struct tls *tls = shared("lab:" KEY_1);
    const struct channel_security secure = {tls, false};
    struct channel c;
    struct wire_record record = {0};
    // A source in clear hears that it needs a key, in place of nonsense about records.
    server_start(&s, tls, 100, TIMEOUT_MS);
    OK(channel_connect(&c, s.address, -1, TIMEOUT_MS, &err));
    struct wire_hello hello;
    wire_hello_fill(&hello, WIRE_MAIN, (const uint8_t[WIRE_ID_LEN]) {0});
    OK(wire_put(&c.wire, WIRE_HELLO, 0, &hello, sizeof(hello), NULL, 0, &err));
    ck_assert_int_ne(wire_get(&c.wire, &record, &err), 0);
    ck_assert_msg(strstr(err.text, "it speaks TLS") != NULL, "%s", err.text);
    channel_close(&c);
    server_join(&s);
    // So does a destination in clear.
    server_start(&s, NULL, 100, TIMEOUT_MS);
    channel_connect_secure(&c, s.address, &secure, -1, TIMEOUT_MS, &err);
    channel_close(&c);
    server_join(&s);
    ck_assert_msg(strstr(s.err.text, "it speaks TLS") != NULL, "%s", s.err.text);
    wire_record_free(&record);
    tls_free(tls);
}
END_TEST

// Stands between the two and cuts, or flips a bit of, what the client sends.
struct middle {
    pthread_t thread;
    int listen_fd;
    char address[128], to[128];
    size_t at; // of the client's bytes
    bool flip;
};

static void *middle_main(void *arg)
{
    struct middle *m = arg;
    struct channel in, out;
    uint8_t data[4096];
    size_t passed = 0;
    if (channel_accept(&in, m->listen_fd, -1, TIMEOUT_MS, TIMEOUT_MS, NULL) ||
        channel_connect(&out, m->to, -1, TIMEOUT_MS, NULL))
        return NULL;
    for (;;) {
        struct pollfd p[2] = {{in.fd, POLLIN, 0}, {out.fd, POLLIN, 0}};
        if (poll(p, 2, TIMEOUT_MS) <= 0)
            break;
        bool from_client = p[0].revents;
        ssize_t n = recv(from_client ? in.fd : out.fd, data, sizeof(data), MSG_DONTWAIT);
        if (n <= 0)
            break;
        bool here = from_client && m->at >= passed && m->at < passed + (size_t)n;
        if (here && m->flip)
            data[m->at - passed] ^= 0x10;
        size_t len = here && !m->flip ? m->at - passed : (size_t)n;
        passed += from_client ? (size_t)n : 0;
        if (send(from_client ? out.fd : in.fd, data, len, MSG_NOSIGNAL) < 0 || len < (size_t)n)
            break;
    }
    channel_close(&in);
    channel_close(&out);
    return NULL;
}

// True: it made no difference, and every byte that arrived was right.
static bool meddle(size_t at, bool flip)
{
    struct tls *tls = shared("lab:" KEY_1);
    const struct channel_security security = {tls, false};
    struct middle m = {.at = at, .flip = flip};
    struct server s;
    struct channel c;
    server_start(&s, tls, 1500, MEDDLED_MS);
    snprintf(m.to, sizeof(m.to), "%s", s.address);
    OK(channel_listen("tcp:127.0.0.1:0", &m.listen_fd, m.address, sizeof(m.address), &err));
    ck_assert_int_eq(pthread_create(&m.thread, NULL, middle_main, &m), 0);
    int ret = channel_connect_secure(&c, m.address, &security, -1, MEDDLED_MS, &err);
    if (!ret)
        ret = send_all(&c, 1500, &err);
    if (!ret)
        ret = take_all(&c, 1500, &err);
    channel_close(&c);
    pthread_join(m.thread, NULL);
    close(m.listen_fd);
    server_join(&s);
    ck_assert_msg((s.ret && ret) || (flip && !s.ret && !ret),
                  "%s at byte %zu: both sides must fail, server %d, client %d",
                  flip ? "flip" : "cut", at, s.ret, ret);
    ck_assert(!s.ret || *s.err.text);
    tls_free(tls);
    return !s.ret;
}

// A client's bytes: some 300 of the handshake, then the 1500 of ours.
START_TEST(test_meddling)
{
    unsigned survived = 0;
    size_t step = getenv("FERRY_LONG") ? 1 : 61;
    for (size_t at = 0; at < 1600; at += step) {
        meddle(at, false);
        survived += meddle(at, true);
    }
    // The version in the head of a record counts for nothing (RFC 8446, 5.1): all else does.
    ck_assert_uint_le(survived, 16);
}
END_TEST

START_TEST(test_garbage)
{
    struct tls *tls = shared("lab:" KEY_1);
    unsigned seed = 1;
    for (unsigned i = 0; i < 50; i++) {
        uint8_t data[600];
        struct server s;
        struct channel c;
        for (unsigned k = 0; k < sizeof(data); k++)
            data[k] = (uint8_t)(rand_r(&seed) >> 8);
        // Some of it begins like a record: of handshake, of a length.
        if (i % 2)
            memcpy(data, (const uint8_t[]) {22, 3, 1, 2, (uint8_t)i, 1, 0, 1, 0xfc, 3, 3}, 11);
        server_start(&s, tls, 100, TIMEOUT_MS);
        OK(channel_connect(&c, s.address, -1, TIMEOUT_MS, &err));
        ck_assert_int_gt(send(c.fd, data, sizeof(data), MSG_NOSIGNAL), 0);
        shutdown(c.fd, SHUT_WR);
        ck_assert_int_ne(server_join(&s), 0);
        ck_assert(*s.err.text);
        channel_close(&c);
    }
    tls_free(tls);
}
END_TEST

// A peer that says nothing is dropped in time, and one that is cancelled at once.
START_TEST(test_silence)
{
    struct tls *tls = shared("lab:" KEY_1);
    const struct channel_security security = {tls, false};
    int listen_fd, cancel_fd = eventfd(1, EFD_CLOEXEC);
    char address[128];
    struct channel c;
    OK(channel_listen("tcp:127.0.0.1:0", &listen_fd, address, sizeof(address), &err));
    ck_assert_int_eq(channel_connect_secure(&c, address, &security, -1, 100, &err), -ETIMEDOUT);
    ck_assert_int_eq(c.fd, -1);
    OK(channel_connect(&c, address, -1, TIMEOUT_MS, &err));
    c.cancel_fd = cancel_fd;
    ck_assert_int_eq(channel_accept_secure(&c, &security, &err), -ECANCELED);
    ck_assert_int_eq(c.fd, -1);
    close(listen_fd);
    close(cancel_fd);
    tls_free(tls);
}
END_TEST

// --- what is given

static void text_refused(struct tls_texts *texts, const char *says)
{
    struct tls *tls = NULL;
    ck_assert_int_eq(tls_create(&tls, texts, NULL, &err), -EINVAL);
    ck_assert_msg(strstr(err.text, says) != NULL, "%s", err.text);
    ck_assert_ptr_null(tls);
}

START_TEST(test_texts)
{
    static const char *const bad[] = {"",
                                      "lab",
                                      "lab:",
                                      ":" KEY_1,
                                      "lab:" KEY_1 "0",
                                      "lab:0102",
                                      "l b:" KEY_1,
                                      "lab:" KEY_1 "\nlab2:" KEY_2};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct tls_texts texts = {.text = {[TLS_PSK] = (char *)bad[i]},
                                  .name = {[TLS_PSK] = (char *)"/etc/key"}};
        text_refused(&texts, "/etc/key: expected one line NAME:KEY");
    }
    struct identity ca = identity_make(NULL, "our-ca", NULL, 3600),
                    here = identity_make(&ca, "here", NULL, 3600);
    struct tls_texts good = {.text = {[TLS_CA] = pem(ca.cert, NULL),
                                      [TLS_CERT] = pem(here.cert, NULL),
                                      [TLS_KEY] = pem(NULL, here.key)}};
    char *foreign = pem(NULL, ca.key);
    struct tls_texts t = good;
    t.text[TLS_KEY] = foreign;
    text_refused(&t, "not the certificate's");
    t.text[TLS_KEY] = NULL;
    text_refused(&t, "--tls DIR");
    t = good;
    t.text[TLS_PSK] = (char *)"lab:" KEY_1;
    text_refused(&t, "--psk FILE");
    t = good;
    t.text[TLS_CERT] = foreign;
    text_refused(&t, "tls_cert: expected a certificate");
    t = good;
    t.text[TLS_CA] = (char *)"nothing";
    text_refused(&t, "tls_ca: expected");
    t = (struct tls_texts) {0};
    text_refused(&t, "expected");
    free(foreign);
    tls_texts_free(&good);
    identity_free(&ca);
    identity_free(&here);
}
END_TEST

START_TEST(test_files)
{
    char dir[] = "/tmp/ferry-tls-XXXXXX", path[64];
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/ca.pem", dir);
    FILE *f = fopen(path, "w");
    fputs("a CA", f);
    fclose(f);
    struct tls_texts texts;
    struct tls_files files = {.dir = dir};
    ck_assert_int_eq(tls_texts_read(&texts, &files, &err), -ENOENT);
    ck_assert_msg(strstr(err.text, "/cert.pem") != NULL, "%s", err.text);
    ck_assert(!tls_texts_given(&texts));
    files = (struct tls_files) {.file = {[TLS_CA] = path}};
    OK(tls_texts_read(&texts, &files, &err));
    ck_assert_str_eq(texts.text[TLS_CA], "a CA");
    ck_assert_str_eq(texts.name[TLS_CA], path);
    tls_texts_free(&texts);
    ck_assert_int_eq(truncate(path, TLS_TEXT_MAX + 1), 0);
    ck_assert_int_eq(tls_texts_read(&texts, &files, &err), -EFBIG);
    files = (struct tls_files) {0};
    OK(tls_texts_read(&texts, &files, &err));
    ck_assert(!tls_texts_given(&texts));
    unlink(path);
    rmdir(dir);
}
END_TEST

// --- which addresses

START_TEST(test_clear_addresses)
{
    const struct channel_security none = {NULL, false}, insecure = {NULL, true};
    struct channel c;
    // Refused before anything is sent there: 192.0.2.0/24 is nobody's.
    ck_assert_int_eq(channel_connect_secure(&c, "tcp:192.0.2.1:7000", &none, -1, 1000, &err),
                     -EPERM);
    ck_assert_msg(strstr(err.text, "--tls DIR or --psk FILE") != NULL, "%s", err.text);
    ck_assert_int_eq(c.fd, -1);
    static const struct {
        const char *address;
        bool here;
    } listens[] = {{"tcp:127.0.0.1:0", true}, {"tcp:127.1.2.3:0", true}, {"tcp:0.0.0.0:0", false}};
    for (unsigned i = 0; i < ARRAY_SIZE(listens); i++) {
        int fd;
        OK(channel_listen(listens[i].address, &fd, NULL, 0, &err));
        ck_assert_int_eq(channel_listen_check(fd, listens[i].address, &none, &err),
                         listens[i].here ? 0 : -EPERM);
        OK(channel_listen_check(fd, listens[i].address, &insecure, &err));
        close(fd);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tls");
    TCase *tc = tcase_create("tls");
    tcase_set_timeout(tc, getenv("FERRY_LONG") ? 1800 : 60);
    tcase_add_test(tc, test_shared_key);
    tcase_add_test(tc, test_certificates);
    tcase_add_test(tc, test_no_certificate);
    tcase_add_test(tc, test_clear_and_tls);
    tcase_add_test(tc, test_meddling);
    tcase_add_test(tc, test_garbage);
    tcase_add_test(tc, test_silence);
    tcase_add_test(tc, test_texts);
    tcase_add_test(tc, test_files);
    tcase_add_test(tc, test_clear_addresses);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

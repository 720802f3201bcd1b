/* Unit tests of frame.c, without any framework: an assertion that fails ends the program. */
#include "../frame.h"

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct frame f;

static bool decodes(int descriptors, struct request *q) {
    uint8_t *exact = malloc(f.length ? f.length : 1); /* so that a sanitizer sees any byte read too much */
    memcpy(exact, f.bytes, f.length);
    bool good = request_decode(exact, f.length, descriptors, q);
    free(exact);
    return good;
}

static void spawn_frame(uint32_t flags) {
    frame_start(&f, SPAWN, 7);
    put_text(&f, "a-key");
    put_u32(&f, flags);
    put_u64(&f, 1ull << 40);
}

static void test_fields(void) {
    struct request q;
    spawn_frame(FLAG_STDIN);
    assert(decodes(4, &q));
    assert(q.verb == SPAWN && q.tag == 7 && q.flags == FLAG_STDIN && q.cap == 1ull << 40);
    assert(q.key.length == 5);
    frame_start(&f, STDIN, 1);
    put_text(&f, "k");
    put_u64(&f, UINT64_MAX);
    put_u32(&f, 1);
    assert(decodes(0, &q) && q.length == UINT64_MAX && q.eof == 1);
    frame_start(&f, LIST, UINT32_MAX);
    assert(decodes(0, &q));
}

static void test_descriptors(void) {
    struct request q;
    spawn_frame(FLAG_STDIN);
    for (int n = 0; n < 6; n++) assert(decodes(n, &q) == (n == 4));
    spawn_frame(0);
    for (int n = 0; n < 6; n++) assert(decodes(n, &q) == (n == 3));
    frame_start(&f, LIST, 1);
    assert(!decodes(1, &q));
}

static void test_every_cut_is_refused(void) {
    struct request q;
    spawn_frame(0);
    size_t whole = f.length;
    for (f.length = 0; f.length < whole; f.length++) assert(!decodes(3, &q));
    put_u32(&f, 0);
    assert(f.length == whole + 4 && !decodes(3, &q));
}

static void test_nonsense(void) {
    struct request q;
    frame_start(&f, LIST, 0);
    assert(!decodes(0, &q));
    for (uint32_t verb = 0; verb < 300; verb++) {
        if (verb == LIST || verb == ROOM) continue;
        frame_start(&f, verb, 1);
        assert(!decodes(0, &q));
    }
    frame_start(&f, ACK, 1);
    put_u32(&f, UINT32_MAX); /* a length beyond everything */
    assert(!decodes(0, &q));
}

static void test_keys(void) {
    char longest[KEY_MAX + 2];
    memset(longest, 'k', sizeof longest);
    assert(key_valid((struct text){"aZ09_-", 6}));
    assert(key_valid((struct text){longest, KEY_MAX}));
    assert(!key_valid((struct text){longest, KEY_MAX + 1}));
    assert(!key_valid((struct text){"", 0}));
    for (int c = 0; c < 256; c++) {
        char one = (char)c;
        bool good = c && strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", c);
        assert(key_valid((struct text){&one, 1}) == good);
    }
}

static void test_text_copy(void) {
    char to[4];
    assert(text_copy((struct text){"abc", 3}, to, sizeof to) && !strcmp(to, "abc"));
    assert(!text_copy((struct text){"abcd", 4}, to, sizeof to));
    assert(!text_copy((struct text){"a\0c", 3}, to, sizeof to));
    assert(text_copy((struct text){"", 0}, to, sizeof to) && !*to);
}

static void test_errno_names(void) {
    assert(!strcmp(errno_name(ENOENT), "ENOENT") && !strcmp(errno_name(EDQUOT), "EDQUOT"));
    assert(!strcmp(errno_name(EHWPOISON), "EHWPOISON") && !strcmp(errno_name(ETIMEDOUT), "ETIMEDOUT"));
    assert(!strcmp(errno_name(0), "EUNKNOWN") && !strcmp(errno_name(-1), "EUNKNOWN"));
    assert(!strcmp(errno_name(41), "EUNKNOWN") && !strcmp(errno_name(100000), "EUNKNOWN"));
#ifdef __GLIBC__
    for (int i = 1; i < 134; i++) {
        const char *name = strerrorname_np(i);
        if (i != 41 && i != 58) assert(name && !strcmp(errno_name(i), name));
    }
#endif
}

static void record_frame(const char *argument) {
    f.length = 0;
    put_u32(&f, 2);
    put_text(&f, "program");
    put_text(&f, argument);
    put_u32(&f, 1);
    put_text(&f, "A=b");
    put_text(&f, "/tmp");
    put_text(&f, "user");
    put_text(&f, "script");
}

static int record(struct record *r) {
    uint8_t *exact = malloc(f.length ? f.length : 1);
    memcpy(exact, f.bytes, f.length);
    int error = record_decode(exact, f.length, r);
    if (!error) assert(r->script_length < 1 || r->script >= exact);
    r->script = NULL;
    free(exact);
    return error;
}

static void test_record(void) {
    struct record r;
    record_frame("");
    assert(record(&r) == 0);
    assert(r.argc == 2 && !strcmp(r.argv[0], "program") && !*r.argv[1] && !r.argv[2]);
    assert(r.envc == 1 && !strcmp(r.envp[0], "A=b") && !r.envp[1]);
    assert(!strcmp(r.directory, "/tmp") && !strcmp(r.user, "user") && r.script_length == 6);
    for (int i = 1; i <= ENV_EXTRA + 1; i++) r.envp[r.envc + (uint32_t)i - 1] = NULL; /* the room is there */
    free(r.arena);
    size_t whole = f.length;
    for (f.length = 0; f.length < whole; f.length++) assert(record(&r) == EINVAL);
    put_u32(&f, 0);
    assert(record(&r) == EINVAL);
}

static void test_record_nonsense(void) {
    struct record r;
    f.length = 0;
    put_u32(&f, 0);
    for (int i = 0; i < 4; i++) put_u32(&f, 0);
    assert(record(&r) == EINVAL); /* no program */
    f.length = 0;
    put_u32(&f, UINT32_MAX);
    assert(record(&r) == EINVAL);
    record_frame("xyz");
    memchr(f.bytes, 'y', f.length) ? *(uint8_t *)memchr(f.bytes, 'y', f.length) = 0 : 0;
    assert(record(&r) == EINVAL); /* a NUL inside a string */
}

static void test_control(void) {
    char key[KEY_MAX + 1];
    int status = -1;
    assert(control_decode("S a-key", key, &status) == 'S' && !strcmp(key, "a-key"));
    assert(control_decode("E k 0", key, &status) == 'E' && status == 0);
    assert(control_decode("E k 255", key, &status) == 'E' && status == 255);
    const char *bad[] = {"", "S", "S ", "E k", "E k ", "E k 256", "E k 1000", "E k -1", "E k 1 ", "E k 1x", "S k 0",
                         "X k", "S k!", "E  1", "Ek 1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) assert(!control_decode(bad[i], key, &status));
}

int main(void) {
    test_fields();
    test_descriptors();
    test_every_cut_is_refused();
    test_nonsense();
    test_keys();
    test_text_copy();
    test_errno_names();
    test_record();
    test_record_nonsense();
    test_control();
    puts("frame: all tests passed");
    return 0;
}

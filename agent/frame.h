/* The wire format of devboxd-init: decoding of requests and spawn records, encoding of answers. Pure: no system calls
 * but for memory. docs/reference/agent-protocol.md is the authority. */
#ifndef FRAME_H
#define FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { GENERATION = 1, FRAME_MAX = 16384, FRAME_FDS = 4, KEY_MAX = 64, PATH_LIMIT = 4096 };

enum verb {
    HELLO = 1, SPAWN, SIGNAL, STDIN, READ, WRITE, RENAME, UNLINK, DIAL, PTY, RESIZE, SHELL, RUN, LIST, ACK, END, ROOM,
    OK = 128, ERROR, FD, ENTRY, EXIT, STALL
};

enum stage {
    STAGE_NONE, STAGE_LOOKUP, STAGE_DECODE, STAGE_BUSY, STAGE_FORK, STAGE_USER, STAGE_GROUPS, STAGE_DIRECTORY,
    STAGE_EXEC, STAGE_STDIN, STAGE_OPEN, STAGE_TYPE, STAGE_PARENTS, STAGE_RENAME, STAGE_CONNECT, STAGE_TERMINAL,
    STAGE_DUPLICATE
};

enum { FLAG_STDIN = 1 };                                        /* SPAWN, RUN */
enum { EXIT_STDOUT_CUT = 1, EXIT_STDERR_CUT = 2, EXIT_SHELL_DIED = 4 };
enum { SCOPE_PROCESS, SCOPE_GROUP, SCOPE_ALL };

/* Bytes inside a received frame: not NUL-terminated, valid only as long as the frame's buffer. */
struct text {
    const char *bytes;
    uint32_t length;
};

/* One request; which members are set depends on the verb. */
struct request {
    uint32_t verb, tag;
    struct text key, shell, user, path, to;
    uint64_t cap, length;
    uint32_t flags, signal, scope, mode, deadline, port, rows, columns, oldest, newest, eof;
};

/* True when the frame is well formed and came with the right number of descriptors. */
bool request_decode(const uint8_t *bytes, size_t length, int descriptors, struct request *out);

/* True for 1 to 64 bytes of [A-Za-z0-9_-]. */
bool key_valid(struct text key);

/* Copies a text into a C string; false when it does not fit or holds a NUL. */
bool text_copy(struct text from, char *to, size_t size);

/* An encoded frame under construction. No frame of the agent comes near FRAME_MAX; put_* drop what would be over. */
struct frame {
    size_t length;
    uint8_t bytes[FRAME_MAX];
};

void frame_start(struct frame *f, uint32_t verb, uint32_t tag);
void put_u32(struct frame *f, uint32_t value);
void put_u64(struct frame *f, uint64_t value);
void put_text(struct frame *f, const char *text);

/* "ENOENT" for 2; "E<number>" is never needed by Linux but answered as "EUNKNOWN". */
const char *errno_name(int error);

/* What a command is started with. argv, envp and the strings live in `arena`; script points into the decoded bytes. */
struct record {
    char **argv, **envp;
    uint32_t argc, envc;
    char *directory, *user;
    const uint8_t *script;
    size_t script_length;
    void *arena;
};

/* 0, EINVAL for a malformed record, ENOMEM. On 0 the caller frees `arena`. envp has room for ENV_EXTRA more entries. */
enum { ENV_EXTRA = 4 };
int record_decode(const uint8_t *bytes, size_t length, struct record *out);

/* One line of a shell's control pipe: 'S' or 'E', 0 when it is neither. `key` holds KEY_MAX + 1 bytes. */
char control_decode(const char *line, char *key, int *status);

#endif

/* What the files of devboxd-init share. pid 1 itself never blocks and opens no path: whatever can block or touches the
 * box's files happens in a child. Everything is bounded: slots, helpers, and one answer for each request. */
#ifndef AGENT_H
#define AGENT_H

#include <stddef.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "frame.h"

enum {
    CHUNK = 65536,             /* bytes that one pump moves in one turn */
    EXECUTIONS_MAX = 1024,
    SESSIONS_MAX = 64,         /* shells and terminals */
    SLOTS_MAX = EXECUTIONS_MAX + SESSIONS_MAX,
    HELPERS_MAX = 64,
    TARGETS_MAX = 1024,        /* processes and job groups of a shell that are remembered while a command runs */
    RETRY_MS = 500,
    SCRIPT_FD = 9, SCRIPT_AGAIN_FD = 250, COMMANDS_FD = 20, CONTROL_FD = 21,
};

#define OWNER(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

/* A descriptor in the event loop; fd is -1 while there is none. `ready` may be called without cause. */
struct watch {
    int fd;
    bool listed;               /* in the epoll set */
    uint32_t events;
    void (*ready)(struct watch *, uint32_t events);
};

/* The final answer to a request that is not answered at once; it waits here until the socket has room. */
struct answer {
    uint32_t tag;              /* 0: nothing is owed */
    uint32_t verb;             /* 0: not known yet, else OK, ERROR or FD */
    uint32_t stage, error;
    uint64_t value;            /* of OK, or the kind of FD */
    int fd;
    const char *temporary, *target;
};

/* Whom kill(2) can reach: processes by their ids, groups by their negative ones. */
struct targets {
    uint32_t count;
    int32_t ids[TARGETS_MAX];
};

/* What a child says to pid 1, once or twice, over a socket that closes on exec. stage 0: it went well. */
struct report {
    uint32_t stage, error, kind, uid, gid;
    union {
        struct { char temporary[PATH_LIMIT], target[PATH_LIMIT]; } paths;
        struct targets targets;
    } u;
};

/* One pipe of a command, copied to its journal. */
struct stream {
    struct watch pipe;
    int journal;
    uint64_t length, cap, end; /* bytes in the journal, the most it may take, length when the command ended */
    uint64_t owed;             /* bytes that the pipe held when the command ended, not yet copied */
    bool cut, ending;          /* ending: `owed` or spilled bytes keep EXIT waiting */
    int stall;                 /* errno of the journal, 0 while it flows */
    uint32_t spill_length;
    uint8_t spill[CHUNK];      /* read from the pipe and refused by the journal; untouched memory costs nothing */
};

/* stdin: bytes [position, length) of the spool go into the pipe. */
struct feed {
    struct watch pipe;
    int spool;
    uint64_t position, length;
    bool attached, open, eof, closed, gone; /* open: the reader's end exists; closed: EOF was delivered */
};

enum type { EXECUTION, TERMINAL, SESSION, COMMAND }; /* the numbers of ENTRY */
enum state { STARTING, RUNNING, ENDING, ENDED };

struct slot {
    uint64_t serial;           /* a key can come again, this cannot */
    char key[KEY_MAX + 1];
    enum type type;
    enum state state;
    pid_t pid;                 /* 0 once it was reaped */
    pid_t group;
    struct watch report;
    struct answer answer;
    uint32_t how, value, flags;
    bool exit_due, stall_due, acknowledged;
    bool failed, dead;         /* failed: only its ERROR is left to send; dead: freed at the end of this turn */
    struct stream out[2];
    struct feed in;
    int master;                /* TERMINAL */
    struct watch control;      /* SESSION */
    int commands;
    char line[128];
    uint32_t line_length;
    uid_t uid;
    gid_t gid;
    struct slot *running;
    struct slot *shell;        /* COMMAND, NULL when the shell is gone */
    bool begun;                /* COMMAND: its shell has said that it begins */
    char shell_key[KEY_MAX + 1];
    bool folder, removing;     /* a folder of FIFOs may exist; a helper removes it */
    struct targets earlier;    /* COMMAND: what ran in its shell before it */
    uint64_t kill_at;          /* when those of END are killed, 0: nobody is to end */
    bool searching, insisted;  /* a helper looks for whom END concerns; ... to kill them */
    bool fixed;                /* the output that belongs to the command is known */
    struct targets ending;
};

/* A short-lived child that may block, or touches files. */
struct helper {
    bool used;
    pid_t pid;                 /* 0 once it was reaped */
    bool waits;                /* it waits for our byte, without which it removes its temporary file */
    bool guards;               /* ... and has delivered its descriptor */
    struct watch report;
    struct answer answer;
    uint64_t deadline;
    uint64_t serial;           /* of the slot that `done` concerns */
    void (*done)(struct helper *, const struct report *, int *fds);
    struct report *kept;       /* holds the paths of an answer that waits */
};

/* main.c */
extern uint8_t buffer[CHUNK];
extern struct rlimit first_limit;
uint64_t now_ms(void);
bool watch_set(struct watch *w, uint32_t events);
void watch_unset(struct watch *w);
void watch_close(struct watch *w);
void close_fd(int *fd);
void retry_later(void);

/* connection.c */
extern struct watch listener;
void connection_start(int fd);
void connection_turn(bool busy);
void answer_ok(uint32_t tag, uint64_t value);
void answer_error(uint32_t tag, uint32_t stage, int error);
bool answer_send(struct answer *a);
bool event_send(const struct frame *f);
bool connection_ready(void);
void flush_later(void);

/* slots.c */
extern struct slot *slots[SLOTS_MAX];
extern int slots_end;
struct slot *slot_find(struct text key);
struct slot *slot_numbered(uint64_t serial);
struct slot *slot_new(const struct request *q, enum type type);
void slot_drop(struct slot *s);
void slot_settle(struct slot *s);
bool slot_flush(struct slot *s);
void slot_answer(struct slot *s, uint32_t verb, uint64_t value);
void slot_fail(struct slot *s, uint32_t stage, int error);
void slot_ended(struct slot *s, uint32_t how, uint32_t value);
void slot_greet(void);
void slot_forget(void);
bool slots_flush(void);
bool slot_entry(struct slot *s, uint32_t tag);
void slots_bury(void);
void slots_retry(void);
void slots_init(void);
void handle_room(const struct request *q);
void handle_ack(const struct request *q);

/* journal.c */
void stream_start(struct slot *s, int index, int pipe, int journal, uint64_t cap);
void stream_close(struct stream *st);
bool stream_idle(const struct stream *st);
void streams_end(struct slot *s);
void stream_retry(struct slot *s, int index);
void feed_start(struct slot *s, int pipe, int spool);
void feed_open(struct slot *s);
void feed_pump(struct slot *s);
void feed_close(struct slot *s);
void handle_stdin(const struct request *q);

/* spawn.c */
struct plan {
    int in, out, err;          /* -1: /dev/null */
    int record, commands, control;
    bool terminal, identity;   /* identity: report uid and gid before exec */
    uint32_t rows, columns;
};
bool spawn_start(struct slot *s, struct plan *p, void (*ready)(struct watch *, uint32_t));
int report_receive(int fd, struct report *out, int *fds, int *count);
bool report_send(int fd, const struct report *r, const int *fds, int count);
void spawn_report(struct watch *w, uint32_t events);
bool pipe_pair(int pair[2], int ours);
int null_open(void);
void child_reset(void);
void close_range_from(unsigned first, unsigned last);
void handle_spawn(const struct request *q, int *fds);
void children_reap(void);
extern bool reap_again;

/* ending.c */
void handle_signal(const struct request *q);
void handle_end(const struct request *q);
bool end_lasts(const struct slot *s);
void end_continue(struct slot *s);
void shell_scan(const struct slot *shell, struct targets *found);

/* users.c: in children only */
struct user {
    uid_t uid;
    gid_t gid;
    char name[256], home[PATH_LIMIT], shell[PATH_LIMIT];
    gid_t groups[256];
    int groups_count;
};
int user_find(const char *who, struct user *u);
int user_become(const struct user *u, uint32_t *stage);

/* helpers.c */
struct helper *helper_start(const struct request *q, uint32_t tag, uint32_t deadline_ms,
                            void (*body)(const struct request *, int channel, int fd), int fd);
void helper_answer(struct helper *h, const struct report *r, int *fds);
void helpers_deadline(void);
uint64_t helpers_next(void);
void helpers_forget(void);
bool helpers_flush(void);
bool helper_reaped(pid_t pid);
void helpers_release(struct text temporary);

/* files.c, ports.c, pty.c, shell.c */
void handle_files(const struct request *q);
void handle_dial(const struct request *q);
void handle_pty(const struct request *q, int *fds);
void handle_resize(const struct request *q);
int terminal_open(const struct plan *p, int report);
void handle_shell(const struct request *q, int *fds);
void handle_run(const struct request *q, int *fds);
void shell_died(struct slot *s, uint32_t how, uint32_t value);
void folder_remove(struct slot *s);
void control_ready(struct watch *w, uint32_t events);

#endif

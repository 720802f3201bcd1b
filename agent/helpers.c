/* Helpers: short-lived children that do for one request what may block, with a deadline. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DEADLINE_LEAST = 10, DEADLINE_MOST = 600000 };
enum { GUARDS_MAX = HELPERS_MAX / 2 }; /* the others are for requests */

static struct helper helpers[HELPERS_MAX];
static int guards;

/* The helper may keep its temporary file; the end of its socket without a word tells it to remove the file. */
static void helper_tell(struct helper *h) { send(h->report.fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL); }

/* Its descriptor was delivered: it stays and removes the temporary file if the server dies before it is renamed. */
static void guard_begin(struct helper *h) {
    if (guards == GUARDS_MAX) {
        helper_tell(h);
        return;
    }
    h->guards = true;
    guards++;
}

/* Sends what is owed and lets go of what is over. */
static void helper_settle(struct helper *h) {
    bool owed = h->answer.tag != 0;
    if (!answer_send(&h->answer)) {
        flush_later();
        return;
    }
    if (h->answer.tag) return;
    close_fd(&h->answer.fd);
    if (owed && h->waits && connection_ready()) guard_begin(h);
    if (h->guards) return;
    if (h->deadline == UINT64_MAX) watch_close(&h->report);
    free(h->kept);
    h->kept = NULL;
    if (!h->pid && h->report.fd < 0) h->used = false;
}

static void guard_end(struct helper *h) {
    h->guards = false;
    guards--;
    helper_settle(h);
}

/* The server renames the file itself from here on, or gives it up. */
void helpers_release(struct text temporary) {
    for (int i = 0; i < HELPERS_MAX; i++) {
        struct helper *h = &helpers[i];
        const char *path = h->guards ? h->kept->u.paths.temporary : "";
        if (!h->guards || strlen(path) != temporary.length || memcmp(path, temporary.bytes, temporary.length)) continue;
        helper_tell(h);
        guard_end(h);
    }
}

/* The plain ending: the report is the answer. Takes the descriptor. */
void helper_answer(struct helper *h, const struct report *r, int *fds) {
    h->answer.verb = r->stage ? ERROR : fds[0] >= 0 ? FD : OK;
    h->answer.stage = r->stage;
    h->answer.error = r->error;
    if (h->answer.verb != FD) return;
    h->answer.value = r->kind;
    h->answer.fd = fds[0];
    fds[0] = -1;
    if (!*r->u.paths.target) return;
    if ((h->kept = malloc(sizeof *r))) {
        memcpy(h->kept, r, sizeof *r);
        h->answer.temporary = h->kept->u.paths.temporary;
        h->answer.target = h->kept->u.paths.target;
        h->waits = true;
    } else {
        h->answer.verb = ERROR;
        h->answer.stage = STAGE_BUSY;
        h->answer.error = ENOMEM;
    }
}

/* Its one result is there: no deadline any more. */
static void helper_done(struct helper *h, const struct report *r, int *fds) {
    h->deadline = UINT64_MAX;
    h->done(h, r, fds);
    for (int i = 0; i < FRAME_FDS; i++) close_fd(&fds[i]);
    helper_settle(h);
}

static void helper_failed(struct helper *h, uint32_t stage, int error) {
    static struct report r;
    int fds[FRAME_FDS] = {-1, -1, -1, -1};
    r.stage = stage;
    r.error = (uint32_t)error;
    helper_done(h, &r, fds);
}

static void helper_ready(struct watch *w, uint32_t events) {
    static struct report r;
    struct helper *h = OWNER(w, struct helper, report);
    int fds[FRAME_FDS] = {-1, -1, -1, -1}, count;
    (void)events;
    int n = report_receive(w->fd, &r, fds, &count);
    if (n < 0) return;
    if (h->guards) guard_end(h); /* somebody in the box killed it */
    else if (h->deadline == UINT64_MAX) watch_close(w); /* it said all it had to say */
    else if (n == 0) helper_failed(h, STAGE_OPEN, ECANCELED); /* it was killed */
    else helper_done(h, &r, fds);
}

static _Noreturn void helper_child(const struct request *q, void (*body)(const struct request *, int, int), int channel,
                                   int fd) {
    enum { CHANNEL = 3, EXTRA = 4, HIGH = 32 };
    child_reset();
    signal(SIGPIPE, SIG_IGN);
    channel = fcntl(channel, F_DUPFD_CLOEXEC, HIGH);
    if (fd >= 0) fd = fcntl(fd, F_DUPFD_CLOEXEC, HIGH);
    if (dup3(channel, CHANNEL, O_CLOEXEC) < 0 || (fd >= 0 && dup3(fd, EXTRA, O_CLOEXEC) < 0)) _exit(126);
    close_range_from(fd >= 0 ? EXTRA + 1 : EXTRA, ~0u);
    body(q, CHANNEL, EXTRA);
    _exit(0);
}

static struct helper *helper_new(void) {
    for (int i = 0; i < HELPERS_MAX; i++) {
        struct helper *h = &helpers[i];
        if (h->used) continue;
        memset(h, 0, sizeof *h);
        h->report.fd = h->answer.fd = -1;
        return h;
    }
    return NULL;
}

/* Runs body(q, channel, fd) in a child, which ends by one report. NULL: there is none, and a tag was answered. */
struct helper *helper_start(const struct request *q, uint32_t tag, uint32_t deadline_ms,
                            void (*body)(const struct request *, int channel, int fd), int fd) {
    struct helper *h = helper_new();
    int pair[2] = {-1, -1}, error = 0;
    uint32_t stage = STAGE_BUSY, ms = deadline_ms < DEADLINE_LEAST ? DEADLINE_LEAST : deadline_ms;
    if (!h) error = EAGAIN;
    else if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) error = errno;
    else if ((h->pid = fork()) == 0) helper_child(q, body, pair[1], fd);
    else if (h->pid < 0) error = errno, stage = STAGE_FORK;
    close_fd(&pair[1]);
    if (error) {
        close_fd(&pair[0]);
        if (tag) answer_error(tag, stage, error);
        else errno = error;
        return NULL;
    }
    h->used = true;
    h->report.fd = pair[0];
    h->report.ready = helper_ready;
    h->answer.tag = tag;
    h->done = helper_answer;
    h->deadline = now_ms() + (ms > DEADLINE_MOST ? DEADLINE_MOST : ms);
    watch_set(&h->report, EPOLLIN); /* without it the deadline ends the request */
    return h;
}

void helpers_deadline(void) {
    uint64_t now = now_ms();
    for (int i = 0; i < HELPERS_MAX; i++) {
        struct helper *h = &helpers[i];
        if (!h->used || now < h->deadline) continue;
        if (h->pid) kill(h->pid, SIGKILL);
        helper_failed(h, STAGE_OPEN, ETIMEDOUT);
    }
}

uint64_t helpers_next(void) {
    uint64_t next = UINT64_MAX;
    for (int i = 0; i < HELPERS_MAX; i++)
        if (helpers[i].used && helpers[i].deadline < next) next = helpers[i].deadline;
    return next;
}

/* The server is gone. Those that work for it alone find their socket closed; the deadline holds for them, too. */
void helpers_forget(void) {
    for (int i = 0; i < HELPERS_MAX; i++) {
        struct helper *h = &helpers[i];
        if (h->guards) guard_end(h);
        if (!h->used || !h->answer.tag) continue;
        h->answer.tag = 0;
        watch_close(&h->report);
        helper_settle(h);
    }
}

bool helpers_flush(void) {
    for (int i = 0; i < HELPERS_MAX; i++) {
        struct helper *h = &helpers[i];
        if (!h->used) continue;
        helper_settle(h);
        if (h->answer.tag && h->answer.verb) return false;
    }
    return true;
}

bool helper_reaped(pid_t pid) {
    for (int i = 0; i < HELPERS_MAX; i++) {
        struct helper *h = &helpers[i];
        if (!h->used || h->pid != pid) continue;
        h->pid = 0;
        helper_settle(h);
        return true;
    }
    return false;
}

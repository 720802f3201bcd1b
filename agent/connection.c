/* The connection to the server: receives requests and sends answers. One frame waits at most; while it does, or while
 * any slot owes a frame that found no room, no request is read. */
#include "agent.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FRAMES_A_TURN = 32, FRAMES_OF_OLD = 4096 };

static void listener_ready(struct watch *w, uint32_t events);
static void connection_event(struct watch *w, uint32_t events);

struct watch listener = {.fd = -1, .ready = listener_ready};
static struct watch peer = {.fd = -1, .ready = connection_event};
static bool greeted;   /* HELLO was answered: events may be sent */
static bool mute;      /* the server is gone, what it sent before is still carried out */
static bool full;      /* the socket has no room */
static bool owing;     /* some slot or helper has a frame to send */
static bool readable;  /* there may be requests */
static struct frame waiting; /* length 0: none */
static uint32_t list_tag; /* a LIST that is being answered, 0: none */
static int list_at;
static uint64_t list_count;

static void connection_close(void) {
    watch_close(&peer);
    greeted = mute = full = owing = false;
    waiting.length = list_tag = 0;
    slot_forget();
    helpers_forget();
}

/* False when there is no room; a lost server takes everything silently. */
static bool frame_send(const struct frame *f, int fd) {
    struct iovec part = {(void *)f->bytes, f->length};
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } control = {0};
    struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1};
    if (mute || peer.fd < 0) return true;
    if (full) return false;
    if (fd >= 0) {
        m.msg_control = &control;
        m.msg_controllen = sizeof control;
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    ssize_t sent;
    do sent = sendmsg(peer.fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0) return true;
    if (errno == EAGAIN) full = true;
    else mute = true; /* its last requests may still be in the receive buffer: they are read until EOF */
    return mute;
}

/* Sends the answer to the request at hand, or keeps it: reading stops until it is gone. */
static void frame_keep(const struct frame *f) {
    if (frame_send(f, -1)) return;
    memcpy(waiting.bytes, f->bytes, f->length);
    waiting.length = f->length;
}

void answer_ok(uint32_t tag, uint64_t value) {
    struct frame f;
    frame_start(&f, OK, tag);
    put_u64(&f, value);
    frame_keep(&f);
}

static void error_frame(struct frame *f, uint32_t tag, uint32_t stage, int error) {
    frame_start(f, ERROR, tag);
    put_u32(f, stage);
    put_u32(f, (uint32_t)error);
    put_text(f, errno_name(error));
}

void answer_error(uint32_t tag, uint32_t stage, int error) {
    struct frame f;
    error_frame(&f, tag, stage, error);
    frame_keep(&f);
}

/* Sends what is owed; true when nothing is owed any more. */
bool answer_send(struct answer *a) {
    struct frame f;
    if (!a->tag || !a->verb) return true;
    if (a->verb == ERROR) {
        error_frame(&f, a->tag, a->stage, (int)a->error);
    } else {
        frame_start(&f, a->verb, a->tag);
        put_u64(&f, a->value);
    }
    if (a->verb == FD) {
        put_text(&f, a->temporary ? a->temporary : "");
        put_text(&f, a->target ? a->target : "");
    }
    if (!frame_send(&f, a->verb == FD ? a->fd : -1)) return false;
    a->tag = a->verb = 0;
    return true;
}

bool event_send(const struct frame *f) { return frame_send(f, -1); }
bool connection_ready(void) { return greeted && !mute && peer.fd >= 0; }
void flush_later(void) { owing = true; }

static void handle_hello(const struct request *q) {
    if (q->oldest > GENERATION || q->newest < GENERATION) {
        answer_error(q->tag, STAGE_DECODE, EPROTONOSUPPORT);
        return;
    }
    greeted = true;
    answer_ok(q->tag, GENERATION);
    slot_greet();
}

static void list_continue(void) {
    for (; list_at < slots_end; list_at++) {
        struct slot *s = slots[list_at];
        if (!s || s->dead || s->acknowledged) continue;
        if (!slot_entry(s, list_tag)) return;
        list_count++;
    }
    uint32_t tag = list_tag;
    list_tag = 0;
    answer_ok(tag, list_count);
}

static void handle_list(const struct request *q) {
    list_tag = q->tag;
    list_at = 0;
    list_count = 0;
    list_continue();
}

static void carry_out(const struct request *q, int *fds) {
    switch (q->verb) {
    case HELLO: handle_hello(q); break;
    case SPAWN: handle_spawn(q, fds); break;
    case SIGNAL: handle_signal(q); break;
    case END: handle_end(q); break;
    case ROOM: handle_room(q); break;
    case STDIN: handle_stdin(q); break;
    case READ: case WRITE: case RENAME: case UNLINK: handle_files(q); break;
    case DIAL: handle_dial(q); break;
    case PTY: handle_pty(q, fds); break;
    case RESIZE: handle_resize(q); break;
    case SHELL: handle_shell(q, fds); break;
    case RUN: handle_run(q, fds); break;
    case LIST: handle_list(q); break;
    default: handle_ack(q);
    }
}

/* A well-formed frame whose names are no names is answered, the connection lives on. */
static bool names_valid(const struct request *q) {
    bool file = q->verb >= READ && q->verb <= UNLINK;
    bool keyless = file || q->verb == HELLO || q->verb == LIST || q->verb == ROOM || q->verb == DIAL;
    if (q->verb == SIGNAL && q->scope == SCOPE_ALL) return q->key.length == 0;
    return (keyless || key_valid(q->key)) && (q->verb != RUN || key_valid(q->shell));
}

static void dispatch(const struct request *q, int *fds) {
    if (q->verb != HELLO && !greeted) connection_close();
    else if (!names_valid(q)) answer_error(q->tag, STAGE_DECODE, EINVAL);
    else carry_out(q, fds);
}

/* Collects the descriptors of a message; -1 when some were lost. */
static int descriptors_take(struct msghdr *m, int *fds) {
    struct cmsghdr *c = CMSG_FIRSTHDR(m); /* there is room for one alone */
    int count = c ? (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
    if (c) memcpy(fds, CMSG_DATA(c), (size_t)count * sizeof(int));
    return m->msg_flags & (MSG_CTRUNC | MSG_TRUNC) ? -1 : count;
}

/* Reads and carries out one frame; false when there is none, or no more may be read now. */
static bool frame_receive(void) {
    static uint8_t bytes[FRAME_MAX];
    union { struct cmsghdr align; char bytes[CMSG_SPACE(FRAME_FDS * sizeof(int))]; } control;
    struct iovec part = {bytes, sizeof bytes};
    struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int fds[FRAME_FDS] = {-1, -1, -1, -1};
    struct request q;
    if (peer.fd < 0 || (!mute && (full || waiting.length || list_tag))) return false;
    ssize_t n = recvmsg(peer.fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EINTR || errno == ECONNRESET)) return true; /* the reset is told once, frames may follow */
    if (n < 0 && errno == EAGAIN) return false;
    int count = n < 0 ? -1 : descriptors_take(&m, fds);
    if (n <= 0 || count < 0 || !request_decode(bytes, (size_t)n, count, &q)) connection_close();
    else dispatch(&q, fds);
    for (int i = 0; i < FRAME_FDS; i++) close_fd(&fds[i]);
    return peer.fd >= 0;
}

static void connection_event(struct watch *w, uint32_t events) {
    (void)w;
    readable = true;
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) full = false;
}

/* After a full batch of events requests are looked for even if none was reported: much output starves none. */
void connection_turn(bool busy) {
    if (peer.fd < 0) return;
    if (!full && waiting.length && frame_send(&waiting, -1)) waiting.length = 0;
    if (!full && !waiting.length && list_tag) list_continue();
    readable = readable || busy;
    for (int i = 0; i < FRAMES_A_TURN && readable; i++) readable = frame_receive();
    if (!full && owing) owing = !(helpers_flush() && slots_flush());
    if (peer.fd >= 0 && !watch_set(&peer, full ? EPOLLOUT : EPOLLIN)) connection_close();
}

/* The newest connection counts. What the older one's server had sent before is carried out first. */
static void listener_ready(struct watch *w, uint32_t events) {
    (void)events;
    int fd = accept4(w->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED)) return;
    if (fd < 0) { /* no memory or no descriptor in the whole machine: a ready listener would make us spin */
        watch_unset(w);
        retry_later();
        return;
    }
    mute = peer.fd >= 0;
    for (int i = 0; i < FRAMES_OF_OLD && frame_receive(); i++) continue;
    connection_close();
    peer.fd = fd;
    if (!watch_set(&peer, EPOLLIN)) connection_close();
}

void connection_start(int fd) {
    listener.fd = fd;
    watch_set(&listener, EPOLLIN);
}

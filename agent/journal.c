/* Pumps: a command's pipes into its journals, its spool into its stdin. */
#include "agent.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void stream_pump(struct slot *s, struct stream *st);

static void stdout_ready(struct watch *w, uint32_t events) {
    struct slot *s = OWNER(w, struct slot, out[0].pipe);
    (void)events;
    stream_pump(s, &s->out[0]);
    slot_settle(s);
}

static void stderr_ready(struct watch *w, uint32_t events) {
    struct slot *s = OWNER(w, struct slot, out[1].pipe);
    (void)events;
    stream_pump(s, &s->out[1]);
    slot_settle(s);
}

/* Takes over both descriptors. */
void stream_start(struct slot *s, int index, int pipe, int journal, uint64_t cap) {
    struct stream *st = &s->out[index];
    st->pipe.fd = pipe;
    st->pipe.ready = index ? stderr_ready : stdout_ready;
    st->journal = journal;
    st->cap = cap;
    if (!watch_set(&st->pipe, EPOLLIN)) retry_later();
}

void stream_close(struct stream *st) {
    watch_close(&st->pipe);
    close_fd(&st->journal);
}

/* Nothing will come any more. */
bool stream_idle(const struct stream *st) { return st->pipe.fd < 0; }

/* Fixes the length for EXIT once the bytes of the command's life are in the journal. */
static void stream_check(struct stream *st) {
    if (!st->ending || st->owed || st->spill_length) return;
    st->ending = false;
    st->end = st->length;
}

/* Writes to the journal; the rest is kept when it refuses, and then the pipe is left alone until it takes it. */
static bool stream_write(struct slot *s, struct stream *st, const uint8_t *bytes, size_t count) {
    while (count) {
        ssize_t n = write(st->journal, bytes, count);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            int error = n < 0 ? errno : EIO;
            s->stall_due = s->stall_due || st->stall != error;
            st->stall = error;
            memmove(st->spill, bytes, count);
            st->spill_length = (uint32_t)count;
            watch_unset(&st->pipe);
            retry_later();
            return false;
        }
        bytes += n;
        count -= (size_t)n;
        st->length += (uint64_t)n;
    }
    st->spill_length = 0;
    return true;
}

static void stream_take(struct slot *s, struct stream *st, size_t count) {
    uint64_t room = st->cap > st->length ? st->cap - st->length : 0;
    size_t keep = count < room ? count : (size_t)room;
    if (keep < count) st->cut = true;
    stream_write(s, st, buffer, keep);
}

/* Moves one chunk at most, so that every pipe and the server get their turn. */
static void stream_pump(struct slot *s, struct stream *st) {
    if (st->pipe.fd < 0 || st->stall) return;
    size_t want = st->ending && st->owed < CHUNK ? (size_t)st->owed : CHUNK, got = 0;
    ssize_t n = 1;
    while (got < want && (n = read(st->pipe.fd, buffer + got, want - got)) > 0) got += (size_t)n;
    bool waits = n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
    if (st->ending) st->owed -= got;
    if (n <= 0) st->owed = 0; /* somebody in the box may also have read the command's output away */
    if (got) stream_take(s, st, got);
    if (!waits && !st->stall) stream_close(st); /* a stalled pipe is kept, to be looked at again */
    stream_check(st);
}

/* The command has ended: what its pipes hold now belongs to it. */
void streams_end(struct slot *s) {
    for (int i = 0; i < 2; i++) {
        struct stream *st = &s->out[i];
        int held = 0;
        if (st->pipe.fd >= 0 && ioctl(st->pipe.fd, FIONREAD, &held) < 0) held = 0;
        st->owed = (uint64_t)held;
        st->ending = true;
        stream_check(st);
        stream_pump(s, st); /* the end of the file is not always reported: a FIFO may never have had a writer */
    }
}

/* Tries a journal that refused, or a pipe that could not be watched. */
void stream_retry(struct slot *s, int index) {
    struct stream *st = &s->out[index];
    if (st->pipe.fd < 0 || st->pipe.listed) return;
    if (st->stall) {
        if (!stream_write(s, st, st->spill, st->spill_length)) {
            slot_settle(s);
            return;
        }
        st->stall = 0;
        s->stall_due = true;
    }
    if (!watch_set(&st->pipe, EPOLLIN)) retry_later();
    stream_check(st);
    slot_settle(s);
}

static void feed_gone(struct slot *s) {
    s->in.gone = !s->in.closed;
    watch_close(&s->in.pipe);
    close_fd(&s->in.spool);
}

void feed_close(struct slot *s) {
    if (s->in.attached) feed_gone(s);
}

static void feed_ready(struct watch *w, uint32_t events) {
    struct slot *s = OWNER(w, struct slot, in.pipe);
    if (events & EPOLLERR) feed_gone(s); /* the last reader closed it */
    else feed_pump(s);
}

/* Takes over both descriptors; bytes flow after feed_open. */
void feed_start(struct slot *s, int pipe, int spool) {
    s->in.pipe.fd = pipe;
    s->in.pipe.ready = feed_ready;
    s->in.spool = spool;
    s->in.attached = true;
}

/* The reader has the other end: from now on its absence means that it is gone. */
void feed_open(struct slot *s) {
    s->in.open = true;
    feed_pump(s);
}

/* Moves one chunk; the position counts what the pipe took, nothing else. False when room in the pipe would not help. */
static bool feed_move(struct slot *s) {
    struct feed *in = &s->in;
    uint64_t left = in->length - in->position;
    ssize_t n = pread(in->spool, buffer, left < CHUNK ? (size_t)left : CHUNK, (off_t)in->position);
    if (n < 0) retry_later();
    if (n <= 0) return false; /* shorter than told: the server will tell again */
    ssize_t taken = write(in->pipe.fd, buffer, (size_t)n);
    if (taken < 0 && errno == EPIPE) feed_gone(s);
    if (taken > 0) in->position += (uint64_t)taken;
    return true;
}

/* Fills the pipe; idle pipes stay watched, for an error event tells that the reader is gone. */
void feed_pump(struct slot *s) {
    struct feed *in = &s->in;
    if (in->pipe.fd < 0 || !in->open) return;
    bool flows = in->position < in->length && feed_move(s);
    if (in->pipe.fd < 0) return;
    if (in->eof && in->position == in->length) {
        in->closed = true;
        feed_gone(s);
    } else if (!watch_set(&in->pipe, flows && in->position < in->length ? EPOLLOUT : 0)) {
        retry_later();
    }
}

void handle_stdin(const struct request *q) {
    struct slot *s = slot_find(q->key);
    if (!s) {
        answer_error(q->tag, STAGE_LOOKUP, ESRCH);
        return;
    }
    struct feed *in = &s->in;
    bool more = q->length > in->length;
    if (!in->attached) {
        answer_error(q->tag, STAGE_STDIN, EINVAL);
        return;
    }
    if (!in->gone && !(in->eof && more)) {
        if (more) in->length = q->length;
        in->eof = in->eof || q->eof;
        feed_pump(s);
    }
    if (in->gone || (in->eof && q->length > in->length)) answer_error(q->tag, STAGE_STDIN, EPIPE);
    else answer_ok(q->tag, in->position);
}

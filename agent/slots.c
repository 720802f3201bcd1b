/* The table of executions, terminals and shells: look-up, their answers and events, their end. */
#include "agent.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

struct slot *slots[SLOTS_MAX];
int slots_end; /* one past the highest used index */

static int executions, sessions, executions_max = EXECUTIONS_MAX, sessions_max = SESSIONS_MAX;
static bool graves;
static uint64_t serials;

static bool is_session(const struct slot *s) { return s->type == TERMINAL || s->type == SESSION; }

/* So few that descriptors cannot run out: 7 for an execution that starts, 4 for a shell or terminal. */
void slots_init(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur == RLIM_INFINITY) return;
    long left = (long)limit.rlim_cur - 2 * HELPERS_MAX - 64;
    if (left < 0) left = 0;
    if (left / 16 < sessions_max) sessions_max = (int)(left / 16);
    left -= 4 * sessions_max;
    if (left / 7 < executions_max) executions_max = (int)(left / 7);
}

/* A slot whose start failed is not found: its key is free again. */
struct slot *slot_find(struct text key) {
    for (int i = 0; i < slots_end; i++) {
        struct slot *s = slots[i];
        if (!s || s->dead || s->failed) continue;
        if (!memcmp(s->key, key.bytes, key.length) && !s->key[key.length]) return s;
    }
    return NULL;
}

/* Also finds one whose start failed. */
struct slot *slot_numbered(uint64_t serial) {
    for (int i = 0; i < slots_end; i++)
        if (slots[i] && !slots[i]->dead && slots[i]->serial == serial) return slots[i];
    return NULL;
}

static struct slot *slot_allocate(void) {
    int i = 0;
    while (i < SLOTS_MAX && slots[i]) i++;
    if (i == SLOTS_MAX) return NULL;
    /* Not calloc: untouched parts must cost nothing, neither by clearing nor as part of a huge page. */
    void *memory = mmap(NULL, sizeof **slots, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    madvise(memory, sizeof **slots, MADV_NOHUGEPAGE);
    slots[i] = memory;
    if (i >= slots_end) slots_end = i + 1;
    return slots[i];
}

/* A new slot that owes the answer to `q`; NULL when the request was answered with an error. */
struct slot *slot_new(const struct request *q, enum type type) {
    bool session = type == TERMINAL || type == SESSION;
    if (slot_find(q->key)) {
        answer_error(q->tag, STAGE_DUPLICATE, EEXIST);
        return NULL;
    }
    bool room = session ? sessions < sessions_max : executions < executions_max;
    struct slot *s = room ? slot_allocate() : NULL;
    if (!s) {
        answer_error(q->tag, STAGE_BUSY, EAGAIN);
        return NULL;
    }
    *(session ? &sessions : &executions) += 1;
    s->serial = ++serials;
    text_copy(q->key, s->key, sizeof s->key);
    s->type = type;
    s->answer.tag = q->tag;
    int *all[] = {&s->report.fd, &s->out[0].pipe.fd, &s->out[0].journal, &s->out[1].pipe.fd, &s->out[1].journal,
                  &s->in.pipe.fd, &s->in.spool, &s->master, &s->control.fd, &s->commands, &s->answer.fd};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) *all[i] = -1;
    return s;
}

/* Closes what it holds and lets go of its shell or command. */
static void slot_close(struct slot *s) {
    watch_close(&s->report);
    watch_close(&s->control);
    stream_close(&s->out[0]);
    stream_close(&s->out[1]);
    feed_close(s);
    close_fd(&s->commands);
    close_fd(&s->master);
    if (s->running) s->running->shell = NULL;
    if (s->shell) s->shell->running = NULL;
    s->running = s->shell = NULL;
}

/* Other events of this turn may still point at it, so the memory goes at the end of the turn. */
void slot_drop(struct slot *s) {
    if (s->dead) return;
    slot_close(s);
    s->dead = graves = true;
}

void slots_bury(void) {
    if (!graves) return;
    graves = false;
    for (int i = 0; i < slots_end; i++) {
        if (!slots[i] || !slots[i]->dead) continue;
        *(is_session(slots[i]) ? &sessions : &executions) -= 1;
        munmap(slots[i], sizeof *slots[i]);
        slots[i] = NULL;
    }
    while (slots_end && !slots[slots_end - 1]) slots_end--;
}

static void exit_frame(const struct slot *s, struct frame *f) {
    uint32_t cuts = (s->out[0].cut ? EXIT_STDOUT_CUT : 0) | (s->out[1].cut ? EXIT_STDERR_CUT : 0);
    frame_start(f, EXIT, 0);
    put_text(f, s->key);
    put_u32(f, s->how);
    put_u32(f, s->value);
    put_u64(f, s->out[0].end);
    put_u64(f, s->out[1].end);
    put_u32(f, s->flags | cuts);
}

static void stall_frame(const struct slot *s, struct frame *f) {
    frame_start(f, STALL, 0);
    put_text(f, s->key);
    put_u32(f, (uint32_t)(s->out[0].stall ? s->out[0].stall : s->out[1].stall));
}

/* Sends what the slot owes, the answer to its start before its events; false when the socket has no room. */
bool slot_flush(struct slot *s) {
    struct frame f;
    if (!answer_send(&s->answer)) return false;
    if (s->failed || s->answer.tag || !connection_ready()) return true;
    if (s->stall_due) {
        stall_frame(s, &f);
        if (!event_send(&f)) return false;
        s->stall_due = false;
    }
    if (s->exit_due) {
        exit_frame(s, &f);
        if (!event_send(&f)) return false;
        s->exit_due = false;
    }
    return true;
}

/* To be called after every change: finds the end, sends what is owed, drops the slot when nothing is left. */
void slot_settle(struct slot *s) {
    if (s->dead) return;
    if (s->state == ENDING && !s->fixed && !end_lasts(s)) {
        s->fixed = true;
        streams_end(s);
    }
    if (s->state == ENDING && s->fixed && !s->out[0].ending && !s->out[1].ending) {
        s->state = ENDED;
        s->exit_due = true;
    }
    if (!slot_flush(s)) flush_later();
    if (s->failed ? s->answer.tag != 0 : !s->acknowledged) return;
    if (s->kill_at || s->folder || !stream_idle(&s->out[0]) || !stream_idle(&s->out[1])) return;
    slot_drop(s);
}

bool slots_flush(void) {
    for (int i = 0; i < slots_end; i++) {
        struct slot *s = slots[i];
        if (!s || s->dead) continue;
        slot_settle(s);
        if (!s->dead && !slot_flush(s)) return false;
    }
    return true;
}

/* The answer to the request that made the slot: OK(value), or FD with the terminal's master. */
void slot_answer(struct slot *s, uint32_t verb, uint64_t value) {
    s->answer.verb = verb;
    s->answer.value = value;
    s->answer.fd = s->master;
    slot_settle(s);
}

/* Nothing but the ERROR is left of it. */
void slot_fail(struct slot *s, uint32_t stage, int error) {
    slot_close(s);
    s->failed = true;
    s->answer.verb = ERROR;
    s->answer.stage = stage;
    s->answer.error = (uint32_t)error;
    slot_settle(s);
}

/* Its process has ended (or, in a shell, its command): EXIT goes out once its pipes' content is in the journals, and
 * all that a kill takes along has ended. */
void slot_ended(struct slot *s, uint32_t how, uint32_t value) {
    s->how = how;
    s->value = value;
    s->state = ENDING;
    if (!s->answer.tag) close_fd(&s->master); /* else it is still to be handed over */
    slot_settle(s);
}

/* A new server is there: it hears again what it has not acknowledged. */
void slot_greet(void) {
    for (int i = 0; i < slots_end; i++) {
        struct slot *s = slots[i];
        if (!s || s->dead || s->failed) continue;
        s->exit_due = s->state == ENDED && !s->acknowledged;
        s->stall_due = s->out[0].stall || s->out[1].stall;
    }
    flush_later();
}

/* The server is gone: nobody waits for these answers any more. */
void slot_forget(void) {
    for (int i = 0; i < slots_end; i++) {
        if (!slots[i] || slots[i]->dead) continue;
        slots[i]->answer.tag = 0;
        slot_settle(slots[i]);
    }
}

/* One ENTRY; false when the socket has no room. */
bool slot_entry(struct slot *s, uint32_t tag) {
    struct frame f;
    pid_t pid = s->shell ? s->shell->pid : s->pid;
    if (s->failed) return true;
    frame_start(&f, ENTRY, tag);
    put_text(&f, s->key);
    put_u32(&f, s->type);
    put_u32(&f, s->state == STARTING ? 0 : s->state == ENDED ? 2 : 1);
    put_u64(&f, (uint64_t)pid);
    put_u64(&f, s->in.position);
    put_u64(&f, s->out[0].length);
    put_u64(&f, s->out[1].length);
    put_text(&f, s->shell_key);
    return event_send(&f);
}

void slots_retry(void) {
    for (int i = 0; i < slots_end; i++) {
        struct slot *s = slots[i];
        if (!s || s->dead) continue;
        stream_retry(s, 0);
        stream_retry(s, 1);
        feed_pump(s);
        if (s->kill_at) end_continue(s);
        if (s->folder && (s->failed || s->state >= ENDING)) folder_remove(s);
    }
}

/* Executions that have ended count as long as anybody holds their pipes. */
void handle_room(const struct request *q) { answer_ok(q->tag, (uint64_t)(executions_max - executions)); }

void handle_ack(const struct request *q) {
    struct slot *s = slot_find(q->key);
    if (!s || s->acknowledged) {
        answer_error(q->tag, STAGE_LOOKUP, ESRCH);
    } else if (s->state != ENDED) {
        answer_error(q->tag, STAGE_BUSY, EBUSY);
    } else {
        s->acknowledged = true;
        s->exit_due = false;
        answer_ok(q->tag, 0);
        slot_settle(s);
    }
}

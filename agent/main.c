/* devboxd-init, pid 1 of a devbox: the event loop. Descriptor 3 is the listening socket that the server made. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

enum { LISTENER_FD = 3, EVENTS = 32, STOP_MS = 1000 };

uint8_t buffer[CHUNK]; /* the one copy buffer; nothing stays in it from one call to the next */
struct rlimit first_limit;

static int epoll = -1;
static uint64_t retry_at; /* 0: nothing is to be tried again */
static uint64_t stop_at;  /* 0: the box goes on */
static struct watch signals = {.fd = -1};

uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* Watches for `events`; false when the kernel has no room, and then the descriptor is not watched. */
bool watch_set(struct watch *w, uint32_t events) {
    struct epoll_event e = {.events = events, .data.ptr = w};
    if (w->listed && w->events == events) return true;
    if (epoll_ctl(epoll, w->listed ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, w->fd, &e) < 0) return false;
    w->listed = true;
    w->events = events;
    return true;
}

/* Not even hang-ups are reported after this, which interest 0 would do. */
void watch_unset(struct watch *w) {
    if (w->listed) epoll_ctl(epoll, EPOLL_CTL_DEL, w->fd, NULL);
    w->listed = false;
}

/* A forked child may still hold the descriptor: without the removal its events would go on. */
void watch_close(struct watch *w) {
    watch_unset(w);
    close_fd(&w->fd);
}

void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

void retry_later(void) {
    if (!retry_at) retry_at = now_ms() + RETRY_MS;
}

/* SIGTERM from outside of the box, which has no sender in here: the machine goes down, and waits for every process. */
static void stop_asked(void) {
    if (stop_at) return;
    stop_at = now_ms() + STOP_MS;
    kill(-1, SIGTERM);
}

static void signals_ready(struct watch *w, uint32_t events) {
    struct signalfd_siginfo info;
    (void)events;
    while (read(w->fd, &info, sizeof info) > 0)
        if (info.ssi_signo == SIGTERM && info.ssi_code == SI_USER && info.ssi_pid == 0) stop_asked();
    reap_again = true;
}

/* Signals are ignored, so that none queues up and none ends the box; two arrive as a descriptor. */
static bool signals_start(void) {
    sigset_t set;
    for (int s = 1; s < 65; s++)
        if (s != SIGCHLD && s != SIGTERM) signal(s, SIG_IGN);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_SETMASK, &set, NULL);
    signals.fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    signals.ready = signals_ready;
    return signals.fd >= 0 && watch_set(&signals, EPOLLIN);
}

/* Room for all slots at once where the machine allows it; EPERM leaves the limit as it is. */
static void limits_raise(void) {
    getrlimit(RLIMIT_NOFILE, &first_limit);
    struct rlimit all = {first_limit.rlim_max, first_limit.rlim_max};
    setrlimit(RLIMIT_NOFILE, &all);
}

/* Milliseconds until something is due, -1 for never. */
static int wait_ms(void) {
    uint64_t next = helpers_next(), now = now_ms();
    if (reap_again) return 0;
    if (retry_at && retry_at < next) next = retry_at;
    if (stop_at && stop_at < next) next = stop_at;
    if (next == UINT64_MAX) return -1;
    return next > now ? (int)(next - now) + 1 : 0;
}

static void turn(void) {
    struct epoll_event events[EVENTS];
    int count = epoll_wait(epoll, events, EVENTS, wait_ms());
    for (int i = 0; i < count; i++) {
        struct watch *w = events[i].data.ptr;
        if (w->fd >= 0 && w->listed) w->ready(w, events[i].events);
    }
    if (reap_again) children_reap();
    helpers_deadline();
    if (retry_at && now_ms() >= retry_at) {
        retry_at = 0;
        slots_retry();
        if (!listener.listed) watch_set(&listener, EPOLLIN);
    }
    connection_turn(count == EVENTS);
    slots_bury();
    if (stop_at && now_ms() >= stop_at) _exit(0); /* the kernel ends what still runs */
}

int main(void) {
    prctl(PR_SET_DUMPABLE, 0); /* first of all: no process of the box may look into this one */
    for (int fd = 0; fd < LISTENER_FD; fd++) /* so that no pipe takes the place of a standard descriptor */
        if (fcntl(fd, F_GETFD) < 0) dup2(LISTENER_FD, fd);
    limits_raise();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0 || !signals_start()) return 1;
    slots_init();
    fcntl(LISTENER_FD, F_SETFD, FD_CLOEXEC);
    fcntl(LISTENER_FD, F_SETFL, O_NONBLOCK);
    connection_start(LISTENER_FD);
    if (!listener.listed) return 2; /* descriptor 3 is not a socket */
    for (;;) turn();
}

/* DIAL: a connected socket to a port of the box. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

/* A socket connected to the port on the loopback address of the family, or -1. */
static int dial(int family, uint16_t port) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP);
    if (fd < 0) return -1;
    bool first = family == AF_INET;
    if (connect(fd, first ? (struct sockaddr *)&v4 : (struct sockaddr *)&v6, first ? sizeof v4 : sizeof v6) == 0)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static void dial_body(const struct request *q, int channel, int unused) {
    static struct report r;
    (void)unused;
    int fd = dial(AF_INET, (uint16_t)q->port), error = errno;
    if (fd < 0) fd = dial(AF_INET6, (uint16_t)q->port);
    if (fd < 0) {
        r.stage = STAGE_CONNECT;
        r.error = (uint32_t)error; /* that of 127.0.0.1: a box without IPv6 would always say so */
    }
    report_send(channel, &r, &fd, fd >= 0);
}

void handle_dial(const struct request *q) {
    if (q->port < 1 || q->port > 65535) answer_error(q->tag, STAGE_CONNECT, EINVAL);
    else helper_start(q, q->tag, q->deadline, dial_body, -1);
}

/* Accepting a connection for a stream, without waiting and without the peer's address.
 *
 * An accept4(2) that finds nothing costs ten times what poll(2) does (Linux 6.18), so the caller
 * that has no reason to expect a connection has that asked first.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

/* Returns the connection, with the options that trio.SocketStream sets; -EAGAIN if there is none.
 * Sockets that have no such options are left as they are. */
static int accept_stream(int listener, int poll_first, int notsent_lowat)
{
    struct pollfd asked = {.fd = listener, .events = POLLIN};
    if (poll_first && listener >= 0 && poll(&asked, 1, 0) == 0)
        return -EAGAIN;
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return -errno;
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &notsent_lowat, sizeof notsent_lowat);
    return fd;
}
